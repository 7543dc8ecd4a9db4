// A libFuzzer target for the boundary that JavaScript calls cross: a flat header and arrays. Any
// bytes give a Status; nothing outside the arrays is touched, which AddressSanitizer sees, since
// each is a block of its own of exactly its length. `npm run fuzz:native` builds and runs it.
//
// Memory of a GPU is a block too: the GPU is played by a backend of the CPU.
//
// Half of the inputs are headers of any bits with any arrays. The other half are calls as
// lib/problem.ts makes them, with at most one number or one array that is not as it should be, so
// that most get past the checks and into the kernels.
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <vector>

#include "addon/flat_call.h"
#include "cpu/thread_pool.h"

namespace sdpa {
namespace {

/// GPU 1 is another one, where nothing may be computed.
constexpr int kGpu = 0;

Status play_forward(const cuda::Call& c, const ForwardOutputs& outputs, const CancelToken& cancel) {
  const Backend& cpu = *kBackends[kBackendCount - 1];
  if (c.device != kGpu || c.on_device != (c.array_count == 0)) std::abort();
  return c.sequences.any()
             ? forward_sequences(cpu, c.sequences, c.problem, c.inputs, outputs, cancel)
             : cpu.forward(c.problem, c.inputs, outputs, cancel);
}

Status play_backward(const cuda::Call& c, const BackwardTensors& tensors,
                     const CancelToken& cancel) {
  const Backend& cpu = *kBackends[kBackendCount - 1];
  if (c.device != kGpu || c.on_device != (c.array_count == 0)) std::abort();
  return c.sequences.any()
             ? backward_sequences(cpu, c.sequences, c.problem, c.inputs, tensors, cancel)
             : cpu.backward(c.problem, c.inputs, tensors, cancel);
}

const CudaPlugin& played_plugin() {
  static cuda::Plugin functions{};
  functions.forward = play_forward;
  functions.backward = play_backward;
  static const CudaPlugin plugin{&functions, 1, ""};
  return plugin;
}

/// The arrays of a call, each in memory of its own: of the host, or `on_device` the tensors.
class Arrays {
 public:
  explicit Arrays(bool on_device = false) : on_device_(on_device) {}

  /// An array of `length` elements, its bytes repeated from `data`.
  void add(FuzzedDataProvider& data, ArrayKind kind, size_t length) {
    const size_t bytes = length * element_size(kind);
    memory_.emplace_back(std::malloc(bytes), std::free);
    uint8_t* const to = static_cast<uint8_t*>(memory_.back().get());
    const std::vector<uint8_t> pattern = data.ConsumeBytes<uint8_t>(std::min<size_t>(bytes, 64));
    for (size_t i = 0; i < bytes; ++i) to[i] = pattern.empty() ? 0 : pattern[i % pattern.size()];
    if (kind == ArrayKind::device || (on_device_ && kind != ArrayKind::int32)) {
      arrays_.push_back({ArrayKind::device, to, bytes, kGpu});
    } else {
      arrays_.push_back({kind, to, length});
    }
  }
  void add(ArrayKind kind, const std::vector<int32_t>& values) {
    memory_.emplace_back(std::malloc(values.size() * sizeof(int32_t)), std::free);
    std::memcpy(memory_.back().get(), values.data(), values.size() * sizeof(int32_t));
    arrays_.push_back({kind, memory_.back().get(), values.size()});
  }
  void add_none() { arrays_.push_back({}); }

  const Array* data() const { return arrays_.data(); }
  size_t size() const { return arrays_.size(); }
  /// Makes one array another one: of another kind, length or place, or none.
  void spoil(FuzzedDataProvider& data) {
    const size_t at = data.ConsumeIntegralInRange<size_t>(0, arrays_.size() - 1);
    Arrays other;
    const ArrayKind kind = any_kind(data);
    const size_t length = arrays_[at].length + data.ConsumeIntegralInRange<size_t>(0, 2);
    other.add(data, kind, length > 0 ? length - 1 : 0);
    memory_.push_back(std::move(other.memory_[0]));
    arrays_[at] = kind == ArrayKind::none ? Array{} : other.arrays_[0];
    if (kind == ArrayKind::device) arrays_[at].device = data.ConsumeIntegralInRange<int>(-1, 1);
  }

  static ArrayKind any_kind(FuzzedDataProvider& data) {
    return ArrayKind(data.ConsumeIntegralInRange<int>(0, int(ArrayKind::other)));
  }

 private:
  bool on_device_;
  std::vector<std::unique_ptr<void, void (*)(void*)>> memory_;
  std::vector<Array> arrays_;
};

/// Runs a call as the addon does. Aborts if what comes back is no Status.
void call(const std::vector<double>& fields, uint32_t backend, const Arrays& arrays,
          bool is_backward) {
  // A copy of exactly its size, where the sanitizer sees a step beyond it.
  const std::unique_ptr<double[]> header(new double[fields.size()]);
  std::copy(fields.begin(), fields.end(), header.get());
  Status status;
  try {
    const FlatCall flat({ArrayKind::float64, header.get(), fields.size()}, backend, arrays.data(),
                        is_backward, played_plugin());
    status = flat.run(CancelToken());
  } catch (const Status& thrown) {
    status = thrown;
  }
  if (int(status.code) < 0 || status.code > StatusCode::internal || !status.message) std::abort();
}

void any_call(FuzzedDataProvider& data) {
  const bool is_backward = data.ConsumeBool();
  const uint32_t backend = data.ConsumeIntegralInRange<uint32_t>(0, uint32_t(kBackendCount) + 1);
  std::vector<double> header(data.ConsumeIntegralInRange<size_t>(kFieldCount - 1, kFieldCount + 1));
  for (double& field : header) {
    field = data.ConsumeBool() ? double(data.ConsumeIntegralInRange<int64_t>(-1, 5))
                               : data.ConsumeFloatingPoint<double>();
  }
  Arrays arrays;
  while (arrays.size() < kArrayCount) {
    const ArrayKind kind = Arrays::any_kind(data);
    if (kind == ArrayKind::none) {
      arrays.add_none();
    } else {
      arrays.add(data, kind, data.ConsumeIntegralInRange<size_t>(0, 300));
    }
  }
  call(header, backend, arrays, is_backward);
}

/// A Problem as numbers, in the order of the header.
std::vector<double> encode(const Problem& p) {
  std::vector<double> header;
#define SDPA_WRITE_FIELD(type, name) header.push_back(double(p.name));
  SDPA_PROBLEM_FIELDS(SDPA_WRITE_FIELD)
#undef SDPA_WRITE_FIELD
  return header;
}

/// Around the widths of vectors and tiles.
uint32_t any_length(FuzzedDataProvider& data) {
  constexpr uint32_t lengths[] = {1, 2, 3, 7, 8, 15, 16, 17, 31, 33, 63, 64, 65, 129};
  return data.PickValueInArray(lengths);
}

enum class Form { plain, samples, packed, cache };

struct Sizes {
  Form form;
  std::vector<int32_t> query_starts, key_starts, key_blocks, kv_lengths;
  size_t query_rows, key_rows, blocks;  // rows of each head, over the whole batch
};

std::vector<int32_t> any_starts(FuzzedDataProvider& data, uint32_t batch, uint32_t most) {
  std::vector<int32_t> starts{0};
  for (uint32_t b = 0; b < batch; ++b) {
    starts.push_back(starts.back() + data.ConsumeIntegralInRange<int32_t>(b == 0, int32_t(most)));
  }
  return starts;
}

Problem any_problem(FuzzedDataProvider& data, Form form) {
  Problem p{};
  p.batch = data.ConsumeIntegralInRange<uint32_t>(1, 3);
  p.kv_heads = data.ConsumeIntegralInRange<uint32_t>(1, 2);
  p.query_heads = p.kv_heads * data.ConsumeIntegralInRange<uint32_t>(1, 2);
  p.query_length = any_length(data);
  p.key_length = any_length(data);
  p.head_dim = any_length(data);
  p.value_dim = any_length(data);
  p.layout = form == Form::packed || data.ConsumeBool() ? Layout::bshd : Layout::bhsd;
  p.type = p.key_type = Type(data.ConsumeIntegralInRange<int>(0, 2));
  p.mask_batch = p.mask_heads = p.mask_queries = p.mask_keys = 1;
  if (form == Form::plain || form == Form::samples) {
    p.mask_type = MaskType(data.ConsumeIntegralInRange<int>(0, 4));
    if (data.ConsumeBool()) p.mask_batch = p.batch;
    if (data.ConsumeBool()) p.mask_heads = p.query_heads;
    if (data.ConsumeBool()) p.mask_queries = p.query_length;
    if (data.ConsumeBool()) p.mask_keys = p.key_length;
  }
  if (form == Form::cache) p.key_block_length = 64 * data.ConsumeIntegralInRange<uint32_t>(1, 2);
  p.is_causal = data.ConsumeBool();
  p.causal_offset = data.ConsumeBool() ? data.ConsumeIntegral<int32_t>()
                                       : data.ConsumeIntegralInRange<int32_t>(-40, 140);
  p.window_left = data.ConsumeBool() ? -1 : data.ConsumeIntegralInRange<int32_t>(0, 0x7fffffff);
  p.window_right = data.ConsumeBool() ? -1 : data.ConsumeIntegralInRange<int32_t>(0, 40);
  p.scale = data.ConsumeBool() ? 0.25f : data.ConsumeFloatingPoint<float>();
  p.softcap = data.ConsumeBool() ? 0 : data.ConsumeFloatingPoint<float>();
  p.dropout_p = data.ConsumeBool() ? 0 : data.ConsumeProbability<double>();
  p.dropout_placement = Placement(data.ConsumeIntegralInRange<int>(0, 2));
  p.dropout_broadcast = data.ConsumeIntegralInRange<uint32_t>(0, 7);
  p.seed_lo = p.offset_hi = data.ConsumeIntegral<uint32_t>();
  p.batch_offset = p.head_offset = data.ConsumeIntegral<uint32_t>();
  p.query_offset = data.ConsumeIntegral<uint32_t>();
  p.key_offset = data.ConsumeIntegral<uint32_t>();
  p.precision = Precision(data.ConsumeIntegralInRange<int>(0, 2));
  if (form == Form::samples) p.samples = data.ConsumeIntegralInRange<uint32_t>(1, 5);
  return p;
}

Sizes sizes_of(FuzzedDataProvider& data, Form form, const Problem& p) {
  Sizes s{form, {}, {}, {}, {}, size_t{p.batch} * p.query_length, size_t{p.batch} * p.key_length,
          0};
  if (form == Form::packed) {
    s.query_starts = any_starts(data, p.batch, p.query_length);
    s.key_starts = any_starts(data, p.batch, p.key_length);
    s.query_rows = size_t(s.query_starts.back());
    s.key_rows = size_t(s.key_starts.back());
  }
  if (form == Form::cache) {
    const size_t width = (p.key_length + p.key_block_length - 1) / p.key_block_length;
    s.blocks = data.ConsumeIntegralInRange<size_t>(1, 4);
    s.key_rows = s.blocks * p.key_block_length;
    for (size_t i = 0; i < p.batch * width; ++i) {
      s.key_blocks.push_back(data.ConsumeIntegralInRange<int32_t>(0, int32_t(s.blocks) - 1));
    }
  }
  if (form == Form::cache || data.ConsumeBool()) {
    for (uint32_t b = 0; b < p.batch; ++b) {
      const int32_t most =
          form == Form::packed ? s.key_starts[b + 1] - s.key_starts[b] : int32_t(p.key_length);
      s.kv_lengths.push_back(data.ConsumeIntegralInRange<int32_t>(0, most));
    }
  }
  return s;
}

void add_integers(Arrays& arrays, const std::vector<int32_t>& values) {
  values.empty() ? arrays.add_none() : arrays.add(ArrayKind::int32, values);
}

void add_inputs(FuzzedDataProvider& data, Arrays& arrays, const Problem& p, const Sizes& s) {
  const ArrayKind kind = array_kind(p.type);
  add_integers(arrays, s.query_starts);
  add_integers(arrays, s.key_starts);
  add_integers(arrays, s.key_blocks);
  arrays.add(data, kind, s.query_rows * p.query_heads * p.head_dim);
  arrays.add(data, kind, s.key_rows * p.kv_heads * p.head_dim);
  arrays.add(data, kind, s.key_rows * p.kv_heads * p.value_dim);
  if (p.mask_type == MaskType::none) {
    arrays.add_none();
  } else {
    const size_t size = size_t{p.mask_batch} * p.mask_heads * p.mask_queries * p.mask_keys;
    arrays.add(data, array_kind(p.mask_type), size);
  }
  const bool context = p.dropout_placement == Placement::context;
  const size_t rows = s.query_rows * p.query_heads;
  if (s.form == Form::plain && data.ConsumeBool()) {
    arrays.add(data, ArrayKind::uint8, rows * (context ? p.value_dim : p.key_length));
  } else {
    arrays.add_none();
  }
  data.ConsumeBool() ? arrays.add(data, ArrayKind::int32, p.batch) : arrays.add_none();
  add_integers(arrays, s.kv_lengths);
}

void add_forward(FuzzedDataProvider& data, Arrays& arrays, const Problem& p, const Sizes& s) {
  const size_t rows = s.query_rows * p.query_heads, samples = std::max(p.samples, 1u);
  const bool moments = s.form == Form::samples && data.ConsumeBool();
  const auto optional = [&](bool wanted, ArrayKind kind, size_t length) {
    wanted ? arrays.add(data, kind, length) : arrays.add_none();
  };
  optional(!moments, array_kind(p.type), samples * rows * p.value_dim);
  const bool own_lse = p.dropout_placement == Placement::scores;
  optional(data.ConsumeBool(), ArrayKind::float32, own_lse ? samples * rows : rows);
  for (int i = 0; i < 3; ++i) {
    optional(s.form == Form::plain && data.ConsumeBool(), ArrayKind::float32, rows * p.key_length);
  }
  optional(moments, ArrayKind::float32, rows * p.value_dim);
  optional(moments, ArrayKind::float32, rows * p.value_dim);
}

void add_backward(FuzzedDataProvider& data, Arrays& arrays, const Problem& p, const Sizes& s) {
  const ArrayKind kind = array_kind(p.type);
  const size_t rows = s.query_rows * p.query_heads, key_rows = s.key_rows * p.kv_heads;
  arrays.add(data, kind, rows * p.value_dim);
  arrays.add(data, ArrayKind::float32, rows);
  arrays.add(data, kind, rows * p.value_dim);
  arrays.add(data, kind, rows * p.head_dim);
  arrays.add(data, kind, key_rows * p.head_dim);
  arrays.add(data, kind, key_rows * p.value_dim);
  if (p.mask_type == MaskType::none || p.mask_type == MaskType::boolean || data.ConsumeBool()) {
    arrays.add_none();
  } else {
    const size_t size = size_t{p.mask_batch} * p.mask_heads * p.mask_queries * p.mask_keys;
    arrays.add(data, array_kind(p.mask_type), size);
  }
}

void likely_call(FuzzedDataProvider& data) {
  const Form form = Form(data.ConsumeIntegralInRange<int>(0, 3));
  const bool is_backward = (form == Form::plain || form == Form::packed) && data.ConsumeBool();
  const uint32_t gpu = uint32_t(kBackendCount) + uint32_t(kGpu);
  const uint32_t backend = data.ConsumeIntegralInRange<uint32_t>(0, gpu);
  const uint8_t fault = data.ConsumeIntegralInRange<uint8_t>(0, 7);  // mostly none
  const Problem p = any_problem(data, form);
  const Sizes sizes = sizes_of(data, form, p);
  Arrays arrays(backend == gpu && form != Form::cache && data.ConsumeBool());
  add_inputs(data, arrays, p, sizes);
  is_backward ? add_backward(data, arrays, p, sizes) : add_forward(data, arrays, p, sizes);
  std::vector<double> header = encode(p);
  if (fault == 1) {
    header[data.ConsumeIntegralInRange<size_t>(0, kFieldCount - 1)] +=
        double(data.ConsumeIntegralInRange<int>(-1, 70));
  }
  if (fault == 2) arrays.spoil(data);
  while (arrays.size() < kArrayCount) arrays.add_none();
  call(header, backend, arrays, is_backward);
}

}  // namespace
}  // namespace sdpa

extern "C" int LLVMFuzzerInitialize(int*, char***) {
  sdpa::ThreadPool::shared().set_threads(2);
  return 0;
}

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* bytes, size_t size) {
  FuzzedDataProvider data(bytes, size);
  data.ConsumeBool() ? sdpa::likely_call(data) : sdpa::any_call(data);
  return 0;
}

// Runs one call on a device.
#include "cuda/run.h"

#include <limits>

#include "core/dropout.h"
#include "core/half.h"

namespace sdpa::cuda {
namespace {

#define SDPA_TRY(call) \
  if (const Status status = (call); !status.ok()) return status

constexpr Status kAborted = {StatusCode::aborted, "the call was aborted"};

/// A call's time on a device: its lane, its memory there, and the arrays that it has brought.
///
/// Invariant: when it ends, the device has nothing left to do for the call, even after a failure.
class Session {
 public:
  Session(Device& device, const CancelToken& cancel) : device_(device), cancel_(cancel) {}
  Session(const Session&) = delete;
  ~Session() {
    if (lane_ && !is_over_) device_.check(lane_->wait());
    for (const Block& block : blocks_) device_.release(block.memory, block.bytes);
  }

  Status open() { return device_.take_lane(&lane_); }
  Device& device() { return device_; }
  Lane& lane() { return *lane_; }
  Status check(int error) { return device_.check(error); }

  Status allocate(size_t bytes, void** memory) {
    blocks_.reserve(blocks_.size() + 1);
    SDPA_TRY(device_.allocate(bytes, memory));
    blocks_.push_back({*memory, bytes});
    return {};
  }

  Status upload(void* to, const void* from, size_t bytes) {
    SDPA_TRY(check(lane_->upload(to, from, bytes, cancel_)));
    return cancel_.cancelled() ? kAborted : Status{};
  }

  Status download(void* to, const void* from, size_t bytes) {
    SDPA_TRY(check(lane_->download(to, from, bytes, cancel_)));
    return cancel_.cancelled() ? kAborted : Status{};
  }

  /// A copy on the device of `count` elements, or null for null.
  template <typename T>
  Status upload_new(const T* from, size_t count, const T** copy) {
    *copy = nullptr;
    if (!from) return {};
    void* memory = nullptr;
    SDPA_TRY(allocate(count * sizeof(T), &memory));
    SDPA_TRY(upload(memory, from, count * sizeof(T)));
    *copy = static_cast<const T*>(memory);
    return {};
  }

  Status finish() {
    SDPA_TRY(check(lane_->wait()));
    is_over_ = true;
    return {};
  }

 private:
  struct Block {
    void* memory;
    size_t bytes;
  };

  Device& device_;
  const CancelToken& cancel_;
  Device::LanePointer lane_;
  std::vector<Block> blocks_;
  bool is_over_ = false;
};

/// The tensors of a call as the kernels take them: copies on the device of those in host memory.
class Tensors {
 public:
  Tensors(Session& session, const Call& call) : session_(session), call_(call) {}

  /// A tensor that the kernels read: copied once, even where it is several arguments.
  template <typename T>
  Status bring(const T* host, const T** on_device) {
    *on_device = host;
    if (!host || call_.on_device) return {};
    for (const Pair& pair : brought_) {
      if (pair.host != host) continue;
      *on_device = static_cast<const T*>(pair.on_device);
      return {};
    }
    const size_t bytes = bytes_of(host);
    void* memory = nullptr;
    SDPA_TRY(session_.allocate(bytes, &memory));
    SDPA_TRY(session_.upload(memory, host, bytes));
    brought_.push_back({const_cast<T*>(host), memory});
    *on_device = static_cast<const T*>(memory);
    return {};
  }

  /// A tensor that they write.
  template <typename T>
  Status prepare(T* host, T** on_device) {
    *on_device = host;
    if (!host || call_.on_device) return {};
    void* memory = nullptr;
    SDPA_TRY(session_.allocate(bytes_of(host), &memory));
    written_.push_back({host, memory});
    *on_device = static_cast<T*>(memory);
    return {};
  }

  /// Brings home what was written, and ends the session.
  Status fetch() {
    for (const Pair& pair : written_) {
      SDPA_TRY(session_.download(pair.host, pair.on_device, bytes_of(pair.host)));
    }
    return session_.finish();
  }

 private:
  struct Pair {
    void* host;
    void* on_device;
  };

  size_t bytes_of(const void* host) const {
    size_t bytes = 0;  // arrays may begin at the same address: the longest has them all
    for (size_t i = 0; i < call_.array_count; ++i) {
      const HostArray& array = call_.arrays[i];
      if (array.data == host && array.bytes > bytes) bytes = array.bytes;
    }
    return bytes;
  }

  Session& session_;
  const Call& call_;
  std::vector<Pair> brought_, written_;
};

/// All inputs on the device, with the integers for each entry.
Status bring_inputs(Session& session, Tensors& tensors, const Call& call, Inputs* inputs) {
  const Problem& p = call.problem;
  const Inputs& host = call.inputs;
  const Sequences& sequences = call.sequences;
  SDPA_TRY(tensors.bring(host.query, &inputs->query));
  SDPA_TRY(tensors.bring(host.key, &inputs->key));
  SDPA_TRY(tensors.bring(host.value, &inputs->value));
  SDPA_TRY(tensors.bring(host.mask, &inputs->mask));
  SDPA_TRY(tensors.bring(host.keep_mask, &inputs->keep_mask));
  SDPA_TRY(session.upload_new(host.causal_offsets, p.batch, &inputs->causal_offsets));
  SDPA_TRY(session.upload_new(host.kv_lengths, p.batch, &inputs->kv_lengths));
  return session.upload_new(sequences.key_blocks, p.batch * sequences.table_width,
                            &inputs->key_blocks);
}

Status unsupported_if(const char* reason) {
  return reason ? Status{StatusCode::unsupported, reason} : Status{};
}

/// One launch of a pass, after its workspace is there. The workspace serves one launch after the
/// other: they are in one stream.
class Launcher {
 public:
  explicit Launcher(Session& session) : session_(session), limits_(session.device().limits()) {}

  Status forward(const Problem& p, const Inputs& inputs, const ForwardOutputs& outputs) {
    SDPA_TRY(unsupported_if(forward_unsupported(p, limits_)));
    SDPA_TRY(reserve(forward_workspace(p, outputs, limits_)));
    return session_.check(
        launch_forward(p, inputs, outputs, workspace_, limits_, session_.lane().stream()));
  }

  Status backward(const Problem& p, const Inputs& inputs, const BackwardTensors& tensors) {
    SDPA_TRY(unsupported_if(backward_unsupported(p, limits_)));
    SDPA_TRY(reserve(backward_workspace(p, tensors.grad_mask != nullptr, limits_)));
    return session_.check(
        launch_backward(p, inputs, tensors, workspace_, limits_, session_.lane().stream()));
  }

 private:
  Status reserve(size_t bytes) {
    if (bytes <= bytes_) return {};
    SDPA_TRY(session_.allocate(bytes, &workspace_));
    bytes_ = bytes;
    return {};
  }

  Session& session_;
  const DeviceLimits limits_;
  void* workspace_ = nullptr;
  size_t bytes_ = 0;
};

/// The entries of a packed batch or of a cache, each as a call of its own, one after the other.
class EntryRunner {
 public:
  EntryRunner(Session& session, const Call& call, const Inputs& inputs, const CancelToken& cancel)
      : session_(session), call_(call), inputs_(inputs), cancel_(cancel), launcher_(session) {}

  Status forward(const ForwardOutputs& batch) {
    SDPA_TRY(reserve_lse());
    for (uint32_t b = 0; b < call_.problem.batch; ++b) SDPA_TRY(forward_entry(entry(b), batch));
    return {};
  }

  Status backward(const BackwardTensors& batch) {
    SDPA_TRY(reserve_lse());
    for (uint32_t b = 0; b < call_.problem.batch; ++b) SDPA_TRY(backward_entry(entry(b), batch));
    return {};
  }

 private:
  /// Made from the integers in host memory; those that kernels read are on the device.
  Entry entry(uint32_t b) const {
    Inputs mixed = inputs_;
    mixed.causal_offsets = call_.inputs.causal_offsets;
    mixed.kv_lengths = call_.inputs.kv_lengths;
    Entry e = entry_of(call_.sequences, call_.problem, mixed, b);
    if (e.inputs.kv_lengths) e.inputs.kv_lengths = inputs_.kv_lengths + b;
    if (e.inputs.key_blocks) {
      e.inputs.key_blocks = inputs_.key_blocks + b * call_.sequences.table_width;
    }
    return e;
  }

  /// lse of one entry, without gaps.
  Status reserve_lse() {
    const Problem& p = call_.problem;
    void* memory = nullptr;
    SDPA_TRY(session_.allocate(size_t{p.query_heads} * p.query_length * sizeof(float), &memory));
    lse_ = static_cast<float*>(memory);
    return {};
  }

  Status clear(const Problem& p, void* data, size_t rows, size_t width) {
    const size_t bytes = rows * width * element_size(p.type);
    return session_.check(runtime::clear(data, bytes, session_.lane().stream()));
  }

  Status copy_lse(const Entry& e, float* to, size_t to_stride, const float* from,
                  size_t from_stride) {
    return session_.check(runtime::copy_rows(
        to, to_stride * sizeof(float), from, from_stride * sizeof(float),
        e.problem.query_length * sizeof(float), e.problem.query_heads, session_.lane().stream()));
  }

  Status forward_entry(const Entry& e, const ForwardOutputs& batch) {
    const Problem& p = e.problem;
    if (cancel_.cancelled()) return kAborted;
    if (p.query_length == 0) return {};
    ForwardOutputs outputs{};
    outputs.output = skip(p, batch.output, e.query_rows, p.value_dim);
    outputs.lse = lse_;
    if (p.key_length == 0) {
      SDPA_TRY(clear(p, outputs.output, e.queries(), p.value_dim));
      const std::vector<float> nothing(e.queries(), -std::numeric_limits<float>::infinity());
      SDPA_TRY(session_.upload(lse_, nothing.data(), nothing.size() * sizeof(float)));
    } else {
      SDPA_TRY(launcher_.forward(p, e.inputs, outputs));
    }
    if (!batch.lse) return {};
    return copy_lse(e, batch.lse + e.lse_first, e.lse_stride, lse_, p.query_length);
  }

  Status backward_entry(const Entry& e, const BackwardTensors& batch) {
    const Problem& p = e.problem;
    if (cancel_.cancelled()) return kAborted;
    BackwardTensors tensors{};
    tensors.output = skip(p, batch.output, e.query_rows, p.value_dim);
    tensors.grad_output = skip(p, batch.grad_output, e.query_rows, p.value_dim);
    tensors.grad_query = skip(p, batch.grad_query, e.query_rows, p.head_dim);
    tensors.grad_key = skip(p, batch.grad_key, e.key_rows, p.head_dim);
    tensors.grad_value = skip(p, batch.grad_value, e.key_rows, p.value_dim);
    tensors.lse = lse_;
    if (p.query_length == 0 || p.key_length == 0) {
      SDPA_TRY(clear(p, tensors.grad_query, e.queries(), p.head_dim));
      SDPA_TRY(clear(p, tensors.grad_key, e.keys(), p.head_dim));
      return clear(p, tensors.grad_value, e.keys(), p.value_dim);
    }
    SDPA_TRY(copy_lse(e, lse_, p.query_length, batch.lse + e.lse_first, e.lse_stride));
    return launcher_.backward(p, e.inputs, tensors);
  }

  Session& session_;
  const Call& call_;
  const Inputs& inputs_;
  const CancelToken& cancel_;
  Launcher launcher_;
  float* lse_ = nullptr;
};

/// The samples of a call, each as a call of its own, one after the other.
class SampleRunner {
 public:
  SampleRunner(Session& session, const Problem& p, const Inputs& inputs, const CancelToken& cancel)
      : session_(session), p_(p), inputs_(inputs), cancel_(cancel), launcher_(session) {}

  Status forward(const ForwardOutputs& outputs) {
    for (uint32_t sample = 0; sample < p_.samples; ++sample) {
      void* const output = static_cast<char*>(outputs.output) + sample * sample_bytes();
      SDPA_TRY(forward_one(sample, output, outputs.lse));
    }
    return {};
  }

  /// Mean and variance are made here, in float64, as each sample comes home.
  Status forward_moments(const ForwardOutputs& outputs) {
    const size_t size = output_size(p_);
    void* output = nullptr;
    SDPA_TRY(session_.allocate(sample_bytes(), &output));
    std::vector<char> home(sample_bytes());
    std::vector<double> sums(size), squares(size);  // Youngs and Cramer, Technometrics 13, 1971
    for (uint32_t sample = 0; sample < p_.samples; ++sample) {
      SDPA_TRY(forward_one(sample, output, outputs.lse));
      SDPA_TRY(session_.download(home.data(), output, home.size()));
      const double n = sample + 1.0, share = sample > 0 ? 1 / (n * (n - 1)) : 0;
      for (size_t i = 0; i < size; ++i) {
        const double x = load_element(p_.type, home.data(), i);
        sums[i] += x;
        const double distance = n * x - sums[i];
        squares[i] += distance * distance * share;
      }
    }
    std::vector<float> mean(size), variance(size);
    for (size_t i = 0; i < size; ++i) {
      mean[i] = float(sums[i] / p_.samples);
      variance[i] = float(squares[i] / (p_.samples - 1.0));
    }
    SDPA_TRY(session_.upload(outputs.mean, mean.data(), size * sizeof(float)));
    return session_.upload(outputs.variance, variance.data(), size * sizeof(float));
  }

 private:
  size_t sample_bytes() const { return output_size(p_) * element_size(p_.type); }

  Status forward_one(uint32_t sample, void* output, float* lse) {
    if (cancel_.cancelled()) return kAborted;
    ForwardOutputs one{};
    one.output = output;
    one.lse = lse;
    if (lse && p_.dropout_placement == Placement::scores) {
      one.lse += size_t{sample} * p_.batch * p_.query_heads * p_.query_length;
    }
    return launcher_.forward(problem_of_sample(p_, sample), inputs_, one);
  }

  Session& session_;
  const Problem& p_;
  const Inputs& inputs_;
  const CancelToken& cancel_;
  Launcher launcher_;
};

}  // namespace

Status run_forward(Device& device, const Call& call, const ForwardOutputs& outputs,
                   const CancelToken& cancel) {
  Session session(device, cancel);
  SDPA_TRY(session.open());
  Tensors tensors(session, call);
  Inputs inputs{};
  SDPA_TRY(bring_inputs(session, tensors, call, &inputs));
  ForwardOutputs there{};
  SDPA_TRY(tensors.prepare(outputs.output, &there.output));
  SDPA_TRY(tensors.prepare(outputs.lse, &there.lse));
  SDPA_TRY(tensors.prepare(outputs.scores, &there.scores));
  SDPA_TRY(tensors.prepare(outputs.weights, &there.weights));
  SDPA_TRY(tensors.prepare(outputs.dropped_weights, &there.dropped_weights));
  SDPA_TRY(tensors.prepare(outputs.mean, &there.mean));
  SDPA_TRY(tensors.prepare(outputs.variance, &there.variance));
  if (call.sequences.any()) {
    SDPA_TRY(EntryRunner(session, call, inputs, cancel).forward(there));
  } else if (call.problem.samples > 0) {
    SampleRunner samples(session, call.problem, inputs, cancel);
    SDPA_TRY(outputs.mean ? samples.forward_moments(there) : samples.forward(there));
  } else {
    SDPA_TRY(Launcher(session).forward(call.problem, inputs, there));
  }
  return tensors.fetch();
}

Status run_backward(Device& device, const Call& call, const BackwardTensors& given,
                    const CancelToken& cancel) {
  Session session(device, cancel);
  SDPA_TRY(session.open());
  Tensors tensors(session, call);
  Inputs inputs{};
  SDPA_TRY(bring_inputs(session, tensors, call, &inputs));
  BackwardTensors there{};
  SDPA_TRY(tensors.bring(given.output, &there.output));
  SDPA_TRY(tensors.bring(given.lse, &there.lse));
  SDPA_TRY(tensors.bring(given.grad_output, &there.grad_output));
  SDPA_TRY(tensors.prepare(given.grad_query, &there.grad_query));
  SDPA_TRY(tensors.prepare(given.grad_key, &there.grad_key));
  SDPA_TRY(tensors.prepare(given.grad_value, &there.grad_value));
  SDPA_TRY(tensors.prepare(given.grad_mask, &there.grad_mask));
  if (call.sequences.any()) {
    SDPA_TRY(EntryRunner(session, call, inputs, cancel).backward(there));
  } else {
    SDPA_TRY(Launcher(session).backward(call.problem, inputs, there));
  }
  return tensors.fetch();
}

Status run_dropout_mask(Device& device, const Problem& problem, uint8_t* mask, size_t bytes) {
  const CancelToken never;
  Session session(device, never);
  SDPA_TRY(session.open());
  void* there = nullptr;
  SDPA_TRY(session.allocate(bytes, &there));
  SDPA_TRY(session.check(
      launch_dropout_mask(problem, static_cast<uint8_t*>(there), session.lane().stream())));
  SDPA_TRY(session.download(mask, there, bytes));
  return session.finish();
}

Status run_copy(Device& device, const Copy& copy, const CancelToken& cancel) {
  Session session(device, cancel);
  SDPA_TRY(session.open());
  const runtime::Stream stream = session.lane().stream();
  if (copy.from_device == Copy::kHost) {
    SDPA_TRY(session.upload(copy.to, copy.from, copy.bytes));
  } else if (copy.to_device == Copy::kHost) {
    SDPA_TRY(session.download(copy.to, copy.from, copy.bytes));
  } else if (copy.to_device == copy.from_device) {
    SDPA_TRY(session.check(runtime::copy_on_device(copy.to, copy.from, copy.bytes, stream)));
  } else {
    SDPA_TRY(session.check(runtime::copy_between_devices(copy.to, copy.to_device, copy.from,
                                                         copy.from_device, copy.bytes, stream)));
  }
  return session.finish();
}

}  // namespace sdpa::cuda

// One call as it crosses from JavaScript, without Node-API: a flat header and arrays -> Problem and
// pointers -> Status.
//
// lib/problem.ts has checked everything a user can get wrong. The same facts are checked once more
// here, because memory safety must not depend on JavaScript; a failure is reported as internal.
// Invariant: whatever the header and the arrays are, nothing outside the arrays is touched, and no
// address of a GPU's memory is given to anything but that GPU.
#pragma once

#include <algorithm>
#include <array>
#include <atomic>
#include <cmath>
#include <limits>
#include <new>
#include <vector>

#include "backends.h"
#include "core/budget.h"
#include "cpu/sequences.h"
#include "cuda_loader.h"

namespace sdpa {

constexpr size_t kFieldCount = 0
#define SDPA_COUNT_FIELD(type, name) +1
    SDPA_PROBLEM_FIELDS(SDPA_COUNT_FIELD)
#undef SDPA_COUNT_FIELD
    ;

constexpr int kNoDevice = -1;

/// What an array is: a typed array of JavaScript, or memory of a GPU, which has bytes and serves
/// for elements of any kind. `none` is JavaScript's null.
enum class ArrayKind { none, uint8, uint16, int32, float32, float64, device, other };

struct Array {
  ArrayKind kind = ArrayKind::none;
  void* data = nullptr;
  size_t length = 0;       // elements
  int device = kNoDevice;  // of `device`: the GPU that `data` is an address of
};

/// Bytes of an element.
inline size_t element_size(ArrayKind kind) {
  switch (kind) {
    case ArrayKind::uint16:
      return 2;
    case ArrayKind::int32:
    case ArrayKind::float32:
      return 4;
    case ArrayKind::float64:
      return 8;
    default:
      return 1;
  }
}

/// Thrown as a Status.
[[noreturn]] inline void refuse(const char* message) {
  throw Status{StatusCode::internal, message};
}

// ---------------------------------------------------------------------------------- the header

template <typename T>
constexpr double largest() {
  return double(std::numeric_limits<T>::max());
}
template <>
constexpr double largest<Layout>() {
  return double(Layout::bshd);
}
template <>
constexpr double largest<Type>() {
  return double(Type::bfloat16);
}
template <>
constexpr double largest<MaskType>() {
  return double(MaskType::bfloat16);
}
template <>
constexpr double largest<Placement>() {
  return double(Placement::scores);
}
template <>
constexpr double largest<Precision>() {
  return double(Precision::medium);
}

template <typename T>
inline bool read_field(double from, T& to) {
  const double smallest = std::is_same_v<T, int32_t> ? -2147483648.0 : 0.0;
  if (!(from >= smallest && from <= largest<T>()) || from != std::floor(from)) return false;
  to = T(int64_t(from));
  return true;
}
template <>
inline bool read_field(double from, float& to) {
  to = float(from);
  return true;
}
template <>
inline bool read_field(double from, double& to) {
  to = from;
  return true;
}

inline bool is_one_or(uint32_t size, uint32_t full) { return size == 1 || size == full; }

/// The facts that kernels rely on for memory safety and termination.
inline bool is_sound(const Problem& p) {
  const uint32_t most = 0x7fffffff;
  const bool sizes = p.batch > 0 && p.query_heads > 0 && p.kv_heads > 0 && p.query_length > 0 &&
                     p.key_length > 0 && p.head_dim > 0 && p.value_dim > 0 && p.batch <= most &&
                     p.query_heads <= most && p.query_length <= most && p.key_length <= most &&
                     p.head_dim <= kMaxHeadDim && p.value_dim <= kMaxHeadDim && p.samples <= most &&
                     p.query_heads % p.kv_heads == 0;
  const bool mask =
      p.mask_type == MaskType::none ||
      (is_one_or(p.mask_batch, p.batch) && is_one_or(p.mask_heads, p.query_heads) &&
       is_one_or(p.mask_queries, p.query_length) && is_one_or(p.mask_keys, p.key_length));
  const bool keys = p.key_block_length == 0
                        ? p.key_type == p.type
                        : p.key_block_length % kKeyBlockUnit == 0 && p.key_block_length <= most;
  return sizes && mask && keys && p.dropout_p >= 0 && p.dropout_p <= 1 && p.window_left >= -1 &&
         p.window_right >= -1;
}

/// The Problem of a flat header: its fields in order, one number each.
inline Problem read_problem(const Array& header) {
  if (header.kind != ArrayKind::float64 || header.length != kFieldCount) {
    refuse("header: not a Float64Array of one number a field");
  }
  const double* next = static_cast<const double*>(header.data);
  Problem p;
#define SDPA_READ_FIELD(type, name) \
  if (!read_field(*next++, p.name)) refuse("header: bad value of " #name);
  SDPA_PROBLEM_FIELDS(SDPA_READ_FIELD)
#undef SDPA_READ_FIELD
  if (!is_sound(p)) refuse("header: inconsistent problem");
  return p;
}

// ---------------------------------------------------------------------------------- the arrays

/// How many arrays a call has, forward and backward.
constexpr size_t kArrayCount = 17;

/// Where the tensors of a call are: all in host memory, or all in that of a GPU.
struct Places {
  std::array<cuda::HostArray, kArrayCount> host;
  size_t host_count = 0;
  bool on_device = false;
};

/// Takes the arrays of a call in order, checking kind, length and place.
class ArrayReader {
 public:
  /// `device`: the GPU that computes, whose memory tensors may be in.
  explicit ArrayReader(const Array* arrays, int device = kNoDevice)
      : next_(arrays), device_(device) {}

  /// How many times `of` the length of the next array is; 0 where that is no whole number.
  uint64_t peek_count(uint64_t of) const {
    return of != 0 && next_->length % of == 0 ? next_->length / of : 0;
  }

  /// The elements of a tensor [a, b, c, d]; null where the array is none and may be.
  void* tensor(ArrayKind kind, bool optional, uint64_t a, uint64_t b = 1, uint64_t c = 1,
               uint64_t d = 1) {
    const Array& array = *next_++;
    if (optional && array.kind == ArrayKind::none) return nullptr;
    const bool is_tensor = kind != ArrayKind::int32;  // integers are read here, in host memory
    const bool on_device = is_tensor && array.kind == ArrayKind::device;
    const size_t length = on_device ? array.length / element_size(kind) : array.length;
    if ((array.kind != kind && !on_device) || !is_product(length, a, b, c, d)) {
      refuse("a tensor does not have the kind or length that the header states");
    }
    const size_t bytes = length * element_size(kind);
    bytes_ += bytes;
    if (is_tensor) note_place(array, bytes);
    return array.data;
  }

  /// Of all tensors so far.
  uint64_t bytes() const { return bytes_; }
  const Places& places() const { return places_; }

 private:
  void note_place(const Array& array, size_t bytes) {
    if (array.kind != ArrayKind::device) {
      places_.host[places_.host_count++] = {array.data, bytes};
    } else if (array.device != device_ || device_ == kNoDevice) {
      refuse("a tensor is on another device");
    } else {
      places_.on_device = true;
    }
    if (places_.on_device && places_.host_count > 0) refuse("tensors at several places");
  }

  /// Whether length == a * b * c * d, by division: the product may overflow.
  static bool is_product(uint64_t length, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    for (const uint64_t factor : {a, b, c}) {
      if (factor == 0 || length % factor != 0) return false;
      length /= factor;
    }
    return length == d;
  }

  const Array* next_;
  const int device_;
  uint64_t bytes_ = 0;
  Places places_;
};

inline ArrayKind array_kind(Type type) {
  return type == Type::float32 ? ArrayKind::float32 : ArrayKind::uint16;
}

inline ArrayKind array_kind(MaskType type) {
  return type == MaskType::boolean   ? ArrayKind::uint8
         : type == MaskType::float32 ? ArrayKind::float32
                                     : ArrayKind::uint16;
}

/// Batch and length of a tensor with a row for each query or key; a packed batch is all length.
struct Extent {
  uint64_t batch, length;
};

/// The most bytes of results and working buffers that one call may have, in the whole process.
inline std::atomic<uint64_t>& most_bytes() {
  static std::atomic<uint64_t> bytes{UINT64_MAX};
  return bytes;
}

/// A call with all that it points to. Per-batch integers are copied, since kernels use them as
/// bounds and shared memory may change under us.
class FlatCall {
 public:
  Problem problem;
  const Backend* backend = nullptr;  // of the CPU; null where a GPU computes
  int device = kNoDevice;            // that GPU
  Inputs inputs{};
  ForwardOutputs outputs{};
  BackwardTensors tensors{};
  bool is_backward;
  uint64_t result_bytes = 0;
  Sequences sequences;
  uint64_t block_count = 0;  // of a cache
  std::vector<int32_t> query_starts, key_starts, key_blocks, causal_offsets, kv_lengths;
  Places places;

  /// Throws a Status where the header or an array is not what it has to be. The backend is an index
  /// into the list, behind which the GPUs come.
  FlatCall(const Array& header, uint32_t backend_index, const Array* arrays, bool is_backward,
           const CudaPlugin& cuda)
      : problem(read_problem(header)), is_backward(is_backward), cuda_(cuda) {
    choose_backend(backend_index);
    ArrayReader reader(arrays, device);
    read_sequences(reader);
    if (problem.samples > 0 && (is_backward || sequences.any())) {
      refuse("header: samples are of an ordinary forward call");
    }
    read_inputs(reader);
    if (is_backward) read_forward_results(reader);
    const uint64_t given = reader.bytes();
    if (is_backward) {
      read_gradients(reader);
    } else {
      read_forward(reader);
    }
    result_bytes = reader.bytes() - given;
    places = reader.places();
  }

  FlatCall(const FlatCall&) = delete;

  /// Within the limit that is set for a call; what a GPU works with has a limit of its own.
  Status run(const CancelToken& cancel) const {
    if (device != kNoDevice) return run_on_gpu(cancel);
    const uint64_t most = most_bytes().load(std::memory_order_relaxed);
    if (most == UINT64_MAX) return run_unlimited(cancel);
    Budget budget(most - std::min<uint64_t>(most, result_bytes));
    const BudgetScope scope(&budget);
    Status status = run_unlimited(cancel);
    if (status.code == StatusCode::out_of_memory && budget.refused()) {
      status.message = "the call needs more working memory than SDPA_MAX_BYTES allows";
    }
    return status;
  }

 private:
  void choose_backend(uint32_t index) {
    const size_t gpus = cuda_.functions ? size_t(cuda_.device_count) : 0;
    if (index >= kBackendCount + gpus) refuse("backend: not an index into the list");
    if (index >= kBackendCount) {
      device = int(index - kBackendCount);
      return;
    }
    backend = kBackends[index];
    if (const char* reason = backend->unavailable_reason()) {
      throw Status{StatusCode::unavailable, reason};
    }
  }

  Status run_on_gpu(const CancelToken& cancel) const {
    const cuda::Call call = {device, places.on_device,   problem,          sequences,
                             inputs, places.host.data(), places.host_count};
    return is_backward ? cuda_.functions->backward(call, tensors, cancel)
                       : cuda_.functions->forward(call, outputs, cancel);
  }

  Status run_unlimited(const CancelToken& cancel) const {
    if (sequences.any()) {
      return is_backward ? backward_sequences(*backend, sequences, problem, inputs, tensors, cancel)
                         : forward_sequences(*backend, sequences, problem, inputs, outputs, cancel);
    }
    return is_backward ? backend->backward(problem, inputs, tensors, cancel)
                       : backend->forward(problem, inputs, outputs, cancel);
  }

  Extent queries() const {
    if (!query_starts.empty()) return {1, uint64_t(query_starts.back())};
    return {problem.batch, problem.query_length};
  }
  /// In a cache, a block is an entry of its own.
  Extent keys() const {
    if (!key_blocks.empty()) return {block_count, problem.key_block_length};
    if (!key_starts.empty()) return {1, uint64_t(key_starts.back())};
    return {problem.batch, problem.key_length};
  }

  /// The entries of a packed batch, or of a cache.
  void read_sequences(ArrayReader& reader) {
    const size_t totals = size_t{problem.batch} + 1;
    sequences.query_starts = copy_integers(reader, totals, query_starts);
    sequences.key_starts = copy_integers(reader, totals, key_starts);
    sequences.table_width = reader.peek_count(problem.batch);
    sequences.key_blocks = copy_integers(reader, problem.batch * sequences.table_width, key_blocks);
    const bool is_packed = !query_starts.empty(), is_cache = !key_blocks.empty();
    if (is_packed == key_starts.empty()) refuse("starts: one without the other");
    if (is_cache != (problem.key_block_length > 0) || (is_cache && (is_packed || is_backward))) {
      refuse("keyBlocks: not those of a cache");
    }
    if (!sequences.any()) return;
    if (problem.mask_type != MaskType::none) refuse("sequences have no mask");
    if (!is_packed) return;
    if (!are_totals(query_starts, problem.query_length) ||
        !are_totals(key_starts, problem.key_length)) {
      refuse("starts: not the running totals of the stated lengths");
    }
    if (problem.layout != Layout::bshd) refuse("a packed batch is in the layout bshd");
  }

  /// Every key that an entry has must be in a block that there is.
  void check_blocks() const {
    if (key_blocks.empty()) return;
    if (kv_lengths.empty()) refuse("kvLengths: a cache has them");
    for (const int32_t block : key_blocks) {
      if (block < 0 || uint64_t(block) >= block_count) refuse("keyBlocks: out of range");
    }
    const uint64_t most = sequences.table_width * uint64_t{problem.key_block_length};
    for (const int32_t length : kv_lengths) {
      if (uint64_t(length) > most) refuse("keyBlocks: too few");
    }
  }

  static bool are_totals(const std::vector<int32_t>& starts, uint32_t most) {
    if (starts[0] != 0) return false;
    for (size_t b = 1; b < starts.size(); ++b) {
      if (starts[b] < starts[b - 1] || uint32_t(starts[b] - starts[b - 1]) > most) return false;
    }
    return true;
  }

  void read_inputs(ArrayReader& reader) {
    const Problem& p = problem;
    const ArrayKind type = array_kind(p.type);
    const ArrayKind key_type = array_kind(p.key_type);
    const Extent q = queries();
    inputs.query = reader.tensor(type, false, q.batch, p.query_heads, q.length, p.head_dim);
    if (!key_blocks.empty()) {
      block_count = reader.peek_count(uint64_t{p.kv_heads} * p.key_block_length * p.head_dim);
    }
    const Extent k = keys();
    inputs.key = reader.tensor(key_type, false, k.batch, p.kv_heads, k.length, p.head_dim);
    inputs.value = reader.tensor(key_type, false, k.batch, p.kv_heads, k.length, p.value_dim);
    inputs.mask = reader.tensor(array_kind(p.mask_type), p.mask_type == MaskType::none,
                                p.mask_batch, p.mask_heads, p.mask_queries, p.mask_keys);
    const bool context = p.dropout_placement == Placement::context;
    inputs.keep_mask =
        static_cast<uint8_t*>(reader.tensor(ArrayKind::uint8, true, p.batch, p.query_heads,
                                            p.query_length, context ? p.value_dim : p.key_length));
    if (sequences.any() && inputs.keep_mask) refuse("keepMask: none for sequences");
    inputs.causal_offsets = copy_integers(reader, p.batch, causal_offsets);
    inputs.kv_lengths = copy_integers(reader, p.batch, kv_lengths);
    for (size_t b = 0; b < kv_lengths.size(); ++b) {
      const int32_t most =
          key_starts.empty() ? int32_t(p.key_length) : key_starts[b + 1] - key_starts[b];
      if (kv_lengths[b] < 0 || kv_lengths[b] > most) refuse("kvLengths: out of range");
    }
    check_blocks();
  }

  const int32_t* copy_integers(ArrayReader& reader, size_t count, std::vector<int32_t>& to) {
    const auto* const from =
        static_cast<const int32_t*>(reader.tensor(ArrayKind::int32, true, count));
    if (!from) return nullptr;
    to.assign(from, from + count);
    return to.data();
  }

  void read_forward(ArrayReader& reader) {
    const Problem& p = problem;
    const bool has_samples = p.samples > 0;
    const bool shares_lse = p.dropout_placement != Placement::scores;
    const auto floats = [&](uint32_t width) {
      return static_cast<float*>(
          reader.tensor(ArrayKind::float32, true, p.batch, p.query_heads, p.query_length, width));
    };
    const Extent q = queries();
    outputs.output =
        reader.tensor(array_kind(p.type), has_samples, q.batch * (has_samples ? p.samples : 1),
                      p.query_heads, q.length, p.value_dim);
    outputs.lse = static_cast<float*>(reader.tensor(
        ArrayKind::float32, true, q.batch * (has_samples && !shares_lse ? p.samples : 1),
        p.query_heads, q.length));
    outputs.scores = floats(p.key_length);
    outputs.weights = floats(p.key_length);
    outputs.dropped_weights = floats(p.key_length);
    outputs.mean = floats(p.value_dim);
    outputs.variance = floats(p.value_dim);
    const bool has_matrix = outputs.scores || outputs.weights || outputs.dropped_weights;
    const bool has_moments = outputs.mean && outputs.variance;
    if ((outputs.mean || outputs.variance) != has_moments ||
        (outputs.output != nullptr) == has_moments || (has_moments && !has_samples) ||
        (has_matrix && (has_samples || sequences.any()))) {
      refuse("outputs that do not go together");
    }
  }

  /// What a backward call reads besides the inputs.
  void read_forward_results(ArrayReader& reader) {
    const Problem& p = problem;
    const Extent q = queries();
    const auto like_output = [&] {
      return reader.tensor(array_kind(p.type), false, q.batch, p.query_heads, q.length,
                           p.value_dim);
    };
    tensors.output = like_output();
    tensors.lse = static_cast<float*>(
        reader.tensor(ArrayKind::float32, false, q.batch, p.query_heads, q.length));
    tensors.grad_output = like_output();
  }

  void read_gradients(ArrayReader& reader) {
    const Problem& p = problem;
    const ArrayKind type = array_kind(p.type);
    const Extent q = queries(), k = keys();
    tensors.grad_query = reader.tensor(type, false, q.batch, p.query_heads, q.length, p.head_dim);
    tensors.grad_key = reader.tensor(type, false, k.batch, p.kv_heads, k.length, p.head_dim);
    tensors.grad_value = reader.tensor(type, false, k.batch, p.kv_heads, k.length, p.value_dim);
    const bool has_bias = p.mask_type != MaskType::none && p.mask_type != MaskType::boolean;
    tensors.grad_mask = has_bias ? reader.tensor(array_kind(p.mask_type), true, p.mask_batch,
                                                 p.mask_heads, p.mask_queries, p.mask_keys)
                                 : nullptr;
  }

  const CudaPlugin& cuda_;
};

}  // namespace sdpa

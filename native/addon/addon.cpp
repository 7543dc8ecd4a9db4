// Node-API and nothing else: JavaScript arguments -> Problem + pointers -> Status -> JavaScript.
//
// lib/problem.ts has checked everything a user can get wrong. The same facts are checked once more
// here, because memory safety must not depend on JavaScript; a failure is reported as internal.
#include <napi.h>

#include <algorithm>
#include <cmath>
#include <condition_variable>
#include <limits>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "addon/huge_pages.h"
#include "backends.h"
#include "core/budget.h"
#include "core/keep_mask.h"
#include "core/queue.h"
#include "cpu/sequences.h"
#include "cpu/thread_pool.h"

namespace sdpa {
namespace {

constexpr size_t kFieldCount = 0
#define SDPA_COUNT_FIELD(type, name) +1
    SDPA_PROBLEM_FIELDS(SDPA_COUNT_FIELD)
#undef SDPA_COUNT_FIELD
    ;

const char* error_code(StatusCode code) {
  switch (code) {
    case StatusCode::aborted:
      return "ERR_SDPA_ABORTED";
    case StatusCode::out_of_memory:
      return "ERR_SDPA_OUT_OF_MEMORY";
    case StatusCode::queue_full:
      return "ERR_SDPA_QUEUE_FULL";
    case StatusCode::unavailable:
      return "ERR_SDPA_BACKEND_UNAVAILABLE";
    default:
      return "ERR_SDPA_INTERNAL";
  }
}

Napi::Error make_error(Napi::Env env, const Status& status) {
  Napi::Error error = Napi::Error::New(env, status.message);
  error.Set("code", error_code(status.code));
  return error;
}

[[noreturn]] void fail(Napi::Env env, const char* message) {
  throw make_error(env, {StatusCode::internal, message});
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
bool read_field(double from, T& to) {
  const double smallest = std::is_same_v<T, int32_t> ? -2147483648.0 : 0.0;
  if (!(from >= smallest && from <= largest<T>()) || from != std::floor(from)) return false;
  to = T(int64_t(from));
  return true;
}
template <>
bool read_field(double from, float& to) {
  to = float(from);
  return true;
}
template <>
bool read_field(double from, double& to) {
  to = from;
  return true;
}

bool is_one_or(uint32_t size, uint32_t full) { return size == 1 || size == full; }

/// The facts that kernels rely on for memory safety and termination.
bool is_sound(const Problem& p) {
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

Problem read_problem(Napi::Env env, napi_value header) {
  napi_typedarray_type type;
  size_t length;
  void* data;
  if (napi_get_typedarray_info(env, header, &type, &length, &data, nullptr, nullptr) != napi_ok ||
      type != napi_float64_array || length != kFieldCount) {
    fail(env, "header: not a Float64Array of one number a field");
  }
  const double* next = static_cast<const double*>(data);
  Problem p;
#define SDPA_READ_FIELD(type, name) \
  if (!read_field(*next++, p.name)) fail(env, "header: bad value of " #name);
  SDPA_PROBLEM_FIELDS(SDPA_READ_FIELD)
#undef SDPA_READ_FIELD
  if (!is_sound(p)) fail(env, "header: inconsistent problem");
  return p;
}

// ---------------------------------------------------------------------------------- the arrays

/// Reads the typed arrays of a call in order, checking kind and length.
class ArrayReader {
 public:
  ArrayReader(Napi::Env env, const napi_value* values) : env_(env), next_(values) {}

  Napi::Env env() const { return env_; }

  /// How many times `of` the length of the next array is; 0 where that is no whole number.
  uint64_t peek_count(uint64_t of) const {
    size_t length = 0;
    const napi_status status =
        napi_get_typedarray_info(env_, *next_, nullptr, &length, nullptr, nullptr, nullptr);
    return status == napi_ok && of != 0 && length % of == 0 ? length / of : 0;
  }

  /// The elements of a tensor [a, b, c, d]; null where the argument is null and may be.
  void* tensor(napi_typedarray_type type, bool optional, uint64_t a, uint64_t b = 1, uint64_t c = 1,
               uint64_t d = 1) {
    const napi_value value = *next_++;
    if (optional && is_null(value)) return nullptr;
    napi_typedarray_type actual;
    size_t length;
    void* data;
    if (napi_get_typedarray_info(env_, value, &actual, &length, &data, nullptr, nullptr) !=
            napi_ok ||
        actual != type || !is_product(length, a, b, c, d)) {
      fail(env_, "a tensor does not have the kind or length that the header states");
    }
    bytes_ += length * element_size(type);
    return data;
  }

  /// Of all tensors so far.
  uint64_t bytes() const { return bytes_; }

 private:
  bool is_null(napi_value value) {
    napi_valuetype kind;
    napi_typeof(env_, value, &kind);
    return kind == napi_null;
  }

  /// Whether length == a * b * c * d, by division: the product may overflow.
  static bool is_product(uint64_t length, uint64_t a, uint64_t b, uint64_t c, uint64_t d) {
    for (const uint64_t factor : {a, b, c}) {
      if (factor == 0 || length % factor != 0) return false;
      length /= factor;
    }
    return length == d;
  }

  static size_t element_size(napi_typedarray_type type) {
    return type == napi_uint8_array ? 1 : type == napi_uint16_array ? 2 : 4;
  }

  Napi::Env env_;
  const napi_value* next_;
  uint64_t bytes_ = 0;
};

napi_typedarray_type array_type(Type type) {
  return type == Type::float32 ? napi_float32_array : napi_uint16_array;
}

napi_typedarray_type array_type(MaskType type) {
  return type == MaskType::boolean   ? napi_uint8_array
         : type == MaskType::float32 ? napi_float32_array
                                     : napi_uint16_array;
}

/// Batch and length of a tensor with a row for each query or key; a packed batch is all length.
struct Extent {
  uint64_t batch, length;
};

/// The most bytes of results and working buffers that one call may have.
std::atomic<uint64_t> g_most_bytes{UINT64_MAX};

/// A call with all that it points to. Per-batch integers are copied, since kernels use them as
/// bounds and shared memory may change under us.
struct CallArguments {
  Problem problem;
  const Backend* backend;
  Inputs inputs{};
  ForwardOutputs outputs{};
  BackwardTensors tensors{};
  bool is_backward;
  uint64_t result_bytes = 0;
  Sequences sequences;
  uint64_t block_count = 0;  // of a cache
  std::vector<int32_t> query_starts, key_starts, key_blocks, causal_offsets, kv_lengths;

  CallArguments(Napi::Env env, const napi_value* values, bool is_backward)
      : problem(read_problem(env, values[0])), is_backward(is_backward) {
    uint32_t index;
    if (napi_get_value_uint32(env, values[1], &index) != napi_ok || index >= kBackendCount) {
      fail(env, "backend: not an index into the list");
    }
    backend = kBackends[index];
    if (const char* reason = backend->unavailable_reason()) {
      throw make_error(env, {StatusCode::unavailable, reason});
    }
    ArrayReader reader(env, values + 2);
    read_sequences(env, reader);
    if (problem.samples > 0 && (is_backward || sequences.any())) {
      fail(env, "header: samples are of an ordinary forward call");
    }
    read_inputs(env, reader);
    if (is_backward) read_forward_results(reader);
    const uint64_t given = reader.bytes();
    if (is_backward) {
      read_gradients(reader);
    } else {
      read_forward(env, reader);
    }
    result_bytes = reader.bytes() - given;
  }

  CallArguments(const CallArguments&) = delete;

  /// Within the limit that is set for a call.
  Status run(const CancelToken& cancel) const {
    const uint64_t most = g_most_bytes.load(std::memory_order_relaxed);
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
  void read_sequences(Napi::Env env, ArrayReader& reader) {
    const size_t totals = size_t{problem.batch} + 1;
    sequences.query_starts = copy_integers(reader, totals, query_starts);
    sequences.key_starts = copy_integers(reader, totals, key_starts);
    sequences.table_width = reader.peek_count(problem.batch);
    sequences.key_blocks = copy_integers(reader, problem.batch * sequences.table_width, key_blocks);
    const bool is_packed = !query_starts.empty(), is_cache = !key_blocks.empty();
    if (is_packed == key_starts.empty()) fail(env, "starts: one without the other");
    if (is_cache != (problem.key_block_length > 0) || (is_cache && (is_packed || is_backward))) {
      fail(env, "keyBlocks: not those of a cache");
    }
    if (!sequences.any()) return;
    if (problem.mask_type != MaskType::none) fail(env, "sequences have no mask");
    if (!is_packed) return;
    if (!are_totals(query_starts, problem.query_length) ||
        !are_totals(key_starts, problem.key_length)) {
      fail(env, "starts: not the running totals of the stated lengths");
    }
    if (problem.layout != Layout::bshd) fail(env, "a packed batch is in the layout bshd");
  }

  /// Every key that an entry has must be in a block that there is.
  void check_blocks(Napi::Env env) const {
    if (key_blocks.empty()) return;
    if (kv_lengths.empty()) fail(env, "kvLengths: a cache has them");
    for (const int32_t block : key_blocks) {
      if (block < 0 || uint64_t(block) >= block_count) fail(env, "keyBlocks: out of range");
    }
    const uint64_t most = sequences.table_width * uint64_t{problem.key_block_length};
    for (const int32_t length : kv_lengths) {
      if (uint64_t(length) > most) fail(env, "keyBlocks: too few");
    }
  }

  static bool are_totals(const std::vector<int32_t>& starts, uint32_t most) {
    if (starts[0] != 0) return false;
    for (size_t b = 1; b < starts.size(); ++b) {
      if (starts[b] < starts[b - 1] || uint32_t(starts[b] - starts[b - 1]) > most) return false;
    }
    return true;
  }

  void read_inputs(Napi::Env env, ArrayReader& reader) {
    const Problem& p = problem;
    const napi_typedarray_type type = array_type(p.type);
    const napi_typedarray_type key_type = array_type(p.key_type);
    const Extent q = queries();
    inputs.query = reader.tensor(type, false, q.batch, p.query_heads, q.length, p.head_dim);
    if (!key_blocks.empty()) {
      block_count = reader.peek_count(uint64_t{p.kv_heads} * p.key_block_length * p.head_dim);
    }
    const Extent k = keys();
    inputs.key = reader.tensor(key_type, false, k.batch, p.kv_heads, k.length, p.head_dim);
    inputs.value = reader.tensor(key_type, false, k.batch, p.kv_heads, k.length, p.value_dim);
    inputs.mask = reader.tensor(array_type(p.mask_type), p.mask_type == MaskType::none,
                                p.mask_batch, p.mask_heads, p.mask_queries, p.mask_keys);
    const bool context = p.dropout_placement == Placement::context;
    inputs.keep_mask =
        static_cast<uint8_t*>(reader.tensor(napi_uint8_array, true, p.batch, p.query_heads,
                                            p.query_length, context ? p.value_dim : p.key_length));
    if (sequences.any() && inputs.keep_mask) fail(env, "keepMask: none for sequences");
    inputs.causal_offsets = copy_integers(reader, p.batch, causal_offsets);
    inputs.kv_lengths = copy_integers(reader, p.batch, kv_lengths);
    for (size_t b = 0; b < kv_lengths.size(); ++b) {
      const int32_t most =
          key_starts.empty() ? int32_t(p.key_length) : key_starts[b + 1] - key_starts[b];
      if (kv_lengths[b] < 0 || kv_lengths[b] > most) fail(env, "kvLengths: out of range");
    }
    check_blocks(env);
  }

  const int32_t* copy_integers(ArrayReader& reader, size_t count, std::vector<int32_t>& to) {
    const auto* const from =
        static_cast<const int32_t*>(reader.tensor(napi_int32_array, true, count));
    if (!from) return nullptr;
    to.assign(from, from + count);
    return to.data();
  }

  void read_forward(Napi::Env env, ArrayReader& reader) {
    const Problem& p = problem;
    const bool has_samples = p.samples > 0;
    const bool shares_lse = p.dropout_placement != Placement::scores;
    const auto floats = [&](uint32_t width) {
      return static_cast<float*>(
          reader.tensor(napi_float32_array, true, p.batch, p.query_heads, p.query_length, width));
    };
    const Extent q = queries();
    outputs.output =
        reader.tensor(array_type(p.type), has_samples, q.batch * (has_samples ? p.samples : 1),
                      p.query_heads, q.length, p.value_dim);
    outputs.lse = static_cast<float*>(reader.tensor(
        napi_float32_array, true, q.batch * (has_samples && !shares_lse ? p.samples : 1),
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
      fail(env, "outputs that do not go together");
    }
  }

  /// What a backward call reads besides the inputs.
  void read_forward_results(ArrayReader& reader) {
    const Problem& p = problem;
    const Extent q = queries();
    const auto like_output = [&] {
      return reader.tensor(array_type(p.type), false, q.batch, p.query_heads, q.length,
                           p.value_dim);
    };
    tensors.output = like_output();
    tensors.lse = static_cast<float*>(
        reader.tensor(napi_float32_array, false, q.batch, p.query_heads, q.length));
    tensors.grad_output = like_output();
  }

  void read_gradients(ArrayReader& reader) {
    const Problem& p = problem;
    const napi_typedarray_type type = array_type(p.type);
    const Extent q = queries(), k = keys();
    tensors.grad_query = reader.tensor(type, false, q.batch, p.query_heads, q.length, p.head_dim);
    tensors.grad_key = reader.tensor(type, false, k.batch, p.kv_heads, k.length, p.head_dim);
    tensors.grad_value = reader.tensor(type, false, k.batch, p.kv_heads, k.length, p.value_dim);
    const bool has_bias = p.mask_type != MaskType::none && p.mask_type != MaskType::boolean;
    tensors.grad_mask = has_bias ? reader.tensor(array_type(p.mask_type), true, p.mask_batch,
                                                 p.mask_heads, p.mask_queries, p.mask_keys)
                                 : nullptr;
  }
};

constexpr size_t kForwardArguments = 19, kBackwardArguments = 19;

// ------------------------------------------------------------------------------ asynchronous calls

class Environment;

/// One asynchronous call, from its start on the JavaScript thread to its promise's end there.
struct AsyncCall final : Job {
  Environment& environment;
  CallArguments arguments;
  CancelToken cancel;
  Status status;
  Napi::Promise::Deferred deferred;
  Napi::ObjectReference arrays;  // keeps the typed arrays alive
  AsyncCall* next = nullptr;     // the environment's

  AsyncCall(Environment& environment, Napi::Env env, const napi_value* values, bool is_backward,
            const std::atomic<int32_t>* external)
      : environment(environment),
        arguments(env, values, is_backward),
        cancel(external),
        deferred(Napi::Promise::Deferred::New(env)) {}
  void compute();
  void run() override;
};

/// Multiply-adds below which a call is over sooner than another thread wakes up for it (some
/// microseconds): it is computed at once, and its promise comes back settled.
constexpr double kNotWorthAThread = 5e4;

/// What one JavaScript environment (the main thread or a worker) has under way.
///
/// Invariant: when the environment goes, no pool thread still touches memory that it owns: the
/// clean-up hook cancels its calls and waits for them.
class Environment {
 public:
  explicit Environment(Napi::Env env) {
    // Hooks run last in, first out: ours, added after the function's own, runs while it still
    // lives.
    finished_signal_ = Signal::New(env, "node-sdpa", 0, 1, this);
    finished_signal_.Unref(env);
    napi_add_env_cleanup_hook(
        env, [](void* self) { static_cast<Environment*>(self)->close(); }, this);
  }

  static void drain(Napi::Env env, Napi::Function, Environment* self, void*) {
    if (env != nullptr) self->settle_finished(env);
  }

  Napi::Promise start(Napi::Env env, AsyncCall* call) {
    const Napi::Promise promise = call->deferred.Promise();
    if (multiply_adds(call->arguments.problem) <= kNotWorthAThread) {
      call->compute();
      settle(env, call);
      return promise;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      running_.push(call);
    }
    const Status status = ThreadPool::shared().submit(call);
    if (status.ok()) {
      if (pending_++ == 0) finished_signal_.Ref(env);
      return promise;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      running_.remove(call);
    }
    call->status = status;
    settle(env, call);
    return promise;
  }

  /// Called by a pool thread.
  void finish(AsyncCall* call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const bool is_first = finished_.empty();
    running_.remove(call);
    finished_.push(call);
    if (!closing_ && is_first) finished_signal_.NonBlockingCall();
    none_running_.notify_all();
  }

 private:
  using Signal = Napi::TypedThreadSafeFunction<Environment, void, drain>;

  static void settle(Napi::Env env, AsyncCall* call) {
    if (call->status.ok()) {
      call->deferred.Resolve(env.Undefined());
    } else {
      call->deferred.Reject(make_error(env, call->status).Value());
    }
    delete call;
  }

  void settle_finished(Napi::Env env) {
    AsyncCall* next;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      next = finished_.take_all();
    }
    const Napi::HandleScope scope(env);
    while (AsyncCall* const call = next) {
      next = call->next;
      settle(env, call);
      --pending_;
    }
    if (pending_ == 0) finished_signal_.Unref(env);
  }

  void close() {
    std::unique_lock<std::mutex> lock(mutex_);
    closing_ = true;
    AsyncCall* next = running_.first();
    while (AsyncCall* const call = next) {
      next = call->next;
      call->cancel.cancel();
      if (!ThreadPool::shared().withdraw(call)) continue;
      running_.remove(call);
      finished_.push(call);
    }
    none_running_.wait(lock, [this] { return running_.empty(); });
    next = finished_.take_all();
    while (AsyncCall* const call = next) {
      next = call->next;
      delete call;
    }
  }

  Signal finished_signal_;
  std::mutex mutex_;
  std::condition_variable none_running_;
  Queue<AsyncCall, &AsyncCall::next> running_, finished_;
  size_t pending_ = 0;  // promises that are not settled; JavaScript thread only
  bool closing_ = false;
};

void AsyncCall::compute() {
  try {
    status = cancel.cancelled() ? Status{StatusCode::aborted, "the call was aborted"}
                                : arguments.run(cancel);
  } catch (const std::bad_alloc&) {
    status = {StatusCode::out_of_memory, "no memory for the call"};
  }
}

void AsyncCall::run() {
  compute();
  environment.finish(this);
}

// ------------------------------------------------------------------------------------- functions

/// The most arguments that any function takes.
constexpr size_t kMostArguments = 1 + std::max(kForwardArguments, kBackwardArguments);

/// A function of the addon as Node calls it. Napi::CallbackInfo would do, but it asks for memory
/// where nothing catches its std::bad_alloc.
template <size_t Count, napi_value (*Function)(Napi::Env env, const napi_value* values)>
napi_value callback(napi_env env, napi_callback_info info) {
  try {
    napi_value values[kMostArguments];
    size_t count = kMostArguments;
    if (napi_get_cb_info(env, info, &count, values, nullptr, nullptr) != napi_ok ||
        count != Count) {
      fail(env, "wrong number of arguments");
    }
    return Function(env, values);
  } catch (const Napi::Error& error) {
    error.ThrowAsJavaScriptException();
  } catch (const std::bad_alloc&) {
    make_error(env, {StatusCode::out_of_memory, "no memory for the call"})
        .ThrowAsJavaScriptException();
  }
  return nullptr;
}

template <bool IsBackward>
constexpr size_t kArguments = IsBackward ? kBackwardArguments : kForwardArguments;

template <bool IsBackward>
napi_value run_sync(Napi::Env env, const napi_value* values) {
  const CallArguments arguments(env, values, IsBackward);
  const Status status = arguments.run(CancelToken());
  if (!status.ok()) throw make_error(env, status);
  return nullptr;
}

template <bool IsBackward>
napi_value run_async(Napi::Env env, const napi_value* values) {
  Environment& environment = *env.GetInstanceData<Environment>();
  const auto* const cancel = static_cast<const std::atomic<int32_t>*>(
      ArrayReader(env, values).tensor(napi_int32_array, true, 1));
  auto call = std::make_unique<AsyncCall>(environment, env, values + 1, IsBackward, cancel);
  const uint32_t count = 1 + kArguments<IsBackward>;
  const Napi::Array arrays = Napi::Array::New(env, count);
  for (uint32_t i = 0; i < count; ++i) arrays.Set(i, values[i]);
  call->arrays = Napi::Persistent<Napi::Object>(arrays);
  return environment.start(env, call.release());
}

napi_value dropout_mask(Napi::Env env, const napi_value* values) {
  const Problem p = read_problem(env, values[0]);
  const bool context = p.dropout_placement == Placement::context;
  void* const keep = ArrayReader(env, values + 1)
                         .tensor(napi_uint8_array, false, p.batch, p.query_heads, p.query_length,
                                 context ? p.value_dim : p.key_length);
  fill_keep_mask(p, static_cast<uint8_t*>(keep));
  return nullptr;
}

napi_value set_num_threads(Napi::Env env, const napi_value* values) {
  ThreadPool::shared().set_threads(Napi::Value(env, values[0]).ToNumber().Int32Value());
  return nullptr;
}

napi_value get_num_threads(Napi::Env env, const napi_value*) {
  return Napi::Number::New(env, ThreadPool::shared().threads());
}

/// The most bytes that a call may have from now on, in the whole process.
napi_value set_most_bytes(Napi::Env env, const napi_value* values) {
  const double bytes = Napi::Value(env, values[0]).ToNumber().DoubleValue();
  if (!(bytes >= 0 && bytes <= 9007199254740991.0)) fail(env, "setMostBytes: out of range");
  g_most_bytes.store(uint64_t(bytes), std::memory_order_relaxed);
  return nullptr;
}

/// Takes note of the fresh SharedArrayBuffer of a Uint8Array. V8 does not count these by itself,
/// and would collect them far too late.
napi_value adopt_memory(Napi::Env env, const napi_value* values) {
  size_t bytes = 0;
  void* data = nullptr;
  napi_typedarray_type type;
  if (napi_get_typedarray_info(env, values[0], &type, &bytes, &data, nullptr, nullptr) != napi_ok ||
      type != napi_uint8_array) {
    fail(env, "adoptMemory: not a Uint8Array");
  }
  prefer_huge_pages(data, bytes);
  Napi::MemoryManagement::AdjustExternalMemory(env, int64_t(bytes));
  return nullptr;
}

napi_value release_memory(Napi::Env env, const napi_value* values) {
  const int64_t bytes = Napi::Value(env, values[0]).ToNumber().Int64Value();
  Napi::MemoryManagement::AdjustExternalMemory(env, -bytes);
  return nullptr;
}

Napi::Array list_backends(Napi::Env env) {
  const Napi::Array list = Napi::Array::New(env, kBackendCount);
  for (uint32_t i = 0; i < kBackendCount; ++i) {
    const char* const reason = kBackends[i]->unavailable_reason();
    Napi::Object entry = Napi::Object::New(env);
    entry.Set("name", kBackends[i]->name);
    entry.Set("available", reason == nullptr);
    entry.Set("reason", reason ? reason : "");
    list.Set(i, entry);
  }
  return list;
}

std::string field_names() {
  std::string names;
#define SDPA_NAME_FIELD(type, name) names += names.empty() ? #name : "," #name;
  SDPA_PROBLEM_FIELDS(SDPA_NAME_FIELD)
#undef SDPA_NAME_FIELD
  return names;
}

template <size_t Count, napi_value (*Function)(Napi::Env, const napi_value*)>
void add_function(Napi::Env env, Napi::Object exports, const char* name) {
  napi_value function;
  const napi_status status = napi_create_function(env, name, NAPI_AUTO_LENGTH,
                                                  callback<Count, Function>, nullptr, &function);
  if (status != napi_ok) throw Napi::Error::New(env);
  exports.Set(name, function);
}

Napi::Object init(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new Environment(env));
  exports.Set("version", SDPA_VERSION);
  exports.Set("problemFields", field_names());
  exports.Set("backends", list_backends(env));
  add_function<kForwardArguments, run_sync<false>>(env, exports, "forwardSync");
  add_function<kBackwardArguments, run_sync<true>>(env, exports, "backwardSync");
  add_function<1 + kForwardArguments, run_async<false>>(env, exports, "forwardAsync");
  add_function<1 + kBackwardArguments, run_async<true>>(env, exports, "backwardAsync");
  add_function<2, dropout_mask>(env, exports, "dropoutMask");
  add_function<1, set_num_threads>(env, exports, "setNumThreads");
  add_function<0, get_num_threads>(env, exports, "getNumThreads");
  add_function<1, set_most_bytes>(env, exports, "setMostBytes");
  add_function<1, adopt_memory>(env, exports, "adoptMemory");
  add_function<1, release_memory>(env, exports, "releaseMemory");
  return exports;
}

}  // namespace
}  // namespace sdpa

static Napi::Object initialize(Napi::Env env, Napi::Object exports) {
  try {
    return sdpa::init(env, exports);
  } catch (const std::bad_alloc&) {
    throw Napi::Error::New(env, "no memory to load the addon");
  }
}

NODE_API_MODULE(node_sdpa, initialize)

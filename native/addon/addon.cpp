// Node-API and nothing else: JavaScript arguments -> Problem + pointers -> Status -> JavaScript.
// The arguments themselves are checked in flat_call.h.
#include <napi.h>

#include <array>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "addon/callback.h"
#include "addon/device_memory.h"
#include "addon/flat_call.h"
#include "addon/huge_pages.h"
#include "core/keep_mask.h"
#include "core/queue.h"
#include "cpu/thread_pool.h"

namespace sdpa {
namespace {

// ------------------------------------------------------------------------------------- arguments

ArrayKind kind_of(napi_typedarray_type type) {
  switch (type) {
    case napi_uint8_array:
      return ArrayKind::uint8;
    case napi_uint16_array:
      return ArrayKind::uint16;
    case napi_int32_array:
      return ArrayKind::int32;
    case napi_float32_array:
      return ArrayKind::float32;
    case napi_float64_array:
      return ArrayKind::float64;
    default:
      return ArrayKind::other;
  }
}

/// A typed array, or memory of a GPU; that lives as long as `held`, whatever JavaScript does.
Array array_of(Napi::Env env, napi_value value, SharedDeviceMemory* held = nullptr) {
  Array array;
  napi_typedarray_type type;
  if (napi_get_typedarray_info(env, value, &type, &array.length, &array.data, nullptr, nullptr) ==
      napi_ok) {
    array.kind = kind_of(type);
    return array;
  }
  napi_valuetype kind;
  napi_typeof(env, value, &kind);
  if (kind == napi_null) return array;
  array.kind = ArrayKind::other;
  if (!held || !(*held = device_memory_of(env, value))) return array;
  return {ArrayKind::device, (*held)->data(), (*held)->bytes(), (*held)->device()};
}

/// Arguments of a call: header, index of the backend, arrays.
constexpr size_t kCallArguments = 2 + kArrayCount;

/// Something to compute, with all that it points to.
struct Work {
  virtual ~Work() = default;
  virtual Status run(const CancelToken& cancel) const = 0;
  /// The GPU that does it, or kNoDevice.
  virtual int device() const = 0;
  /// Over sooner than another thread wakes up for it.
  virtual bool is_short() const { return false; }
};

/// Multiply-adds below which a call on the CPU is short: some microseconds.
constexpr double kNotWorthAThread = 5e4;

/// An attention call.
class CallWork final : public Work {
 public:
  CallWork(Napi::Env env, const napi_value* values, bool is_backward)
      : call_(read(env, values, is_backward)) {}

  Status run(const CancelToken& cancel) const override { return call_.run(cancel); }
  int device() const override { return call_.device; }
  bool is_short() const override {
    return call_.device == kNoDevice && multiply_adds(call_.problem) <= kNotWorthAThread;
  }

 private:
  FlatCall read(Napi::Env env, const napi_value* values, bool is_backward) {
    uint32_t backend;
    if (napi_get_value_uint32(env, values[1], &backend) != napi_ok) backend = UINT32_MAX;
    std::array<Array, kArrayCount> arrays;
    for (size_t i = 0; i < kArrayCount; ++i) arrays[i] = array_of(env, values[2 + i], &held_[i]);
    return FlatCall(array_of(env, values[0]), backend, arrays.data(), is_backward, cuda_plugin());
  }

  std::array<SharedDeviceMemory, kArrayCount> held_;
  const FlatCall call_;
};

/// A typed array and memory of a GPU, or two of the latter: one is copied to the other.
class CopyWork final : public Work {
 public:
  CopyWork(Napi::Env env, const napi_value* values) {
    const Array from = array_of(env, values[0], &from_), to = array_of(env, values[1], &to_);
    const size_t bytes = bytes_of(to);
    if (bytes_of(from) != bytes || (!from_ && !to_)) refuse("copy: not of one size");
    copy_ = {from.device, to.device, from.data, to.data, bytes};
  }

  Status run(const CancelToken& cancel) const override {
    return cuda_plugin().functions->copy(copy_, cancel);
  }
  int device() const override { return to_ ? to_->device() : from_->device(); }

 private:
  static size_t bytes_of(const Array& array) {
    if (array.kind == ArrayKind::none || array.kind == ArrayKind::other) {
      refuse("copy: neither an array nor memory of a GPU");
    }
    return array.length * element_size(array.kind);
  }

  SharedDeviceMemory from_, to_;
  cuda::Copy copy_{};
};

static_assert(cuda::Copy::kHost == kNoDevice, "an array in host memory is on no device");

// ------------------------------------------------------------------------------ asynchronous calls

class Environment;

ThreadPool& pool_of(int device) {
  return device == kNoDevice ? ThreadPool::shared() : ThreadPool::of_device(device);
}

/// One asynchronous call, from its start on the JavaScript thread to its promise's end there.
struct AsyncCall final : Job {
  Environment& environment;
  const std::unique_ptr<const Work> work;
  ThreadPool& pool;
  CancelToken cancel;
  Status status;
  Napi::Promise::Deferred deferred;
  Napi::ObjectReference arrays;  // keeps the typed arrays alive
  AsyncCall* next = nullptr;     // the environment's

  AsyncCall(Environment& environment, Napi::Env env, std::unique_ptr<const Work> work,
            const std::atomic<int32_t>* external)
      : environment(environment),
        work(std::move(work)),
        pool(pool_of(this->work->device())),
        cancel(external),
        deferred(Napi::Promise::Deferred::New(env)) {}
  void compute();
  void run() override;
};

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
    if (call->work->is_short()) {
      call->compute();  // the promise comes back settled
      settle(env, call);
      return promise;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      running_.push(call);
    }
    const Status status = call->pool.submit(call);
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
      if (!call->pool.withdraw(call)) continue;
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
                                : work->run(cancel);
  } catch (const std::bad_alloc&) {
    status = {StatusCode::out_of_memory, "no memory for the call"};
  }
}

void AsyncCall::run() {
  compute();
  environment.finish(this);
}

// ------------------------------------------------------------------------------------- functions

void run_at_once(const Work& work) {
  const Status status = work.run(CancelToken());
  if (!status.ok()) throw status;
}

/// `values`: the arguments, whose arrays live as long as the call.
template <size_t Count>
napi_value start_async(Napi::Env env, const napi_value* values, const std::atomic<int32_t>* cancel,
                       std::unique_ptr<const Work> work) {
  Environment& environment = *env.GetInstanceData<Environment>();
  auto call = std::make_unique<AsyncCall>(environment, env, std::move(work), cancel);
  const Napi::Array arrays = Napi::Array::New(env, Count);
  for (uint32_t i = 0; i < Count; ++i) arrays.Set(i, values[i]);
  call->arrays = Napi::Persistent<Napi::Object>(arrays);
  return environment.start(env, call.release());
}

template <bool IsBackward>
napi_value run_sync(Napi::Env env, const napi_value* values) {
  run_at_once(CallWork(env, values, IsBackward));
  return nullptr;
}

/// The first argument is one element that JavaScript sets to stop the call, or null.
template <bool IsBackward>
napi_value run_async(Napi::Env env, const napi_value* values) {
  const Array flag = array_of(env, values[0]);
  const auto* const cancel = static_cast<const std::atomic<int32_t>*>(
      ArrayReader(&flag).tensor(ArrayKind::int32, true, 1));
  return start_async<1 + kCallArguments>(env, values, cancel,
                                         std::make_unique<CallWork>(env, values + 1, IsBackward));
}

/// (from, to)
napi_value copy_sync(Napi::Env env, const napi_value* values) {
  run_at_once(CopyWork(env, values));
  return nullptr;
}

napi_value copy_async(Napi::Env env, const napi_value* values) {
  return start_async<2>(env, values, nullptr, std::make_unique<CopyWork>(env, values));
}

/// (header, GPU or -1, mask)
napi_value dropout_mask(Napi::Env env, const napi_value* values) {
  const Problem p = read_problem(array_of(env, values[0]));
  const bool context = p.dropout_placement == Placement::context;
  const Array mask = array_of(env, values[2]);
  ArrayReader reader(&mask);
  auto* const keep =
      static_cast<uint8_t*>(reader.tensor(ArrayKind::uint8, false, p.batch, p.query_heads,
                                          p.query_length, context ? p.value_dim : p.key_length));
  int32_t gpu;
  if (napi_get_value_int32(env, values[1], &gpu) != napi_ok || gpu < kNoDevice ||
      gpu >= cuda_plugin().device_count) {
    fail(env, "dropoutMask: no such GPU");
  }
  if (gpu == kNoDevice) {
    fill_keep_mask(p, keep);
    return nullptr;
  }
  const Status status = cuda_plugin().functions->dropout_mask(gpu, p, keep, reader.bytes());
  if (!status.ok()) throw status;
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
  most_bytes().store(uint64_t(bytes), std::memory_order_relaxed);
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

Napi::Object init(Napi::Env env, Napi::Object exports) {
  env.SetInstanceData(new Environment(env));
  exports.Set("version", SDPA_VERSION);
  exports.Set("problemFields", field_names());
  exports.Set("backends", list_backends(env));
  add_function<kCallArguments, run_sync<false>>(env, exports, "forwardSync");
  add_function<kCallArguments, run_sync<true>>(env, exports, "backwardSync");
  add_function<1 + kCallArguments, run_async<false>>(env, exports, "forwardAsync");
  add_function<1 + kCallArguments, run_async<true>>(env, exports, "backwardAsync");
  add_function<2, copy_sync>(env, exports, "copySync");
  add_function<2, copy_async>(env, exports, "copyAsync");
  add_function<3, dropout_mask>(env, exports, "dropoutMask");
  export_device_memory(env, exports);
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

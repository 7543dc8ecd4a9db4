// Node-API and nothing else: JavaScript arguments -> Problem + pointers -> Status -> JavaScript.
// The arguments themselves are checked in flat_call.h.
#include <napi.h>

#include <array>
#include <condition_variable>
#include <mutex>
#include <new>
#include <string>
#include <vector>

#include "addon/flat_call.h"
#include "addon/huge_pages.h"
#include "core/keep_mask.h"
#include "cpu/thread_pool.h"

namespace sdpa {
namespace {

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

Array array_of(Napi::Env env, napi_value value) {
  Array array;
  napi_typedarray_type type;
  if (napi_get_typedarray_info(env, value, &type, &array.length, &array.data, nullptr, nullptr) ==
      napi_ok) {
    array.kind = kind_of(type);
    return array;
  }
  napi_valuetype kind;
  napi_typeof(env, value, &kind);
  if (kind != napi_null) array.kind = ArrayKind::other;
  return array;
}

/// Arguments of a call: header, index of the backend, arrays.
constexpr size_t kCallArguments = 2 + kArrayCount;

FlatCall flat_call(Napi::Env env, const napi_value* values, bool is_backward) {
  uint32_t backend;
  if (napi_get_value_uint32(env, values[1], &backend) != napi_ok) backend = uint32_t(kBackendCount);
  std::array<Array, kArrayCount> arrays;
  for (size_t i = 0; i < kArrayCount; ++i) arrays[i] = array_of(env, values[2 + i]);
  return FlatCall(array_of(env, values[0]), backend, arrays.data(), is_backward);
}

/// What `work` gives; what it throws, as an error of JavaScript.
template <typename Work>
auto with_errors(Napi::Env env, const Work& work) {
  try {
    return work();
  } catch (const Status& status) {
    throw make_error(env, status);
  } catch (const std::bad_alloc&) {
    throw make_error(env, {StatusCode::out_of_memory, "no memory for the call"});
  }
}

// ------------------------------------------------------------------------------ asynchronous calls

class Environment;

/// One asynchronous call, from its start on the JavaScript thread to its promise's end there.
struct AsyncCall final : Job {
  Environment& environment;
  FlatCall arguments;
  CancelToken cancel;
  Status status;
  Napi::Promise::Deferred deferred;
  Napi::ObjectReference arrays;  // keeps the typed arrays alive

  AsyncCall(Environment& environment, Napi::Env env, const napi_value* values, bool is_backward,
            const std::atomic<int32_t>* external)
      : environment(environment),
        arguments(flat_call(env, values, is_backward)),
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
      running_.push_back(call);
    }
    const Status status = ThreadPool::shared().submit(call);
    if (status.ok()) {
      if (pending_++ == 0) finished_signal_.Ref(env);
      return promise;
    }
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      forget(call);
    }
    call->status = status;
    settle(env, call);
    return promise;
  }

  /// Called by a pool thread.
  void finish(AsyncCall* call) {
    const std::lock_guard<std::mutex> lock(mutex_);
    forget(call);
    finished_.push_back(call);
    if (!closing_ && finished_.size() == 1) finished_signal_.NonBlockingCall();
    none_running_.notify_all();
  }

 private:
  using Signal = Napi::TypedThreadSafeFunction<Environment, void, drain>;

  void forget(AsyncCall* call) {
    for (AsyncCall*& running : running_) {
      if (running != call) continue;
      running = running_.back();
      return running_.pop_back();
    }
  }

  static void settle(Napi::Env env, AsyncCall* call) {
    if (call->status.ok()) {
      call->deferred.Resolve(env.Undefined());
    } else {
      call->deferred.Reject(make_error(env, call->status).Value());
    }
    delete call;
  }

  void settle_finished(Napi::Env env) {
    std::vector<AsyncCall*> finished;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      finished.swap(finished_);
    }
    const Napi::HandleScope scope(env);
    for (AsyncCall* const call : finished) settle(env, call);
    pending_ -= finished.size();
    if (pending_ == 0) finished_signal_.Unref(env);
  }

  void close() {
    std::unique_lock<std::mutex> lock(mutex_);
    closing_ = true;
    const std::vector<AsyncCall*> running = running_;
    for (AsyncCall* const call : running) {
      call->cancel.cancel();
      if (!ThreadPool::shared().withdraw(call)) continue;
      forget(call);
      finished_.push_back(call);
    }
    none_running_.wait(lock, [this] { return running_.empty(); });
    for (AsyncCall* const call : finished_) delete call;
    finished_.clear();
  }

  Signal finished_signal_;
  std::mutex mutex_;
  std::condition_variable none_running_;
  std::vector<AsyncCall*> running_, finished_;
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

/// Fills `values` with exactly `count` arguments.
void take_arguments(const Napi::CallbackInfo& info, size_t count, napi_value* values) {
  if (info.Length() != count) fail(info.Env(), "wrong number of arguments");
  for (size_t i = 0; i < count; ++i) values[i] = info[i];
}

template <bool IsBackward>
Napi::Value run_sync(const Napi::CallbackInfo& info) {
  napi_value values[kCallArguments];
  take_arguments(info, kCallArguments, values);
  with_errors(info.Env(), [&] {
    const Status status = flat_call(info.Env(), values, IsBackward).run(CancelToken());
    if (!status.ok()) throw status;
  });
  return info.Env().Undefined();
}

template <bool IsBackward>
Napi::Value run_async(const Napi::CallbackInfo& info) {
  napi_value values[1 + kCallArguments];
  take_arguments(info, 1 + kCallArguments, values);
  Environment& environment = *info.Env().GetInstanceData<Environment>();
  return with_errors(info.Env(), [&] {
    const Array flag = array_of(info.Env(), values[0]);
    const auto* const cancel = static_cast<const std::atomic<int32_t>*>(
        ArrayReader(&flag).tensor(ArrayKind::int32, true, 1));
    auto call =
        std::make_unique<AsyncCall>(environment, info.Env(), values + 1, IsBackward, cancel);
    const Napi::Array arrays = Napi::Array::New(info.Env(), std::size(values));
    for (uint32_t i = 0; i < std::size(values); ++i) arrays.Set(i, values[i]);
    call->arrays = Napi::Persistent<Napi::Object>(arrays);
    return environment.start(info.Env(), call.release());
  });
}

void dropout_mask(const Napi::CallbackInfo& info) {
  napi_value values[2];
  take_arguments(info, 2, values);
  with_errors(info.Env(), [&] {
    const Problem p = read_problem(array_of(info.Env(), values[0]));
    const bool context = p.dropout_placement == Placement::context;
    const Array mask = array_of(info.Env(), values[1]);
    void* const keep =
        ArrayReader(&mask).tensor(ArrayKind::uint8, false, p.batch, p.query_heads, p.query_length,
                                  context ? p.value_dim : p.key_length);
    fill_keep_mask(p, static_cast<uint8_t*>(keep));
  });
}

void set_num_threads(const Napi::CallbackInfo& info) {
  ThreadPool::shared().set_threads(info[0].ToNumber().Int32Value());
}

Napi::Value get_num_threads(const Napi::CallbackInfo& info) {
  return Napi::Number::New(info.Env(), ThreadPool::shared().threads());
}

/// Takes note of the fresh SharedArrayBuffer of a Uint8Array. V8 does not count these by itself,
/// and would collect them far too late.
void adopt_memory(const Napi::CallbackInfo& info) {
  const Napi::Env env = info.Env();
  size_t bytes = 0;
  void* data = nullptr;
  napi_typedarray_type type;
  if (napi_get_typedarray_info(env, info[0], &type, &bytes, &data, nullptr, nullptr) != napi_ok ||
      type != napi_uint8_array) {
    fail(env, "adoptMemory: not a Uint8Array");
  }
  prefer_huge_pages(data, bytes);
  Napi::MemoryManagement::AdjustExternalMemory(env, int64_t(bytes));
}

void release_memory(const Napi::CallbackInfo& info) {
  Napi::MemoryManagement::AdjustExternalMemory(info.Env(), -info[0].ToNumber().Int64Value());
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
  exports.Set("forwardSync", Napi::Function::New<run_sync<false>>(env, "forwardSync"));
  exports.Set("backwardSync", Napi::Function::New<run_sync<true>>(env, "backwardSync"));
  exports.Set("forwardAsync", Napi::Function::New<run_async<false>>(env, "forwardAsync"));
  exports.Set("backwardAsync", Napi::Function::New<run_async<true>>(env, "backwardAsync"));
  exports.Set("dropoutMask", Napi::Function::New<dropout_mask>(env, "dropoutMask"));
  exports.Set("setNumThreads", Napi::Function::New<set_num_threads>(env, "setNumThreads"));
  exports.Set("getNumThreads", Napi::Function::New<get_num_threads>(env, "getNumThreads"));
  exports.Set("adoptMemory", Napi::Function::New<adopt_memory>(env, "adoptMemory"));
  exports.Set("releaseMemory", Napi::Function::New<release_memory>(env, "releaseMemory"));
  return exports;
}

}  // namespace
}  // namespace sdpa

static Napi::Object initialize(Napi::Env env, Napi::Object exports) {
  return sdpa::init(env, exports);
}

NODE_API_MODULE(node_sdpa, initialize)

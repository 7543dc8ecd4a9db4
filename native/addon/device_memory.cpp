// Memory of a GPU as a JavaScript object.
#include "addon/device_memory.h"

#include <memory>
#include <string>

#include "addon/callback.h"

namespace sdpa {
namespace {

/// What V8 is told of each byte on a GPU, so that it collects tensors that nobody uses any more:
/// a part, since GPUs have memory of their own, and a collection costs milliseconds.
constexpr size_t kDeviceBytesPerCounted = 8;

constexpr napi_type_tag kTag = {0x6e6f64652d736470, 0x6465766963656d65};

/// What a JavaScript object holds; empty once it is released.
struct Handle {
  SharedDeviceMemory memory;
  int64_t counted_bytes;

  void release(napi_env env) {
    memory = SharedDeviceMemory();
    int64_t total;
    napi_adjust_external_memory(env, -counted_bytes, &total);
    counted_bytes = 0;
  }
};

Handle* handle_of(napi_env env, napi_value value) {
  napi_valuetype kind;
  bool is_ours = false;
  void* handle = nullptr;
  if (napi_typeof(env, value, &kind) != napi_ok || kind != napi_object) return nullptr;
  if (napi_check_object_type_tag(env, value, &kTag, &is_ours) != napi_ok || !is_ours ||
      napi_unwrap(env, value, &handle) != napi_ok) {
    return nullptr;
  }
  return static_cast<Handle*>(handle);
}

Handle& expect_handle(Napi::Env env, napi_value value) {
  Handle* const handle = handle_of(env, value);
  if (!handle) fail(env, "not memory of a GPU");
  return *handle;
}

napi_value wrap(Napi::Env env, SharedDeviceMemory memory, size_t counted_bytes) {
  Napi::Object object = Napi::Object::New(env);
  object.Set("device", memory->device());
  object.Set("bytes", double(memory->bytes()));
  auto handle = std::make_unique<Handle>(Handle{std::move(memory), int64_t(counted_bytes)});
  const auto finalize = [](napi_env env, void* handle, void*) {
    static_cast<Handle*>(handle)->release(env);
    delete static_cast<Handle*>(handle);
  };
  if (napi_type_tag_object(env, object, &kTag) != napi_ok ||
      napi_wrap(env, object, handle.get(), finalize, nullptr, nullptr) != napi_ok) {
    fail(env, "no object for memory of a GPU");
  }
  handle.release();
  Napi::MemoryManagement::AdjustExternalMemory(env, int64_t(counted_bytes));
  return object;
}

int read_device(Napi::Env env, napi_value value) {
  uint32_t device;
  if (napi_get_value_uint32(env, value, &device) != napi_ok ||
      device >= uint32_t(cuda_plugin().device_count)) {
    fail(env, "device: no such GPU");
  }
  return int(device);
}

size_t read_bytes(Napi::Env env, napi_value value) {
  double bytes;
  if (napi_get_value_double(env, value, &bytes) != napi_ok || !(bytes >= 0 && bytes < 0x1p53)) {
    fail(env, "not a number of bytes");
  }
  return size_t(bytes);
}

/// (path, most bytes on each device or 0, whether Hopper's kernels are used) -> {reason, devices:
/// [{name, reason, ...}]}
napi_value open_cuda(Napi::Env env, const napi_value* values) {
  const std::string path = Napi::Value(env, values[0]).ToString();
  const CudaPlugin& plugin = open_cuda_plugin(path.c_str());
  const Napi::Object result = Napi::Object::New(env);
  const Napi::Array devices = Napi::Array::New(env);
  result.Set("reason", plugin.reason);
  result.Set("devices", devices);
  if (!plugin.functions) return result;
  plugin.functions->configure(
      {read_bytes(env, values[1]), Napi::Value(env, values[2]).ToBoolean()});
  for (int device = 0; device < plugin.device_count; ++device) {
    cuda::DeviceInfo found{};
    const Status status = plugin.functions->describe(device, &found);
    const Napi::Object entry = Napi::Object::New(env);
    entry.Set("name", found.name);
    entry.Set("computeCapability", found.compute_capability / 10.0);
    entry.Set("memoryBytes", double(found.memory_bytes));
    entry.Set("reason", status.ok() ? "" : status.message);
    devices.Set(uint32_t(device), entry);
  }
  return result;
}

std::string name_of(int device) { return device == 0 ? "cuda" : "cuda:" + std::to_string(device); }

/// (device, bytes) -> memory
napi_value device_allocate(Napi::Env env, const napi_value* values) {
  const int device = read_device(env, values[0]);
  const size_t bytes = read_bytes(env, values[1]);
  SharedDeviceMemory memory(device, bytes);
  const Status status = memory->allocate();
  if (status.code == StatusCode::out_of_memory) {
    const cuda::MemoryUse use = cuda_plugin().functions->memory_use(device);
    const std::string message =
        "No memory for " + std::to_string(bytes) + " bytes on " + name_of(device) + ": " +
        std::to_string(use.used_bytes) + " of " + std::to_string(use.limit_bytes) +
        " are in use. Dispose of tensors, or raise SDPA_CUDA_MEMORY_LIMIT where it is set";
    throw make_error(env, {status.code, message.c_str()});
  }
  if (!status.ok()) throw status;
  return wrap(env, std::move(memory), bytes / kDeviceBytesPerCounted);
}

/// A further object for the same memory, which lives until all of them are released.
napi_value device_share(Napi::Env env, const napi_value* values) {
  const Handle& handle = expect_handle(env, values[0]);
  if (!handle.memory) fail(env, "memory of a GPU was used after its release");
  return wrap(env, handle.memory, 0);
}

napi_value device_release(Napi::Env env, const napi_value* values) {
  expect_handle(env, values[0]).release(env);
  return nullptr;
}

/// (device) -> {usedBytes, cachedBytes, limitBytes}
napi_value device_memory_use(Napi::Env env, const napi_value* values) {
  const cuda::MemoryUse use = cuda_plugin().functions->memory_use(read_device(env, values[0]));
  const Napi::Object result = Napi::Object::New(env);
  result.Set("usedBytes", double(use.used_bytes));
  result.Set("cachedBytes", double(use.cached_bytes));
  result.Set("limitBytes", double(use.limit_bytes));
  return result;
}

}  // namespace

SharedDeviceMemory device_memory_of(Napi::Env env, napi_value value) {
  const Handle* const handle = handle_of(env, value);
  if (!handle) return {};
  if (!handle->memory) fail(env, "memory of a GPU was used after its release");
  return handle->memory;
}

void export_device_memory(Napi::Env env, Napi::Object exports) {
  add_function<3, open_cuda>(env, exports, "openCuda");
  add_function<2, device_allocate>(env, exports, "deviceAllocate");
  add_function<1, device_share>(env, exports, "deviceShare");
  add_function<1, device_release>(env, exports, "deviceRelease");
  add_function<1, device_memory_use>(env, exports, "deviceMemoryUse");
}

}  // namespace sdpa

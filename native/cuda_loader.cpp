// Opens libsdpa_cuda.so at run time.
#include "cuda_loader.h"

#include <cstring>
#include <mutex>

#if defined(__linux__)
#include <dlfcn.h>
#endif

namespace sdpa {
namespace {

/// Never destroyed: calls may outlive every static object.
CudaPlugin& plugin() {
  static CudaPlugin* const only = new CudaPlugin;
  return *only;
}

/// The functions of the library at `path`, or null and the reason.
const cuda::Plugin* load(const char* path, std::string& reason) {
#if defined(__linux__)
  // Before glibc 2.34 what the CUDA runtime wants of librt was there alone, and Node does not load
  // it.
  dlopen("librt.so.1", RTLD_LAZY | RTLD_GLOBAL);
  // Its code stays mapped: the CUDA runtime leaves threads and exit handlers behind.
  void* const library = dlopen(path, RTLD_NOW | RTLD_LOCAL | RTLD_NODELETE);
  if (!library) {
    reason = dlerror();
    return nullptr;
  }
  const auto entry = reinterpret_cast<cuda::PluginEntry>(dlsym(library, "sdpa_cuda_plugin"));
  const cuda::Plugin* const functions = entry ? entry(cuda::kPluginAbi) : nullptr;
  if (!functions || std::strcmp(functions->version, SDPA_VERSION) != 0) {
    reason = std::string(path) + " is of another version of node-sdpa than this, " SDPA_VERSION;
    return nullptr;
  }
  return functions;
#else
  (void)path;
  reason = "there is a CUDA plugin for Linux alone";
  return nullptr;
#endif
}

}  // namespace

const CudaPlugin& open_cuda_plugin(const char* path) {
  static std::mutex mutex;
  static bool is_opened = false;
  const std::lock_guard<std::mutex> lock(mutex);
  CudaPlugin& it = plugin();
  if (is_opened) return it;
  is_opened = true;
  const cuda::Plugin* const functions = load(path, it.reason);
  if (!functions) return it;
  const Status status = functions->open(&it.device_count);
  if (status.ok()) {
    it.functions = functions;
  } else {
    it.reason = status.message;
  }
  return it;
}

const CudaPlugin& cuda_plugin() { return plugin(); }

}  // namespace sdpa

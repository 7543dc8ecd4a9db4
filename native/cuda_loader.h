// Opens libsdpa_cuda.so at run time, so that the addon itself needs no GPU library.
#pragma once

#include <string>

#include "cuda/plugin.h"

namespace sdpa {

/// What opening the plugin gave, once and for all of the process.
struct CudaPlugin {
  const cuda::Plugin* functions = nullptr;  // null where it cannot be used
  int device_count = 0;
  std::string reason;  // why it cannot be used
};

/// Opens the plugin at an absolute path, at the first call, and looks for GPUs.
const CudaPlugin& open_cuda_plugin(const char* path);

/// What open_cuda_plugin gave; without functions before its first call.
const CudaPlugin& cuda_plugin();

}  // namespace sdpa

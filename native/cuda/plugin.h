// The C ABI of libsdpa_cuda.so: what the addon, which must load on machines without a GPU, calls
// in the plugin that it opens at run time. Both come from one build of one version of the package.
#pragma once

#include "core/backend.h"
#include "core/sequences.h"

namespace sdpa::cuda {

/// Changes whenever anything in this file, in core/backend.h or in core/problem.h does.
constexpr uint32_t kPluginAbi = 2;

/// An array in host memory, as long as it is.
struct HostArray {
  const void* data;
  size_t bytes;
};

/// One attention call. Its tensors are all in memory of the device, or all in host memory and then
/// listed in `arrays`; integers for each batch entry, and `sequences`, are always in host memory.
struct Call {
  int device;
  bool on_device;
  const Problem& problem;
  const Sequences& sequences;
  const Inputs& inputs;
  const HostArray* arrays;
  size_t array_count;
};

/// From host memory to a device, back, or from one device to another.
struct Copy {
  static constexpr int kHost = -1;
  int from_device, to_device;  // or kHost; not both
  const void* from;
  void* to;
  size_t bytes;
};

struct DeviceInfo {
  char name[256];
  int compute_capability;  // 90 is 9.0
  size_t memory_bytes;
};

struct MemoryUse {
  size_t used_bytes;    // held by tensors and running calls
  size_t cached_bytes;  // kept for the next ones
  size_t limit_bytes;   // of both together
};

/// Of every device.
struct Settings {
  size_t memory_limit;  // bytes; 0: all that a device has
  bool hopper;          // whether a GPU of compute capability 9.0 uses the kernels made for it
};

/// Invariant: every function may be called from any thread, also at the same time; none throws,
/// prints or ends the process. Calls and copies wait until the device has done them.
struct Plugin {
  uint32_t abi;
  const char* version;  // of the package
  /// Looks for the driver and the devices, at the first call; `unavailable` says what is missing.
  Status (*open)(int* device_count);
  /// `unavailable`: this device cannot be used, and why.
  Status (*describe)(int device, DeviceInfo* info);
  void (*configure)(const Settings&);
  MemoryUse (*memory_use)(int device);
  Status (*allocate)(int device, size_t bytes, void** memory);
  /// Of memory that no call uses any more.
  void (*release)(int device, void* memory, size_t bytes);
  Status (*copy)(const Copy&, const CancelToken&);
  Status (*forward)(const Call&, const ForwardOutputs&, const CancelToken&);
  Status (*backward)(const Call&, const BackwardTensors&, const CancelToken&);
  /// The decisions of Problem's dropout, one byte each, into host memory.
  Status (*dropout_mask)(int device, const Problem&, uint8_t* mask, size_t bytes);
};

/// The plugin's only export: null where it has another ABI than the caller.
extern "C" const Plugin* sdpa_cuda_plugin(uint32_t abi);
using PluginEntry = decltype(&sdpa_cuda_plugin);

}  // namespace sdpa::cuda

// The plugin's functions: what comes from the addon, made into work for a device, and its end
// awaited.
#include "cuda/plugin.h"

#include <cstdio>
#include <new>

#include "cuda/device.h"
#include "cuda/run.h"

namespace sdpa::cuda {
namespace {

/// Nothing may be thrown through the C ABI; only memory for lists can be missing.
template <typename Body>
Status guarded(const Body& body) {
  try {
    return body();
  } catch (const std::bad_alloc&) {
    return {StatusCode::out_of_memory, "no host memory for the call"};
  }
}

template <typename Body>
Status on_device(int index, const Body& body) {
  return guarded([&]() -> Status {
    Device* const device = Device::find(index);
    if (!device) return {StatusCode::unavailable, "there is no GPU of this number"};
    const Status status = device->enter();
    return status.ok() ? body(*device) : status;
  });
}

Status open(int* device_count) {
  return guarded([&] { return Device::open_all(device_count); });
}

Status describe(int device, DeviceInfo* info) {
  return on_device(device, [&](Device& found) -> Status {
    const runtime::Properties& p = found.properties();
    std::snprintf(info->name, sizeof info->name, "%s", p.name);
    info->compute_capability = p.compute_capability;
    info->memory_bytes = p.memory_bytes;
    return {};
  });
}

void configure(const Settings& settings) { Device::configure(settings); }

MemoryUse memory_use(int device) {
  Device* const found = Device::find(device);
  return found ? found->memory_use() : MemoryUse{};
}

Status allocate(int device, size_t bytes, void** memory) {
  return on_device(device, [&](Device& found) { return found.allocate(bytes, memory); });
}

void release(int device, void* memory, size_t bytes) {
  if (Device* const found = Device::find(device)) found->release(memory, bytes);
}

Status copy(const Copy& copy, const CancelToken& cancel) {
  const int index = copy.to_device == Copy::kHost ? copy.from_device : copy.to_device;
  return on_device(index, [&](Device& device) { return run_copy(device, copy, cancel); });
}

Status forward(const Call& call, const ForwardOutputs& outputs, const CancelToken& cancel) {
  return on_device(call.device,
                   [&](Device& device) { return run_forward(device, call, outputs, cancel); });
}

Status backward(const Call& call, const BackwardTensors& tensors, const CancelToken& cancel) {
  return on_device(call.device,
                   [&](Device& device) { return run_backward(device, call, tensors, cancel); });
}

Status dropout_mask(int index, const Problem& problem, uint8_t* mask, size_t bytes) {
  return on_device(index,
                   [&](Device& device) { return run_dropout_mask(device, problem, mask, bytes); });
}

constexpr Plugin kPlugin = {kPluginAbi, SDPA_VERSION, open, describe, configure, memory_use,
                            allocate,   release,      copy, forward,  backward,  dropout_mask};

}  // namespace

extern "C" __attribute__((visibility("default"))) const Plugin* sdpa_cuda_plugin(uint32_t abi) {
  return abi == kPluginAbi ? &kPlugin : nullptr;
}

}  // namespace sdpa::cuda

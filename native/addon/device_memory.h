// Memory of a GPU as a JavaScript object, freed by dispose() or by the garbage collector.
#pragma once

#include <napi.h>

#include <memory>

#include "cuda_loader.h"

namespace sdpa {

/// Shared by the JavaScript objects and the running calls that use it.
struct DeviceMemory {
  const int device;
  void* const data;
  const size_t bytes;

  DeviceMemory(int device, void* data, size_t bytes) : device(device), data(data), bytes(bytes) {}
  DeviceMemory(const DeviceMemory&) = delete;
  ~DeviceMemory() { cuda_plugin().functions->release(device, data, bytes); }
};

/// The memory behind a JavaScript value; null where it is no such object. Throws where the object
/// was released.
std::shared_ptr<DeviceMemory> device_memory_of(Napi::Env env, napi_value value);

/// Adds openCuda, deviceAllocate, deviceShare, deviceRelease and deviceMemory to the exports.
void export_device_memory(Napi::Env env, Napi::Object exports);

}  // namespace sdpa

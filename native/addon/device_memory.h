// Memory of a GPU as a JavaScript object, freed by dispose() or by the garbage collector.
#pragma once

#include <napi.h>

#include <memory>

#include "cuda_loader.h"

namespace sdpa {

/// Shared by the JavaScript objects and the running calls that use it.
class DeviceMemory {
 public:
  DeviceMemory(int device, size_t bytes) : device_(device), bytes_(bytes) {}
  DeviceMemory(const DeviceMemory&) = delete;
  ~DeviceMemory() {
    if (data_) cuda_plugin().functions->release(device_, data_, bytes_);
  }

  Status allocate() { return cuda_plugin().functions->allocate(device_, bytes_, &data_); }

  int device() const { return device_; }
  void* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  const int device_;
  void* data_ = nullptr;
  const size_t bytes_;
};

/// The memory behind a JavaScript value; null where it is no such object. Throws where the object
/// was released.
std::shared_ptr<DeviceMemory> device_memory_of(Napi::Env env, napi_value value);

/// Adds openCuda, deviceAllocate, deviceShare, deviceRelease and deviceMemoryUse to the exports.
void export_device_memory(Napi::Env env, Napi::Object exports);

}  // namespace sdpa

// Memory of a GPU as a JavaScript object, freed by dispose() or by the garbage collector.
#pragma once

#include <napi.h>

#include <atomic>
#include <utility>

#include "cuda_loader.h"

namespace sdpa {

/// Memory of a GPU.
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
  friend class SharedDeviceMemory;

  std::atomic<int> holders_{1};
  const int device_;
  void* data_ = nullptr;
  const size_t bytes_;
};

/// A hold on it, of a JavaScript object or of a running call; the last to let go frees it.
/// std::shared_ptr would do, but has type information that no flag hides: the addon would export
/// it.
class SharedDeviceMemory {
 public:
  SharedDeviceMemory() = default;
  SharedDeviceMemory(int device, size_t bytes) : memory_(new DeviceMemory(device, bytes)) {}
  SharedDeviceMemory(const SharedDeviceMemory& other) : memory_(other.memory_) {
    if (memory_) memory_->holders_.fetch_add(1, std::memory_order_relaxed);
  }
  SharedDeviceMemory(SharedDeviceMemory&& other) noexcept
      : memory_(std::exchange(other.memory_, nullptr)) {}
  SharedDeviceMemory& operator=(SharedDeviceMemory other) noexcept {
    std::swap(memory_, other.memory_);
    return *this;
  }
  ~SharedDeviceMemory() {
    if (memory_ && memory_->holders_.fetch_sub(1, std::memory_order_acq_rel) == 1) delete memory_;
  }

  explicit operator bool() const { return memory_ != nullptr; }
  DeviceMemory* operator->() const { return memory_; }

 private:
  DeviceMemory* memory_ = nullptr;
};

/// The memory behind a JavaScript value; none where it is no such object. Throws where the object
/// was released.
SharedDeviceMemory device_memory_of(Napi::Env env, napi_value value);

/// Adds openCuda, deviceAllocate, deviceShare, deviceRelease and deviceMemoryUse to the exports.
void export_device_memory(Napi::Env env, Napi::Object exports);

}  // namespace sdpa

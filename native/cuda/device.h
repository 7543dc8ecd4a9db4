// The GPUs of this machine: their memory, their lanes, and whether they still work.
#pragma once

#include <atomic>
#include <memory>
#include <mutex>
#include <vector>

#include "cuda/kernels.h"
#include "cuda/lane.h"
#include "cuda/memory_cache.h"
#include "cuda/plugin.h"

namespace sdpa::cuda {

/// Invariant: never destroyed, since calls may outlive every static object.
class Device {
 public:
  /// Looks for driver and devices once; every call gives the same answer.
  static Status open_all(int* count);
  /// Null where there is no such device.
  static Device* find(int index);
  static void configure(const Settings& settings);

  int index() const { return index_; }
  const runtime::Properties& properties() const { return properties_; }
  DeviceLimits limits() const;

  /// Makes this the calling thread's device. Fails where it is too old, or was lost.
  Status enter();
  /// The meaning of what the runtime said. A fault from which no call recovers loses the device.
  Status check(runtime::Error error);

  Status allocate(size_t bytes, void** memory) { return check(memory_.allocate(bytes, memory)); }
  void release(void* memory, size_t bytes) { memory_.release(memory, bytes); }
  MemoryUse memory_use() { return memory_.use(); }

  /// A lane for one call, which goes back when the call is over.
  struct GiveBack {
    Device* device;
    void operator()(Lane* lane) const { device->give_back(lane); }
  };
  using LanePointer = std::unique_ptr<Lane, GiveBack>;
  Status take_lane(LanePointer* lane);

 private:
  Device(int index, const runtime::Properties& properties);
  void give_back(Lane* lane);

  const int index_;
  const runtime::Properties properties_;
  std::atomic<runtime::Error> fault_{runtime::kSuccess};  // what lost the device
  std::atomic<bool> hopper_{false};                       // Settings::hopper, where it applies
  MemoryCache memory_;
  std::mutex mutex_;
  std::vector<Lane*> free_lanes_;
};

}  // namespace sdpa::cuda

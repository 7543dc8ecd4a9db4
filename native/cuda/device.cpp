// The GPUs of this machine.
#include "cuda/device.h"

#include <cstdio>

namespace sdpa::cuda {

using runtime::Error;
using runtime::kSuccess;

namespace {

/// The oldest compute capability that there are kernels for: Turing.
constexpr int kOldestCapability = 75;
constexpr int kHopper = 90;

struct Devices {
  Status status;
  std::vector<Device*> list;
};

Status unavailable(const char* reason) { return {StatusCode::unavailable, reason}; }

Status find_driver() {
  int driver = 0, needed = 0;
  if (const Error error = runtime::versions(&driver, &needed); error != kSuccess) {
    return unavailable(runtime::describe(error));
  }
  if (driver == 0) return unavailable("no NVIDIA driver is installed (libcuda.so.1)");
  // Within a major version an older driver runs what a newer toolkit built.
  if (driver / 1000 >= needed / 1000) return {};
  static char reason[128];
  std::snprintf(reason, sizeof reason,
                "the NVIDIA driver is for CUDA %d.%d, and a driver for CUDA %d or later is needed",
                driver / 1000, driver % 1000 / 10, needed / 1000);
  return unavailable(reason);
}

}  // namespace

static Devices& devices() {
  static Devices* const all = new Devices;
  return *all;
}

Status Device::open_all(int* count) {
  static const bool once = [] {
    Devices& all = devices();
    all.status = find_driver();
    if (!all.status.ok()) return true;
    int found = 0;
    const Error error = runtime::device_count(&found);
    if (error == runtime::kNoDevice || (error == kSuccess && found == 0)) {
      all.status = unavailable("the NVIDIA driver finds no GPU (is CUDA_VISIBLE_DEVICES set?)");
    } else if (error != kSuccess) {
      all.status = unavailable(runtime::describe(error));
    }
    for (int index = 0; index < found && all.status.ok(); ++index) {
      runtime::Properties properties{};
      const Error error = runtime::properties(index, &properties);
      if (error != kSuccess) all.status = unavailable(runtime::describe(error));
      all.list.push_back(new Device(index, properties));
    }
    return true;
  }();
  (void)once;
  *count = devices().status.ok() ? int(devices().list.size()) : 0;
  return devices().status;
}

Device* Device::find(int index) {
  const std::vector<Device*>& list = devices().list;
  return index >= 0 && size_t(index) < list.size() ? list[size_t(index)] : nullptr;
}

void Device::configure(const Settings& settings) {
  for (Device* const device : devices().list) {
    const size_t limit = settings.memory_limit;
    device->memory_.set_limit(limit != 0 ? limit : device->properties_.memory_bytes);
    device->hopper_ = settings.hopper && device->properties_.compute_capability == kHopper;
  }
}

Device::Device(int index, const runtime::Properties& properties)
    : index_(index), properties_(properties) {
  memory_.set_limit(properties.memory_bytes);
}

DeviceLimits Device::limits() const {
  return {properties_.compute_capability, properties_.sm_count, properties_.shared_bytes_per_block,
          properties_.l2_bytes, hopper_};
}

Status Device::enter() {
  if (const Error fault = fault_.load(); fault != kSuccess) {
    return {StatusCode::device_lost, runtime::describe(fault)};
  }
  if (properties_.compute_capability < kOldestCapability) {
    return unavailable("its compute capability is below 7.5 (Turing)");
  }
  return check(runtime::set_device(index_));
}

Status Device::check(Error error) {
  if (error == kSuccess) return {};
  runtime::forget_last_error();
  if (error == runtime::kOutOfMemory) {
    return {StatusCode::out_of_memory,
            "no memory on the GPU for what the call needs; dispose of tensors, or raise "
            "SDPA_CUDA_MEMORY_LIMIT where it is set"};
  }
  // After a fault of a kernel or of the device, everything fails from then on.
  if (const Error fault = runtime::wait_for_device(); fault != kSuccess) {
    fault_.store(fault);
    return {StatusCode::device_lost, runtime::describe(fault)};
  }
  return {StatusCode::internal, runtime::describe(error)};
}

Status Device::take_lane(LanePointer* lane) {
  *lane = LanePointer(nullptr, GiveBack{this});
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (!free_lanes_.empty()) {
      lane->reset(free_lanes_.back());
      free_lanes_.pop_back();
      return {};
    }
  }
  auto created = std::make_unique<Lane>();
  const Status status = check(created->open());
  if (status.ok()) lane->reset(created.release());
  return status;
}

void Device::give_back(Lane* lane) {
  const std::lock_guard<std::mutex> lock(mutex_);
  free_lanes_.push_back(lane);
}

}  // namespace sdpa::cuda

// Plays the CUDA runtime in host memory, for tests on machines without a GPU: devices with memory
// of their own, immediate streams, checks of every pointer, and faults on demand. Never shipped.
//
// Environment, read at every call so that a test can change it:
//   SDPA_EMULATED_DEVICES  how many there are (default 1)
//   SDPA_EMULATED_DRIVER   the driver's CUDA version as 12080, 0 for none (default: a new one)
//   SDPA_EMULATED_SM       compute capability (default 90)
//   SDPA_EMULATED_MEMORY   bytes of each device (default 2^30)
//   SDPA_EMULATED_FAULT    "7:700": the 7th call from now gives the error 700. From 700 to 799 the
//                          device stays that way, as it does after a kernel's fault.
//   SDPA_EMULATED_DELAY    milliseconds that waiting for the device takes (default 0)
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <thread>

#include "cuda/runtime.h"

namespace sdpa::cuda::runtime {
namespace {

constexpr Error kInvalidValue = 1;
constexpr Error kIllegalAddress = 700;
constexpr Error kFirstLasting = 700, kLastLasting = 799;
constexpr int kHost = -1;

struct Block {
  size_t bytes;
  int device;  // or kHost: pinned
};

struct Machine {
  std::mutex mutex;
  std::map<const char*, Block> blocks;  // by where they begin
  std::map<int, size_t> used_bytes;     // by device
  std::map<int, Error> lasting;         // by device
  std::string fault;
  long calls_until_fault = 0;
};

Machine& machine() {
  static Machine* const only = new Machine;
  return *only;
}

thread_local int current_device = 0;

long setting(const char* name, long otherwise) {
  const char* const text = std::getenv(name);
  return text && *text ? std::atol(text) : otherwise;
}

/// What the next call has to fail with. Called first by all of them, with the machine locked.
Error next_fault(Machine& m) {
  const char* const text = std::getenv("SDPA_EMULATED_FAULT");
  const std::string fault = text ? text : "";
  if (fault != m.fault) {
    m.fault = fault;
    m.calls_until_fault = std::atol(fault.c_str());
  }
  const auto lasting = m.lasting.find(current_device);
  if (lasting != m.lasting.end()) return lasting->second;
  const size_t colon = fault.find(':');
  if (colon == std::string::npos || --m.calls_until_fault != 0) return kSuccess;
  const Error error = std::atoi(fault.c_str() + colon + 1);
  if (error >= kFirstLasting && error <= kLastLasting) m.lasting[current_device] = error;
  return error;
}

/// Whether `bytes` at `memory` lie in one block of this place.
bool is_within(const Machine& m, const void* memory, size_t bytes, int device) {
  const char* const begin = static_cast<const char*>(memory);
  auto found = m.blocks.upper_bound(begin);
  if (found == m.blocks.begin()) return false;
  --found;
  const auto& [start, block] = *found;
  return block.device == device && size_t(begin - start) <= block.bytes &&
         bytes <= block.bytes - size_t(begin - start);
}

Error add_block(void** memory, size_t bytes, int device) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  if (const Error fault = next_fault(m); fault != kSuccess) return fault;
  const size_t capacity = size_t(setting("SDPA_EMULATED_MEMORY", 1L << 30));
  if (device != kHost && m.used_bytes[device] + bytes > capacity) return kOutOfMemory;
  void* const block = std::aligned_alloc(512, (bytes + 511) / 512 * 512);
  if (!block) return kOutOfMemory;
  std::memset(block, 0xff, bytes);  // NaN in every type
  m.blocks[static_cast<const char*>(block)] = {bytes, device};
  m.used_bytes[device] += bytes;
  *memory = block;
  return kSuccess;
}

Error remove_block(void* memory, bool is_pinned) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  if (const Error fault = next_fault(m); fault != kSuccess) return fault;
  const auto found = m.blocks.find(static_cast<const char*>(memory));
  if (found == m.blocks.end() || (found->second.device == kHost) != is_pinned) return kInvalidValue;
  m.used_bytes[found->second.device] -= found->second.bytes;
  m.blocks.erase(found);
  std::free(memory);
  return kSuccess;
}

Error plain_call() {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  return next_fault(m);
}

Error create(void** handle) {
  const Error fault = plain_call();
  if (fault == kSuccess) *handle = new char;
  return fault;
}

Error destroy(void* handle) {
  const Error fault = plain_call();
  if (fault == kSuccess) delete static_cast<char*>(handle);
  return fault;
}

Error delayed_call() {
  const Error fault = plain_call();
  const long delay_ms = setting("SDPA_EMULATED_DELAY", 0);
  if (fault == kSuccess && delay_ms > 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(delay_ms));
  }
  return fault;
}

Error copy(void* to, int to_device, const void* from, int from_device, size_t bytes) {
  Machine& m = machine();
  {
    const std::lock_guard<std::mutex> lock(m.mutex);
    if (const Error fault = next_fault(m); fault != kSuccess) return fault;
    if (!is_within(m, to, bytes, to_device) || !is_within(m, from, bytes, from_device)) {
      return m.lasting[current_device] = kIllegalAddress;
    }
  }
  std::memmove(to, from, bytes);
  return kSuccess;
}

}  // namespace

Error versions(int* driver, int* runtime) {
  *runtime = 13000;
  *driver = int(setting("SDPA_EMULATED_DRIVER", *runtime));
  return plain_call();
}

Error device_count(int* count) {
  *count = int(setting("SDPA_EMULATED_DEVICES", 1));
  return *count > 0 ? plain_call() : kNoDevice;
}

Error properties(int device, Properties* properties) {
  std::snprintf(properties->name, sizeof properties->name, "emulated GPU %d", device);
  properties->compute_capability = int(setting("SDPA_EMULATED_SM", 90));
  properties->sm_count = 4;
  properties->shared_bytes_per_block = 227 * 1024;
  properties->l2_bytes = size_t{1} << 20;
  properties->memory_bytes = size_t(setting("SDPA_EMULATED_MEMORY", 1L << 30));
  return plain_call();
}

Error set_device(int device) {
  current_device = device;
  return plain_call();
}

Error allocate(void** memory, size_t bytes) { return add_block(memory, bytes, current_device); }
Error release(void* memory) { return remove_block(memory, false); }
Error allocate_pinned(void** memory, size_t bytes) { return add_block(memory, bytes, kHost); }
Error release_pinned(void* memory) { return remove_block(memory, true); }

Error create_stream(Stream* stream) { return create(stream); }
Error destroy_stream(Stream stream) { return destroy(stream); }
Error create_event(Event* event) { return create(event); }
Error destroy_event(Event event) { return destroy(event); }
Error record(Event, Stream) { return plain_call(); }
Error query(Event) { return setting("SDPA_EMULATED_DELAY", 0) > 0 ? kNotReady : plain_call(); }
Error wait(Event) { return delayed_call(); }
Error wait_for_device() { return plain_call(); }

Error copy_to_device(void* to, const void* from, size_t bytes, Stream) {
  return copy(to, current_device, from, kHost, bytes);
}

Error copy_to_host(void* to, const void* from, size_t bytes, Stream) {
  return copy(to, kHost, from, current_device, bytes);
}

Error copy_on_device(void* to, const void* from, size_t bytes, Stream) {
  return copy(to, current_device, from, current_device, bytes);
}

Error copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t bytes,
                size_t rows, Stream) {
  Error error = kSuccess;
  for (size_t row = 0; row < rows && error == kSuccess; ++row) {
    error = copy(static_cast<char*>(to) + row * to_pitch, current_device,
                 static_cast<const char*>(from) + row * from_pitch, current_device, bytes);
  }
  return error;
}

Error copy_between_devices(void* to, int to_device, const void* from, int from_device, size_t bytes,
                           Stream) {
  return copy(to, to_device, from, from_device, bytes);
}

Error clear(void* memory, size_t bytes, Stream) {
  Machine& m = machine();
  const std::lock_guard<std::mutex> lock(m.mutex);
  if (const Error fault = next_fault(m); fault != kSuccess) return fault;
  if (!is_within(m, memory, bytes, current_device)) return kInvalidValue;
  std::memset(memory, 0, bytes);
  return kSuccess;
}

void forget_last_error() {}

const char* describe(Error error) {
  switch (error) {
    case kIllegalAddress:
      return "an illegal memory access was encountered";
    case kOutOfMemory:
      return "out of memory";
    case kInvalidValue:
      return "invalid argument";
    default:
      return "an emulated error";
  }
}

}  // namespace sdpa::cuda::runtime

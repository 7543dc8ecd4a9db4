// Where host code reaches the CUDA runtime, and nowhere else: runtime.cpp passes everything on, and
// the stand-in of the emulated plugin plays a GPU in host memory.
#pragma once

#include <cstddef>

namespace sdpa::cuda::runtime {

using Stream = void*;  // a cudaStream_t
using Event = void*;   // a cudaEvent_t

/// A cudaError_t.
using Error = int;
constexpr Error kSuccess = 0;
constexpr Error kOutOfMemory = 2;
constexpr Error kDriverTooOld = 35;
constexpr Error kNoDevice = 100;
constexpr Error kNotReady = 600;

struct Properties {
  char name[256];
  int compute_capability;  // 90 is 9.0
  int sm_count;
  size_t shared_bytes_per_block;  // at most, by opting in
  size_t l2_bytes;
  size_t memory_bytes;
};

/// As 12080 for CUDA 12.8: what the installed driver can do (0: there is none), and what this
/// library was built with.
Error versions(int* driver, int* runtime);
Error device_count(int* count);
Error properties(int device, Properties* properties);

/// For the functions below, on the calling thread.
Error set_device(int device);

Error allocate(void** memory, size_t bytes);
Error release(void* memory);
Error allocate_pinned(void** memory, size_t bytes);
Error release_pinned(void* memory);

Error create_stream(Stream* stream);
Error destroy_stream(Stream stream);
Error create_event(Event* event);
Error destroy_event(Event event);
Error record(Event event, Stream stream);
Error query(Event event);
/// Sleeps until the event has happened.
Error wait(Event event);
Error wait_for_device();

/// Asynchronous; host memory has to be pinned.
Error copy_to_device(void* to, const void* from, size_t bytes, Stream stream);
Error copy_to_host(void* to, const void* from, size_t bytes, Stream stream);
Error copy_on_device(void* to, const void* from, size_t bytes, Stream stream);
/// `rows` rows of `bytes` each, at their own distances.
Error copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t bytes,
                size_t rows, Stream stream);
Error copy_between_devices(void* to, int to_device, const void* from, int from_device, size_t bytes,
                           Stream stream);
Error clear(void* memory, size_t bytes, Stream stream);

/// Forgets the last error of the thread, which a later launch would else report as its own.
void forget_last_error();
/// A literal.
const char* describe(Error error);

}  // namespace sdpa::cuda::runtime

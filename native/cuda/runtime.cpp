// The CUDA runtime behind runtime.h.
#include "cuda/runtime.h"

#include <cuda_runtime_api.h>

#include <cstdio>
#include <cstring>
#include <initializer_list>

namespace sdpa::cuda::runtime {
namespace {

static_assert(kSuccess == cudaSuccess && kOutOfMemory == cudaErrorMemoryAllocation &&
                  kDriverTooOld == cudaErrorInsufficientDriver && kNoDevice == cudaErrorNoDevice &&
                  kNotReady == cudaErrorNotReady,
              "the numbers of runtime.h are CUDA's");

cudaStream_t of(Stream stream) { return static_cast<cudaStream_t>(stream); }
cudaEvent_t of_event(Event event) { return static_cast<cudaEvent_t>(event); }

}  // namespace

Error versions(int* driver, int* runtime) {
  const Error error = cudaDriverGetVersion(driver);
  return error == kSuccess ? cudaRuntimeGetVersion(runtime) : error;
}

Error device_count(int* count) { return cudaGetDeviceCount(count); }

Error properties(int device, Properties* properties) {
  const auto read = [device](cudaDeviceAttr attribute, int& value) {
    return cudaDeviceGetAttribute(&value, attribute, device);
  };
  int major = 0, minor = 0, sms = 0, shared = 0, l2 = 0;
  cudaDeviceProp all;  // the only source of the name and the size of the memory
  for (const Error error :
       {read(cudaDevAttrComputeCapabilityMajor, major),
        read(cudaDevAttrComputeCapabilityMinor, minor), read(cudaDevAttrMultiProcessorCount, sms),
        read(cudaDevAttrMaxSharedMemoryPerBlockOptin, shared), read(cudaDevAttrL2CacheSize, l2),
        cudaGetDeviceProperties(&all, device)}) {
    if (error != kSuccess) return error;
  }
  std::snprintf(properties->name, sizeof properties->name, "%s", all.name);
  properties->compute_capability = 10 * major + minor;
  properties->sm_count = sms;
  properties->shared_bytes_per_block = size_t(shared);
  properties->l2_bytes = size_t(l2);
  properties->memory_bytes = all.totalGlobalMem;
  return kSuccess;
}

Error set_device(int device) { return cudaSetDevice(device); }

Error allocate(void** memory, size_t bytes) { return cudaMalloc(memory, bytes); }
Error release(void* memory) { return cudaFree(memory); }
Error allocate_pinned(void** memory, size_t bytes) {
  return cudaHostAlloc(memory, bytes, cudaHostAllocDefault);
}
Error release_pinned(void* memory) { return cudaFreeHost(memory); }

Error create_stream(Stream* stream) {
  cudaStream_t created = nullptr;
  const Error error = cudaStreamCreateWithFlags(&created, cudaStreamNonBlocking);
  *stream = created;
  return error;
}

Error destroy_stream(Stream stream) { return cudaStreamDestroy(of(stream)); }

Error create_event(Event* event) {
  cudaEvent_t created = nullptr;
  const Error error =
      cudaEventCreateWithFlags(&created, cudaEventBlockingSync | cudaEventDisableTiming);
  *event = created;
  return error;
}

Error destroy_event(Event event) { return cudaEventDestroy(of_event(event)); }
Error record(Event event, Stream stream) { return cudaEventRecord(of_event(event), of(stream)); }
Error query(Event event) { return cudaEventQuery(of_event(event)); }
Error wait(Event event) { return cudaEventSynchronize(of_event(event)); }
Error wait_for_device() { return cudaDeviceSynchronize(); }

Error copy_to_device(void* to, const void* from, size_t bytes, Stream stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyHostToDevice, of(stream));
}

Error copy_to_host(void* to, const void* from, size_t bytes, Stream stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToHost, of(stream));
}

Error copy_on_device(void* to, const void* from, size_t bytes, Stream stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDeviceToDevice, of(stream));
}

Error copy_rows(void* to, size_t to_pitch, const void* from, size_t from_pitch, size_t bytes,
                size_t rows, Stream stream) {
  return cudaMemcpy2DAsync(to, to_pitch, from, from_pitch, bytes, rows, cudaMemcpyDeviceToDevice,
                           of(stream));
}

Error copy_between_devices(void* to, int to_device, const void* from, int from_device, size_t bytes,
                           Stream stream) {
  return cudaMemcpyPeerAsync(to, to_device, from, from_device, bytes, of(stream));
}

Error clear(void* memory, size_t bytes, Stream stream) {
  return cudaMemsetAsync(memory, 0, bytes, of(stream));
}

void forget_last_error() { cudaGetLastError(); }
const char* describe(Error error) { return cudaGetErrorString(cudaError_t(error)); }

}  // namespace sdpa::cuda::runtime

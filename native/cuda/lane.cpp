// A stream with pinned memory beside it.
#include "cuda/lane.h"

#include <algorithm>
#include <chrono>
#include <cstring>

namespace sdpa::cuda {

using runtime::Error;
using runtime::kSuccess;

#define SDPA_TRY(call) \
  if (const Error error = (call); error != kSuccess) return error

Error Lane::open() {
  SDPA_TRY(runtime::create_stream(&stream_));
  SDPA_TRY(runtime::create_event(&done_));
  for (Buffer& buffer : buffers_) {
    void* memory = nullptr;
    SDPA_TRY(runtime::allocate_pinned(&memory, kBufferBytes));
    buffer.memory = static_cast<char*>(memory);
    SDPA_TRY(runtime::create_event(&buffer.copied));
  }
  return kSuccess;
}

/// Only of a lane that could not be opened: those that could are used until the process ends.
Lane::~Lane() {
  for (const Buffer& buffer : buffers_) {
    if (buffer.memory) runtime::release_pinned(buffer.memory);
    if (buffer.copied) runtime::destroy_event(buffer.copied);
  }
  if (done_) runtime::destroy_event(done_);
  if (stream_) runtime::destroy_stream(stream_);
}

/// Makes the other buffer the current one, once the device is done with it.
Error Lane::turn() {
  SDPA_TRY(runtime::record(buffers_[current_].copied, stream_));
  current_ ^= 1;
  filled_ = 0;
  return runtime::wait(buffers_[current_].copied);
}

Error Lane::upload(void* to, const void* from, size_t bytes, const CancelToken& cancel) {
  for (size_t done = 0; done < bytes && !cancel.cancelled();) {
    if (filled_ == kBufferBytes) SDPA_TRY(turn());
    const size_t part = std::min(bytes - done, kBufferBytes - filled_);
    char* const pinned = buffers_[current_].memory + filled_;
    std::memcpy(pinned, static_cast<const char*>(from) + done, part);
    SDPA_TRY(runtime::copy_to_device(static_cast<char*>(to) + done, pinned, part, stream_));
    filled_ += part;
    done += part;
  }
  return kSuccess;
}

Error Lane::download(void* to, const void* from, size_t bytes, const CancelToken& cancel) {
  const Buffer* waiting = nullptr;  // a buffer that the device fills, and where it belongs
  char* waiting_to = nullptr;
  size_t waiting_bytes = 0;
  const auto empty = [&]() -> Error {
    if (!waiting) return kSuccess;
    SDPA_TRY(runtime::wait(waiting->copied));
    std::memcpy(waiting_to, waiting->memory, waiting_bytes);
    return kSuccess;
  };
  for (size_t done = 0; done < bytes && !cancel.cancelled(); done += kBufferBytes) {
    SDPA_TRY(turn());
    const size_t part = std::min(bytes - done, kBufferBytes);
    const Buffer& buffer = buffers_[current_];
    filled_ = kBufferBytes;
    SDPA_TRY(
        runtime::copy_to_host(buffer.memory, static_cast<const char*>(from) + done, part, stream_));
    SDPA_TRY(runtime::record(buffer.copied, stream_));
    SDPA_TRY(empty());
    waiting = &buffer;
    waiting_to = static_cast<char*>(to) + done;
    waiting_bytes = part;
  }
  return empty();
}

Error Lane::wait() {
  using Clock = std::chrono::steady_clock;
  SDPA_TRY(runtime::record(done_, stream_));
  // Many calls take less time than a thread needs to fall asleep and wake up again.
  const auto end = Clock::now() + std::chrono::microseconds(50);
  Error error;
  do {
    error = runtime::query(done_);
  } while (error == runtime::kNotReady && Clock::now() < end);
  if (error == runtime::kNotReady) error = runtime::wait(done_);
  if (error == kSuccess) filled_ = 0;
  return error;
}

#undef SDPA_TRY

}  // namespace sdpa::cuda

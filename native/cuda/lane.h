// A stream with pinned memory beside it, which one call at a time has to itself.
#pragma once

#include "core/backend.h"
#include "cuda/runtime.h"

namespace sdpa::cuda {

/// Host arrays go through two pinned buffers in turn: while the device copies one, the thread fills
/// or empties the other. The functions are for one thread at a time; its device is the lane's.
class Lane {
 public:
  Lane() = default;
  Lane(const Lane&) = delete;
  ~Lane();
  /// Creates what the lane consists of; to be called once, first.
  runtime::Error open();

  runtime::Stream stream() const { return stream_; }

  /// Returns when all of `from` is read; the device may still be copying. Stops where cancelled.
  runtime::Error upload(void* to, const void* from, size_t bytes, const CancelToken& cancel);
  /// Returns when all of `to` is written.
  runtime::Error download(void* to, const void* from, size_t bytes, const CancelToken& cancel);
  /// Returns when the device has done all that it was given.
  runtime::Error wait();

 private:
  static constexpr size_t kBufferBytes = size_t{4} << 20;

  struct Buffer {
    char* memory = nullptr;
    runtime::Event copied = nullptr;
  };

  runtime::Error turn();

  runtime::Stream stream_ = nullptr;
  runtime::Event done_ = nullptr;
  Buffer buffers_[2];
  int current_ = 0;
  size_t filled_ = 0;  // bytes of the current buffer that the device may still read
};

}  // namespace sdpa::cuda

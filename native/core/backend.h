// What a backend is: a name, an answer to "can you run here?", and the two passes.
#pragma once

#include <atomic>

#include "core/problem.h"

namespace sdpa {

enum class StatusCode {
  ok,
  aborted,
  out_of_memory,
  queue_full,
  unavailable,
  unsupported,
  device_lost,
  internal
};

/// The result of a call. Messages are literals: a Status never allocates.
struct Status {
  StatusCode code = StatusCode::ok;
  const char* message = "";

  bool ok() const { return code == StatusCode::ok; }
};

/// Lets the caller stop a running call; kernels look at it between tasks.
class CancelToken {
 public:
  /// `external`, if given, is a flag that JavaScript sets to a value other than 0.
  explicit CancelToken(const std::atomic<int32_t>* external = nullptr) : external_(external) {}
  void cancel() { cancelled_.store(true, std::memory_order_relaxed); }
  bool cancelled() const {
    return cancelled_.load(std::memory_order_relaxed) ||
           (external_ && external_->load(std::memory_order_relaxed) != 0);
  }

 private:
  std::atomic<bool> cancelled_{false};
  const std::atomic<int32_t>* external_;
};

/// Invariant: forward and backward may be called from any thread, also at the same time, and
/// give the same bits for any number of threads.
struct Backend {
  const char* name;
  /// Why the backend cannot run on this machine, or null if it can.
  const char* (*unavailable_reason)();
  Status (*forward)(const Problem&, const Inputs&, const ForwardOutputs&, const CancelToken&);
  Status (*backward)(const Problem&, const Inputs&, const BackwardTensors&, const CancelToken&);
};

}  // namespace sdpa

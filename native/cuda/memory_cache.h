// Device memory that is kept for the next call: asking the driver for it stops the whole GPU.
#pragma once

#include <map>
#include <mutex>
#include <vector>

#include "cuda/plugin.h"
#include "cuda/runtime.h"

namespace sdpa::cuda {

/// The memory of one device. Sizes are rounded up by at most an eighth, so that blocks fit again.
///
/// Invariant: what is released is no longer used by the device, since calls wait for their end.
class MemoryCache {
 public:
  /// The device has to be the thread's. Gives back what is cached before it fails.
  runtime::Error allocate(size_t bytes, void** memory);
  void release(void* memory, size_t bytes);
  void set_limit(size_t bytes);
  MemoryUse use();

 private:
  static size_t rounded(size_t bytes);
  void give_back_all();

  std::mutex mutex_;
  std::map<size_t, std::vector<void*>> cached_;  // by rounded size
  size_t used_bytes_ = 0, cached_bytes_ = 0, limit_bytes_ = 0;
};

}  // namespace sdpa::cuda

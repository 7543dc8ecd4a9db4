// Device memory that is kept for the next call.
#include "cuda/memory_cache.h"

namespace sdpa::cuda {

namespace {

constexpr size_t kSmallestBytes = 512;

}  // namespace

size_t MemoryCache::rounded(size_t bytes) {
  size_t step = kSmallestBytes;
  while (16 * step < bytes) step *= 2;
  return bytes == 0 ? step : (bytes + step - 1) / step * step;
}

runtime::Error MemoryCache::allocate(size_t bytes, void** memory) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t size = rounded(bytes);
  std::vector<void*>& fitting = cached_[size];
  if (!fitting.empty()) {
    *memory = fitting.back();
    fitting.pop_back();
    cached_bytes_ -= size;
    used_bytes_ += size;
    return runtime::kSuccess;
  }
  if (used_bytes_ + cached_bytes_ + size > limit_bytes_) give_back_all();
  if (used_bytes_ + size > limit_bytes_) return runtime::kOutOfMemory;
  runtime::Error error = runtime::allocate(memory, size);
  if (error == runtime::kOutOfMemory && cached_bytes_ > 0) {
    runtime::forget_last_error();
    give_back_all();
    error = runtime::allocate(memory, size);
  }
  if (error == runtime::kSuccess) used_bytes_ += size;
  return error;
}

void MemoryCache::release(void* memory, size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  const size_t size = rounded(bytes);
  cached_[size].push_back(memory);
  used_bytes_ -= size;
  cached_bytes_ += size;
}

/// A device that fails here is lost, which the next call on it will find out.
void MemoryCache::give_back_all() {
  for (auto& [size, blocks] : cached_) {
    for (void* const memory : blocks) runtime::release(memory);
    blocks.clear();
  }
  cached_bytes_ = 0;
}

void MemoryCache::set_limit(size_t bytes) {
  const std::lock_guard<std::mutex> lock(mutex_);
  limit_bytes_ = bytes;
}

MemoryUse MemoryCache::use() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return {used_bytes_, cached_bytes_, limit_bytes_};
}

}  // namespace sdpa::cuda

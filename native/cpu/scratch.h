// Working memory of one thread: one aligned block, handed out piece by piece.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/budget.h"

namespace sdpa {

class Scratch {
 public:
  /// Reserves room for `floats` floats in at most `pieces` pieces; false if memory is short.
  bool reserve(size_t floats, size_t pieces) {
    const size_t room = floats + (pieces + 1) * kAlignment;
    if (!memory_.allocate(room)) return false;
    next_ = memory_.get();
    end_ = next_ + room;
    return true;
  }

  /// The next piece, aligned to 64 bytes. Its content is not initialised.
  float* take(size_t floats) {
    const uintptr_t address = reinterpret_cast<uintptr_t>(next_);
    float* const piece = reinterpret_cast<float*>((address + 63) & ~uintptr_t{63});
    next_ = piece + floats;
    return piece;
  }

  bool overrun() const { return next_ > end_; }

 private:
  static constexpr size_t kAlignment = 16;  // floats in 64 bytes

  Block<float> memory_;
  float* next_ = nullptr;
  float* end_ = nullptr;
};

}  // namespace sdpa

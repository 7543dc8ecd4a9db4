// Everything that a kernel asks of its thread, warp and block, each instruction behind one small
// function: the one place that differs between a GPU and the emulation.
//
// Fragments are those of mma.sync.m16n8k16 (PTX ISA, "Matrix Fragments for mma.m16n8k16"). Of lane
// l, with g = l / 4 and t = l % 4:
//   a[0] = A(g, 2t..2t+1)   a[1] = A(g+8, 2t..)   a[2] = A(g, 2t+8..)   a[3] = A(g+8, 2t+8..)
//   b[0] = B(2t..2t+1, g)   b[1] = B(2t+8..2t+9, g)
//   c[0], c[1] = C(g, 2t), C(g, 2t+1)             c[2], c[3] = C(g+8, 2t), C(g+8, 2t+1)
// Two 16-bit elements share a register, the one of the lower index in the lower half.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/host_device.h"

namespace sdpa::cuda {

constexpr uint32_t kLanes = 32;

/// The format of products.
enum class Half { float16, bfloat16 };

struct alignas(16) Vector16 {
  uint32_t w[4];
};

struct Index3 {
  uint32_t x, y, z;
};

}  // namespace sdpa::cuda

#if defined(__CUDACC__)
#include "cuda/warp_gpu.cuh"
#else
#include "cuda/emulation/warp.h"
#endif

namespace sdpa::cuda {

SDPA_DEVICE uint32_t lane_index() { return thread_index() % kLanes; }
SDPA_DEVICE uint32_t warp_index() { return thread_index() / kLanes; }

/// The sum and the maximum over the four lanes that share a fragment's row. NaN is not a maximum.
SDPA_DEVICE float quad_sum(float x) {
  x += shuffle_xor(x, 1);
  return x + shuffle_xor(x, 2);
}
SDPA_DEVICE float quad_max(float x) {
  x = fmaxf(x, shuffle_xor(x, 1));
  return fmaxf(x, shuffle_xor(x, 2));
}

/// Whether any lane of the warp comes with true.
SDPA_DEVICE bool warp_any(bool x) {
  float any = x ? 1.0f : 0.0f;
  for (uint32_t mask = 1; mask < kLanes; mask *= 2) any = fmaxf(any, shuffle_xor(any, mask));
  return any > 0;
}

}  // namespace sdpa::cuda

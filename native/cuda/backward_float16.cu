// The backward kernels for float16.
#include "cuda/launch.cuh"

namespace sdpa::cuda {

int start_backward_float16(const BackwardCall& g, uint32_t width, const DeviceLimits& limits,
                           Stream stream) {
  if (width <= 64) return start_backward<BackwardShape<Half::float16, 1, 1, 64>>(g, limits, stream);
  return start_backward<BackwardShape<Half::float16, 1, 1, 128>>(g, limits, stream);
}

}  // namespace sdpa::cuda

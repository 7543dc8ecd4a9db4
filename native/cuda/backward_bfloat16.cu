// The backward kernels for bfloat16.
#include "cuda/launch.cuh"

namespace sdpa::cuda {
namespace {

template <int kWeightTerms>
int start_width(const BackwardCall& g, uint32_t width, const DeviceLimits& limits, Stream stream) {
  constexpr Half kHalf = Half::bfloat16;
  if (width <= 64) {
    return start_backward<BackwardShape<kHalf, 1, kWeightTerms, 64>>(g, limits, stream);
  }
  return start_backward<BackwardShape<kHalf, 1, kWeightTerms, 128>>(g, limits, stream);
}

}  // namespace

int start_backward_bfloat16(const BackwardCall& g, uint32_t width, bool exact,
                            const DeviceLimits& limits, Stream stream) {
  return exact ? start_width<3>(g, width, limits, stream)
               : start_width<1>(g, width, limits, stream);
}

}  // namespace sdpa::cuda

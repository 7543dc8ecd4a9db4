// The forward kernels for bfloat16.
#include "cuda/launch.cuh"

namespace sdpa::cuda {
namespace {

template <int kWeightTerms>
int start_width(const ForwardCall& f, uint32_t width, const DeviceLimits& limits, Stream stream) {
  constexpr Half kHalf = Half::bfloat16;
  if (width <= 64)
    return start_forward<ForwardShape<kHalf, 1, kWeightTerms, 64>>(f, limits, stream);
  if (width <= 128) {
    return start_forward<ForwardShape<kHalf, 1, kWeightTerms, 128>>(f, limits, stream);
  }
  return start_forward<ForwardShape<kHalf, 1, kWeightTerms, 256>>(f, limits, stream);
}

}  // namespace

int start_forward_bfloat16(const ForwardCall& f, uint32_t width, bool exact,
                           const DeviceLimits& limits, Stream stream) {
  return exact ? start_width<3>(f, width, limits, stream)
               : start_width<1>(f, width, limits, stream);
}

}  // namespace sdpa::cuda

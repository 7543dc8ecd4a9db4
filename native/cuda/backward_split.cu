// The backward kernels that split their operands into bfloat16 terms.
#include "cuda/launch.cuh"

namespace sdpa::cuda {
namespace {

template <int kTerms>
int start_width(const BackwardCall& g, uint32_t width, const DeviceLimits& limits, Stream stream) {
  constexpr Half kHalf = Half::bfloat16;
  if (width <= 64)
    return start_backward<BackwardShape<kHalf, kTerms, kTerms, 64>>(g, limits, stream);
  if (width <= 128) {
    return start_backward<BackwardShape<kHalf, kTerms, kTerms, 128>>(g, limits, stream);
  }
  return start_backward<BackwardShape<kHalf, kTerms, kTerms, 256>>(g, limits, stream);
}

}  // namespace

int start_backward_split(const BackwardCall& g, uint32_t width, int terms,
                         const DeviceLimits& limits, Stream stream) {
  return terms == 2 ? start_width<2>(g, width, limits, stream)
                    : start_width<3>(g, width, limits, stream);
}

}  // namespace sdpa::cuda

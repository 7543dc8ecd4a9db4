// The forward kernels that split their operands into bfloat16 terms: for float32, and for what
// mixes types or is wider than the others take.
#include "cuda/launch.cuh"

namespace sdpa::cuda {
namespace {

template <int kTerms>
int start_width(const ForwardCall& f, uint32_t width, const DeviceLimits& limits, Stream stream) {
  constexpr Half kHalf = Half::bfloat16;
  if (width <= 64) return start_forward<ForwardShape<kHalf, kTerms, kTerms, 64>>(f, limits, stream);
  if (width <= 128) {
    return start_forward<ForwardShape<kHalf, kTerms, kTerms, 128>>(f, limits, stream);
  }
  return start_forward<ForwardShape<kHalf, kTerms, kTerms, 512>>(f, limits, stream);
}

}  // namespace

int start_forward_split(const ForwardCall& f, uint32_t width, int terms, const DeviceLimits& limits,
                        Stream stream) {
  if (terms == 1) return start_width<1>(f, width, limits, stream);
  if (terms == 2) return start_width<2>(f, width, limits, stream);
  return start_width<3>(f, width, limits, stream);
}

}  // namespace sdpa::cuda

// The CPU backend for x86-64 with AVX2, FMA and F16C (Haswell, Zen and later).
//
// Invariant: only code between the two target pragmas may use these instructions, so that the
// binary runs on any x86-64. No lambdas and no standard headers in there: compilers do not give
// (or wrongly give) them the target.
#include "cpu/cpu_backends.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <immintrin.h>

#include "cpu/cpu_features.h"
#include "cpu/kernel_headers.h"

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma,f16c"))), apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
#pragma GCC target("avx2,fma,f16c")
#endif

namespace sdpa::avx2 {
// In the order of use: each builds on the one before.
#include "cpu/vec_avx2.h"

// 4 x 3 accumulators, 3 operands and 1 broadcast: 16 registers.
constexpr int kTileRows = 4;
constexpr int kQueryVectors = 3;

#include "cpu/tile.inl"

#include "cpu/attention_decode.inl"

#include "cpu/attention_forward.inl"

#include "cpu/attention_samples.inl"

#include "cpu/attention_backward.inl"
}  // namespace sdpa::avx2

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

namespace sdpa {
namespace avx2 {
const char* unavailable_reason() {
  return cpu_has_avx2() ? nullptr : "this processor has no AVX2, FMA and F16C";
}
}  // namespace avx2

const Backend kAvx2Backend = {"cpu:avx2", avx2::unavailable_reason, avx2::forward, avx2::backward};
}  // namespace sdpa

#endif

// The CPU backend for x86-64 with AVX-512 (Skylake server, Ice Lake, Zen 4 and later).
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
#pragma clang attribute push(                                                    \
    __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c"))), \
    apply_to = function)
#elif defined(__GNUC__)
#pragma GCC push_options
// GCC 12 takes its own intrinsics' "undefined" operands for mistakes of ours (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")
#endif

namespace sdpa::avx512 {
// In the order of use: each builds on the one before.
#include "cpu/vec_avx512.h"

// 8 x 3 accumulators, 3 operands and 1 broadcast: 28 of 32 registers.
constexpr int kTileRows = 8;
constexpr int kQueryVectors = 3;

#include "cpu/tile.inl"

#include "cpu/attention_decode.inl"

#include "cpu/attention_forward.inl"

#include "cpu/attention_samples.inl"

#include "cpu/attention_backward.inl"
}  // namespace sdpa::avx512

#if defined(__clang__)
#pragma clang attribute pop
#elif defined(__GNUC__)
#pragma GCC pop_options
#endif

namespace sdpa {
namespace avx512 {
const char* unavailable_reason() {
  return cpu_has_avx512() ? nullptr : "this processor has no AVX-512 (F, BW, DQ and VL)";
}
}  // namespace avx512

const Backend kAvx512Backend = {"cpu:avx512", avx512::unavailable_reason, avx512::forward,
                                avx512::backward};
}  // namespace sdpa

#endif

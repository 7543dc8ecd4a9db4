// The CPU backend for x86-64 with AMX (Sapphire Rapids and later): matrix products on bfloat16
// tiles, at float32 accuracy by splitting, everything else on AVX-512. See avx2.cpp for the
// invariant.
#include "cpu/cpu_backends.h"

#if (defined(__x86_64__) || defined(_M_X64)) && !defined(_MSC_VER)

#include <immintrin.h>

#include "cpu/cpu_features.h"
#include "cpu/kernel_headers.h"

#if defined(__clang__)
#pragma clang attribute push(                                                                      \
    __attribute__((                                                                                \
        target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c"))), \
    apply_to = function)
#else
#pragma GCC push_options
// GCC 12 takes its own intrinsics' "undefined" operands for mistakes of ours (GCC bug 105593).
#pragma GCC diagnostic ignored "-Wuninitialized"
#pragma GCC diagnostic ignored "-Wmaybe-uninitialized"
#pragma GCC target("amx-tile,amx-bf16,avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,avx2,fma,f16c")
#endif

namespace sdpa::amx {
// In the order of use: each builds on the one before.
#include "cpu/vec_avx512.h"

// Blocks of 32 queries, two tiles of AMX; 12 x 2 accumulators for what remains to the vector units.
constexpr int kTileRows = 12;
constexpr int kQueryVectors = 2;

#include "cpu/tile.inl"

#include "cpu/attention_decode.inl"

#include "cpu/attention_forward.inl"

#include "cpu/attention_samples.inl"

#include "cpu/attention_backward.inl"

#include "cpu/amx_tiles.inl"

#include "cpu/amx_forward.inl"

#include "cpu/amx_backward.inl"
}  // namespace sdpa::amx

#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

namespace sdpa {
namespace amx {
const char* unavailable_reason() {
  return cpu_has_amx() ? nullptr : "this processor has no AMX, or the system refuses it";
}
}  // namespace amx

const Backend kAmxBackend = {"cpu:amx", amx::unavailable_reason, amx::amx_forward,
                             amx::amx_backward};
}  // namespace sdpa

#endif

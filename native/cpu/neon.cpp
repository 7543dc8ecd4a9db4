// The CPU backend for aarch64, where NEON is part of every processor: no target region, no check.
#include "cpu/cpu_backends.h"

#if defined(__aarch64__) || defined(_M_ARM64)

#include <arm_neon.h>

#include "cpu/kernel_headers.h"

namespace sdpa {
namespace neon {
// In the order of use: each builds on the one before.
#include "cpu/vec_neon.h"

// 4 x 4 accumulators, 4 operands and 1 broadcast: 21 of 32 registers. 16 chains keep four units of
// latency 4 busy, and both sizes divide a tile and the usual head dims. GCC spills larger tiles.
constexpr int kTileRows = 4;
constexpr int kQueryVectors = 4;

#include "cpu/tile.inl"

#include "cpu/attention_decode.inl"

#include "cpu/attention_forward.inl"

#include "cpu/attention_samples.inl"

#include "cpu/attention_backward.inl"

const char* unavailable_reason() { return nullptr; }
}  // namespace neon

const Backend kNeonBackend = {"cpu:neon", neon::unavailable_reason, neon::forward, neon::backward};
}  // namespace sdpa

#endif

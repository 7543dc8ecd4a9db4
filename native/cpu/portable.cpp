// The CPU backend in plain C++, for any processor.
#include "cpu/cpu_backends.h"
#include "cpu/kernel_headers.h"

namespace sdpa {
namespace portable {
// In the order of use: each builds on the one before.
#include "cpu/vec_portable.h"

// rows of scalars by vectors of queries in a register tile: 8 of 16 registers.
constexpr int kTileRows = 4;
constexpr int kQueryVectors = 2;

#include "cpu/tile.inl"

#include "cpu/attention_decode.inl"

#include "cpu/attention_forward.inl"

#include "cpu/attention_samples.inl"

#include "cpu/attention_backward.inl"

const char* unavailable_reason() { return nullptr; }
}  // namespace portable

const Backend kPortableBackend = {"cpu:portable", portable::unavailable_reason, portable::forward,
                                  portable::backward};
}  // namespace sdpa

// Philox4x32: the counter-based random number generator of Salmon, Moraes, Dror and Shaw,
// "Parallel random numbers: as easy as 1, 2, 3" (SC'11). One header for C++ and CUDA.
#pragma once

#include <cstdint>

#include "core/host_device.h"

namespace sdpa {

constexpr uint32_t kPhiloxMultiplier0 = 0xD2511F53;
constexpr uint32_t kPhiloxMultiplier1 = 0xCD9E8D57;
constexpr uint32_t kPhiloxBump0 = 0x9E3779B9;
constexpr uint32_t kPhiloxBump1 = 0xBB67AE85;
constexpr int kPhiloxRounds = 10;

struct PhiloxWords {
  uint32_t w[4];
};

/// Four random words for one counter under one key.
SDPA_HOST_DEVICE constexpr PhiloxWords philox4x32(PhiloxWords counter, uint32_t key0, uint32_t key1,
                                                  int rounds = kPhiloxRounds) {
  PhiloxWords c = counter;
  for (int round = 0; round < rounds; ++round) {
    const uint64_t product0 = uint64_t{kPhiloxMultiplier0} * c.w[0];
    const uint64_t product1 = uint64_t{kPhiloxMultiplier1} * c.w[2];
    c = {{uint32_t(product1 >> 32) ^ c.w[1] ^ key0, uint32_t(product1),
          uint32_t(product0 >> 32) ^ c.w[3] ^ key1, uint32_t(product0)}};
    key0 += kPhiloxBump0;
    key1 += kPhiloxBump1;
  }
  return c;
}

// Known answers of Random123 (kat_vectors).
namespace philox_known_answers {
constexpr bool equal(PhiloxWords a, PhiloxWords b) {
  return a.w[0] == b.w[0] && a.w[1] == b.w[1] && a.w[2] == b.w[2] && a.w[3] == b.w[3];
}
static_assert(equal(philox4x32({{0, 0, 0, 0}}, 0, 0),
                    {{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}}));
static_assert(equal(philox4x32({{~0u, ~0u, ~0u, ~0u}}, ~0u, ~0u),
                    {{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}}));
static_assert(equal(philox4x32({{0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}}, 0xa4093822,
                               0x299f31d0),
                    {{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}}));
}  // namespace philox_known_answers

}  // namespace sdpa

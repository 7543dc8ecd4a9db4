// Which element dropout drops, and by how much the rest is rescaled. One header for C++ and CUDA.
//
// A decision is a pure function of (seed, offset, p, placement, broadcast) and the element's
// absolute coordinates; neither tiles, threads nor sizes enter it. Eight consecutive columns of a
// row share one Philox call, sixteen bits each.
#pragma once

#include "core/philox.h"
#include "core/problem.h"

namespace sdpa {

/// Everything about one call's dropout that does not depend on the element.
struct Dropout {
  uint32_t threshold;  // an element is kept if its 16 random bits are >= threshold; 65536: p = 1
  float keep_scale;    // 65536 / (65536 - threshold), 0 at p = 1
  uint32_t key0, key1;
  Placement placement;
  uint32_t broadcast;

  SDPA_HOST_DEVICE constexpr bool on() const { return threshold != 0; }
};

constexpr uint32_t kBroadcastBatch = 1, kBroadcastHead = 2, kBroadcastQuery = 4;
constexpr uint32_t kDecisionsPerCall = 8;

constexpr uint32_t dropout_threshold(double p) {
  if (p == 0) return 0;
  if (p == 1) return 65536;
  const uint32_t nearest = uint32_t(p * 65536 + 0.5);  // truncation: floor, since p > 0
  return nearest < 1 ? 1 : nearest > 65535 ? 65535 : nearest;
}

/// Resolves the dropout of a call; `has_keep_mask` says that the decisions are given, not drawn,
/// and that the stated p, not its nearest multiple of 2^-16, sets the scale.
constexpr Dropout resolve_dropout(const Problem& p, bool has_keep_mask) {
  const uint32_t threshold = dropout_threshold(p.dropout_p);
  const double drop = has_keep_mask ? p.dropout_p : threshold / 65536.0;
  const uint32_t lattice = p.dropout_placement == Placement::context ? 1 : 0;
  const PhiloxWords key =
      philox4x32({{p.offset_lo, p.offset_hi, lattice + 256 * p.dropout_broadcast, 0x4E545441}},
                 p.seed_lo, p.seed_hi);
  return {threshold,
          drop == 1 ? 0.0f : float(1 / (1 - drop)),
          key.w[0],
          key.w[1],
          p.dropout_placement,
          p.dropout_broadcast};
}

/// The call that gives sample `sample` of a call with samples.
constexpr Problem problem_of_sample(const Problem& p, uint32_t sample) {
  Problem one = p;
  const uint64_t offset = (uint64_t{p.offset_hi} << 32 | p.offset_lo) + sample;
  one.offset_lo = uint32_t(offset);
  one.offset_hi = uint32_t(offset >> 32);
  one.samples = 0;
  return one;
}

/// The counter of the Philox call that decides columns 8 * group to 8 * group + 7 of a row;
/// b, h and q are absolute coordinates.
SDPA_HOST_DEVICE constexpr PhiloxWords dropout_counter(const Dropout& d, uint32_t b, uint32_t h,
                                                       uint32_t q, uint32_t group) {
  return {{group, d.broadcast & kBroadcastQuery ? 0 : q, d.broadcast & kBroadcastHead ? 0 : h,
           d.broadcast & kBroadcastBatch ? 0 : b}};
}

/// Decision `i` (0 to 7) of a call's words.
SDPA_HOST_DEVICE constexpr bool dropout_keeps(const Dropout& d, PhiloxWords words, uint32_t i) {
  return ((words.w[i >> 1] >> (16 * (i & 1))) & 0xffff) >= d.threshold;
}

// Known answers: seed 0x123456789abcdef0, offset 7, p = 0.1, b = 1, h = 2.
namespace dropout_known_answers {
constexpr Dropout resolve(Placement placement) {
  Problem p{};
  p.dropout_p = 0.1;
  p.dropout_placement = placement;
  p.seed_lo = 0x9abcdef0;
  p.seed_hi = 0x12345678;
  p.offset_lo = 7;
  return resolve_dropout(p, false);
}
constexpr uint32_t keep_bits(const Dropout& d, uint32_t q) {
  uint32_t bits = 0;
  for (uint32_t c = 0; c < 32; ++c) {
    const PhiloxWords words =
        philox4x32(dropout_counter(d, 1, 2, q, c / kDecisionsPerCall), d.key0, d.key1);
    bits |= uint32_t{dropout_keeps(d, words, c % kDecisionsPerCall)} << c;
  }
  return bits;
}
constexpr Dropout weights = resolve(Placement::weights), context = resolve(Placement::context);
static_assert(weights.threshold == 6554);
static_assert(weights.key0 == 0x0e4cafae && weights.key1 == 0xa3d5f5f6);
static_assert(context.key0 == 0xf8b8359c && context.key1 == 0xae9f99d4);
static_assert(keep_bits(weights, 0) == 0xf72a7fdf && keep_bits(weights, 1) == 0xff7fc7d3);
static_assert(keep_bits(context, 0) == 0xeafefff8 && keep_bits(context, 1) == 0xefff7fff);
}  // namespace dropout_known_answers

}  // namespace sdpa

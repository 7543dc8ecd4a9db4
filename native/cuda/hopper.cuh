// What the forward and the backward kernels for Hopper share.
#pragma once

#include "cuda/forward.cuh"
#include "cuda/group.cuh"

namespace sdpa::cuda {

/// A tensor [batch, heads, length, width] in the call's layout.
inline MappedTensor mapped(const Problem& p, const void* data, uint32_t heads, uint32_t length,
                           uint32_t width) {
  const auto bytes = [&](uint32_t b, uint32_t head, uint32_t row) {
    return 2 * uint64_t{row_offset(p.layout, heads, length, width, b, head, row)};
  };
  return {data,
          {width, length, heads, p.batch},
          {2 * uint64_t{row_stride(p.layout, heads, width)}, bytes(0, 1, 0), bytes(1, 0, 0)}};
}

/// Decisions for a fragment of 8 * kTiles columns, in words of at most eight tiles each.
template <int kTiles>
struct KeepWords {
  static constexpr int kTilesPerWord = kTiles < 8 ? kTiles : 8, kWords = kTiles / kTilesPerWord;
  KeepFragment<kTilesPerWord> words[kWords];

  /// Drawn, never given; columns start where a call of the generator does.
  SDPA_DEVICE void draw(const Call& call, uint32_t b, uint32_t head, const uint32_t (&query)[2],
                        uint32_t first) {
    SDPA_UNROLL
    for (int w = 0; w < kWords; ++w) {
      words[w] = KeepFragment<kTilesPerWord>::exchange([&](uint32_t half, uint32_t tile) {
        const uint32_t column = dropout_column(call, first + 64 * w + 8 * tile);
        return drawn_group(call, b, head, half ? query[1] : query[0], column / kDecisionsPerCall);
      });
    }
  }
  SDPA_DEVICE bool keeps(int tile, int element) const {
    return words[tile / kTilesPerWord].keeps(tile % kTilesPerWord, element);
  }
};

/// Gives `dropped` to the elements that dropout drops.
template <int kTiles, typename Keep>
SDPA_DEVICE void drop_words(const Keep& keep, float dropped, float (&fragment)[kTiles][4]) {
  SDPA_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (!keep.keeps(j, e)) fragment[j][e] = dropped;
    }
  }
}

/// The warp has read what the barrier guards.
SDPA_DEVICE void release(Barrier* barrier) {
  if (lane_index() == 0) arrive(barrier);
}

}  // namespace sdpa::cuda

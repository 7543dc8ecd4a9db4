// The outputs [query_length, key_length]: scores and weights, computed once more from lse. One
// kernel, in the products of `highest`, serves every type and precision.
#pragma once

#include "cuda/forward.cuh"

namespace sdpa::cuda {

template <int kWidth>
using MatrixShape = ForwardShape<Half::bfloat16, 3, 3, kWidth>;

/// Writes a fragment into rows of a tensor [batch, heads, queries, keys].
template <typename S>
SDPA_DEVICE void store_scores(const ForwardCall& f, const ForwardBlock& k, uint32_t warp_row,
                              uint32_t first_key, const ScoreFragment<S>& fragment, float* to) {
  const Problem& p = f.call.problem;
  SDPA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const uint32_t row = k.first_row + warp_row + 8 * h + lane_index() / 4;
    if (!to || row >= f.rows) continue;
    const size_t at = flat_row(p, k.b, k.first_head, row) * p.key_length;
    SDPA_UNROLL
    for (int j = 0; j < S::kKeyTiles; ++j) {
      store_pair(Type::float32, to, at, first_key + 8 * j + 2 * (lane_index() % 4), p.key_length,
                 fragment[0][j][2 * h], fragment[0][j][2 * h + 1]);
    }
  }
}

/// For the warp's rows and one tile of keys.
template <typename S>
SDPA_DEVICE void write_tile(const ForwardCall& f, const ForwardBlock& k, uint32_t warp_row,
                            uint32_t first_key, const ForwardTiles<S>& tiles) {
  const Call& call = f.call;
  ScoreFragment<S> scores;
  multiply_queries<S>(f, k, warp_row, first_key, tiles.queries, tiles.keys, true, scores);
  apply_rules<S>(f, k, warp_row, first_key, scores);
  store_scores<S>(f, k, warp_row, first_key, scores, f.outputs.scores);
  KeepTile<S> keep;
  draw_tile<S>(f, k, warp_row, first_key, keep);
  if (call.drops(Placement::scores)) drop_tile<S>(keep, -SDPA_INFINITY, scores);
  float lse[2];
  SDPA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const QueryRow row = k.row(f, warp_row + 8 * h + lane_index() / 4);
    lse[h] = f.outputs.lse[flat_row(call.problem, k.b, row.head, row.query)];
  }
  SDPA_UNROLL
  for (int j = 0; j < S::kKeyTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) scores[0][j][e] = weight_from_lse(scores[0][j][e], lse[e / 2]);
  }
  store_scores<S>(f, k, warp_row, first_key, scores, f.outputs.weights);
  if (call.drops(Placement::weights)) {
    SDPA_UNROLL
    for (int j = 0; j < S::kKeyTiles; ++j) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) scores[0][j][e] *= call.dropout.keep_scale;
    }
    drop_tile<S>(keep, 0.0f, scores);
  }
  store_scores<S>(f, k, warp_row, first_key, scores, f.outputs.dropped_weights);
}

/// A block takes some rows of one head, over all keys.
template <typename S>
SDPA_KERNEL(S::kThreads, 1)
matrices_kernel(const SDPA_PARAMETER ForwardCall f) {
  const Call& call = f.call;
  const Problem& p = call.problem;
  const uint32_t warps = thread_count() / kLanes, warp_row = warp_index() * S::kRowsPerWarp;
  const ForwardBlock k = forward_block(f, block_index().x, warps * S::kRowsPerWarp, S::kColumns);
  const ForwardTiles<S> tiles = ForwardTiles<S>::of(warps);
  if (!S::kWide) load_queries<S>(f, k, tiles.queries);
  SDPA_NO_UNROLL
  for (uint32_t first = 0; first < p.key_length; first += S::kKeys) {
    sync_block();
    tiles.keys.load(key_rows(call, k.b, k.kv_head, first, S::kKeys), 0);
    commit_copies();
    wait_copies<0>();
    sync_block();
    if (k.first_row + warp_row < f.rows) write_tile<S>(f, k, warp_row, first, tiles);
  }
}

}  // namespace sdpa::cuda

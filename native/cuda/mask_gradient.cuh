// The gradient of the attention mask: score gradients summed over the axes along which the mask
// broadcasts, in a fixed order and without atomics. One kernel, in the products of `highest`,
// serves every type and precision.
#pragma once

#include "cuda/backward.cuh"

namespace sdpa::cuda {

using MaskShape = BackwardShape<Half::bfloat16, 3, 3, 256>;

/// A block gathers one tile: some queries (all, where the mask has one row for all) and some keys
/// (or all) of one plane of the mask.
struct MaskGradientCall {
  BackwardCall backward;
  uint32_t query_tasks, key_tasks;
};

struct MaskTask {
  uint32_t first_b, last_b, first_head, last_head;  // planes that share this one of the mask
  uint32_t first_query, end_query, first_key, end_key;
  size_t plane;
};

SDPA_DEVICE MaskTask mask_task(const MaskGradientCall& m, uint32_t number, uint32_t rows) {
  const Problem& p = m.backward.forward.call.problem;
  MaskTask task;
  const uint32_t key_task = number % m.key_tasks;
  number /= m.key_tasks;
  const uint32_t query_task = number % m.query_tasks;
  number /= m.query_tasks;
  task.plane = number;
  const uint32_t head = number % p.mask_heads, b = number / p.mask_heads;
  task.first_b = p.mask_batch > 1 ? b : 0;
  task.last_b = p.mask_batch > 1 ? b : p.batch - 1;
  task.first_head = p.mask_heads > 1 ? head : 0;
  task.last_head = p.mask_heads > 1 ? head : p.query_heads - 1;
  const bool per_query = p.mask_queries > 1, per_key = p.mask_keys > 1;
  task.first_query = per_query ? query_task * rows : 0;
  task.end_query = per_query ? task.first_query + rows : p.query_length;
  task.first_key = per_key ? key_task * MaskShape::kKeys : 0;
  task.end_key = per_key ? task.first_key + MaskShape::kKeys : p.key_length;
  return task;
}

/// Adds the score gradients of one head's rows from `first_query` on.
SDPA_DEVICE void gather_mask_gradient(const MaskGradientCall& m, const MaskTask& task, uint32_t b,
                                      uint32_t head, uint32_t first_query, uint32_t rows,
                                      const BackwardTiles<MaskShape>& tiles,
                                      float (&sums)[MaskShape::kKeyTiles][4]) {
  using S = MaskShape;
  const BackwardCall& g = m.backward;
  const Call& call = g.forward.call;
  const Problem& p = call.problem;
  ForwardBlock k{};
  k.b = b;
  k.first_head = head;
  k.kv_head = head / (p.query_heads / p.kv_heads);
  k.first_row = first_query;
  k.visibility = visibility_of(p, call.inputs, b);
  const uint32_t left = p.query_length - first_query;
  const SeenByRun seen =
      seen_by_run(k.visibility, first_query, first_query + (left < rows ? left : rows) - 1);
  k.any = seen.any;
  k.all = seen.all;
  const uint32_t warp_row = warp_index() * S::kRowsPerWarp;
  float lse[2], delta[2];
  load_row_sums(g, k, warp_row, lse, delta);
  uint32_t first = k.any.begin / S::kKeys * S::kKeys;
  if (first < task.first_key) first = task.first_key;
  const uint32_t end = k.any.end < task.end_key ? k.any.end : task.end_key;
  SDPA_NO_UNROLL
  for (; first < end; first += S::kKeys) {
    sync_block();  // all have read the tiles before
    tiles.tile.load(key_rows(call, b, k.kv_head, first, S::kKeys), 0);
    tiles.tile_values.load(value_rows(call, b, k.kv_head, first, S::kKeys), 0);
    sync_block();
    ScoreFragment<S> weights, grads;
    float slopes[S::kKeyTiles][4];
    query_tile<S>(g, k, warp_row, first, tiles, true, lse, delta, weights, grads, slopes);
    const bool valid[2] = {first_query + warp_row + lane_index() / 4 < p.query_length,
                           first_query + warp_row + lane_index() / 4 + 8 < p.query_length};
    SDPA_UNROLL
    for (int j = 0; j < S::kKeyTiles; ++j) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) sums[j][e] += valid[e / 2] ? grads[0][j][e] : 0.0f;
    }
  }
}

/// Sums a fragment over the axes that broadcast: over the keys of a row, and over the rows of a
/// warp and then the warps, in order. Every thread of those summed has the result.
SDPA_DEVICE void fold_mask_gradient(const Problem& p, float (&sums)[MaskShape::kKeyTiles][4]) {
  constexpr int kTiles = MaskShape::kKeyTiles;
  if (p.mask_keys == 1) {
    SDPA_UNROLL
    for (int h = 0; h < 2; ++h) {
      float sum = 0;
      for (int j = 0; j < kTiles; ++j) sum += sums[j][2 * h] + sums[j][2 * h + 1];
      sum = quad_sum(sum);
      for (int j = 0; j < kTiles; ++j) sums[j][2 * h] = sums[j][2 * h + 1] = sum;
    }
  }
  if (p.mask_queries > 1) return;
  float* const shared = reinterpret_cast<float*>(shared_memory());  // [warps][8 * kTiles]
  sync_block();
  SDPA_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SDPA_UNROLL
    for (int i = 0; i < 2; ++i) {
      float sum = sums[j][i] + sums[j][2 + i];
      for (uint32_t lanes = 4; lanes < kLanes; lanes *= 2) sum += shuffle_xor(sum, lanes);
      const uint32_t column = 8 * j + 2 * (lane_index() % 4) + i;
      if (lane_index() < 4) shared[warp_index() * 8 * kTiles + column] = sum;
    }
  }
  sync_block();
  SDPA_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SDPA_UNROLL
    for (int i = 0; i < 2; ++i) {
      float sum = 0;
      for (uint32_t warp = 0; warp < thread_count() / kLanes; ++warp) {
        sum += shared[warp * 8 * kTiles + 8 * j + 2 * (lane_index() % 4) + i];
      }
      sums[j][i] = sums[j][2 + i] = sum;
    }
  }
}

SDPA_KERNEL(MaskShape::kThreads, 1) mask_gradient(const SDPA_PARAMETER MaskGradientCall m) {
  using S = MaskShape;
  const BackwardCall& g = m.backward;
  const Problem& p = g.forward.call.problem;
  const uint32_t warps = thread_count() / kLanes, rows = warps * S::kRowsPerWarp;
  const MaskTask task = mask_task(m, block_index().x, rows);
  const BackwardTiles<S> tiles = BackwardTiles<S>::of(warps);
  float sums[S::kKeyTiles][4];
  clear(sums);
  SDPA_NO_UNROLL
  for (uint32_t b = task.first_b; b <= task.last_b; ++b) {
    SDPA_NO_UNROLL
    for (uint32_t head = task.first_head; head <= task.last_head; ++head) {
      SDPA_NO_UNROLL
      for (uint32_t query = task.first_query; query < task.end_query; query += rows) {
        gather_mask_gradient(m, task, b, head, query, rows, tiles, sums);
      }
    }
  }
  fold_mask_gradient(p, sums);
  // Where an axis broadcasts, the thread that stands for its first element writes.
  const Type type = Type(uint32_t(p.mask_type) - uint32_t(MaskType::float32));
  SDPA_UNROLL
  for (int j = 0; j < S::kKeyTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const uint32_t row = warp_index() * S::kRowsPerWarp + lane_index() / 4 + e / 2 * 8;
      const uint32_t column = 8 * j + 2 * (lane_index() % 4) + e % 2;
      const uint32_t query = p.mask_queries > 1 ? task.first_query + row : row;
      const uint32_t key = p.mask_keys > 1 ? task.first_key + column : column;
      if (query >= p.mask_queries || key >= p.mask_keys) continue;
      const size_t at = (task.plane * p.mask_queries + query) * p.mask_keys + key;
      write_element(type, g.tensors.grad_mask, at, sums[j][e]);
    }
  }
}

}  // namespace sdpa::cuda

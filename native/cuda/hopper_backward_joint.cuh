// The backward pass on Hopper by one kernel, for heads that fit into registers: a block owns keys
// and values and runs over queries, as hopper_key_gradients does, and multiplies its score
// gradients, by way of shared memory, with its keys too. Five products instead of eight.
//
// What a block finds of grad_query belongs to a sum over all keys, which waits in global memory in
// float32. Blocks add to it in the order of their keys, so that the same bits come out again. A
// block waits for none but those before it in the grid, which have started before it.
#pragma once

#include "cuda/hopper_backward.cuh"

namespace sdpa::cuda {

// ------------------------------------------------------------------------------------------ shapes

template <Half kHalf, int kWidth>
struct HopperJointShape : HopperBackwardShape<kHalf, 1, 1, kWidth, 64, false> {
  using Base = HopperBackwardShape<kHalf, 1, 1, kWidth, 64, false>;
  /// Of grad_query, the columns that a warpgroup sums.
  static constexpr int kQueryColumns = kWidth / Base::kGroups;
  /// Score gradients, a row for each key: written for one tile while those before are read.
  static constexpr size_t kGradBytes = PanelTile::bytes(Base::kRows, Base::kTile);
  static constexpr size_t kGradsAt = (Base::kSharedBytes + 1023) / 1024 * 1024;
  static constexpr size_t kSharedBytes = kGradsAt + 2 * kGradBytes;
};

/// Sums of grad_query in tiles of kTile queries: [unit, tile, warpgroup], of each what its threads
/// hold, 16 bytes after 16 bytes.
struct QuerySums {
  float* sums;
  uint32_t* turns;  // how many blocks of keys have added to it, for each warpgroup
  uint32_t tiles;   // of a unit

  template <typename S>
  SDPA_DEVICE float* of(size_t tile, uint32_t group) const {
    return sums + (tile * S::kGroups + group) * S::kTile * S::kQueryColumns +
           4 * (thread_index() % kGroupThreads);
  }
};

struct HopperJointCall {
  HopperBackwardCall sides;  // states are of keys
  QuerySums query;
  RowState* query_states;  // to be written
};

// ------------------------------------------------------------------------------- gradient of query

/// Adds a warpgroup's columns of grad_query for a tile of queries, when the blocks of the keys
/// before have.
template <typename S>
SDPA_DEVICE void add_in_turn(const HopperJointCall& h, const KeyBlock& k, HeadRows tile,
                             uint32_t group, const float (&sums)[S::kQueryColumns / 8][4]) {
  const Problem& p = h.sides.backward.forward.call.problem;
  const uint32_t left = p.query_length - tile.row;
  const uint32_t last = tile.row + (left < S::kTile ? left : S::kTile) - 1;
  const uint32_t first_block = seen_by_run(k.visibility, tile.row, last).any.begin / S::kRows;
  const uint32_t number = k.first_key / S::kRows - first_block;
  const size_t at = (size_t{k.b} * p.query_heads + tile.head) * h.query.tiles + tile.row / S::kTile;
  uint32_t* const turn = h.query.turns + at * S::kGroups + group;
  float* const to = h.query.of<S>(at, group);
  const bool leads = thread_index() % kGroupThreads == 0;
  if (leads) wait_for_turn(turn, number);
  sync_group();
  SDPA_UNROLL
  for (int n = 0; n < S::kQueryColumns / 8; ++n) {
    float* const four = to + n * 4 * kGroupThreads;
    if (number > 0) {
      add_four(four, sums[n]);
    } else {
      store_vector(four, {{to_bits(sums[n][0]), to_bits(sums[n][1]), to_bits(sums[n][2]),
                           to_bits(sums[n][3])}});
    }
  }
  sync_group();
  if (leads) give_turn(turn, number + 1);
}

/// Writes the warp's rows of an operand, which multiplied rows of `to` from `row` on.
template <int kSteps>
SDPA_DEVICE void store_operand(const uint32_t (&operand)[kSteps][1][4], uint32_t row,
                               const PanelTile& to) {
  SDPA_UNROLL
  for (uint32_t s = 0; s < kSteps; ++s) {
    SDPA_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
      *to.pair(row + lane_index() / 4 + i % 2 * 8, 16 * s + i / 2 * 8 + 2 * (lane_index() % 4)) =
          operand[s][0][i];
    }
  }
}

/// query_sums = score gradients . keys, for a warpgroup's columns, begun; rows of `grads` are keys.
template <typename S>
SDPA_DEVICE void begin_query_sums(const PanelTile& grads, const PanelTile& keys, uint32_t group,
                                  float (&sums)[S::kQueryColumns / 8][4]) {
  hold(sums);
  begin_products();
  SDPA_UNROLL
  for (uint32_t s = 0; s < S::kRows / 16; ++s) {
    multiply_shared<S::kHalf, Depth::rows, Depth::rows>(
        sums, grads.by_rows(s), keys.by_rows(s, group * S::kQueryColumns), s > 0);
  }
  commit_products();
}

/// sums += rows `row` to row + 63 of `grads` . queries, begun.
template <typename S>
SDPA_DEVICE void begin_key_sums(const PanelTile& grads, uint32_t row, const PanelTile& queries,
                                float (&sums)[S::kWidth / 8][4]) {
  hold(sums);
  begin_products();
  SDPA_UNROLL
  for (uint32_t s = 0; s < S::kTile / 16; ++s) {
    multiply_shared<S::kHalf, Depth::columns, Depth::rows>(sums, grads.by_columns(row, s),
                                                           queries.by_rows(s), true);
  }
  commit_products();
}

// --------------------------------------------------------------------------------------- consumers

/// Gradients of a thread's two keys and their values, not yet scaled.
template <typename S>
struct KeyGradients {
  float key[S::kWidth / 8][4], value[S::kWidth / 8][4];
};

/// Runs over the tiles of queries, for the warp's keys from `warp_key` of the block on. Scores are
/// transposed: rows are keys.
template <typename S>
SDPA_DEVICE void sum_jointly(const HopperJointCall& h, const KeyBlock& k,
                             const HopperBackwardTiles<S>& tiles, const QueryTiles& queries,
                             uint32_t warp_key, KeyGradients<S>& sums) {
  const Call& call = h.sides.backward.forward.call;
  const Problem& p = call.problem;
  const float scale = p.scale * kLog2E, rescale = call.rescale() * (1 / S::kRaise);
  const bool drops_scores = call.drops(Placement::scores);
  const bool drops_weights = call.drops(Placement::weights);
  const bool draws = drops_scores || drops_weights;
  const uint32_t group = warp_key / S::kGroupRows, group_key = group * S::kGroupRows;
  const uint32_t first_key = k.first_key + warp_key;
  KeyRange seen[2];
  seen_by_queries(k, p, first_key, seen);
  float weights[S::kTile / 8][4], grads[S::kTile / 8][4], query_sums[S::kQueryColumns / 8][4];
  uint32_t weight_operand[S::kTile / 16][1][4], grad_operand[S::kTile / 16][1][4];
  KeepTransposed<S::kTile / 8> keep{0};
  clear(weights);
  clear(grads);
  clear(query_sums);
  const auto begin_scores = [&](uint32_t i) {
    const uint32_t stage = i % S::kStages;
    wait_for(tiles.tile_full(stage), i / S::kStages % 2);
    begin_by_columns<S::kHalf>(tiles.owned(), group_key, tiles.tile(stage), weights);
  };
  wait_for(tiles.owned_full(), 0);
  begin_scores(0);
  if (draws) keep = draw_queries<S>(call, k, queries.at(0, S::kTile), first_key);
  wait_products<0>();
  hold(weights);
  SDPA_NO_UNROLL
  for (uint32_t i = 0; i < queries.count; ++i) {
    const uint32_t stage = i % S::kStages, parity = i / S::kStages % 2;
    const HeadRows from = queries.at(i, S::kTile);
    const Vector16* const row_sums = tiles.sums(stage) + lane_index() % 4;
    wait_for(tiles.values_full(stage), parity);
    begin_by_columns<S::kHalf>(tiles.owned_values(), group_key, tiles.tile_values(stage), grads);
    weigh_queries<S>(scale, queries, from.row, seen, row_sums, weights);
    if (drops_scores) drop_words(keep, 0.0f, weights);
    if (drops_weights) {
      float kept[S::kTile / 8][4];
      copy_fragment(weights, kept);
      drop_words(keep, 0.0f, kept);
      to_operand<S::kHalf>(kept, weight_operand);
    } else {
      to_operand<S::kHalf>(weights, weight_operand);
    }
    begin_by_rows<S::kHalf>(weight_operand, tiles.tile_values(stage), true, sums.value);
    wait_products<1>();
    hold(grads);
    if (drops_weights) drop_words(keep, 0.0f, grads);
    differentiate_queries<S>(rescale, row_sums, weights, grads);
    to_operand<S::kHalf>(grads, grad_operand);
    const PanelTile shared_grads{tiles.shared + S::kGradsAt + i % 2 * S::kGradBytes, S::kRows};
    store_operand(grad_operand, warp_key, shared_grads);
    wait_products<0>();
    hold(sums.value);
    publish_writes();
    // Whoever comes here has waited for its products of the tile before.
    sync_consumers<S::kGroups * kGroupThreads>();
    begin_query_sums<S>(shared_grads, tiles.owned().term(0), group, query_sums);
    begin_key_sums<S>(shared_grads, group_key, tiles.tile(stage).term(0), sums.key);
    const uint32_t next = next_tile(i, queries.count);
    begin_scores(next);
    wait_products<2>();
    hold(query_sums);
    add_in_turn<S>(h, k, from, group, query_sums);
    if (draws) keep = draw_queries<S>(call, k, queries.at(next, S::kTile), first_key);
    wait_products<0>();
    hold(sums.key);
    hold(weights);
    release(tiles.stage_free(stage));
  }
}

template <typename S>
SDPA_KERNEL(S::kThreads, 1)
hopper_joint_gradients(const SDPA_PARAMETER HopperJointCall h) {
  const BackwardCall& g = h.sides.backward;
  const Problem& p = g.forward.call.problem;
  const KeyBlock k = key_block(g, block_index().x, S::kRows, S::kWidth);
  const HopperBackwardTiles<S> tiles{shared_memory()};
  const QueryTiles queries = QueryTiles::of(p, k, S::kRows, S::kTile);
  tiles.init(kLanes);
  if (group_index() == 0) {
    give_registers<S::kProducerRegisters>();
    bring_queries(h.sides, tiles, k, queries);
  } else {
    take_registers<S::kRegisters>();
    const uint32_t warp_key = (warp_index() - 4) * 16;
    KeyGradients<S> sums;
    clear(sums.key);
    clear(sums.value);
    if (queries.count > 0) sum_jointly(h, k, tiles, queries, warp_key, sums);
    store_key_gradient<S, false>(g, k, warp_key, sums.key);
    store_key_gradient<S, true>(g, k, warp_key, sums.value);
    bool lost[2];
    SDPA_UNROLL
    for (int half = 0; half < 2; ++half) {
      lost[half] = row_is_lost(sums.key, half);
      lost[half] |= row_is_lost(sums.value, half);
    }
    store_key_states(h.sides.states, p, k, warp_key, false, lost);
  }
}

// -------------------------------------------------------------------------------- around the
// kernel

/// Writes grad_query from its sums. A warpgroup for each tile of queries.
template <typename S>
SDPA_KERNEL(kGroupThreads, 1)
store_query_sums(const SDPA_PARAMETER HopperJointCall h) {
  const BackwardCall& g = h.sides.backward;
  const Problem& p = g.forward.call.problem;
  const size_t tile = block_index().x;
  const uint32_t unit = uint32_t(tile / h.query.tiles);
  const uint32_t first_row = uint32_t(tile % h.query.tiles) * S::kTile + warp_index() * 16;
  float sums[S::kWidth / 8][4];
  clear(sums);
  if (h.query.turns[tile * S::kGroups] > 0) {
    SDPA_UNROLL
    for (int n = 0; n < S::kWidth / 8; ++n) {
      constexpr int kTiles = S::kQueryColumns / 8;
      const Vector16 four =
          load_vector(h.query.of<S>(tile, n / kTiles) + n % kTiles * 4 * kGroupThreads);
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) sums[n][e] = from_bits(four.w[e]);
    }
  }
  store_gradient(p.type, g.tensors.grad_query, 0, p.head_dim, p.scale, sums, [&](int half) {
    const uint32_t row = first_row + 8 * half + lane_index() / 4;
    if (row >= p.query_length) return int64_t{-1};
    return int64_t(row_offset(p.layout, p.query_heads, p.query_length, p.head_dim,
                              unit / p.query_heads, unit % p.query_heads, row));
  });
  SDPA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t row = first_row + 8 * half + lane_index() / 4;
    store_state(h.query_states, unit, p.query_length, row, row_is_lost(sums, half));
  }
}

struct Turns {
  uint32_t* turns;
  uint32_t count;
};

SDPA_KERNEL(kGroupThreads, 1) clear_turns(const SDPA_PARAMETER Turns t) {
  const uint32_t i = block_index().x * kGroupThreads + thread_index();
  if (i < t.count) t.turns[i] = 0;
}

}  // namespace sdpa::cuda

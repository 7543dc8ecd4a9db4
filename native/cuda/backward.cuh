// The backward pass (Dao et al., arXiv 2205.14135, with Delta = rowsum(dO * O)): weights are
// computed again, tile by tile, from lse, so memory grows with the length, never with its square.
//
// Two kernels, so that every sum is gathered by one block in one order, without atomics:
// query_gradients owns rows of queries and runs over keys, as the forward pass does; key_gradients
// owns keys, 16 a warp, and runs over the queries of all heads that share them. There scores are
// transposed, which makes weights and score gradients the first operand of their products without
// leaving the registers. The gradient of a mask is a third kernel's.
//
// grad_output is kept as it is in shared memory; what dropout rescales is multiplied afterwards.
#pragma once

#include "cuda/forward.cuh"

namespace sdpa::cuda {

// ------------------------------------------------------------------------------------------ shapes

/// Tile sizes and number formats, as of ForwardShape.
template <Half kHalf_, int kTerms_, int kWeightTerms_, int kWidth_>
struct BackwardShape {
  static constexpr Half kHalf = kHalf_;
  static constexpr int kTerms = kTerms_, kWeightTerms = kWeightTerms_, kWidth = kWidth_;
  static constexpr bool kWide = kWidth > 128;
  static constexpr int kRowSets = 1;
  /// Tiles of the side that a kernel runs over: keys for queries, queries for keys.
  static constexpr int kKeys = kTerms > 1 ? (kWidth > 64 ? 16 : 32) : 32;
  static constexpr int kKeyTiles = kKeys / 8;
  /// Columns that a block of query_gradients sums up, and one of key_gradients (of both tensors).
  static constexpr int kColumns = kWidth, kKeyColumns = kWidth < 128 ? kWidth : 128;
  /// Weights are multiplied by this: float16 would lose those below 2^-14.
  static constexpr float kRaise = kHalf == Half::float16 ? 1 << 14 : 1;
  static constexpr int kMostWarps = 4;
  static constexpr int kThreads = kMostWarps * int(kLanes);
  static constexpr uint32_t kRowsPerWarp = 16;

  using KeyTile = Tile<kHalf, kTerms, kWidth>;

  /// Both sides have two tensors; the side that a block owns is read in place where it is wide.
  static constexpr size_t owned_bytes(uint32_t warps) {
    return kWide ? 0 : 2 * KeyTile::bytes(warps * kRowsPerWarp);
  }
  static constexpr size_t shared_bytes(uint32_t warps) {
    return owned_bytes(warps) + 2 * KeyTile::bytes(kKeys);
  }
};

/// A backward call as its kernels take it.
struct BackwardCall {
  ForwardCall forward;  // units are single heads
  BackwardTensors tensors;
  float* delta;                // [batch, query_heads, query_length]
  uint32_t key_blocks;         // blocks of key_gradients a key/value head
  uint32_t chunks;             // of the columns of grad_key and grad_value
  const RowState* key_states;  // as forward.states, of keys: [batch, kv_heads, key_length]
};

/// Two tensors of the owned side, and two of the other: query and grad_output, key and value.
template <typename S>
struct BackwardTiles {
  typename S::KeyTile owned, owned_values, tile, tile_values;

  SDPA_DEVICE static BackwardTiles of(uint32_t warps) {
    uint16_t* const shared = reinterpret_cast<uint16_t*>(shared_memory());
    const uint32_t rows = warps * S::kRowsPerWarp;
    const size_t one = S::kWide ? 0 : S::KeyTile::bytes(rows) / 2;
    const size_t other = S::KeyTile::bytes(S::kKeys) / 2;
    return {{shared, rows},
            {shared + one, rows},
            {shared + 2 * one, S::kKeys},
            {shared + 2 * one + other, S::kKeys}};
  }
};

// --------------------------------------------------------------------------- dropout of the
// context

/// Rows of grad_output in which what dropout drops of the context is 0.
struct KeptRows {
  const Call& call;
  Rows rows;
  uint32_t b, head, query;  // of the first row
  uint32_t count, width;

  SDPA_DEVICE KeptRows(const Call& call, const Rows& rows, uint32_t b, uint32_t head,
                       uint32_t query)
      : call(call),
        rows(rows),
        b(b),
        head(head),
        query(query),
        count(rows.count),
        width(rows.width) {}
  SDPA_DEVICE float at(uint32_t row, uint32_t column) const {
    if (call.drops(Placement::context) &&
        !(keep_byte(call, b, head, query + row, column / 8 * 8) >> (column % 8) & 1)) {
      return 0.0f;
    }
    return rows.at(row, column);
  }
};

SDPA_DEVICE KeptRows grad_output_rows(const BackwardCall& g, uint32_t b, uint32_t head,
                                      uint32_t first, uint32_t count) {
  const Call& call = g.forward.call;
  const Problem& p = call.problem;
  return {call, query_side_rows(p, g.tensors.grad_output, p.value_dim, b, head, first, count), b,
          head, first};
}

/// Clears in a tile of grad_output what dropout drops of the context.
template <Half kHalf, int kTerms, int kWidth>
SDPA_OUTLINE void drop_channels(const Tile<kHalf, kTerms, kWidth>& tile, const KeptRows& rows) {
  const uint32_t pieces = divide_up(rows.width, 8);
  SDPA_NO_UNROLL
  for (uint32_t i = thread_index(); i < rows.count * pieces; i += thread_count()) {
    const uint32_t row = i / pieces, piece = i % pieces;
    const uint32_t keep = keep_byte(rows.call, rows.b, rows.head, rows.query + row, 8 * piece);
    SDPA_NO_UNROLL
    for (uint32_t j = 0; j < 8 * kTerms; ++j) {
      if (!(keep >> (j % 8) & 1)) tile.piece(j / 8, row, piece)[j % 8] = 0;
    }
  }
}

// -------------------------------------------------------------------------------- score gradients

/// For 16 rows: `weights` and `grads` hold P and G . V, `keep(j, e)` the decisions of weights
/// dropout. Turns them into what multiplies the values, and into the gradient of the scores.
template <int kTiles, typename Delta, typename Keep>
SDPA_DEVICE void differentiate_softmax(const Call& call, const Delta& delta, const Keep& keep,
                                       float (&weights)[kTiles][4], float (&grads)[kTiles][4]) {
  const float rescale = call.rescale();
  SDPA_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const float weight = weights[j][e];
      const bool kept = keep(j, e);
      const float grad_weight = kept ? grads[j][e] * rescale : 0.0f;
      if (!kept) weights[j][e] = 0;
      grads[j][e] = weight == 0 ? 0.0f : weight * (grad_weight - delta(j, e));
    }
  }
}

/// The softcap's derivative: grads *= slopes.
template <int kTiles>
SDPA_DEVICE void differentiate_softcap(const float (&slopes)[kTiles][4],
                                       float (&grads)[kTiles][4]) {
  SDPA_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) grads[j][e] = grads[j][e] == 0 ? 0.0f : grads[j][e] * slopes[j][e];
  }
}

/// For the warp's 16 rows of queries and a tile of keys: the weights that multiplied the values and
/// the gradient of the scores, before the softcap's derivative, which `slopes` gets.
template <typename S>
SDPA_DEVICE void query_tile(const BackwardCall& g, const ForwardBlock& k, uint32_t warp_row,
                            uint32_t first_key, const BackwardTiles<S>& tiles, bool careful,
                            const float (&lse)[2], const float (&delta)[2],
                            ScoreFragment<S>& weights, ScoreFragment<S>& grads,
                            float (&slopes)[S::kKeyTiles][4]) {
  const ForwardCall& f = g.forward;
  const Call& call = f.call;
  const Problem& p = call.problem;
  KeepTile<S> keep;
  draw_tile<S>(f, k, warp_row, first_key, keep);
  multiply_queries<S>(f, k, warp_row, first_key, tiles.owned, tiles.tile, careful, weights);
  if (p.softcap > 0) {
    float copy[S::kKeyTiles][4];
    copy_fragment(weights[0], copy);
    score_rows<S>(f, k, warp_row, first_key, copy, slopes);
    copy_fragment(copy, weights[0]);
  } else {
    apply_rules<S>(f, k, warp_row, first_key, weights);
  }
  if (call.drops(Placement::scores)) drop_tile<S>(keep, -SDPA_INFINITY, weights);
  const bool drops_weights = call.drops(Placement::weights);
  SDPA_UNROLL
  for (int j = 0; j < S::kKeyTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) weights[0][j][e] = weight_from_lse(weights[0][j][e], lse[e / 2]);
  }
  const auto load_a = [&](int, uint32_t s, uint32_t(&a)[S::kTerms][4]) {
    if constexpr (S::kWide) {
      gather_a<S::kHalf>(a, s, [&](int half, uint32_t column) {
        const uint32_t row = k.first_row + warp_row + lane_index() / 4 + 8 * half;
        if (row >= f.rows || column >= p.value_dim) return 0.0f;
        return grad_output_rows(g, k.b, k.first_head, row, 1).at(0, column);
      });
    } else {
      tiles.owned_values.load_a(a, warp_row, s);
    }
  };
  multiply_tile<S>(p.value_dim, load_a, tiles.tile_values, grads);
  differentiate_softmax(
      call, [&](int, int e) { return delta[e / 2]; },
      [&](int j, int e) { return !drops_weights || keep[0].keeps(j, e); }, weights[0], grads[0]);
}

/// lse and Delta of the thread's two rows; rows that are padding have none.
SDPA_DEVICE void load_row_sums(const BackwardCall& g, const ForwardBlock& k, uint32_t warp_row,
                               float (&lse)[2], float (&delta)[2]) {
  SDPA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const uint32_t row = k.first_row + warp_row + lane_index() / 4 + 8 * h;
    const bool valid = row < g.forward.rows;
    const size_t at = flat_row(g.forward.call.problem, k.b, k.first_head, valid ? row : 0);
    lse[h] = valid ? g.tensors.lse[at] : -SDPA_INFINITY;
    delta[h] = valid ? g.delta[at] : 0.0f;
  }
}

// ------------------------------------------------------------------------------- gradient of query

template <int kTiles>
SDPA_DEVICE bool any_nan(const float (&sums)[kTiles][4]) {
  bool nan = false;
  SDPA_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) nan |= is_nan(sums[n][e]);
  }
  return nan;
}

/// Loads the rows that the block owns: its queries and their gradients.
template <typename S>
SDPA_DEVICE void load_owned_queries(const BackwardCall& g, const ForwardBlock& k,
                                    const BackwardTiles<S>& tiles) {
  load_queries<S>(g.forward, k, tiles.owned);
  const KeptRows grads =
      grad_output_rows(g, k.b, k.first_head, k.first_row, tiles.owned_values.rows);
  tiles.owned_values.load(grads.rows, 0);
  commit_copies();
  if (!g.forward.call.drops(Placement::context)) return;
  wait_copies<0>();
  sync_block();
  drop_channels(tiles.owned_values, grads);
}

/// Runs over all tiles of keys that the block sees: leaves grad_query without the scale.
/// `careful`: keys that are not finite are kept from rows whose score gradient for them is 0.
template <typename S>
SDPA_DEVICE void accumulate_query_gradient(const BackwardCall& g, const ForwardBlock& k,
                                           uint32_t warp_row, bool careful,
                                           const BackwardTiles<S>& tiles,
                                           float (&sums)[S::kColumns / 8][4]) {
  const Call& call = g.forward.call;
  const Problem& p = call.problem;
  const float one[2] = {1.0f, 1.0f};
  float lse[2], delta[2];
  load_row_sums(g, k, warp_row, lse, delta);
  clear(sums);
  SDPA_NO_UNROLL
  for (uint32_t first = k.any.begin / S::kKeys * S::kKeys; first < k.any.end; first += S::kKeys) {
    const Rows keys = key_rows(call, k.b, k.kv_head, first, S::kKeys);
    sync_block();  // all have read the tiles before
    tiles.tile.load(keys, 0);
    tiles.tile_values.load(value_rows(call, k.b, k.kv_head, first, S::kKeys), 0);
    commit_copies();
    wait_copies<0>();
    sync_block();
    ScoreFragment<S> weights, grads;
    float slopes[S::kKeyTiles][4];
    query_tile<S>(g, k, warp_row, first, tiles, careful, lse, delta, weights, grads, slopes);
    if (p.softcap > 0) differentiate_softcap(slopes, grads[0]);
    uint32_t operand[S::kKeys / 16][S::kWeightTerms][4];
    to_operand<S::kHalf>(grads[0], operand);
    if (careful) {
      sync_block();
      tiles.tile.clear_nonfinite();
      sync_block();
    }
    multiply_rows(operand, tiles.tile, p.head_dim, one, sums);
    if (careful) add_nonfinite_rows<S::kHalf>(operand, keys, 0, sums);
  }
}

/// Writes rows of a gradient: `row(h)` gives where row g + 8 * h starts, or a negative number.
template <int kTiles, typename Row>
SDPA_DEVICE void store_gradient(Type type, void* data, uint32_t first_column, uint32_t width,
                                float factor, const float (&sums)[kTiles][4], const Row& row) {
  SDPA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const int64_t at = row(h);
    if (at < 0) continue;
    SDPA_UNROLL
    for (int n = 0; n < kTiles; ++n) {
      const uint32_t column = first_column + 8 * n + 2 * (lane_index() % 4);
      store_pair(type, data, size_t(at), column, width, sums[n][2 * h] * factor,
                 sums[n][2 * h + 1] * factor);
    }
  }
}

template <typename S>
SDPA_KERNEL(S::kThreads, 1)
query_gradients(const SDPA_PARAMETER BackwardCall g) {
  const ForwardCall& f = g.forward;
  const Problem& p = f.call.problem;
  const uint32_t warps = thread_count() / kLanes, warp_row = warp_index() * S::kRowsPerWarp;
  const ForwardBlock k =
      forward_block(f, block_index().x, warps * S::kRowsPerWarp, uint32_t{S::kColumns});
  if (!is_wanted(f.states, k.unit, f.rows, k.first_row, warps * S::kRowsPerWarp)) return;
  const BackwardTiles<S> tiles = BackwardTiles<S>::of(warps);
  if (!S::kWide) load_owned_queries<S>(g, k, tiles);
  float sums[S::kColumns / 8][4];
  // A NaN may have come from a key that its row does not see: 0 * NaN is NaN.
  for (bool careful = false;; careful = true) {
    accumulate_query_gradient<S>(g, k, warp_row, careful, tiles, sums);
    if (careful || !sync_block_or(any_nan(sums))) break;
  }
  wait_copies<0>();  // where no tile was seen
  store_gradient(p.type, g.tensors.grad_query, 0, p.head_dim, p.scale, sums, [&](int h) {
    const uint32_t row = k.first_row + warp_row + 8 * h + lane_index() / 4;
    if (row >= f.rows || !is_wanted_row(f.states, k.unit, f.rows, row)) return int64_t{-1};
    return int64_t(
        row_offset(p.layout, p.query_heads, p.query_length, p.head_dim, k.b, k.first_head, row));
  });
}

// ---------------------------------------------------------------------- gradients of key and value

/// What a block of key_gradients works on: keys of one key/value head.
struct KeyBlock {
  uint32_t b, kv_head, first_key, first_column;
  Visibility visibility;
};

SDPA_DEVICE KeyBlock key_block(const BackwardCall& g, uint32_t number, uint32_t keys_per_block,
                               uint32_t columns) {
  const Call& call = g.forward.call;
  const uint32_t heads = call.problem.kv_heads;
  KeyBlock k;
  k.first_key = number % g.key_blocks * keys_per_block;  // the first are seen most
  number /= g.key_blocks;
  k.first_column = number % g.chunks * columns;
  number /= g.chunks;
  k.kv_head = number % heads;
  k.b = number / heads;
  k.visibility = visibility_of(call.problem, call.inputs, k.b);
  return k;
}

/// score_of for 16 keys by some queries of a head, arrays of the caller's.
template <typename S>
SDPA_OUTLINE void score_keys(const BackwardCall& g, const KeyBlock& k, uint32_t first_key,
                             uint32_t head, uint32_t first_query, float (*scores)[4],
                             float (*slopes)[4]) {
  const Call& call = g.forward.call;
  const Problem& p = call.problem;
  const MaskView mask = MaskView::of(call, k.b);
  SDPA_NO_UNROLL
  for (uint32_t i = 0; i < 4 * S::kKeyTiles; ++i) {
    const uint32_t query = first_query + i / 4 * 8 + 2 * (lane_index() % 4) + i % 2;
    const uint32_t key = first_key + lane_index() / 4 + i % 4 / 2 * 8;
    const KeyRange range = visible_keys(k.visibility, query);
    const bool seen = query < p.query_length && key >= range.begin && key < range.end;
    float& score = scores[i / 4][i % 4];
    score = score_of(call, mask, score, head, query, key, seen, &slopes[i / 4][i % 4]);
  }
}

/// For the warp's 16 keys and a tile of queries of a head: what query_tile gives, transposed.
template <typename S>
SDPA_DEVICE void key_tile(const BackwardCall& g, const KeyBlock& k, uint32_t warp_key,
                          uint32_t head, uint32_t first_query, bool all_seen, bool careful,
                          const BackwardTiles<S>& tiles, ScoreFragment<S>& weights,
                          ScoreFragment<S>& grads) {
  const Call& call = g.forward.call;
  const Problem& p = call.problem;
  const uint32_t first_key = k.first_key + warp_key, t = lane_index() % 4;
  KeepTransposed<S::kKeyTiles> keep{0};
  const bool drops_scores = call.drops(Placement::scores);
  const bool drops_weights = call.drops(Placement::weights);
  if (drops_scores || drops_weights) {
    keep = draw_transposed<S::kKeyTiles>(call, k.b, head, first_query, first_key);
  }
  const auto gather = [&](const void* data, uint32_t width, uint32_t s,
                          uint32_t(&a)[S::kTerms][4]) {
    const Rows rows =
        key_side_rows(call, data, width, k.b, k.kv_head, k.first_key, p.key_length - k.first_key);
    gather_a<S::kHalf>(a, s, [&](int half, uint32_t column) {
      const uint32_t row = warp_key + lane_index() / 4 + 8 * half;
      return row < rows.count && column < width ? rows.at(row, column) : 0.0f;
    });
  };
  multiply_tile<S>(
      p.head_dim,
      [&](int, uint32_t s, uint32_t(&a)[S::kTerms][4]) {
        if constexpr (S::kWide) {
          gather(call.inputs.key, p.head_dim, s, a);
        } else {
          tiles.owned.load_a(a, warp_key, s);
        }
      },
      tiles.tile, weights);
  if (careful) {
    const Rows keys = key_rows(call, k.b, k.kv_head, k.first_key, p.key_length - k.first_key);
    const QueryRows queries = query_rows(call, k.b, head, first_query, S::kKeys);
    repair_tile<S>(keys, warp_key, queries, weights);
  }
  float slopes[S::kKeyTiles][4];
  if (all_seen && p.mask_type == MaskType::none && p.softcap == 0) {
    SDPA_UNROLL
    for (int j = 0; j < S::kKeyTiles; ++j) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) weights[0][j][e] *= call.product_scale();
    }
  } else {
    float copy[S::kKeyTiles][4];
    copy_fragment(weights[0], copy);
    score_keys<S>(g, k, first_key, head, first_query, copy, slopes);
    copy_fragment(copy, weights[0]);
  }
  const size_t row = flat_row(p, k.b, head, 0);
  const auto query_of = [&](int j, int e) {
    const uint32_t query = first_query + 8 * j + 2 * t + e % 2;
    return row + (query < p.query_length ? query : p.query_length - 1);
  };
  SDPA_UNROLL
  for (int j = 0; j < S::kKeyTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) {
      float& weight = weights[0][j][e];
      if (drops_scores && !keep.keeps(j, e)) weight = -SDPA_INFINITY;
      weight = weight_from_lse(weight, g.tensors.lse[query_of(j, e)]);
    }
  }
  multiply_tile<S>(
      p.value_dim,
      [&](int, uint32_t s, uint32_t(&a)[S::kTerms][4]) {
        if constexpr (S::kWide) {
          gather(call.inputs.value, p.value_dim, s, a);
        } else {
          tiles.owned_values.load_a(a, warp_key, s);
        }
      },
      tiles.tile_values, grads);
  differentiate_softmax(
      call, [&](int j, int e) { return g.delta[query_of(j, e)]; },
      [&](int j, int e) { return !drops_weights || keep.keeps(j, e); }, weights[0], grads[0]);
  if (p.softcap > 0) differentiate_softcap(slopes, grads[0]);
}

template <typename S>
using KeySums = float[S::kKeyColumns / 8][4];

/// sums += operand . columns `first_column` on of the tile.
template <typename S>
SDPA_DEVICE void multiply_columns(const uint32_t (&operand)[S::kKeys / 16][S::kWeightTerms][4],
                                  const typename S::KeyTile& tile, uint32_t first_column,
                                  uint32_t width, KeySums<S>& sums) {
  const float one[2] = {1.0f, 1.0f};
  if (first_column < width) {
    multiply_rows(operand, tile, width - first_column, one, sums, first_column / 16);
  }
}

/// Adds a tile of queries of a head to the sums.
template <typename S>
SDPA_DEVICE void add_queries(const BackwardCall& g, const KeyBlock& k, uint32_t warp_key,
                             uint32_t head, uint32_t first_query, bool all_seen, bool careful,
                             const BackwardTiles<S>& tiles, KeySums<S>& grad_key,
                             KeySums<S>& grad_value) {
  const Call& call = g.forward.call;
  const Problem& p = call.problem;
  const QueryRows queries = query_rows(call, k.b, head, first_query, S::kKeys);
  const KeptRows grad_outputs = grad_output_rows(g, k.b, head, first_query, S::kKeys);
  sync_block();  // all have read the tiles before
  tiles.tile.load(queries, 0);
  tiles.tile_values.load(grad_outputs.rows, 0);
  commit_copies();
  wait_copies<0>();
  sync_block();
  if (call.drops(Placement::context)) {
    drop_channels(tiles.tile_values, grad_outputs);
    sync_block();
  }
  ScoreFragment<S> weights, grads;
  key_tile<S>(g, k, warp_key, head, first_query, all_seen, careful, tiles, weights, grads);
  uint32_t weight_operand[S::kKeys / 16][S::kWeightTerms][4];
  uint32_t grad_operand[S::kKeys / 16][S::kWeightTerms][4];
  SDPA_UNROLL
  for (int j = 0; j < S::kKeyTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) weights[0][j][e] *= S::kRaise;
  }
  to_operand<S::kHalf>(weights[0], weight_operand);
  to_operand<S::kHalf>(grads[0], grad_operand);
  if (careful) {
    sync_block();
    tiles.tile.clear_nonfinite();
    tiles.tile_values.clear_nonfinite();
    sync_block();
  }
  multiply_columns<S>(weight_operand, tiles.tile_values, k.first_column, p.value_dim, grad_value);
  multiply_columns<S>(grad_operand, tiles.tile, k.first_column, p.head_dim, grad_key);
  if (careful) {
    add_nonfinite_rows<S::kHalf>(weight_operand, grad_outputs, k.first_column, grad_value);
    add_nonfinite_rows<S::kHalf>(grad_operand, queries, k.first_column, grad_key);
  }
}

template <typename S>
SDPA_KERNEL(S::kThreads, 1)
key_gradients(const SDPA_PARAMETER BackwardCall g) {
  const Call& call = g.forward.call;
  const Problem& p = call.problem;
  const uint32_t warps = thread_count() / kLanes, warp_key = warp_index() * S::kRowsPerWarp;
  const uint32_t keys = warps * S::kRowsPerWarp, group = p.query_heads / p.kv_heads;
  const KeyBlock k = key_block(g, block_index().x, keys, S::kKeyColumns);
  const size_t unit = size_t{k.b} * p.kv_heads + k.kv_head;
  if (!is_wanted(g.key_states, unit, p.key_length, k.first_key, keys)) return;
  const BackwardTiles<S> tiles = BackwardTiles<S>::of(warps);
  if (!S::kWide) {
    tiles.owned.load(key_rows(call, k.b, k.kv_head, k.first_key, keys), 0);
    tiles.owned_values.load(value_rows(call, k.b, k.kv_head, k.first_key, keys), 0);
    commit_copies();
  }
  KeySums<S> grad_key, grad_value;
  // A NaN may have come from a query that does not see its key: 0 * NaN is NaN.
  for (bool careful = false;; careful = true) {
    clear(grad_key);
    clear(grad_value);
    SDPA_NO_UNROLL
    for (uint32_t i = 0; i < group; ++i) {
      SDPA_NO_UNROLL
      for (uint32_t first = 0; first < p.query_length; first += S::kKeys) {
        const uint32_t left = p.query_length - first;
        const uint32_t last = first + (left < S::kKeys ? left : S::kKeys) - 1;
        const SeenByRun seen = seen_by_run(k.visibility, first, last);
        if (seen.any.end <= k.first_key || seen.any.begin >= k.first_key + keys) continue;
        const bool all =
            left >= S::kKeys && seen.all.begin <= k.first_key && k.first_key + keys <= seen.all.end;
        add_queries<S>(g, k, warp_key, k.kv_head * group + i, first, all, careful, tiles, grad_key,
                       grad_value);
      }
    }
    if (careful || !sync_block_or(any_nan(grad_key) || any_nan(grad_value))) break;
  }
  wait_copies<0>();  // where no tile was seen
  const auto row_of = [&](uint32_t width) {
    return [&, width](int h) {
      const uint32_t key = k.first_key + warp_key + 8 * h + lane_index() / 4;
      if (key >= p.key_length || !is_wanted_row(g.key_states, unit, p.key_length, key)) {
        return int64_t{-1};
      }
      return int64_t(row_offset(p.layout, p.kv_heads, p.key_length, width, k.b, k.kv_head, key));
    };
  };
  store_gradient(p.type, g.tensors.grad_key, k.first_column, p.head_dim, call.product_scale(),
                 grad_key, row_of(p.head_dim));
  store_gradient(p.type, g.tensors.grad_value, k.first_column, p.value_dim,
                 call.rescale() / S::kRaise, grad_value, row_of(p.value_dim));
}

}  // namespace sdpa::cuda

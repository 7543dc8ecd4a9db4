// The backward pass on Hopper, arranged as the forward pass of hopper_forward.cuh. A block owns
// rows of two tensors and runs over tiles of two others, which its producer brings: queries and
// their gradients over keys and values, or the other way round. Scores of the next tile are
// multiplied while the gradients of this one are summed.
//
// 16-bit heads to 128 wide are for the kernel of hopper_backward_joint.cuh. Of wider ones, and
// where each tile is summed by itself, registers hold one gradient only, so each has a kernel.
//
// Terms of float16 (hopper_terms.cuh) have not the range of weights and score gradients: in each
// tile, their rows are multiplied by powers of two of their own, and what they were multiplied with
// is taken back as the tile's sum is added.
//
// Takes what the forward kernels take, to narrower heads; what comes out as NaN is for the portable
// kernels to compute again.
#pragma once

#include "cuda/backward.cuh"
#include "cuda/hopper.cuh"
#include "cuda/hopper_terms.cuh"

namespace sdpa::cuda {

// ------------------------------------------------------------------------------------------ shapes

/// Tiles have kTile rows, as many as registers and shared memory allow for. Tensors are of kTerms
/// terms, weights and score gradients of kWeightTerms.
template <Half kHalf_, int kTerms_, int kWeightTerms_, int kWidth_, int kTile_, bool kFresh_>
struct HopperBackwardShape {
  static constexpr Half kHalf = kHalf_;
  static constexpr int kTerms = kTerms_, kWeightTerms = kWeightTerms_, kWidth = kWidth_;
  static constexpr int kTile = kTile_;
  /// Whether each tile is summed by itself, as in the forward pass, and weights are computed with
  /// one rounding more.
  static constexpr bool kFresh = kFresh_;
  /// Whether rows of weights and score gradients are raised to what float16 holds.
  static constexpr bool kRaisesRows = kFresh && kHalf == Half::float16;
  static constexpr uint32_t kGroups = 2;  // warpgroups that compute
  static constexpr uint32_t kThreads = (1 + kGroups) * kGroupThreads;
  static constexpr uint32_t kProducerRegisters = 24, kRegisters = 240;
  static constexpr uint32_t kGroupRows = 64, kRows = kGroups * kGroupRows;
  static constexpr uint32_t kStages = 2;
  /// Where rows are not raised, weights that multiply gradients of the output are computed times
  /// 2^kWeightShift, as ever.
  static constexpr float kWeightShift = kHalf == Half::float16 && !kRaisesRows ? 14 : 0;
  static constexpr float kRaise = kWeightShift > 0 ? 1 << int(kWeightShift) : 1;

  /// Columns of a fresh sum: registers hold no whole second one of the widest heads.
  static constexpr int kFreshColumns = kWidth > 128 ? 32 : kWidth;

  using Tile = TermTile<kTerms, kWidth>;
  static constexpr size_t kOwnedBytes = Tile::bytes(kRows), kTileBytes = Tile::bytes(kTile);
  /// The sums of a tile of queries, and where rows are raised, the factors of their head.
  static constexpr size_t kSumBytes = (kTile / 2 + kRaisesRows) * sizeof(Vector16);
  static constexpr size_t kSumsAt = 2 * kOwnedBytes + kStages * 2 * kTileBytes;
  static constexpr size_t kBarriersAt = kSumsAt + kStages * kSumBytes;
  static constexpr size_t kSharedBytes = kBarriersAt + (1 + 3 * kStages) * sizeof(Barrier);
};

/// What terms are multiplied by, or 0: [batch, heads] of each tensor; null: tensors are no terms.
struct BackwardFactors {
  const float *query, *grad_output, *key, *value;
};

/// Tensors are named as in BackwardTiles.
struct HopperBackwardCall {
  BackwardCall backward;
  BackwardFactors factors;
  TensorMap owned, owned_values, tile, tile_values;
  RowState* states;  // of the rows that blocks own, to be written
};

/// What a block keeps in shared memory, and its barriers: tiles are full, a stage is free.
template <typename S>
struct HopperBackwardTiles {
  unsigned char* shared;

  SDPA_DEVICE typename S::Tile owned() const { return {shared, S::kRows}; }
  SDPA_DEVICE typename S::Tile owned_values() const { return {shared + S::kOwnedBytes, S::kRows}; }
  SDPA_DEVICE typename S::Tile tile(uint32_t stage) const {
    return {shared + 2 * S::kOwnedBytes + 2 * stage * S::kTileBytes, S::kTile};
  }
  SDPA_DEVICE typename S::Tile tile_values(uint32_t stage) const {
    return {shared + 2 * S::kOwnedBytes + (2 * stage + 1) * S::kTileBytes, S::kTile};
  }
  /// Of queries 2 * pair and the next of a tile of queries: what is added to their exponents,
  /// twice, and delta / kRaise, twice. They come and go with the queries.
  SDPA_DEVICE Vector16* sums(uint32_t stage) const {
    return reinterpret_cast<Vector16*>(shared + S::kSumsAt + stage * S::kSumBytes);
  }
  /// What goes with the head of a tile of queries: scores, grads, query and grad_output of
  /// HeadFactors.
  SDPA_DEVICE Vector16* factors(uint32_t stage) const { return sums(stage) + S::kTile / 2; }
  SDPA_DEVICE Barrier* owned_full() const {
    return reinterpret_cast<Barrier*>(shared + S::kBarriersAt);
  }
  SDPA_DEVICE Barrier* tile_full(uint32_t stage) const { return owned_full() + 1 + 3 * stage; }
  SDPA_DEVICE Barrier* values_full(uint32_t stage) const { return owned_full() + 2 + 3 * stage; }
  SDPA_DEVICE Barrier* stage_free(uint32_t stage) const { return owned_full() + 3 + 3 * stage; }

  /// By all threads. `writers`: those that add sums to a tile.
  SDPA_DEVICE void init(uint32_t writers) const {
    if (thread_index() == 0) {
      init_barrier(owned_full(), 1);
      for (uint32_t stage = 0; stage < S::kStages; ++stage) {
        init_barrier(tile_full(stage), 1 + writers);
        init_barrier(values_full(stage), 1);
        init_barrier(stage_free(stage), 4 * S::kGroups);  // a warp each
      }
      publish_barriers();
    }
    sync_block();
  }
};

// ---------------------------------------------------------------------------------------- producer

/// Rows of a head of a tensor, from `row` on.
struct HeadRows {
  uint32_t head, row;
};

/// By one thread. `at(i)` says where tile i is.
template <typename S, typename At>
SDPA_DEVICE void bring_sides(const HopperBackwardCall& h, const HopperBackwardTiles<S>& tiles,
                             uint32_t b, HeadRows owned, uint32_t count, const At& at) {
  arrive_and_expect(tiles.owned_full(), 2 * S::kOwnedBytes);
  tiles.owned().copy(h.owned, tiles.owned_full(), owned.row, owned.head, b);
  tiles.owned_values().copy(h.owned_values, tiles.owned_full(), owned.row, owned.head, b);
  SDPA_NO_UNROLL
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t stage = i % S::kStages, turn = i / S::kStages;
    const HeadRows from = at(i);
    if (turn > 0) wait_for(tiles.stage_free(stage), (turn - 1) % 2);
    arrive_and_expect(tiles.tile_full(stage), S::kTileBytes);
    tiles.tile(stage).copy(h.tile, tiles.tile_full(stage), from.row, from.head, b);
    arrive_and_expect(tiles.values_full(stage), S::kTileBytes);
    tiles.tile_values(stage).copy(h.tile_values, tiles.values_full(stage), from.row, from.head, b);
  }
}

// ------------------------------------------------------------------------------ gradients of
// scores

/// Exponents are in units of log2 from the start, or where tiles are summed by themselves, in those
/// of lse until the two have met, so that nothing is rounded before.
template <typename S>
constexpr float kExponentUnit = S::kFresh ? 1.0f : kLog2E;

/// What is added to exponents: -lse. A row without weights has 0, as none of its keys are seen; one
/// that is not finite has NaN, which leaves it to the portable kernels.
template <typename S>
SDPA_DEVICE float exponent_shift(float lse) {
  const float shift = lse == -SDPA_INFINITY ? 0.0f : -lse * kExponentUnit<S>;
  return is_finite(shift) ? shift : SDPA_INFINITY - SDPA_INFINITY;
}

/// Products become exponential(scale * product + shift(j, e)), at most 2^top (see weight_from_lse).
template <typename S, int kTiles, typename Shift>
SDPA_DEVICE void weigh_by_lse(float scale, float top, const Shift& shift,
                              float (&scores)[kTiles][4]) {
  SDPA_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) {
      float exponent = fmaf(scores[j][e], scale, shift(j, e));
      if (S::kFresh) exponent *= kLog2E;
      scores[j][e] = exp2_fast(exponent > top ? top : exponent);
    }
  }
}

/// Clears the weights of columns that the thread's two rows do not see, or are not seen by.
template <int kTiles>
SDPA_DEVICE void clear_unseen(const KeyRange (&seen)[2], uint32_t first_column,
                              float (&weights)[kTiles][4]) {
  SDPA_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) {
      const uint32_t column = first_column + 8 * j + 2 * (lane_index() % 4) + e % 2;
      if (column < seen[e / 2].begin || column >= seen[e / 2].end) weights[j][e] = 0;
    }
  }
}

/// Gradients of dropped weights, not yet rescaled, become those of scores.
template <int kTiles, typename Delta>
SDPA_DEVICE void differentiate_weights(float rescale, const Delta& delta,
                                       const float (&weights)[kTiles][4],
                                       float (&grads)[kTiles][4]) {
  SDPA_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) {
      grads[j][e] = weights[j][e] * fmaf(grads[j][e], rescale, -delta(j, e));
    }
  }
}

/// Multiplies rows by powers of two that bring their largest elements to 2^14 and more, unless they
/// are below 2^-112; `factors` undo it, and are multiplied by `factor`, a power of two.
template <int kTiles>
SDPA_DEVICE void raise_rows(float factor, float (&fragment)[kTiles][4], float (&factors)[2]) {
  SDPA_UNROLL
  for (int h = 0; h < 2; ++h) {
    float top = 0;
    SDPA_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      top = fmaxf(top, fmaxf(fabsf(fragment[j][2 * h]), fabsf(fragment[j][2 * h + 1])));
    }
    const uint32_t largest = to_bits(quad_max(top)) >> 23;
    const uint32_t exponent = largest > 15 ? largest : 15;
    const float raise = from_bits((127 + 127 + 14 - exponent) << 23);
    factors[h] = from_bits((exponent - 14) << 23) * factor;
    SDPA_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      fragment[j][2 * h] *= raise;
      fragment[j][2 * h + 1] *= raise;
    }
  }
}

/// Whether the sums of the thread's upper or lower row are not finite, in any lane: a NaN, or an
/// infinity that may come from a power of two.
template <int kTiles>
SDPA_DEVICE bool row_is_lost(const float (&sums)[kTiles][4], int half) {
  bool lost = false;
  SDPA_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    lost |= !is_finite(sums[n][2 * half]) | !is_finite(sums[n][2 * half + 1]);
  }
  return quad_max(lost ? 1.0f : 0.0f) > 0;
}

/// Writes the state of a row of a unit of `rows`.
SDPA_DEVICE void store_state(RowState* states, size_t unit, uint32_t rows, uint32_t row,
                             bool lost) {
  if (row < rows && lane_index() % 4 == 0) {
    states[unit * rows + row] = lost ? RowState::nan : RowState::done;
  }
}

/// What products with a head of queries are multiplied by.
struct HeadFactors {
  float query, grad_output, key, value;  // of the tensors' terms

  SDPA_DEVICE static HeadFactors of(const HopperBackwardCall& h, uint32_t b, uint32_t head) {
    const Problem& p = h.backward.forward.call.problem;
    if (!h.factors.query) return {1.0f, 1.0f, 1.0f, 1.0f};
    const size_t q = size_t{b} * p.query_heads + head;
    const size_t kv = size_t{b} * p.kv_heads + head / (p.query_heads / p.kv_heads);
    return {h.factors.query[q], h.factors.grad_output[q], h.factors.key[kv], h.factors.value[kv]};
  }
  /// Whether all four tensors could be written as terms.
  SDPA_DEVICE bool are_fit() const {
    return query != 0 && grad_output != 0 && key != 0 && value != 0;
  }
  /// What makes exponents of products of queries and keys.
  template <typename S>
  SDPA_DEVICE float of_scores(const Call& call) const {
    return call.problem.scale * kExponentUnit<S> * query * key;
  }
  /// What makes gradients of dropped weights of products of gradients and values.
  SDPA_DEVICE float of_grads(const Call& call) const {
    return call.rescale() * grad_output * value;
  }
};

// ---------------------------------------------------------------------------------------- products

/// The tile after tile i. The compiler loses sight of products that begin in a branch, or that are
/// read in the iteration after: those of the last tile begin once more, and all have ended with the
/// iteration.
SDPA_DEVICE uint32_t next_tile(uint32_t i, uint32_t count) { return i + 1 < count ? i + 1 : i; }

/// sums += rows . tile, whose rows are the depth, beside the products that `begin` begins. `factor`
/// is that of the tile's terms, where rows are raised.
template <typename S, typename Begin>
SDPA_DEVICE void add_tile(float factor, float (&rows)[S::kTile / 8][4],
                          const typename S::Tile& tile, float (&sums)[S::kWidth / 8][4],
                          const Begin& begin) {
  float factors[2] = {1.0f, 1.0f};
  if constexpr (S::kRaisesRows) raise_rows(factor, rows, factors);
  uint32_t operand[S::kTile / 16][S::kWeightTerms][4];
  to_operand<S::kHalf>(rows, operand);
  if constexpr (S::kFresh) {
    float fresh[S::kFreshColumns / 8][4];
    SDPA_UNROLL
    for (int first = 0; first < S::kWidth / 8; first += S::kFreshColumns / 8) {
      const bool is_last = first + S::kFreshColumns / 8 == S::kWidth / 8;
      clear(fresh);
      begin_by_rows<S::kHalf>(operand, tile, false, fresh, 8 * first);
      if (is_last) {
        begin();
        wait_products<1>();
      } else {
        wait_products<0>();
      }
      hold(fresh);
      SDPA_UNROLL
      for (int n = 0; n < S::kFreshColumns / 8; ++n) {
        SDPA_UNROLL
        for (int e = 0; e < 4; ++e) {
          sums[first + n][e] = fmaf(fresh[n][e], factors[e / 2], sums[first + n][e]);
        }
      }
    }
    wait_products<0>();
  } else {
    begin_by_rows<S::kHalf>(operand, tile, true, sums);
    begin();
    wait_products<0>();
    hold(sums);
  }
}

// ------------------------------------------------------------------------------- gradient of query

/// Runs over `count` tiles of keys from `begin` on: leaves grad_query without the scale, for the
/// warp's rows from `warp_row` of the block on.
template <typename S>
SDPA_DEVICE void sum_keys(const BackwardCall& g, const ForwardBlock& k, const HeadFactors& factors,
                          const HopperBackwardTiles<S>& tiles, uint32_t warp_row, uint32_t begin,
                          uint32_t count, float (&sums)[S::kWidth / 8][4]) {
  const Call& call = g.forward.call;
  const float scale = factors.of_scores<S>(call), rescale = factors.of_grads(call);
  const bool drops_scores = call.drops(Placement::scores);
  const bool drops_weights = call.drops(Placement::weights);
  const uint32_t group_row = warp_row / S::kGroupRows * S::kGroupRows;
  float lse[2], delta[2], shift[2];
  load_row_sums(g, k, warp_row, lse, delta);
  uint32_t query[2];
  KeyRange seen[2];
  SDPA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const uint32_t row = k.first_row + warp_row + 8 * h + lane_index() / 4;
    query[h] = row < g.forward.rows ? row : g.forward.rows - 1;
    seen[h] = visible_keys(k.visibility, query[h]);
    shift[h] = exponent_shift<S>(lse[h]);
  }
  float weights[S::kTile / 8][4], grads[S::kTile / 8][4];
  KeepWords<S::kTile / 8> keep{};
  clear(weights);
  clear(grads);
  const auto begin_scores = [&](uint32_t i) {
    const uint32_t stage = i % S::kStages;
    wait_for(tiles.tile_full(stage), i / S::kStages % 2);
    begin_by_columns<S::kHalf>(tiles.owned(), group_row, tiles.tile(stage), weights);
    if (drops_scores || drops_weights) {
      keep.draw(call, k.b, k.first_head, query, begin + i * S::kTile);
    }
  };
  wait_for(tiles.owned_full(), 0);
  begin_scores(0);
  wait_products<0>();
  hold(weights);
  SDPA_NO_UNROLL
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t stage = i % S::kStages, first = begin + i * S::kTile;
    wait_for(tiles.values_full(stage), i / S::kStages % 2);
    begin_by_columns<S::kHalf>(tiles.owned_values(), group_row, tiles.tile_values(stage), grads);
    weigh_by_lse<S>(
        scale, 0, [&](int, int e) { return shift[e / 2]; }, weights);
    if (first < k.all.begin || first + S::kTile > k.all.end) clear_unseen(seen, first, weights);
    if (drops_scores) drop_words(keep, 0.0f, weights);
    wait_products<0>();
    hold(grads);
    if (drops_weights) drop_words(keep, 0.0f, grads);
    differentiate_weights(
        rescale, [&](int, int e) { return delta[e / 2]; }, weights, grads);
    add_tile<S>(factors.key, grads, tiles.tile(stage), sums,
                [&] { begin_scores(next_tile(i, count)); });
    hold(weights);
    release(tiles.stage_free(stage));
  }
}

template <typename S>
SDPA_KERNEL(S::kThreads, 1)
hopper_query_gradients(const SDPA_PARAMETER HopperBackwardCall h) {
  const BackwardCall& g = h.backward;
  const Problem& p = g.forward.call.problem;
  const ForwardBlock k = forward_block(g.forward, block_index().x, S::kRows, uint32_t{S::kWidth});
  const HeadFactors factors = HeadFactors::of(h, k.b, k.first_head);
  const HopperBackwardTiles<S> tiles{shared_memory()};
  const uint32_t begin = k.any.begin / S::kTile * S::kTile;
  const uint32_t count =
      factors.are_fit() && k.any.begin < k.any.end ? divide_up(k.any.end - begin, S::kTile) : 0;
  tiles.init(0);
  if (group_index() == 0) {
    give_registers<S::kProducerRegisters>();
    if (thread_index() > 0 || count == 0) return;
    bring_sides(h, tiles, k.b, {k.first_head, k.first_row}, count, [&](uint32_t i) {
      return HeadRows{k.kv_head, begin + i * S::kTile};
    });
  } else {
    take_registers<S::kRegisters>();
    const uint32_t warp_row = (warp_index() - 4) * 16;
    float sums[S::kWidth / 8][4];
    clear(sums);
    if (count > 0) sum_keys(g, k, factors, tiles, warp_row, begin, count, sums);
    store_gradient(p.type, g.tensors.grad_query, 0, p.head_dim, p.scale, sums, [&](int half) {
      const uint32_t row = k.first_row + warp_row + 8 * half + lane_index() / 4;
      if (row >= g.forward.rows) return int64_t{-1};
      return int64_t(
          row_offset(p.layout, p.query_heads, p.query_length, p.head_dim, k.b, k.first_head, row));
    });
    SDPA_UNROLL
    for (int half = 0; half < 2; ++half) {
      const uint32_t row = k.first_row + warp_row + 8 * half + lane_index() / 4;
      store_state(h.states, k.unit, g.forward.rows, row,
                  !factors.are_fit() || row_is_lost(sums, half));
    }
  }
}

// ---------------------------------------------------------------------- gradients of key and value

/// The tiles of queries that a block of keys runs over: those of one head after those of another.
struct QueryTiles {
  uint32_t first_head, begin, per_head, count;
  KeyRange all;  // queries that see all keys of the block

  SDPA_DEVICE static QueryTiles of(const Problem& p, const KeyBlock& k, uint32_t keys,
                                   uint32_t tile) {
    const uint32_t group = p.query_heads / p.kv_heads, key_end = k.visibility.key_end;
    const uint32_t end = k.first_key + keys < key_end ? k.first_key + keys : key_end;
    QueryTiles q{k.kv_head * group, 0, 0, 0, {0, 0}};
    if (k.first_key >= end) return q;
    const SeenByRun seen =
        seen_by_run(seen_from_keys(k.visibility, p.query_length), k.first_key, end - 1);
    if (seen.any.begin >= seen.any.end) return q;
    q.begin = seen.any.begin / tile * tile;
    q.per_head = divide_up(seen.any.end - q.begin, tile);
    q.count = group * q.per_head;
    if (end == k.first_key + keys) q.all = seen.all;
    return q;
  }
  SDPA_DEVICE HeadRows at(uint32_t i, uint32_t tile) const {
    return {first_head + i / per_head, begin + i % per_head * tile};
  }
};

/// Brings the sums of tiles of queries. By a warp, a lane for each two queries of which there are.
template <typename S>
SDPA_DEVICE void bring_sums(const HopperBackwardCall& h, const KeyBlock& k,
                            const HopperBackwardTiles<S>& tiles, const QueryTiles& queries) {
  static_assert(S::kTile / 2 <= kLanes);
  const BackwardCall& g = h.backward;
  const Call& call = g.forward.call;
  const Problem& p = call.problem;
  SDPA_NO_UNROLL
  for (uint32_t i = 0; i < queries.count; ++i) {
    const uint32_t stage = i % S::kStages, turn = i / S::kStages;
    const HeadRows from = queries.at(i, S::kTile);
    float shift[2] = {0, 0}, delta[2] = {0, 0};
    SDPA_UNROLL
    for (uint32_t q = 0; q < 2; ++q) {
      const uint32_t query = from.row + 2 * lane_index() + q;
      if (2 * lane_index() >= S::kTile || query >= p.query_length) continue;
      const size_t row = flat_row(p, k.b, from.head, query);
      shift[q] = S::kWeightShift + exponent_shift<S>(g.tensors.lse[row]);
      delta[q] = g.delta[row] * (1 / S::kRaise);
    }
    if (turn > 0) wait_for(tiles.stage_free(stage), (turn - 1) % 2);
    if (2 * lane_index() < S::kTile) {
      store_vector(tiles.sums(stage) + lane_index(),
                   {{to_bits(shift[0]), to_bits(shift[1]), to_bits(delta[0]), to_bits(delta[1])}});
    }
    if (S::kRaisesRows && lane_index() == 0) {
      const HeadFactors f = HeadFactors::of(h, k.b, from.head);
      store_vector(tiles.factors(stage), {{to_bits(f.of_scores<S>(call)), to_bits(f.of_grads(call)),
                                           to_bits(f.query), to_bits(f.grad_output)}});
    }
    arrive(tiles.tile_full(stage));
  }
}

/// Decisions for the warp's keys from `first_key` on and a tile of queries.
template <typename S>
SDPA_DEVICE KeepTransposed<S::kTile / 8> draw_queries(const Call& call, const KeyBlock& k,
                                                      HeadRows tile, uint32_t first_key) {
  return KeepTransposed<S::kTile / 8>::exchange([&](uint32_t column, uint32_t half) {
    const uint32_t query = tile.row + column, last = call.problem.query_length - 1;
    const uint32_t key = dropout_column(call, first_key + 8 * half);
    return drawn_group(call, k.b, tile.head, query < last ? query : last, key / kDecisionsPerCall);
  });
}

/// Which queries see the thread's two keys, from `first_key` on.
SDPA_DEVICE void seen_by_queries(const KeyBlock& k, const Problem& p, uint32_t first_key,
                                 KeyRange (&seen)[2]) {
  SDPA_UNROLL
  for (int half = 0; half < 2; ++half) {
    const uint32_t key = first_key + 8 * half + lane_index() / 4;
    seen[half] = key < k.visibility.key_end
                     ? visible_keys(seen_from_keys(k.visibility, p.query_length), key)
                     : KeyRange{0, 0};
  }
}

/// Turns transposed products of a tile of queries into weights, times kRaise. `sums`: those of the
/// tile, from the thread's own columns on.
template <typename S>
SDPA_DEVICE void weigh_queries(float scale, const QueryTiles& queries, uint32_t first_query,
                               const KeyRange (&seen)[2], const Vector16* sums,
                               float (&scores)[S::kTile / 8][4]) {
  const auto shift = [&](int j, int e) { return from_bits(load_vector(sums + 4 * j).w[e % 2]); };
  weigh_by_lse<S>(scale, S::kWeightShift, shift, scores);
  if (first_query < queries.all.begin || first_query + S::kTile > queries.all.end) {
    clear_unseen(seen, first_query, scores);
  }
}

/// differentiate_weights with the delta of `sums`.
template <typename S>
SDPA_DEVICE void differentiate_queries(float rescale, const Vector16* sums,
                                       const float (&weights)[S::kTile / 8][4],
                                       float (&grads)[S::kTile / 8][4]) {
  const auto delta = [&](int j, int e) {
    return from_bits(load_vector(sums + 4 * j).w[2 + e % 2]);
  };
  differentiate_weights(rescale, delta, weights, grads);
}

/// Runs over the tiles of queries, for the warp's keys from `warp_key` of the block on: leaves
/// grad_key, or grad_value where kOfValues, not yet scaled. Scores are transposed: rows are keys.
template <typename S, bool kOfValues>
SDPA_DEVICE void sum_queries(const BackwardCall& g, const KeyBlock& k,
                             const HopperBackwardTiles<S>& tiles, const QueryTiles& queries,
                             uint32_t warp_key, float (&sums)[S::kWidth / 8][4]) {
  const Call& call = g.forward.call;
  const Problem& p = call.problem;
  // Of scores, of gradients of weights, and of the tensor that is summed.
  float scale = p.scale * kExponentUnit<S>, rescale = call.rescale() * (1 / S::kRaise), factor = 1;
  const bool drops_scores = call.drops(Placement::scores);
  const bool drops_weights = call.drops(Placement::weights);
  const uint32_t group_key = warp_key / S::kGroupRows * S::kGroupRows;
  const uint32_t first_key = k.first_key + warp_key;
  KeyRange seen[2];
  seen_by_queries(k, p, first_key, seen);
  float weights[S::kTile / 8][4], grads[S::kTile / 8][4];
  KeepTransposed<S::kTile / 8> keep{0};
  clear(weights);
  clear(grads);
  const auto begin_scores = [&](uint32_t i) {
    const uint32_t stage = i % S::kStages;
    wait_for(tiles.tile_full(stage), i / S::kStages % 2);
    begin_by_columns<S::kHalf>(tiles.owned(), group_key, tiles.tile(stage), weights);
    if (drops_scores || drops_weights) {
      keep = draw_queries<S>(call, k, queries.at(i, S::kTile), first_key);
    }
  };
  wait_for(tiles.owned_full(), 0);
  begin_scores(0);
  wait_products<0>();
  hold(weights);
  SDPA_NO_UNROLL
  for (uint32_t i = 0; i < queries.count; ++i) {
    const uint32_t stage = i % S::kStages;
    const Vector16* const row_sums = tiles.sums(stage) + lane_index() % 4;
    if constexpr (S::kRaisesRows) {
      const Vector16 factors = load_vector(tiles.factors(stage));
      scale = from_bits(factors.w[0]);
      rescale = from_bits(factors.w[1]);
      factor = from_bits(factors.w[kOfValues ? 3 : 2]);
    }
    wait_for(tiles.values_full(stage), i / S::kStages % 2);
    if constexpr (!kOfValues) {
      begin_by_columns<S::kHalf>(tiles.owned_values(), group_key, tiles.tile_values(stage), grads);
    }
    weigh_queries<S>(scale, queries, queries.at(i, S::kTile).row, seen, row_sums, weights);
    if (drops_scores || (kOfValues && drops_weights)) drop_words(keep, 0.0f, weights);
    if constexpr (!kOfValues) {
      wait_products<0>();
      hold(grads);
      if (drops_weights) drop_words(keep, 0.0f, grads);
      differentiate_queries<S>(rescale, row_sums, weights, grads);
    }
    add_tile<S>(factor, kOfValues ? weights : grads,
                kOfValues ? tiles.tile_values(stage) : tiles.tile(stage), sums,
                [&] { begin_scores(next_tile(i, queries.count)); });
    hold(weights);
    release(tiles.stage_free(stage));
  }
}

/// By the producer's warpgroup.
template <typename S>
SDPA_DEVICE void bring_queries(const HopperBackwardCall& h, const HopperBackwardTiles<S>& tiles,
                               const KeyBlock& k, const QueryTiles& queries) {
  if (thread_index() == 0 && queries.count > 0) {
    bring_sides(h, tiles, k.b, {k.kv_head, k.first_key}, queries.count,
                [&](uint32_t i) { return queries.at(i, S::kTile); });
  } else if (warp_index() == 1) {
    bring_sums(h, k, tiles, queries);
  }
}

/// Writes grad_key or grad_value of the warp's keys.
template <typename S, bool kOfValues>
SDPA_DEVICE void store_key_gradient(const BackwardCall& g, const KeyBlock& k, uint32_t warp_key,
                                    const float (&sums)[S::kWidth / 8][4]) {
  const Call& call = g.forward.call;
  const Problem& p = call.problem;
  const uint32_t width = kOfValues ? p.value_dim : p.head_dim;
  void* const to = kOfValues ? g.tensors.grad_value : g.tensors.grad_key;
  const float factor = kOfValues ? call.rescale() / S::kRaise : p.scale;
  store_gradient(p.type, to, 0, width, factor, sums, [&](int half) {
    const uint32_t key = k.first_key + warp_key + 8 * half + lane_index() / 4;
    if (key >= p.key_length) return int64_t{-1};
    return int64_t(row_offset(p.layout, p.kv_heads, p.key_length, width, k.b, k.kv_head, key));
  });
}

/// Writes the states of the warp's keys, those that are lost alone where `adds`.
SDPA_DEVICE void store_key_states(RowState* states, const Problem& p, const KeyBlock& k,
                                  uint32_t warp_key, bool adds, const bool (&lost)[2]) {
  SDPA_UNROLL
  for (int half = 0; half < 2; ++half) {
    if (adds && !lost[half]) continue;
    store_state(states, size_t{k.b} * p.kv_heads + k.kv_head, p.key_length,
                k.first_key + warp_key + 8 * half + lane_index() / 4, lost[half]);
  }
}

/// Whether the terms of all heads that share the block's keys are fit.
SDPA_DEVICE bool heads_are_fit(const HopperBackwardCall& h, const KeyBlock& k) {
  const Problem& p = h.backward.forward.call.problem;
  const uint32_t group = p.query_heads / p.kv_heads;
  bool fit = true;
  SDPA_NO_UNROLL
  for (uint32_t i = 0; i < group; ++i) {
    fit &= HeadFactors::of(h, k.b, k.kv_head * group + i).are_fit();
  }
  return fit;
}

/// The kernel of values is the first of the two: it writes all states, the other adds to them.
template <typename S, bool kOfValues>
SDPA_KERNEL(S::kThreads, 1)
hopper_key_gradients(const SDPA_PARAMETER HopperBackwardCall h) {
  const BackwardCall& g = h.backward;
  const Problem& p = g.forward.call.problem;
  const KeyBlock k = key_block(g, block_index().x, S::kRows, S::kWidth);
  const HopperBackwardTiles<S> tiles{shared_memory()};
  const bool fit = heads_are_fit(h, k);
  QueryTiles queries = QueryTiles::of(p, k, S::kRows, S::kTile);
  if (!fit) queries.count = 0;
  tiles.init(kLanes);
  if (group_index() == 0) {
    give_registers<S::kProducerRegisters>();
    bring_queries(h, tiles, k, queries);
  } else {
    take_registers<S::kRegisters>();
    const uint32_t warp_key = (warp_index() - 4) * 16;
    float sums[S::kWidth / 8][4];
    clear(sums);
    if (queries.count > 0) sum_queries<S, kOfValues>(g, k, tiles, queries, warp_key, sums);
    store_key_gradient<S, kOfValues>(g, k, warp_key, sums);
    const bool lost[2] = {!fit || row_is_lost(sums, 0), !fit || row_is_lost(sums, 1)};
    store_key_states(h.states, p, k, warp_key, !kOfValues, lost);
  }
}

}  // namespace sdpa::cuda

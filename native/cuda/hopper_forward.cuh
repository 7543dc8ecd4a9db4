// The forward pass on Hopper: a producer warp keeps tiles of keys and values coming by the tensor
// copy engine, and each other warpgroup owns 64 rows of queries, whose scores for one tile are
// multiplied while the weights of the tile before meet its values (the arrangement of
// FlashAttention-3, Shah et al., arXiv 2407.08608).
//
// Takes tensors of 16 bits without a mask, and float32 ones as terms of float16 (hopper_terms.cuh);
// the portable kernels take the rest, and the rows that these leave to them.
//
// A NaN may have come from a value that its row does not see: 0 * NaN is NaN. A second, careful
// kernel computes blocks with a NaN again, with values that are not finite taken out of the tiles
// and added by hand where their weight is not 0. Rows that do not see them come out with the same
// bits.
#pragma once

#include "cuda/hopper.cuh"
#include "cuda/hopper_terms.cuh"

namespace sdpa::cuda {

constexpr float kLn2 = 0.693147181f;

// ------------------------------------------------------------------------------------------ shapes

/// Names as in ForwardShape, as far as functions of forward.cuh ask for them.
template <Half kHalf_, int kTerms_, int kWeightTerms_, int kWidth_>
struct HopperShape {
  static constexpr Half kHalf = kHalf_;
  static constexpr int kTerms = kTerms_, kWeightTerms = kWeightTerms_, kWidth = kWidth_;
  static constexpr int kColumns = kWidth, kRowSets = 1;
  /// Where operands are split, each tile is summed by itself and added in float32 (forward.cuh); of
  /// the widest heads, which are of 16 bits, registers hold no second sum.
  static constexpr bool kFresh = kWeightTerms > 1 && kWidth <= 128;
  static constexpr int kKeys = kFresh || kWidth > 128 ? 64 : 128;
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr float kWeightShift = kHalf == Half::float16 ? 14 : 0;
  /// Warpgroups that compute; registers bound them.
  static constexpr uint32_t kGroups = kWidth > 64 ? 2 : 3;
  static constexpr uint32_t kThreads = (1 + kGroups) * kGroupThreads;
  static constexpr uint32_t kProducerRegisters = kGroups == 2 ? 24 : 32;
  static constexpr uint32_t kRegisters = kGroups == 2 ? 240 : 160;
  static constexpr uint32_t kGroupRows = 64, kRows = kGroups * kGroupRows;
  static constexpr uint32_t kStages = 2;
  /// Whether warpgroups begin their products in turns: of three the scheduler always finds one, and
  /// they have no registers left for it.
  static constexpr bool kTakesTurns = kGroups == 2;

  using Tile = TermTile<kTerms, kWidth>;
  static constexpr size_t kQueryBytes = Tile::bytes(kRows), kTileBytes = Tile::bytes(kKeys);
  static constexpr size_t kSharedBytes =
      kQueryBytes + 2 * kStages * kTileBytes + (1 + 4 * kStages) * sizeof(Barrier);
};

/// What terms are multiplied by, or 0: [batch, heads] of each tensor; null: tensors are no terms.
struct ForwardFactors {
  const float *query, *key, *value;
};

struct HopperCall {
  ForwardCall forward;
  TensorMap query, key, value;  // terms of a head one after the other, as heads
  ForwardFactors factors;
  RowState* states;  // as ForwardCall's, to be written
};

/// What a block keeps in shared memory. Barriers come in pairs: a tile is full, a tile is free.
template <typename S>
struct HopperTiles {
  unsigned char* shared;

  SDPA_DEVICE typename S::Tile queries() const { return {shared, S::kRows}; }
  SDPA_DEVICE typename S::Tile keys(uint32_t stage) const { return tile(2 * stage); }
  SDPA_DEVICE typename S::Tile values(uint32_t stage) const { return tile(2 * stage + 1); }
  SDPA_DEVICE Barrier* queries_full() const {
    return reinterpret_cast<Barrier*>(shared + S::kQueryBytes + 2 * S::kStages * S::kTileBytes);
  }
  SDPA_DEVICE Barrier* keys_full(uint32_t stage) const { return queries_full() + 1 + 4 * stage; }
  SDPA_DEVICE Barrier* keys_free(uint32_t stage) const { return queries_full() + 2 + 4 * stage; }
  SDPA_DEVICE Barrier* values_full(uint32_t stage) const { return queries_full() + 3 + 4 * stage; }
  SDPA_DEVICE Barrier* values_free(uint32_t stage) const { return queries_full() + 4 + 4 * stage; }

  SDPA_DEVICE void init() const {
    init_barrier(queries_full(), 1);
    for (uint32_t stage = 0; stage < S::kStages; ++stage) {
      init_barrier(keys_full(stage), 1);
      init_barrier(values_full(stage), 1);
      init_barrier(keys_free(stage), 4 * S::kGroups);  // a warp each
      init_barrier(values_free(stage), 4 * S::kGroups);
    }
  }

 private:
  SDPA_DEVICE typename S::Tile tile(uint32_t number) const {
    return {shared + S::kQueryBytes + number * S::kTileBytes, S::kKeys};
  }
};

// ---------------------------------------------------------------------------------------- producer

/// By one thread.
template <typename S>
SDPA_DEVICE void bring_tiles(const HopperCall& h, const ForwardBlock& k,
                             const HopperTiles<S>& tiles, uint32_t begin, uint32_t count) {
  arrive_and_expect(tiles.queries_full(), S::kQueryBytes);
  tiles.queries().copy(h.query, tiles.queries_full(), k.first_row, k.first_head, k.b);
  SDPA_NO_UNROLL
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t stage = i % S::kStages, turn = i / S::kStages, key = begin + i * S::kKeys;
    if (turn > 0) wait_for(tiles.keys_free(stage), (turn - 1) % 2);
    arrive_and_expect(tiles.keys_full(stage), S::kTileBytes);
    tiles.keys(stage).copy(h.key, tiles.keys_full(stage), key, k.kv_head, k.b);
    if (turn > 0) wait_for(tiles.values_free(stage), (turn - 1) % 2);
    arrive_and_expect(tiles.values_full(stage), S::kTileBytes);
    tiles.values(stage).copy(h.value, tiles.values_full(stage), key, k.kv_head, k.b);
  }
}

// --------------------------------------------------------------------------------------- consumers

template <typename S>
using Context = float[S::kColumns / 8][4];
template <typename S>
using WeightOperand = uint32_t[S::kKeys / 16][S::kWeightTerms][4];

/// What a thread of a consumer holds of its two rows.
template <typename S>
struct HopperRows {
  uint32_t head, query[2];
  KeyRange seen[2];
  Context<S> context;
  float shift[2], sum[2];  // of exponents, in units of log2; -infinity: no key so far
  float kept[2];           // the sum of what weights dropout keeps, where tracks_kept
};

/// context += weights . values of one tile, begun; `fresh` is set instead where S::kFresh.
template <typename S>
SDPA_DEVICE void begin_context(const HopperTiles<S>& tiles, uint32_t stage,
                               WeightOperand<S>& weights, Context<S>& context, Context<S>& fresh) {
  begin_by_rows<S::kHalf>(weights, tiles.values(stage), !S::kFresh, S::kFresh ? fresh : context);
}

/// Waits for what begin_context began, and adds what is fresh.
template <typename S>
SDPA_DEVICE void end_context(Context<S>& context, Context<S>& fresh) {
  wait_products<0>();
  if constexpr (S::kFresh) {
    hold(fresh);
    SDPA_UNROLL
    for (int n = 0; n < S::kColumns / 8; ++n) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) context[n][e] += fresh[n][e];
    }
  } else {
    hold(context);
  }
}

/// Products become exp2(scale * product - shift), shifts and sums move on. `correction` is what the
/// context so far is to be multiplied by. Every exponent of a row is rounded once, and against the
/// same shift.
template <typename S>
SDPA_DEVICE void weigh(float scale, HopperRows<S>& rows, float (&scores)[S::kKeyTiles][4],
                       float (&correction)[2]) {
  SDPA_UNROLL
  for (int h = 0; h < 2; ++h) {
    float top = -SDPA_INFINITY;
    SDPA_UNROLL
    for (int j = 0; j < S::kKeyTiles; ++j) {
      top = fmaxf(top, fmaxf(scores[j][2 * h], scores[j][2 * h + 1]));
    }
    top = quad_max(top);
    const float shift = fmaxf(rows.shift[h], top == -SDPA_INFINITY ? top : top * scale);
    const float used = shift == -SDPA_INFINITY ? 0.0f : shift;
    correction[h] = exp2_fast(rows.shift[h] - used);
    rows.shift[h] = shift;
    float sum = 0;
    SDPA_UNROLL
    for (int j = 0; j < S::kKeyTiles; ++j) {
      SDPA_UNROLL
      for (int e = 2 * h; e < 2 * h + 2; ++e) {
        scores[j][e] = exp2_fast(fmaf(scores[j][e], scale, S::kWeightShift - used));
        sum += scores[j][e];
      }
    }
    rows.sum[h] = fmaf(rows.sum[h], correction[h], sum);
  }
}

/// Where dropout takes the largest weights of a row, what is left may be too small for float16: its
/// sum tells.
template <typename S>
SDPA_DEVICE bool tracks_kept(const Call& call) {
  return S::kHalf == Half::float16 && call.problem.type == Type::float32 &&
         call.drops(Placement::weights);
}

/// Scores of a tile become weights: exclusions, dropout, softmax.
template <typename S>
SDPA_DEVICE void finish_scores(const ForwardCall& f, const ForwardBlock& k, uint32_t first_key,
                               float scale, const KeepWords<S::kKeyTiles>& keep,
                               HopperRows<S>& rows, float (&scores)[S::kKeyTiles][4],
                               float (&correction)[2]) {
  const bool drops_scores = f.call.drops(Placement::scores);
  if (first_key < k.all.begin || first_key + S::kKeys > k.all.end) {
    SDPA_UNROLL
    for (int j = 0; j < S::kKeyTiles; ++j) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) {
        const uint32_t key = first_key + 8 * j + 2 * (lane_index() % 4) + e % 2;
        const KeyRange seen = rows.seen[e / 2];
        if (key < seen.begin || key >= seen.end) scores[j][e] = -SDPA_INFINITY;
      }
    }
  }
  if (drops_scores) drop_words(keep, -SDPA_INFINITY, scores);
  weigh<S>(scale, rows, scores, correction);
  if (f.call.drops(Placement::weights)) drop_words(keep, 0.0f, scores);
  if (tracks_kept<S>(f.call)) {
    SDPA_UNROLL
    for (int h = 0; h < 2; ++h) {
      float kept = 0;
      SDPA_UNROLL
      for (int i = 0; i < 2 * S::kKeyTiles; ++i) kept += scores[i / 2][2 * h + i % 2];
      rows.kept[h] = fmaf(rows.kept[h], correction[h], kept);
    }
  }
}

/// Takes what is not finite out of a tile of values, for the warpgroup.
template <typename S>
SDPA_DEVICE void clear_nonfinite(const HopperTiles<S>& tiles, uint32_t stage) {
  const uint32_t exponent = S::kHalf == Half::float16 ? 0x7c00 : 0x7f80;
  uint16_t* const data = reinterpret_cast<uint16_t*>(tiles.values(stage).data);
  for (uint32_t i = thread_index() % kGroupThreads; i < S::kTileBytes / 2; i += kGroupThreads) {
    if ((data[i] & exponent) == exponent) data[i] = 0;
  }
  publish_writes();
  sync_group();
}

/// Runs over `count` tiles of keys from `begin` on. `scale` is in units of log2. Warpgroups begin
/// their products in turns: the softmax of one is computed during the products of another.
template <typename S, bool kCareful>
SDPA_DEVICE void attend(const ForwardCall& f, const ForwardBlock& k, const HopperTiles<S>& tiles,
                        uint32_t group, uint32_t begin, uint32_t count, float scale,
                        HopperRows<S>& rows) {
  const Call& call = f.call;
  const bool draws = call.drops(Placement::scores) || call.drops(Placement::weights);
  float scores[S::kKeyTiles][4], correction[2];
  WeightOperand<S> weights;
  Context<S> fresh;
  KeepWords<S::kKeyTiles> keep{};
  const auto begin_scores = [&](uint32_t stage) {
    begin_by_columns<S::kHalf>(tiles.queries(), group * S::kGroupRows, tiles.keys(stage), scores);
  };
  const auto begin_values = [&](uint32_t i) {
    const uint32_t stage = i % S::kStages;
    wait_for(tiles.values_full(stage), i / S::kStages % 2);
    if constexpr (kCareful) clear_nonfinite(tiles, stage);
    begin_context<S>(tiles, stage, weights, rows.context, fresh);
  };
  const auto end_values = [&](uint32_t i) {
    end_context<S>(rows.context, fresh);
    if constexpr (kCareful) {
      const Rows values = value_rows(call, k.b, k.kv_head, begin + i * S::kKeys, S::kKeys);
      add_nonfinite_rows<S::kHalf>(weights, values, 0, rows.context);
    }
  };
  clear(scores);
  if (S::kFresh) clear(fresh);
  wait_for(tiles.queries_full(), 0);
  wait_for(tiles.keys_full(0), 0);
  begin_scores(0);
  if (draws) keep.draw(call, k.b, rows.head, rows.query, begin);
  wait_products<0>();
  hold(scores);
  release(tiles.keys_free(0));
  finish_scores<S>(f, k, begin, scale, keep, rows, scores, correction);
  to_operand<S::kHalf>(scores, weights);
  constexpr bool kTakesTurns = S::kTakesTurns && !kCareful;
  if (kTakesTurns && group + 1 == S::kGroups) pass_turn<S::kGroups>();
  SDPA_NO_UNROLL
  for (uint32_t i = 1; i < count; ++i) {
    const uint32_t stage = i % S::kStages;
    if constexpr (kTakesTurns) take_turn();
    wait_for(tiles.keys_full(stage), i / S::kStages % 2);
    begin_scores(stage);
    begin_values(i - 1);
    if constexpr (kTakesTurns) pass_turn<S::kGroups>();
    if (draws) keep.draw(call, k.b, rows.head, rows.query, begin + i * S::kKeys);
    wait_products<1>();
    hold(scores);
    release(tiles.keys_free(stage));
    finish_scores<S>(f, k, begin + i * S::kKeys, scale, keep, rows, scores, correction);
    end_values(i - 1);
    release(tiles.values_free((i - 1) % S::kStages));
    SDPA_UNROLL
    for (int n = 0; n < S::kColumns / 8; ++n) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) rows.context[n][e] *= correction[e / 2];
    }
    to_operand<S::kHalf>(scores, weights);
  }
  begin_values(count - 1);
  end_values(count - 1);
}

/// Divides by the sum, rescales and drops for dropout, writes the output and lse.
template <typename S, bool kCareful>
SDPA_DEVICE void store_rows(const HopperCall& c, const ForwardBlock& k, uint32_t first_row,
                            float value_factor, HopperRows<S>& rows) {
  const ForwardCall& f = c.forward;
  const Call& call = f.call;
  const Problem& p = call.problem;
  constexpr float kLower = S::kWeightShift > 0 ? 1.0f / (1 << int(S::kWeightShift)) : 1.0f;
  const uint32_t t = lane_index() % 4;
  if (call.drops(Placement::context)) {
    KeepWords<S::kColumns / 8> keep;
    keep.draw(call, k.b, rows.head, rows.query, 0);
    drop_words(keep, 0.0f, rows.context);
  }
  SDPA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const uint32_t row = first_row + 8 * h + lane_index() / 4;
    const float sum = quad_sum(rows.sum[h]);
    const float kept = tracks_kept<S>(call) ? quad_sum(rows.kept[h]) : 0.0f;
    // Infinite scores of split operands may be NaN instead.
    bool nan = is_nan(sum) && !(kCareful && S::kTerms == 1);
    SDPA_UNROLL
    for (int n = 0; n < S::kColumns / 8; ++n) {
      nan |= !kCareful && (is_nan(rows.context[n][2 * h]) || is_nan(rows.context[n][2 * h + 1]));
    }
    nan = quad_max(nan ? 1.0f : 0.0f) > 0;
    if (row >= f.rows) continue;
    // Weights are times 2^14: with a sum below 1 float16 has too few bits for the largest of them.
    RowState state = kept > 0 && kept < 1 ? RowState::out_of_range : RowState::done;
    if (nan) state = RowState::nan;
    if (t == 0) c.states[size_t{k.unit} * f.rows + row] = state;
    const size_t at = row_offset(p.layout, p.query_heads, p.query_length, p.value_dim, k.b,
                                 rows.head, rows.query[h]);
    const float factor = context_factor(call, sum) * value_factor;
    SDPA_UNROLL
    for (int n = 0; n < S::kColumns / 8; ++n) {
      const float x = rows.context[n][2 * h] * factor, y = rows.context[n][2 * h + 1] * factor;
      store_pair(p.type, f.outputs.output, at, 8 * n + 2 * t, p.value_dim, x, y);
    }
    if (f.outputs.lse && t == 0) {
      f.outputs.lse[flat_row(p, k.b, rows.head, rows.query[h])] =
          sum == 0 ? -SDPA_INFINITY : fmaf(rows.shift[h], kLn2, logf(sum * kLower));
    }
  }
}

/// What the products of a block are multiplied by.
struct BlockFactors {
  float scores, values;
  bool is_fit;  // whether all three tensors could be written as terms

  SDPA_DEVICE static BlockFactors of(const HopperCall& c, const ForwardBlock& k) {
    const Problem& p = c.forward.call.problem;
    const float scale = p.scale * kLog2E;
    if (!c.factors.query) return {scale, 1.0f, true};
    const size_t kv = size_t{k.b} * p.kv_heads + k.kv_head;
    const float query = c.factors.query[size_t{k.b} * p.query_heads + k.first_head];
    const float key = c.factors.key[kv], value = c.factors.value[kv];
    return {scale * query * key, value, query != 0 && key != 0 && value != 0};
  }
};

/// Whether a row of the block came out as NaN. All threads of the block take part.
template <typename S>
SDPA_DEVICE bool has_nan(const HopperCall& c, const ForwardBlock& k) {
  const uint32_t row = k.first_row + thread_index();
  const RowState* const states = c.states + size_t{k.unit} * c.forward.rows;
  const bool own = thread_index() < S::kRows && row < c.forward.rows;
  return sync_block_or(own && states[row] == RowState::nan);
}

/// Leaves the warp's sixteen rows to others.
SDPA_DEVICE void leave_rows(const HopperCall& c, const ForwardBlock& k, uint32_t first_row) {
  const uint32_t row = first_row + lane_index();
  if (lane_index() >= 16 || row >= c.forward.rows) return;
  c.states[size_t{k.unit} * c.forward.rows + row] = RowState::out_of_range;
}

template <typename S, bool kCareful>
SDPA_KERNEL(S::kThreads, 1)
hopper_forward_kernel(const SDPA_PARAMETER HopperCall c) {
  const ForwardCall& f = c.forward;
  const ForwardBlock k = forward_block(f, block_index().x, S::kRows, S::kColumns);
  if (kCareful && !has_nan<S>(c, k)) return;
  const BlockFactors factors = BlockFactors::of(c, k);
  const HopperTiles<S> tiles{shared_memory()};
  const uint32_t begin = k.any.begin / S::kKeys * S::kKeys;
  const uint32_t count =
      factors.is_fit && k.any.begin < k.any.end ? divide_up(k.any.end - begin, S::kKeys) : 0;
  if (thread_index() == 0) {
    tiles.init();
    publish_barriers();
  }
  sync_block();
  if (group_index() == 0) {
    give_registers<S::kProducerRegisters>();
    if (thread_index() == 0 && count > 0) bring_tiles<S>(c, k, tiles, begin, count);
  } else {
    take_registers<S::kRegisters>();
    const uint32_t group = group_index() - 1;
    const uint32_t first_row = k.first_row + group * S::kGroupRows + warp_index() % 4 * 16;
    if (!factors.is_fit) return leave_rows(c, k, first_row);
    HopperRows<S> rows;
    rows.head = k.first_head;
    SDPA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const uint32_t row = first_row + 8 * h + lane_index() / 4;
      rows.query[h] = row < f.rows ? row : f.rows - 1;
      rows.seen[h] = visible_keys(k.visibility, rows.query[h]);
      rows.shift[h] = -SDPA_INFINITY;
      rows.sum[h] = rows.kept[h] = 0;
    }
    clear(rows.context);
    if (count > 0) attend<S, kCareful>(f, k, tiles, group, begin, count, factors.scores, rows);
    store_rows<S, kCareful>(c, k, first_row, factors.values, rows);
  }
}

}  // namespace sdpa::cuda

// The forward pass on Hopper: a producer warp keeps tiles of keys and values coming by the tensor
// copy engine, and each other warpgroup owns 64 rows of queries, whose scores for one tile are
// multiplied while the weights of the tile before meet its values (the arrangement of
// FlashAttention-3, Shah et al., arXiv 2407.08608).
//
// Takes single products of 16-bit tensors without a mask; the portable kernels take the rest, and
// compute again what comes out as NaN (see forward.cuh on values that are not finite).
#pragma once

#include "cuda/forward.cuh"
#include "cuda/group.cuh"

namespace sdpa::cuda {

constexpr float kLn2 = 0.693147181f;

// ------------------------------------------------------------------------------------------ shapes

/// Names as in ForwardShape, as far as functions of forward.cuh ask for them.
template <Half kHalf_, int kWidth_>
struct HopperShape {
  static constexpr Half kHalf = kHalf_;
  static constexpr int kTerms = 1, kWeightTerms = 1, kWidth = kWidth_, kColumns = kWidth_;
  static constexpr int kRowSets = 1;
  static constexpr int kKeys = kWidth > 128 ? 64 : 128;
  static constexpr int kKeyTiles = kKeys / 8;
  static constexpr float kWeightShift = kHalf == Half::float16 ? 14 : 0;
  /// Warpgroups that compute; registers bound them.
  static constexpr uint32_t kGroups = kWidth > 64 ? 2 : 3;
  static constexpr uint32_t kThreads = (1 + kGroups) * kGroupThreads;
  static constexpr uint32_t kProducerRegisters = kGroups == 2 ? 24 : 32;
  static constexpr uint32_t kRegisters = kGroups == 2 ? 240 : 160;
  static constexpr uint32_t kGroupRows = 64, kRows = kGroups * kGroupRows;
  static constexpr uint32_t kStages = 2;

  static constexpr size_t kQueryBytes = PanelTile::bytes(kRows, kWidth);
  static constexpr size_t kTileBytes = PanelTile::bytes(kKeys, kWidth);
  static constexpr size_t kSharedBytes =
      kQueryBytes + 2 * kStages * kTileBytes + (1 + 4 * kStages) * sizeof(Barrier);
};

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

struct HopperCall {
  ForwardCall forward;
  TensorMap query, key, value;
  uint8_t* has_nan;  // as ForwardCall's, to be written
};

/// What a block keeps in shared memory. Barriers come in pairs: a tile is full, a tile is free.
template <typename S>
struct HopperTiles {
  unsigned char* shared;

  SDPA_DEVICE PanelTile queries() const { return {shared, S::kRows}; }
  SDPA_DEVICE PanelTile keys(uint32_t stage) const {
    return {shared + S::kQueryBytes + 2 * stage * S::kTileBytes, S::kKeys};
  }
  SDPA_DEVICE PanelTile values(uint32_t stage) const {
    return {shared + S::kQueryBytes + (2 * stage + 1) * S::kTileBytes, S::kKeys};
  }
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
};

// ---------------------------------------------------------------------------------------- producer

/// By one thread.
template <typename S>
SDPA_DEVICE void bring_tiles(const HopperCall& h, const ForwardBlock& k,
                             const HopperTiles<S>& tiles, uint32_t begin, uint32_t count) {
  arrive_and_expect(tiles.queries_full(), S::kQueryBytes);
  tiles.queries().copy(h.query, tiles.queries_full(), S::kWidth, k.first_row, k.first_head, k.b);
  SDPA_NO_UNROLL
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t stage = i % S::kStages, turn = i / S::kStages, key = begin + i * S::kKeys;
    if (turn > 0) wait_for(tiles.keys_free(stage), (turn - 1) % 2);
    arrive_and_expect(tiles.keys_full(stage), S::kTileBytes);
    tiles.keys(stage).copy(h.key, tiles.keys_full(stage), S::kWidth, key, k.kv_head, k.b);
    if (turn > 0) wait_for(tiles.values_free(stage), (turn - 1) % 2);
    arrive_and_expect(tiles.values_full(stage), S::kTileBytes);
    tiles.values(stage).copy(h.value, tiles.values_full(stage), S::kWidth, key, k.kv_head, k.b);
  }
}

// ----------------------------------------------------------------------------------------
// consumers

/// What a thread of a consumer holds of its two rows.
template <typename S>
struct HopperRows {
  uint32_t head, query[2];
  KeyRange seen[2];
  float context[S::kColumns / 8][4];
  float shift[2], sum[2];  // of exponents, in units of log2; -infinity: no key so far
};

/// Decisions for a fragment of 8 * kTiles columns, in words of eight tiles each.
template <int kTiles>
struct KeepWords {
  static constexpr int kWords = kTiles / 8;
  KeepFragment<8> words[kWords];

  /// Drawn, never given; columns start where a call of the generator does.
  SDPA_DEVICE void draw(const Call& call, uint32_t b, uint32_t head, const uint32_t (&query)[2],
                        uint32_t first) {
    SDPA_UNROLL
    for (int w = 0; w < kWords; ++w) {
      words[w] = KeepFragment<8>::exchange([&](uint32_t half, uint32_t tile) {
        const uint32_t column = dropout_column(call, first + 64 * w + 8 * tile);
        return drawn_group(call, b, head, half ? query[1] : query[0], column / kDecisionsPerCall);
      });
    }
  }
  SDPA_DEVICE bool keeps(int tile, int element) const {
    return words[tile / 8].keeps(tile % 8, element);
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

SDPA_DEVICE void release(Barrier* barrier) {
  if (lane_index() == 0) arrive(barrier);
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
}

/// Runs over `count` tiles of keys from `begin` on.
template <typename S>
SDPA_DEVICE void attend(const ForwardCall& f, const ForwardBlock& k, const HopperTiles<S>& tiles,
                        uint32_t group, uint32_t begin, uint32_t count, HopperRows<S>& rows) {
  const Call& call = f.call;
  const float scale = call.problem.scale * kLog2E;
  const bool draws = call.drops(Placement::scores) || call.drops(Placement::weights);
  float scores[S::kKeyTiles][4], correction[2];
  uint32_t weights[S::kKeys / 16][1][4];
  KeepWords<S::kKeyTiles> keep{};
  SDPA_UNROLL
  for (int j = 0; j < S::kKeyTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) scores[j][e] = 0;
  }
  const auto begin_scores = [&](uint32_t stage) {
    begin_by_columns<S::kHalf, S::kWidth>(tiles.queries(), group * S::kGroupRows, tiles.keys(stage),
                                          scores);
  };
  wait_for(tiles.queries_full(), 0);
  wait_for(tiles.keys_full(0), 0);
  begin_scores(0);
  if (draws) keep.draw(call, k.b, rows.head, rows.query, begin);
  wait_products<0>();
  hold(scores);
  release(tiles.keys_free(0));
  finish_scores<S>(f, k, begin, scale, keep, rows, scores, correction);
  to_operand<S::kHalf>(scores, weights);
  SDPA_NO_UNROLL
  for (uint32_t i = 1; i < count; ++i) {
    const uint32_t stage = i % S::kStages, before = (i - 1) % S::kStages;
    wait_for(tiles.keys_full(stage), i / S::kStages % 2);
    begin_scores(stage);
    wait_for(tiles.values_full(before), (i - 1) / S::kStages % 2);
    begin_by_rows<S::kHalf>(weights, tiles.values(before), rows.context);
    if (draws) keep.draw(call, k.b, rows.head, rows.query, begin + i * S::kKeys);
    wait_products<1>();
    hold(scores);
    release(tiles.keys_free(stage));
    finish_scores<S>(f, k, begin + i * S::kKeys, scale, keep, rows, scores, correction);
    wait_products<0>();
    hold(rows.context);
    release(tiles.values_free(before));
    SDPA_UNROLL
    for (int n = 0; n < S::kColumns / 8; ++n) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) rows.context[n][e] *= correction[e / 2];
    }
    to_operand<S::kHalf>(scores, weights);
  }
  const uint32_t last = count - 1;
  wait_for(tiles.values_full(last % S::kStages), last / S::kStages % 2);
  begin_by_rows<S::kHalf>(weights, tiles.values(last % S::kStages), rows.context);
  wait_products<0>();
  hold(rows.context);
}

/// Divides by the sum, rescales and drops for dropout, writes the output and lse.
template <typename S>
SDPA_DEVICE void store_rows(const HopperCall& c, const ForwardBlock& k, uint32_t first_row,
                            HopperRows<S>& rows) {
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
  bool nan = false;
  SDPA_UNROLL
  for (int h = 0; h < 2; ++h) {
    const float sum = quad_sum(rows.sum[h]);
    if (first_row + 8 * h + lane_index() / 4 >= f.rows) continue;
    const size_t at = row_offset(p.layout, p.query_heads, p.query_length, p.value_dim, k.b,
                                 rows.head, rows.query[h]);
    const float factor = context_factor(call, sum);
    nan |= is_nan(sum);  // also where dropout leaves nothing of it in the context
    SDPA_UNROLL
    for (int n = 0; n < S::kColumns / 8; ++n) {
      const float x = rows.context[n][2 * h] * factor, y = rows.context[n][2 * h + 1] * factor;
      nan |= is_nan(x) | is_nan(y);
      store_pair(p.type, f.outputs.output, at, 8 * n + 2 * t, p.value_dim, x, y);
    }
    if (f.outputs.lse && t == 0) {
      f.outputs.lse[flat_row(p, k.b, rows.head, rows.query[h])] =
          sum == 0 ? -SDPA_INFINITY : fmaf(rows.shift[h], kLn2, logf(sum * kLower));
    }
  }
  const bool any = warp_any(nan);
  if (lane_index() == 0 && first_row < f.rows) {
    c.has_nan[size_t{k.unit} * nan_flags(f.rows) + first_row / kNanRows] = any;
  }
}

template <typename S>
SDPA_KERNEL(S::kThreads, 1)
hopper_forward_kernel(const SDPA_PARAMETER HopperCall c) {
  const ForwardCall& f = c.forward;
  const ForwardBlock k = forward_block(f, block_index().x, S::kRows, S::kColumns);
  const HopperTiles<S> tiles{shared_memory()};
  const uint32_t begin = k.any.begin / S::kKeys * S::kKeys;
  const uint32_t count = k.any.begin < k.any.end ? divide_up(k.any.end - begin, S::kKeys) : 0;
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
    HopperRows<S> rows;
    rows.head = k.first_head;
    SDPA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const uint32_t row = first_row + 8 * h + lane_index() / 4;
      rows.query[h] = row < f.rows ? row : f.rows - 1;
      rows.seen[h] = visible_keys(k.visibility, rows.query[h]);
      rows.shift[h] = -SDPA_INFINITY;
      rows.sum[h] = 0;
    }
    SDPA_UNROLL
    for (int n = 0; n < S::kColumns / 8; ++n) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) rows.context[n][e] = 0;
    }
    if (count > 0) attend<S>(f, k, tiles, group, begin, count, rows);
    store_rows<S>(c, k, first_row, rows);
  }
}

}  // namespace sdpa::cuda

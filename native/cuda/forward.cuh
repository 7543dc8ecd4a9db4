// The forward pass: blocked attention with an online softmax (Milakov and Gimelshein, arXiv
// 1805.02867; Dao et al., arXiv 2205.14135 and 2307.08691).
//
// A block of threads owns some rows of queries, held by its warps 16 (or 32) rows each, and runs
// over the tiles of keys that one of them sees. Scores stay in registers, become weights there and
// are the first operand of the product with the values.
//
// With few queries (decoding) the rows of a block are those of all heads that share keys, and keys
// are cut into splits that depend on the sequence's own length alone; `combine_splits` joins them
// in order (flash-decoding, https://pytorch.org/blog/flash-decoding).
#pragma once

#include "cuda/rules.cuh"
#include "cuda/tile.cuh"

namespace sdpa::cuda {

// ------------------------------------------------------------------------------------------ shapes

/// Tile sizes and number formats of one kernel: products in kHalf, key and value split into kTerms
/// terms, weights into kWeightTerms, rows in shared memory of kWidth elements.
template <Half kHalf_, int kTerms_, int kWeightTerms_, int kWidth_>
struct ForwardShape {
  static constexpr Half kHalf = kHalf_;
  static constexpr int kTerms = kTerms_, kWeightTerms = kWeightTerms_, kWidth = kWidth_;
  /// Columns of the context that a block sums up; wider values take several blocks.
  static constexpr int kColumns = kWidth < 256 ? kWidth : 256;
  /// Wide tiles are small and share their memory, and queries are read where they are.
  static constexpr bool kWide = kWidth > 256;
  static constexpr bool kSingle = kTerms == 1 && kWeightTerms == 1;
  /// Sets of 16 rows a warp: two of them halve the traffic from shared memory.
  static constexpr int kRowSets = kSingle && kWidth <= 128 ? 2 : 1;
  static constexpr int kKeys = kWide ? 16 : kTerms > 1 || kWidth > 128 ? 32 : 64;
  static constexpr int kKeyTiles = kKeys / 8;
  /// Weights are computed times 2^kWeightShift: float16 would lose those below 2^-14, and they are
  /// all that is left of a row where dropout takes the largest.
  static constexpr float kWeightShift = kHalf == Half::float16 ? 14 : 0;
  static constexpr int kMostWarps = 4;
  static constexpr int kThreads = kMostWarps * int(kLanes);
  static constexpr uint32_t kRowsPerWarp = 16 * kRowSets;

  using KeyTile = Tile<kHalf, kTerms, kWidth>;
  using ValueTile = Tile<kHalf, kTerms, kColumns>;

  static constexpr size_t query_bytes(uint32_t warps) {
    return kWide ? 0 : KeyTile::bytes(warps * kRowsPerWarp);
  }
  static constexpr size_t shared_bytes(uint32_t warps) {
    const size_t key = KeyTile::bytes(kKeys), value = ValueTile::bytes(kKeys);
    return query_bytes(warps) + (kWide ? (key > value ? key : value) : key + value);
  }
};

/// Most queries a sequence may have for its heads to share blocks, and its keys to be split.
constexpr uint32_t kDecodeQueries = 16;
constexpr uint32_t kSmallestSplit = 256;  // keys
constexpr uint32_t kMostSplits = 64;

SDPA_HOST_DEVICE constexpr bool is_decode(const Problem& p) {
  return p.query_length <= kDecodeQueries;
}

/// Keys of a split: a function of the sequence's length alone.
SDPA_HOST_DEVICE constexpr uint32_t split_length(uint32_t keys) {
  const uint32_t even = keys / kMostSplits + (keys % kMostSplits != 0);
  const uint32_t whole = (even + kKeyBlockUnit - 1) / kKeyBlockUnit * kKeyBlockUnit;
  return whole > kSmallestSplit ? whole : kSmallestSplit;
}

/// What other kernels have made of a row: done, NaN, or not to be had in their number formats.
enum class RowState : uint8_t { done, nan, out_of_range };

/// A forward call as its kernels take it. A unit is the rows that may share blocks: those of one
/// query head, or, decoding, of all heads of one key/value head.
struct ForwardCall {
  Call call;
  ForwardOutputs outputs;
  uint32_t unit_heads;     // query heads a unit
  uint32_t rows;           // rows a unit, unit_heads * query_length
  uint32_t units;          // batch * query_heads / unit_heads
  uint32_t row_blocks;     // blocks of rows a unit
  uint32_t splits;         // at most; 1: contexts are finished in one kernel
  uint32_t chunks;         // of the value's columns
  float* partial_context;  // [units, splits, rows, value_dim], not yet divided by the sum
  float* partial_sums;     // [units, splits, rows, 2]: maximum, sum
  const RowState* states;  // [units, rows]: rows that are done are left alone; null: none is
};

/// What a block of threads works on.
struct ForwardBlock {
  uint32_t b, kv_head, first_head, unit, first_row, split, first_column;
  KeyRange any, all;  // keys that some row sees, within the split; keys that all rows see
  Visibility visibility;

  SDPA_DEVICE uint32_t head_of(const Problem& p, uint32_t row) const {
    return first_head + row / p.query_length;
  }
  SDPA_DEVICE QueryRow row(const ForwardCall& f, uint32_t i) const {
    const Problem& p = f.call.problem;
    if (first_row + i >= f.rows) return {first_head, 0, {0, 0}};
    const uint32_t query = (first_row + i) % p.query_length;
    return {head_of(p, first_row + i), query, visible_keys(visibility, query)};
  }
};

SDPA_DEVICE ForwardBlock forward_block(const ForwardCall& f, uint32_t number,
                                       uint32_t rows_per_block, uint32_t columns) {
  const Problem& p = f.call.problem;
  ForwardBlock k;
  // Later blocks see more keys under the causal rule: the longest goes first.
  k.first_row = (f.row_blocks - 1 - number % f.row_blocks) * rows_per_block;
  number /= f.row_blocks;
  k.split = number % f.splits;
  number /= f.splits;
  k.first_column = number % f.chunks * columns;
  k.unit = number / f.chunks;
  const uint32_t units_per_entry = p.query_heads / f.unit_heads;
  k.b = k.unit / units_per_entry;
  k.first_head = k.unit % units_per_entry * f.unit_heads;
  k.kv_head = k.first_head / (p.query_heads / p.kv_heads);
  k.visibility = visibility_of(p, f.call.inputs, k.b);
  const uint32_t end =
      k.first_row + rows_per_block < f.rows ? k.first_row + rows_per_block : f.rows;
  const bool one_head = f.unit_heads == 1;
  const SeenByRun seen = seen_by_run(k.visibility, one_head ? k.first_row : 0,
                                     one_head ? end - 1 : p.query_length - 1);
  k.any = seen.any;
  k.all = seen.all;
  if (f.splits > 1) {
    const uint32_t length = split_length(k.visibility.key_end), from = k.split * length;
    if (k.any.begin < from) k.any.begin = from;
    if (k.any.end > from + length) k.any.end = from + length;
  }
  return k;
}

// ----------------------------------------------------------------------------------- one key tile

/// What a thread holds of its block's rows.
template <typename S>
struct ForwardState {
  float context[S::kRowSets][S::kColumns / 8][4];
  float row_max[S::kRowSets][2], row_sum[S::kRowSets][2];
};

template <typename S>
using ScoreFragment = float[S::kRowSets][S::kKeyTiles][4];
template <typename S>
using WeightFragment = uint32_t[S::kRowSets][S::kKeys / 16][S::kWeightTerms][4];

template <int kTiles>
SDPA_DEVICE void clear(float (&sums)[kTiles][4]) {
  SDPA_UNROLL
  for (int n = 0; n < kTiles; ++n) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) sums[n][e] = 0;
  }
}

/// Between registers and arrays that a function may index.
template <typename T, int kTiles>
SDPA_DEVICE void copy_fragment(const T (&from)[kTiles][4], T (&to)[kTiles][4]) {
  SDPA_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) to[j][e] = from[j][e];
  }
}

/// Sixteen rows as operand A, read from where they are. `row` gives a lane's row g or g + 8.
template <Half kHalf, int kTerms, typename At>
SDPA_DEVICE void gather_a(uint32_t (&a)[kTerms][4], uint32_t step, const At& at) {
  const uint32_t t = lane_index() % 4;
  SDPA_UNROLL
  for (int i = 0; i < 4; ++i) {
    const uint32_t column = 16 * step + 2 * t + 8 * (i / 2);
    uint32_t terms[kTerms];
    split_pair<kHalf>(at(i % 2, column), at(i % 2, column + 1), terms);
    SDPA_UNROLL
    for (int term = 0; term < kTerms; ++term) a[term][i] = terms[term];
  }
}

/// products = rows . tile rows over `depth` columns, for the warp's rows: load_a(r, step, a) gives
/// operand A of set `r`. Where rows are wide and split, each step is summed by itself and added in
/// float32 (see multiply_rows).
template <typename S, typename B, typename LoadA>
SDPA_DEVICE void multiply_tile(uint32_t depth, const LoadA& load_a, const B& tile,
                               ScoreFragment<S>& products) {
  SDPA_UNROLL
  for (int r = 0; r < S::kRowSets; ++r) clear(products[r]);
  const auto step = [&](uint32_t s) {
    uint32_t a[S::kRowSets][S::kTerms][4];
    SDPA_UNROLL
    for (int r = 0; r < S::kRowSets; ++r) load_a(r, s, a[r]);
    SDPA_UNROLL
    for (int j = 0; j < S::kKeyTiles; j += 2) {
      uint32_t b[S::kTerms][4];
      tile.load_b(b, 8 * j, s);
      SDPA_UNROLL
      for (int r = 0; r < S::kRowSets; ++r) {
        if constexpr (S::kWide && S::kTerms > 1) {
          float fresh[2][4] = {};
          multiply_terms<S::kHalf, 0>(fresh[0], a[r], b);
          multiply_terms<S::kHalf, 2>(fresh[1], a[r], b);
          SDPA_UNROLL
          for (int e = 0; e < 4; ++e) {
            products[r][j][e] += fresh[0][e];
            products[r][j + 1][e] += fresh[1][e];
          }
        } else {
          multiply_terms<S::kHalf, 0>(products[r][j], a[r], b);
          multiply_terms<S::kHalf, 2>(products[r][j + 1], a[r], b);
        }
      }
    }
  };
  if constexpr (S::kWide) {
    SDPA_NO_UNROLL
    for (uint32_t s = 0; 16 * s < depth; ++s) step(s);
  } else {
    SDPA_UNROLL
    for (uint32_t s = 0; s < S::kWidth / 16; ++s) {
      if (16 * s < depth) step(s);
    }
  }
}

/// Computes anew, in float32, what came out as NaN of rows `first` on times columns. Where operands
/// are split, an infinity meets terms of both signs; its own sign is what counts. The products are
/// an array of the caller's, not registers.
template <int kTiles, typename RowsA, typename RowsB>
SDPA_OUTLINE void repair_products(const RowsA& rows, uint32_t first, const RowsB& columns,
                                  float (*products)[4]) {
  SDPA_NO_UNROLL
  for (uint32_t i = 0; i < 4 * kTiles; ++i) {
    const uint32_t row = first + lane_index() / 4 + 8 * (i % 4 / 2);
    const uint32_t column = 8 * (i / 4) + 2 * (lane_index() % 4) + i % 2;
    float& product = products[i / 4][i % 4];
    if (row >= rows.count || column >= columns.count || !is_nan(product)) continue;
    product = 0;
    SDPA_NO_UNROLL
    for (uint32_t d = 0; d < rows.width; ++d) {
      product = fmaf(rows.at(row, d), columns.at(column, d), product);
    }
  }
}

/// The same for a fragment in registers.
template <typename S, typename RowsA, typename RowsB>
SDPA_DEVICE void repair_tile(const RowsA& rows, uint32_t first, const RowsB& columns,
                             ScoreFragment<S>& products) {
  if constexpr (S::kTerms > 1) {
    SDPA_UNROLL
    for (int r = 0; r < S::kRowSets; ++r) {
      float copy[S::kKeyTiles][4];
      copy_fragment(products[r], copy);
      repair_products<S::kKeyTiles>(rows, first + 16 * r, columns, copy);
      copy_fragment(copy, products[r]);
    }
  }
}

/// scores = query . key for the warp's rows. `careful`: also where one of them is not finite.
template <typename S>
SDPA_DEVICE void multiply_queries(const ForwardCall& f, const ForwardBlock& k, uint32_t warp_row,
                                  uint32_t first_key, const typename S::KeyTile& queries,
                                  const typename S::KeyTile& keys, bool careful,
                                  ScoreFragment<S>& scores) {
  const Call& call = f.call;
  const Problem& p = call.problem;
  const auto load_a = [&](int r, uint32_t s, uint32_t(&a)[S::kTerms][4]) {
    if constexpr (S::kWide) {
      gather_a<S::kHalf>(a, s, [&](int half, uint32_t column) {
        const uint32_t row = k.first_row + warp_row + lane_index() / 4 + 8 * half;
        if (row >= f.rows || column >= p.head_dim) return 0.0f;
        return query_rows(call, k.b, k.head_of(p, row), row % p.query_length, 1).at(0, column);
      });
    } else {
      queries.load_a(a, warp_row + 16 * r, s);
    }
  };
  multiply_tile<S>(p.head_dim, load_a, keys, scores);
  if (careful) {
    const GroupedRows rows = GroupedRows::of(call, k.b, k.first_head, k.first_row, f.rows);
    repair_tile<S>(rows, warp_row, key_rows(call, k.b, k.kv_head, first_key, S::kKeys), scores);
  }
}

/// The decisions for 16 rows of the block and 8 * kTiles columns.
template <int kTiles>
SDPA_OUTLINE KeepFragment<kTiles> draw(const ForwardCall& f, const ForwardBlock& k,
                                       uint32_t first_row, uint32_t first_column) {
  const QueryRow upper = k.row(f, first_row + lane_index() / 4);
  const QueryRow lower = k.row(f, first_row + lane_index() / 4 + 8);
  return KeepFragment<kTiles>::draw(f.call, k.b, {upper.head, lower.head},
                                    {upper.query, lower.query}, first_column);
}

/// score_of for 16 rows, with the softcap's derivative where `slopes` is given; both are arrays of
/// the caller's, not registers.
template <typename S>
SDPA_OUTLINE void score_rows(const ForwardCall& f, const ForwardBlock& k, uint32_t first_row,
                             uint32_t first_key, float (*scores)[4], float (*slopes)[4]) {
  const MaskView mask = MaskView::of(f.call, k.b);
  SDPA_NO_UNROLL
  for (int h = 0; h < 2; ++h) {
    const QueryRow row = k.row(f, first_row + 8 * h + lane_index() / 4);
    SDPA_NO_UNROLL
    for (uint32_t i = 0; i < 2 * S::kKeyTiles; ++i) {
      const uint32_t key = first_key + 8 * (i / 2) + 2 * (lane_index() % 4) + i % 2;
      float& score = scores[i / 2][2 * h + i % 2];
      float* const slope = slopes ? &slopes[i / 2][2 * h + i % 2] : nullptr;
      score = score_of(f.call, mask, score, row.head, row.query, key, row.sees(key), slope);
    }
  }
}

template <typename S>
SDPA_OUTLINE QueryRow row_of_block(const ForwardCall& f, const ForwardBlock& k, uint32_t i) {
  return k.row(f, i);
}

/// Scale, softcap, mask and exclusions.
template <typename S>
SDPA_DEVICE void apply_rules(const ForwardCall& f, const ForwardBlock& k, uint32_t warp_row,
                             uint32_t first_key, ScoreFragment<S>& scores) {
  const Problem& p = f.call.problem;
  if (p.mask_type != MaskType::none || p.softcap > 0) {
    SDPA_UNROLL
    for (int r = 0; r < S::kRowSets; ++r) {
      float copy[S::kKeyTiles][4];
      copy_fragment(scores[r], copy);
      score_rows<S>(f, k, warp_row + 16 * r, first_key, copy, nullptr);
      copy_fragment(copy, scores[r]);
    }
    return;
  }
  SDPA_UNROLL
  for (int r = 0; r < S::kRowSets; ++r) {
    SDPA_UNROLL
    for (int j = 0; j < S::kKeyTiles; ++j) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) scores[r][j][e] *= f.call.product_scale();
    }
  }
  if (first_key >= k.all.begin && first_key + S::kKeys <= k.all.end) return;
  SDPA_UNROLL
  for (int r = 0; r < S::kRowSets; ++r) {
    SDPA_UNROLL
    for (int h = 0; h < 2; ++h) {
      const QueryRow row = row_of_block<S>(f, k, warp_row + 16 * r + 8 * h + lane_index() / 4);
      SDPA_UNROLL
      for (int i = 0; i < 2 * S::kKeyTiles; ++i) {
        const uint32_t key = first_key + 8 * (i / 2) + 2 * (lane_index() % 4) + i % 2;
        if (!row.sees(key)) scores[r][i / 2][2 * h + i % 2] = -SDPA_INFINITY;
      }
    }
  }
}

/// Gives `dropped` to the elements of a fragment that dropout drops.
template <int kTiles>
SDPA_DEVICE void drop(const KeepFragment<kTiles>& keep, float dropped, float (*fragment)[4]) {
  SDPA_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) {
      if (!keep.keeps(j, e)) fragment[j][e] = dropped;
    }
  }
}

template <typename S>
using KeepTile = KeepFragment<S::kKeyTiles>[S::kRowSets];

/// Draws for the warp's rows and a tile of keys, where dropout acts on keys.
template <typename S>
SDPA_DEVICE void draw_tile(const ForwardCall& f, const ForwardBlock& k, uint32_t warp_row,
                           uint32_t first_key, KeepTile<S>& keep) {
  SDPA_UNROLL
  for (int r = 0; r < S::kRowSets; ++r) {
    keep[r].bits = 0;
    if (f.call.drops(Placement::scores) || f.call.drops(Placement::weights)) {
      keep[r] = draw<S::kKeyTiles>(f, k, warp_row + 16 * r, first_key);
    }
  }
}

template <typename S>
SDPA_DEVICE void drop_tile(const KeepTile<S>& keep, float dropped, ScoreFragment<S>& fragment) {
  SDPA_UNROLL
  for (int r = 0; r < S::kRowSets; ++r) drop(keep[r], dropped, fragment[r]);
}

/// Scores whose rounding shows in exp(score - maximum).
constexpr float kLargeScore = 0x1p10f;

/// One step of the online softmax: scores become exp(score - maximum), sums and maxima move on.
/// Returns what the context so far is to be multiplied by.
///
/// Scores less their maximum are brought to units of log2(e) by one fma, which rounds the maximum
/// in them; of a large one more than that the scores differ by, so it is taken off before.
template <typename S>
SDPA_DEVICE void softmax_step(ForwardState<S>& state, ScoreFragment<S>& scores,
                              float (&correction)[S::kRowSets][2]) {
  SDPA_UNROLL
  for (int r = 0; r < S::kRowSets; ++r) {
    SDPA_UNROLL
    for (int h = 0; h < 2; ++h) {
      float top = state.row_max[r][h];
      SDPA_UNROLL
      for (int j = 0; j < S::kKeyTiles; ++j) {
        top = fmaxf(top, fmaxf(scores[r][j][2 * h], scores[r][j][2 * h + 1]));
      }
      top = quad_max(top);
      const bool is_large = fabsf(top) > kLargeScore && is_finite(top);
      if (is_large) {
        SDPA_UNROLL
        for (int j = 0; j < S::kKeyTiles; ++j) {
          SDPA_UNROLL
          for (int e = 2 * h; e < 2 * h + 2; ++e) scores[r][j][e] -= top;
        }
      }
      const float shift = is_large || top == -SDPA_INFINITY ? 0.0f : top * kLog2E;
      const float before = state.row_max[r][h] - (is_large ? top : 0.0f);
      correction[r][h] = exp2_fast(fmaf(before, kLog2E, -shift));
      state.row_max[r][h] = top;
      const float raise = S::kWeightShift - shift;
      float sum = 0;
      SDPA_UNROLL
      for (int j = 0; j < S::kKeyTiles; ++j) {
        SDPA_UNROLL
        for (int e = 2 * h; e < 2 * h + 2; ++e) {
          scores[r][j][e] = exp2_fast(fmaf(scores[r][j][e], kLog2E, raise));
          sum += scores[r][j][e];
        }
      }
      state.row_sum[r][h] = fmaf(state.row_sum[r][h], correction[r][h], sum);
    }
  }
}

/// An accumulator fragment as operand A: the columns of two tiles are those of one step.
template <Half kHalf, int kTerms, int kTiles>
SDPA_DEVICE void to_operand(const float (&fragment)[kTiles][4],
                            uint32_t (&a)[kTiles / 2][kTerms][4]) {
  SDPA_UNROLL
  for (int s = 0; s < kTiles / 2; ++s) {
    SDPA_UNROLL
    for (int i = 0; i < 4; ++i) {
      const float* const pair = fragment[2 * s + i / 2] + i % 2 * 2;
      uint32_t terms[kTerms];
      split_pair<kHalf>(pair[0], pair[1], terms);
      SDPA_UNROLL
      for (int term = 0; term < kTerms; ++term) a[s][term][i] = terms[term];
    }
  }
}

/// sums = sums * correction + weights . values, for 16 rows; `columns` of the tile, from column
/// 16 * first_pair on, hold values. Where operands are split, each tile is summed by itself and
/// added in float32: tensor cores cut sums off instead of rounding them, and over a long sequence
/// that would show.
template <Half kHalf, int kTerms, int kWeightTerms, int kSteps, int kWidth, int kTiles>
SDPA_DEVICE void multiply_rows(const uint32_t (&weights)[kSteps][kWeightTerms][4],
                               const Tile<kHalf, kTerms, kWidth>& tile, uint32_t columns,
                               const float (&correction)[2], float (&sums)[kTiles][4],
                               uint32_t first_pair = 0) {
  constexpr bool kFresh = kTerms > 1 || kWeightTerms > 1;
  SDPA_UNROLL
  for (uint32_t n = 0; n < kTiles / 2; ++n) {
    if (16 * n >= columns) continue;
    float fresh[2][4] = {};
    SDPA_UNROLL
    for (int i = 0; i < 2; ++i) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) {
        if constexpr (!kFresh) fresh[i][e] = sums[2 * n + i][e] * correction[e / 2];
      }
    }
    SDPA_UNROLL
    for (uint32_t s = 0; s < kSteps; ++s) {
      uint32_t b[kTerms][4];
      tile.load_b_rows(b, 16 * s, first_pair + n);
      multiply_terms<kHalf, 0>(fresh[0], weights[s], b);
      multiply_terms<kHalf, 2>(fresh[1], weights[s], b);
    }
    SDPA_UNROLL
    for (int i = 0; i < 2; ++i) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) {
        float& sum = sums[2 * n + i][e];
        sum = kFresh ? fmaf(sum, correction[e / 2], fresh[i][e]) : fresh[i][e];
      }
    }
  }
}

/// Adds weight * x for every x of `rows` that is not finite and whose weight is not 0: what a
/// product on a tile without those left out. Rows of `rows` are columns of the operand. The arrays
/// are the caller's, not registers.
template <Half kHalf, int kWeightTerms, typename From>
SDPA_OUTLINE void add_nonfinite(const uint32_t (*weights)[kWeightTerms][4], uint32_t steps,
                                const From& rows, uint32_t first_column, float (*sums)[4],
                                uint32_t tiles) {
  const uint32_t lane = lane_index(), t = lane % 4;
  SDPA_NO_UNROLL
  for (uint32_t pair = 0; pair < 8 * steps; ++pair) {  // of columns of the operand
    float weight[2][2] = {};                           // [row half][of the pair]
    SDPA_UNROLL
    for (int h = 0; h < 2; ++h) {
      SDPA_UNROLL
      for (int term = 0; term < kWeightTerms; ++term) {
        const uint32_t own = weights[pair / 8][term][pair / 4 % 2 * 2 + h];
        const uint32_t both = shuffle(own, lane / 4 * 4 + pair % 4);
        weight[h][0] += low_half<kHalf>(both);
        weight[h][1] += high_half<kHalf>(both);
      }
    }
    SDPA_NO_UNROLL
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t row = 2 * pair + i;
      if (row >= rows.count) continue;
      SDPA_NO_UNROLL
      for (uint32_t n = 0; n < tiles; ++n) {
        SDPA_UNROLL
        for (int e = 0; e < 4; ++e) {
          const uint32_t column = first_column + 8 * n + 2 * t + e % 2;
          const float x = column < rows.width ? rows.at(row, column) : 0.0f;
          const float w = weight[e / 2][i];
          if (!is_finite(x) && w != 0) sums[n][e] += w * x;
        }
      }
    }
  }
}

/// The same for operand and sums in registers.
template <Half kHalf, int kWeightTerms, int kSteps, int kTiles, typename From>
SDPA_DEVICE void add_nonfinite_rows(const uint32_t (&weights)[kSteps][kWeightTerms][4],
                                    const From& rows, uint32_t first_column,
                                    float (&sums)[kTiles][4]) {
  uint32_t weights_copy[kSteps][kWeightTerms][4];
  SDPA_UNROLL
  for (int s = 0; s < kSteps; ++s) copy_fragment(weights[s], weights_copy[s]);
  float sums_copy[kTiles][4];
  copy_fragment(sums, sums_copy);
  add_nonfinite<kHalf, kWeightTerms>(weights_copy, kSteps, rows, first_column, sums_copy, kTiles);
  copy_fragment(sums_copy, sums);
}

// ----------------------------------------------------------------------------------- one block

/// The keys and values of a block, in shared memory.
template <typename S>
struct ForwardTiles {
  typename S::KeyTile queries, keys;
  typename S::ValueTile values;

  SDPA_DEVICE static ForwardTiles of(uint32_t warps) {
    unsigned char* const shared = shared_memory();
    unsigned char* const keys = shared + S::query_bytes(warps);
    unsigned char* const values = S::kWide ? keys : keys + S::KeyTile::bytes(S::kKeys);
    return {{reinterpret_cast<uint16_t*>(shared), warps * S::kRowsPerWarp},
            {reinterpret_cast<uint16_t*>(keys), S::kKeys},
            {reinterpret_cast<uint16_t*>(values), S::kKeys}};
  }
};

/// Loads the block's queries: rows of one head after the other.
template <typename S>
SDPA_DEVICE void load_queries(const ForwardCall& f, const ForwardBlock& k,
                              const typename S::KeyTile& queries) {
  if (f.unit_heads == 1) {
    queries.load(query_rows(f.call, k.b, k.first_head, k.first_row, queries.rows), 0);
    return;
  }
  queries.load(GroupedRows::of(f.call, k.b, k.first_head, k.first_row, f.rows), 0);
}

/// Runs over all tiles that the block sees: leaves sums, maxima and the context not yet divided.
/// `careful`: values that are not finite are kept from rows whose weight for them is 0, and scores
/// of what is not finite have their sign.
template <typename S>
SDPA_DEVICE void accumulate(const ForwardCall& f, const ForwardBlock& k, uint32_t warp_row,
                            bool has_rows, const ForwardTiles<S>& tiles, bool careful,
                            ForwardState<S>& state) {
  const Call& call = f.call;
  const Problem& p = call.problem;
  SDPA_UNROLL
  for (int r = 0; r < S::kRowSets; ++r) {
    clear(state.context[r]);
    SDPA_UNROLL
    for (int h = 0; h < 2; ++h) {
      state.row_max[r][h] = -SDPA_INFINITY;
      state.row_sum[r][h] = 0;
    }
  }
  const uint32_t begin = k.any.begin / S::kKeys * S::kKeys;
  const uint32_t columns = p.value_dim - k.first_column;
  sync_block();  // an earlier run may still be reading
  if (!S::kWide) load_queries<S>(f, k, tiles.queries);
  if (begin < k.any.end) tiles.keys.load(key_rows(call, k.b, k.kv_head, begin, S::kKeys), 0);
  commit_copies();
  SDPA_NO_UNROLL
  for (uint32_t first = begin; first < k.any.end; first += S::kKeys) {
    // Values arrive while scores are computed, and the next keys while values are multiplied.
    const Rows values = value_rows(call, k.b, k.kv_head, first, S::kKeys);
    wait_copies<0>();
    sync_block();
    if (!S::kWide) tiles.values.load(values, k.first_column);
    commit_copies();
    ScoreFragment<S> scores;
    float correction[S::kRowSets][2];
    WeightFragment<S> weights;
    if (has_rows) {
      KeepTile<S> keep;  // drawn while few registers are in use
      draw_tile<S>(f, k, warp_row, first, keep);
      multiply_queries<S>(f, k, warp_row, first, tiles.queries, tiles.keys, careful, scores);
      apply_rules<S>(f, k, warp_row, first, scores);
      if (call.drops(Placement::scores)) drop_tile<S>(keep, -SDPA_INFINITY, scores);
      softmax_step<S>(state, scores, correction);
      if (call.drops(Placement::weights)) drop_tile<S>(keep, 0.0f, scores);
      SDPA_UNROLL
      for (int r = 0; r < S::kRowSets; ++r) {
        to_operand<S::kHalf>(scores[r], weights[r]);
      }
    }
    if (S::kWide) {
      sync_block();  // all have read the keys
      tiles.values.load(values, k.first_column);
    }
    wait_copies<0>();
    sync_block();
    const uint32_t next = first + S::kKeys;
    if (!S::kWide && next < k.any.end) {
      tiles.keys.load(key_rows(call, k.b, k.kv_head, next, S::kKeys), 0);
    }
    commit_copies();
    if (careful) {
      tiles.values.clear_nonfinite();
      sync_block();
    }
    if (has_rows) {
      SDPA_UNROLL
      for (int r = 0; r < S::kRowSets; ++r) {
        multiply_rows(weights[r], tiles.values, columns, correction[r], state.context[r]);
        if (careful) {
          add_nonfinite_rows<S::kHalf>(weights[r], values, k.first_column, state.context[r]);
        }
      }
    }
    if (S::kWide && next < k.any.end) {
      sync_block();  // all have read the values
      tiles.keys.load(key_rows(call, k.b, k.kv_head, next, S::kKeys), 0);
    }
  }
  wait_copies<0>();
  SDPA_UNROLL
  for (int r = 0; r < S::kRowSets; ++r) {
    SDPA_UNROLL
    for (int h = 0; h < 2; ++h) state.row_sum[r][h] = quad_sum(state.row_sum[r][h]);
  }
}

template <typename S>
SDPA_DEVICE bool holds_nan(const ForwardState<S>& state) {
  bool nan = false;
  SDPA_UNROLL
  for (int r = 0; r < S::kRowSets; ++r) {
    SDPA_UNROLL
    for (int n = 0; n < S::kColumns / 8; ++n) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) nan |= is_nan(state.context[r][n][e]);
    }
  }
  return nan;
}

/// What a row's sum turns its context and its lse into.
SDPA_DEVICE float context_factor(const Call& call, float sum) {
  const float numerator = call.rescale();
  return sum == 0 || numerator == 0 ? 0.0f : numerator / sum;
}
SDPA_DEVICE float lse_of(float top, float sum) {
  return sum == 0 ? -SDPA_INFINITY : top + logf(sum);
}

/// Sixteen rows of a block in the end: an array, not registers.
template <int kTiles>
struct FinishedRows {
  float context[kTiles][4], row_max[2], row_sum[2];
};

/// Hands a split's share of a row to combine_splits.
template <int kTiles>
SDPA_DEVICE void store_partial(const ForwardCall& f, const ForwardBlock& k, uint32_t row, int h,
                               const FinishedRows<kTiles>& rows) {
  const uint32_t t = lane_index() % 4, width = f.call.problem.value_dim;
  const size_t at = (size_t{k.unit} * f.splits + k.split) * f.rows + row;
  SDPA_NO_UNROLL
  for (uint32_t n = 0; n < kTiles; ++n) {
    store_pair(Type::float32, f.partial_context, at * width, k.first_column + 8 * n + 2 * t, width,
               rows.context[n][2 * h], rows.context[n][2 * h + 1]);
  }
  if (k.first_column > 0 || t > 0) return;
  f.partial_sums[2 * at] = rows.row_max[h];
  f.partial_sums[2 * at + 1] = rows.row_sum[h];
}

/// Divides by the sum, rescales and drops for dropout, writes the output and lse.
template <int kTiles>
SDPA_DEVICE void store_result(const ForwardCall& f, const ForwardBlock& k, uint32_t row, int h,
                              const FinishedRows<kTiles>& rows) {
  const Call& call = f.call;
  const Problem& p = call.problem;
  const uint32_t t = lane_index() % 4, head = k.head_of(p, row), query = row % p.query_length;
  const size_t at =
      row_offset(p.layout, p.query_heads, p.query_length, p.value_dim, k.b, head, query);
  const float factor = context_factor(call, rows.row_sum[h]);
  SDPA_NO_UNROLL
  for (uint32_t n = 0; n < kTiles; ++n) {
    const uint32_t column = k.first_column + 8 * n;
    if (column >= p.value_dim) break;
    uint32_t keep = 0xff;
    if (call.drops(Placement::context)) keep = keep_byte(call, k.b, head, query, column);
    const float x = keep >> (2 * t) & 1 ? rows.context[n][2 * h] * factor : 0.0f;
    const float y = keep >> (2 * t + 1) & 1 ? rows.context[n][2 * h + 1] * factor : 0.0f;
    store_pair(p.type, f.outputs.output, at, column + 2 * t, p.value_dim, x, y);
  }
  if (f.outputs.lse && t == 0 && k.first_column == 0) {
    f.outputs.lse[flat_row(p, k.b, head, query)] = lse_of(rows.row_max[h], rows.row_sum[h]);
  }
}

/// Whether a row of a unit of `rows` is still to be computed.
SDPA_DEVICE bool is_wanted_row(const RowState* states, size_t unit, uint32_t rows, uint32_t row) {
  return !states || states[unit * rows + row] != RowState::done;
}

template <int kTiles>
SDPA_OUTLINE void finish_rows(const ForwardCall& f, const ForwardBlock& k, uint32_t first_row,
                              const FinishedRows<kTiles>& rows) {
  SDPA_NO_UNROLL
  for (int h = 0; h < 2; ++h) {
    const uint32_t row = k.first_row + first_row + 8 * h + lane_index() / 4;
    if (row >= f.rows || !is_wanted_row(f.states, k.unit, f.rows, row)) continue;
    if (f.splits > 1) {
      store_partial(f, k, row, h, rows);
    } else {
      store_result(f, k, row, h, rows);
    }
  }
}

/// Whether one of `count` rows from `first` on is.
SDPA_DEVICE bool is_wanted(const RowState* states, size_t unit, uint32_t rows, uint32_t first,
                           uint32_t count) {
  bool any = false;
  for (uint32_t i = first; i < first + count && i < rows; ++i) {
    any |= is_wanted_row(states, unit, rows, i);
  }
  return any;
}

/// Launched with any number of warps to kMostWarps.
template <typename S>
SDPA_KERNEL(S::kThreads, 1)
forward_kernel(const SDPA_PARAMETER ForwardCall f) {
  const uint32_t warps = thread_count() / kLanes, warp_row = warp_index() * S::kRowsPerWarp;
  const ForwardBlock k =
      forward_block(f, block_index().x, warps * S::kRowsPerWarp, uint32_t{S::kColumns});
  if (!is_wanted(f.states, k.unit, f.rows, k.first_row, warps * S::kRowsPerWarp)) return;
  const bool has_rows = k.first_row + warp_row < f.rows;
  const ForwardTiles<S> tiles = ForwardTiles<S>::of(warps);
  ForwardState<S> state;
  // A NaN may have come from a value that its row does not see: 0 * NaN is NaN.
  for (bool careful = false;; careful = true) {
    accumulate<S>(f, k, warp_row, has_rows, tiles, careful, state);
    if (careful || !sync_block_or(holds_nan<S>(state))) break;
  }
  if (!has_rows) return;
  SDPA_UNROLL
  for (int r = 0; r < S::kRowSets; ++r) {
    FinishedRows<S::kColumns / 8> rows;
    constexpr float kLower = S::kWeightShift > 0 ? 1.0f / (1 << int(S::kWeightShift)) : 1.0f;
    SDPA_UNROLL
    for (int n = 0; n < S::kColumns / 8; ++n) {
      SDPA_UNROLL
      for (int e = 0; e < 4; ++e) rows.context[n][e] = state.context[r][n][e] * kLower;
    }
    SDPA_UNROLL
    for (int h = 0; h < 2; ++h) {
      rows.row_max[h] = state.row_max[r][h];
      rows.row_sum[h] = state.row_sum[r][h] * kLower;
    }
    finish_rows(f, k, warp_row + 16 * r, rows);
  }
}

}  // namespace sdpa::cuda

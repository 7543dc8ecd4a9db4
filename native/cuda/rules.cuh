// What happens to scores on their way to weights: scale, softcap, mask, exclusion by position,
// dropout. Works on accumulator fragments, in which a thread holds two columns of two rows of each
// 16x8 tile: element e of tile j is row g + 8 * (e / 2), column 8 * j + 2 * t + e % 2.
#pragma once

#include "cuda/call.cuh"

namespace sdpa::cuda {

// --------------------------------------------------------------------------------------- dropout

/// The decisions of one call of the generator, as bits: eight columns from 8 * group on.
SDPA_DEVICE uint32_t drawn_group(const Call& call, uint32_t b, uint32_t head, uint32_t query,
                                 uint32_t group) {
  const Problem& p = call.problem;
  const Dropout& d = call.dropout;
  const PhiloxWords words = philox4x32(
      dropout_counter(d, p.batch_offset + b, p.head_offset + head, p.query_offset + query, group),
      d.key0, d.key1);
  uint32_t eight = 0;
  SDPA_UNROLL
  for (uint32_t j = 0; j < 8; ++j) eight |= uint32_t{dropout_keeps(d, words, j)} << j;
  return eight;
}

/// Where local column `first` lies in the whole, if dropout is of context or of keys.
SDPA_DEVICE uint32_t dropout_column(const Call& call, uint32_t first) {
  return call.dropout.placement == Placement::context ? first : call.problem.key_offset + first;
}

/// The decisions for eight consecutive columns of a row, from local column `first` on, as bits.
SDPA_OUTLINE uint32_t keep_byte(const Call& call, uint32_t b, uint32_t head, uint32_t query,
                                uint32_t first) {
  const Problem& p = call.problem;
  if (const uint8_t* const given = call.inputs.keep_mask) {
    const bool context = call.dropout.placement == Placement::context;
    const uint32_t width = context ? p.value_dim : p.key_length;
    const uint8_t* const row = given + flat_row(p, b, head, query) * width;
    uint32_t bits = 0;
    for (uint32_t i = 0; i < 8; ++i) bits |= uint32_t{first + i < width && row[first + i]} << i;
    return bits;
  }
  const uint32_t column = dropout_column(call, first), lead = column % kDecisionsPerCall;
  uint32_t bits = 0;
  // One call of the generator; two where the columns lie across two.
  for (uint32_t i = 0; i <= uint32_t{lead != 0}; ++i) {
    const uint32_t eight = drawn_group(call, b, head, query, column / kDecisionsPerCall + i);
    bits |= i == 0 ? eight >> lead : eight << (8 - lead);
  }
  return bits & 0xff;
}

/// Decisions for a fragment of 16 rows and 8 * kTiles columns: a thread's own, a bit each.
template <int kTiles>
struct KeepFragment {
  uint32_t bits;

  /// `head` and `query` are those of this thread's two rows, `first` the first column.
  SDPA_DEVICE static KeepFragment draw(const Call& call, uint32_t b, const uint32_t (&head)[2],
                                       const uint32_t (&query)[2], uint32_t first) {
    return exchange([&](uint32_t half, uint32_t tile) {
      return keep_byte(call, b, half ? head[1] : head[0], half ? query[1] : query[0],
                       first + 8 * tile);
    });
  }

  /// `byte(half, tile)` gives the decisions for a tile of the thread's upper or lower row.
  template <typename Byte>
  SDPA_DEVICE static KeepFragment exchange(const Byte& byte) {
    // The four lanes of a row share its calls evenly, one byte each, and then exchange them.
    const uint32_t lane = lane_index(), t = lane % 4;
    uint32_t own = 0;
    SDPA_NO_UNROLL
    for (uint32_t i = 0; i < divide_up(2 * kTiles, 4); ++i) {
      const uint32_t c = 4 * i + t;
      own |= byte(c / kTiles, c % kTiles) << (8 * i);
    }
    KeepFragment keep{0};
    SDPA_UNROLL
    for (uint32_t i = 0; i < 4; ++i) {
      keep.bits |= (shuffle(own, lane / 4 * 4 + i) >> (2 * t) & 0x03030303) << (2 * i);
    }
    return keep;
  }

  SDPA_DEVICE bool keeps(int tile, int element) const {
    const int c = element / 2 * kTiles + tile;  // byte c / 4 of lane c % 4
    return bits >> (c / 4 * 8 + c % 4 * 2 + element % 2) & 1;
  }
};

/// The same for a fragment whose 16 rows are keys and whose 8 * kTiles columns are queries of one
/// head, both counted from the first.
template <int kTiles>
struct KeepTransposed {
  uint32_t bits;

  SDPA_DEVICE static KeepTransposed draw(const Call& call, uint32_t b, uint32_t head,
                                         uint32_t first_query, uint32_t first_key) {
    return exchange([&](uint32_t column, uint32_t half) {
      const uint32_t query = first_query + column, last = call.problem.query_length - 1;
      // Padding draws for the last query, and is never read.
      return keep_byte(call, b, head, query < last ? query : last, first_key + 8 * half);
    });
  }

  /// `byte(column, half)` gives the decisions for the upper or the lower eight rows of a column.
  template <typename Byte>
  SDPA_DEVICE static KeepTransposed exchange(const Byte& byte) {
    static_assert(kTiles % 2 == 0 && kTiles <= 8);
    // A lane decides for one query and eight keys; the eight lanes of those keys take a bit each.
    const uint32_t lane = lane_index(), t = lane % 4, g = lane / 4;
    uint32_t own = 0;
    SDPA_NO_UNROLL
    for (uint32_t i = 0; i < kTiles / 2; ++i) {
      own |= byte(8 * (2 * i + lane / 16) + lane % 8, lane / 8 % 2) << (8 * i);
    }
    KeepTransposed keep{0};
    SDPA_UNROLL
    for (uint32_t i = 0; i < 8; ++i) {  // bit 0 tile % 2, bit 1 element % 2, bit 2 element / 2
      const uint32_t from = 2 * t + i / 2 % 2 + 8 * (i / 4) + 16 * (i % 2);
      keep.bits |= (shuffle(own, from) >> g & 0x01010101) << i;
    }
    return keep;
  }

  SDPA_DEVICE bool keeps(int tile, int element) const {
    return bits >> (tile / 2 * 8 + element / 2 * 4 + element % 2 * 2 + tile % 2) & 1;
  }
};

template <int kTiles>
SDPA_OUTLINE KeepTransposed<kTiles> draw_transposed(const Call& call, uint32_t b, uint32_t head,
                                                    uint32_t first_query, uint32_t first_key) {
  return KeepTransposed<kTiles>::draw(call, b, head, first_query, first_key);
}

// ---------------------------------------------------------------------------------------- softcap

/// tanh(x): an odd polynomial near 0, elsewhere 1 - 2 / (exp(2|x|) + 1). NaN stays NaN.
SDPA_DEVICE float hyperbolic_tangent(float x) {
  const float size = fabsf(x);
  const float e = exp2_fast((size > 10.0f ? 10.0f : size) * (2 * kLog2E));
  const float elsewhere = 1.0f - 2.0f / (e + 1.0f);
  const float z = x * x;
  float p = fmaf(-5.51517261e-3f, z, 2.04694290e-2f);
  p = fmaf(p, z, -5.36880270e-2f);
  p = fmaf(p, z, 1.33308306e-1f);
  p = fmaf(p, z, -3.33332598e-1f);
  return size < 0.6f ? fmaf(x * z, p, x) : copysignf(elsewhere, x);
}

// ----------------------------------------------------------------------------------- mask,
// position

/// The attention mask of one batch entry: element (head, query, key) and its place.
struct MaskView {
  const void* data;
  MaskType type;
  size_t head_stride, query_stride, key_stride, first;

  SDPA_DEVICE static MaskView of(const Call& call, uint32_t b) {
    const Problem& p = call.problem;
    const size_t plane = size_t{p.mask_queries} * p.mask_keys;
    return {call.inputs.mask,
            p.mask_type,
            p.mask_heads > 1 ? plane : 0,
            p.mask_queries > 1 ? p.mask_keys : 0,
            p.mask_keys > 1 ? size_t{1} : size_t{0},
            p.mask_batch > 1 ? b * p.mask_heads * plane : 0};
  }
  /// What is added to the score: 0 or -infinity for a boolean mask.
  SDPA_DEVICE float bias(uint32_t head, uint32_t query, uint32_t key) const {
    const size_t at = first + head * head_stride + query * query_stride + key * key_stride;
    if (type == MaskType::boolean) {
      return static_cast<const uint8_t*>(data)[at] ? 0.0f : -SDPA_INFINITY;
    }
    return read_element(Type(uint32_t(type) - uint32_t(MaskType::float32)), data, at);
  }
};

/// Keys that some query of a run sees, and keys that all of them see.
struct SeenByRun {
  KeyRange any, all;
};

SDPA_DEVICE SeenByRun seen_by_run(const Visibility& v, uint32_t first, uint32_t last) {
  const auto clip = [&](int64_t begin, int64_t end) {
    if (begin < 0) begin = 0;
    if (end > v.key_end) end = v.key_end;
    return begin < end ? KeyRange{uint32_t(begin), uint32_t(end)} : KeyRange{0, 0};
  };
  const int64_t low = int64_t{first} + v.diagonal, high = int64_t{last} + v.diagonal;
  return {clip(v.left < 0 ? 0 : low - v.left, v.right < 0 ? v.key_end : high + v.right + 1),
          clip(v.left < 0 ? 0 : high - v.left, v.right < 0 ? v.key_end : low + v.right + 1)};
}

/// A row of a block of queries.
struct QueryRow {
  uint32_t head, query;
  KeyRange seen;  // empty for rows that are padding

  SDPA_DEVICE bool sees(uint32_t key) const { return key >= seen.begin && key < seen.end; }
};

/// Puts the scale, the softcap and the mask on a product of query and key, in this order; `slope`
/// is the softcap's derivative.
SDPA_DEVICE float score_of(const Call& call, const MaskView& mask, float product, uint32_t head,
                           uint32_t query, uint32_t key, bool seen, float* slope = nullptr) {
  const Problem& p = call.problem;
  float score = product * call.product_scale();
  if (p.softcap > 0) {
    const float t = hyperbolic_tangent(score / p.softcap);
    score = p.softcap * t;
    if (slope) *slope = 1.0f - t * t;
  }
  if (!seen) return -SDPA_INFINITY;
  if (p.mask_type == MaskType::none) return score;
  const float bias = mask.bias(head, query, key);
  return bias == -SDPA_INFINITY ? bias : score + bias;
}

/// exp(score - lse). An excluded key has weight 0, also in a row whose lse is -infinity or NaN.
/// Only rounding takes a score above lse, but that of scores of 1e9 by far: no weight may come out
/// as more than 1.
SDPA_DEVICE float weight_from_lse(float score, float lse) {
  if (score == -SDPA_INFINITY) return 0.0f;
  const float above = score - (lse == -SDPA_INFINITY ? 0.0f : lse);
  return exp2_fast((above > 0 ? 0.0f : above) * kLog2E);
}

}  // namespace sdpa::cuda

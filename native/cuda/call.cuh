// What all kernels share: one call as a thread sees it, and its tensors by rows.
#pragma once

#include "core/dropout.h"
#include "core/mask_rules.h"
#include "core/problem.h"
#include "cuda/warp.cuh"

namespace sdpa::cuda {

#define SDPA_INFINITY from_bits(0x7f800000)

constexpr float kLog2E = 1.44269504f;

/// One call as every thread sees it.
struct Call {
  Problem problem;
  Inputs inputs;
  Dropout dropout;

  SDPA_HOST_DEVICE constexpr bool drops(Placement placement) const {
    return dropout.on() && dropout.placement == placement;
  }
  /// What kept elements are multiplied by where dropout rescales.
  SDPA_HOST_DEVICE constexpr float rescale() const {
    return dropout.on() && dropout.placement != Placement::scores ? dropout.keep_scale : 1.0f;
  }
  /// What queries are multiplied by as they are read: terms of bfloat16 end at 2^-133, and a large
  /// scale would show what float32 queries have below that.
  SDPA_HOST_DEVICE constexpr float query_raise() const {
    return problem.type == Type::float32 && problem.scale > 0x1p64f ? 0x1p16f : 1.0f;
  }
  /// What products of such a query are multiplied by.
  SDPA_HOST_DEVICE constexpr float product_scale() const { return problem.scale / query_raise(); }
};

constexpr uint32_t divide_up(uint32_t a, uint32_t b) { return a / b + (a % b != 0); }
constexpr uint32_t round_up(uint32_t a, uint32_t b) { return divide_up(a, b) * b; }
constexpr size_t size_of(Type type) { return type == Type::float32 ? 4 : 2; }

SDPA_DEVICE float read_element(Type type, const void* data, size_t i) {
  if (type == Type::float32) return static_cast<const float*>(data)[i];
  const uint32_t bits = static_cast<const uint16_t*>(data)[i];
  return type == Type::float16 ? widen_float16(bits) : from_bits(bits << 16);
}

SDPA_DEVICE void write_element(Type type, void* data, size_t i, float x) {
  if (type == Type::float32) {
    static_cast<float*>(data)[i] = x;
  } else {
    const uint32_t bits = type == Type::float16 ? pack_float16(x, 0) : pack_bfloat16(x, 0);
    static_cast<uint16_t*>(data)[i] = uint16_t(bits);
  }
}

SDPA_DEVICE bool is_finite(float x) { return (to_bits(x) & 0x7f800000) != 0x7f800000; }
SDPA_DEVICE bool is_nan(float x) { return x != x; }

/// Consecutive rows of one head of a tensor [batch, heads, length, width] in either layout.
struct Rows {
  static constexpr float factor = 1.0f;  // of what is read

  Type type;
  const unsigned char* data;  // the first row
  size_t stride;              // elements from one row to the next
  uint32_t count, width;

  SDPA_DEVICE const void* row(uint32_t i) const { return data + i * stride * size_of(type); }
  SDPA_DEVICE float at(uint32_t row, uint32_t column) const {
    return read_element(type, data, row * stride + column);
  }
  /// Whether rows can be read in pieces of eight elements, 16 bytes at a time.
  SDPA_DEVICE bool in_vectors() const {
    return width % 8 == 0 && (reinterpret_cast<size_t>(data) | (stride * size_of(type))) % 16 == 0;
  }
};

SDPA_DEVICE Rows rows_of(const Problem& p, Type type, const void* data, uint32_t heads,
                         uint32_t length, uint32_t width, uint32_t b, uint32_t head, uint32_t first,
                         uint32_t count) {
  const size_t at = row_offset(p.layout, heads, length, width, b, head, first);
  return {type, static_cast<const unsigned char*>(data) + at * size_of(type),
          row_stride(p.layout, heads, width), count, width};
}

/// Up to `count` rows of a tensor of queries, from `first` on.
SDPA_DEVICE Rows query_side_rows(const Problem& p, const void* data, uint32_t width, uint32_t b,
                                 uint32_t head, uint32_t first, uint32_t count) {
  const uint32_t left = p.query_length - first;
  return rows_of(p, p.type, data, p.query_heads, p.query_length, width, b, head, first,
                 count < left ? count : left);
}

/// Rows of one head of the query, raised.
struct QueryRows : Rows {
  float factor;

  SDPA_DEVICE QueryRows(const Rows& rows, float factor) : Rows(rows), factor(factor) {}
  SDPA_DEVICE float at(uint32_t row, uint32_t column) const {
    return Rows::at(row, column) * factor;
  }
};

SDPA_DEVICE QueryRows query_rows(const Call& call, uint32_t b, uint32_t head, uint32_t first,
                                 uint32_t count) {
  const Problem& p = call.problem;
  return {query_side_rows(p, call.inputs.query, p.head_dim, b, head, first, count),
          call.query_raise()};
}

/// Up to `count` rows of key or value from `first` on. Tiles never cross blocks of a cache.
SDPA_DEVICE Rows key_side_rows(const Call& call, const void* data, uint32_t width, uint32_t b,
                               uint32_t kv_head, uint32_t first, uint32_t count) {
  const Problem& p = call.problem;
  const uint32_t left = p.key_length - first;
  if (left < count) count = left;
  const int32_t* const blocks = call.inputs.key_blocks;
  if (!blocks) {
    return rows_of(p, p.key_type, data, p.kv_heads, p.key_length, width, b, kv_head, first, count);
  }
  const size_t block = size_t(blocks[first / p.key_block_length]);
  const size_t row =
      (block * p.kv_heads + kv_head) * p.key_block_length + first % p.key_block_length;
  return {p.key_type, static_cast<const unsigned char*>(data) + row * width * size_of(p.key_type),
          width, count, width};
}

SDPA_DEVICE Rows key_rows(const Call& call, uint32_t b, uint32_t kv_head, uint32_t first,
                          uint32_t count) {
  return key_side_rows(call, call.inputs.key, call.problem.head_dim, b, kv_head, first, count);
}
SDPA_DEVICE Rows value_rows(const Call& call, uint32_t b, uint32_t kv_head, uint32_t first,
                            uint32_t count) {
  return key_side_rows(call, call.inputs.value, call.problem.value_dim, b, kv_head, first, count);
}

/// Rows of consecutive heads of the query, raised, those of one head after those of another.
struct GroupedRows {
  float factor;
  Type type;
  const unsigned char* data;  // the first head's first row
  size_t head_stride, stride;
  uint32_t length;  // rows a head
  uint32_t first, count, width;

  SDPA_DEVICE const void* row(uint32_t i) const {
    const size_t at = (first + i) / length * head_stride + (first + i) % length * stride;
    return data + at * size_of(type);
  }
  SDPA_DEVICE float at(uint32_t i, uint32_t column) const {
    return read_element(type, row(i), column) * factor;
  }
  SDPA_DEVICE bool in_vectors() const {
    const size_t strides = (head_stride | stride) * size_of(type);
    return width % 8 == 0 && (reinterpret_cast<size_t>(data) | strides) % 16 == 0;
  }

  /// Rows `first` to `end` of those that start at head `head`.
  SDPA_DEVICE static GroupedRows of(const Call& call, uint32_t b, uint32_t head, uint32_t first,
                                    uint32_t end) {
    const Problem& p = call.problem;
    const uint32_t width = p.head_dim;
    const QueryRows rows = query_rows(call, b, head, 0, 1);
    const size_t head_stride =
        p.layout == Layout::bhsd ? size_t{p.query_length} * width : size_t{width};
    return {rows.factor,    p.type, rows.data,   head_stride, rows.stride,
            p.query_length, first,  end - first, width};
  }
};

/// Stores two neighbours of a row of `width` elements that starts at `row`, as far as they are in
/// it.
SDPA_DEVICE void store_pair(Type type, void* data, size_t row, uint32_t column, uint32_t width,
                            float x, float y) {
  unsigned char* const at = static_cast<unsigned char*>(data) + (row + column) * size_of(type);
  if (column + 1 < width && reinterpret_cast<size_t>(at) % (2 * size_of(type)) == 0) {
    if (type == Type::float32) {
      store_two(at, to_bits(x), to_bits(y));
    } else {
      *reinterpret_cast<uint32_t*>(at) =
          type == Type::float16 ? pack_float16(x, y) : pack_bfloat16(x, y);
    }
    return;
  }
  if (column < width) write_element(type, data, row + column, x);
  if (column + 1 < width) write_element(type, data, row + column + 1, y);
}

/// Where row [b, head, query] stands in tensors [batch, query_heads, query_length], lse for one.
SDPA_DEVICE size_t flat_row(const Problem& p, uint32_t b, uint32_t head, uint32_t query) {
  return (size_t{b} * p.query_heads + head) * p.query_length + query;
}

}  // namespace sdpa::cuda

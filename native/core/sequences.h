// Batches whose entries have lengths of their own: packed tensors, and keys in a cache.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/problem.h"

namespace sdpa {

/// Where the entries of a batch lie in its tensors. Packed tensors are [total length, heads,
/// width]: the entries' rows one after the other, without padding. The Problem states the largest
/// lengths and, for packed tensors, the layout bshd.
struct Sequences {
  const int32_t* query_starts = nullptr;  // [batch + 1] running totals, or null: not packed
  const int32_t* key_starts = nullptr;    // [batch + 1], where query_starts is
  const int32_t* key_blocks = nullptr;    // [batch, table_width] blocks of a cache, or null; the
  size_t table_width = 0;                 // entries' lengths are then Inputs.kv_lengths

  bool any() const { return query_starts || key_blocks; }
};

/// One entry of a batch as a call of its own; its arrays are parts of the batch's.
struct Entry {
  Problem problem;
  Inputs inputs;
  size_t query_rows, key_rows;  // rows of the tensors before it, all heads counted
  size_t lse_first, lse_stride;

  size_t queries() const { return size_t{problem.query_heads} * problem.query_length; }
  size_t keys() const { return size_t{problem.kv_heads} * problem.key_length; }
};

inline size_t element_size(Type type) {
  return type == Type::float32 ? sizeof(float) : sizeof(uint16_t);
}

/// `rows` rows of `width` elements further on; null stays null.
inline const void* skip(const Problem& p, const void* data, size_t rows, size_t width) {
  return data ? static_cast<const char*>(data) + rows * width * element_size(p.type) : nullptr;
}

inline void* skip(const Problem& p, void* data, size_t rows, size_t width) {
  return const_cast<void*>(skip(p, static_cast<const void*>(data), rows, width));
}

/// Entry `b`. Its causal offset is in its Problem.
inline Entry entry_of(const Sequences& s, const Problem& p, const Inputs& inputs, uint32_t b) {
  Entry e{p, inputs, 0, 0, 0, 0};
  e.problem.batch = 1;
  e.problem.batch_offset = p.batch_offset + b;
  if (inputs.causal_offsets) e.problem.causal_offset = inputs.causal_offsets[b];
  e.inputs.causal_offsets = nullptr;
  if (s.query_starts) {
    e.problem.query_length = uint32_t(s.query_starts[b + 1] - s.query_starts[b]);
    e.query_rows = size_t(s.query_starts[b]) * p.query_heads;
    e.lse_first = size_t(s.query_starts[b]);
    e.lse_stride = size_t(s.query_starts[p.batch]);
  } else {
    e.query_rows = b * e.queries();
    e.lse_first = e.query_rows;
    e.lse_stride = p.query_length;
  }
  e.inputs.query = skip(p, inputs.query, e.query_rows, p.head_dim);
  if (s.key_blocks) {
    e.inputs.key_blocks = s.key_blocks + b * s.table_width;
    e.problem.key_length = uint32_t(inputs.kv_lengths[b]);
    e.inputs.kv_lengths = nullptr;
    return e;
  }
  e.problem.key_length = uint32_t(s.key_starts[b + 1] - s.key_starts[b]);
  if (inputs.kv_lengths) e.inputs.kv_lengths = inputs.kv_lengths + b;
  e.key_rows = size_t(s.key_starts[b]) * p.kv_heads;
  e.inputs.key = skip(p, inputs.key, e.key_rows, p.head_dim);
  e.inputs.value = skip(p, inputs.value, e.key_rows, p.value_dim);
  return e;
}

}  // namespace sdpa

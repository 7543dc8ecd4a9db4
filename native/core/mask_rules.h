// Which keys a query may see by position: causal rule, window and key lengths.
// One header for C++ and CUDA. (The attention mask is data, and is read by the kernels.)
#pragma once

#include "core/host_device.h"
#include "core/problem.h"

namespace sdpa {

/// Local key indices [begin, end); empty if begin == end.
struct KeyRange {
  uint32_t begin, end;
};

/// What the rules need to know of a batch entry.
struct Visibility {
  int64_t diagonal;     // query i sits on the diagonal of local key i + diagonal
  int64_t left, right;  // reach in keys before and behind the diagonal; < 0: unlimited
  uint32_t key_end;     // keys from here on are excluded for every query
};

SDPA_HOST_DEVICE constexpr Visibility visibility_of(const Problem& p, const Inputs& inputs,
                                                    uint32_t b) {
  const int64_t offset = inputs.causal_offsets ? inputs.causal_offsets[b] : p.causal_offset;
  int64_t right = p.window_right;
  if (p.is_causal) right = 0;  // the causal rule is the narrower one: a window never reaches < 0
  return {int64_t{p.query_offset} + offset - int64_t{p.key_offset}, p.window_left, right,
          inputs.kv_lengths ? uint32_t(inputs.kv_lengths[b]) : p.key_length};
}

/// The keys that local query `i` sees. They are always one interval.
SDPA_HOST_DEVICE constexpr KeyRange visible_keys(const Visibility& v, uint32_t i) {
  const int64_t diagonal = int64_t{i} + v.diagonal;
  int64_t begin = v.left < 0 ? 0 : diagonal - v.left;
  int64_t end = v.right < 0 ? v.key_end : diagonal + v.right + 1;
  if (begin < 0) begin = 0;
  if (end > v.key_end) end = v.key_end;
  if (begin >= end) return {0, 0};
  return {uint32_t(begin), uint32_t(end)};
}

/// The same rules from the side of keys: visible_keys(seen_from_keys(v, query_length), j) are the
/// local queries that see key `j`, if j < v.key_end.
SDPA_HOST_DEVICE constexpr Visibility seen_from_keys(const Visibility& v, uint32_t query_length) {
  return {-v.diagonal, v.right, v.left, query_length};
}

}  // namespace sdpa

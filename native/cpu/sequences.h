// Batches whose entries have lengths of their own: packed tensors, and keys in a cache.
#pragma once

#include "core/backend.h"

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

/// Each entry is computed by the backend as a call of its own, and so has the bits that it has
/// alone. Entries without keys give zeros (and lse = -infinity), those without queries nothing.
/// There is no mask, no keep mask and no [query_length, key_length] output. lse is
/// [query_heads, total query length] of packed queries. Keys in a cache have no gradients.
Status forward_sequences(const Backend& backend, const Sequences& sequences, const Problem& p,
                         const Inputs& inputs, const ForwardOutputs& outputs,
                         const CancelToken& cancel);
Status backward_sequences(const Backend& backend, const Sequences& sequences, const Problem& p,
                          const Inputs& inputs, const BackwardTensors& tensors,
                          const CancelToken& cancel);

}  // namespace sdpa

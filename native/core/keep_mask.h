// The dropout decisions of a whole call as bytes: what `dropoutMask` returns.
#pragma once

#include "core/dropout.h"

namespace sdpa {

/// Fills keep [batch, query_heads, query_length, columns] with 1 (keep) or 0 (drop), where columns
/// is key_length, or value_dim for the context placement.
inline void fill_keep_mask(const Problem& p, uint8_t* keep) {
  const Dropout d = resolve_dropout(p, false);
  const bool context = d.placement == Placement::context;
  const uint32_t columns = context ? p.value_dim : p.key_length;
  const uint32_t first = context ? 0 : p.key_offset;
  for (uint32_t b = 0; b < p.batch; ++b) {
    for (uint32_t h = 0; h < p.query_heads; ++h) {
      for (uint32_t q = 0; q < p.query_length; ++q, keep += columns) {
        PhiloxWords words{};
        for (uint32_t i = 0; i < columns; ++i) {
          const uint32_t column = first + i;
          if (i == 0 || column % kDecisionsPerCall == 0) {
            words = philox4x32(dropout_counter(d, p.batch_offset + b, p.head_offset + h,
                                               p.query_offset + q, column / kDecisionsPerCall),
                               d.key0, d.key1);
          }
          keep[i] = dropout_keeps(d, words, column % kDecisionsPerCall);
        }
      }
    }
  }
}

}  // namespace sdpa

// What one attention call is: plain numbers and pointers, every default resolved by lib/problem.ts.
// Trivially copyable, so that it also crosses to a GPU by value.
#pragma once

#include <cstddef>
#include <cstdint>
#include <type_traits>

namespace sdpa {

enum class Layout : uint32_t { bhsd, bshd };
enum class Type : uint32_t { float32, float16, bfloat16 };
enum class MaskType : uint32_t { none, boolean, float32, float16, bfloat16 };
enum class Placement : uint32_t { weights, context, scores };
enum class Precision : uint32_t { highest, high, medium };

/// The fields of a Problem, in the order of the flat header that JavaScript passes
/// (`encodeProblem` in lib/problem.ts; a test compares the two lists).
///
/// Sizes count elements. Mask sizes are 1 (broadcast) or the full size of their axis.
/// Positions (the four offsets, window, causal_offset) count queries, keys, heads or batch entries.
#define SDPA_PROBLEM_FIELDS(FIELD)                                                    \
  FIELD(uint32_t, batch)                                                              \
  FIELD(uint32_t, query_heads) /* a multiple of kv_heads */                           \
  FIELD(uint32_t, kv_heads)                                                           \
  FIELD(uint32_t, query_length)                                                       \
  FIELD(uint32_t, key_length)                                                         \
  FIELD(uint32_t, head_dim)  /* of query and key, 1 to 512 */                         \
  FIELD(uint32_t, value_dim) /* of value and output, 1 to 512 */                      \
  FIELD(Layout, layout)                                                               \
  FIELD(Type, type)                 /* of query, output and all gradients */          \
  FIELD(Type, key_type)             /* of key and value */                            \
  FIELD(uint32_t, key_block_length) /* keys in a block of a cache; 0: no blocks */    \
  FIELD(MaskType, mask_type)                                                          \
  FIELD(uint32_t, mask_batch)                                                         \
  FIELD(uint32_t, mask_heads)                                                         \
  FIELD(uint32_t, mask_queries)                                                       \
  FIELD(uint32_t, mask_keys)                                                          \
  FIELD(uint32_t, is_causal)                                                          \
  FIELD(int32_t, causal_offset) /* for every batch entry, unless Inputs lists them */ \
  FIELD(int32_t, window_left)   /* -1: unlimited */                                   \
  FIELD(int32_t, window_right)  /* -1: unlimited */                                   \
  FIELD(float, scale)           /* scores = scale * query . key */                    \
  FIELD(float, softcap)         /* 0: none */                                         \
  FIELD(double, dropout_p)      /* in [0, 1]; 0: no dropout */                        \
  FIELD(Placement, dropout_placement)                                                 \
  FIELD(uint32_t, dropout_broadcast) /* bit 0 batch, bit 1 head, bit 2 query */       \
  FIELD(uint32_t, seed_lo)                                                            \
  FIELD(uint32_t, seed_hi)                                                            \
  FIELD(uint32_t, offset_lo)                                                          \
  FIELD(uint32_t, offset_hi)                                                          \
  FIELD(uint32_t, batch_offset) /* position of this shard in the whole */             \
  FIELD(uint32_t, head_offset)                                                        \
  FIELD(uint32_t, query_offset)                                                       \
  FIELD(uint32_t, key_offset)                                                         \
  FIELD(Precision, precision)                                                         \
  FIELD(uint32_t, samples) /* 0: none; else as many outputs, one for each of as many offsets */

struct Problem {
#define SDPA_DECLARE_FIELD(type, name) type name;
  SDPA_PROBLEM_FIELDS(SDPA_DECLARE_FIELD)
#undef SDPA_DECLARE_FIELD
};
static_assert(std::is_trivially_copyable_v<Problem>, "a Problem is passed to GPUs by value");

constexpr uint32_t kMaxHeadDim = 512;

/// Blocks of a cache hold whole tiles of keys: no tile of any kernel crosses from one to the next.
constexpr uint32_t kKeyBlockUnit = 64;

/// Tensors that forward and backward read. Pointers to half types are to their 16-bit patterns.
struct Inputs {
  const void* query;              // [batch, query_heads, query_length, head_dim] in bhsd
  const void* key;                // [batch, kv_heads, key_length, head_dim]
  const void* value;              // [batch, kv_heads, key_length, value_dim]
  const void* mask;               // [mask_batch, mask_heads, mask_queries, mask_keys] or null
  const uint8_t* keep_mask;       // explicit dropout decisions, 1 keeps, or null; in any layout
                                  // [batch, query_heads, query_length, key_length or value_dim]
  const int32_t* causal_offsets;  // [batch] or null
  const int32_t* kv_lengths;      // [batch], each in 0..key_length, or null
  // Of a cache, or null: keys i * key_block_length on are in block key_blocks[i] of key [blocks,
  // kv_heads, key_block_length, head_dim] and value; kernels take one batch entry.
  const int32_t* key_blocks;
};

/// Tensors that the forward pass writes; all but the output may be null. A call with samples writes
/// [samples] outputs, or instead their mean and variance; lse is one for all of them, except under
/// `scores` dropout: [samples] then; and there are no matrices.
struct ForwardOutputs {
  void* output;            // [batch, query_heads, query_length, value_dim] in bhsd
  float* lse;              // [batch, query_heads, query_length]
  float* scores;           // [batch, query_heads, query_length, key_length]; before dropout
  float* weights;          // same shape; the softmax that was used
  float* dropped_weights;  // same shape; what multiplied the values
  float* mean;             // as one output, over the samples
  float* variance;         // same shape, unbiased
};

/// Tensors of the backward pass: the first three are read, the gradients are written.
struct BackwardTensors {
  const void* output;
  const float* lse;
  const void* grad_output;  // as output
  void* grad_query;         // as query
  void* grad_key;           // as key
  void* grad_value;         // as value
  void* grad_mask;          // as mask, or null
};

/// Multiply-adds of the forward pass, without regard to what masks leave out: the size of a call.
constexpr double multiply_adds(const Problem& p) {
  return double(p.batch) * p.query_heads * p.query_length * p.key_length *
         (p.head_dim + p.value_dim) * (p.samples > 0 ? p.samples : 1);
}

/// Elements of the output of one sample.
constexpr size_t output_size(const Problem& p) {
  return size_t{p.batch} * p.query_heads * p.query_length * p.value_dim;
}

/// A call of more multiply-adds than this is worth waking other threads for: about 20 microseconds.
constexpr double kWorthSharing = 1e6;

/// Where row `position` of head `head` of batch entry `b` starts, in elements.
constexpr size_t row_offset(Layout layout, size_t heads, size_t length, size_t width, size_t b,
                            size_t head, size_t position) {
  return layout == Layout::bhsd ? ((b * heads + head) * length + position) * width
                                : ((b * length + position) * heads + head) * width;
}

/// Distance between two consecutive positions of one head, in elements.
constexpr size_t row_stride(Layout layout, size_t heads, size_t width) {
  return layout == Layout::bhsd ? width : heads * width;
}

}  // namespace sdpa

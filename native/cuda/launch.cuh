// What the files that instantiate kernels offer to the launchers.
#pragma once

#include <algorithm>

#include "cuda/backward.cuh"
#include "cuda/kernels.h"

namespace sdpa::cuda {

constexpr int kSuccess = 0, kInvalidValue = 1, kInvalidConfiguration = 9;  // of cudaError_t

/// The most warps, at most `most`, whose tiles fit into a block's shared memory; 0: not even one's.
template <typename SharedBytes>
uint32_t warps_that_fit(uint32_t most, const DeviceLimits& limits, SharedBytes shared_bytes) {
  uint32_t warps = most;
  while (warps > 0 && shared_bytes(warps) > limits.shared_bytes_per_block) warps /= 2;
  return warps;
}

/// Starts `kernel` for all rows, in blocks of as many warps as fit.
template <typename S>
int start_blocks(void (*kernel)(ForwardCall), ForwardCall f, const DeviceLimits& limits,
                 Stream stream) {
  const uint32_t warps = warps_that_fit(S::kMostWarps, limits, S::shared_bytes);
  if (warps == 0) return kInvalidConfiguration;
  f.row_blocks = divide_up(f.rows, warps * S::kRowsPerWarp);
  const uint64_t blocks = uint64_t{f.row_blocks} * f.splits * f.chunks * f.units;
  if (blocks > 0x7fffffff) return kInvalidConfiguration;
  return start(kernel, {uint32_t(blocks), 1, 1}, warps * kLanes, S::shared_bytes(warps), f,
               limits.sm, stream);
}

template <typename S>
int start_forward(ForwardCall f, const DeviceLimits& limits, Stream stream) {
  f.chunks = divide_up(f.call.problem.value_dim, S::kColumns);
  return start_blocks<S>(forward_kernel<S>, f, limits, stream);
}

/// The forward kernels of each number format. `width` is the larger of head_dim and value_dim;
/// `exact`: weights are split too, so that only the result is rounded to 16 bits.
int start_forward_float16(const ForwardCall& f, uint32_t width, bool exact,
                          const DeviceLimits& limits, Stream stream);
int start_forward_bfloat16(const ForwardCall& f, uint32_t width, bool exact,
                           const DeviceLimits& limits, Stream stream);
/// Every type, in 1 to 3 terms.
int start_forward_split(const ForwardCall& f, uint32_t width, int terms, const DeviceLimits& limits,
                        Stream stream);

/// Whether a call is for start_hopper_forward and start_hopper_backward, unless dropout decisions
/// are given.
inline bool hopper_takes(const Problem& p, const DeviceLimits& limits) {
  // Scores are scaled after keys were excluded by -infinity, and with the factors of terms.
  const bool has_scale = p.scale > 0x1p-40f && p.scale < 0x1p40f;
  const bool is_drawn = p.dropout_p == 0 || p.key_offset % kDecisionsPerCall == 0;
  // The copy engine asks for rows of whole pieces of 16 bytes.
  const bool has_pieces = p.type == Type::float32 || (p.head_dim % 8 == 0 && p.value_dim % 8 == 0);
  const bool has_two_terms = p.type == Type::float32 && p.precision == Precision::highest;
  const uint32_t widest = has_two_terms ? 128 : 256;
  return limits.hopper && p.type == p.key_type && p.mask_type == MaskType::none && p.softcap == 0 &&
         has_scale && p.key_block_length == 0 && !is_decode(p) && is_drawn && has_pieces &&
         std::max(p.head_dim, p.value_dim) <= widest;
}

/// For calls that hopper_takes(): sets f.states. kNotTaken: a tensor's address is not what
/// the copy engine asks for, and nothing was started.
int start_hopper_forward(ForwardCall& f, void* workspace, const DeviceLimits& limits,
                         Stream stream);
size_t hopper_forward_workspace(const Problem& p);
constexpr int kNotTaken = -1;

/// What the backward kernels for Hopper write for themselves and for others, in workspace.
struct HopperBackwardWorkspace {
  void* kept_grad_output;  // as grad_output, if dropout is of the context
  void* terms;             // hopper_backward_terms() bytes
  RowState* states;        // as ForwardCall's
  RowState* key_states;    // as BackwardCall's
  float* query_sums;       // of grad_query in float32, rows rounded up to kQuerySumsTile
  uint32_t* turns;         // kQuerySumsTurns for each tile of kQuerySumsTile queries of a head
};
constexpr uint32_t kQuerySumsTile = 64, kQuerySumsTurns = 2;
/// The columns of query_sums; 0: each gradient has a kernel, and there are none.
inline uint32_t hopper_query_sums_width(const Problem& p) {
  const uint32_t width = std::max(p.head_dim, p.value_dim);
  if (p.type == Type::float32 || p.precision == Precision::highest || width > 128) return 0;
  return width <= 64 ? 64 : 128;
}

/// The same for gradients.
size_t hopper_backward_terms(const Problem& p);
int start_hopper_backward(const BackwardCall& g, const HopperBackwardWorkspace& workspace,
                          const DeviceLimits& limits, Stream stream);

/// Starts query_gradients and key_gradients.
template <typename S>
int start_backward(BackwardCall g, const DeviceLimits& limits, Stream stream) {
  const Problem& p = g.forward.call.problem;
  const uint32_t warps = warps_that_fit(S::kMostWarps, limits, S::shared_bytes);
  if (warps == 0) return kInvalidConfiguration;
  const uint32_t rows = warps * S::kRowsPerWarp, width = std::max(p.head_dim, p.value_dim);
  g.forward.row_blocks = divide_up(p.query_length, rows);
  g.key_blocks = divide_up(p.key_length, rows);
  g.chunks = divide_up(width, S::kKeyColumns);
  const uint64_t query_blocks = uint64_t{g.forward.row_blocks} * g.forward.units;
  const uint64_t key_blocks = uint64_t{g.key_blocks} * g.chunks * p.kv_heads * p.batch;
  if (std::max(query_blocks, key_blocks) > 0x7fffffff) return kInvalidConfiguration;
  const size_t shared = S::shared_bytes(warps);
  const int error = start(query_gradients<S>, {uint32_t(query_blocks), 1, 1}, warps * kLanes,
                          shared, g, limits.sm, stream);
  if (error != kSuccess) return error;
  return start(key_gradients<S>, {uint32_t(key_blocks), 1, 1}, warps * kLanes, shared, g, limits.sm,
               stream);
}

/// The backward kernels, by number formats as the forward ones; the first two take widths to 128,
/// the last one 2 or 3 terms.
int start_backward_float16(const BackwardCall& g, uint32_t width, const DeviceLimits& limits,
                           Stream stream);
int start_backward_bfloat16(const BackwardCall& g, uint32_t width, bool exact,
                            const DeviceLimits& limits, Stream stream);
int start_backward_split(const BackwardCall& g, uint32_t width, int terms,
                         const DeviceLimits& limits, Stream stream);

}  // namespace sdpa::cuda

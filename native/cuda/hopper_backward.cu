// Starts the backward kernels of hopper_backward.cuh; compiled for compute capability 9.0a alone.
#include "cuda/hopper_backward.cuh"
#include "cuda/launch.cuh"

namespace sdpa::cuda {
namespace {

// ---------------------------------------------------------------------------- dropout of the
// context

struct KeepCall {
  BackwardCall backward;
  void* kept_grad_output;
};

constexpr uint32_t kKeepThreads = 128;

/// Copies grad_output with zeros for what dropout drops of the context. A thread takes eight
/// columns of a row.
SDPA_KERNEL(kKeepThreads, 1) keep_grad_output(const SDPA_PARAMETER KeepCall c) {
  const Call& call = c.backward.forward.call;
  const Problem& p = call.problem;
  const uint32_t pieces = p.value_dim / 8;
  const uint64_t number = uint64_t{block_index().x} * kKeepThreads + thread_index();
  const uint64_t row = number / pieces;
  if (row >= uint64_t{p.batch} * p.query_heads * p.query_length) return;
  const uint32_t query = uint32_t(row % p.query_length);
  const uint32_t head = uint32_t(row / p.query_length % p.query_heads);
  const uint32_t b = uint32_t(row / p.query_length / p.query_heads);
  const uint32_t column = uint32_t(number % pieces) * 8;
  const size_t at =
      row_offset(p.layout, p.query_heads, p.query_length, p.value_dim, b, head, query) + column;
  const uint32_t keep = drawn_group(call, b, head, query, column / kDecisionsPerCall);
  Vector16 piece = load_vector(static_cast<const uint16_t*>(c.backward.tensors.grad_output) + at);
  SDPA_UNROLL
  for (uint32_t i = 0; i < 4; ++i) {
    if (!(keep >> (2 * i) & 1)) piece.w[i] &= 0xffff0000;
    if (!(keep >> (2 * i) & 2)) piece.w[i] &= 0x0000ffff;
  }
  store_vector(static_cast<uint16_t*>(c.kept_grad_output) + at, piece);
}

int start_keep(const BackwardCall& g, void* kept_grad_output, const DeviceLimits& limits,
               Stream stream) {
  const uint64_t pieces = output_size(g.forward.call.problem) / 8;
  const uint64_t blocks = (pieces + kKeepThreads - 1) / kKeepThreads;
  if (blocks > 0x7fffffff) return kInvalidConfiguration;
  return start(keep_grad_output, {uint32_t(blocks), 1, 1}, kKeepThreads, 0,
               KeepCall{g, kept_grad_output}, limits.sm, stream);
}

// -------------------------------------------------------------------------------------- launchers

/// The tensors of the call: query, grad_output, key, value.
using Tensors = MappedTensor[4];

/// Starts one of the kernels; `first` is the first of the two tensors whose rows blocks own.
template <typename S>
int start_kernel(void (*kernel)(HopperBackwardCall), const BackwardCall& g, const Tensors& tensors,
                 int first, RowState* states, uint64_t blocks, const DeviceLimits& limits,
                 Stream stream) {
  if (blocks > 0x7fffffff) return kInvalidConfiguration;
  HopperBackwardCall h{g, {}, {}, {}, {}, states};
  TensorMap* const maps[4] = {&h.owned, &h.owned_values, &h.tile, &h.tile_values};
  for (int i = 0; i < 4; ++i) {
    const int error = make_map(tensors[(first + i) % 4], i < 2 ? S::kRows : S::kTile, maps[i]);
    if (error != kSuccess) return error;
  }
  return start(kernel, {uint32_t(blocks), 1, 1}, S::kThreads, S::kSharedBytes, h, limits.sm,
               stream);
}

template <Half kHalf, int kWidth>
int start_width(BackwardCall g, const Tensors& tensors, const HopperBackwardWorkspace& workspace,
                const DeviceLimits& limits, Stream stream) {
  using Queries = HopperBackwardShape<kHalf, kWidth, kWidth == 64 ? 128 : 64>;
  using Keys = HopperBackwardShape<kHalf, kWidth, 64>;
  const Problem& p = g.forward.call.problem;
  g.forward.row_blocks = divide_up(p.query_length, Queries::kRows);
  g.key_blocks = divide_up(p.key_length, Keys::kRows);
  g.chunks = 1;
  const int error =
      start_kernel<Queries>(hopper_query_gradients<Queries>, g, tensors, 0, workspace.states,
                            uint64_t{g.forward.row_blocks} * g.forward.units, limits, stream);
  if (error != kSuccess) return error;
  return start_kernel<Keys>(hopper_key_gradients<Keys>, g, tensors, 2, workspace.key_states,
                            uint64_t{g.key_blocks} * p.kv_heads * p.batch, limits, stream);
}

template <Half kHalf>
int start_half(const BackwardCall& g, const Tensors& tensors,
               const HopperBackwardWorkspace& workspace, const DeviceLimits& limits,
               Stream stream) {
  const Problem& p = g.forward.call.problem;
  return std::max(p.head_dim, p.value_dim) <= 64
             ? start_width<kHalf, 64>(g, tensors, workspace, limits, stream)
             : start_width<kHalf, 128>(g, tensors, workspace, limits, stream);
}

}  // namespace

int start_hopper_backward(const BackwardCall& g, const HopperBackwardWorkspace& workspace,
                          const DeviceLimits& limits, Stream stream) {
  const Call& call = g.forward.call;
  const Problem& p = call.problem;
  const bool keeps = call.drops(Placement::context);
  const auto of_queries = [&](const void* data, uint32_t width) {
    return mapped(p, data, p.query_heads, p.query_length, width);
  };
  const Tensors tensors = {
      of_queries(call.inputs.query, p.head_dim),
      of_queries(keeps ? workspace.kept_grad_output : g.tensors.grad_output, p.value_dim),
      mapped(p, call.inputs.key, p.kv_heads, p.key_length, p.head_dim),
      mapped(p, call.inputs.value, p.kv_heads, p.key_length, p.value_dim),
  };
  for (const MappedTensor& tensor : tensors) {
    if (!tensor.is_mappable()) return kNotTaken;
  }
  if (keeps) {
    if (!of_queries(g.tensors.grad_output, p.value_dim).is_mappable()) return kNotTaken;
    const int error = start_keep(g, workspace.kept_grad_output, limits, stream);
    if (error != kSuccess) return error;
  }
  return p.type == Type::float16
             ? start_half<Half::float16>(g, tensors, workspace, limits, stream)
             : start_half<Half::bfloat16>(g, tensors, workspace, limits, stream);
}

}  // namespace sdpa::cuda

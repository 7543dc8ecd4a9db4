// Starts the backward kernels of hopper_backward.cuh; compiled for compute capability 9.0a alone.
#include "cuda/hopper_backward_joint.cuh"
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
  const uint32_t pieces = divide_up(p.value_dim, 8);
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
  if (p.type == Type::float32) {
    const float* const from = static_cast<const float*>(c.backward.tensors.grad_output) + at;
    float* const to = static_cast<float*>(c.kept_grad_output) + at;
    for (uint32_t i = 0; i < 8 && column + i < p.value_dim; ++i) {
      to[i] = keep >> i & 1 ? from[i] : 0.0f;
    }
    return;
  }
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
  const Problem& p = g.forward.call.problem;
  const uint64_t pieces = output_size(p) / p.value_dim * divide_up(p.value_dim, 8);
  const uint64_t blocks = (pieces + kKeepThreads - 1) / kKeepThreads;
  if (blocks > 0x7fffffff) return kInvalidConfiguration;
  return start(keep_grad_output, {uint32_t(blocks), 1, 1}, kKeepThreads, 0,
               KeepCall{g, kept_grad_output}, limits.sm, stream);
}

// -------------------------------------------------------------------------------------- launchers

/// The tensors of the call: query, grad_output, key, value. `factors`: of their terms.
struct Tensors {
  MappedTensor maps[4];
  BackwardFactors factors;
};

/// Maps the tensors of a kernel; `first` is the first of the two whose rows blocks own.
template <typename S>
int map_sides(const Tensors& tensors, int first, HopperBackwardCall& h) {
  TensorMap* const maps[4] = {&h.owned, &h.owned_values, &h.tile, &h.tile_values};
  for (int i = 0; i < 4; ++i) {
    const int error = make_map(tensors.maps[(first + i) % 4], i < 2 ? S::kRows : S::kTile, maps[i]);
    if (error != kSuccess) return error;
  }
  return kSuccess;
}

template <Half kHalf, int kWidth>
int start_joint(BackwardCall g, const Tensors& tensors, const HopperBackwardWorkspace& workspace,
                const DeviceLimits& limits, Stream stream) {
  using S = HopperJointShape<kHalf, kWidth>;
  static_assert(S::kTile == kQuerySumsTile && S::kGroups == kQuerySumsTurns);
  const Problem& p = g.forward.call.problem;
  g.key_blocks = divide_up(p.key_length, S::kRows);
  g.chunks = 1;
  HopperJointCall h{{g, {}, {}, {}, {}, {}, workspace.key_states},
                    {workspace.query_sums, workspace.turns, divide_up(p.query_length, S::kTile)},
                    workspace.states};
  int error = map_sides<S>(tensors, 2, h.sides);
  if (error != kSuccess) return error;
  const uint64_t tiles = uint64_t{h.query.tiles} * g.forward.units, turns = tiles * S::kGroups;
  const uint64_t blocks = uint64_t{g.key_blocks} * p.kv_heads * p.batch;
  if (std::max(turns, blocks) > 0x7fffffff) return kInvalidConfiguration;
  error = start(clear_turns, {divide_up(uint32_t(turns), kGroupThreads), 1, 1}, kGroupThreads, 0,
                Turns{h.query.turns, uint32_t(turns)}, limits.sm, stream);
  if (error != kSuccess) return error;
  error = start(hopper_joint_gradients<S>, {uint32_t(blocks), 1, 1}, S::kThreads, S::kSharedBytes,
                h, limits.sm, stream);
  if (error != kSuccess) return error;
  return start(store_query_sums<S>, {uint32_t(tiles), 1, 1}, kGroupThreads, 0, h, limits.sm,
               stream);
}

/// Starts the kernel of one gradient; `first` as in map_sides.
template <typename S>
int start_kernel(void (*kernel)(HopperBackwardCall), const BackwardCall& g, const Tensors& tensors,
                 int first, RowState* states, uint64_t blocks, const DeviceLimits& limits,
                 Stream stream) {
  if (blocks > 0x7fffffff) return kInvalidConfiguration;
  HopperBackwardCall h{g, tensors.factors, {}, {}, {}, {}, states};
  const int error = map_sides<S>(tensors, first, h);
  if (error != kSuccess) return error;
  return start(kernel, {uint32_t(blocks), 1, 1}, S::kThreads, S::kSharedBytes, h, limits.sm,
               stream);
}

template <typename S>
int start_singles(BackwardCall g, const Tensors& tensors, const HopperBackwardWorkspace& workspace,
                  const DeviceLimits& limits, Stream stream) {
  const Problem& p = g.forward.call.problem;
  g.forward.row_blocks = divide_up(p.query_length, S::kRows);
  g.key_blocks = divide_up(p.key_length, S::kRows);
  g.chunks = 1;
  const uint64_t query_blocks = uint64_t{g.forward.row_blocks} * g.forward.units;
  const uint64_t key_blocks = uint64_t{g.key_blocks} * p.kv_heads * p.batch;
  int error = start_kernel<S>(hopper_query_gradients<S>, g, tensors, 0, workspace.states,
                              query_blocks, limits, stream);
  if (error != kSuccess) return error;
  error = start_kernel<S>(hopper_key_gradients<S, true>, g, tensors, 2, workspace.key_states,
                          key_blocks, limits, stream);
  if (error != kSuccess) return error;
  return start_kernel<S>(hopper_key_gradients<S, false>, g, tensors, 2, workspace.key_states,
                         key_blocks, limits, stream);
}

/// Float32 and `highest`.
template <Half kHalf, int kTerms, int kWeightTerms>
int start_precise(const BackwardCall& g, const Tensors& tensors,
                  const HopperBackwardWorkspace& workspace, const DeviceLimits& limits,
                  Stream stream) {
  using Narrow = HopperBackwardShape<kHalf, kTerms, kWeightTerms, 64, 64, true>;
  using Wide = HopperBackwardShape<kHalf, kTerms, kWeightTerms, 128, 32, true>;
  const Problem& p = g.forward.call.problem;
  const uint32_t width = std::max(p.head_dim, p.value_dim);
  if (width <= 64) return start_singles<Narrow>(g, tensors, workspace, limits, stream);
  if constexpr (kTerms == 1) {
    // Terms of bfloat16 need no tiles by themselves for the bits of a bfloat16 result.
    using Widest = HopperBackwardShape<kHalf, 1, kWeightTerms, 256, 32, kHalf == Half::float16>;
    if (width > 128) return start_singles<Widest>(g, tensors, workspace, limits, stream);
  }
  return start_singles<Wide>(g, tensors, workspace, limits, stream);
}

template <Half kHalf>
int start_half(const BackwardCall& g, const Tensors& tensors,
               const HopperBackwardWorkspace& workspace, const DeviceLimits& limits,
               Stream stream) {
  switch (hopper_query_sums_width(g.forward.call.problem)) {
    case 64:
      return start_joint<kHalf, 64>(g, tensors, workspace, limits, stream);
    case 128:
      return start_joint<kHalf, 128>(g, tensors, workspace, limits, stream);
  }
  using S = HopperBackwardShape<kHalf, 1, 1, 256, 32, false>;
  return start_singles<S>(g, tensors, workspace, limits, stream);
}

int start_type(const BackwardCall& g, const Tensors& tensors,
               const HopperBackwardWorkspace& workspace, const DeviceLimits& limits,
               Stream stream) {
  const Problem& p = g.forward.call.problem;
  const bool exact = p.precision == Precision::highest;
  switch (p.type) {
    case Type::float32:
      return exact ? start_precise<Half::float16, 2, 2>(g, tensors, workspace, limits, stream)
                   : start_precise<Half::float16, 1, 1>(g, tensors, workspace, limits, stream);
    case Type::float16:
      return exact ? start_precise<Half::float16, 1, 2>(g, tensors, workspace, limits, stream)
                   : start_half<Half::float16>(g, tensors, workspace, limits, stream);
    case Type::bfloat16:
      return exact ? start_precise<Half::bfloat16, 1, 3>(g, tensors, workspace, limits, stream)
                   : start_half<Half::bfloat16>(g, tensors, workspace, limits, stream);
  }
  return kInvalidValue;
}

/// The tensors of a call as terms; unless they are float32, there are none.
TermsCall terms_call(const Call& call, const void* grad_output) {
  const Problem& p = call.problem;
  TermsCall c{call, {}, 0, terms_of(p)};
  if (p.type != Type::float32) return c;
  c.add(call.inputs.query, p.query_heads, p.query_length, p.head_dim, false);
  c.add(grad_output, p.query_heads, p.query_length, p.value_dim, false);
  c.add(call.inputs.key, p.kv_heads, p.key_length, p.head_dim, true);
  c.add(call.inputs.value, p.kv_heads, p.key_length, p.value_dim, true);
  return c;
}

}  // namespace

size_t hopper_backward_terms(const Problem& p) {
  TermsCall c = terms_call({p, {}, {}}, nullptr);
  return place_terms(c, nullptr);
}

int start_hopper_backward(const BackwardCall& g, const HopperBackwardWorkspace& workspace,
                          const DeviceLimits& limits, Stream stream) {
  const Call& call = g.forward.call;
  const Problem& p = call.problem;
  const bool keeps = call.drops(Placement::context);
  const void* const grad_output = keeps ? workspace.kept_grad_output : g.tensors.grad_output;
  TermsCall c = terms_call(call, grad_output);
  place_terms(c, static_cast<unsigned char*>(workspace.terms));
  const auto of_queries = [&](const void* data, uint32_t width) {
    return mapped(p, data, p.query_heads, p.query_length, width);
  };
  Tensors tensors = {
      {
          of_queries(call.inputs.query, p.head_dim),
          of_queries(grad_output, p.value_dim),
          mapped(p, call.inputs.key, p.kv_heads, p.key_length, p.head_dim),
          mapped(p, call.inputs.value, p.kv_heads, p.key_length, p.value_dim),
      },
      {},
  };
  for (int i = 0; i < c.count; ++i) tensors.maps[i] = mapped_terms(c, c.tensors[i]);
  for (const MappedTensor& tensor : tensors.maps) {
    if (!tensor.is_mappable()) return kNotTaken;
  }
  int error = kSuccess;
  if (keeps) {
    const bool reads_pieces = p.type != Type::float32;
    if (reads_pieces && !of_queries(g.tensors.grad_output, p.value_dim).is_mappable()) {
      return kNotTaken;
    }
    error = start_keep(g, workspace.kept_grad_output, limits, stream);
  }
  if (error == kSuccess && c.count > 0) {
    tensors.factors = {c.tensors[0].factors, c.tensors[1].factors, c.tensors[2].factors,
                       c.tensors[3].factors};
    error = start_terms(c, limits, stream);
  }
  return error == kSuccess ? start_type(g, tensors, workspace, limits, stream) : error;
}

}  // namespace sdpa::cuda

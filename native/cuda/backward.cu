// The backward pass: which kernels a call takes, and the small ones around them.
#include "cuda/launch.cuh"
#include "cuda/mask_gradient.cuh"

namespace sdpa::cuda {
namespace {

constexpr uint32_t kDeltaWarps = 4;

uint64_t rows_of_call(const Problem& p) {
  return uint64_t{p.batch} * p.query_heads * p.query_length;
}

/// delta = sum over columns of grad_output * output. A warp takes one row.
SDPA_KERNEL(kDeltaWarps* kLanes, 1) delta_kernel(const SDPA_PARAMETER BackwardCall g) {
  const Problem& p = g.forward.call.problem;
  const uint64_t row = uint64_t{block_index().x} * kDeltaWarps + warp_index();
  if (row >= uint64_t{p.batch} * p.query_heads * p.query_length) return;
  const uint32_t query = uint32_t(row % p.query_length);
  const uint32_t head = uint32_t(row / p.query_length % p.query_heads);
  const uint32_t b = uint32_t(row / p.query_length / p.query_heads);
  const Rows output = query_side_rows(p, g.tensors.output, p.value_dim, b, head, query, 1);
  const Rows grad = query_side_rows(p, g.tensors.grad_output, p.value_dim, b, head, query, 1);
  float sum = 0;
  for (uint32_t i = lane_index(); i < p.value_dim; i += kLanes) {
    sum = fmaf(output.at(0, i), grad.at(0, i), sum);
  }
  for (uint32_t lanes = 1; lanes < kLanes; lanes *= 2) sum += shuffle_xor(sum, lanes);
  if (lane_index() == 0) g.delta[row] = sum;
}

int start_delta(const BackwardCall& g, const DeviceLimits& limits, Stream stream) {
  const uint64_t rows = rows_of_call(g.forward.call.problem);
  const uint64_t blocks = (rows + kDeltaWarps - 1) / kDeltaWarps;
  if (blocks > 0x7fffffff) return kInvalidConfiguration;
  return start(delta_kernel, {uint32_t(blocks), 1, 1}, kDeltaWarps * kLanes, 0, g, limits.sm,
               stream);
}

/// Workspace of a call in bytes, those first that have to be aligned.
struct BackwardWorkspace {
  size_t query_sums = 0, terms = 0, kept = 0, delta, turns = 0, states = 0, key_states = 0;

  BackwardWorkspace(const Problem& p, const DeviceLimits& limits)
      : delta(size_t(rows_of_call(p)) * sizeof(float)) {
    if (!hopper_takes(p, limits)) return;
    const bool keeps = p.dropout_p > 0 && p.dropout_placement == Placement::context;
    if (keeps) kept = output_size(p) * size_of(p.type);
    if (const uint32_t width = hopper_query_sums_width(p)) {
      const size_t tiles =
          size_t{p.batch} * p.query_heads * divide_up(p.query_length, kQuerySumsTile);
      query_sums = tiles * kQuerySumsTile * width * sizeof(float);
      turns = tiles * kQuerySumsTurns * sizeof(uint32_t);
    }
    terms = hopper_backward_terms(p);
    states = size_t(rows_of_call(p));
    key_states = size_t{p.batch} * p.kv_heads * p.key_length;
  }
  size_t bytes() const { return query_sums + terms + kept + delta + turns + states + key_states; }
};

int start_portable(const BackwardCall& g, const DeviceLimits& limits, Stream stream) {
  const Problem& p = g.forward.call.problem;
  const uint32_t width = std::max(p.head_dim, p.value_dim);
  const bool exact = p.precision == Precision::highest;
  if (p.type == p.key_type && width <= 128) {
    // The gradients of scores need float16's range twice over to be exact: bfloat16 terms have it.
    if (p.type == Type::float16 && !exact) return start_backward_float16(g, width, limits, stream);
    if (p.type == Type::bfloat16) return start_backward_bfloat16(g, width, exact, limits, stream);
  }
  return start_backward_split(g, width, exact ? 3 : 2, limits, stream);
}

int start_gradients(BackwardCall g, const HopperBackwardWorkspace& workspace,
                    const DeviceLimits& limits, Stream stream) {
  const Call& call = g.forward.call;
  if (hopper_takes(call.problem, limits) && !call.inputs.keep_mask) {
    const int error = start_hopper_backward(g, workspace, limits, stream);
    if (error != kSuccess && error != kNotTaken) return error;
    if (error == kSuccess) {
      g.forward.states = workspace.states;
      g.key_states = workspace.key_states;
    }
  }
  return start_portable(g, limits, stream);
}

int start_mask_gradient(const BackwardCall& g, const DeviceLimits& limits, Stream stream) {
  const Problem& p = g.forward.call.problem;
  using S = MaskShape;
  const uint32_t warps = warps_that_fit(S::kMostWarps, limits, S::shared_bytes);
  if (warps == 0) return kInvalidConfiguration;
  MaskGradientCall m{g, 1, 1};
  if (p.mask_queries > 1) m.query_tasks = divide_up(p.query_length, warps * S::kRowsPerWarp);
  if (p.mask_keys > 1) m.key_tasks = divide_up(p.key_length, S::kKeys);
  const uint64_t blocks = uint64_t{p.mask_batch} * p.mask_heads * m.query_tasks * m.key_tasks;
  if (blocks > 0x7fffffff) return kInvalidConfiguration;
  return start(mask_gradient, {uint32_t(blocks), 1, 1}, warps * kLanes, S::shared_bytes(warps), m,
               limits.sm, stream);
}

}  // namespace

const char* backward_unsupported(const Problem& p, const DeviceLimits& limits) {
  if (limits.sm < 75) return "the GPU is older than compute capability 7.5";
  const bool wide = p.head_dim > MaskShape::kWidth || p.value_dim > MaskShape::kWidth;
  return wide ? "gradients on a GPU take head dims to 256" : nullptr;
}

size_t backward_workspace(const Problem& p, bool, const DeviceLimits& limits) {
  return BackwardWorkspace(p, limits).bytes();
}

int launch_backward(const Problem& p, const Inputs& inputs, const BackwardTensors& tensors,
                    void* workspace, const DeviceLimits& limits, Stream stream) {
  BackwardCall g{};
  g.forward.call = {p, inputs, resolve_dropout(p, inputs.keep_mask != nullptr)};
  g.forward.unit_heads = 1;
  g.forward.rows = p.query_length;
  g.forward.units = p.batch * p.query_heads;
  g.forward.splits = g.forward.chunks = 1;
  g.tensors = tensors;
  const BackwardWorkspace sizes(p, limits);
  unsigned char* const terms = static_cast<unsigned char*>(workspace) + sizes.query_sums;
  unsigned char* const kept = terms + sizes.terms;
  unsigned char* const delta = kept + sizes.kept;
  unsigned char* const turns = delta + sizes.delta;
  RowState* const states = reinterpret_cast<RowState*>(turns + sizes.turns);
  g.delta = reinterpret_cast<float*>(delta);
  int error = start_delta(g, limits, stream);
  if (error == kSuccess) {
    error = start_gradients(g,
                            {kept, terms, states, states + sizes.states,
                             static_cast<float*>(workspace), reinterpret_cast<uint32_t*>(turns)},
                            limits, stream);
  }
  if (error == kSuccess && tensors.grad_mask) error = start_mask_gradient(g, limits, stream);
  return error;
}

}  // namespace sdpa::cuda

// The forward pass: which kernels a call takes, and the small ones around them.
#include "cuda/launch.cuh"
#include "cuda/matrices.cuh"

namespace sdpa::cuda {
namespace {

// ---------------------------------------------------------------------------------------- kernels

constexpr uint32_t kCombineWarps = 4;

/// Joins the splits of the keys in order. A warp takes one row.
SDPA_KERNEL(kCombineWarps* kLanes, 1) combine_splits(const SDPA_PARAMETER ForwardCall f) {
  const Call& call = f.call;
  const Problem& p = call.problem;
  const uint64_t number = uint64_t{block_index().x} * kCombineWarps + warp_index();
  if (number >= uint64_t{f.units} * f.rows) return;
  const uint32_t unit = uint32_t(number / f.rows), row = uint32_t(number % f.rows);
  const uint32_t units_per_entry = p.query_heads / f.unit_heads;
  const uint32_t b = unit / units_per_entry;
  const uint32_t head = unit % units_per_entry * f.unit_heads + row / p.query_length;
  const uint32_t query = row % p.query_length;
  const uint32_t keys = visibility_of(p, call.inputs, b).key_end;
  const uint32_t splits = divide_up(keys, split_length(keys));
  const auto part = [&](uint32_t split) {
    return (size_t{unit} * f.splits + split) * f.rows + row;
  };
  float top = -SDPA_INFINITY, sum = 0;
  for (uint32_t s = 0; s < splits; ++s) top = fmaxf(top, f.partial_sums[2 * part(s)]);
  const float shift = top == -SDPA_INFINITY ? 0.0f : top;
  const auto factor = [&](uint32_t s) {
    return exp2_fast((f.partial_sums[2 * part(s)] - shift) * kLog2E);
  };
  // As everywhere, a weight of 0 adds nothing; but a split that saw a NaN makes the row NaN.
  const auto is_idle = [&](uint32_t s) {
    return factor(s) == 0 && !is_nan(f.partial_sums[2 * part(s) + 1]);
  };
  for (uint32_t s = 0; s < splits; ++s) {
    if (!is_idle(s)) sum = fmaf(factor(s), f.partial_sums[2 * part(s) + 1], sum);
  }
  const size_t at =
      row_offset(p.layout, p.query_heads, p.query_length, p.value_dim, b, head, query);
  for (uint32_t column = lane_index(); column < p.value_dim; column += kLanes) {
    float context = 0;
    for (uint32_t s = 0; s < splits; ++s) {
      if (!is_idle(s)) {
        context = fmaf(factor(s), f.partial_context[part(s) * p.value_dim + column], context);
      }
    }
    context *= context_factor(call, sum);
    if (call.drops(Placement::context) &&
        !(keep_byte(call, b, head, query, column / 8 * 8) >> (column % 8) & 1)) {
      context = 0;
    }
    write_element(p.type, f.outputs.output, at + column, context);
  }
  if (f.outputs.lse && lane_index() == 0) {
    f.outputs.lse[flat_row(p, b, head, query)] = lse_of(top, sum);
  }
}

// -------------------------------------------------------------------------------------- launchers

bool wants_matrices(const ForwardOutputs& wanted) {
  return wanted.scores || wanted.weights || wanted.dropped_weights;
}

uint32_t most_splits(const Problem& p) {
  if (!is_decode(p)) return 1;
  const uint32_t splits = divide_up(p.key_length, kSmallestSplit);
  return splits < kMostSplits ? splits : kMostSplits;
}

size_t rows_of_call(const Problem& p) { return size_t{p.batch} * p.query_heads * p.query_length; }

/// Floats of workspace: what splits hand on, and lse where the matrices need it; then, in bytes,
/// what Hopper's kernels use.
struct ForwardWorkspace {
  size_t context = 0, sums = 0, lse = 0, hopper = 0;
  ForwardWorkspace(const Problem& p, const ForwardOutputs& wanted, const DeviceLimits& limits) {
    const size_t splits = most_splits(p);
    if (splits > 1) {
      context = rows_of_call(p) * splits * p.value_dim;
      sums = rows_of_call(p) * splits * 2;
    }
    if (wants_matrices(wanted) && !wanted.lse) lse = rows_of_call(p);
    if (hopper_takes(p, limits)) hopper = hopper_forward_workspace(p);
  }
  size_t hopper_at() const { return ((context + sums + lse) * sizeof(float) + 15) / 16 * 16; }
  size_t bytes() const { return hopper_at() + hopper; }
};

ForwardCall forward_call(const Problem& p, const Inputs& inputs, const ForwardOutputs& outputs,
                         const ForwardWorkspace& sizes, void* workspace) {
  ForwardCall f{};
  f.call = {p, inputs, resolve_dropout(p, inputs.keep_mask != nullptr)};
  f.outputs = outputs;
  f.unit_heads = is_decode(p) ? p.query_heads / p.kv_heads : 1;
  f.rows = f.unit_heads * p.query_length;
  f.units = p.batch * (p.query_heads / f.unit_heads);
  f.splits = most_splits(p);
  f.chunks = 1;
  f.partial_context = static_cast<float*>(workspace);
  f.partial_sums = f.partial_context + sizes.context;
  if (sizes.lse > 0) f.outputs.lse = f.partial_sums + sizes.sums;
  return f;
}

int start_portable(const ForwardCall& f, const DeviceLimits& limits, Stream stream) {
  const Problem& p = f.call.problem;
  const uint32_t width = p.head_dim > p.value_dim ? p.head_dim : p.value_dim;
  const bool exact = p.precision == Precision::highest;
  if (p.type == p.key_type && width <= 256) {
    if (p.type == Type::float16) return start_forward_float16(f, width, exact, limits, stream);
    if (p.type == Type::bfloat16) return start_forward_bfloat16(f, width, exact, limits, stream);
  }
  // float16 has more bits than one term of bfloat16.
  const bool one = p.type == Type::float32 && p.key_type == Type::float32;
  const int terms = exact ? 3 : p.precision == Precision::medium && one ? 1 : 2;
  return start_forward_split(f, width, terms, limits, stream);
}

/// `workspace` is for Hopper's kernels.
int start_contexts(ForwardCall f, void* workspace, const DeviceLimits& limits, Stream stream) {
  if (hopper_takes(f.call.problem, limits) && !f.call.inputs.keep_mask) {
    const int error = start_hopper_forward(f, workspace, limits, stream);
    if (error != kSuccess && error != kNotTaken) return error;
  }
  return start_portable(f, limits, stream);
}

int start_matrices(ForwardCall f, const DeviceLimits& limits, Stream stream) {
  const Problem& p = f.call.problem;
  f.unit_heads = 1;
  f.rows = p.query_length;
  f.units = p.batch * p.query_heads;
  f.splits = f.chunks = 1;
  if (p.head_dim <= 128) {
    return start_blocks<MatrixShape<128>>(matrices_kernel<MatrixShape<128>>, f, limits, stream);
  }
  return start_blocks<MatrixShape<512>>(matrices_kernel<MatrixShape<512>>, f, limits, stream);
}

}  // namespace

const char* forward_unsupported(const Problem&, const DeviceLimits& limits) {
  return limits.sm < 75 ? "the GPU is older than compute capability 7.5" : nullptr;
}

size_t forward_workspace(const Problem& p, const ForwardOutputs& wanted,
                         const DeviceLimits& limits) {
  return ForwardWorkspace(p, wanted, limits).bytes();
}

int launch_forward(const Problem& p, const Inputs& inputs, const ForwardOutputs& outputs,
                   void* workspace, const DeviceLimits& limits, Stream stream) {
  const ForwardWorkspace sizes(p, outputs, limits);
  const ForwardCall f = forward_call(p, inputs, outputs, sizes, workspace);
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  int error = start_contexts(f, bytes + sizes.hopper_at(), limits, stream);
  if (error == kSuccess && f.splits > 1) {
    const uint64_t warps = uint64_t{f.units} * f.rows;
    const uint64_t blocks = (warps + kCombineWarps - 1) / kCombineWarps;
    if (blocks > 0x7fffffff) return kInvalidConfiguration;
    error = start(combine_splits, {uint32_t(blocks), 1, 1}, kCombineWarps * kLanes, 0, f, limits.sm,
                  stream);
  }
  if (error == kSuccess && wants_matrices(outputs)) error = start_matrices(f, limits, stream);
  return error;
}

}  // namespace sdpa::cuda

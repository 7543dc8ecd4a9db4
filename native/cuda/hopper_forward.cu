// Starts the forward kernels of hopper_forward.cuh; compiled for compute capability 9.0a alone.
#include "cuda/hopper_forward.cuh"
#include "cuda/launch.cuh"

namespace sdpa::cuda {
namespace {

/// The tensors of a call as terms; unless they are float32, there are none.
TermsCall terms_call(const Call& call) {
  const Problem& p = call.problem;
  TermsCall c{call, {}, 0, terms_of(p)};
  if (p.type != Type::float32) return c;
  c.add(call.inputs.query, p.query_heads, p.query_length, p.head_dim, false);
  c.add(call.inputs.key, p.kv_heads, p.key_length, p.head_dim, true);
  c.add(call.inputs.value, p.kv_heads, p.key_length, p.value_dim, true);
  return c;
}

template <typename S>
int start_shape(HopperCall& h, const MappedTensor (&tensors)[3], const DeviceLimits& limits,
                Stream stream) {
  TensorMap* const maps[3] = {&h.query, &h.key, &h.value};
  for (int i = 0; i < 3; ++i) {
    const int error = make_map(tensors[i], i == 0 ? S::kRows : S::kKeys, maps[i]);
    if (error != kSuccess) return error;
  }
  ForwardCall& f = h.forward;
  f.row_blocks = divide_up(f.rows, S::kRows);
  const uint64_t blocks = uint64_t{f.row_blocks} * f.units;
  if (blocks > 0x7fffffff) return kInvalidConfiguration;
  const Index3 grid = {uint32_t(blocks), 1, 1};
  const int error = start(hopper_forward_kernel<S, false>, grid, S::kThreads, S::kSharedBytes, h,
                          limits.sm, stream);
  if (error != kSuccess) return error;
  return start(hopper_forward_kernel<S, true>, grid, S::kThreads, S::kSharedBytes, h, limits.sm,
               stream);
}

template <Half kHalf, int kTerms>
int start_width(HopperCall& h, const MappedTensor (&tensors)[3], const DeviceLimits& limits,
                Stream stream) {
  const Problem& p = h.forward.call.problem;
  const uint32_t width = std::max(p.head_dim, p.value_dim);
  if (kTerms == 2 || p.precision == Precision::highest) {
    if (width <= 64)
      return start_shape<HopperShape<kHalf, kTerms, 2, 64>>(h, tensors, limits, stream);
    if (kTerms == 2 || width <= 128)
      return start_shape<HopperShape<kHalf, kTerms, 2, 128>>(h, tensors, limits, stream);
  }
  if constexpr (kTerms == 1) {
    if (p.precision == Precision::highest)
      return start_shape<HopperShape<kHalf, 1, 2, 256>>(h, tensors, limits, stream);
    if (width <= 64) return start_shape<HopperShape<kHalf, 1, 1, 64>>(h, tensors, limits, stream);
    if (width <= 128) return start_shape<HopperShape<kHalf, 1, 1, 128>>(h, tensors, limits, stream);
    return start_shape<HopperShape<kHalf, 1, 1, 256>>(h, tensors, limits, stream);
  }
}

}  // namespace

size_t hopper_forward_workspace(const Problem& p) {
  TermsCall c = terms_call({p, {}, {}});
  return place_terms(c, nullptr) + size_t{p.batch} * p.query_heads * p.query_length;
}

int start_hopper_forward(ForwardCall& f, void* workspace, const DeviceLimits& limits,
                         Stream stream) {
  const Problem& p = f.call.problem;
  const Inputs& in = f.call.inputs;
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  TermsCall c = terms_call(f.call);
  HopperCall h{f, {}, {}, {}, {}, reinterpret_cast<RowState*>(bytes + place_terms(c, bytes))};
  MappedTensor tensors[3] = {
      mapped(p, in.query, p.query_heads, p.query_length, p.head_dim),
      mapped(p, in.key, p.kv_heads, p.key_length, p.head_dim),
      mapped(p, in.value, p.kv_heads, p.key_length, p.value_dim),
  };
  int error = kSuccess;
  if (c.count > 0) {
    for (int i = 0; i < c.count; ++i) tensors[i] = mapped_terms(c, c.tensors[i]);
    h.factors = {c.tensors[0].factors, c.tensors[1].factors, c.tensors[2].factors};
    error = start_terms(c, limits, stream);
  }
  for (const MappedTensor& tensor : tensors) {
    if (!tensor.is_mappable()) return kNotTaken;
  }
  if (error == kSuccess) {
    if (p.type == Type::bfloat16) {
      error = start_width<Half::bfloat16, 1>(h, tensors, limits, stream);
    } else if (p.type == Type::float32 && terms_of(p) == 2) {
      error = start_width<Half::float16, 2>(h, tensors, limits, stream);
    } else {
      error = start_width<Half::float16, 1>(h, tensors, limits, stream);
    }
  }
  if (error == kSuccess) f.states = h.states;
  return error;
}

}  // namespace sdpa::cuda

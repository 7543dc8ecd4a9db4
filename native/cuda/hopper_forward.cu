// Starts the forward kernels of hopper_forward.cuh; compiled for compute capability 9.0a alone.
#include "cuda/hopper_forward.cuh"
#include "cuda/launch.cuh"

namespace sdpa::cuda {
namespace {

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
  return start(hopper_forward_kernel<S>, {uint32_t(blocks), 1, 1}, S::kThreads, S::kSharedBytes, h,
               limits.sm, stream);
}

template <Half kHalf>
int start_width(HopperCall& h, const MappedTensor (&tensors)[3], uint32_t width,
                const DeviceLimits& limits, Stream stream) {
  if (width <= 64) return start_shape<HopperShape<kHalf, 64>>(h, tensors, limits, stream);
  if (width <= 128) return start_shape<HopperShape<kHalf, 128>>(h, tensors, limits, stream);
  return start_shape<HopperShape<kHalf, 256>>(h, tensors, limits, stream);
}

}  // namespace

int start_hopper_forward(const ForwardCall& f, uint8_t* has_nan, const DeviceLimits& limits,
                         Stream stream) {
  const Problem& p = f.call.problem;
  const Inputs& in = f.call.inputs;
  const MappedTensor tensors[3] = {
      mapped(p, in.query, p.query_heads, p.query_length, p.head_dim),
      mapped(p, in.key, p.kv_heads, p.key_length, p.head_dim),
      mapped(p, in.value, p.kv_heads, p.key_length, p.value_dim),
  };
  for (const MappedTensor& tensor : tensors) {
    if (!tensor.is_mappable()) return kNotTaken;
  }
  HopperCall h{f, {}, {}, {}, has_nan};
  const uint32_t width = std::max(p.head_dim, p.value_dim);
  return p.type == Type::float16 ? start_width<Half::float16>(h, tensors, width, limits, stream)
                                 : start_width<Half::bfloat16>(h, tensors, width, limits, stream);
}

}  // namespace sdpa::cuda

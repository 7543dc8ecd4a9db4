// Starts the forward kernels of hopper_forward.cuh; compiled for compute capability 9.0a alone.
#include "cuda/hopper_forward.cuh"
#include "cuda/launch.cuh"

namespace sdpa::cuda {
namespace {

/// How a call's tensors reach the kernels.
int terms_of(const Problem& p) { return p.precision == Precision::highest ? 2 : 1; }

/// The tensors of a call by number: query, key, value.
struct HopperTensor {
  const void* data;
  uint32_t heads, length, width;
};

HopperTensor tensor_of(const Problem& p, const Inputs& in, int number) {
  if (number == 0) return {in.query, p.query_heads, p.query_length, p.head_dim};
  if (number == 1) return {in.key, p.kv_heads, p.key_length, p.head_dim};
  return {in.value, p.kv_heads, p.key_length, p.value_dim};
}

/// Where things are in the workspace, in bytes.
struct HopperWorkspace {
  size_t terms[3] = {}, extremes[3] = {}, factors[3] = {}, states = 0, bytes = 0;

  explicit HopperWorkspace(const Problem& p) {
    for (int i = 0; i < 3 && p.type == Type::float32; ++i) {
      const HopperTensor t = tensor_of(p, {}, i);
      const size_t units = size_t{p.batch} * t.heads, chunks = divide_up(t.length, kTermRows);
      terms[i] = take(units * terms_of(p) * t.length * term_width(t.width) * 2);
      extremes[i] = take(units * chunks * kTermWarps * 2 * sizeof(uint32_t));
      factors[i] = take(units * sizeof(float));
    }
    states = take(size_t{p.batch} * p.query_heads * p.query_length);
  }

 private:
  size_t take(size_t size) {
    const size_t at = bytes;
    bytes += (size + 15) / 16 * 16;
    return at;
  }
};

MappedTensor mapped_terms(const Problem& p, const HopperTensor& t, const uint16_t* terms) {
  const uint32_t width = term_width(t.width), heads = t.heads * terms_of(p);
  const uint64_t row = 2 * uint64_t{width}, plane = row * t.length;
  return {terms, {width, t.length, heads, p.batch}, {row, plane, plane * heads}};
}

/// Writes float32 tensors as terms, and maps those.
int start_split(HopperCall& h, const HopperWorkspace& at, unsigned char* workspace,
                MappedTensor (&maps)[3], const DeviceLimits& limits, Stream stream) {
  const Problem& p = h.forward.call.problem;
  TermsCall c{h.forward.call, {}, uint32_t(terms_of(p))};
  for (int i = 0; i < 3; ++i) {
    const HopperTensor t = tensor_of(p, h.forward.call.inputs, i);
    c.tensors[i] = {static_cast<const float*>(t.data),
                    t.heads,
                    t.length,
                    t.width,
                    i > 0,
                    divide_up(t.length, kTermRows),
                    reinterpret_cast<uint32_t*>(workspace + at.extremes[i]),
                    reinterpret_cast<float*>(workspace + at.factors[i]),
                    reinterpret_cast<uint16_t*>(workspace + at.terms[i])};
    maps[i] = mapped_terms(p, t, c.tensors[i].terms);
  }
  h.factors = {c.tensors[0].factors, c.tensors[1].factors, c.tensors[2].factors};
  return start_terms(c, limits, stream);
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
    return start_shape<HopperShape<kHalf, kTerms, 2, 128>>(h, tensors, limits, stream);
  }
  if constexpr (kTerms == 1) {
    if (width <= 64) return start_shape<HopperShape<kHalf, 1, 1, 64>>(h, tensors, limits, stream);
    if (width <= 128) return start_shape<HopperShape<kHalf, 1, 1, 128>>(h, tensors, limits, stream);
    return start_shape<HopperShape<kHalf, 1, 1, 256>>(h, tensors, limits, stream);
  }
}

}  // namespace

size_t hopper_forward_workspace(const Problem& p) { return HopperWorkspace(p).bytes; }

int start_hopper_forward(ForwardCall& f, void* workspace, const DeviceLimits& limits,
                         Stream stream) {
  const Problem& p = f.call.problem;
  const HopperWorkspace at(p);
  unsigned char* const bytes = static_cast<unsigned char*>(workspace);
  HopperCall h{f, {}, {}, {}, {}, reinterpret_cast<RowState*>(bytes + at.states)};
  MappedTensor tensors[3];
  int error = kSuccess;
  if (p.type == Type::float32) {
    error = start_split(h, at, bytes, tensors, limits, stream);
  } else {
    for (int i = 0; i < 3; ++i) {
      const HopperTensor t = tensor_of(p, f.call.inputs, i);
      tensors[i] = mapped(p, t.data, t.heads, t.length, t.width);
      if (!tensors[i].is_mappable()) return kNotTaken;
    }
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

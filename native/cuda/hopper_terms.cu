// Writes float32 tensors as terms: the kernels behind hopper_terms.cuh.
#include "cuda/hopper_terms.cuh"

#include "cuda/launch.cuh"

namespace sdpa::cuda {
namespace {

/// What a block works on.
struct TermBlock {
  TermTensor tensor;
  uint32_t b, head, unit, chunk;
  Rows rows;           // of the whole head, up to its end
  uint32_t first_row;  // of the warp, and every kTermWarps-th after it to end_row
  uint32_t end_row;

  SDPA_DEVICE static TermBlock of(const TermsCall& c, uint32_t number) {
    const Problem& p = c.call.problem;
    TermBlock k;
    SDPA_UNROLL
    for (int i = 0; i < kMostTermTensors; ++i) {
      k.tensor = c.tensors[i];
      const uint32_t blocks = p.batch * k.tensor.heads * k.tensor.chunks;
      if (i + 1 == c.count || number < blocks) break;
      number -= blocks;
    }
    const TermTensor& t = k.tensor;
    k.chunk = number % t.chunks;
    k.unit = number / t.chunks;
    k.head = k.unit % t.heads;
    k.b = k.unit / t.heads;
    const uint32_t end = t.has_keys ? visibility_of(p, c.call.inputs, k.b).key_end : t.length;
    k.rows = rows_of(p, Type::float32, t.from, t.heads, t.length, t.width, k.b, k.head, 0, end);
    k.first_row = k.chunk * kTermRows + warp_index();
    const uint32_t left = t.length - k.chunk * kTermRows;
    k.end_row = k.chunk * kTermRows + (left < kTermRows ? left : kTermRows);
    return k;
  }
  SDPA_DEVICE uint32_t* extremes(uint32_t number) const {
    return tensor.extremes + (size_t{unit} * tensor.chunks * kTermWarps + number) * 2;
  }
};

/// The sizes of finite numbers as their bits, which are in the same order; 0 of others.
SDPA_DEVICE uint32_t size_bits(float x) { return is_finite(x) ? to_bits(x) & 0x7fffffff : 0; }

constexpr uint32_t kNoSize = 0xffffffff;  // larger than all

SDPA_DEVICE uint32_t warp_largest(uint32_t x) {
  SDPA_UNROLL
  for (uint32_t mask = 1; mask < kLanes; mask *= 2) {
    const uint32_t other = shuffle(x, lane_index() ^ mask);
    if (other > x) x = other;
  }
  return x;
}

/// Writes `extremes`; rows of zeros do not count.
SDPA_KERNEL(kTermWarps* kLanes, 1) measure_rows(const SDPA_PARAMETER TermsCall c) {
  const TermBlock k = TermBlock::of(c, block_index().x);
  uint32_t largest = 0, smallest = kNoSize;
  for (uint32_t row = k.first_row; row < k.end_row && row < k.rows.count; row += kTermWarps) {
    uint32_t size = 0;
    for (uint32_t i = lane_index(); i < k.rows.width; i += kLanes) {
      const uint32_t own = size_bits(k.rows.at(row, i));
      if (own > size) size = own;
    }
    size = warp_largest(size);
    if (size > largest) largest = size;
    if (size > 0 && size < smallest) smallest = size;
  }
  if (lane_index() != 0) return;
  uint32_t* const to = k.extremes(k.chunk * kTermWarps + warp_index());
  to[0] = largest;
  to[1] = smallest;
}

/// What a head's terms are multiplied by, from its extremes; 0: it is not fit. The product of two
/// is a normal number.
SDPA_DEVICE float term_factor(const TermBlock& k) {
  uint32_t largest = 0, smallest_down = 0;
  for (uint32_t i = lane_index(); i < k.tensor.chunks * kTermWarps; i += kLanes) {
    const uint32_t* const two = k.extremes(i);
    if (two[0] > largest) largest = two[0];
    if (~two[1] > smallest_down) smallest_down = ~two[1];
  }
  largest = warp_largest(largest);
  const uint32_t smallest = ~warp_largest(smallest_down);
  if (largest == 0) return 1.0f;
  const int exponent = int(largest >> 23) - 127, lowest = int(smallest >> 23) - 127;
  if (exponent > 48 || exponent < -48 || lowest < exponent - 16) return 0.0f;
  return from_bits(uint32_t(127 + exponent - 14) << 23);
}

/// Writes `factors` and `terms`.
SDPA_KERNEL(kTermWarps* kLanes, 1) write_terms(const SDPA_PARAMETER TermsCall c) {
  const TermBlock k = TermBlock::of(c, block_index().x);
  const TermTensor& t = k.tensor;
  const float factor = term_factor(k);
  if (k.chunk == 0 && thread_index() == 0) t.factors[k.unit] = factor;
  if (factor == 0) return;
  const uint32_t width = term_width(t.width);
  for (uint32_t row = k.first_row; row < k.end_row; row += kTermWarps) {
    for (uint32_t column = 2 * lane_index(); column < width; column += 2 * kLanes) {
      const auto at = [&](uint32_t i) {
        return row < k.rows.count && i < t.width ? k.rows.at(row, i) / factor : 0.0f;
      };
      uint32_t terms[2];
      split_pair<Half::float16>(at(column), at(column + 1), terms);
      for (uint32_t i = 0; i < c.terms; ++i) {
        uint16_t* const to = t.terms + ((size_t{k.unit} * c.terms + i) * t.length + row) * width;
        *reinterpret_cast<uint32_t*>(to + column) = terms[i];
      }
    }
  }
}

}  // namespace

size_t place_terms(TermsCall& c, unsigned char* workspace) {
  size_t bytes = 0;
  const auto take = [&](size_t size) {
    const size_t at = bytes;
    bytes += (size + 15) / 16 * 16;
    return workspace ? workspace + at : nullptr;
  };
  for (int i = 0; i < c.count; ++i) {
    TermTensor& t = c.tensors[i];
    const size_t units = size_t{c.call.problem.batch} * t.heads;
    t.chunks = divide_up(t.length, kTermRows);
    t.terms = reinterpret_cast<uint16_t*>(
        take(units * c.terms * t.length * term_width(t.width) * sizeof(uint16_t)));
    t.extremes =
        reinterpret_cast<uint32_t*>(take(units * t.chunks * kTermWarps * 2 * sizeof(uint32_t)));
    t.factors = reinterpret_cast<float*>(take(units * sizeof(float)));
  }
  return bytes;
}

MappedTensor mapped_terms(const TermsCall& c, const TermTensor& t) {
  const uint32_t width = term_width(t.width), heads = t.heads * c.terms;
  const uint64_t row = 2 * uint64_t{width}, plane = row * t.length;
  return {t.terms, {width, t.length, heads, c.call.problem.batch}, {row, plane, plane * heads}};
}

int start_terms(const TermsCall& c, const DeviceLimits& limits, Stream stream) {
  uint64_t blocks = 0;
  for (int i = 0; i < c.count; ++i) {
    blocks += uint64_t{c.call.problem.batch} * c.tensors[i].heads * c.tensors[i].chunks;
  }
  if (blocks > 0x7fffffff) return kInvalidConfiguration;
  const Index3 grid = {uint32_t(blocks), 1, 1};
  const int error = start(measure_rows, grid, kTermWarps * kLanes, 0, c, limits.sm, stream);
  if (error != kSuccess) return error;
  return start(write_terms, grid, kTermWarps * kLanes, 0, c, limits.sm, stream);
}

}  // namespace sdpa::cuda

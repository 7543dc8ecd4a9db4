// Tiles of 16-bit elements in shared memory, and matrix products on them.
//
// An operand that is not 16 bits wide is split: x = x0 + x1 + x2, each a bfloat16, is exact for a
// float32, and of the nine products of two such operands the six largest reproduce the float32
// product to 2^-23 (Henry, Tang and Heinecke, arXiv 1904.06376). Two terms and three products give
// 2^-16. 3xTF32 would cost the same (TF32 has half the rate) and be less exact, at 2^-21.
#pragma once

#include "cuda/call.cuh"

namespace sdpa::cuda {

template <Half kHalf>
SDPA_DEVICE uint32_t pack(float low, float high) {
  return kHalf == Half::float16 ? pack_float16(low, high) : pack_bfloat16(low, high);
}
template <Half kHalf>
SDPA_DEVICE float low_half(uint32_t pair) {
  return kHalf == Half::float16 ? widen_float16(pair & 0xffff) : from_bits(pair << 16);
}
template <Half kHalf>
SDPA_DEVICE float high_half(uint32_t pair) {
  return kHalf == Half::float16 ? widen_float16(pair >> 16) : from_bits(pair & 0xffff0000);
}

/// What is left of `x` after its first term: nothing of what is not finite.
SDPA_DEVICE float remainder_of(float x, float term) { return is_finite(term) ? x - term : 0.0f; }

/// Two floats as sums of kTerms 16-bit terms.
template <Half kHalf, int kTerms>
SDPA_DEVICE void split_pair(float low, float high, uint32_t (&terms)[kTerms]) {
  SDPA_UNROLL
  for (int i = 0; i < kTerms; ++i) {
    terms[i] = pack<kHalf>(low, high);
    if (i + 1 == kTerms) break;
    low = remainder_of(low, low_half<kHalf>(terms[i]));
    high = remainder_of(high, high_half<kHalf>(terms[i]));
  }
}

/// c += (sum of the terms of a) * (sum of the terms of b), without the smallest products; the terms
/// of b are registers kFirst and kFirst + 1 of each.
template <Half kHalf, int kFirst, int kTermsA, int kTermsB>
SDPA_DEVICE void multiply_terms(float (&c)[4], const uint32_t (&a)[kTermsA][4],
                                const uint32_t (&b)[kTermsB][4]) {
  constexpr int kMost = kTermsA > kTermsB ? kTermsA : kTermsB;
  SDPA_UNROLL
  for (int sum = kMost - 1; sum >= 0; --sum) {  // the smallest first
    SDPA_UNROLL
    for (int i = 0; i < kTermsA; ++i) {
      const int j = sum - i;
      if (j < 0 || j >= kTermsB) continue;
      const uint32_t operand[2] = {b[j][kFirst], b[j][kFirst + 1]};
      if constexpr (kHalf == Half::float16) {
        multiply_float16(c, a[i], operand);
      } else {
        multiply_bfloat16(c, a[i], operand);
      }
    }
  }
}

/// kRows rows of kWidth elements in kTerms planes. The eight-element pieces of a row are permuted
/// by its number, so that eight rows of one column lie in different banks.
template <Half kHalf, int kTerms, int kWidth>
struct Tile {
  static_assert(kWidth % 64 == 0, "the permutation acts within eight pieces");
  static constexpr uint32_t kPieces = kWidth / 8;

  uint16_t* data;
  uint32_t rows;  // of a plane; a multiple of 16

  static constexpr size_t bytes(uint32_t rows) { return size_t{2} * kTerms * rows * kWidth; }

  SDPA_DEVICE uint16_t* piece(uint32_t term, uint32_t row, uint32_t piece) const {
    return data + (term * rows + row) * kWidth + ((piece ^ (row & 7)) << 3);
  }

  /// Rows `first` to first + 15 as operand A, columns 16 * step on.
  SDPA_DEVICE void load_a(uint32_t (&a)[kTerms][4], uint32_t first, uint32_t step) const {
    const uint32_t lane = lane_index();
    SDPA_UNROLL
    for (int t = 0; t < kTerms; ++t) {
      load_matrices(a[t], piece(t, first + lane % 16, 2 * step + lane / 16));
    }
  }
  /// Rows `first` to first + 15, transposed, as two operands B: columns of B are rows of the tile.
  SDPA_DEVICE void load_b(uint32_t (&b)[kTerms][4], uint32_t first, uint32_t step) const {
    const uint32_t lane = lane_index();
    SDPA_UNROLL
    for (int t = 0; t < kTerms; ++t) {
      load_matrices(b[t], piece(t, first + lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
    }
  }
  /// Rows `first` to first + 15 of columns 16 * pair on as two operands B.
  SDPA_DEVICE void load_b_rows(uint32_t (&b)[kTerms][4], uint32_t first, uint32_t pair) const {
    const uint32_t lane = lane_index();
    SDPA_UNROLL
    for (int t = 0; t < kTerms; ++t) {
      load_matrices_transposed(b[t], piece(t, first + lane % 16, 2 * pair + lane / 16));
    }
  }

  /// Fills the tile from columns `column` on of `from`, with zeros around them; all threads take
  /// part. Reading needs wait_copies and a barrier.
  template <typename From>
  SDPA_DEVICE void load(const From& from, uint32_t column) const {
    constexpr Type own = kHalf == Half::float16 ? Type::float16 : Type::bfloat16;
    const bool vectors = from.in_vectors(), copies = kTerms == 1 && from.type == own && vectors;
    const uint32_t width = from.width - column;
    const uint32_t used = divide_up(width < kWidth ? width : kWidth, 16) * 2;  // whole steps
    SDPA_UNROLL_FEW
    for (uint32_t i = thread_index(); i < rows * kPieces; i += thread_count()) {
      const uint32_t row = i / kPieces, p = i % kPieces;
      if (p >= used) continue;
      const bool valid = row < from.count && 8 * p < width;
      if (copies) {
        const uint16_t* const source = static_cast<const uint16_t*>(from.row(valid ? row : 0));
        copy_async(piece(0, row, p), source + (valid ? column + 8 * p : 0), valid);
      } else {
        convert(from, vectors, valid, row, column, p);
      }
    }
  }

  /// Replaces what is not finite by 0.
  SDPA_DEVICE void clear_nonfinite() const {
    const uint32_t exponent = kHalf == Half::float16 ? 0x7c00 : 0x7f80;
    // A split leaves the first term alone to be infinite or NaN.
    for (uint32_t i = thread_index(); i < rows * kWidth; i += thread_count()) {
      if ((data[i] & exponent) == exponent) data[i] = 0;
    }
  }

 private:
  template <typename From>
  SDPA_DEVICE void convert(const From& from, bool vectors, bool valid, uint32_t row,
                           uint32_t column, uint32_t p) const {
    float x[8];
    read_piece(from, vectors, valid, row, column + 8 * p, x);
    Vector16 terms[kTerms];
    SDPA_UNROLL
    for (int i = 0; i < 4; ++i) {
      uint32_t pair[kTerms];
      split_pair<kHalf>(x[2 * i], x[2 * i + 1], pair);
      SDPA_UNROLL
      for (int t = 0; t < kTerms; ++t) terms[t].w[i] = pair[t];
    }
    SDPA_UNROLL
    for (int t = 0; t < kTerms; ++t) store_vector(piece(t, row, p), terms[t]);
  }

  template <typename From>
  static SDPA_DEVICE void read_piece(const From& from, bool vectors, bool valid, uint32_t row,
                                     uint32_t column, float (&x)[8]) {
    if (valid && vectors) {
      const unsigned char* const at =
          static_cast<const unsigned char*>(from.row(row)) + column * size_of(from.type);
      const Vector16 first = load_vector(at);
      if (from.type == Type::float32) {
        const Vector16 second = load_vector(at + 16);
        SDPA_UNROLL
        for (int i = 0; i < 4; ++i) {
          x[i] = from_bits(first.w[i]) * from.factor;
          x[4 + i] = from_bits(second.w[i]) * from.factor;
        }
      } else {
        const bool is_float16 = from.type == Type::float16;
        SDPA_UNROLL
        for (int i = 0; i < 4; ++i) {
          const uint32_t pair = first.w[i];
          x[2 * i] = is_float16 ? low_half<Half::float16>(pair) : low_half<Half::bfloat16>(pair);
          x[2 * i + 1] =
              is_float16 ? high_half<Half::float16>(pair) : high_half<Half::bfloat16>(pair);
        }
      }
      return;
    }
    SDPA_UNROLL
    for (int i = 0; i < 8; ++i) {
      x[i] = valid && column + i < from.width ? from.at(row, column + i) : 0.0f;
    }
  }
};

}  // namespace sdpa::cuda

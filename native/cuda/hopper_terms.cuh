// float32 tensors as terms of float16, for the kernels of Hopper: x = factor * (first + second),
// with a power of two for each head that brings its largest element to 2^14 and more. Two terms
// hold 22 bits, and three products of them what float32 needs (Ootomo and Yokota, arXiv
// 2203.03341); one term holds 11 bits, as TF32 does, at twice its rate.
//
// Of elements below 2^-17 of the largest the second term loses bits. Where that would show in a
// row, or where all elements are 0, a head is not fit: its factor is 0, and others compute it.
#pragma once

#include "cuda/call.cuh"
#include "cuda/kernels.h"

namespace sdpa::cuda {

/// What terms are multiplied by, or 0: [batch, heads] of each tensor; null: tensors are no terms.
struct TermFactors {
  const float *query, *key, *value;
};

constexpr uint32_t kTermWarps = 4, kTermRows = 64;  // of a block

/// A tensor to be written as terms.
struct TermTensor {
  const float* from;  // [batch, heads, length, width], in the problem's layout
  uint32_t heads, length, width;
  bool has_keys;       // its rows end with the keys of their batch entry; zeros follow
  uint32_t chunks;     // blocks a head
  uint32_t* extremes;  // [batch, heads, chunks, kTermWarps, 2]: the largest and the smallest row
  float* factors;      // [batch, heads]
  uint16_t* terms;     // [batch, heads, terms, length, term_width(width)]
};

/// Rows of whole pieces for the copy engine.
SDPA_HOST_DEVICE constexpr uint32_t term_width(uint32_t width) { return (width + 7) / 8 * 8; }

struct TermsCall {
  Call call;
  TermTensor tensors[3];
  uint32_t terms;  // 1 or 2
};

/// Writes the factors and the terms of all tensors.
int start_terms(const TermsCall& c, const DeviceLimits& limits, Stream stream);

}  // namespace sdpa::cuda

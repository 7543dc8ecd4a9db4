// float32 tensors as terms of float16, for the kernels of Hopper: x = factor * (first + second),
// with a power of two for each head that brings its largest element to 2^14 and more. Two terms
// hold 22 bits, and three products of them what float32 needs (Ootomo and Yokota, arXiv
// 2203.03341); one term holds 11 bits, as TF32 does, at twice its rate.
//
// Of elements below 2^-17 of the largest the second term loses bits. Where that would show in a
// row, a head is not fit: its factor is 0, and others compute it.
#pragma once

#include "cuda/call.cuh"
#include "cuda/group.cuh"
#include "cuda/kernels.h"

namespace sdpa::cuda {

constexpr uint32_t kTermWarps = 4, kTermRows = 64;  // of a block

/// A tensor to be written as terms.
struct TermTensor {
  const void* from;  // float32 [batch, heads, length, width], in the problem's layout
  uint32_t heads, length, width;
  bool has_keys;  // its rows end with the keys of their batch entry; zeros follow
  // In the workspace, by place_terms:
  uint32_t chunks;     // blocks a head
  uint32_t* extremes;  // [batch, heads, chunks, kTermWarps, 2]: the largest and the smallest row
  float* factors;      // [batch, heads]: what terms are multiplied by, or 0
  uint16_t* terms;     // [batch, heads, terms, length, term_width(width)]
};

/// Rows of whole pieces for the copy engine.
SDPA_HOST_DEVICE constexpr uint32_t term_width(uint32_t width) { return (width + 7) / 8 * 8; }

constexpr int kMostTermTensors = 4;

struct TermsCall {
  Call call;
  TermTensor tensors[kMostTermTensors];
  int count;       // of tensors
  uint32_t terms;  // 1 or 2

  void add(const void* from, uint32_t heads, uint32_t length, uint32_t width, bool has_keys) {
    tensors[count++] = {from, heads, length, width, has_keys, 0, nullptr, nullptr, nullptr};
  }
};

/// How many terms a precision asks for.
inline uint32_t terms_of(const Problem& p) { return p.precision == Precision::highest ? 2 : 1; }

/// Gives the tensors their places in a workspace, and says how many bytes they take; null: says it
/// alone.
size_t place_terms(TermsCall& c, unsigned char* workspace);

/// The terms of a tensor; those of a head one after the other, as heads.
MappedTensor mapped_terms(const TermsCall& c, const TermTensor& t);

/// Writes the factors and the terms of all tensors.
int start_terms(const TermsCall& c, const DeviceLimits& limits, Stream stream);

}  // namespace sdpa::cuda

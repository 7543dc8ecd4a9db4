// The dropout decisions of a call as bytes, by the generator that the attention kernels use.
#include "cuda/kernels.h"
#include "cuda/rules.cuh"

namespace sdpa::cuda {
namespace {

constexpr uint32_t kThreads = 256, kColumns = 8;
constexpr int kAnyCapability = 75;

struct MaskCall {
  Call call;
  uint8_t* mask;
  uint64_t rows;
  uint32_t columns, pieces;  // elements of a row, and groups of kColumns
};

/// A thread decides for eight columns of a row.
SDPA_KERNEL(kThreads, 1) dropout_mask_kernel(const SDPA_PARAMETER MaskCall m) {
  const Problem& p = m.call.problem;
  const uint64_t number = uint64_t{block_index().x} * kThreads + thread_index();
  const uint64_t row = number / m.pieces;
  if (row >= m.rows) return;
  const uint32_t column = uint32_t(number % m.pieces) * kColumns;
  const uint32_t query = uint32_t(row % p.query_length);
  const uint32_t head = uint32_t(row / p.query_length % p.query_heads);
  const uint32_t b = uint32_t(row / p.query_length / p.query_heads);
  const uint32_t keep = keep_byte(m.call, b, head, query, column);
  for (uint32_t i = 0; i < kColumns && column + i < m.columns; ++i) {
    m.mask[row * m.columns + column + i] = uint8_t(keep >> i & 1);
  }
}

}  // namespace

int launch_dropout_mask(const Problem& p, uint8_t* mask, Stream stream) {
  MaskCall m{{p, Inputs{}, resolve_dropout(p, false)},
             mask,
             uint64_t{p.batch} * p.query_heads * p.query_length,
             p.dropout_placement == Placement::context ? p.value_dim : p.key_length,
             0};
  m.pieces = divide_up(m.columns, kColumns);
  const uint64_t blocks = (m.rows * m.pieces + kThreads - 1) / kThreads;
  if (blocks > 0x7fffffff) return 9;  // cudaErrorInvalidConfiguration
  return start(dropout_mask_kernel, {uint32_t(blocks), 1, 1}, kThreads, 0, m, kAnyCapability,
               stream);
}

}  // namespace sdpa::cuda

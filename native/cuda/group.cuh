// What Hopper adds to warp.cuh, each instruction behind one small function: products of a whole
// warpgroup on shared memory (wgmma), copies by the tensor copy engine (TMA), barriers that count
// their bytes (mbarrier), registers that move between warpgroups.
//
// Tiles in shared memory are panels of 64 columns of 16-bit elements: rows of 128 bytes, one after
// the other, a panel aligned to 1,024 bytes; the 16-byte piece p of row r lies where piece p ^ (r %
// 8) would (PTX ISA, "128B swizzling mode"). The engine writes them so, and products read them.
//
// Accumulators of a warpgroup are those of mma.sync (warp.cuh), 16 rows a warp.
#pragma once

#include "cuda/warp.cuh"

namespace sdpa::cuda {

constexpr uint32_t kGroupThreads = 128;
constexpr uint32_t kPanelColumns = 64;
constexpr uint32_t kPanelRowBytes = 128;

using Barrier = uint64_t;  // in shared memory

/// What of a tile a product sums over; as instructions encode it.
enum class Depth { columns = 0, rows = 1 };

/// A tensor of 16-bit elements as the copy engine sees it: [batch, head, row, column], the sizes
/// and the distances (in bytes, of all but columns) from the last to the first.
struct MappedTensor {
  const void* data;
  uint64_t sizes[4], strides[3];

  /// What the engine asks for: whole pieces of 16 bytes.
  bool is_mappable() const {
    const uint64_t together = strides[0] | strides[1] | strides[2];
    return (reinterpret_cast<uintptr_t>(data) | together) % 16 == 0 && together < uint64_t{1} << 40;
  }
};

}  // namespace sdpa::cuda

// Of both: TensorMap, what is passed to a kernel, by value; make_map(tensor, rows of a panel, map),
// a cudaError_t.
//
// init_barrier, publish_barriers (after the last init, before a block's barrier); arrive,
// arrive_and_expect (bytes that copies will bring), wait_for: until the phase of that parity has
// ended, the first one having parity 0. copy_panel: columns and rows from (column, row) on, zeros
// outside of the tensor.
//
// sync_group: the threads of a warpgroup meet. publish_writes: what this thread has written to
// shared memory is there for products and copies that begin after a meeting.
//
// sync_consumers: the threads of all warpgroups but the producer's meet. pass_turn lets the next
// of kGroups warpgroups go on, the first one after the last, that waits in take_turn or will.
//
// wait_for_turn, give_turn: blocks do something in order, a counter in global memory saying whose
// turn it is; one thread of those that write. add_four: to a place of this block's turn.
//
// Products are asynchronous: begin_products after registers that they use were written,
// commit_products closes a group of them, wait_products<n> waits for all groups but the latest n.
// The sixteen k of an operand of multiply_shared are columns or rows of its tile; operand B of
// multiply_registers has rows k.
#if defined(__CUDACC__)
#include "cuda/group_gpu.cuh"
#else
#include "cuda/emulation/group.h"
#endif

namespace sdpa::cuda {

SDPA_DEVICE uint32_t group_index() { return thread_index() / kGroupThreads; }

/// Descriptors of operands (PTX ISA, "Matrix Descriptor Format"): 128-byte swizzle.
SDPA_DEVICE uint64_t describe_matrix(const void* first, uint32_t leading_bytes) {
  const uint64_t eight_rows = 8 * kPanelRowBytes / 16;
  return uint64_t{1} << 62 | eight_rows << 32 | uint64_t{leading_bytes / 16} << 16 |
         (descriptor_address(first) & 0x3ffff) / 16;
}

/// A tile of `rows` rows in panels.
struct PanelTile {
  unsigned char* data;
  uint32_t rows;

  static constexpr size_t bytes(uint32_t rows, uint32_t width) { return size_t{2} * rows * width; }
  SDPA_DEVICE uint32_t panel_bytes() const { return rows * kPanelRowBytes; }

  /// Starts to copy rows from `row` on, in all panels of `width` columns.
  SDPA_DEVICE void copy(const TensorMap& map, Barrier* barrier, uint32_t width, uint32_t row,
                        uint32_t head, uint32_t b) const {
    SDPA_UNROLL_FEW
    for (uint32_t column = 0; column < width; column += kPanelColumns) {
      copy_panel(data + column / kPanelColumns * panel_bytes(), map, barrier, column, row, head, b);
    }
  }

  /// Rows from `row` on (a multiple of 8), columns 16 * step on.
  SDPA_DEVICE uint64_t by_columns(uint32_t row, uint32_t step) const {
    // The distance of panels is not asked for: a step stays in one.
    return describe_matrix(data + step / 4 * panel_bytes() + row * kPanelRowBytes + step % 4 * 32,
                           16);
  }
  /// Rows 16 * step on as the depth of a product, columns from `column` on.
  SDPA_DEVICE uint64_t by_rows(uint32_t step, uint32_t column = 0) const {
    return describe_matrix(data + column / kPanelColumns * panel_bytes() +
                               step * 16 * kPanelRowBytes + 2 * (column % kPanelColumns),
                           panel_bytes());
  }
  /// Two neighbours of a row, the first of an even column.
  SDPA_DEVICE uint32_t* pair(uint32_t row, uint32_t column) const {
    const uint32_t piece = column % kPanelColumns / 8 ^ row % 8;
    return reinterpret_cast<uint32_t*>(data + column / kPanelColumns * panel_bytes() +
                                       row * kPanelRowBytes + 16 * piece + 2 * (column % 8));
  }
};

/// Adds rows `row` to row + 63 of `rows` . rows of `tile`, over kWidth columns, to the products
/// under way; sets them where not `adds`.
template <Half kHalf, uint32_t kWidth, int kTiles>
SDPA_DEVICE void multiply_by_columns(const PanelTile& rows, uint32_t row, const PanelTile& tile,
                                     bool adds, float (&products)[kTiles][4]) {
  SDPA_UNROLL
  for (uint32_t s = 0; s < kWidth / 16; ++s) {
    multiply_shared<kHalf, Depth::columns, Depth::columns>(products, rows.by_columns(row, s),
                                                           tile.by_columns(0, s), adds || s > 0);
  }
}

/// The same of a term of an operand and columns from `column` on of a tile whose rows are the
/// depth.
template <Half kHalf, int kSteps, int kTerms, int kTiles>
SDPA_DEVICE void multiply_by_rows(const uint32_t (&operand)[kSteps][kTerms][4], int term,
                                  const PanelTile& tile, uint32_t column, bool adds,
                                  float (&sums)[kTiles][4]) {
  SDPA_UNROLL
  for (uint32_t s = 0; s < kSteps; ++s) {
    multiply_registers<kHalf>(sums, operand[s][term], tile.by_rows(s, column), adds || s > 0);
  }
}

/// The terms of a tile of kWidth columns, one after the other.
template <int kTerms, uint32_t kWidth>
struct TermTile {
  unsigned char* data;
  uint32_t rows;

  static constexpr size_t bytes(uint32_t rows) { return kTerms * PanelTile::bytes(rows, kWidth); }
  SDPA_DEVICE PanelTile term(uint32_t i) const {
    return {data + i * PanelTile::bytes(rows, kWidth), rows};
  }
  /// As PanelTile::copy; the terms of a head are heads of the map.
  SDPA_DEVICE void copy(const TensorMap& map, Barrier* barrier, uint32_t row, uint32_t head,
                        uint32_t b) const {
    SDPA_UNROLL
    for (uint32_t t = 0; t < kTerms; ++t) {
      term(t).copy(map, barrier, kWidth, row, head * kTerms + t, b);
    }
  }
};

/// Calls body(i, j) for the pairs of terms whose products count, the smallest first (tile.cuh).
template <int kTermsA, int kTermsB, typename Body>
SDPA_DEVICE void each_pair(const Body& body) {
  SDPA_UNROLL
  for (int sum = (kTermsA > kTermsB ? kTermsA : kTermsB) - 1; sum >= 0; --sum) {
    SDPA_UNROLL
    for (int i = 0; i < kTermsA; ++i) {
      if (i <= sum && sum - i < kTermsB) body(i, sum - i);
    }
  }
}

/// products = rows `row` to row + 63 of `rows` . rows of `tile`, begun.
template <Half kHalf, int kTerms, uint32_t kWidth, int kTiles>
SDPA_DEVICE void begin_by_columns(const TermTile<kTerms, kWidth>& rows, uint32_t row,
                                  const TermTile<kTerms, kWidth>& tile,
                                  float (&products)[kTiles][4]) {
  hold(products);
  begin_products();
  bool adds = false;
  each_pair<kTerms, kTerms>([&](int i, int j) {
    multiply_by_columns<kHalf, kWidth>(rows.term(i), row, tile.term(j), adds, products);
    adds = true;
  });
  commit_products();
}

/// sums += operand . columns from `column` on of a tile, whose rows are the depth, begun; sums are
/// set where not `adds`.
template <Half kHalf, int kSteps, int kWeightTerms, int kTerms, uint32_t kWidth, int kTiles>
SDPA_DEVICE void begin_by_rows(uint32_t (&operand)[kSteps][kWeightTerms][4],
                               const TermTile<kTerms, kWidth>& tile, bool adds,
                               float (&sums)[kTiles][4], uint32_t column = 0) {
  hold(operand);
  hold(sums);
  begin_products();
  each_pair<kWeightTerms, kTerms>([&](int i, int j) {
    multiply_by_rows<kHalf>(operand, i, tile.term(j), column, adds, sums);
    adds = true;
  });
  commit_products();
}

}  // namespace sdpa::cuda

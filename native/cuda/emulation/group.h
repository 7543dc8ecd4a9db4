// group.cuh played by the CPU. Nothing happens before somebody waits for it: copies arrive when all
// threads wait, products are summed by the wait that asks for them.
#pragma once

#include <cstring>
#include <memory>

#include "cuda/emulation/machine.h"
#include "cuda/emulation/warp.h"

namespace sdpa::cuda {

struct TensorMap {
  MappedTensor tensor;
  uint32_t box_rows;
};

inline int make_map(const MappedTensor& tensor, uint32_t box_rows, TensorMap* map) {
  const bool is_valid = tensor.is_mappable() && box_rows <= 256;
  *map = {tensor, box_rows};
  return is_valid ? 0 : 1;
}

inline void init_barrier(Barrier* barrier, uint32_t arrivals) {
  emulation::init_barrier(barrier, arrivals);
}
inline void publish_barriers() {}
inline void arrive(Barrier* barrier) { emulation::arrive(barrier, 0); }
inline void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
  emulation::arrive(barrier, bytes);
}
inline void wait_for(Barrier* barrier, uint32_t parity) { emulation::wait_for(barrier, parity); }

inline void sync_group() {
  emulation::meet_group([](void* const*) {}, nullptr);
}
inline void take_turn() { emulation::take_turn(thread_index() / kGroupThreads - 1); }
template <uint32_t kGroups>
inline void pass_turn() {
  emulation::pass_turn(thread_index() / kGroupThreads % kGroups);
}
template <uint32_t kThreads>
inline void sync_consumers() {
  emulation::meet_consumers(kThreads);
}
inline void publish_writes() {}

/// Blocks run one after the other.
inline void wait_for_turn(const uint32_t* turn, uint32_t number) {
  if (*turn != number) emulation::fail("a block waits for one that comes after it");
}
inline void give_turn(uint32_t* turn, uint32_t number) { *turn = number; }
inline void add_four(float* to, const float (&x)[4]) {
  emulation::check_aligned(to, 16);
  for (int i = 0; i < 4; ++i) to[i] += x[i];
}

namespace emulation {
/// Where the swizzle puts the byte at an offset in shared memory.
inline uint32_t swizzled(uint32_t offset) { return offset ^ (offset >> 7 & 7) << 4; }
}  // namespace emulation

inline void copy_panel(void* to, const TensorMap& map, Barrier* barrier, uint32_t column,
                       uint32_t row, uint32_t head, uint32_t b) {
  emulation::check_aligned(to, 1024);
  const uint32_t bytes = map.box_rows * kPanelRowBytes;
  emulation::deliver_later(to, bytes, barrier, [=] {  // the map by value: its thread may be gone
    const MappedTensor& t = map.tensor;
    for (uint32_t i = 0; i < map.box_rows; ++i) {
      for (uint32_t j = 0; j < kPanelColumns; ++j) {
        const bool inside =
            column + j < t.sizes[0] && row + i < t.sizes[1] && head < t.sizes[2] && b < t.sizes[3];
        const char* const from = static_cast<const char*>(t.data) + 2 * size_t{column + j} +
                                 (row + i) * t.strides[0] + head * t.strides[1] + b * t.strides[2];
        char* const at = static_cast<char*>(to) + emulation::swizzled(i * kPanelRowBytes + 2 * j);
        if (inside) {
          std::memcpy(at, from, 2);
        } else {
          std::memset(at, 0, 2);
        }
      }
    }
  });
}

template <uint32_t kRegisters>
inline void take_registers() {}
template <uint32_t kRegisters>
inline void give_registers() {}

inline uint32_t descriptor_address(const void* p) {
  return uint32_t(static_cast<const unsigned char*>(p) - emulation::place().shared);
}

inline void begin_products() {}
template <typename Registers>
inline void hold(Registers&) {}

namespace emulation {

/// A product of a warpgroup, as its threads issue it.
struct GroupProduct {
  float* sums[kGroupThreads];        // [tiles][4] each
  const uint32_t* a[kGroupThreads];  // [4] each, where operand A is in registers
  uint64_t a_matrix, b_matrix;
  uint32_t tiles;
  bool adds, a_in_registers;
  Depth depth_a, depth_b;
  const unsigned char* shared;
  float (*widen)(uint16_t);

  float element(uint32_t offset) const {
    uint16_t bits;
    std::memcpy(&bits, shared + swizzled(offset), 2);
    return widen(bits);
  }
  static uint32_t field(uint64_t matrix, int shift) {
    return uint32_t(matrix >> shift & 0x3fff) * 16;
  }
  /// Element k of row or column i.
  float at(uint64_t matrix, Depth depth, uint32_t i, uint32_t k) const {
    const uint32_t row = depth == Depth::columns ? i : k;
    const uint32_t column = depth == Depth::columns ? k : i;
    return element(field(matrix, 0) + column / 64 * field(matrix, 16) +
                   row / 8 * field(matrix, 32) + row % 8 * kPanelRowBytes + 2 * (column % 64));
  }

  void run() const {
    std::unique_ptr<float[]> a(new float[64 * 16]), b(new float[16 * 8 * tiles]);
    for (uint32_t row = 0; row < 64; ++row) {
      for (uint32_t k = 0; k < 16; ++k) {
        const uint32_t lane = row / 16 * kLanes + row % 8 * 4 + k % 8 / 2;
        const uint32_t i = row % 16 / 8 + 2 * (k / 8);
        a[row * 16 + k] = a_in_registers ? widen(uint16_t(this->a[lane][i] >> (16 * (k % 2))))
                                         : at(a_matrix, depth_a, row, k);
      }
    }
    const uint32_t columns = 8 * tiles;
    for (uint32_t k = 0; k < 16; ++k) {
      for (uint32_t n = 0; n < columns; ++n) {
        b[k * columns + n] = at(b_matrix, depth_b, n, k);
      }
    }
    for (uint32_t row = 0; row < 64; ++row) {
      for (uint32_t n = 0; n < columns; ++n) {
        const uint32_t lane = row / 16 * kLanes + row % 8 * 4 + n % 8 / 2;
        float& c = sums[lane][n / 8 * 4 + row % 16 / 8 * 2 + n % 2];
        double sum = adds ? c : 0;
        for (uint32_t k = 0; k < 16; ++k) sum += double(a[row * 16 + k]) * b[k * columns + n];
        c = cut_off(sum);
      }
    }
  }
};

/// What one thread brings to a product.
struct GroupOperands {
  float* sums;
  const uint32_t* a;  // or null
  uint64_t a_matrix, b_matrix;
  uint32_t tiles;
  bool adds;
  Depth depth_a, depth_b;

  template <float (*kWiden)(uint16_t)>
  static void complete(void* const* threads) {
    const auto product = std::make_shared<GroupProduct>();
    const GroupOperands& first = *static_cast<const GroupOperands*>(threads[0]);
    product->a_matrix = first.a_matrix;
    product->b_matrix = first.b_matrix;
    product->tiles = first.tiles;
    product->adds = first.adds;
    product->a_in_registers = first.a != nullptr;
    product->depth_a = first.depth_a;
    product->depth_b = first.depth_b;
    product->shared = place().shared;
    product->widen = kWiden;
    for (uint32_t i = 0; i < kGroupThreads; ++i) {
      const GroupOperands& own = *static_cast<const GroupOperands*>(threads[i]);
      if (own.a_matrix != first.a_matrix || own.b_matrix != first.b_matrix) {
        fail("threads of a warpgroup describe different matrices");
      }
      product->sums[i] = own.sums;
      product->a[i] = own.a;
    }
    issue([product] { product->run(); });
  }
};

template <float (*kWiden)(uint16_t)>
inline void meet_for_product(GroupOperands operands) {
  meet_group(GroupOperands::complete<kWiden>, &operands);
}

}  // namespace emulation

inline void commit_products() {
  emulation::meet_group([](void* const*) { emulation::close_issued(); }, nullptr);
}
template <int kLeft>
inline void wait_products() {
  emulation::meet_group([](void* const*) { emulation::run_issued(kLeft); }, nullptr);
}

template <Half kHalf, Depth kDepthA, Depth kDepthB, int kTiles>
inline void multiply_shared(float (&sums)[kTiles][4], uint64_t a_matrix, uint64_t b_matrix,
                            bool adds) {
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 16);  // as on a GPU
  constexpr auto kWiden = kHalf == Half::float16 ? float16_to_float : bfloat16_to_float;
  emulation::meet_for_product<kWiden>(
      {sums[0], nullptr, a_matrix, b_matrix, kTiles, adds, kDepthA, kDepthB});
}

template <Half kHalf, int kTiles>
inline void multiply_registers(float (&sums)[kTiles][4], const uint32_t (&a)[4], uint64_t b_matrix,
                               bool adds) {
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 16 || kTiles == 32);  // as on a GPU
  constexpr auto kWiden = kHalf == Half::float16 ? float16_to_float : bfloat16_to_float;
  emulation::meet_for_product<kWiden>(
      {sums[0], a, 0, b_matrix, kTiles, adds, Depth::columns, Depth::rows});
}

}  // namespace sdpa::cuda

// warp.cuh played by the CPU. Matrix products follow the fragment layouts of the PTX ISA, and round
// as tensor cores do: sums of eight products are cut off, not rounded, to float32.
#pragma once

#include <cmath>

#include "core/half.h"

#include "cuda/emulation/machine.h"

#define SDPA_DEVICE inline
#define SDPA_OUTLINE inline
#define SDPA_KERNEL(threads, blocks) void
#define SDPA_PARAMETER
#define SDPA_UNROLL
#define SDPA_NO_UNROLL
#define SDPA_UNROLL_FEW

namespace sdpa::cuda {

inline uint32_t thread_index() { return emulation::place().thread; }
inline uint32_t thread_count() { return emulation::place().threads; }
inline Index3 block_index() {
  const emulation::Index& b = emulation::place().block;
  return {b.x, b.y, b.z};
}
inline unsigned char* shared_memory() { return emulation::place().shared; }

inline void sync_block() { emulation::meet_block(false); }
inline bool sync_block_or(bool vote) { return emulation::meet_block(vote); }

namespace emulation {
struct Shuffle {
  uint32_t value, lane, result;
  static void complete(void* const* lanes) {
    for (uint32_t i = 0; i < kLanes; ++i) {
      Shuffle& self = *static_cast<Shuffle*>(lanes[i]);
      if (i == 9 && planted() == Fault::shuffle) self.lane += 1;
      self.result = static_cast<const Shuffle*>(lanes[self.lane % kLanes])->value;
    }
  }
};

struct MatrixLoad {
  const void* row;
  uint32_t* registers;  // [4]
  template <bool kTransposed>
  static void complete(void* const* lanes) {
    const auto element = [&](uint32_t matrix, uint32_t row, uint32_t column) {
      const void* const from = static_cast<const MatrixLoad*>(lanes[8 * matrix + row])->row;
      return uint32_t{static_cast<const uint16_t*>(from)[column]};
    };
    for (uint32_t i = 0; i < kLanes; ++i) {
      const uint32_t row = i / 4, column = 2 * (i % 4);
      for (uint32_t m = 0; m < 4; ++m) {
        const uint32_t low = kTransposed ? element(m, column, row) : element(m, row, column);
        const uint32_t high =
            kTransposed ? element(m, column + 1, row) : element(m, row, column + 1);
        static_cast<const MatrixLoad*>(lanes[i])->registers[m] = low | high << 16;
      }
    }
  }
};

/// The sum cut off to float32.
inline float cut_off(double sum) {
  const float nearest = float(sum);
  if (!(std::fabs(double(nearest)) > std::fabs(sum)) || std::isinf(sum)) return nearest;
  return std::nextafter(nearest, 0.0f);
}

struct Product {
  float* c;           // [4]
  const uint32_t* a;  // [4]
  const uint32_t* b;  // [2]

  template <float (*kWiden)(uint16_t)>
  static void complete(void* const* lanes) {
    const auto half = [](uint32_t pair, uint32_t i) { return kWiden(uint16_t(pair >> (16 * i))); };
    const auto at = [&](uint32_t lane) { return static_cast<const Product*>(lanes[lane]); };
    float a[16][16], b[16][8];
    for (uint32_t row = 0; row < 16; ++row) {
      for (uint32_t k = 0; k < 16; ++k) {
        const uint32_t lane = row % 8 * 4 + k % 8 / 2;
        const uint32_t rows = row / 8, columns = k / 8;
        const bool swapped = planted() == Fault::fragment;
        a[row][k] = half(at(lane)->a[swapped ? columns + 2 * rows : rows + 2 * columns], k % 2);
      }
    }
    for (uint32_t k = 0; k < 16; ++k) {
      for (uint32_t n = 0; n < 8; ++n) b[k][n] = half(at(n * 4 + k % 8 / 2)->b[k / 8], k % 2);
    }
    for (uint32_t row = 0; row < 16; ++row) {
      for (uint32_t n = 0; n < 8; ++n) {
        float& c = at(row % 8 * 4 + n / 2)->c[row / 8 * 2 + n % 2];
        for (uint32_t first = 0; first < 16; first += 8) {
          double sum = c;
          for (uint32_t k = first; k < first + 8; ++k) sum += double(a[row][k]) * b[k][n];
          c = cut_off(sum);
        }
      }
    }
  }
};
}  // namespace emulation

inline uint32_t shuffle(uint32_t x, uint32_t lane) {
  emulation::Shuffle s{x, lane, 0};
  emulation::meet_warp(emulation::Shuffle::complete, &s);
  return s.result;
}

inline float from_bits(uint32_t bits) { return float_from_bits(bits); }
inline uint32_t to_bits(float x) { return bits_of_float(x); }

inline float shuffle(float x, uint32_t lane) { return from_bits(shuffle(to_bits(x), lane)); }
inline float shuffle_xor(float x, uint32_t mask) {
  return shuffle(x, (thread_index() % kLanes) ^ mask);
}

inline float exp2_fast(float x) {
  float y = std::exp2(x);
  if (emulation::planted() == emulation::Fault::exponential) y *= 1 + 0x1p-15f;
  return y < 0x1p-126f ? 0.0f : y;
}

inline uint32_t pack_float16(float low, float high) {
  return float_to_float16(low) | uint32_t{float_to_float16(high)} << 16;
}
inline uint32_t pack_bfloat16(float low, float high) {
  return float_to_bfloat16(low) | uint32_t{float_to_bfloat16(high)} << 16;
}
inline float widen_float16(uint32_t bits) { return float16_to_float(uint16_t(bits)); }

inline Vector16 load_vector(const void* p) {
  emulation::check_aligned(p, 16);
  Vector16 v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
inline void store_vector(void* p, const Vector16& v) {
  emulation::check_aligned(p, 16);
  std::memcpy(p, &v, sizeof v);
}
inline void store_two(void* p, uint32_t first, uint32_t second) {
  emulation::check_aligned(p, 8);
  const uint32_t both[2] = {first, second};
  std::memcpy(p, both, sizeof both);
}

inline void copy_async(void* to, const void* from, bool valid) {
  if (emulation::capability() >= 80) return emulation::copy_async(to, from, 16, valid);
  store_vector(to, valid ? load_vector(from) : Vector16{});
}
inline void commit_copies() {
  if (emulation::capability() >= 80) emulation::commit_copies();
}
template <int kLeft>
inline void wait_copies() {
  if (emulation::capability() >= 80) emulation::wait_copies(kLeft);
}

inline void load_matrices(uint32_t (&r)[4], const void* row) {
  emulation::check_aligned(row, 16);
  emulation::MatrixLoad load{row, r};
  emulation::meet_warp(emulation::MatrixLoad::complete<false>, &load);
}
inline void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  emulation::check_aligned(row, 16);
  emulation::MatrixLoad load{row, r};
  emulation::meet_warp(emulation::MatrixLoad::complete<true>, &load);
}

inline void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::Product p{c, a, b};
  emulation::meet_warp(emulation::Product::complete<float16_to_float>, &p);
}
inline void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  emulation::Product p{c, a, b};
  emulation::meet_warp(emulation::Product::complete<bfloat16_to_float>, &p);
}

/// Runs a kernel to its end.
template <typename Arguments>
inline int start(void (*kernel)(Arguments), Index3 grid, uint32_t threads, size_t shared_bytes,
                 const Arguments& arguments, int sm, void* /*stream*/) {
  struct Launch {
    void (*kernel)(Arguments);
    const Arguments& arguments;
    static void run(const void* launch) {
      const Launch& l = *static_cast<const Launch*>(launch);
      l.kernel(l.arguments);
    }
  };
  const Launch launch{kernel, arguments};
  emulation::run_grid({grid.x, grid.y, grid.z}, threads, shared_bytes, sm, Launch::run, &launch);
  return 0;
}

}  // namespace sdpa::cuda

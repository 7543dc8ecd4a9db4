// The vocabulary of vector operations for any processor: 4 lanes by the vector extension of GCC and
// Clang, which becomes SSE2, NEON or plain code. Included by portable.cpp inside its namespace.
// Every vec_<isa>.h offers these same names.

using Floats = float __attribute__((vector_size(16)));
using Words = uint32_t __attribute__((vector_size(16)));
using Mask = int32_t __attribute__((vector_size(16)));  // all bits of a lane set, or none

constexpr int kLanes = 4;

inline Floats load(const float* p) {
  Floats a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
inline void store(float* p, Floats a) { std::memcpy(p, &a, sizeof a); }
/// A store past the caches, to memory aligned for a vector; end_streams() makes all of them seen.
inline void stream(float* p, Floats a) { store(p, a); }
inline void end_streams() {}
inline Floats broadcast(float a) { return Floats{a, a, a, a}; }
inline Floats add(Floats a, Floats b) { return a + b; }
inline Floats sub(Floats a, Floats b) { return a - b; }
inline Floats mul(Floats a, Floats b) { return a * b; }
inline Floats div(Floats a, Floats b) { return a / b; }
/// a * b + c, in one rounding or two.
inline Floats multiply_add(Floats a, Floats b, Floats c) { return a * b + c; }

inline Mask less(Floats a, Floats b) { return a < b; }
inline Mask equal(Floats a, Floats b) { return a == b; }
inline Floats select(Mask m, Floats yes, Floats no) {
  return Floats((m & Mask(yes)) | (~m & Mask(no)));
}
inline bool any(Mask m) { return (m[0] | m[1] | m[2] | m[3]) != 0; }

/// The larger one; `running` where `a` is NaN.
inline Floats max_ignoring_nan(Floats a, Floats running) {
  return select(less(running, a), a, running);
}
constexpr float kRoundingShift = 12582912.0f;  // 1.5 * 2^23: adding it leaves no fraction bits
/// The nearest integer, for |a| < 2^22; NaN stays NaN.
inline Floats round_to_integer(Floats a) {
  return (a + broadcast(kRoundingShift)) - broadcast(kRoundingShift);
}
/// 2^n for integers n in [-126, 127]; anything where n is NaN.
inline Floats power_of_two(Floats n) {
  return Floats((Words(n + broadcast(kRoundingShift)) + 127) << 23);
}

inline Words load_words(const uint32_t* p) {
  Words a;
  std::memcpy(&a, p, sizeof a);
  return a;
}
inline Words broadcast_words(uint32_t a) { return Words{a, a, a, a}; }
inline Words exclusive_or(Words a, Words b) { return a ^ b; }
/// The high and the low halves of the 64-bit products.
inline void multiply_wide(Words a, uint32_t factor, Words& high, Words& low) {
  for (int i = 0; i < kLanes; ++i) {
    const uint64_t product = uint64_t{a[i]} * factor;
    high[i] = uint32_t(product >> 32);
    low[i] = uint32_t(product);
  }
}
/// Whether the low (Half 0) or high (Half 1) 16 bits of a lane are >= threshold (at most 65536).
template <int Half>
inline Mask half_at_least(Words a, Words threshold) {
  return ((a >> (16 * Half)) & 0xffff) >= threshold;
}

inline Floats load_float16(const uint16_t* p) {
  return Floats{float16_to_float(p[0]), float16_to_float(p[1]), float16_to_float(p[2]),
                float16_to_float(p[3])};
}
inline Floats load_bfloat16(const uint16_t* p) {
  return Floats(Words{p[0], p[1], p[2], p[3]} << 16);
}

/// Transposes kLanes rows of kLanes floats.
inline void transpose_block(const float* from, size_t from_stride, float* to, size_t to_stride) {
  for (int i = 0; i < kLanes; ++i) {
    for (int j = 0; j < kLanes; ++j) to[j * to_stride + i] = from[i * from_stride + j];
  }
}

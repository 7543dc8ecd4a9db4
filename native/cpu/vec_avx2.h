// The vocabulary of vector operations in AVX2 with FMA and F16C: 8 lanes.
// Included by avx2.cpp inside its namespace and target region; see vec_portable.h for the meaning.

using Floats = __m256;
using Mask = __m256;  // all bits of a lane set, or none
using Words = __m256i;

constexpr int kLanes = 8;

inline Floats load(const float* p) { return _mm256_loadu_ps(p); }
inline void store(float* p, Floats a) { _mm256_storeu_ps(p, a); }
inline void stream(float* p, Floats a) { _mm256_stream_ps(p, a); }
inline void end_streams() { _mm_sfence(); }
inline Floats broadcast(float a) { return _mm256_set1_ps(a); }
inline Floats add(Floats a, Floats b) { return _mm256_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm256_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm256_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm256_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a, b, c); }
inline Floats max_ignoring_nan(Floats a, Floats running) { return _mm256_max_ps(a, running); }
inline Floats round_to_integer(Floats a) {
  return _mm256_round_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats power_of_two(Floats n) {
  const Words exponent = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(exponent, 23));
}

inline Mask less(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_LT_OQ); }
inline Mask equal(Floats a, Floats b) { return _mm256_cmp_ps(a, b, _CMP_EQ_OQ); }
inline Floats select(Mask m, Floats yes, Floats no) { return _mm256_blendv_ps(no, yes, m); }
inline bool any(Mask m) { return _mm256_movemask_ps(m) != 0; }

inline Words load_words(const uint32_t* p) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
}
inline Words broadcast_words(uint32_t a) { return _mm256_set1_epi32(int(a)); }
inline Words exclusive_or(Words a, Words b) { return _mm256_xor_si256(a, b); }
inline void multiply_wide(Words a, uint32_t factor, Words& high, Words& low) {
  const Words f = broadcast_words(factor);
  const Words even = _mm256_mul_epu32(a, f);
  const Words odd = _mm256_mul_epu32(_mm256_srli_epi64(a, 32), f);
  high = _mm256_blend_epi32(_mm256_srli_epi64(even, 32), odd, 0b10101010);
  low = _mm256_blend_epi32(even, _mm256_slli_epi64(odd, 32), 0b10101010);
}
template <int Half>  // 0: low, 1: high 16 bits of each lane
inline Mask half_at_least(Words a, Words threshold) {
  const Words half = Half ? _mm256_srli_epi32(a, 16) : _mm256_and_si256(a, broadcast_words(0xffff));
  return _mm256_castsi256_ps(
      _mm256_cmpgt_epi32(half, _mm256_sub_epi32(threshold, broadcast_words(1))));
}

inline Floats load_float16(const uint16_t* p) {
  return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
}
inline Floats load_bfloat16(const uint16_t* p) {
  const __m128i halves = _mm_loadu_si128(reinterpret_cast<const __m128i*>(p));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(halves), 16));
}

/// Transposes kLanes rows of kLanes floats.
inline void transpose_block(const float* from, size_t from_stride, float* to, size_t to_stride) {
  Floats r[8], s[8];
  for (int i = 0; i < 8; ++i) r[i] = load(from + i * from_stride);
  for (int i = 0; i < 8; i += 2) {
    s[i] = _mm256_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm256_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm256_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm256_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  for (int i = 0; i < 4; ++i) {
    store(to + i * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x20));
    store(to + (i + 4) * to_stride, _mm256_permute2f128_ps(r[i], r[i + 4], 0x31));
  }
}

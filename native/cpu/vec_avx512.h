// The vocabulary of vector operations in AVX-512 (F, BW, DQ, VL): 16 lanes.
// Included by avx512.cpp inside its namespace and target region; see vec_portable.h for the
// meaning.

using Floats = __m512;
using Mask = __mmask16;
using Words = __m512i;

constexpr int kLanes = 16;

inline Floats load(const float* p) { return _mm512_loadu_ps(p); }
inline void store(float* p, Floats a) { _mm512_storeu_ps(p, a); }
inline void stream(float* p, Floats a) { _mm512_stream_ps(p, a); }
inline void end_streams() { _mm_sfence(); }
inline Floats broadcast(float a) { return _mm512_set1_ps(a); }
inline Floats add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats max_ignoring_nan(Floats a, Floats running) { return _mm512_max_ps(a, running); }
inline Floats round_to_integer(Floats a) {
  return _mm512_roundscale_ps(a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Floats power_of_two(Floats n) {
  const Words exponent = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(exponent, 23));
}

inline Mask less(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_LT_OQ); }
inline Mask equal(Floats a, Floats b) { return _mm512_cmp_ps_mask(a, b, _CMP_EQ_OQ); }
inline Floats select(Mask m, Floats yes, Floats no) { return _mm512_mask_blend_ps(m, no, yes); }
inline bool any(Mask m) { return m != 0; }

inline Words load_words(const uint32_t* p) { return _mm512_loadu_si512(p); }
inline Words broadcast_words(uint32_t a) { return _mm512_set1_epi32(int(a)); }
inline Words exclusive_or(Words a, Words b) { return _mm512_xor_si512(a, b); }
inline void multiply_wide(Words a, uint32_t factor, Words& high, Words& low) {
  constexpr __mmask16 odd_lanes = 0b1010101010101010;
  const Words f = broadcast_words(factor);
  const Words even = _mm512_mul_epu32(a, f);
  const Words odd = _mm512_mul_epu32(_mm512_srli_epi64(a, 32), f);
  high = _mm512_mask_blend_epi32(odd_lanes, _mm512_srli_epi64(even, 32), odd);
  low = _mm512_mask_blend_epi32(odd_lanes, even, _mm512_slli_epi64(odd, 32));
}
template <int Half>  // 0: low, 1: high 16 bits of each lane
inline Mask half_at_least(Words a, Words threshold) {
  const Words half = Half ? _mm512_srli_epi32(a, 16) : _mm512_and_si512(a, broadcast_words(0xffff));
  return _mm512_cmpge_epu32_mask(half, threshold);
}

inline Floats load_float16(const uint16_t* p) {
  return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
}
inline Floats load_bfloat16(const uint16_t* p) {
  const __m256i halves = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(halves), 16));
}

/// Transposes kLanes rows of kLanes floats.
inline void transpose_block(const float* from, size_t from_stride, float* to, size_t to_stride) {
  Floats r[16], s[16];
  for (int i = 0; i < 16; ++i) r[i] = load(from + i * from_stride);
  for (int i = 0; i < 16; i += 2) {
    s[i] = _mm512_unpacklo_ps(r[i], r[i + 1]);
    s[i + 1] = _mm512_unpackhi_ps(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {  // r[i + c], quarter l: column 4 l + c of rows i to i + 3
    r[i] = _mm512_shuffle_ps(s[i], s[i + 2], 0x44);
    r[i + 1] = _mm512_shuffle_ps(s[i], s[i + 2], 0xee);
    r[i + 2] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0x44);
    r[i + 3] = _mm512_shuffle_ps(s[i + 1], s[i + 3], 0xee);
  }
  for (int c = 0; c < 4; ++c) {
    const Floats even_top = _mm512_shuffle_f32x4(r[c], r[4 + c], 0x88);
    const Floats odd_top = _mm512_shuffle_f32x4(r[c], r[4 + c], 0xdd);
    const Floats even_bottom = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0x88);
    const Floats odd_bottom = _mm512_shuffle_f32x4(r[8 + c], r[12 + c], 0xdd);
    store(to + c * to_stride, _mm512_shuffle_f32x4(even_top, even_bottom, 0x88));
    store(to + (4 + c) * to_stride, _mm512_shuffle_f32x4(odd_top, odd_bottom, 0x88));
    store(to + (8 + c) * to_stride, _mm512_shuffle_f32x4(even_top, even_bottom, 0xdd));
    store(to + (12 + c) * to_stride, _mm512_shuffle_f32x4(odd_top, odd_bottom, 0xdd));
  }
}

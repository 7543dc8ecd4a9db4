// The vocabulary of vector operations in NEON of aarch64, conversions of float16 included: 4 lanes.
// Included by neon.cpp inside its namespace; see vec_portable.h for the meaning.

using Floats = float32x4_t;
using Mask = uint32x4_t;  // all bits of a lane set, or none
using Words = uint32x4_t;

constexpr int kLanes = 4;

inline Floats load(const float* p) { return vld1q_f32(p); }
inline void store(float* p, Floats a) { vst1q_f32(p, a); }
inline void stream(float* p, Floats a) { store(p, a); }
inline void end_streams() {}
inline Floats broadcast(float a) { return vdupq_n_f32(a); }
inline Floats add(Floats a, Floats b) { return vaddq_f32(a, b); }
inline Floats sub(Floats a, Floats b) { return vsubq_f32(a, b); }
inline Floats mul(Floats a, Floats b) { return vmulq_f32(a, b); }
inline Floats div(Floats a, Floats b) { return vdivq_f32(a, b); }
inline Floats multiply_add(Floats a, Floats b, Floats c) { return vfmaq_f32(c, a, b); }

inline Mask less(Floats a, Floats b) { return vcltq_f32(a, b); }
inline Mask equal(Floats a, Floats b) { return vceqq_f32(a, b); }
inline Floats select(Mask m, Floats yes, Floats no) { return vbslq_f32(m, yes, no); }
inline bool any(Mask m) { return vmaxvq_u32(m) != 0; }

/// By comparison: the instructions for a maximum treat NaN alike on both sides.
inline Floats max_ignoring_nan(Floats a, Floats running) {
  return select(less(running, a), a, running);
}
inline Floats round_to_integer(Floats a) { return vrndnq_f32(a); }
inline Floats power_of_two(Floats n) {
  const int32x4_t exponent = vaddq_s32(vcvtq_s32_f32(n), vdupq_n_s32(127));
  return vreinterpretq_f32_s32(vshlq_n_s32(exponent, 23));
}

inline Words load_words(const uint32_t* p) { return vld1q_u32(p); }
inline Words broadcast_words(uint32_t a) { return vdupq_n_u32(a); }
inline Words exclusive_or(Words a, Words b) { return veorq_u32(a, b); }
inline void multiply_wide(Words a, uint32_t factor, Words& high, Words& low) {
  const Words f = broadcast_words(factor);
  const Words first = vreinterpretq_u32_u64(vmull_u32(vget_low_u32(a), vget_low_u32(f)));
  const Words last = vreinterpretq_u32_u64(vmull_high_u32(a, f));
  high = vuzp2q_u32(first, last);
  low = vuzp1q_u32(first, last);
}
template <int Half>  // 0: low, 1: high 16 bits of each lane
inline Mask half_at_least(Words a, Words threshold) {
  const Words half = Half ? vshrq_n_u32(a, 16) : vandq_u32(a, broadcast_words(0xffff));
  return vcgeq_u32(half, threshold);
}

inline Floats load_float16(const uint16_t* p) {
  return vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
}
inline Floats load_bfloat16(const uint16_t* p) {
  return vreinterpretq_f32_u32(vshll_n_u16(vld1_u16(p), 16));
}

/// Transposes kLanes rows of kLanes floats.
inline void transpose_block(const float* from, size_t from_stride, float* to, size_t to_stride) {
  Floats r[4];
  for (int i = 0; i < 4; ++i) r[i] = load(from + i * from_stride);
  for (int half = 0; half < 2; ++half) {
    // Columns 0 and 2, then 1 and 3, of rows 0 and 1 and of rows 2 and 3.
    const Floats top = half == 0 ? vtrn1q_f32(r[0], r[1]) : vtrn2q_f32(r[0], r[1]);
    const Floats bottom = half == 0 ? vtrn1q_f32(r[2], r[3]) : vtrn2q_f32(r[2], r[3]);
    store(to + half * to_stride, vcombine_f32(vget_low_f32(top), vget_low_f32(bottom)));
    store(to + (half + 2) * to_stride, vcombine_f32(vget_high_f32(top), vget_high_f32(bottom)));
  }
}

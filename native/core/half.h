// The two 16-bit float types as bit patterns: IEEE 754 binary16 and bfloat16.
#pragma once

#include <cstdint>
#include <cstring>

#include "core/problem.h"

namespace sdpa {

inline float float_from_bits(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

inline uint32_t bits_of_float(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

inline float bfloat16_to_float(uint16_t half) { return float_from_bits(uint32_t{half} << 16); }

/// Rounds to nearest even; NaN stays a (quiet) NaN.
inline uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = bits_of_float(value);
  if ((bits & 0x7fffffff) > 0x7f800000) return uint16_t((bits >> 16) | 0x40);
  return uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

inline float float16_to_float(uint16_t half) {
  const uint32_t sign = uint32_t{half & 0x8000u} << 16, magnitude = half & 0x7fff;
  if (magnitude >= 0x7c00) {  // infinity or NaN
    return float_from_bits(sign | 0x7f800000 | ((magnitude & 0x3ff) << 13));
  }
  if (magnitude <
      0x400) {  // subnormal: a count of 2^-24, by no step that a flush to 0 would change
    return float_from_bits(sign | bits_of_float(float(magnitude) * 0x1p-24f));
  }
  // Move the fields to float32's places and let a multiplication rebias.
  const float scaled = float_from_bits(magnitude << 13) * 5.192296858534828e33f;  // 2^112
  return float_from_bits(sign | bits_of_float(scaled));
}

/// Rounds to nearest even; overflow gives infinity, NaN stays a (quiet) NaN.
inline uint16_t float_to_float16(float value) {
  const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7fffffff;
  const uint16_t sign = uint16_t((bits >> 16) & 0x8000);
  if (magnitude > 0x7f800000) return sign | 0x7e00 | uint16_t((magnitude >> 13) & 0x1ff);
  if (magnitude >= 0x477ff000) return sign | 0x7c00;          // 65520 and more round to infinity
  if (magnitude < 0x38800000) {                               // below 2^-14: subnormal, ulp 2^-24
    const float shifted = float_from_bits(magnitude) + 0.5f;  // 0.5 has an ulp of 2^-24
    return sign | uint16_t(bits_of_float(shifted) - 0x3f000000);
  }
  const uint32_t rounded = magnitude + 0xfff + ((magnitude >> 13) & 1);
  return sign | uint16_t((rounded - 0x38000000) >> 13);
}

inline float load_element(Type type, const void* data, size_t i) {
  if (type == Type::float32) return static_cast<const float*>(data)[i];
  const uint16_t bits = static_cast<const uint16_t*>(data)[i];
  return type == Type::float16 ? float16_to_float(bits) : bfloat16_to_float(bits);
}

inline void store_element(Type type, void* data, size_t i, float value) {
  if (type == Type::float32) {
    static_cast<float*>(data)[i] = value;
  } else {
    static_cast<uint16_t*>(data)[i] =
        type == Type::float16 ? float_to_float16(value) : float_to_bfloat16(value);
  }
}

}  // namespace sdpa

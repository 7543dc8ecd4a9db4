// What this processor can do, asked at run time.
#pragma once

namespace sdpa {

/// AVX2, FMA and F16C, and an operating system that saves the wide registers.
bool cpu_has_avx2();

/// AVX-512 F, BW, DQ and VL, all of AVX2's, and an operating system that saves the registers.
bool cpu_has_avx512();

}  // namespace sdpa

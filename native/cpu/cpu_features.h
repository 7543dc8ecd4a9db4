// What this processor can do, asked at run time.
//
// Internal, for tests: the environment variable SDPA_CPU_FEATURES_OFF, read once, lists features
// (`avx512vl,fma`; all names are in cpu_features.cpp) that count as missing. It can only take away.
#pragma once

namespace sdpa {

/// AVX2, FMA and F16C, and an operating system that saves the wide registers.
bool cpu_has_avx2();

/// AVX-512 F, BW, DQ and VL, all of AVX2's, and an operating system that saves the registers.
bool cpu_has_avx512();

/// AMX tiles of bfloat16 and the AVX-512 instructions that go with them, and an operating system
/// that grants this process the tile registers. Asks for them at the first call.
bool cpu_has_amx();

}  // namespace sdpa

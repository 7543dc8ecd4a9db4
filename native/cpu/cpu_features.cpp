// What this processor can do, asked at run time.
#include "cpu/cpu_features.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <cstdint>
#if defined(_MSC_VER)
#include <immintrin.h>
#include <intrin.h>
#else
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace sdpa {
namespace {

struct CpuidWords {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

CpuidWords cpuid(uint32_t leaf, uint32_t subleaf) {
  CpuidWords r;
#if defined(_MSC_VER)
  int words[4];
  __cpuid(words, 0);
  if (uint32_t(words[0]) < leaf) return r;
  __cpuidex(words, int(leaf), int(subleaf));
  r = {uint32_t(words[0]), uint32_t(words[1]), uint32_t(words[2]), uint32_t(words[3])};
#else
  __get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx);
#endif
  return r;
}

/// The register states that the operating system saves (XCR0).
uint64_t saved_states() {
#if defined(_MSC_VER)
  return _xgetbv(0);
#else
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (uint64_t{hi} << 32) | lo;
#endif
}

constexpr bool bit(uint32_t word, int index) { return (word >> index) & 1; }

bool detect_avx2() {
  const CpuidWords basic = cpuid(1, 0), extended = cpuid(7, 0);
  const bool fma = bit(basic.ecx, 12), osxsave = bit(basic.ecx, 27), avx = bit(basic.ecx, 28),
             f16c = bit(basic.ecx, 29), avx2 = bit(extended.ebx, 5);
  constexpr uint64_t sse_and_avx_state = 0b110;
  return osxsave && (saved_states() & sse_and_avx_state) == sse_and_avx_state && avx && avx2 &&
         fma && f16c;
}

bool detect_avx512() {
  if (!cpu_has_avx2()) return false;
  const uint32_t ebx = cpuid(7, 0).ebx;
  const bool f = bit(ebx, 16), dq = bit(ebx, 17), bw = bit(ebx, 30), vl = bit(ebx, 31);
  constexpr uint64_t mask_and_zmm_state = 0b11100000;
  return (saved_states() & mask_and_zmm_state) == mask_and_zmm_state && f && dq && bw && vl;
}

bool detect_amx() {
#if defined(__linux__)
  if (!cpu_has_avx512()) return false;
  const uint32_t edx = cpuid(7, 0).edx;
  const bool amx_bf16 = bit(edx, 22), amx_tile = bit(edx, 24),
             avx512_bf16 = bit(cpuid(7, 1).eax, 5);
  constexpr uint64_t tile_states = uint64_t{0b11} << 17;
  if ((saved_states() & tile_states) != tile_states || !amx_bf16 || !amx_tile || !avx512_bf16) {
    return false;
  }
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace

// Asked once: a virtual machine takes tens of microseconds to answer CPUID.

bool cpu_has_avx2() {
  static const bool has = detect_avx2();
  return has;
}

bool cpu_has_avx512() {
  static const bool has = detect_avx512();
  return has;
}

bool cpu_has_amx() {
  static const bool has = detect_amx();
  return has;
}

}  // namespace sdpa

#else

namespace sdpa {
bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_amx() { return false; }
}  // namespace sdpa

#endif

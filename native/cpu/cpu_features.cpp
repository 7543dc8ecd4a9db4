// What this processor can do, asked at run time.
#include "cpu/cpu_features.h"

#if defined(__x86_64__) || defined(_M_X64)

#include <cstdint>
#include <cstdlib>
#include <cstring>
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

/// What a backend may need. An os_ feature is an operating system that saves those registers.
struct Features {
  bool avx, avx2, fma, f16c, os_avx;
  bool avx512f, avx512dq, avx512bw, avx512vl, os_avx512;
  bool amx_tile, amx_bf16, avx512_bf16, os_amx, amx_permission;
};

/// Whether the comma-separated list, which may be null, has this name.
bool lists(const char* names, const char* name) {
  const size_t length = std::strlen(name);
  while (names) {
    if (std::strncmp(names, name, length) == 0 && (!names[length] || names[length] == ',')) {
      return true;
    }
    names = std::strchr(names, ',');
    if (names) ++names;
  }
  return false;
}

Features detect() {
  const CpuidWords basic = cpuid(1, 0), extended = cpuid(7, 0), more = cpuid(7, 1);
  const bool osxsave = bit(basic.ecx, 27);
  const uint64_t states = osxsave ? saved_states() : 0;
  const auto saves = [states](uint64_t mask) { return (states & mask) == mask; };
  // A hook for tests, which takes features away and can add none.
  const char* const off = std::getenv("SDPA_CPU_FEATURES_OFF");
  const auto has = [off](const char* name, bool found) { return found && !lists(off, name); };
  Features f;
  f.avx = has("avx", bit(basic.ecx, 28));
  f.avx2 = has("avx2", bit(extended.ebx, 5));
  f.fma = has("fma", bit(basic.ecx, 12));
  f.f16c = has("f16c", bit(basic.ecx, 29));
  f.os_avx = has("os_avx", saves(0b110));  // SSE and AVX
  f.avx512f = has("avx512f", bit(extended.ebx, 16));
  f.avx512dq = has("avx512dq", bit(extended.ebx, 17));
  f.avx512bw = has("avx512bw", bit(extended.ebx, 30));
  f.avx512vl = has("avx512vl", bit(extended.ebx, 31));
  f.os_avx512 = has("os_avx512", saves(0b11100000));  // masks, and both extensions of registers
  f.amx_tile = has("amx_tile", bit(extended.edx, 24));
  f.amx_bf16 = has("amx_bf16", bit(extended.edx, 22));
  f.avx512_bf16 = has("avx512_bf16", bit(more.eax, 5));
  f.os_amx = has("os_amx", saves(uint64_t{0b11} << 17));
  f.amx_permission = has("amx_permission", true);  // asked for when all else is there
  return f;
}

/// Asked once: a virtual machine takes tens of microseconds to answer CPUID.
const Features& features() {
  static const Features found = detect();
  return found;
}

bool request_amx() {
#if defined(__linux__)
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
#else
  return false;
#endif
}

}  // namespace

bool cpu_has_avx2() {
  const Features& f = features();
  return f.os_avx && f.avx && f.avx2 && f.fma && f.f16c;
}

bool cpu_has_avx512() {
  const Features& f = features();
  return cpu_has_avx2() && f.os_avx512 && f.avx512f && f.avx512dq && f.avx512bw && f.avx512vl;
}

bool cpu_has_amx() {
  const Features& f = features();
  if (!cpu_has_avx512() || !f.os_amx || !f.amx_tile || !f.amx_bf16 || !f.avx512_bf16) return false;
  if (!f.amx_permission) return false;
  static const bool granted = request_amx();
  return granted;
}

}  // namespace sdpa

#else

namespace sdpa {
bool cpu_has_avx2() { return false; }
bool cpu_has_avx512() { return false; }
bool cpu_has_amx() { return false; }
}  // namespace sdpa

#endif

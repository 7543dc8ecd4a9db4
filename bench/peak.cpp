// Prints how many multiply-adds one core does at most, in GFLOP/s: what the instruction set that
// this is compiled for allows, on random numbers in registers.
#include <chrono>
#include <cstdio>
#include <cstring>
#include <random>

#if defined(__AMX_BF16__) && defined(__linux__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

// Tiles: four sums of 16 x 16 floats, each the product of two tiles of 16 x 32 bfloat16 numbers.
constexpr double kFlopsPerStep = 4.0 * 2 * 16 * 16 * 32;

struct alignas(64) TileConfig {
  unsigned char palette = 1, start_row = 0, reserved[14] = {};
  unsigned short row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  unsigned char rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

static bool prepare(std::mt19937& random) {
  constexpr long kArchRequestPermission = 0x1023, kTileData = 18;
  if (syscall(SYS_arch_prctl, kArchRequestPermission, kTileData) != 0) return false;
  TileConfig config;
  _tile_loadconfig(&config);
  alignas(64) static unsigned short numbers[4][512];
  std::normal_distribution<float> normal;
  for (auto& tile : numbers) {
    for (unsigned short& number : tile) {
      const float value = normal(random);
      unsigned bits;
      std::memcpy(&bits, &value, sizeof bits);
      number = static_cast<unsigned short>(bits >> 16);
    }
  }
  _tile_loadd(4, numbers[0], 64);
  _tile_loadd(5, numbers[1], 64);
  _tile_loadd(6, numbers[2], 64);
  _tile_loadd(7, numbers[3], 64);
  return true;
}

static float compute(int steps) {
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int step = 0; step < steps; step++) {
    _tile_dpbf16ps(0, 4, 6);
    _tile_dpbf16ps(1, 4, 7);
    _tile_dpbf16ps(2, 5, 6);
    _tile_dpbf16ps(3, 5, 7);
  }
  alignas(64) float sums[256];
  _tile_stored(3, sums, 64);
  return sums[17];
}

#else

// Sums of kSide x kSide vectors hide the instruction's latency and, with its operands, fit
// registers.
#if defined(__AVX512F__)
constexpr int kBytes = 64, kSide = 4;
#elif defined(__AVX__)
constexpr int kBytes = 32, kSide = 3;
#elif defined(__aarch64__)
constexpr int kBytes = 16, kSide = 4;
#else
constexpr int kBytes = 16, kSide = 3;
#endif
// The compiler's own vectors; it contracts a product and a sum into one instruction.
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr double kFlopsPerStep = 2.0 * kSide * kSide * kBytes / sizeof(float);

static Vector factors[kSide], terms[kSide];

static bool prepare(std::mt19937& random) {
  std::uniform_real_distribution<float> uniform(-0.9f, 0.9f);
  for (int i = 0; i < kSide; i++) {
    for (size_t lane = 0; lane < kBytes / sizeof(float); lane++) {
      factors[i][lane] = uniform(random);
      terms[i][lane] = uniform(random);
    }
  }
  return true;
}

static float compute(int steps) {
  Vector sums[kSide][kSide] = {}, factor[kSide], term[kSide];
  std::memcpy(factor, factors, sizeof factor);
  std::memcpy(term, terms, sizeof term);
  for (int step = 0; step < steps; step++) {
    for (int i = 0; i < kSide; i++) {
      for (int j = 0; j < kSide; j++) sums[i][j] = sums[i][j] * factor[i] + term[j];
    }
  }
  float total = 0;
  for (auto& row : sums) {
    for (Vector& sum : row) total += sum[0];
  }
  return total;
}

#endif

int main() {
  using Clock = std::chrono::steady_clock;
  std::mt19937 random(1);
  if (!prepare(random)) return 1;
  constexpr int kRepeats = 40;
  volatile float sink;
  int steps = 1000;
  double best = 0;
  for (int repeat = 0; repeat < kRepeats;) {
    const auto start = Clock::now();
    sink = compute(steps);
    const double seconds = std::chrono::duration<double>(Clock::now() - start).count();
    if (seconds < 0.005) {
      steps *= 2;
      continue;
    }
    const double rate = steps * kFlopsPerStep / seconds / 1e9;
    if (rate > best) best = rate;
    repeat++;
  }
  (void)sink;
  std::printf("%.1f\n", best);
}

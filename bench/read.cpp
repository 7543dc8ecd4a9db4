// Prints how fast memory can be read, in GB/s: the median of many reads of the same bytes, as two
// arrays in turns like the keys and values of a decoding step, by the widest vectors that this is
// compiled for. Arguments: bytes, threads.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <thread>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#if defined(__AVX512F__)
constexpr size_t kBytes = 64;
#elif defined(__AVX__)
constexpr size_t kBytes = 32;
#else
constexpr size_t kBytes = 16;
#endif
// The compiler's own vectors.
typedef float Vector __attribute__((vector_size(kBytes)));
constexpr size_t kSums = 8, kChunk = 32768;  // bytes of one array before the other's turn

static float* allocate(size_t bytes) {
  void* const data = std::aligned_alloc(size_t{2} << 20, bytes);
  if (!data) std::exit(1);
#if defined(__linux__)
  madvise(data, bytes, MADV_HUGEPAGE);  // as the package does
#endif
  std::memset(data, 1, bytes);
  return static_cast<float*>(data);
}

static float read(const float* keys, const float* values, size_t begin, size_t end) {
  Vector sums[kSums] = {};
  for (size_t at = begin; at < end; at += kChunk) {
    for (const float* array : {keys, values}) {
      const Vector* next = reinterpret_cast<const Vector*>(array) + at / kBytes;
      for (size_t i = 0; i < kChunk / kBytes; i += kSums) {
        for (size_t j = 0; j < kSums; j++) sums[j] += next[i + j];
      }
    }
  }
  float total = 0;
  for (const Vector& sum : sums) total += sum[0];
  return total;
}

int main(int count, char** arguments) {
  using Clock = std::chrono::steady_clock;
  if (count != 3) return 1;
  const size_t threads = std::strtoul(arguments[2], nullptr, 10);
  const size_t granule = (size_t{2} << 20) * threads;  // whole large pages for each thread
  const size_t half =
      (std::strtoull(arguments[1], nullptr, 10) / 2 + granule - 1) / granule * granule;
  const float* const keys = allocate(half);
  const float* const values = allocate(half);
  std::atomic<int> started{0}, ended{0};
  std::atomic<float> sink{0};
  const auto share = [&](size_t thread) {
    sink.store(read(keys, values, half / threads * thread, half / threads * (thread + 1)));
  };
  constexpr int kRepeats = 41;
  std::vector<std::thread> helpers;
  for (size_t thread = 1; thread < threads; thread++) {
    helpers.emplace_back([&, thread] {
      for (int repeat = 1; repeat <= kRepeats; repeat++) {
        while (started.load() < repeat) continue;
        share(thread);
        ended.fetch_add(1);
      }
    });
  }
  std::vector<double> rates;
  for (int repeat = 1; repeat <= kRepeats; repeat++) {
    const auto start = Clock::now();
    started.store(repeat);
    share(0);
    while (ended.load() < repeat * int(threads - 1)) continue;
    rates.push_back(2.0 * half / std::chrono::duration<double>(Clock::now() - start).count() / 1e9);
  }
  for (std::thread& helper : helpers) helper.join();
  std::sort(rates.begin(), rates.end());
  std::printf("%.2f\n", rates[rates.size() / 2]);
}

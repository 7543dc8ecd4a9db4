// Drives the thread pool and the kernels from many threads at once, without Node, under
// ThreadSanitizer: `npm run test:threads` builds it, and runs it once for each scenario.
//
// A scenario fails if a result differs by a bit from what one thread alone computed, or if the
// sanitizer sees a race. The planted ones have to be reported: they show that it would.
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <thread>
#include <vector>

#include "backends.h"
#include "cpu/sequences.h"
#include "cpu/thread_pool.h"

#if defined(__has_feature)
#define HAS_FEATURE(name) __has_feature(name)
#else
#define HAS_FEATURE(name) 0
#endif
#if !defined(__SANITIZE_THREAD__) && !HAS_FEATURE(thread_sanitizer)
#error "this test says nothing without -fsanitize=thread"
#endif

namespace sdpa {
namespace {

void require(bool condition, const char* what) {
  if (condition) return;
  std::fprintf(stderr, "failed: %s\n", what);
  std::exit(1);
}

using Floats = std::vector<float>;

Floats normals(size_t count, unsigned seed) {
  std::mt19937 generator(seed);
  std::normal_distribution<float> normal;
  Floats values(count);
  for (float& value : values) value = normal(generator);
  return values;
}

/// A problem with its inputs; several threads may compute it at the same time.
struct Case {
  Problem p{};
  Floats query, key, value, mask, grad_output;
  std::vector<int32_t> query_starts, key_starts;  // of a packed batch

  Case(uint32_t heads, uint32_t kv_heads, uint32_t queries, uint32_t keys, uint32_t width) {
    p.batch = 1;
    p.query_heads = heads;
    p.kv_heads = kv_heads;
    p.query_length = queries;
    p.key_length = keys;
    p.head_dim = p.value_dim = width;
    p.mask_batch = p.mask_heads = p.mask_queries = p.mask_keys = 1;
    p.window_left = p.window_right = -1;
    p.scale = 0.2f;
    query = normals(size_t{heads} * queries * width, 1);
    key = normals(size_t{kv_heads} * keys * width, 2);
    value = normals(size_t{kv_heads} * keys * width, 3);
    grad_output = normals(size_t{heads} * queries * width, 4);
  }
  Case& drop_weights() {
    p.dropout_p = 0.2;
    p.seed_lo = 7;
    return *this;
  }
  Case& causal() {
    p.is_causal = 1;
    p.causal_offset = int32_t(p.key_length - p.query_length);
    return *this;
  }
  Case& biased() {
    p.mask_type = MaskType::float32;
    p.mask_queries = p.query_length;
    p.mask_keys = p.key_length;
    mask = normals(size_t{p.query_length} * p.key_length, 5);
    return *this;
  }
  Case& packed(std::vector<int32_t> queries, std::vector<int32_t> keys) {
    p.batch = uint32_t(queries.size()) - 1;
    p.layout = Layout::bshd;
    query_starts = std::move(queries);
    key_starts = std::move(keys);
    return *this;
  }
};

/// Each is large enough to be shared out, and has a way of its own through the kernels.
const std::vector<Case>& cases() {
  static const std::vector<Case> all = {
      Case(4, 2, 96, 128, 32).drop_weights().biased(),  // the gradient of a mask, grouped heads
      Case(2, 2, 64, 600, 16).causal(),                 // two chunks of keys: slices of grad_query
      Case(8, 2, 1, 2000, 32),                          // few queries: chunks joined by lse
      // Regions inside a region: a long sequence is shared out, and short ones beside it.
      Case(2, 2, 200, 700, 16).packed({0, 96, 100, 200}, {0, 600, 650, 700}),
  };
  return all;
}

struct Results {
  Floats output, lse, grad_query, grad_key, grad_value, grad_mask;

  explicit Results(const Case& c)
      : output(c.query.size()),
        lse(c.query.size() / c.p.head_dim),
        grad_query(c.query.size()),
        grad_key(c.key.size()),
        grad_value(c.value.size()),
        grad_mask(c.mask.size()) {}

  bool operator==(const Results& other) const {
    const auto same = [](const Floats& a, const Floats& b) {
      return std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0;
    };
    return same(output, other.output) && same(lse, other.lse) &&
           same(grad_query, other.grad_query) && same(grad_key, other.grad_key) &&
           same(grad_value, other.grad_value) && same(grad_mask, other.grad_mask);
  }
};

/// Forward and backward into `r`, which is the caller's alone.
Status compute(const Backend& backend, const Case& c, Results& r,
               const CancelToken& cancel = CancelToken()) {
  const void* const mask = c.mask.empty() ? nullptr : c.mask.data();
  const Inputs inputs{c.query.data(), c.key.data(), c.value.data(), mask,
                      nullptr,        nullptr,      nullptr,        nullptr};
  const ForwardOutputs outputs{r.output.data(), r.lse.data(), nullptr, nullptr,
                               nullptr,         nullptr,      nullptr};
  const BackwardTensors tensors{r.output.data(),
                                r.lse.data(),
                                c.grad_output.data(),
                                r.grad_query.data(),
                                r.grad_key.data(),
                                r.grad_value.data(),
                                mask ? r.grad_mask.data() : nullptr};
  if (!c.query_starts.empty()) {
    Sequences sequences;
    sequences.query_starts = c.query_starts.data();
    sequences.key_starts = c.key_starts.data();
    const Status status = forward_sequences(backend, sequences, c.p, inputs, outputs, cancel);
    if (!status.ok()) return status;
    return backward_sequences(backend, sequences, c.p, inputs, tensors, cancel);
  }
  const Status status = backend.forward(c.p, inputs, outputs, cancel);
  if (!status.ok()) return status;
  return backend.backward(c.p, inputs, tensors, cancel);
}

std::vector<const Backend*> available() {
  std::vector<const Backend*> found;
  for (size_t i = 0; i < kBackendCount; ++i) {
    if (!kBackends[i]->unavailable_reason()) found.push_back(kBackends[i]);
  }
  return found;
}

/// What one thread alone computes: [backend][case].
std::vector<std::vector<Results>> computed_alone() {
  ThreadPool::shared().set_threads(1);
  std::vector<std::vector<Results>> all;
  for (const Backend* const backend : available()) {
    all.emplace_back();
    for (const Case& c : cases()) {
      all.back().emplace_back(c);
      require(compute(*backend, c, all.back().back()).ok(), "a call alone");
    }
  }
  return all;
}

void run_threads(int count, const std::function<void(int)>& body) {
  std::vector<std::thread> threads;
  for (int i = 0; i < count; ++i) threads.emplace_back(body, i);
  for (std::thread& thread : threads) thread.join();
}

/// Calls every backend and case `rounds` times, beginning elsewhere in each thread.
void call_all(const std::vector<std::vector<Results>>& alone, int thread, int rounds) {
  const std::vector<const Backend*> backends = available();
  const size_t kinds = backends.size() * cases().size();
  for (size_t i = 0; i < kinds * rounds; ++i) {
    const size_t kind = (i + size_t(thread)) % kinds, c = kind % cases().size();
    Results results(cases()[c]);
    require(compute(*backends[kind / cases().size()], cases()[c], results).ok(), "a call");
    require(results == alone[kind / cases().size()][c], "the bits of a single thread");
  }
}

// ------------------------------------------------------------------------------------- scenarios

/// Calls from several threads at once, while another changes the number of threads.
void calls_and_resizes() {
  const auto alone = computed_alone();
  ThreadPool& pool = ThreadPool::shared();
  pool.set_threads(4);
  std::atomic<bool> done{false};
  std::thread resizer([&] {
    for (int i = 0; !done; ++i) {
      const int threads = 1 + i * 5 % 7;
      pool.set_threads(threads);
      require(pool.threads() == threads, "the number of threads");
      std::this_thread::sleep_for(std::chrono::microseconds(300));
    }
  });
  run_threads(4, [&](int thread) { call_all(alone, thread, 3); });
  done = true;
  resizer.join();
}

/// All helpers leave and come back, again and again.
void leaving_and_returning() {
  const auto alone = computed_alone();
  for (int round = 0; round < 6; ++round) {
    ThreadPool::shared().set_threads(8);
    run_threads(2, [&](int thread) { call_all(alone, thread, 1); });
    ThreadPool::shared().set_threads(1);
    std::this_thread::sleep_for(std::chrono::milliseconds(5));
  }
}

/// Calls that are cancelled at some moment, by both ways of a token; others go on beside them.
void cancellation() {
  const auto alone = computed_alone();
  ThreadPool::shared().set_threads(4);
  std::atomic<int> aborted{0}, finished{0};
  const auto cancelled_calls = [&](int thread) {
    std::mt19937 generator{unsigned(thread)};
    for (int i = 0; i < 30; ++i) {
      std::atomic<int32_t> flag{0};
      CancelToken token(&flag);
      const bool by_flag = i % 2 == 0;
      const auto delay = std::chrono::microseconds(generator() % 30000);
      std::thread canceller([&] {
        std::this_thread::sleep_for(delay);
        by_flag ? flag.store(1) : token.cancel();
      });
      const Case& c = cases()[size_t(i) % cases().size()];
      Results results(c);
      const Status status =
          compute(*available()[size_t(i) % available().size()], c, results, token);
      require(status.ok() || status.code == StatusCode::aborted, "ok or aborted");
      ++(status.ok() ? finished : aborted);
      canceller.join();
    }
  };
  run_threads(
      3, [&](int thread) { thread == 0 ? call_all(alone, thread, 3) : cancelled_calls(thread); });
  std::printf("%d calls aborted, %d finished first\n", aborted.load(), finished.load());
  require(aborted > 10, "calls are aborted");
  call_all(alone, 0, 1);
}

/// Counts what has to end before a scenario may.
class Countdown {
 public:
  explicit Countdown(int count) : count_(count) {}
  void arrive() {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (--count_ == 0) zero_.notify_all();
  }
  void wait() {
    std::unique_lock<std::mutex> lock(mutex_);
    zero_.wait(lock, [this] { return count_ == 0; });
  }

 private:
  std::mutex mutex_;
  std::condition_variable zero_;
  int count_;
};

struct CallJob final : Job {
  const Backend& backend;
  const Case& problem;
  Results results;
  Countdown& ended;

  CallJob(const Backend& backend, const Case& problem, Countdown& ended)
      : backend(backend), problem(problem), results(problem), ended(ended) {}
  void run() override {
    require(compute(backend, problem, results).ok(), "a job");
    ended.arrive();
  }
};

/// Asynchronous calls from several threads; some are taken back before they start.
void jobs() {
  const auto alone = computed_alone();
  ThreadPool& pool = ThreadPool::shared();
  pool.set_threads(3);
  const std::vector<const Backend*> backends = available();
  run_threads(3, [&](int thread) {
    const size_t kinds = backends.size() * cases().size(), count = 3 * kinds;
    Countdown ended(static_cast<int>(count));
    std::vector<std::unique_ptr<CallJob>> queued;
    for (size_t i = 0; i < count; ++i) {
      const size_t kind = (i + size_t(thread)) % kinds;
      queued.push_back(std::make_unique<CallJob>(*backends[kind / cases().size()],
                                                 cases()[kind % cases().size()], ended));
      require(pool.submit(queued.back().get()).ok(), "a place in the queue");
    }
    std::vector<bool> withdrawn(count);
    for (size_t i = 0; i < count; i += 4) {
      withdrawn[i] = pool.withdraw(queued[i].get());
      if (withdrawn[i]) ended.arrive();
    }
    ended.wait();
    for (size_t i = 0; i < count; ++i) {
      const size_t kind = (i + size_t(thread)) % kinds;
      require(
          withdrawn[i] || queued[i]->results == alone[kind / cases().size()][kind % cases().size()],
          "the bits of a single thread");
    }
  });
}

/// A full queue says so, and loses nothing.
void full_queue() {
  struct Waiting final : Job {
    std::mutex& gate;
    Countdown& ended;
    Waiting(std::mutex& gate, Countdown& ended) : gate(gate), ended(ended) {}
    void run() override {
      { const std::lock_guard<std::mutex> lock(gate); }
      ended.arrive();
    }
  };
  ThreadPool& pool = ThreadPool::shared();
  pool.set_threads(1);
  std::mutex gate;
  const int most = static_cast<int>(ThreadPool::kMaxQueuedJobs);
  Countdown ended(most);
  std::vector<std::unique_ptr<Waiting>> waiting;
  std::unique_lock<std::mutex> closed(gate);
  int accepted = 0;
  Status status;
  while (accepted < 2 * most) {
    waiting.push_back(std::make_unique<Waiting>(gate, ended));
    status = pool.submit(waiting.back().get());
    if (!status.ok()) break;
    ++accepted;
  }
  require(status.code == StatusCode::queue_full, "a full queue");
  require(accepted == most || accepted == most + 1, "one may be running");
  if (accepted > most) require(pool.withdraw(waiting[size_t(most)].get()), "the last one waits");
  closed.unlock();
  ended.wait();
}

// --------------------------------------------------------------------------------- planted races

/// Tasks that count without a lock. The pool orders a region before what follows it, but not its
/// tasks among themselves.
void planted_in_a_task() {
  struct Counting final : ParallelWork {
    int counter = 0;
    void work(TaskCursor& cursor) override {
      for (size_t task; cursor.next(task);) {
        ++counter;
        std::this_thread::sleep_for(std::chrono::microseconds(200));
      }
    }
  };
  ThreadPool::shared().set_threads(4);
  Counting work;
  ThreadPool::shared().run(200, true, CancelToken(), work);
  std::printf("counted %d\n", work.counter);
}

/// Two calls that write to the same results: the sanitizer has to see what kernels store.
void planted_in_results(const char* name) {
  ThreadPool::shared().set_threads(1);
  const std::vector<const Backend*> backends = available();
  const auto backend = std::find_if(backends.begin(), backends.end(), [&](const Backend* b) {
    return std::strcmp(b->name, name) == 0;
  });
  require(backend != backends.end(), "a backend that runs here");
  Results results(cases()[0]);
  std::atomic<int> ready{0};
  run_threads(2, [&](int) {
    for (++ready; ready < 2;) std::this_thread::yield();
    compute(**backend, cases()[0], results);
  });
}

int run(const std::string& scenario, const char* backend) {
  if (scenario == "list") {
    for (const Backend* const b : available()) std::printf("%s\n", b->name);
    return 0;
  }
  if (scenario == "calls-and-resizes") return calls_and_resizes(), 0;
  if (scenario == "leaving-and-returning") return leaving_and_returning(), 0;
  if (scenario == "cancellation") return cancellation(), 0;
  if (scenario == "jobs") return jobs(), 0;
  if (scenario == "full-queue") return full_queue(), 0;
  if (scenario == "planted-in-a-task") return planted_in_a_task(), 0;
  if (scenario == "planted-in-results") return planted_in_results(backend), 0;
  std::fprintf(stderr, "no scenario %s\n", scenario.c_str());
  return 2;
}

}  // namespace
}  // namespace sdpa

int main(int count, char** arguments) {
  if (count < 2) return 2;
  alarm(300);  // a deadlock is a failure, not a wait
  return sdpa::run(arguments[1], count > 2 ? arguments[2] : "");
}

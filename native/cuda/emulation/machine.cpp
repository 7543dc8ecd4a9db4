#include "cuda/emulation/machine.h"

#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "cuda/emulation/fiber.h"

namespace sdpa::cuda::emulation {

void fail(const char* what) {
  std::fprintf(stderr, "CUDA emulation: %s\n", what);
  std::abort();
}

namespace {

constexpr unsigned char kPoison = 0xff;  // NaN as float32, float16 and bfloat16
/// Large and finite: kernels that leave NaN to others would hide that they do not wait.
constexpr unsigned char kFinitePoison = 0x5a;

struct Copy {
  void* to;
  const void* from;
  size_t bytes;
  bool valid;
};

enum class State { runnable, in_warp, in_group, in_block, in_consumers, in_turn, at_barrier, done };

struct Thread {
  Fiber fiber;
  State state = State::done;
  Place place;
  const uint64_t* barrier = nullptr;  // that this thread waits at
  unsigned turn = 0;                  // that it waits for
  std::vector<Copy> copies;           // not yet delivered, oldest first
  std::vector<size_t> commits;        // how many of them each group closes with
};

constexpr unsigned kGroup = 128;

/// Threads that meet: a warp or a warpgroup.
struct Meeting {
  Complete complete = nullptr;
  unsigned arrived = 0;
  void* operands[kGroup];
};

constexpr unsigned kTurns = 4;

/// A barrier for a warpgroup that waits and one that does not.
struct Turn {
  unsigned waiting = 0, passed = 0;
};

struct Group {
  Meeting meeting;
  std::vector<std::function<void()>> issued;  // not yet closed
  std::deque<std::vector<std::function<void()>>> closed;
};

/// A barrier as it lies in shared memory. The signs allow for bytes that arrive before their
/// expectation.
struct BarrierState {
  uint16_t arrivals;  // of a phase
  uint16_t missing;
  int32_t bytes_and_phase;  // 2 * bytes missing + phase

  int32_t bytes() const { return bytes_and_phase >> 1; }
  unsigned phase() const { return unsigned(bytes_and_phase & 1); }
  void add_bytes(int32_t n) { bytes_and_phase += 2 * n; }
};

struct Delivery {
  void* to;
  unsigned bytes;
  uint64_t* barrier;
  std::function<void()> copy;
};

/// One host thread's GPU. Its fibers' stacks are kept for the next grid.
struct Machine {
  std::vector<std::unique_ptr<Thread>> threads;
  std::vector<Meeting> warps;
  std::vector<Group> groups;
  Turn turns[kTurns];
  std::vector<Delivery> deliveries;
  std::minstd_rand random;
  Fiber host;
  unsigned count = 0, current = 0, in_block = 0, in_consumers = 0;
  unsigned favoured = 0;  // the first thread of the warpgroup that runs whenever it can
  bool vote = false, result = false;
  int capability = 0;
  void (*kernel)(const void*) = nullptr;
  const void* arguments = nullptr;

  Thread& self() { return *threads[current]; }
  Group& group() { return groups[current / kGroup]; }

  void switch_to(unsigned next) {
    Thread& from = self();
    current = next;
    Fiber::change(from.fiber, threads[next]->fiber);
  }

  /// Goes on with another thread that can run: one of this warp if there is one. One warpgroup gets
  /// as far ahead as it can: who relies on others must wait for them.
  void pass_on() {
    const unsigned warp = current / kLanes * kLanes;
    for (unsigned i = 1; i < kLanes; ++i) {
      const unsigned next = warp + (current + i) % kLanes;
      if (threads[next]->state == State::runnable) return switch_to(next);
    }
    for (unsigned i = 0; i < count; ++i) {
      const unsigned next = (favoured + i) % count;
      if (threads[next]->state == State::runnable) return switch_to(next);
    }
    if (!deliveries.empty()) {
      deliver();
      return pass_on();
    }
    if (self().state != State::done) fail("threads wait for others that never come");
    for (unsigned i = 0; i < count; ++i) {
      if (threads[i]->state != State::done) fail("a thread has left while others wait for it");
    }
    Fiber::change(self().fiber, host);
  }

  /// Lets a barrier's phase end if nothing is missing.
  void update(uint64_t* barrier) {
    BarrierState state;
    std::memcpy(&state, barrier, sizeof state);
    if (state.missing != 0 || state.bytes() != 0) return;
    state.missing = state.arrivals;
    state.bytes_and_phase ^= 1;
    std::memcpy(barrier, &state, sizeof state);
    for (unsigned i = 0; i < count; ++i) {
      Thread& t = *threads[i];
      if (t.state == State::at_barrier && t.barrier == barrier) t.state = State::runnable;
    }
  }

  void end_turn(unsigned number) {
    Turn& turn = turns[number];
    if (turn.waiting < kGroup || turn.passed < kGroup) return;
    turn = {};
    for (unsigned i = 0; i < count; ++i) {
      Thread& t = *threads[i];
      if (t.state == State::in_turn && t.turn == number) t.state = State::runnable;
    }
  }

  /// One of the copies that are under way: who waits for another must not rely on an order.
  void deliver() {
    const auto chosen = deliveries.begin() + ptrdiff_t(random() % deliveries.size());
    const Delivery d = std::move(*chosen);
    deliveries.erase(chosen);
    d.copy();
    BarrierState state;
    std::memcpy(&state, d.barrier, sizeof state);
    state.add_bytes(-int32_t(d.bytes));
    std::memcpy(d.barrier, &state, sizeof state);
    update(d.barrier);
  }

  /// Meets `size` threads from `first` on, the caller among them.
  void meet(Meeting& meeting, unsigned first, unsigned size, State state, Complete complete,
            void* operands) {
    if (meeting.arrived == 0) {
      meeting.complete = complete;
    } else if (meeting.complete != complete) {
      fail("threads that should meet are in different operations");
    }
    meeting.operands[current - first] = operands;
    if (++meeting.arrived < size) {
      self().state = state;
      return pass_on();
    }
    complete(meeting.operands);
    meeting.arrived = 0;
    for (unsigned i = first; i < first + size; ++i) threads[i]->state = State::runnable;
  }
};

Fault fault_of_environment() {
  const char* const name = std::getenv("SDPA_CUDA_FAULT");
  if (!name) return Fault::none;
  const char* const names[] = {"fragment", "shuffle", "exponential", "copy", "barrier"};
  for (int i = 0; i < 5; ++i) {
    if (std::strcmp(name, names[i]) == 0) return Fault(i + 1);
  }
  fail("SDPA_CUDA_FAULT names no fault");
}

Machine& machine() {
  thread_local Machine instance;
  return instance;
}

void thread_main() {
  Fiber::entered(nullptr);
  Machine& m = machine();
  m.kernel(m.arguments);
  Thread& self = m.self();
  if (!self.copies.empty()) fail("a thread ends before its asynchronous copies");
  if (!m.group().closed.empty()) fail("a thread ends before its products");
  self.state = State::done;
  m.pass_on();
}

}  // namespace

const Place& place() { return machine().self().place; }

Fault planted() {
  static const Fault fault = fault_of_environment();
  return fault;
}

int capability() { return machine().capability; }

void run_grid(Index grid, unsigned threads, size_t shared_bytes, int capability,
              void (*kernel)(const void*), const void* arguments) {
  if (threads % kLanes != 0 || threads == 0 || threads > 1024) fail("a block is of whole warps");
  Machine& m = machine();
  while (m.threads.size() < threads) m.threads.push_back(std::make_unique<Thread>());
  m.warps.assign(threads / kLanes, Meeting{});
  m.groups.assign((threads + kGroup - 1) / kGroup, Group{});
  m.host.adopt_thread();
  m.count = threads;
  m.kernel = kernel;
  m.arguments = arguments;
  m.capability = capability;
  // Exactly as large as asked: AddressSanitizer sees what lies outside.
  void* memory;
  if (posix_memalign(&memory, 1024, shared_bytes + 1) != 0) fail("no memory");
  const std::unique_ptr<unsigned char, decltype(&std::free)> shared(
      static_cast<unsigned char*>(memory), &std::free);
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        std::memset(shared.get(), kPoison, shared_bytes);
        for (unsigned i = 0; i < threads; ++i) {
          Thread& t = *m.threads[i];
          t.place = {i, threads, {x, y, z}, shared.get()};
          t.state = State::runnable;
          t.copies.clear();
          t.commits.clear();
          t.fiber.prepare(thread_main);
        }
        m.current = 0;
        m.in_block = m.in_consumers = 0;
        for (Turn& turn : m.turns) turn = {};
        m.favoured = unsigned(m.random() % m.groups.size()) * kGroup;
        m.vote = false;
        Fiber::change(m.host, m.threads[0]->fiber);
      }
    }
  }
}

void meet_warp(Complete complete, void* operands) {
  Machine& m = machine();
  const unsigned warp = m.current / kLanes;
  m.meet(m.warps[warp], warp * kLanes, kLanes, State::in_warp, complete, operands);
}

void meet_group(Complete complete, void* operands) {
  Machine& m = machine();
  const unsigned first = m.current / kGroup * kGroup;
  if (first + kGroup > m.count) fail("a warpgroup is of four warps");
  m.meet(m.group().meeting, first, kGroup, State::in_group, complete, operands);
}

void take_turn(unsigned number) {
  Machine& m = machine();
  m.turns[number].waiting += 1;
  m.self().turn = number;
  m.self().state = State::in_turn;
  m.end_turn(number);
  if (m.self().state == State::in_turn) m.pass_on();
}

void pass_turn(unsigned number) {
  Machine& m = machine();
  if (++m.turns[number].passed > kGroup) fail("a turn is passed on before it was taken");
  m.end_turn(number);
}

void meet_consumers(unsigned count) {
  Machine& m = machine();
  if (m.current < m.count - count) fail("a thread that is none of the consumers");
  if (++m.in_consumers < count) {
    m.self().state = State::in_consumers;
    return m.pass_on();
  }
  m.in_consumers = 0;
  for (unsigned i = m.count - count; i < m.count; ++i) {
    if (i != m.current && m.threads[i]->state != State::in_consumers) {
      fail("a barrier that not all consumers reach");
    }
    m.threads[i]->state = State::runnable;
  }
}

void issue(std::function<void()> work) { machine().group().issued.push_back(std::move(work)); }

void close_issued() {
  Group& g = machine().group();
  g.closed.push_back(std::move(g.issued));
  g.issued.clear();
}

void run_issued(unsigned groups_left) {
  Group& g = machine().group();
  for (; g.closed.size() > groups_left; g.closed.pop_front()) {
    for (const auto& work : g.closed.front()) work();
  }
}

void init_barrier(uint64_t* barrier, unsigned arrivals) {
  check_aligned(barrier, 8);
  const BarrierState state{uint16_t(arrivals), uint16_t(arrivals), 0};
  std::memcpy(barrier, &state, sizeof state);
}

void arrive(uint64_t* barrier, unsigned bytes) {
  BarrierState state;
  std::memcpy(&state, barrier, sizeof state);
  if (state.missing == 0) fail("more arrivals than a barrier's phase has");
  state.missing -= 1;
  state.add_bytes(int32_t(bytes));
  std::memcpy(barrier, &state, sizeof state);
  machine().update(barrier);
}

void wait_for(uint64_t* barrier, unsigned parity) {
  Machine& m = machine();
  if (planted() == Fault::barrier) return;
  for (;;) {
    BarrierState state;
    std::memcpy(&state, barrier, sizeof state);
    if (state.phase() != parity) return;
    m.self().state = State::at_barrier;
    m.self().barrier = barrier;
    m.pass_on();
  }
}

void deliver_later(void* to, unsigned bytes, uint64_t* barrier, std::function<void()> copy) {
  std::memset(to, kFinitePoison, bytes);
  machine().deliveries.push_back({to, bytes, barrier, std::move(copy)});
}

bool meet_block(bool vote) {
  Machine& m = machine();
  if (planted() == Fault::barrier) return vote;
  m.vote |= vote;
  if (++m.in_block < m.count) {
    m.self().state = State::in_block;
    m.pass_on();
    return m.result;
  }
  m.result = m.vote;
  m.vote = false;
  m.in_block = 0;
  for (unsigned i = 0; i < m.count; ++i) {
    if (i != m.current && m.threads[i]->state != State::in_block) {
      fail("a barrier that not all threads of the block reach");
    }
    m.threads[i]->state = State::runnable;
  }
  return m.result;
}

void copy_async(void* to, const void* from, size_t bytes, bool valid) {
  check_aligned(to, bytes);
  if (valid) check_aligned(from, bytes);
  std::memset(to, kPoison, bytes);
  machine().self().copies.push_back({to, from, bytes, valid});
}

void commit_copies() {
  Thread& t = machine().self();
  size_t before = 0;
  for (const size_t n : t.commits) before += n;
  t.commits.push_back(t.copies.size() - before);
}

void wait_copies(unsigned groups_left) {
  Thread& t = machine().self();
  if (planted() == Fault::copy && groups_left == 0) {  // what is left of the copies never comes
    t.commits.clear();
    t.copies.clear();
  }
  while (t.commits.size() > groups_left) {
    for (size_t i = 0; i < t.commits.front(); ++i) {
      const Copy& c = t.copies[i];
      if (c.valid) {
        std::memcpy(c.to, c.from, c.bytes);
      } else {
        std::memset(c.to, 0, c.bytes);
      }
    }
    t.copies.erase(t.copies.begin(), t.copies.begin() + ptrdiff_t(t.commits.front()));
    t.commits.erase(t.commits.begin());
  }
}

void check_aligned(const void* address, size_t alignment) {
  if (reinterpret_cast<uintptr_t>(address) % alignment != 0) fail("a misaligned access");
}

}  // namespace sdpa::cuda::emulation

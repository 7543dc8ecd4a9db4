// A GPU played by the CPU: runs the kernels' own sources, thread by thread, so that they can be
// tested where there is no GPU. Every thread of a block is a fiber; operations of a whole warp or
// block (barriers, shuffles, matrix products) are where fibers meet.
//
// What it notices ends the process with a message: threads of a warp that meet in different
// operations, or never; misaligned vector accesses. Shared memory starts as NaN, and so does what
// an asynchronous copy has not yet delivered. Reads outside of arrays are AddressSanitizer's to
// find.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <type_traits>

namespace sdpa::cuda::emulation {

constexpr unsigned kLanes = 32;

struct Index {
  unsigned x, y, z;
};

/// What a thread can ask about itself.
struct Place {
  unsigned thread, threads;  // index in the block, and how many it has
  Index block;
  unsigned char* shared;  // the block's dynamic shared memory
};

const Place& place();

/// Runs `kernel(arguments)` for every thread of a grid, block by block, on the calling host thread.
/// `capability` is 10 * major + minor of the GPU to play.
void run_grid(Index grid, unsigned threads, size_t shared_bytes, int capability,
              void (*kernel)(const void*), const void* arguments);

/// The compute capability that the running grid plays.
int capability();

/// Meets the other lanes of the warp: the last to arrive runs `complete` on the operands of all.
using Complete = void (*)(void* const* operands);
void meet_warp(Complete complete, void* operands);

/// The same for a warpgroup, threads 128 * n on.
void meet_group(Complete complete, void* operands);

/// Meets the last `count` threads of the block.
void meet_consumers(unsigned count);

/// Lets the threads of a warpgroup wait in turn `number` until as many have passed it on.
void take_turn(unsigned number);
void pass_turn(unsigned number);

/// Work of a warpgroup, begun but not awaited: closed in groups, run by those who wait for them.
/// The last of a warpgroup calls these, from `complete`.
void issue(std::function<void()> work);
void close_issued();
void run_issued(unsigned groups_left);

/// Barriers with a transaction count (mbarrier). `bytes` are those that an arrival expects.
void init_barrier(uint64_t* barrier, unsigned arrivals);
void arrive(uint64_t* barrier, unsigned bytes);
void wait_for(uint64_t* barrier, unsigned parity);
/// Runs `copy`, which brings `bytes` to `to`, when all threads wait; then the barrier gets them.
void deliver_later(void* to, unsigned bytes, uint64_t* barrier, std::function<void()> copy);

/// Ends the process.
[[noreturn]] void fail(const char* what);

/// Meets all threads of the block; returns whether any of them came with `vote`.
bool meet_block(bool vote);

/// Asynchronous copies of the calling thread: delivered by the wait that asks for their group.
void copy_async(void* to, const void* from, size_t bytes, bool valid);
void commit_copies();
void wait_copies(unsigned groups_left);

/// What the environment's SDPA_CUDA_FAULT plants, to prove that tests can fail: `fragment` (a
/// matrix product that takes two registers for each other), `shuffle` (one lane gets another's
/// value), `exponential` (a relative error of 2^-15), `copy` (asynchronous copies are not waited
/// for), `barrier` (blocks do not meet).
enum class Fault { none, fragment, shuffle, exponential, copy, barrier };
Fault planted();

/// Ends the process unless `address` is a multiple of `alignment`.
void check_aligned(const void* address, size_t alignment);

}  // namespace sdpa::cuda::emulation

// The package's own bounded thread pool: the only threads that CPU kernels and asynchronous calls
// use. One pool serves the whole process, every worker_thread included; libuv's is never touched.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstddef>
#include <mutex>

#include "core/backend.h"
#include "core/budget.h"
#include "core/queue.h"

namespace sdpa {

/// Hands out the task numbers 0 to count - 1, each once, to all threads of a region.
class TaskCursor {
 public:
  TaskCursor(size_t count, const CancelToken& cancel) : count_(count), cancel_(cancel) {}
  /// Takes the next task; false when none is left or the call was cancelled.
  bool next(size_t& task) {
    if (cancel_.cancelled()) return false;
    task = next_.fetch_add(1, std::memory_order_relaxed);
    return task < count_;
  }
  bool drained() const { return next_.load(std::memory_order_relaxed) >= count_; }

 private:
  std::atomic<size_t> next_{0};
  const size_t count_;
  const CancelToken& cancel_;
};

/// Work that several threads do together. Each thread that takes part calls work() once, which
/// makes its scratch memory and then takes tasks until there are none.
struct ParallelWork {
  virtual ~ParallelWork() = default;
  /// Never throws.
  virtual void work(TaskCursor& cursor) = 0;
};

/// An asynchronous call waiting for a thread of the pool.
struct Job {
  virtual ~Job() = default;
  /// Never throws; the job may be destroyed from inside run().
  virtual void run() = 0;

  Job* next_job = nullptr;  // the pool's
};

/// Invariant: nothing here needs memory but the creation of a thread, and a call goes on without;
/// and the first look at the pool of a GPU.
class ThreadPool {
 public:
  static constexpr int kMaxThreads = 256;
  static constexpr size_t kMaxQueuedJobs = 4096;

  /// Invariant: never destroyed, since its threads may outlive every static object.
  static ThreadPool& shared();

  /// The pool whose threads feed a GPU and wait for it: so many calls overlap on it.
  static constexpr int kThreadsPerDevice = 4;
  static ThreadPool& of_device(int device);

  void set_threads(int threads);
  /// How many threads may work at once; 0 if nobody has said so yet, which counts as 1.
  int threads();

  /// Runs `count` tasks on the calling thread and, with `parallel`, on idle threads of the pool;
  /// returns when all have ended. If no thread can be created, the caller does it all. A thread
  /// whose work() takes no task (short of memory) leaves them to others: `out_of_memory` means that
  /// no task was done at all.
  Status run(size_t count, bool parallel, const CancelToken& cancel, ParallelWork& work);

  /// Queues a job; it is run by one thread, whose regions others then join.
  Status submit(Job* job);

  /// Takes a job back that has not started; false if it has.
  bool withdraw(Job* job);

 private:
  struct Region {
    ParallelWork& work;
    TaskCursor& cursor;
    Budget* budget;   // of its call
    int seats;        // how many more helpers may join
    int helpers = 0;  // how many are in it now
    Region* next = nullptr;
  };

  ThreadPool() = default;
  int most_workers() const { return threads_ > 1 ? threads_ : 1; }
  void run_with_helpers(int seats, TaskCursor& cursor, ParallelWork& work);
  void ensure_workers(int wanted);
  void worker_loop();
  Region* joinable_region();

  std::mutex mutex_;
  std::condition_variable work_available_, helper_left_;
  Queue<Region, &Region::next> regions_;
  Queue<Job, &Job::next_job> jobs_;
  size_t queued_ = 0;  // jobs
  int threads_ = 0, workers_ = 0, idle_ = 0;
};

}  // namespace sdpa

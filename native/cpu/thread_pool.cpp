// The package's own bounded thread pool.
#include "cpu/thread_pool.h"

#include <algorithm>
#include <exception>
#include <thread>
#include <vector>

namespace sdpa {

ThreadPool& ThreadPool::shared() {
  static ThreadPool* const pool = new ThreadPool;
  return *pool;
}

ThreadPool& ThreadPool::of_device(int device) {
  static std::mutex mutex;
  static std::vector<ThreadPool*>* const pools = new std::vector<ThreadPool*>;
  const std::lock_guard<std::mutex> lock(mutex);
  while (pools->size() <= size_t(device)) {
    pools->push_back(new ThreadPool);
    pools->back()->threads_ = kThreadsPerDevice;
  }
  return *(*pools)[size_t(device)];
}

void ThreadPool::set_threads(int threads) {
  const std::lock_guard<std::mutex> lock(mutex_);
  threads_ = std::clamp(threads, 1, kMaxThreads);
  work_available_.notify_all();  // surplus workers leave
}

int ThreadPool::threads() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return threads_;
}

Status ThreadPool::run(size_t count, bool parallel, const CancelToken& cancel, ParallelWork& work) {
  TaskCursor cursor(count, cancel);
  const int seats = parallel ? int(std::min<size_t>(threads(), count)) - 1 : 0;
  if (seats > 0) {
    run_with_helpers(seats, cursor, work);
  } else {
    work.work(cursor);
  }
  if (cursor.drained()) return {};
  if (cancel.cancelled()) return {StatusCode::aborted, "the call was aborted"};
  return {StatusCode::out_of_memory, "no memory for the working buffers"};
}

void ThreadPool::run_with_helpers(int seats, TaskCursor& cursor, ParallelWork& work) {
  Region region{work, cursor, Budget::current(), seats};
  {
    const std::lock_guard<std::mutex> lock(mutex_);
    regions_.push(&region);
    ensure_workers(seats);
  }
  work.work(cursor);
  std::unique_lock<std::mutex> lock(mutex_);
  regions_.remove(&region);
  helper_left_.wait(lock, [&] { return region.helpers == 0; });
}

Status ThreadPool::submit(Job* job) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (queued_ >= kMaxQueuedJobs) {
    return {StatusCode::queue_full, "too many asynchronous calls are waiting"};
  }
  ensure_workers(1);
  if (workers_ == 0) return {StatusCode::out_of_memory, "no thread could be created"};
  jobs_.push(job);
  ++queued_;
  return {};
}

bool ThreadPool::withdraw(Job* job) {
  const std::lock_guard<std::mutex> lock(mutex_);
  if (!jobs_.remove(job)) return false;
  --queued_;
  return true;
}

/// Wakes `wanted` threads, creating those that are missing. The caller holds the mutex.
void ThreadPool::ensure_workers(int wanted) {
  const int missing = std::min(wanted - idle_ + int(queued_), most_workers() - workers_);
  for (int i = 0; i < missing; ++i) {
    try {
      std::thread([this] { worker_loop(); }).detach();  // a local type exports no symbols
    } catch (const std::exception&) {
      break;  // no more threads, or no memory for one: go on with those that there are
    }
    ++workers_;
  }
  if (wanted > 1) {
    work_available_.notify_all();
  } else {
    work_available_.notify_one();
  }
}

ThreadPool::Region* ThreadPool::joinable_region() {
  for (Region* region = regions_.first(); region; region = region->next) {
    if (region->seats > 0 && !region->cursor.drained()) return region;
  }
  return nullptr;
}

void ThreadPool::worker_loop() {
  std::unique_lock<std::mutex> lock(mutex_);
  while (workers_ <= most_workers()) {
    if (Job* const job = jobs_.first()) {
      jobs_.remove(job);
      --queued_;
      lock.unlock();
      job->run();
      lock.lock();
    } else if (Region* const region = joinable_region()) {
      --region->seats;
      ++region->helpers;
      lock.unlock();
      {
        const BudgetScope scope(region->budget);
        region->work.work(region->cursor);
      }
      lock.lock();
      if (--region->helpers == 0) helper_left_.notify_all();
    } else {
      ++idle_;
      work_available_.wait(lock);
      --idle_;
    }
  }
  --workers_;
}

}  // namespace sdpa

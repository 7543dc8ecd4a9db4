// How much memory a call may take, and blocks of memory that count against it.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <new>

namespace sdpa {

/// What is left to one call, on all its threads. Invariant: all that grows with a problem's sizes
/// is a Block, but for tables of a few words for each entry of the batch.
class Budget {
 public:
  explicit Budget(uint64_t bytes) : left_(bytes) {}

  bool take(size_t bytes) {
    uint64_t left = left_.load(std::memory_order_relaxed);
    do {
      if (bytes > left) {
        refused_.store(true, std::memory_order_relaxed);
        return false;
      }
    } while (!left_.compare_exchange_weak(left, left - bytes, std::memory_order_relaxed));
    return true;
  }
  void give_back(size_t bytes) { left_.fetch_add(bytes, std::memory_order_relaxed); }

  /// Whether anything was asked for that there was not.
  bool refused() const { return refused_.load(std::memory_order_relaxed); }

  /// That of the call for which this thread works; null where there is no limit.
  static Budget*& current() {
    static thread_local Budget* budget = nullptr;
    return budget;
  }

 private:
  std::atomic<uint64_t> left_;
  std::atomic<bool> refused_{false};
};

/// Lets this thread work for a call.
class BudgetScope {
 public:
  explicit BudgetScope(Budget* budget) : before_(Budget::current()) { Budget::current() = budget; }
  ~BudgetScope() { Budget::current() = before_; }
  BudgetScope(const BudgetScope&) = delete;

 private:
  Budget* const before_;
};

/// Memory for numbers, not initialised.
template <typename T>
class Block {
 public:
  Block() = default;
  Block(const Block&) = delete;
  ~Block() { release(); }

  /// False if memory is short, or the call's limit is reached.
  bool allocate(size_t count) {
    release();
    if (count > SIZE_MAX / sizeof(T)) return false;
    bytes_ = count * sizeof(T);
    budget_ = Budget::current();
    if (budget_ && !budget_->take(bytes_)) return false;
    data_ = static_cast<T*>(::operator new(bytes_, std::nothrow));
    if (!data_ && budget_) budget_->give_back(bytes_);
    return data_ != nullptr;
  }
  T* get() const { return data_; }

 private:
  void release() {
    if (!data_) return;
    ::operator delete(data_);
    data_ = nullptr;
    if (budget_) budget_->give_back(bytes_);
  }

  T* data_ = nullptr;
  size_t bytes_ = 0;
  Budget* budget_ = nullptr;
};

}  // namespace sdpa

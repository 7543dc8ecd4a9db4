// Stacks to run on by turns. On x86-64 a change costs a few nanoseconds; elsewhere ucontext does
// it, through the kernel. AddressSanitizer is told of each change. Included by machine.cpp alone.
#pragma once

#include <pthread.h>
#include <sys/mman.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(__x86_64__)
// Keeps the registers that a call must keep on the old stack, and takes them from the new one.
extern "C" void sdpa_change_stack(void** from, void* to);
asm(R"(
.text
.local sdpa_change_stack
.type sdpa_change_stack, @function
sdpa_change_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
)");
#else
#include <ucontext.h>
#endif

namespace sdpa::cuda::emulation {

class Fiber {
 public:
  Fiber() = default;
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;
  ~Fiber() {
    if (owned_) munmap(bottom_, size_);
  }

  /// Makes this the fiber of the calling thread itself.
  void adopt_thread() {
    pthread_attr_t attributes;
    void* bottom;
    if (pthread_getattr_np(pthread_self(), &attributes) != 0) std::abort();
    pthread_attr_getstack(&attributes, &bottom, &size_);
    pthread_attr_destroy(&attributes);
    bottom_ = static_cast<char*>(bottom);
  }

  /// Makes the next change to this fiber start `entry`, which must call `entered` and never return.
  void prepare(void (*entry)()) {
    if (!owned_) {
      size_ = kStackBytes;
      void* const memory = mmap(nullptr, size_, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (memory == MAP_FAILED) std::abort();
      bottom_ = static_cast<char*>(memory);
      owned_ = true;
    }
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(bottom_, size_);  // frames that were left, not returned from
#endif
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(bottom_ + size_);
    *--top = nullptr;                              // where a return would go
    *--top = reinterpret_cast<void*>(entry);       // where the change goes
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers
    top_ = top;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = bottom_;
    context_.uc_stack.ss_size = size_;
    makecontext(&context_, entry, 0);
#endif
  }

  static void change(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake_stack_, to.bottom_, to.size_);
#endif
#if defined(__x86_64__)
    sdpa_change_stack(&from.top_, to.top_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
    entered(&from);
  }

  /// Says that a change has arrived: in the fiber that it came back to, or (null) in a new one.
  static void entered([[maybe_unused]] Fiber* self) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(self ? self->fake_stack_ : nullptr, nullptr, nullptr);
#endif
  }

 private:
  static constexpr size_t kStackBytes = size_t{1} << 18;

  char* bottom_ = nullptr;
  size_t size_ = 0;
  bool owned_ = false;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack_ = nullptr;
#endif
#if defined(__x86_64__)
  void* top_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace sdpa::cuda::emulation

// Faults of the machine on demand, for a process that preloads this library (LD_PRELOAD): memory
// that the addon asks for and does not get, threads that cannot be made, and AMX refused by the
// system. The file that SDPA_FAULTS names is the control: test/programs/hostile/faults.mjs writes
// and reads it.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <linux/filter.h>
#include <linux/seccomp.h>
#include <malloc.h>
#include <pthread.h>
#include <stddef.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <unistd.h>

struct control {
  int64_t begin, end;      // where the addon is mapped: nobody else's calls are touched
  int64_t left;            // how many allocations still succeed; below 0 all do
  int64_t failures;        // how many fail then
  int64_t allocations;     // counted
  int64_t bytes, most;     // in use now, and at most
  int64_t refuse_threads;  // 1: none can be made
  int64_t threads;         // made
};

static struct control off = {0, 0, -1, 0, 0, 0, 0, 0, 0};
static struct control* control = &off;
static int (*real_pthread_create)(pthread_t*, const pthread_attr_t*, void* (*)(void*), void*);

extern void* __libc_malloc(size_t);
extern void __libc_free(void*);

static int is_addon(const void* caller) {
  return (int64_t)caller >= control->begin && (int64_t)caller < control->end;
}

void* malloc(size_t size) {
  if (!is_addon(__builtin_return_address(0))) return __libc_malloc(size);
  __atomic_add_fetch(&control->allocations, 1, __ATOMIC_RELAXED);
  if (control->left >= 0 && __atomic_fetch_sub(&control->left, 1, __ATOMIC_RELAXED) <= 0) {
    const int fails = __atomic_fetch_sub(&control->failures, 1, __ATOMIC_RELAXED) > 0;
    control->left = 0;  // so that the next one counts as well
    if (fails) {
      errno = ENOMEM;
      return NULL;
    }
    control->left = -1;
  }
  void* const memory = __libc_malloc(size);
  const int64_t now = __atomic_add_fetch(&control->bytes, malloc_usable_size(memory), __ATOMIC_RELAXED);
  if (now > control->most) control->most = now;
  return memory;
}

void free(void* memory) {
  if (memory && is_addon(__builtin_return_address(0))) {
    __atomic_sub_fetch(&control->bytes, malloc_usable_size(memory), __ATOMIC_RELAXED);
  }
  __libc_free(memory);
}

int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, void* (*start)(void*),
                   void* argument) {
  if (!real_pthread_create) real_pthread_create = dlsym(RTLD_NEXT, "pthread_create");
  if (is_addon(__builtin_return_address(0))) {
    if (control->refuse_threads) return EAGAIN;
    __atomic_add_fetch(&control->threads, 1, __ATOMIC_RELAXED);
  }
  return real_pthread_create(thread, attributes, start, argument);
}

#if defined(__x86_64__)
// The system itself refuses arch_prctl(ARCH_REQ_XCOMP_PERM), as the filter of a container may.
static void refuse_amx(void) {
  struct sock_filter filter[] = {
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, nr)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, SYS_arch_prctl, 0, 3),
      BPF_STMT(BPF_LD | BPF_W | BPF_ABS, offsetof(struct seccomp_data, args)),
      BPF_JUMP(BPF_JMP | BPF_JEQ | BPF_K, 0x1023, 0, 1),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ERRNO | EPERM),
      BPF_STMT(BPF_RET | BPF_K, SECCOMP_RET_ALLOW),
  };
  struct sock_fprog program = {sizeof filter / sizeof *filter, filter};
  if (prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0 ||
      prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, &program) != 0) {
    _exit(99);
  }
}
#endif

__attribute__((constructor)) static void begin(void) {
  const char* const path = getenv("SDPA_FAULTS");
  if (path) {
    const int file = open(path, O_RDWR);
    void* const shared =
        mmap(NULL, sizeof *control, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    if (shared == MAP_FAILED) _exit(98);
    close(file);
    control = shared;
  }
#if defined(__x86_64__)
  if (getenv("SDPA_REFUSE_AMX")) refuse_amx();
#endif
}

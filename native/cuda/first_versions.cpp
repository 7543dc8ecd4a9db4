// What the static CUDA runtime asks of glibc, by the first version of each function, so that a
// plugin linked on a new Linux loads on glibc 2.28: glibc 2.34 gave all of these a second one as it
// moved them from other libraries to libc. A jump needs no signature. `npm run build:cuda` and `npm
// run prebuild` fail where one is missing. x86-64 alone, as the plugin.

#define FIRST(name, version)                                                              \
  __asm__(".symver first_" #name "," #name "@" version                                    \
          "\n"                                                                            \
          ".text\n.globl " #name "\n.hidden " #name "\n.type " #name ",@function\n" #name \
          ": jmp *first_" #name "@GOTPCREL(%rip)\n");

FIRST(dlclose, "GLIBC_2.2.5")
FIRST(dlvsym, "GLIBC_2.2.5")
FIRST(pthread_attr_getstack, "GLIBC_2.2.5")
FIRST(pthread_condattr_setpshared, "GLIBC_2.2.5")
FIRST(pthread_getattr_np, "GLIBC_2.2.5")
FIRST(pthread_getspecific, "GLIBC_2.2.5")
FIRST(pthread_join, "GLIBC_2.2.5")
FIRST(pthread_key_create, "GLIBC_2.2.5")
FIRST(pthread_key_delete, "GLIBC_2.2.5")
FIRST(pthread_kill, "GLIBC_2.2.5")
FIRST(pthread_mutex_trylock, "GLIBC_2.2.5")
FIRST(pthread_mutexattr_destroy, "GLIBC_2.2.5")
FIRST(pthread_mutexattr_init, "GLIBC_2.2.5")
FIRST(pthread_mutexattr_setpshared, "GLIBC_2.2.5")
FIRST(pthread_mutexattr_settype, "GLIBC_2.2.5")
FIRST(pthread_rwlock_destroy, "GLIBC_2.2.5")
FIRST(pthread_rwlock_init, "GLIBC_2.2.5")
FIRST(pthread_rwlock_rdlock, "GLIBC_2.2.5")
FIRST(pthread_rwlock_timedrdlock, "GLIBC_2.2.5")
FIRST(pthread_rwlock_timedwrlock, "GLIBC_2.2.5")
FIRST(pthread_rwlock_tryrdlock, "GLIBC_2.2.5")
FIRST(pthread_rwlock_trywrlock, "GLIBC_2.2.5")
FIRST(pthread_rwlock_unlock, "GLIBC_2.2.5")
FIRST(pthread_rwlock_wrlock, "GLIBC_2.2.5")
FIRST(pthread_rwlockattr_destroy, "GLIBC_2.2.5")
FIRST(pthread_rwlockattr_init, "GLIBC_2.2.5")
FIRST(pthread_rwlockattr_setpshared, "GLIBC_2.2.5")
FIRST(pthread_setspecific, "GLIBC_2.2.5")
FIRST(pthread_spin_destroy, "GLIBC_2.2.5")
FIRST(pthread_spin_init, "GLIBC_2.2.5")
FIRST(pthread_spin_lock, "GLIBC_2.2.5")
FIRST(pthread_spin_trylock, "GLIBC_2.2.5")
FIRST(pthread_spin_unlock, "GLIBC_2.2.5")
FIRST(sem_destroy, "GLIBC_2.2.5")
FIRST(sem_init, "GLIBC_2.2.5")
FIRST(sem_post, "GLIBC_2.2.5")
FIRST(sem_timedwait, "GLIBC_2.2.5")
FIRST(sem_trywait, "GLIBC_2.2.5")
FIRST(sem_wait, "GLIBC_2.2.5")
FIRST(shm_open, "GLIBC_2.2.5")
FIRST(shm_unlink, "GLIBC_2.2.5")
FIRST(dlmopen, "GLIBC_2.3.4")

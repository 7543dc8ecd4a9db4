// What the addon's own static copy of libstdc++ and libgcc gets instead of the machine's, so that a
// binary linked on a new Linux loads on glibc 2.28. All of it stays hidden in the addon, and
// `npm run prebuild` fails on a binary that needs a newer glibc.
#if defined(__linux__)

#include <dlfcn.h>
#include <link.h>
#include <pthread.h>

#include <cstdint>
#include <cstdlib>

#define SDPA_HIDDEN __attribute__((visibility("hidden")))

#if defined(__GLIBCXX__)
// The usual one prints an exception's name, and brings 50 KB of demangler to do so.
namespace __gnu_cxx {
SDPA_HIDDEN void __verbose_terminate_handler() { std::abort(); }
}  // namespace __gnu_cxx
#endif

#if defined(__GLIBC__) && (defined(__x86_64__) || defined(__aarch64__))
#if __GLIBC_PREREQ(2, 35)

// The first version of a function: glibc 2.34 gave those of threads and of the loader a second one
// as it moved them from libpthread and libdl to libc. musl, for which the same objects are linked,
// has no versions.
#if defined(SDPA_FOR_MUSL)
#define SDPA_USE_FIRST(name, function)
#elif defined(__x86_64__)
#define SDPA_USE_FIRST(name, function) __asm__(".symver " #name "," #function "@GLIBC_2.2.5")
#else
#define SDPA_USE_FIRST(name, function) __asm__(".symver " #name "," #function "@GLIBC_2.17")
#endif

extern "C" {

#if !defined(SDPA_FOR_MUSL)
using Start = void* (*)(void*);
int first_pthread_create(pthread_t*, const pthread_attr_t*, Start, void*);
SDPA_USE_FIRST(first_pthread_create, pthread_create);
SDPA_HIDDEN int pthread_create(pthread_t* thread, const pthread_attr_t* attributes, Start start,
                               void* argument) noexcept {
  return first_pthread_create(thread, attributes, start, argument);
}

int first_pthread_detach(pthread_t);
SDPA_USE_FIRST(first_pthread_detach, pthread_detach);
SDPA_HIDDEN int pthread_detach(pthread_t thread) noexcept { return first_pthread_detach(thread); }

int first_pthread_once(pthread_once_t*, void (*)());
SDPA_USE_FIRST(first_pthread_once, pthread_once);
SDPA_HIDDEN int pthread_once(pthread_once_t* once, void (*routine)()) {
  return first_pthread_once(once, routine);
}

void* first_dlopen(const char*, int);
SDPA_USE_FIRST(first_dlopen, dlopen);
SDPA_HIDDEN void* dlopen(const char* file, int mode) noexcept { return first_dlopen(file, mode); }

void* first_dlsym(void*, const char*);
SDPA_USE_FIRST(first_dlsym, dlsym);
SDPA_HIDDEN void* dlsym(void* library, const char* name) noexcept {
  return first_dlsym(library, name);
}

char* first_dlerror();
SDPA_USE_FIRST(first_dlerror, dlerror);
SDPA_HIDDEN char* dlerror() noexcept { return first_dlerror(); }
#endif

SDPA_USE_FIRST(pthread_key_create, pthread_key_create);
SDPA_HIDDEN int __pthread_key_create(pthread_key_t* key, void (*destructor)(void*)) noexcept {
  return pthread_key_create(key, destructor);
}

// glibc 2.32: whether reference counts may go without atomic instructions. They may not.
SDPA_HIDDEN char __libc_single_threaded = 0;

}  // extern "C"

namespace {

struct Search {
  uintptr_t address;
  dl_find_object* found;
};

int visit(dl_phdr_info* object, size_t, void* data) {
  const Search& search = *static_cast<Search*>(data);
  bool is_here = false;
  const ElfW(Phdr)* unwinding = nullptr;
  for (int i = 0; i < object->dlpi_phnum; i++) {
    const ElfW(Phdr)& part = object->dlpi_phdr[i];
    const uintptr_t begin = object->dlpi_addr + part.p_vaddr;
    if (part.p_type == PT_GNU_EH_FRAME) unwinding = &part;
    if (part.p_type == PT_LOAD && search.address - begin < part.p_memsz) is_here = true;
  }
  if (!is_here || unwinding == nullptr) return 0;
  search.found->dlfo_eh_frame = reinterpret_cast<void*>(object->dlpi_addr + unwinding->p_vaddr);
  return 1;
}

}  // namespace

// glibc 2.35: the table for unwinding of the loaded object that has an address. libgcc asks for it
// when an exception is thrown, and takes nothing else of the answer.
extern "C" SDPA_HIDDEN int _dl_find_object(void* address, dl_find_object* found) noexcept {
  *found = {};
  Search search = {reinterpret_cast<uintptr_t>(address), found};
  return dl_iterate_phdr(visit, &search) == 1 ? 0 : -1;
}

#endif
#endif
#endif

// The list of backends, best first.
#include "backends.h"

#include "cpu/cpu_backends.h"

namespace sdpa {

const Backend* const kBackends[] = {
#if defined(__x86_64__) || defined(_M_X64)
#if defined(__linux__)
    &kAmxBackend,
#endif
    &kAvx512Backend,
    &kAvx2Backend,
#elif defined(__aarch64__) || defined(_M_ARM64)
    &kNeonBackend,
#endif
    &kPortableBackend,
};
const size_t kBackendCount = sizeof kBackends / sizeof *kBackends;

}  // namespace sdpa

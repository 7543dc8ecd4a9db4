// The list of backends, best first.
#pragma once

#include <cstddef>

#include "core/backend.h"

namespace sdpa {

/// All backends of this build, best first: the order is the policy of "auto".
extern const Backend* const kBackends[];
extern const size_t kBackendCount;

}  // namespace sdpa

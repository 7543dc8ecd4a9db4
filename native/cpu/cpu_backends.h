// The CPU backends, one a source file.
#pragma once

#include "core/backend.h"

namespace sdpa {

extern const Backend kPortableBackend;
extern const Backend kAvx2Backend;    // x86-64 only
extern const Backend kAvx512Backend;  // x86-64 only
extern const Backend kAmxBackend;     // x86-64 only
extern const Backend kNeonBackend;    // aarch64 only

}  // namespace sdpa

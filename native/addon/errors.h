// What native code says of a failure, as a JavaScript error with a code.
#pragma once

#include <napi.h>

#include <cstddef>

#include "core/backend.h"

namespace sdpa {

inline const char* error_code(StatusCode code) {
  switch (code) {
    case StatusCode::aborted:
      return "ERR_SDPA_ABORTED";
    case StatusCode::out_of_memory:
      return "ERR_SDPA_OUT_OF_MEMORY";
    case StatusCode::queue_full:
      return "ERR_SDPA_QUEUE_FULL";
    case StatusCode::unavailable:
      return "ERR_SDPA_BACKEND_UNAVAILABLE";
    case StatusCode::unsupported:
      return "ERR_SDPA_UNSUPPORTED";
    case StatusCode::device_lost:
      return "ERR_SDPA_DEVICE_LOST";
    default:
      return "ERR_SDPA_INTERNAL";
  }
}

/// Asks for no memory but JavaScript's: that may be what is missing.
/// By hand: the checked snprintf of a hardened build is glibc's alone, and musl has none.
inline Napi::Error make_error(Napi::Env env, const Status& status) {
  const bool is_lost = status.code == StatusCode::device_lost;
  const char* const lost = "The GPU has failed, and this process cannot use it any more: ";
  char message[512];
  size_t length = 0;
  for (const char* part : {is_lost ? lost : "", status.message}) {
    while (*part && length + 1 < sizeof message) message[length++] = *part++;
  }
  message[length] = 0;
  Napi::Error error = Napi::Error::New(env, message);
  error.Set("code", error_code(status.code));
  return error;
}

[[noreturn]] inline void fail(Napi::Env env, const char* message) {
  throw make_error(env, {StatusCode::internal, message});
}

}  // namespace sdpa

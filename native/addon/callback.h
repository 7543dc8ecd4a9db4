// Functions of the addon as Node calls them.
#pragma once

#include <napi.h>

#include <new>

#include "addon/errors.h"

namespace sdpa {

/// `values` are exactly as many arguments as the function takes. What it throws, a Status, a
/// Napi::Error or std::bad_alloc, becomes an exception of JavaScript.
using Function = napi_value(Napi::Env env, const napi_value* values);

/// Napi::CallbackInfo would do, but it asks for memory where nothing catches its std::bad_alloc.
template <size_t Count, Function* Body>
napi_value callback(napi_env env, napi_callback_info info) {
  try {
    napi_value values[Count + 1];
    size_t count = Count;
    if (napi_get_cb_info(env, info, &count, values, nullptr, nullptr) != napi_ok ||
        count != Count) {
      fail(env, "wrong number of arguments");
    }
    return Body(env, values);
  } catch (const Napi::Error& error) {
    error.ThrowAsJavaScriptException();
  } catch (const Status& status) {
    make_error(env, status).ThrowAsJavaScriptException();
  } catch (const std::bad_alloc&) {
    make_error(env, {StatusCode::out_of_memory, "no memory for the call"})
        .ThrowAsJavaScriptException();
  }
  return nullptr;
}

template <size_t Count, Function* Body>
void add_function(Napi::Env env, Napi::Object exports, const char* name) {
  napi_value function;
  const napi_status status =
      napi_create_function(env, name, NAPI_AUTO_LENGTH, callback<Count, Body>, nullptr, &function);
  if (status != napi_ok) throw Napi::Error::New(env);
  exports.Set(name, function);
}

}  // namespace sdpa

# What the addon is built from, once for both build systems: binding.gyp includes this file and
# CMakeLists.txt reads the lists out of it. Keep to one quoted string a line.
{
  'variables': {
    'sdpa_sources': [
      'native/backends.cpp',
      'native/static_runtime.cpp',
      'native/addon/addon.cpp',
      'native/cpu/cpu_features.cpp',
      'native/cpu/thread_pool.cpp',
      'native/cpu/sequences.cpp',
      'native/cpu/portable.cpp',
      'native/cpu/avx2.cpp',
      'native/cpu/avx512.cpp',
      'native/cpu/amx.cpp',
      'native/cpu/neon.cpp',
    ],
    'sdpa_defines': [
      'NAPI_VERSION=9',
      'NODE_ADDON_API_CPP_EXCEPTIONS',
      # Else worker.terminate() during a call aborts the process.
      'NODE_API_SWALLOW_UNTHROWABLE_EXCEPTIONS',
      'NODE_API_NO_EXTERNAL_BUFFERS_ALLOWED',
    ],
    'sdpa_compile_flags': [
      '-std=c++17',
      '-Wall',
      '-Wextra',
      '-fexceptions',
      '-fvisibility=hidden',
      '-fvisibility-inlines-hidden',
      '-ffunction-sections',
      '-fdata-sections',
      # A fused multiply-add only where the code asks for one: the same numbers from any compiler.
      '-ffp-contract=off',
    ],
    'sdpa_release_flags': [
      '-O3',
      '-DNDEBUG',
    ],
    # A buffer that is overrun ends the process rather than being of use to whoever overran it.
    'sdpa_hardening_flags_linux': [
      '-fstack-protector-strong',
      '-U_FORTIFY_SOURCE', # some compilers set it themselves
      '-D_FORTIFY_SOURCE=2',
    ],
    'sdpa_link_flags_linux': [
      # Tables of addresses are written once, while the addon loads; no stack is executable.
      '-Wl,-z,relro',
      '-Wl,-z,now',
      '-Wl,-z,noexecstack',
      '-static-libstdc++',
      '-static-libgcc',
      '-Wl,--exclude-libs,ALL',
      # Half of what the static libraries bring is never called.
      '-Wl,--gc-sections',
      # Our threads outlive the last worker that uses them: the code must stay mapped.
      '-Wl,-z,nodelete',
    ],
  },
}

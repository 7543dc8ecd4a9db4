# What the addon is built from, once for both build systems: binding.gyp includes this file and
# CMakeLists.txt reads the lists out of it. Keep to one quoted string a line.
{
  'variables': {
    'sdpa_sources': [
      'native/backends.cpp',
      'native/cuda_loader.cpp',
      'native/static_runtime.cpp',
      'native/addon/addon.cpp',
      'native/addon/device_memory.cpp',
      'native/cpu/cpu_features.cpp',
      'native/cpu/thread_pool.cpp',
      'native/cpu/sequences.cpp',
      'native/cpu/portable.cpp',
      'native/cpu/avx2.cpp',
      'native/cpu/avx512.cpp',
      'native/cpu/amx.cpp',
      'native/cpu/neon.cpp',
    ],
    # The host side of the CUDA plugin; CMake alone builds it.
    'sdpa_cuda_host_sources': [
      'native/cuda/plugin.cpp',
      'native/cuda/device.cpp',
      'native/cuda/lane.cpp',
      'native/cuda/memory_cache.cpp',
      'native/cuda/run.cpp',
    ],
    'sdpa_cuda_kernel_sources': [
      'native/cuda/backward.cu',
      'native/cuda/backward_bfloat16.cu',
      'native/cuda/backward_float16.cu',
      'native/cuda/backward_split.cu',
      'native/cuda/dropout_mask.cu',
      'native/cuda/forward.cu',
      'native/cuda/forward_bfloat16.cu',
      'native/cuda/forward_float16.cu',
      'native/cuda/forward_split.cu',
    ],
    'sdpa_cuda_hopper_sources': [
      'native/cuda/hopper_backward.cu',
      'native/cuda/hopper_forward.cu',
      'native/cuda/hopper_terms.cu',
    ],
    # What plays a GPU in the emulated plugin, which only tests use.
    'sdpa_cuda_emulation_sources': [
      'native/cuda/emulated_runtime.cpp',
      'native/cuda/emulation/machine.cpp',
    ],
    'sdpa_cuda_compile_flags': [
      '-std=c++17',
      '-O3',
      '-DNDEBUG',
      # The constexpr functions of core/ serve kernels too.
      '--expt-relaxed-constexpr',
      '-compress-mode=size',
      '-Xcompiler=-fvisibility=hidden',
    ],
    # The GPUs that the plugin has machine code for, and PTX for those to come. nvcc's front end runs
    # once for each `arch`, and takes as long as its back end: GPUs whose PTX would be the same but
    # for its first lines share one. The PTX that is kept has to serve majors without machine code.
    'sdpa_cuda_gpus': [
      '-gencode=arch=compute_75,code=sm_75',
      '-gencode=arch=compute_80,code=sm_80',
      '-gencode=arch=compute_80,code=sm_86',
      '-gencode=arch=compute_80,code=sm_89',
      '-gencode=arch=compute_80,code=sm_90a',
      '-gencode=arch=compute_100,code=sm_100',
      '-gencode=arch=compute_100,code=sm_120',
      '-gencode=arch=compute_100,code=compute_100',
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

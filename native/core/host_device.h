// Marks functions that C++ and CUDA share.
#pragma once

#if defined(__CUDACC__)
#define SDPA_HOST_DEVICE __host__ __device__
#else
#define SDPA_HOST_DEVICE
#endif

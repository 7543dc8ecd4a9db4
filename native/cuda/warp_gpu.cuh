// warp.cuh on a GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#define SDPA_DEVICE __device__ __forceinline__
// For what runs rarely or once: it must not weigh on the registers and the code of a hot loop.
#define SDPA_OUTLINE static __device__ __noinline__
#define SDPA_KERNEL(threads, blocks) __global__ void __launch_bounds__(threads, blocks)
#define SDPA_PARAMETER __grid_constant__
#define SDPA_UNROLL _Pragma("unroll")
#define SDPA_NO_UNROLL _Pragma("unroll 1")
#define SDPA_UNROLL_FEW _Pragma("unroll 4")

namespace sdpa::cuda {

SDPA_DEVICE uint32_t thread_index() { return threadIdx.x; }
SDPA_DEVICE uint32_t thread_count() { return blockDim.x; }
SDPA_DEVICE Index3 block_index() { return {blockIdx.x, blockIdx.y, blockIdx.z}; }

SDPA_DEVICE unsigned char* shared_memory() {
  extern __shared__ __align__(1024) unsigned char sdpa_shared[];
  return sdpa_shared;
}

SDPA_DEVICE void sync_block() { __syncthreads(); }
SDPA_DEVICE bool sync_block_or(bool vote) { return __syncthreads_or(vote) != 0; }

SDPA_DEVICE uint32_t shuffle(uint32_t x, uint32_t lane) {
  return __shfl_sync(0xffffffff, x, int(lane));
}
SDPA_DEVICE float shuffle(float x, uint32_t lane) { return __shfl_sync(0xffffffff, x, int(lane)); }
SDPA_DEVICE float shuffle_xor(float x, uint32_t mask) {
  return __shfl_xor_sync(0xffffffff, x, int(mask));
}

SDPA_DEVICE float from_bits(uint32_t bits) { return __uint_as_float(bits); }
SDPA_DEVICE uint32_t to_bits(float x) { return __float_as_uint(x); }

/// 2^x to 2 units in the last place; 0 below the normal range.
SDPA_DEVICE float exp2_fast(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

/// Two floats as 16-bit elements, rounded to nearest even.
SDPA_DEVICE uint32_t pack_float16(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
SDPA_DEVICE uint32_t pack_bfloat16(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t bits;
  memcpy(&bits, &pair, sizeof bits);
  return bits;
}
SDPA_DEVICE float widen_float16(uint32_t bits) {
  return __half2float(__ushort_as_half(uint16_t(bits)));
}
SDPA_DEVICE uint32_t shared_address(const void* p) { return uint32_t(__cvta_generic_to_shared(p)); }

SDPA_DEVICE Vector16 load_vector(const void* p) {
  const uint4 v = *static_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
SDPA_DEVICE void store_vector(void* p, const Vector16& v) {
  *static_cast<uint4*>(p) = make_uint4(v.w[0], v.w[1], v.w[2], v.w[3]);
}
SDPA_DEVICE void store_two(void* p, uint32_t first, uint32_t second) {
  *static_cast<uint2*>(p) = make_uint2(first, second);
}

/// Starts to copy 16 bytes to shared memory; zeros if not `valid`.
SDPA_DEVICE void copy_async(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  store_vector(to, valid ? load_vector(from) : Vector16{});
#endif
}
SDPA_DEVICE void commit_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}
/// Waits for all groups of copies but the latest `kLeft`.
template <int kLeft>
SDPA_DEVICE void wait_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group %0;" ::"n"(kLeft) : "memory");
#endif
}

/// Loads four 8x8 matrices of 16-bit elements; lane l gives the address of row l % 8 of matrix l /
/// 8 and gets, of each matrix, row l / 4 and the columns 2 (l % 4) and the next.
SDPA_DEVICE void load_matrices(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
/// The same, of the transposed matrices.
SDPA_DEVICE void load_matrices_transposed(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

/// c += a * b in float16, summed in float32.
SDPA_DEVICE void multiply_float16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  // Turing has half the depth: two products, one for each half of the operands.
  SDPA_UNROLL
  for (int half = 0; half < 2; ++half) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2 * half]), "r"(a[2 * half + 1]), "r"(b[half]));
  }
#endif
}

#if __CUDA_ARCH__ < 800
/// Turing has no product of bfloat16: lanes hand their operands around. Right, and slow.
SDPA_OUTLINE float4 multiply_bfloat16_by_lanes(float4 c, uint4 a, uint2 b) {
  const uint32_t lane = threadIdx.x % kLanes, g = lane / 4, t = lane % 4;
  SDPA_NO_UNROLL
  for (uint32_t i = 0; i < 8; ++i) {  // pairs of columns of A: of the lanes of a quad, twice
    const uint32_t from = i % 4;
    const uint32_t low = shuffle(i < 4 ? a.x : a.z, 4 * g + from);
    const uint32_t high = shuffle(i < 4 ? a.y : a.w, 4 * g + from);
    const uint32_t left = shuffle(i < 4 ? b.x : b.y, 8 * t + from);
    const uint32_t right = shuffle(i < 4 ? b.x : b.y, 8 * t + 4 + from);
    c.x = fmaf(from_bits(low << 16), from_bits(left << 16), c.x);
    c.x = fmaf(from_bits(low & 0xffff0000), from_bits(left & 0xffff0000), c.x);
    c.y = fmaf(from_bits(low << 16), from_bits(right << 16), c.y);
    c.y = fmaf(from_bits(low & 0xffff0000), from_bits(right & 0xffff0000), c.y);
    c.z = fmaf(from_bits(high << 16), from_bits(left << 16), c.z);
    c.z = fmaf(from_bits(high & 0xffff0000), from_bits(left & 0xffff0000), c.z);
    c.w = fmaf(from_bits(high << 16), from_bits(right << 16), c.w);
    c.w = fmaf(from_bits(high & 0xffff0000), from_bits(right & 0xffff0000), c.w);
  }
  return c;
}
#endif

/// c += a * b in bfloat16, summed in float32.
SDPA_DEVICE void multiply_bfloat16(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
#if __CUDA_ARCH__ >= 800
  asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
      "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
#else
  const float4 sum =
      multiply_bfloat16_by_lanes(make_float4(c[0], c[1], c[2], c[3]),
                                 make_uint4(a[0], a[1], a[2], a[3]), make_uint2(b[0], b[1]));
  c[0] = sum.x;
  c[1] = sum.y;
  c[2] = sum.z;
  c[3] = sum.w;
#endif
}

/// Starts a kernel; the cudaError_t as int.
template <typename Arguments>
inline int start(void (*kernel)(Arguments), Index3 grid, uint32_t threads, size_t shared_bytes,
                 const Arguments& arguments, int /*sm*/, void* stream) {
  if (shared_bytes > 48 * 1024) {  // more than that a kernel has to ask for
    const cudaError_t error = cudaFuncSetAttribute(
        kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared_bytes));
    if (error != cudaSuccess) return int(error);
  }
  kernel<<<dim3(grid.x, grid.y, grid.z), threads, shared_bytes,
           static_cast<cudaStream_t>(stream)>>>(arguments);
  return int(cudaGetLastError());
}

}  // namespace sdpa::cuda

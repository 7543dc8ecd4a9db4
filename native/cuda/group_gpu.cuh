// group.cuh on a GPU.
#pragma once

#include <cudaTypedefs.h>

namespace sdpa::cuda {

// ------------------------------------------------------------------------------------- tensor maps

using TensorMap = CUtensorMap;

inline int make_map(const MappedTensor& tensor, uint32_t box_rows, TensorMap* map) {
  // Through the runtime, so that the plugin needs no library of the driver.
  static const auto encode = [] {
    void* found = nullptr;
    cudaDriverEntryPointQueryResult result;
    if (cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000, cudaEnableDefault,
                                         &result) != cudaSuccess) {
      found = nullptr;
    }
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(found);
  }();
  if (!encode) return int(cudaErrorNotSupported);
  const cuuint32_t box[4] = {kPanelColumns, box_rows, 1, 1}, steps[4] = {1, 1, 1, 1};
  const CUresult error =
      encode(map, CU_TENSOR_MAP_DATA_TYPE_UINT16, 4, const_cast<void*>(tensor.data), tensor.sizes,
             tensor.strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
             CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return error == CUDA_SUCCESS ? 0 : int(cudaErrorInvalidValue);
}

// ---------------------------------------------------------------------------------------- barriers

SDPA_DEVICE void init_barrier(Barrier* barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
SDPA_DEVICE void publish_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
SDPA_DEVICE void arrive(Barrier* barrier) {
  asm volatile("{\n.reg .b64 state;\nmbarrier.arrive.shared::cta.b64 state, [%0];\n}" ::"r"(
                   shared_address(barrier))
               : "memory");
}
SDPA_DEVICE void arrive_and_expect(Barrier* barrier, uint32_t bytes) {
  asm volatile(
      "{\n.reg .b64 state;\nmbarrier.arrive.expect_tx.shared::cta.b64 state, [%0], %1;\n}" ::"r"(
          shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
SDPA_DEVICE void wait_for(Barrier* barrier, uint32_t parity) {
  asm volatile(
      "{\n.reg .pred done;\n"
      "again:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra over;\n"
      "bra again;\n"
      "over:\n}" ::"r"(shared_address(barrier)),
      "r"(parity)
      : "memory");
}
SDPA_DEVICE void sync_group() {
  asm volatile("bar.sync %0, %1;" ::"r"(1 + threadIdx.x / kGroupThreads), "n"(kGroupThreads)
               : "memory");
}
/// Barriers 8 and more: the first ones are those of sync_block and sync_group. Numbers are computed
/// in place, as the kernels have no register left for them.
SDPA_DEVICE void take_turn() {
  asm volatile(
      "{\n.reg .u32 n;\n"
      "mov.u32 n, %%tid.x;\n"
      "shr.u32 n, n, 7;\n"
      "add.u32 n, n, 7;\n"
      "bar.sync n, %0;\n}" ::"n"(2 * kGroupThreads)
      : "memory");
}
template <uint32_t kGroups>
SDPA_DEVICE void pass_turn() {
  asm volatile(
      "{\n.reg .u32 n;\n.reg .pred last;\n"
      "mov.u32 n, %%tid.x;\n"
      "shr.u32 n, n, 7;\n"
      "setp.eq.u32 last, n, %1;\n"
      "add.u32 n, n, 8;\n"
      "@last mov.u32 n, 8;\n"
      "bar.arrive n, %0;\n}" ::"n"(2 * kGroupThreads),
      "n"(kGroups)
      : "memory");
}
/// Barrier 15, past those.
template <uint32_t kThreads>
SDPA_DEVICE void sync_consumers() {
  asm volatile("bar.sync 15, %0;" ::"n"(kThreads) : "memory");
}
SDPA_DEVICE void publish_writes() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
SDPA_DEVICE void copy_panel(void* to, const TensorMap& map, Barrier* barrier, uint32_t column,
                            uint32_t row, uint32_t head, uint32_t b) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes "
      "[%0], [%1, {%3, %4, %5, %6}], [%2];" ::"r"(shared_address(to)),
      "l"(&map), "r"(shared_address(barrier)), "r"(column), "r"(row), "r"(head), "r"(b)
      : "memory");
}

// --------------------------------------------------------------------------------------- registers

template <uint32_t kRegisters>
SDPA_DEVICE void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}
template <uint32_t kRegisters>
SDPA_DEVICE void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// ------------------------------------------------------------------------------------------- turns

SDPA_DEVICE void wait_for_turn(const uint32_t* turn, uint32_t number) {
  uint32_t now;
  do {
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(now) : "l"(turn) : "memory");
  } while (now != number);
}
SDPA_DEVICE void give_turn(uint32_t* turn, uint32_t number) {
  asm volatile(
      "fence.acq_rel.gpu;\n"
      "st.release.gpu.global.u32 [%0], %1;" ::"l"(turn),
      "r"(number)
      : "memory");
}
SDPA_DEVICE void add_four(float* to, const float (&x)[4]) {
  asm volatile("red.relaxed.gpu.global.add.v4.f32 [%0], {%1, %2, %3, %4};" ::"l"(to), "f"(x[0]),
               "f"(x[1]), "f"(x[2]), "f"(x[3])
               : "memory");
}

// ---------------------------------------------------------------------------------------- products

SDPA_DEVICE uint32_t descriptor_address(const void* p) { return shared_address(p); }

SDPA_DEVICE void begin_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
SDPA_DEVICE void commit_products() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}
template <int kLeft>
SDPA_DEVICE void wait_products() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kLeft) : "memory");
}
/// The compiler knows nothing of products that are still being summed: this keeps what uses the
/// registers on its own side of begin_products and wait_products.
template <int kTiles>
SDPA_DEVICE void hold(float (&sums)[kTiles][4]) {
  SDPA_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    SDPA_UNROLL
    for (int e = 0; e < 4; ++e) asm volatile("" : "+f"(sums[j][e])::"memory");
  }
}
template <int kSteps, int kTerms>
SDPA_DEVICE void hold(uint32_t (&operand)[kSteps][kTerms][4]) {
  SDPA_UNROLL
  for (int s = 0; s < kSteps; ++s) {
    SDPA_UNROLL
    for (int i = 0; i < 4 * kTerms; ++i) {
      asm volatile("" : "+r"(operand[s][i / 4][i % 4])::"memory");
    }
  }
}

#define SDPA_SUMS_1(c, j) "+f"(c[j][0]), "+f"(c[j][1]), "+f"(c[j][2]), "+f"(c[j][3])
#define SDPA_SUMS_4(c, j) \
  SDPA_SUMS_1(c, j), SDPA_SUMS_1(c, j + 1), SDPA_SUMS_1(c, j + 2), SDPA_SUMS_1(c, j + 3)
#define SDPA_SUMS_8(c, j) SDPA_SUMS_4(c, j), SDPA_SUMS_4(c, j + 4)
#define SDPA_SUMS_16(c, j) SDPA_SUMS_8(c, j), SDPA_SUMS_8(c, j + 8)
#define SDPA_SUMS_32(c, j) SDPA_SUMS_16(c, j), SDPA_SUMS_16(c, j + 16)
#define SDPA_LIST_16 "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"
#define SDPA_LIST_32                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SDPA_LIST_64                                                                 \
  SDPA_LIST_32                                                                       \
  ", "                                                                               \
  "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
  "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SDPA_LIST_128                                                                          \
  SDPA_LIST_64                                                                                 \
  ", "                                                                                         \
  "%64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, "           \
  "%80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, "           \
  "%96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, "     \
  "%111, "                                                                                     \
  "%112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"

// Of `tiles` tiles of eight columns, `registers` = 4 * tiles; then the numbers of the operands.
#define SDPA_PRODUCT_OF_SHARED(type, columns, tiles, registers, a, b, add, rows_a, rows_b)      \
  asm volatile(                                                                                 \
      "{\n.reg .pred p;\nsetp.ne.b32 p, %" #add                                                 \
      ", 0;\n"                                                                                  \
      "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type                     \
      " {" SDPA_LIST_##registers "}, %" #a ", %" #b ", p, 1, 1, %" #rows_a ", %" #rows_b ";\n}" \
      : SDPA_SUMS_##tiles(sums, 0)                                                              \
      : "l"(a_matrix), "l"(b_matrix), "r"(int(adds)), "n"(int(kDepthA)), "n"(int(kDepthB)))
#define SDPA_PRODUCT_OF_REGISTERS(type, columns, tiles, registers, a0, a1, a2, a3, b, add)    \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #add                                      \
               ", 0;\n"                                                                       \
               "wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type          \
               " {" SDPA_LIST_##registers "}, {%" #a0 ", %" #a1 ", %" #a2 ", %" #a3 "}, %" #b \
                                          ", p, 1, 1, 1;\n}"                                  \
               : SDPA_SUMS_##tiles(sums, 0)                                                   \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b_matrix), "r"(int(adds)))
#define SDPA_BY_TYPE(product, ...)        \
  if constexpr (kHalf == Half::float16) { \
    product("f16", __VA_ARGS__);          \
  } else {                                \
    product("bf16", __VA_ARGS__);         \
  }

template <Half kHalf, Depth kDepthA, Depth kDepthB, int kTiles>
SDPA_DEVICE void multiply_shared(float (&sums)[kTiles][4], uint64_t a_matrix, uint64_t b_matrix,
                                 bool adds) {
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 16);
  if constexpr (kTiles == 4) {
    SDPA_BY_TYPE(SDPA_PRODUCT_OF_SHARED, 32, 4, 16, 16, 17, 18, 19, 20)
  } else if constexpr (kTiles == 8) {
    SDPA_BY_TYPE(SDPA_PRODUCT_OF_SHARED, 64, 8, 32, 32, 33, 34, 35, 36)
  } else {
    SDPA_BY_TYPE(SDPA_PRODUCT_OF_SHARED, 128, 16, 64, 64, 65, 66, 67, 68)
  }
}

template <Half kHalf, int kTiles>
SDPA_DEVICE void multiply_registers(float (&sums)[kTiles][4], const uint32_t (&a)[4],
                                    uint64_t b_matrix, bool adds) {
  static_assert(kTiles == 4 || kTiles == 8 || kTiles == 16 || kTiles == 32);
  if constexpr (kTiles == 4) {
    SDPA_BY_TYPE(SDPA_PRODUCT_OF_REGISTERS, 32, 4, 16, 16, 17, 18, 19, 20, 21)
  } else if constexpr (kTiles == 8) {
    SDPA_BY_TYPE(SDPA_PRODUCT_OF_REGISTERS, 64, 8, 32, 32, 33, 34, 35, 36, 37)
  } else if constexpr (kTiles == 16) {
    SDPA_BY_TYPE(SDPA_PRODUCT_OF_REGISTERS, 128, 16, 64, 64, 65, 66, 67, 68, 69)
  } else {
    SDPA_BY_TYPE(SDPA_PRODUCT_OF_REGISTERS, 256, 32, 128, 128, 129, 130, 131, 132, 133)
  }
}

#undef SDPA_SUMS_1
#undef SDPA_SUMS_4
#undef SDPA_SUMS_8
#undef SDPA_SUMS_16
#undef SDPA_SUMS_32
#undef SDPA_LIST_16
#undef SDPA_LIST_32
#undef SDPA_LIST_64
#undef SDPA_LIST_128
#undef SDPA_PRODUCT_OF_SHARED
#undef SDPA_PRODUCT_OF_REGISTERS
#undef SDPA_BY_TYPE

}  // namespace sdpa::cuda

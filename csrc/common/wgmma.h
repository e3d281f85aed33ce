// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warpgroup (wgmma): A of 64 x 16 from registers, B from shared memory, sums
// in fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace vlmk {

// Registers written before are seen by the products that follow.
__device__ __forceinline__ void mma_fence() {
  asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
}

__device__ __forceinline__ void mma_commit() {
  asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
}

// Until at most kPending of the committed groups still run.
template <int kPending>
__device__ __forceinline__ void mma_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// B with K along its rows and no swizzle: bricks of 8 rows of 16 bytes, one after another along N,
// `k_stride` bytes apart along K. In a cluster, an address also names the block, above 18 bits.
__device__ __forceinline__ uint64_t plain_descriptor(uint32_t address, uint32_t k_stride) {
  return ((address & 0x3ffff) >> 4) | uint64_t{k_stride >> 4} << 16 | uint64_t{128 >> 4} << 32;
}

#define VLMK_FLOATS4(x, i) "+f"(x[i]), "+f"(x[i + 1]), "+f"(x[i + 2]), "+f"(x[i + 3])
#define VLMK_FLOATS16(x, i) \
  VLMK_FLOATS4(x, i), VLMK_FLOATS4(x, i + 4), VLMK_FLOATS4(x, i + 8), VLMK_FLOATS4(x, i + 12)

#define VLMK_MMA_96(type)                                                                \
  asm volatile(                                                                          \
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                     \
      "wgmma.mma_async.sync.aligned.m64n96k16.f32." type "." type                        \
      " {"                                                                               \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"   \
      "}, {%48, %49, %50, %51}, %52, add, 1, 1, 0;\n}"                                   \
      : VLMK_FLOATS16(sum, 0), VLMK_FLOATS16(sum, 16), VLMK_FLOATS16(sum, 32)            \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

#define VLMK_MMA_128(type)                                                               \
  asm volatile(                                                                          \
      "{\n.reg .pred add;\nsetp.ne.b32 add, 1, 0;\n"                                     \
      "wgmma.mma_async.sync.aligned.m64n128k16.f32." type "." type                       \
      " {"                                                                               \
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "           \
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, " \
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, " \
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"   \
      "}, {%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}"                                   \
      : VLMK_FLOATS16(sum, 0), VLMK_FLOATS16(sum, 16), VLMK_FLOATS16(sum, 32),           \
        VLMK_FLOATS16(sum, 48)                                                           \
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b))

// sum += a b^T. Asynchronous: neither `sum` nor `a` may be touched before mma_wait.
template <typename T, int kColumns>
__device__ __forceinline__ void mma(float (&sum)[kColumns / 2], const uint32_t (&a)[4],
                                    uint64_t b) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
  static_assert(kColumns == 96 || kColumns == 128);
  if constexpr (kColumns == 96) {
    if constexpr (kHalf) {
      VLMK_MMA_96("f16");
    } else {
      VLMK_MMA_96("bf16");
    }
  } else {
    if constexpr (kHalf) {
      VLMK_MMA_128("f16");
    } else {
      VLMK_MMA_128("bf16");
    }
  }
}

#undef VLMK_MMA_96
#undef VLMK_MMA_128
#undef VLMK_FLOATS4
#undef VLMK_FLOATS16

}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warpgroup (wgmma): A of 64 x 32 bytes from registers, B from shared memory;
// 16-bit floats with sums in fp32, bytes with sums in int32.
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

#define VLMK_4(constraint, x, i) \
  constraint(x[i]), constraint(x[i + 1]), constraint(x[i + 2]), constraint(x[i + 3])
#define VLMK_16(constraint, x, i)                                                       \
  VLMK_4(constraint, x, i), VLMK_4(constraint, x, i + 4), VLMK_4(constraint, x, i + 8), \
      VLMK_4(constraint, x, i + 12)
#define VLMK_48(constraint, x) \
  VLMK_16(constraint, x, 0), VLMK_16(constraint, x, 16), VLMK_16(constraint, x, 32)
#define VLMK_64(constraint, x) VLMK_48(constraint, x), VLMK_16(constraint, x, 48)
#define VLMK_96(constraint, x) \
  VLMK_64(constraint, x), VLMK_16(constraint, x, 64), VLMK_16(constraint, x, 80)
#define VLMK_128(constraint, x) \
  VLMK_96(constraint, x), VLMK_16(constraint, x, 96), VLMK_16(constraint, x, 112)

#define VLMK_REGISTERS_48                                                            \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15"             \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31" \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47"
#define VLMK_REGISTERS_64 \
  VLMK_REGISTERS_48       \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define VLMK_REGISTERS_96                                                            \
  VLMK_REGISTERS_64                                                                  \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define VLMK_REGISTERS_128                                                                       \
  VLMK_REGISTERS_96                                                                              \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, " \
  "%127"

#define VLMK_MMA(shape, type, registers, outputs, operands, predicate)                      \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " predicate                            \
               ", 0;\n"                                                                     \
               "wgmma.mma_async.sync.aligned." shape "." type " {" registers "}, " operands \
               : outputs                                                                    \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
#define VLMK_MMA_96(type)                                            \
  VLMK_MMA("m64n96k16", type, VLMK_REGISTERS_48, VLMK_48("+f", sum), \
           "{%48, %49, %50, %51}, %52, add, 1, 1, 0;\n}", "%53")
#define VLMK_MMA_128(type)                                            \
  VLMK_MMA("m64n128k16", type, VLMK_REGISTERS_64, VLMK_64("+f", sum), \
           "{%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}", "%69")

// sum = a b^T + (add ? sum : 0). Asynchronous: neither `sum` nor `a` may be touched before
// mma_wait.
template <typename T, int kColumns>
__device__ __forceinline__ void mma(float (&sum)[kColumns / 2], const uint32_t (&a)[4], uint64_t b,
                                    bool add) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
  static_assert(kColumns == 96 || kColumns == 128);
  if constexpr (kColumns == 96) {
    if constexpr (kHalf) {
      VLMK_MMA_96("f32.f16.f16");
    } else {
      VLMK_MMA_96("f32.bf16.bf16");
    }
  } else {
    if constexpr (kHalf) {
      VLMK_MMA_128("f32.f16.f16");
    } else {
      VLMK_MMA_128("f32.bf16.bf16");
    }
  }
}

// The same for bytes, A of 64 x 32 of them; exact.
template <int kColumns>
__device__ __forceinline__ void mma(int32_t (&sum)[kColumns / 2], const uint32_t (&a)[4],
                                    uint64_t b, bool add) {
  static_assert(kColumns == 192 || kColumns == 256);
  if constexpr (kColumns == 192) {
    VLMK_MMA("m64n192k32", "s32.s8.s8", VLMK_REGISTERS_96, VLMK_96("+r", sum),
             "{%96, %97, %98, %99}, %100, add;\n}", "%101");
  } else {
    VLMK_MMA("m64n256k32", "s32.s8.s8", VLMK_REGISTERS_128, VLMK_128("+r", sum),
             "{%128, %129, %130, %131}, %132, add;\n}", "%133");
  }
}

#undef VLMK_MMA
#undef VLMK_MMA_96
#undef VLMK_MMA_128
#undef VLMK_REGISTERS_48
#undef VLMK_REGISTERS_64
#undef VLMK_REGISTERS_96
#undef VLMK_REGISTERS_128
#undef VLMK_4
#undef VLMK_16
#undef VLMK_48
#undef VLMK_64
#undef VLMK_96
#undef VLMK_128

}  // namespace vlmk

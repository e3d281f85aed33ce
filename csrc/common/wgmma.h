// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warpgroup (wgmma): A of 64 x 32 bytes from registers or shared memory, B
// from shared memory; 16-bit floats with sums in fp32, bytes with sums in int32.
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

// Rows of 32, 64 or 128 bytes one after another, swizzled over as many as the copy engine does.
// `panel_stride` is from one panel of columns to the next, where one product spans several (B with
// its rows along K).
__device__ __forceinline__ uint64_t swizzled_descriptor(uint32_t address, uint32_t panel_stride,
                                                        int row_bytes = 128) {
  const unsigned swizzle = row_bytes == 128 ? 1 : row_bytes == 64 ? 2 : 3;
  return ((address & 0x3ffff) >> 4) | uint64_t{panel_stride >> 4} << 16 |
         uint64_t{static_cast<uint32_t>(row_bytes) >> 1} << 32 | uint64_t{swizzle} << 62;
}

// The same for K along the rows.
__device__ __forceinline__ uint64_t row_descriptor(uint32_t address, int row_bytes) {
  return swizzled_descriptor(address, 0, row_bytes);
}

// Reads of these registers stay behind this place, writes before it: what runs meanwhile is known
// to nobody but the hardware.
template <typename T, int kCount>
__device__ __forceinline__ void keep(T (&x)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if constexpr (std::is_same_v<T, float>) {
      asm volatile("" : "+f"(x[i])::"memory");
    } else {
      asm volatile("" : "+r"(x[i])::"memory");
    }
  }
}

// Lists of operands: %0 .. of so many accumulators, and the accumulators with their constraint.
#define VLMK_4(constraint, x, i) \
  constraint(x[i]), constraint(x[i + 1]), constraint(x[i + 2]), constraint(x[i + 3])
#define VLMK_OPERANDS_8 "%0, %1, %2, %3, %4, %5, %6, %7"
#define VLMK_OPERANDS_16 VLMK_OPERANDS_8 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define VLMK_OPERANDS_24 VLMK_OPERANDS_16 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define VLMK_OPERANDS_32 VLMK_OPERANDS_24 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define VLMK_OPERANDS_36 VLMK_OPERANDS_32 ", %32, %33, %34, %35"
#define VLMK_OPERANDS_40 VLMK_OPERANDS_36 ", %36, %37, %38, %39"
#define VLMK_OPERANDS_44 VLMK_OPERANDS_40 ", %40, %41, %42, %43"
#define VLMK_OPERANDS_48 VLMK_OPERANDS_44 ", %44, %45, %46, %47"
#define VLMK_OPERANDS_52 VLMK_OPERANDS_48 ", %48, %49, %50, %51"
#define VLMK_OPERANDS_56 VLMK_OPERANDS_52 ", %52, %53, %54, %55"
#define VLMK_OPERANDS_60 VLMK_OPERANDS_56 ", %56, %57, %58, %59"
#define VLMK_OPERANDS_64 VLMK_OPERANDS_60 ", %60, %61, %62, %63"
#define VLMK_OPERANDS_68 VLMK_OPERANDS_64 ", %64, %65, %66, %67"
#define VLMK_OPERANDS_72 VLMK_OPERANDS_68 ", %68, %69, %70, %71"
#define VLMK_OPERANDS_76 VLMK_OPERANDS_72 ", %72, %73, %74, %75"
#define VLMK_OPERANDS_80 VLMK_OPERANDS_76 ", %76, %77, %78, %79"
#define VLMK_OPERANDS_84 VLMK_OPERANDS_80 ", %80, %81, %82, %83"
#define VLMK_OPERANDS_88 VLMK_OPERANDS_84 ", %84, %85, %86, %87"
#define VLMK_OPERANDS_92 VLMK_OPERANDS_88 ", %88, %89, %90, %91"
#define VLMK_OPERANDS_96 VLMK_OPERANDS_92 ", %92, %93, %94, %95"
#define VLMK_OPERANDS_100 VLMK_OPERANDS_96 ", %96, %97, %98, %99"
#define VLMK_OPERANDS_104 VLMK_OPERANDS_100 ", %100, %101, %102, %103"
#define VLMK_OPERANDS_108 VLMK_OPERANDS_104 ", %104, %105, %106, %107"
#define VLMK_OPERANDS_112 VLMK_OPERANDS_108 ", %108, %109, %110, %111"
#define VLMK_OPERANDS_116 VLMK_OPERANDS_112 ", %112, %113, %114, %115"
#define VLMK_OPERANDS_120 VLMK_OPERANDS_116 ", %116, %117, %118, %119"
#define VLMK_OPERANDS_124 VLMK_OPERANDS_120 ", %120, %121, %122, %123"
#define VLMK_OPERANDS_128 VLMK_OPERANDS_124 ", %124, %125, %126, %127"
#define VLMK_SUMS_8(c, x) VLMK_4(c, x, 0), VLMK_4(c, x, 4)
#define VLMK_SUMS_16(c, x) VLMK_SUMS_8(c, x), VLMK_4(c, x, 8), VLMK_4(c, x, 12)
#define VLMK_SUMS_24(c, x) VLMK_SUMS_16(c, x), VLMK_4(c, x, 16), VLMK_4(c, x, 20)
#define VLMK_SUMS_32(c, x) VLMK_SUMS_24(c, x), VLMK_4(c, x, 24), VLMK_4(c, x, 28)
#define VLMK_SUMS_36(c, x) VLMK_SUMS_32(c, x), VLMK_4(c, x, 32)
#define VLMK_SUMS_40(c, x) VLMK_SUMS_36(c, x), VLMK_4(c, x, 36)
#define VLMK_SUMS_44(c, x) VLMK_SUMS_40(c, x), VLMK_4(c, x, 40)
#define VLMK_SUMS_48(c, x) VLMK_SUMS_44(c, x), VLMK_4(c, x, 44)
#define VLMK_SUMS_52(c, x) VLMK_SUMS_48(c, x), VLMK_4(c, x, 48)
#define VLMK_SUMS_56(c, x) VLMK_SUMS_52(c, x), VLMK_4(c, x, 52)
#define VLMK_SUMS_60(c, x) VLMK_SUMS_56(c, x), VLMK_4(c, x, 56)
#define VLMK_SUMS_64(c, x) VLMK_SUMS_60(c, x), VLMK_4(c, x, 60)
#define VLMK_SUMS_68(c, x) VLMK_SUMS_64(c, x), VLMK_4(c, x, 64)
#define VLMK_SUMS_72(c, x) VLMK_SUMS_68(c, x), VLMK_4(c, x, 68)
#define VLMK_SUMS_76(c, x) VLMK_SUMS_72(c, x), VLMK_4(c, x, 72)
#define VLMK_SUMS_80(c, x) VLMK_SUMS_76(c, x), VLMK_4(c, x, 76)
#define VLMK_SUMS_84(c, x) VLMK_SUMS_80(c, x), VLMK_4(c, x, 80)
#define VLMK_SUMS_88(c, x) VLMK_SUMS_84(c, x), VLMK_4(c, x, 84)
#define VLMK_SUMS_92(c, x) VLMK_SUMS_88(c, x), VLMK_4(c, x, 88)
#define VLMK_SUMS_96(c, x) VLMK_SUMS_92(c, x), VLMK_4(c, x, 92)
#define VLMK_SUMS_100(c, x) VLMK_SUMS_96(c, x), VLMK_4(c, x, 96)
#define VLMK_SUMS_104(c, x) VLMK_SUMS_100(c, x), VLMK_4(c, x, 100)
#define VLMK_SUMS_108(c, x) VLMK_SUMS_104(c, x), VLMK_4(c, x, 104)
#define VLMK_SUMS_112(c, x) VLMK_SUMS_108(c, x), VLMK_4(c, x, 108)
#define VLMK_SUMS_116(c, x) VLMK_SUMS_112(c, x), VLMK_4(c, x, 112)
#define VLMK_SUMS_120(c, x) VLMK_SUMS_116(c, x), VLMK_4(c, x, 116)
#define VLMK_SUMS_124(c, x) VLMK_SUMS_120(c, x), VLMK_4(c, x, 120)
#define VLMK_SUMS_128(c, x) VLMK_SUMS_124(c, x), VLMK_4(c, x, 124)

// Columns of B, accumulators, and the names of the six operands behind those.
#define VLMK_SHAPES(X)                                        \
  X(16, 8, "%8", "%9", "%10", "%11", "%12", "%13")            \
  X(32, 16, "%16", "%17", "%18", "%19", "%20", "%21")         \
  X(48, 24, "%24", "%25", "%26", "%27", "%28", "%29")         \
  X(64, 32, "%32", "%33", "%34", "%35", "%36", "%37")         \
  X(72, 36, "%36", "%37", "%38", "%39", "%40", "%41")         \
  X(80, 40, "%40", "%41", "%42", "%43", "%44", "%45")         \
  X(88, 44, "%44", "%45", "%46", "%47", "%48", "%49")         \
  X(96, 48, "%48", "%49", "%50", "%51", "%52", "%53")         \
  X(104, 52, "%52", "%53", "%54", "%55", "%56", "%57")        \
  X(112, 56, "%56", "%57", "%58", "%59", "%60", "%61")        \
  X(128, 64, "%64", "%65", "%66", "%67", "%68", "%69")        \
  X(144, 72, "%72", "%73", "%74", "%75", "%76", "%77")        \
  X(160, 80, "%80", "%81", "%82", "%83", "%84", "%85")        \
  X(176, 88, "%88", "%89", "%90", "%91", "%92", "%93")        \
  X(192, 96, "%96", "%97", "%98", "%99", "%100", "%101")      \
  X(208, 104, "%104", "%105", "%106", "%107", "%108", "%109") \
  X(256, 128, "%128", "%129", "%130", "%131", "%132", "%133")

#define VLMK_MMA(shape, type, operands, sums, rest, predicate, ...)                           \
  asm volatile("{\n.reg .pred add;\nsetp.ne.b32 add, " predicate                              \
               ", 0;\n"                                                                       \
               "wgmma.mma_async.sync.aligned." shape "." type " {" operands "}, " rest ";\n}" \
               : sums                                                                         \
               : __VA_ARGS__)
#define VLMK_MMA_REGISTERS(n, count, o0, o1, o2, o3, o4, o5, type, transposed)                \
  VLMK_MMA("m64n" #n "k16", type, VLMK_OPERANDS_##count, VLMK_SUMS_##count("+f", sum),        \
           "{" o0 ", " o1 ", " o2 ", " o3 "}, " o4 ", add, 1, 1, " transposed, o5, "r"(a[0]), \
           "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)))
#define VLMK_MMA_SHARED(n, count, o0, o1, o2, o3, o4, o5, type)                                   \
  VLMK_MMA("m64n" #n "k16", type, VLMK_OPERANDS_##count, VLMK_SUMS_##count("+f", sum),            \
           o0 ", " o1 ", add, 1, 1, " o3 ", " o4, o2, "l"(a), "l"(b), "r"(static_cast<int>(add)), \
           "n"(int{kLeftAlongK}), "n"(int{kRightAlongK}))

// No product at all would be the result of a shape that the table lacks.
#define VLMK_KNOWN(n, ...) || kColumns == n

// sum = a b^T + (add ? sum : 0); with kRowsAlongK, b lies with its rows along K: sum = a b + ...
// Asynchronous: neither `sum` nor `a` may be touched before mma_wait.
template <typename T, int kColumns, bool kRowsAlongK = false>
__device__ __forceinline__ void mma(float (&sum)[kColumns / 2], const uint32_t (&a)[4], uint64_t b,
                                    bool add) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(kHalf || std::is_same_v<T, __nv_bfloat16>);
  static_assert(false VLMK_SHAPES(VLMK_KNOWN));
#define VLMK_CASE(n, count, ...)                                     \
  if constexpr (kColumns == n && kHalf && kRowsAlongK) {             \
    VLMK_MMA_REGISTERS(n, count, __VA_ARGS__, "f32.f16.f16", "1");   \
  } else if constexpr (kColumns == n && kHalf) {                     \
    VLMK_MMA_REGISTERS(n, count, __VA_ARGS__, "f32.f16.f16", "0");   \
  } else if constexpr (kColumns == n && kRowsAlongK) {               \
    VLMK_MMA_REGISTERS(n, count, __VA_ARGS__, "f32.bf16.bf16", "1"); \
  } else if constexpr (kColumns == n) {                              \
    VLMK_MMA_REGISTERS(n, count, __VA_ARGS__, "f32.bf16.bf16", "0"); \
  }
  VLMK_SHAPES(VLMK_CASE)
#undef VLMK_CASE
}

// The same with A in shared memory. Both lie with K along their rows, or either with its rows along
// K: a with kLeftAlongK, b with kRightAlongK.
template <typename T, int kColumns, bool kLeftAlongK = false, bool kRightAlongK = false>
__device__ __forceinline__ void mma(float (&sum)[kColumns / 2], uint64_t a, uint64_t b, bool add) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  static_assert(false VLMK_SHAPES(VLMK_KNOWN));
#define VLMK_CASE(n, count, ...)                             \
  if constexpr (kColumns == n && kHalf) {                    \
    VLMK_MMA_SHARED(n, count, __VA_ARGS__, "f32.f16.f16");   \
  } else if constexpr (kColumns == n) {                      \
    VLMK_MMA_SHARED(n, count, __VA_ARGS__, "f32.bf16.bf16"); \
  }
  VLMK_SHAPES(VLMK_CASE)
#undef VLMK_CASE
}

// Bytes, A of 64 x 32 of them; exact.
template <int kColumns>
__device__ __forceinline__ void mma(int32_t (&sum)[kColumns / 2], const uint32_t (&a)[4],
                                    uint64_t b, bool add) {
  static_assert(false VLMK_SHAPES(VLMK_KNOWN));
#define VLMK_CASE(n, count, o0, o1, o2, o3, o4, o5)                                                \
  if constexpr (kColumns == n) {                                                                   \
    VLMK_MMA("m64n" #n "k32", "s32.s8.s8", VLMK_OPERANDS_##count, VLMK_SUMS_##count("+r", sum),    \
             "{" o0 ", " o1 ", " o2 ", " o3 "}, " o4 ", add", o5, "r"(a[0]), "r"(a[1]), "r"(a[2]), \
             "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));                                       \
  }
  VLMK_SHAPES(VLMK_CASE)
#undef VLMK_CASE
}

#undef VLMK_KNOWN
#undef VLMK_MMA
#undef VLMK_MMA_REGISTERS
#undef VLMK_MMA_SHARED
#undef VLMK_SHAPES
#undef VLMK_4
#undef VLMK_OPERANDS_8
#undef VLMK_OPERANDS_16
#undef VLMK_OPERANDS_24
#undef VLMK_OPERANDS_32
#undef VLMK_OPERANDS_36
#undef VLMK_OPERANDS_40
#undef VLMK_OPERANDS_44
#undef VLMK_OPERANDS_48
#undef VLMK_OPERANDS_52
#undef VLMK_OPERANDS_56
#undef VLMK_OPERANDS_60
#undef VLMK_OPERANDS_64
#undef VLMK_OPERANDS_68
#undef VLMK_OPERANDS_72
#undef VLMK_OPERANDS_76
#undef VLMK_OPERANDS_80
#undef VLMK_OPERANDS_84
#undef VLMK_OPERANDS_88
#undef VLMK_OPERANDS_92
#undef VLMK_OPERANDS_96
#undef VLMK_OPERANDS_100
#undef VLMK_OPERANDS_104
#undef VLMK_OPERANDS_108
#undef VLMK_OPERANDS_112
#undef VLMK_OPERANDS_116
#undef VLMK_OPERANDS_120
#undef VLMK_OPERANDS_124
#undef VLMK_OPERANDS_128
#undef VLMK_SUMS_8
#undef VLMK_SUMS_16
#undef VLMK_SUMS_24
#undef VLMK_SUMS_32
#undef VLMK_SUMS_36
#undef VLMK_SUMS_40
#undef VLMK_SUMS_44
#undef VLMK_SUMS_48
#undef VLMK_SUMS_52
#undef VLMK_SUMS_56
#undef VLMK_SUMS_60
#undef VLMK_SUMS_64
#undef VLMK_SUMS_68
#undef VLMK_SUMS_72
#undef VLMK_SUMS_76
#undef VLMK_SUMS_80
#undef VLMK_SUMS_84
#undef VLMK_SUMS_88
#undef VLMK_SUMS_92
#undef VLMK_SUMS_96
#undef VLMK_SUMS_100
#undef VLMK_SUMS_104
#undef VLMK_SUMS_108
#undef VLMK_SUMS_112
#undef VLMK_SUMS_116
#undef VLMK_SUMS_120
#undef VLMK_SUMS_124
#undef VLMK_SUMS_128

}  // namespace vlmk

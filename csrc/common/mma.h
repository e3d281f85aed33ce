// SPDX-License-Identifier: Apache-2.0
// Matrix products of a warp (mma.sync): A of 16 x 16 16-bit floats, B of 16 x 8, sums in fp32; and
// how operands come from shared memory.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace vlmk {

// sums += A B. Lane i has of the sums and of A rows i / 4 and 8 more, of B column i / 4; pairs of
// neighbours begin at 2 (i % 4), and 8 further on along the dimension that is summed.
template <typename T>
__device__ __forceinline__ void mma_add(float* sums, const uint32_t (&a)[4], uint32_t b0,
                                        uint32_t b1) {
#define VLMK_MMA(type)                                                                \
  asm volatile("mma.sync.aligned.m16n8k16.row.col.f32." type "." type                 \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, {%0, %1, %2, %3};" \
               : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1))
  if constexpr (std::is_same_v<T, __half>) {
    VLMK_MMA("f16");
  } else {
    VLMK_MMA("bf16");
  }
#undef VLMK_MMA
}

// Four matrices of 8 x 8 16-bit floats in rows of 16 bytes, of which lane i names row i % 8 of
// matrix i / 8. Each lane gets the pair at row i / 4, columns 2 (i % 4), of each; of the transposed
// matrices in the second case.
__device__ __forceinline__ void load_matrices(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}
__device__ __forceinline__ void load_transposed(uint32_t (&x)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(x[0]), "=r"(x[1]), "=r"(x[2]), "=r"(x[3])
               : "r"(row)
               : "memory");
}

// A matrix of 8 x 8 16-bit floats, dealt out to a warp in pairs, transposed.
__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// Sums of a warpgroup to memory: as results, 64 rows of a tensor, or as they are, for later.
#pragma once

#include <cstdint>

#include "attention/store.h"
#include "attention_bwd/config.h"
#include "common/float16.h"
#include "common/hopper.h"

namespace vlmk {
namespace attention_bwd {

// Rows `first` and on of a tensor whose rows lie `stride` elements apart, of the thread's two rows
// of a warp's 16; 16 bytes a thread.
template <typename T, int kWidth>
__device__ __forceinline__ void store_rows(void* tensor, int64_t stride, int first, int rows,
                                           int columns, const float (&sums)[kWidth / 2],
                                           float scale) {
  const int thread = attention::thread_again(), lane = thread % 32;
  const int own = first + thread % 128 / 32 * 16 + lane / 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = own + 8 * half;
    T* out = static_cast<T*>(tensor) + row * stride;
#pragma unroll
    for (int block = 0; block < kWidth / 8; block += 4) {
      uint32_t word[4] = {};
#pragma unroll
      for (int i = 0; i < 4 && block + i < kWidth / 8; ++i) {
        const int at = 4 * (block + i) + 2 * half;
        word[i] = pack<T>(sums[at] * scale, sums[at + 1] * scale);
      }
      attention::transpose_words(word, lane);
      const int column = 8 * (block + lane % 4);
      if (row < rows && column < columns) {
        *reinterpret_cast<uint4*>(out + column) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

// A tensor [batch, rows, heads, columns] with `stride` elements from one row to the next: where a
// head begins.
template <typename T>
__device__ __forceinline__ T* head_of(void* tensor, int batch, int rows, int64_t stride, int head,
                                      int columns) {
  return static_cast<T*>(tensor) + int64_t{batch} * rows * stride + head * columns;
}

// Sums added to those in memory, and taken from there, where a thread has its own at `place`.
template <int kHalf>
__device__ __forceinline__ void add_sums(float4* place, const float (&sums)[kHalf]) {
#pragma unroll
  for (int i = 0; i < kHalf; i += 4) {
    add_to_global(place + i / 4 * 128, make_float4(sums[i], sums[i + 1], sums[i + 2], sums[i + 3]));
  }
}
template <int kHalf>
__device__ __forceinline__ void take_sums(const float4* place, float (&sums)[kHalf]) {
#pragma unroll
  for (int i = 0; i < kHalf; i += 4) {
    const float4 x = __ldcg(place + i / 4 * 128);
    sums[i] = x.x, sums[i + 1] = x.y, sums[i + 2] = x.z, sums[i + 3] = x.w;
  }
}

// Where a thread keeps its sums of a tile of 64 queries: four, of 8 columns, behind those of all
// 128 threads.
template <typename C>
__device__ __forceinline__ float4* sums_of_tile(char* sums, int64_t tile) {
  return reinterpret_cast<float4*>(sums) + tile * (C::kWidth / 8 * 128) +
         attention::thread_again() % 128;
}

}  // namespace attention_bwd
}  // namespace vlmk

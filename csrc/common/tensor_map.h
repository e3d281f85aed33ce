// SPDX-License-Identifier: Apache-2.0
// Tiles of tensors through the copy engine (TMA): the host describes the tensor, a thread of the
// device names the tile.
#pragma once

#include <cuda.h>
#include <cuda_runtime.h>

#include <atomic>
#include <cstdint>

#include "common/error.h"

namespace vlmk {

// A tensor [batch, rows, heads, columns] of 16-bit floats, columns contiguous, strides in elements
// and multiples of 8; where there is one batch or one head, its stride does not matter. A tile is
// `tile_rows` rows of 64 columns of one head, swizzled in 128 bytes; what lies outside of the
// tensor is 0.
inline int encode_tensor_map(CUtensorMap& map, const void* data, bool half, int64_t batch,
                             int64_t rows, int64_t heads, int64_t columns, int64_t stride_b,
                             int64_t stride_s, int64_t stride_h, int tile_rows) {
  static std::atomic<void*> known{nullptr};
  void* found = known.load(std::memory_order_relaxed);
  if (!found) {
    // Asked of the driver that is there: the library itself links to none.
    cudaDriverEntryPointQueryResult result;
    VLMK_CUDA(cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &found, 12000,
                                               cudaEnableDefault, &result));
    VLMK_CHECK(result == cudaDriverEntryPointSuccess, "the driver has no cuTensorMapEncodeTiled");
    known.store(found, std::memory_order_relaxed);
  }
  const auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(found);
  const auto bytes = [](int64_t count, int64_t stride) {
    return static_cast<cuuint64_t>(count > 1 ? 2 * stride : 16);
  };
  const cuuint64_t sizes[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
                              static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)};
  const cuuint64_t strides[] = {bytes(rows, stride_s), bytes(heads, stride_h),
                                bytes(batch, stride_b)};
  const cuuint32_t box[] = {64, static_cast<cuuint32_t>(tile_rows), 1, 1};
  const cuuint32_t steps[] = {1, 1, 1, 1};
  // No promotion in L2: with a head's row of 144 or 160 bytes come neighbours that nobody reads
  // yet. In lines of 256 bytes, D 72 at 4,096 keys ran at 430 TFLOP/s instead of 508 (H100).
  const CUresult code =
      encode(&map, half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 4,
             const_cast<void*>(data), sizes, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_128B, CU_TENSOR_MAP_L2_PROMOTION_NONE,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  VLMK_CHECK(code == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error %d", static_cast<int>(code));
  return 0;
}

__device__ __forceinline__ void prefetch_map(const CUtensorMap& map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(&map) : "memory");
}

// Starts the copy of a tile to shared memory; its bytes are counted at the barrier.
__device__ __forceinline__ void copy_tile(uint32_t destination, const CUtensorMap& map, int column,
                                          int row, int head, int batch, uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%2, "
      "%3, %4, %5}], [%6];" ::"r"(destination),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier)
      : "memory");
}

// Starts the copy of a tile from shared memory; what lies outside of the tensor is left out.
__device__ __forceinline__ void store_tile(const CUtensorMap& map, uint32_t source, int column,
                                           int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group [%0, {%1, %2, %3, %4}], [%5];" ::"l"(
          &map),
      "r"(column), "r"(row), "r"(head), "r"(batch), "r"(source)
      : "memory");
}

__device__ __forceinline__ void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

}  // namespace vlmk

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

// A function of the driver that is there: the library itself links to none. Each is known by its
// type.
template <typename Function>
int find_in_driver(const char* name, Function*& function) {
  static std::atomic<void*> known{nullptr};
  void* found = known.load(std::memory_order_relaxed);
  if (!found) {
    cudaDriverEntryPointQueryResult result;
    VLMK_CUDA(cudaGetDriverEntryPointByVersion(name, &found, 12000, cudaEnableDefault, &result));
    VLMK_CHECK(result == cudaDriverEntryPointSuccess, "the driver has no %s", name);
    known.store(found, std::memory_order_relaxed);
  }
  function = reinterpret_cast<Function*>(found);
  return 0;
}

inline CUtensorMapDataType map_type(bool half) {
  return half ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
}

// Of rows of 16, 32 or 64 columns of 16-bit floats.
inline CUtensorMapSwizzle swizzle_of(int columns) {
  return columns == 16   ? CU_TENSOR_MAP_SWIZZLE_32B
         : columns == 32 ? CU_TENSOR_MAP_SWIZZLE_64B
                         : CU_TENSOR_MAP_SWIZZLE_128B;
}

// A tensor of four dimensions, the first of them contiguous, of 16-bit floats, with strides in
// bytes; a tile is a box of it, swizzled in 128 bytes; what lies outside of the tensor is 0.
//
// No promotion in L2: with a head's row of 144 or 160 bytes come neighbours that nobody reads yet.
// In lines of 256 bytes, D 72 at 4,096 keys ran at 430 TFLOP/s instead of 508 (H100).
inline int encode_tiles(CUtensorMap& map, const void* data, bool half, const cuuint64_t (&sizes)[4],
                        const cuuint64_t (&strides)[3], const cuuint32_t (&box)[4],
                        CUtensorMapSwizzle swizzle = CU_TENSOR_MAP_SWIZZLE_128B,
                        CUtensorMapL2promotion promotion = CU_TENSOR_MAP_L2_PROMOTION_NONE) {
  decltype(cuTensorMapEncodeTiled)* encode = nullptr;
  const int missing = find_in_driver("cuTensorMapEncodeTiled", encode);
  if (missing) return missing;
  const cuuint32_t steps[] = {1, 1, 1, 1};
  const CUresult code =
      encode(&map, map_type(half), 4, const_cast<void*>(data), sizes, strides, box, steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle, promotion, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  VLMK_CHECK(code == CUDA_SUCCESS, "cuTensorMapEncodeTiled: error %d", static_cast<int>(code));
  return 0;
}

// A tensor [batch, rows, heads, columns] of 16-bit floats, columns contiguous, strides in elements
// and multiples of 8; where there is one batch or one head, its stride does not matter. A tile is
// `tile_rows` rows of 16, 32 or 64 columns of one head, swizzled in as many bytes as a row has.
inline int encode_tensor_map(CUtensorMap& map, const void* data, bool half, int64_t batch,
                             int64_t rows, int64_t heads, int64_t columns, int64_t stride_b,
                             int64_t stride_s, int64_t stride_h, int tile_rows,
                             int tile_columns = 64) {
  const auto bytes = [](int64_t count, int64_t stride) {
    return static_cast<cuuint64_t>(count > 1 ? 2 * stride : 16);
  };
  return encode_tiles(
      map, data, half,
      {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows),
       static_cast<cuuint64_t>(heads), static_cast<cuuint64_t>(batch)},
      {bytes(rows, stride_s), bytes(heads, stride_h), bytes(batch, stride_b)},
      {static_cast<cuuint32_t>(tile_columns), static_cast<cuuint32_t>(tile_rows), 1, 1},
      swizzle_of(tile_columns));
}

// A tensor [batch, depth, height, width, columns] of 16-bit floats, columns contiguous, the other
// strides in bytes. A copy gathers `count` runs of 16, 32 or 64 columns, from one place to the next
// along width, height and batch, at the depth that it names; they are swizzled in as many bytes as
// a run has, and 0 behind the last column and the last image. Dimensions may overlap and lie in any
// order.
inline int encode_gathering(CUtensorMap& map, const void* data, bool half,
                            const cuuint64_t (&sizes)[5], const cuuint64_t (&strides)[4], int run,
                            int count) {
  decltype(cuTensorMapEncodeIm2col)* encode = nullptr;
  const int missing = find_in_driver("cuTensorMapEncodeIm2col", encode);
  if (missing) return missing;
  // The window of a convolution that is as deep as the tensor, and so has one place along depth.
  // Corners are in the order of width, height, depth, contrary to the manual.
  const int from[] = {0, 0, 0}, to[] = {0, 0, 1 - static_cast<int>(sizes[3])};
  const cuuint32_t steps[] = {1, 1, 1, 1, 1};
  const CUresult code =
      encode(&map, map_type(half), 5, const_cast<void*>(data), sizes, strides, from, to,
             static_cast<cuuint32_t>(run), static_cast<cuuint32_t>(count), steps,
             CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle_of(run), CU_TENSOR_MAP_L2_PROMOTION_L2_128B,
             CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  VLMK_CHECK(code == CUDA_SUCCESS, "cuTensorMapEncodeIm2col: error %d", static_cast<int>(code));
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

// What L2 is to let go first: the policy that createpolicy.fractional.L2::evict_first makes.
constexpr uint64_t kLeavesFirst = 0x12F0000000000000;

// The same of what nobody reads again.
__device__ __forceinline__ void copy_tile_once(uint32_t destination, const CUtensorMap& map,
                                               int column, int row, int head, int batch,
                                               uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(destination),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier), "l"(kLeavesFirst)
      : "memory");
}

// The same to this place in several blocks of the cluster, bits of `blocks`, and counted in each.
__device__ __forceinline__ void copy_tile_to_blocks(uint32_t destination, const CUtensorMap& map,
                                                    int column, int row, int head, int batch,
                                                    uint32_t barrier, uint16_t blocks) {
  asm volatile(
      "cp.async.bulk.tensor.4d.shared::cluster.global.mbarrier::complete_tx::bytes"
      ".multicast::cluster [%0], [%1, {%2, %3, %4, %5}], [%6], %7;" ::"r"(destination),
      "l"(&map), "r"(column), "r"(row), "r"(head), "r"(batch), "r"(barrier), "h"(blocks)
      : "memory");
}

// Starts the copy of runs from (x, y, batch) on.
__device__ __forceinline__ void copy_gathered(uint32_t destination, const CUtensorMap& map,
                                              int column, int x, int y, int batch, int depth,
                                              uint32_t barrier) {
  asm volatile(
      "cp.async.bulk.tensor.5d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes [%0], "
      "[%1, {%2, %3, %4, 0, %5}], [%6], {0, 0, %7};" ::"r"(destination),
      "l"(&map), "r"(column), "r"(x), "r"(y), "r"(batch), "r"(barrier),
      "h"(static_cast<uint16_t>(depth))
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

// The same of what nobody here reads.
__device__ __forceinline__ void store_tile_once(const CUtensorMap& map, uint32_t source, int column,
                                                int row, int head, int batch) {
  asm volatile(
      "cp.async.bulk.tensor.4d.global.shared::cta.bulk_group.L2::cache_hint "
      "[%0, {%1, %2, %3, %4}], [%5], %6;" ::"l"(&map),
      "r"(column), "r"(row), "r"(head), "r"(batch), "r"(source), "l"(kLeavesFirst)
      : "memory");
}

__device__ __forceinline__ void store_commit() {
  asm volatile("cp.async.bulk.commit_group;" ::: "memory");
}

}  // namespace vlmk

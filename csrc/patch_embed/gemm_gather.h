// SPDX-License-Identifier: Apache-2.0
// Rows that the copy engine can't bring, as they begin at multiples of 8 bytes only: a warpgroup
// loads them into registers and stores them where the copy engine would have put them.
#pragma once

#include <cstdint>

#include "common/hopper.h"
#include "common/tensor_map.h"
#include "patch_embed/gemm_config.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace gemm {

constexpr int kGatherers = 128;  // threads

// 16 bytes of a stage of some rows, for each thread. The pixels of two stages are under way.
struct RowGather {
  static constexpr int kThreadsOfRow = kStageDepth / 8, kApart = kGatherers / kThreadsOfRow;
  static constexpr int kEach = kPatches / kApart;
  using Pixels = uint2[kEach][2];

  const uint2* source;
  const char* next_source;  // the row of the next tile that it brings to L2; null: none
  int rows;                 // those that are there
  Pixels pixels[2];

  __device__ __forceinline__ void aim(const VlmkPatchEmbedParams& p, const Schedule& s,
                                      int first_row, int next_row) {
    const auto row_at = [&](int row) {
      return static_cast<const char*>(p.pixels) + 2 * row * p.pixel_stride_gy;
    };
    const int next = next_row + group_thread(), row = first_row + group_thread() / kThreadsOfRow;
    next_source = next < s.patches ? row_at(next) : nullptr;
    source = reinterpret_cast<const uint2*>(row_at(row)) + group_thread() % kThreadsOfRow * 2;
    rows = ceil_div(s.patches - row, kApart);
  }

  __device__ __forceinline__ void load(const VlmkPatchEmbedParams& p, int step, Pixels& x) const {
    const int first = step * kStageDepth + group_thread() % kThreadsOfRow * 8;
    const uint2* from = source + step * (kStageDepth / 4);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      x[i][0] = load_global_8(from, i < rows && first < p.depth);
      x[i][1] = load_global_8(from + 1, i < rows && first + 4 < p.depth);
      from += kApart * p.pixel_stride_gy / 4;
    }
  }

  // Stores what was loaded, and loads the same of the stage after the next.
  __device__ __forceinline__ void fill(const VlmkPatchEmbedParams& p, int step, uint32_t stage,
                                       Pixels& x) const {
    const int row = group_thread() / kThreadsOfRow;
    const uint32_t place = stage + row * 128 + ((group_thread() ^ row) & 7) * 16;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      store_shared(place + i * kApart * 128,
                   make_uint4(x[i][0].x, x[i][0].y, x[i][1].x, x[i][1].y));
    }
    load(p, step + 2, x);
    if (next_source) prefetch_global(next_source + step * kStageDepth * 2);
  }
};

// The warpgroup that fills the ring; the copy engine brings the weights.
template <typename C>
__device__ __forceinline__ void gather_tiles(const VlmkPatchEmbedParams& p, const Schedule& s,
                                             const Maps& maps, TileRing<C> ring) {
  RowGather gather;
  const int blocks = static_cast<int>(gridDim.x);
  for (int tile = static_cast<int>(blockIdx.x); tile < s.tiles; tile += blocks) {
    const int row_tile = s.column_tiles.divide(tile);
    const int column_tile = tile - row_tile * s.column_tiles.divisor;
    gather.aim(p, s, row_tile * kPatches, s.column_tiles.divide(tile + blocks) * kPatches);
    gather.load(p, 0, gather.pixels[0]);
    gather.load(p, 1, gather.pixels[1]);
    const auto fill = [&](int step, RowGather::Pixels& x) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      if (group_thread() == 0) {
        barrier_expect(ring.full(), C::kColumns * kStageDepth * 2);
        copy_tile(ring.stage() + C::kPixelBytes, maps.weight, step * kStageDepth, 0,
                  column_tile * (C::kColumns / 8), 0, ring.full());
      }
      gather.fill(p, step, ring.stage(), x);
      __syncwarp();
      if (lane_index() == 0) barrier_arrive(ring.full());
      ring.advance();
    };
#pragma unroll 1
    for (int step = 0; step < s.steps; step += 2) {
      fill(step, gather.pixels[0]);
      if (step + 1 < s.steps) fill(step + 1, gather.pixels[1]);
    }
  }
}

}  // namespace gemm
}  // namespace patch_embed
}  // namespace vlmk

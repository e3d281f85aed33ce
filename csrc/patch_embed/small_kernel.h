// SPDX-License-Identifier: Apache-2.0
// Few pixels -> tokens, in one kernel that is over soon: where the other one keeps its weights and
// goes through all pixels, here each block makes one tile, and the GPU holds all blocks at once.
//
// Pixels and weights come as they lie in memory, in chunks along the depth. Some warps copy, two
// warpgroups multiply, and a last warp takes care of what has no pixels. The normalisation of uint8
// pixels costs nothing on the way: pixels less 128 are whole numbers that bf16 holds, a channel's
// scale is applied to its sums, and what is constant, times the sum of the weights, comes out as
// the product of two rows of constants, in the place of a tile's last patches.
#pragma once

#include <cstdint>

#include "common/hopper.h"
#include "patch_embed/small_config.h"
#include "patch_embed/small_copies.h"
#include "patch_embed/small_products.h"
#include "patch_embed/small_tokens.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace small {

// A warpgroup that multiplies: its products of the tile, and its tokens.
template <typename C>
__device__ __forceinline__ void multiply_tile(const VlmkPatchEmbedParams& p, const Schedule& s,
                                              char* shared, const Tile<C>& tile, Ring<C> ring,
                                              int first_column, int warp) {
  const int group = warp / 4, lane = lane_index();
  Operands<C> operands;
  Tokens<C> tokens;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const int row = (C::kGroupsM > 1 ? 64 * group : 0) + C::patch_of(warp % 4, h, lane / 4);
    operands.patch[h] = tile.offset(s, tile.first_patch + row);
    operands.constant = row >= C::kPatches;
    if (C::kGroupsK == 1 || h == group) tokens.rows[C::kGroupsK == 1 ? h : 0] = row;
  }
  tokens.column = first_column + 4 * (lane % 4);
  wait_for_previous_grids();
  if constexpr (!C::kPositionsLast) tokens.load_positions(p, s, tile.first_patch);

  Sums<C> sums = {};
#pragma unroll 1
  for (int chunk = 0; chunk < C::kChunks; ++chunk) {
    const int channel = chunk / 2, part = chunk % 2;
    if (C::kGroupsK == 1 || part == group) {
      if constexpr (C::kBytes) {
        if (channel > 0 && (C::kGroupsK > 1 || part == 0)) sums.scale(s.rescale[channel]);
        const float all = s.missing[channel];
        const uint32_t high = pack<typename C::Token>(all, all);
        const float rest = all - C::to_floats(high).x;
        operands.missing = lane / 4 == 6 ? high : pack<typename C::Token>(rest, rest);
      }
      barrier_wait(ring.full(), ring.round & 1);
      fence_async_proxy();
      operands.multiply(sums, shared + C::kRing + ring.slot * C::kSlotBytes, part);
      __syncwarp();
      if (lane == 0) barrier_arrive(ring.empty());
    }
    ring.advance();
  }
  if constexpr (C::kBytes) sums.scale(p.pixel_scale[kChannels - 1]);
  if constexpr (C::kPositionsLast) tokens.load_positions(p, s, tile.first_patch);
  auto* vectors = reinterpret_cast<float*>(shared + C::kVectors);
  tokens.take(sums, group, shared + C::kRing, reinterpret_cast<float*>(shared + C::kConstants));
  barrier_wait(ring.barriers + C::kVectorsThere, 0);
  tokens.add_vector(vectors);
  tokens.add_positions();
  if constexpr (C::kNormed) {
    if (p.total) tokens.store(p, p.total);
    tokens.normalise(p, s.column_groups, vectors + C::kColumns, vectors + 2 * C::kColumns,
                     reinterpret_cast<float2*>(shared + C::kStatistics),
                     ring.barriers + C::kStatisticsThere);
  }
  tokens.store(p, p.out);
}

template <typename C>
__global__ void __launch_bounds__(kThreads, 1)
    patch_embed_small_kernel(const __grid_constant__ VlmkPatchEmbedParams p,
                             const __grid_constant__ Schedule s) {
  extern __shared__ __align__(1024) char shared[];
  const int warp = warp_index();
  const int first_column = static_cast<int>(blockIdx.x) * C::kColumns;
  const Ring<C> ring(shared_address(shared));
  if (warp == 0) {
    if (lane_index() < C::kSlots) {
      barrier_init(ring.barriers + C::kFull + 8 * lane_index(), 32 * (kWeightWarps + kPixelWarps));
      barrier_init(ring.barriers + C::kEmpty + 8 * lane_index(), 4 * C::kGroupsM);
    }
    if (lane_index() == 0) {
      barrier_init(ring.barriers + C::kVectorsThere, 32);
      if constexpr (C::kNormed) {
        barrier_init(ring.barriers + C::kStatisticsThere, 1);
        barrier_expect(ring.barriers + C::kStatisticsThere, s.column_groups * C::kRows * 8);
      }
    }
    fence_barrier_init();
  }
  if constexpr (C::kNormed) cluster_arrive();
  __syncthreads();
  let_next_grid_start();

  constexpr int kWeights = 4 * kGroups, kPixels = kWeights + kWeightWarps;
  const Tile<C> tile(s, static_cast<int>(blockIdx.y));
  if (warp < kWeights) {
    multiply_tile<C>(p, s, shared, tile, ring, first_column, warp);
    return;
  }
  if (warp < kPixels) {
    const WeightCopies<C> weights(p, first_column, static_cast<int>(threadIdx.x) - 32 * kWeights);
    wait_for_previous_grids();
    copy_chunks(ring, [&](int chunk, uint32_t slot) { weights.copy(chunk, slot); });
  } else if (warp < kPixels + kPixelWarps) {
    const PixelCopies<C> pixels(p, s, tile, warp - kPixels);
    wait_for_previous_grids();
    copy_chunks(ring, [&](int chunk, uint32_t slot) { pixels.copy(p, chunk, slot); });
  } else {
    wait_for_previous_grids();
    auto* vectors = reinterpret_cast<float*>(shared + C::kVectors);
    load_vector<C>(p.bias, first_column, p.dim, vectors);
    if constexpr (C::kNormed) {
      load_vector<C>(p.norm_weight, first_column, p.dim, vectors + C::kColumns);
      load_vector<C>(p.norm_bias, first_column, p.dim, vectors + 2 * C::kColumns);
    }
    barrier_arrive(ring.barriers + C::kVectorsThere);
    const int block = static_cast<int>(blockIdx.y * gridDim.x + blockIdx.x);
    const int blocks = static_cast<int>(gridDim.x * gridDim.y);
    for (int row = block; row < p.batch * p.num_prefix; row += blocks) prefix_token<C>(p, row);
  }
  if constexpr (C::kNormed) cluster_wait();
}

}  // namespace small
}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// Pixels -> tokens in one kernel: no matrix of patches, no prepared weight, no pass of its own for
// positions or the LayerNorm.
//
// A block keeps its columns of the weight in shared memory for good, with the normalisation of the
// pixels folded in. Two or three warpgroups share it; each takes 64 patches at a time through all
// of K, on its own: while one stores its tokens, the others keep the tensor cores busy. Of one
// more, a warp or two for each of them copy rows of pixels, as they lie in memory, to shared
// memory, from where operands are read into registers; all of it share the prefix tokens, from the
// last warp on. With a LayerNorm, the blocks of a cluster hold all columns and add up its
// statistics.
#pragma once

#include <cstdint>

#include "common/hopper.h"
#include "common/launch.h"
#include "common/wgmma.h"
#include "patch_embed/config.h"
#include "patch_embed/pixels.h"
#include "patch_embed/products.h"
#include "patch_embed/tiles.h"
#include "patch_embed/tokens.h"
#include "patch_embed/weights.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {

// All tiles of one warpgroup.
template <typename C>
__device__ __forceinline__ void embed_tiles(const VlmkPatchEmbedParams& p, const Schedule& s,
                                            char* shared, int group, Barriers barriers,
                                            int first_column) {
  const int lane = lane_index();
  const int warp = group_thread() / 32;
  const uint32_t pixels = shared_address(shared + C::kPixels) + group * C::kRingBytes;
  const uint64_t weights = plain_descriptor(shared_address(shared), C::kWeightStride);
  const auto* scales = reinterpret_cast<const float*>(shared + C::kAffine);
  const float* biases = scales + C::kColumns;
  const auto* norm_weights = reinterpret_cast<const typename C::Token*>(shared + C::kNorm);
  // Of two tiles, each with its barrier: a block that has all others' may be one ahead of a block
  // that doesn't have them yet.
  auto* statistics =
      reinterpret_cast<float2*>(shared + C::kStatistics) + group * 2 * kMaxCluster * kTile;
  const int column_here = 8 * (lane % 4), column = first_column + column_here;
  const int worker = static_cast<int>(blockIdx.x) / s.cluster / s.column_groups;
  const int next_group = group + 1 < C::kGroups ? group + 1 : 0;
  const uint32_t next_turn = barriers.turn() + (next_group - group) * kBarrierBytes;
  Ring<C> ring(0);
  uint32_t done = 0;
  // Warpgroups take turns. Those that began a tile together would also store together, while the
  // tensor cores wait, and nothing would pull them apart again.
  const bool in_turn = s.tiles > 2 * C::kGroups * s.clusters;
  for (int tile = worker + group * s.clusters; tile < s.tiles; tile += C::kGroups * s.clusters) {
    const Tile t = tile_at<C>(s, tile);
    int patch[2];
    uint32_t address[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      patch[h] = t.first_patch + C::patch_of(warp, h, lane / 4);
      // Neighbours stay neighbours at the end.
      const int there = min(patch[h], t.last_patch - (C::kPatch == 14 ? 1 - h : 0));
      const int row = s.width.divide(there), x = there - row * s.width.divisor;
      const int behind = row - t.first_row - 1;
      address[h] = pixels + (behind < 0 ? t.shift + (x - t.first_x) * C::kRowBytes
                                        : t.first_bytes + behind * t.row_bytes + x * C::kRowBytes);
    }
    typename C::Sum sum[C::kSums];
    Positions<C> positions;
    const auto hand_over = [&] {
      if (in_turn && group_thread() == 0) barrier_arrive(next_turn);
    };
    const auto ending = [&] {
      positions.load(p, s, patch, column);
      stay_behind(p.batch < 0);
    };
    if (in_turn && group + done > 0) barrier_wait(barriers.turn(), (done - (group == 0)) & 1);
    multiply<C>(sum, address, weights, barriers, ring, hand_over, ending);

    // ptxas would unpack the positions, and so wait for them, before the last products, and load
    // them not much earlier.
    stay_behind(p.batch < 0);
    float total[C::kTotals];
    add_up<C>(total, sum, positions, scales + column_here, biases + column_here);
    if constexpr (C::kNormed) {
      normalise<C>(p, s, total, patch, column, norm_weights + column_here,
                   norm_weights + C::kColumns + column_here,
                   statistics + (done & 1) * kMaxCluster * kTile, barriers.statistics(done & 1),
                   done >> 1 & 1);
    }
    store_tokens<C>(p, s, p.out, total, patch, column);
    ++done;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    patch_embed_kernel(const __grid_constant__ VlmkPatchEmbedParams p,
                       const __grid_constant__ Schedule s) {
  extern __shared__ __align__(128) char shared[];
  const int warp = warp_index();
  const int column_group = static_cast<int>(blockIdx.x) / s.cluster % s.column_groups;
  const int first_column =
      (column_group * s.cluster + static_cast<int>(cluster_rank())) * C::kColumns;
  const Barriers all{shared_address(shared + C::kBarriers)};
  if (threadIdx.x == 0) {
    for (int group = 0; group < C::kGroups; ++group) {
      const Barriers barriers{all.base + group * kBarrierBytes};
      for (int slot = 0; slot < C::kSlots; ++slot) {
        for (int half = 0; half < 2; ++half) {
          barrier_init(barriers.full(slot, half), 32 * C::kFeeders);
          barrier_init(barriers.empty(slot, half), 4);
        }
      }
      barrier_init(barriers.turn(), 1);
      for (int set = 0; set < 2; ++set) barrier_init(barriers.statistics(set), 1);
    }
    fence_barrier_init();
  }
  tabulate_rows<C>(p, reinterpret_cast<int64_t*>(shared + C::kRowTable));
  auto* scales = reinterpret_cast<float*>(shared + C::kAffine);
  load_weights<C>(p, first_column, shared, scales, scales + C::kColumns);
  if constexpr (C::kNormed)
    load_norm<C, C::kThreads>(p, first_column,
                              reinterpret_cast<typename C::Token*>(shared + C::kNorm));
  fence_async_proxy();
  cluster_sync();

  if (warp >= 4 * C::kGroups) {
    shrink_registers<C::kProducerRegisters>();
    const int feeder = warp - 4 * C::kGroups, group = feeder / C::kFeeders;
    if (group < C::kGroups) {
      copy_pixels<C>(p, s, group, feeder % C::kFeeders,
                     shared_address(shared + C::kPixels) + group * C::kRingBytes,
                     reinterpret_cast<const int64_t*>(shared + C::kRowTable),
                     {all.base + group * kBarrierBytes});
    }
    // The last warp has nothing else to do, or has done its part before the last tiles are.
    const int tokens_per_image = p.grid_y * p.grid_x + p.num_prefix;
    const int blocks = static_cast<int>(gridDim.x);
    for (int row = static_cast<int>(blockIdx.x) + (3 - feeder) * blocks;
         row < p.batch * p.num_prefix; row += 4 * blocks) {
      prefix_token<C>(p, row, tokens_per_image);
    }
  } else {
    grow_registers<C::kConsumerRegisters>();
    const int group = warp / 4;
    embed_tiles<C>(p, s, shared, group, {all.base + group * kBarrierBytes}, first_column);
  }
  // No block leaves while others may still write to it.
  cluster_sync();
}

}  // namespace patch_embed
}  // namespace vlmk

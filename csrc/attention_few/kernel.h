// SPDX-License-Identifier: Apache-2.0
// Attention for few queries, which takes as long as its keys and values take to be read: once.
//
// A block takes one key head of one batch entry after another, with all rows that read it, or one
// tile of 64 queries of a head after another; where these are few, a cluster of blocks shares out
// the keys. Several blocks stand on a
// multiprocessor, so that one's copies run beside another's products.
#pragma once

#include <cstdint>

#include "attention_few/config.h"
#include "attention_few/loader.h"
#include "attention_few/store.h"
#include "attention_few/tiles.h"
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_few {

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    attention_few_kernel(const __grid_constant__ VlmkAttentionParams p,
                         const __grid_constant__ Maps maps, const __grid_constant__ Items items) {
  extern __shared__ __align__(1024) char shared[];
  const Barriers barriers{shared_address(shared + C::kBarriersAt)};
  const int ranks = static_cast<int>(cluster_size());
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0);
  Loader<C> loader{p, maps, shared_address(shared), barriers, items};
  loader.stride = static_cast<int>(gridDim.x) / ranks;
  int item = static_cast<int>(blockIdx.x) / ranks;
  loader.item = item - loader.stride;
  if (warp == 0) {
    if (lane_index() == 0) {
      // All at once: what is described is read from memory first.
      prefetch_map(maps.queries);
      prefetch_map(maps.keys);
      prefetch_map(maps.values);
      if constexpr (C::kNarrow) {
        prefetch_map(maps.last_keys);
        prefetch_map(maps.last_values);
      }
      barrier_init(barriers.rows_full(), 1);
#pragma unroll 1
      for (int stage = 0; stage < C::kStages; ++stage) {
        barrier_init(barriers.full(stage), 1);
        barrier_init(barriers.empty(stage), C::kThreads / 32);
      }
      fence_barrier_init();
    }
    let_next_grid_start();
    wait_for_previous_grids();
    if (lane_index() == 0) loader.load_rows(item);
    __syncwarp();
    // -1 finds the first tile, in the place that finds the next ones: its code is large.
#pragma unroll 1
    for (int stage = -1; stage < C::kStages; ++stage) loader.load(stage);
  }
  Tiles<C> tiles{p, shared, barriers, warp};
  const bool tiled = items.tiles_of_head > 0;
  const int rows = tiled ? C::kRows : p.num_queries * items.group;
  tiles.name_rows(rows, tiled);
  tiles.clear_rows(rows);
  __syncthreads();
  wait_for_previous_grids();
#pragma unroll 1
  for (; item < items.count; item += loader.stride) {
    tiles.at_hand = rows_of_item<C>(p, items, item);
    tiles.span = span_of_rows<C>(p, items, tiles.at_hand);
    tiles.take_rows();
    if (threadIdx.x == 0 && item + loader.stride < items.count) {
      loader.load_rows(item + loader.stride);
    }
    __syncwarp();
    tiles.run(loader);
    if (ranks > 1) {
      combine_rows(tiles);
    } else {
      store_rows(tiles);
    }
  }
}

}  // namespace attention_few
}  // namespace vlmk

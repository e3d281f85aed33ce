// SPDX-License-Identifier: Apache-2.0
// Attention for few queries, which takes as long as its keys and values take to be read: once.
//
// A block, or a cluster that shares out the keys, has one key head of one batch entry and all rows
// that read it. Several blocks stand on a multiprocessor, so that there are always copies under
// way.
#pragma once

#include <cstdint>

#include "attention/rows.h"
#include "attention_few/config.h"
#include "attention_few/store.h"
#include "attention_few/tiles.h"
#include "common/hopper.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_few {

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    attention_few_kernel(const __grid_constant__ VlmkAttentionParams p,
                         const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char shared[];
  const Barriers barriers{shared_address(shared + C::kBarriersAt)};
  const int rank = static_cast<int>(cluster_rank()), ranks = static_cast<int>(cluster_size());
  const Head head = attention::head_of_item(p, static_cast<int>(blockIdx.x) / ranks);
  if (threadIdx.x == 0) {
    barrier_init(barriers.rows_full(), 1);
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(barriers.full(stage), 1);
      barrier_init(barriers.empty(stage), C::kThreads / 32);
    }
    fence_barrier_init();
  }
  const int4 bounds = attention::bounds_of_rows(p, head.batch);
  const int num_tiles = max(ceil_div(bounds.y - bounds.x, C::kKeys), 0);
  Tiles<C> tiles{p, maps, head, shared, barriers, bounds};
  tiles.begin = static_cast<int>(int64_t{num_tiles} * rank / ranks);
  tiles.end = static_cast<int>(int64_t{num_tiles} * (rank + 1) / ranks);
  if (threadIdx.x == 0) tiles.load_first();
  tiles.clear_rows();
  __syncthreads();
  tiles.run();
  if (ranks > 1) {
    combine_rows(tiles);
  } else {
    store_rows(tiles);
  }
}

}  // namespace attention_few
}  // namespace vlmk

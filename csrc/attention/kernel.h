// SPDX-License-Identifier: Apache-2.0
// Attention forward in one kernel, after FlashAttention-3 (Shah et al. 2024): a producer warp and
// two to four warpgroups that multiply, each 64 queries of the block's tile.
#pragma once

#include "attention/config.h"
#include "attention/consumer.h"
#include "attention/order.h"
#include "attention/producer.h"
#include "attention/tail.h"
#include "common/hopper.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    attention_kernel(const __grid_constant__ VlmkAttentionParams p,
                     const __grid_constant__ Maps maps, const __grid_constant__ Schedule s) {
  extern __shared__ __align__(1024) char shared[];
  const Barriers barriers{shared_address(shared + C::kBarriersAt)};
  const bool tails = C::kTails && s.main_queries < p.num_queries;
  if (threadIdx.x == 0) {
    const int readers = 4 * C::kGroups + (tails ? kTailWarps : 0);
    for (int stage = 0; stage < C::kQueryStages; ++stage) {
      barrier_init(barriers.queries_full(stage), 1);
      barrier_init(barriers.queries_empty(stage), readers);
    }
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(barriers.keys_full(stage), 1);
      barrier_init(barriers.keys_empty(stage), readers);
      barrier_init(barriers.values_full(stage), 1);
      barrier_init(barriers.values_empty(stage), readers);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= 4 * C::kGroups) {
    shrink_registers<C::kProducerRegisters>();
    const int helper = warp - 4 * C::kGroups - 1;
    if (helper < 0) {
      Producer<C>{p, maps, s, shared, barriers}.run();
    } else if (C::kMasked) {
      Order<C>{p, s, shared, helper}.run();
    } else if (tails) {
      if constexpr (C::kTails) {
        Tail<C>{p, s, shared, barriers, helper}.run();
      }
    }
  } else {
    grow_registers<C::kConsumerRegisters>();
    Consumer<C> consumer{p, maps, s, shared, barriers, warp / 4};
    consumer.run();
  }
}

}  // namespace attention
}  // namespace vlmk

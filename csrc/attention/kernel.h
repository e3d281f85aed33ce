// SPDX-License-Identifier: Apache-2.0
// Attention forward in one kernel, after FlashAttention-3 (Shah et al. 2024): a producer warp and
// two to four warpgroups that multiply, each 64 queries of the block's tile.
#pragma once

#include "attention/config.h"
#include "attention/consumer.h"
#include "attention/producer.h"
#include "common/hopper.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_kernel(const __grid_constant__ VlmkAttentionParams p,
                     const __grid_constant__ Maps maps, const __grid_constant__ Schedule s) {
  extern __shared__ __align__(1024) char shared[];
  const Barriers barriers{shared_address(shared + C::kBarriersAt)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kQueryStages; ++stage) {
      barrier_init(barriers.queries_full(stage), 1);
      barrier_init(barriers.queries_empty(stage), 4 * C::kGroups);
    }
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(barriers.keys_full(stage), 1);
      barrier_init(barriers.keys_empty(stage), 4 * C::kGroups);
      barrier_init(barriers.values_full(stage), 1);
      barrier_init(barriers.values_empty(stage), 4 * C::kGroups);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0);
  if (warp >= 4 * C::kGroups) {
    shrink_registers<C::kProducerRegisters>();
    if (warp == 4 * C::kGroups) Producer<C>{p, maps, s, shared, barriers}.run();
  } else {
    grow_registers<C::kConsumerRegisters>();
    constexpr float kLog2E = 1.4426950408889634f;
    Consumer<C> consumer{p, maps, shared, barriers, warp / 4, p.scale * kLog2E};
    consumer.run();
  }
}

}  // namespace attention
}  // namespace vlmk

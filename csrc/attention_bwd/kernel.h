// SPDX-License-Identifier: Apache-2.0
// Attention's backward pass in one kernel, after FlashAttention-3 (Shah et al. 2024), but with a
// warpgroup of its own for dQ: the two that have the keys wait for nobody but memory, and so the
// exponentials of one run beside the products of the others.
#pragma once

#include "attention_bwd/adder.h"
#include "attention_bwd/config.h"
#include "attention_bwd/halves.h"
#include "attention_bwd/keys.h"
#include "attention_bwd/pairs.h"
#include "attention_bwd/producer.h"
#include "attention_bwd/queries.h"
#include "attention_bwd/rounding.h"
#include "attention_bwd/rows.h"
#include "common/hopper.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    attention_bwd_kernel(const __grid_constant__ VlmkAttentionBwdParams p,
                         const __grid_constant__ Maps maps, const __grid_constant__ Schedule s,
                         const __grid_constant__ Workspace w) {
  extern __shared__ __align__(1024) char shared[];
  const Barriers barriers{shared_address(shared + C::kBarriersAt)};
  if (threadIdx.x == 0) {
    for (int stage = 0; stage < C::kItemStages; ++stage) {
      barrier_init(barriers.keys_full(stage), 1);
      barrier_init(barriers.keys_empty(stage), 4 * C::kGroups);
    }
    barrier_init(barriers.values_full(), 1);
    barrier_init(barriers.values_empty(), 4 * C::kGroups);
    for (int stage = 0; stage < C::kScoreStages; ++stage) {
      barrier_init(barriers.scores_full(stage), 4 * kKeyGroups);
      barrier_init(barriers.scores_empty(stage), C::kWide ? 4 * kKeyGroups : 4);
    }
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(barriers.queries_full(stage), 1);
      barrier_init(barriers.queries_empty(stage), 4 * C::kGroups);
    }
    fence_barrier_init();
  }
  __syncthreads();
  const int group = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 128, 0);
  const Rounding<C> rounding{p, s, w, shared};
  if (group < kKeyGroups) {
    grow_registers<C::kKeyRegisters>();
    if constexpr (C::kHalves) {
      HalfGroup<C> halves{{{p, maps, s, w, shared, barriers, group}}};
      const auto attend = [&](int first_key) { halves.attend(first_key); };
      halves.run(attend, attend, [] {});
    } else if constexpr (C::kWide) {
      const auto run = [](auto pairs) {
        pairs.run([&](int first_key) { pairs.template attend<false>(first_key); },
                  [&](int first_key) { pairs.template attend<true>(first_key); },
                  [&] { pairs.end_all(); });
      };
      constexpr int kRest = C::kWidth - C::kColumnsOfSums;  // of dQ, columns of the second
      if (kRest == C::kColumnsOfSums || group == 0) {
        run(PairGroup<C>{{p, maps, s, w, shared, barriers, group}});
      } else {
        run(PairGroup<C, kRest>{{p, maps, s, w, shared, barriers, group}});
      }
    } else {
      KeyGroup<C> keys{p, maps, s, w, shared, barriers, group};
      keys.run();
    }
    if (!C::kWhole) rounding.round_all(group);
  } else if (!C::kWide && group == kKeyGroups) {
    if constexpr (!C::kWide) {
      shrink_registers<C::kQueryRegisters>();
      QueryGroup<C> queries{p, s, w, shared, barriers};
      queries.run();
      if (!C::kWhole) rounding.leave();
    }
  } else {
    shrink_registers<C::kProducerRegisters>();
    const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32 % 4, 0);
    if (warp == 0) {
      Producer<C>{p, maps, s, w, shared, barriers}.run();
      if (!C::kWhole) typename Rounding<C>::Loader{rounding}.run();
    } else if (C::kCopiedSums && warp <= kKeyGroups) {
      Adder<C>{p, s, w, shared, warp - 1}.run();
      if (!C::kWhole) rounding.leave();
    } else if (warp == 3 && !C::kWhole) {
      clear_others<C>(p, s, w);
    }
  }
}

}  // namespace attention_bwd
}  // namespace vlmk

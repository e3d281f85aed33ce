// SPDX-License-Identifier: Apache-2.0
// The kernel of all gradients: what its threads do with the tiles of the schedule.
#pragma once

#include <cstdint>

#include "contrastive/logits.h"
#include "contrastive/products.h"
#include "contrastive/schedule.h"

namespace vlmk {
namespace contrastive {

constexpr int kMembers = kBlocks * kGroups;  // warpgroups that have a part of a tile

__device__ __forceinline__ int load_counter(const int32_t* counter) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}

// What other clusters stored before they counted can be read, also by copies.
__device__ __forceinline__ void see_what_was_counted() {
  __threadfence();
  fence_async_proxy_global();
}

// The thread that copies.
template <int kColumns>
__device__ __forceinline__ void copy_all(const Job& p, const Maps& maps, StageRing ring) {
  for_tiles<kColumns>(
      p,
      [&](int number, const Visit& visit, int tile) {
        if (number >= kPanels) {
          const Panel before = visit_of(p, number - kPanels).panel;
          const int wanted = kMembers * tiles_of_products<kColumns>(p, before);
          while (load_counter(counters_of_products(p) + number - kPanels) < wanted) {
          }
          see_what_was_counted();
        }
        copy_logits(p, maps, visit.panel, tile, ring);
      },
      [&](int number, const Visit& visit, int tile) {
        const GradientTile t = gradient_tile<kColumns>(p, visit, tile);
        const int wanted = kMembers * tiles_of_logits(visit.panel);
        bool ready;
        do {
          const int logits = load_counter(counters_of_logits(p) + number);
          const int first = load_counter(t.turns), second = load_counter(t.turns + 1);
          ready = logits >= wanted && min(first, second) >= t.turns_before;
        } while (!ready);
        see_what_was_counted();
        copy_products<kColumns>(p, maps, visit, t, ring);
      });
}

// The warp that tells the others what a warpgroup has stored. That takes until all of it has
// arrived, which the warpgroup does not wait for.
template <int kColumns>
__device__ __forceinline__ void publish_all(const Job& p, int group) {
  const auto publish = [&](int32_t* counter, int32_t* turns) {
    named_wait<160>(kStoredBarrier + group);
    if (lane_index() == 0) {
      __threadfence();
      if (turns) atomicAdd(turns, 1);
      atomicAdd(counter, 1);
    }
    __syncwarp();
    named_arrive<160>(kPublishedBarrier + group);
  };
  for_tiles<kColumns>(
      p, [&](int number, const Visit&, int) { publish(counters_of_logits(p) + number, nullptr); },
      [&](int number, const Visit& visit, int tile) {
        const GradientTile t = gradient_tile<kColumns>(p, visit, tile);
        publish(counters_of_products(p) + number, t.turns + group);
      });
}

// A warpgroup that multiplies.
template <int kColumns, bool kWideB, typename Work>
__device__ __forceinline__ void work_on_all(const Job& p, Work& work, StageRing ring, int group) {
  bool first_tile = true;
  float products[kSums];  // of every tile: those of two kinds would not fit in registers together
  const auto before = [&] {
    if (!first_tile) named_wait<160>(kPublishedBarrier + group);
  };
  const auto stored = [&] {
    fence_async_proxy_global();
    named_arrive<160>(kStoredBarrier + group);
    first_tile = false;
  };
  for_tiles<kColumns>(
      p,
      [&](int, const Visit& visit, int tile) {
        work_on_logits(work, visit.panel, tile, products, ring, group, first_tile, before);
        stored();
      },
      [&](int, const Visit& visit, int tile) {
        const GradientTile t = gradient_tile<kColumns>(p, visit, tile);
        if (t.of_b) {
          add_products<Work, kColumns, true, kWideB>(p, visit, t, products, ring, group, first_tile,
                                                     before);
        } else {
          add_products<Work, kColumns, false, false>(p, visit, t, products, ring, group, first_tile,
                                                     before);
        }
        stored();
      });
  before();
  work.end(p.sums);
}

template <typename Work, int kColumns, bool kWideB>
__global__ void __launch_bounds__(kThreads, 1)
    contrastive_gradients_kernel(const __grid_constant__ Job p, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char shared[];
  run<kConsumerRegisters, kProducerRegisters>(
      StageRing(shared_address(shared)), [&](StageRing ring) { copy_all<kColumns>(p, maps, ring); },
      [&](StageRing ring, int group) {
        float* scratch = reinterpret_cast<float*>(shared + Layout::kScratch);
        Work work(p, group, scratch + group * kScratchFloats);
        work_on_all<kColumns, kWideB>(p, work, ring, group);
      },
      [&](int group) { publish_all<kColumns>(p, group); });
}

}  // namespace contrastive
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The kernel of all gradients: what its threads do with the tiles of the schedule.
#pragma once

#include <cstdint>
#include <type_traits>

#include "contrastive/logits.h"
#include "contrastive/products.h"
#include "contrastive/schedule.h"

namespace vlmk {
namespace contrastive {

constexpr int kMembers = kBlocks * kGroups;  // warpgroups that have a part of a tile

__device__ __forceinline__ int load_counter(const Job& p, int counter) {
  int value;
  asm volatile("ld.relaxed.gpu.global.s32 %0, [%1];"
               : "=r"(value)
               : "l"(p.counters + counter)
               : "memory");
  return value;
}

// What other clusters stored before they counted can be read, also by copies.
__device__ __forceinline__ void see_what_was_counted() {
  __threadfence();
  fence_async_proxy_global();
}

// The thread that copies.
__device__ __forceinline__ void copy_all(const Job& p, const Maps& maps, Dealer dealer) {
  for_tiles(
      p, dealer,
      [&](int number, const Visit& visit, int tile) {
        set_logits(dealer.task(), p, visit.panel, tile, counter_of_logits(number));
        if (number >= p.kept_panels) {
          const Panel before = visit_of(p, number - p.kept_panels).panel;
          const int wanted = kMembers * tiles_of_products(p, before);
          while (load_counter(p, counter_of_products(p, number - p.kept_panels)) < wanted) {
          }
          see_what_was_counted();
        }
        copy_logits(maps, dealer);
      },
      [&](int number, const Visit& visit, int tile) {
        Task& task = dealer.task();
        const int turns_before = set_products(task, p, visit, tile, counter_of_products(p, number));
        const int wanted = kMembers * tiles_of_logits(visit.panel);
        bool ready;
        do {
          const int logits = load_counter(p, counter_of_logits(number));
          const int first = load_counter(p, task.turns), second = load_counter(p, task.turns + 1);
          ready = logits >= wanted && min(first, second) >= turns_before;
        } while (!ready);
        see_what_was_counted();
        if (is_narrow(p, task)) {
          copy_products<kNarrow>(maps, visit, dealer);
        } else {
          copy_products<kTile>(maps, visit, dealer);
        }
      });
  dealer.end();
}

// The warp that tells the others what a warpgroup has stored. That takes until all of it has
// arrived, which the warpgroup does not wait for.
__device__ __forceinline__ void publish_all(const Job& p, const char* shared, int group) {
  const Task* tasks = reinterpret_cast<const Task*>(shared + Layout::kTaskPlace);
  for (unsigned count = 0;; ++count) {
    named_wait<160>(kStoredBarrier + group);
    const Task& task = tasks[count % kTasks];
    if (task.kind == kNoMore) return;
    if (lane_index() == 0) {
      __threadfence();
      if (task.turns >= 0) atomicAdd(p.counters + task.turns + group, 1);
      atomicAdd(p.counters + task.counter, 1);
    }
    __syncwarp();
    named_arrive<160>(kPublishedBarrier + group);
  }
}

// A warpgroup that multiplies.
template <bool kWideB, typename Work>
__device__ __forceinline__ void work_on_all(const Job& p, Work& work, const char* shared,
                                            StageRing ring, int group) {
  float products[kSums];  // of every tile: those of two kinds would not fit in registers together
  const bool any = for_tasks(shared, ring, [&](const Task& task, bool first) {
    const auto before = [&] {
      if (!first) named_wait<160>(kPublishedBarrier + group);
    };
    const auto multiply_and_add = [&](auto columns) {
      constexpr int kColumns = decltype(columns)::value;
      if (task.kind == kGradientA) {
        add_products<Work, kColumns, false, false>(p, task, products, ring, group, first, before);
      } else {
        add_products<Work, kColumns, true, kWideB>(p, task, products, ring, group, first, before);
      }
    };
    if (task.kind == kLogits) {
      work_on_logits(work, task, products, ring, group, first, before);
    } else if (is_narrow(p, task)) {
      multiply_and_add(std::integral_constant<int, kNarrow>());
    } else {
      multiply_and_add(std::integral_constant<int, kTile>());
    }
    fence_async_proxy_global();
    named_arrive<160>(kStoredBarrier + group);
  });
  if (any) named_wait<160>(kPublishedBarrier + group);
  named_arrive<160>(kStoredBarrier + group);  // that there are no more
  work.end(p.sums);
}

template <typename Work, bool kWideB>
__global__ void __launch_bounds__(kThreads, 1)
    contrastive_gradients_kernel(const __grid_constant__ Job p, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char shared[];
  const StageRing stages(shared_address(shared));
  if (threadIdx.x == 0) Dealer::init(stages);
  run<kConsumerRegisters, kProducerRegisters>(
      stages, [&](const StageRing& ring) { copy_all(p, maps, Dealer(ring, shared, p.counters)); },
      [&](StageRing ring, int group) {
        float* scratch = reinterpret_cast<float*>(shared + Layout::kScratch);
        Work work(p, group, scratch + group * kScratchFloats);
        work_on_all<kWideB>(p, work, shared, ring, group);
      },
      [&](int group) { publish_all(p, shared, group); });
}

}  // namespace contrastive
}  // namespace vlmk

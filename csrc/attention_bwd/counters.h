// SPDX-License-Identifier: Apache-2.0
// What blocks tell each other, in the workspace. All begins as zeros.
#pragma once

#include "attention/ranges.h"
#include "attention_bwd/config.h"
#include "common/hopper.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

struct Counters {
  int* first;
  const Schedule& schedule;

  __device__ __forceinline__ Counters(const VlmkAttentionBwdParams& p, const Schedule& s,
                                      const Workspace& w)
      : first(reinterpret_cast<int*>(static_cast<char*>(p.workspace) + w.counters)), schedule(s) {}

  // Tiles of keys, and of queries whose sums are to be cleared, then rounded, that somebody has.
  __device__ __forceinline__ int* items() const { return first; }
  __device__ __forceinline__ int* to_clear() const { return first + 1; }
  __device__ __forceinline__ int* to_round() const { return first + 2; }
  // Tiles of queries whose sums are clear, of those that read a head of keys.
  __device__ __forceinline__ int* cleared(int head) const { return first + 3 + head; }
  // Of a chunk of a head's keys, what has been added to dQ: Config::kDone for each tile.
  __device__ __forceinline__ int* done(int chunk) const { return cleared(schedule.heads) + chunk; }

  // By a warp, once what it wrote, and what it waited for, can be read.
  static __device__ __forceinline__ void add(int* counter) {
    __threadfence();
    __syncwarp();
    if (attention::lane_index() == 0) atomicAdd(counter, 1);
  }
};

// How many of a warp's lanes come before the first of which it does not hold.
__device__ __forceinline__ int leading(bool holds) {
  const unsigned others = ~__ballot_sync(kAllLanes, holds);
  return others == 0 ? 32 : __ffs(static_cast<int>(others)) - 1;
}

}  // namespace attention_bwd
}  // namespace vlmk

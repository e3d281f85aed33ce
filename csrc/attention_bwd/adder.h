// SPDX-License-Identifier: Apache-2.0
// The warp that has the copy engine add a warpgroup's sums of dQ to those in memory. The warpgroup
// itself would wait until an addition has read what it has left in shared memory, and for the fence
// before it: with a warp for that, and the fence there, D 128 takes 4.49 instead of 4.98 ms (8192
// tokens, H200).
#pragma once

#include <cstdint>

#include "attention/ranges.h"
#include "attention_bwd/config.h"
#include "attention_bwd/counters.h"
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

// Named barriers, each the first of one for each warpgroup, at which it meets its adder.
constexpr int kStagingFree = 5, kStagingFull = 7;
constexpr int kGiveThreads = 128 + 32;
// Instead of a tile: behind the last sums, and behind an item's, with its counter subtracted.
constexpr int kNoTile = -1, kItemDone = -2;

template <typename C>
struct Adder {
  const VlmkAttentionBwdParams& p;
  const Schedule& schedule;
  const Workspace& workspace;
  char* shared;
  int group;  // whose sums it adds

  __device__ __forceinline__ void run() const {
    constexpr int kFirst = C::kColumnsOfSums, kRest = C::kWidth - kFirst;
    const int bytes = (group == 0 ? kFirst : kRest) * kQueries * 4;
    const uint32_t staging = shared_address(shared) + C::sums_staging_at(group);
    char* sums = static_cast<char*>(p.workspace) + workspace.dq + group * kFirst * kQueries * 4;
#pragma unroll 1
    while (true) {
      if (attention::lane_index() == 0) store_wait_read();
      __syncwarp();
      named_arrive<kGiveThreads>(kStagingFree + group);
      named_wait<kGiveThreads>(kStagingFull + group);
      const int tile = staged_tile_at<C>(shared, group);
      if (tile == kNoTile) return;
      if (tile <= kItemDone) {
        if (attention::lane_index() == 0) store_wait();
        Counters::add(Counters(p, schedule, workspace).done(kItemDone - tile));
        continue;
      }
      fence_async_proxy();
      if (attention::lane_index() == 0) {
        add_to_global(sums + int64_t{tile} * (C::kWidth * kQueries * 4), staging, bytes);
        store_commit();
      }
      __syncwarp();
    }
  }
};

}  // namespace attention_bwd
}  // namespace vlmk

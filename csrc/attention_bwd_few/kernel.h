// SPDX-License-Identifier: Apache-2.0
// Attention's backward pass for few queries, in one kernel: K and V are read once, dK and dV
// written once.
//
// A block, or a cluster that shares out the keys, has one key head of one batch entry and all rows
// that read it. Those stay in shared memory; keys and values pass by, and what a tile of them gives
// is complete at once and stored from where the tile lay. dQ is summed in registers.
#pragma once

#include <cstdint>

#include "attention/rows.h"
#include "attention_bwd_few/config.h"
#include "attention_bwd_few/queries.h"
#include "attention_bwd_few/tiles.h"
#include "common/hopper.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd_few {

// Keys that no row sees have no gradient: those before and behind the tiles that are visited.
template <typename C>
__device__ __forceinline__ void clear_gradients(const VlmkAttentionBwdParams& p, const Head& head,
                                                int before, int behind) {
  const int chunks = p.dim / 8, unseen = before + max(p.num_keys - behind, 0);
  const int threads = C::kThreads * static_cast<int>(cluster_size());
  int i = static_cast<int>(cluster_rank()) * C::kThreads + static_cast<int>(threadIdx.x);
#pragma unroll 1
  for (; i / chunks < unseen; i += threads) {
    const int row = i / chunks;
    const int64_t key = row < before ? row : behind + row - before;
    const int64_t of_batch = head.batch * int64_t{p.num_keys} + key;
    const int chunk = head.head * chunks + i % chunks;
    static_cast<uint4*>(p.dk)[of_batch * (p.dk_stride_s / 8) + chunk] = make_uint4(0, 0, 0, 0);
    static_cast<uint4*>(p.dv)[of_batch * (p.dv_stride_s / 8) + chunk] = make_uint4(0, 0, 0, 0);
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kBlocks)
    attention_bwd_few_kernel(const __grid_constant__ VlmkAttentionBwdParams p,
                             const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char shared[];
  const Barriers barriers{shared_address(shared + C::kBarriersAt)};
  const int rank = static_cast<int>(cluster_rank()), ranks = static_cast<int>(cluster_size());
  const int item = static_cast<int>(blockIdx.x) / ranks;
  const Head head = attention::head_of_item(p, item);
  if (threadIdx.x == 0) {
    barrier_init(barriers.queries_full(), 1);
    for (int stage = 0; stage < C::kStages; ++stage) {
      barrier_init(barriers.full(stage), 1);
      barrier_init(barriers.empty(stage), C::kThreads / 32);
    }
    fence_barrier_init();
    load_queries<C>(p, maps, head, shared, barriers.queries_full());
  }
  const int4 bounds = attention::bounds_of_run(p, head.batch, 0, p.num_queries);
  const int first = bounds.y > bounds.x ? bounds.x / C::kKeys : 0;
  const int tiles = bounds.y > bounds.x ? ceil_div(bounds.y, C::kKeys) - first : 0;
  // By a shuffle, which is the same to all lanes: what products read is described in registers
  // else.
  const int warp = __shfl_sync(kAllLanes, static_cast<int>(threadIdx.x) / 32, 0);
  Tiles<C> work{p, maps, head, shared, barriers, bounds, warp};
  work.begin = first + static_cast<int>(int64_t{tiles} * rank / ranks);
  work.end = first + static_cast<int>(int64_t{tiles} * (rank + 1) / ranks);
  if (threadIdx.x == 0) work.load_first();
  prepare_rows<C>(p, head, shared);
  __syncthreads();
  barrier_wait(barriers.queries_full(), 0);
  work.run();
  clear_gradients<C>(p, head, first * C::kKeys, (first + tiles) * C::kKeys);
  store_queries<C>(p, head, shared, work.dq);
}

}  // namespace attention_bwd_few
}  // namespace vlmk

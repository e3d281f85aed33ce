// SPDX-License-Identifier: Apache-2.0
// The warp that feeds a block: it takes tiles of queries in order, finds the keys that they see,
// and copies queries, keys and values to shared memory.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "attention/config.h"
#include "attention/ranges.h"
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

struct Maps {
  CUtensorMap queries, keys, values;
};

// Over the last tile of `section` heads first, then the one before it: the longest rows of a causal
// mask start first, while the keys of a section stay in L2. Lane g is given the bounds of warpgroup
// g's queries.
template <typename C>
__device__ __forceinline__ Work work_of_tile(const VlmkAttentionParams& p, const Schedule& s,
                                             int tile, int4& own_bounds) {
  const int per_section = s.section * s.tiles_of_head;
  const int section = tile / per_section, inside = tile - section * per_section;
  const int heads = min(s.section, p.batch * p.num_heads - section * s.section);
  const int head = section * s.section + inside % heads;
  Work work;
  work.batch = head / p.num_heads;
  work.head = head - work.batch * p.num_heads;
  work.first_query = (s.tiles_of_head - 1 - inside / heads) * C::kQueries;
  int lo = p.num_keys, hi = 0;
#pragma unroll
  for (int group = 0; group < C::kGroups; ++group) {
    const int4 bounds = bounds_of_queries(p, work.batch, work.first_query + group * kGroupQueries);
    if (lane_index() == group) own_bounds = bounds;
    lo = min(lo, bounds.x);
    hi = max(hi, bounds.y);
  }
  work.first_key = lo;
  work.stop_key = hi;
  work.num_tiles = hi > lo ? ceil_div(hi - lo, C::kKeys) : 0;
  return work;
}

// All panels of a tile.
template <typename C, int kRows>
__device__ __forceinline__ void copy_panels(uint32_t destination, const CUtensorMap& map, int row,
                                            int head, int batch, uint32_t barrier) {
  barrier_expect(barrier, kRows * C::kRow);
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    copy_tile(destination + panel * kRows * kRowBytes, map, panel * kPanel, row, head, batch,
              barrier);
  }
}

// The copies of keys and values, in the order in which they are used: the scores of a tile come
// before the sum of the values of the tile before. By one thread.
template <typename C>
__device__ __forceinline__ void copy_tiles(const Maps& maps, const Work& work, int head,
                                           uint32_t shared, const Barriers& barriers,
                                           Ring<C::kStages>& keys, Ring<C::kStages>& values) {
#pragma unroll 1
  for (int i = 0; i <= work.num_tiles; ++i) {
    const int row = work.first_key + i * C::kKeys;
    if (i < work.num_tiles) {
      barrier_wait(barriers.keys_empty(keys.stage), keys.parity);
      copy_panels<C, C::kKeys>(shared + C::kKeysAt + keys.stage * C::kTileBytes, maps.keys, row,
                               head, work.batch, barriers.keys_full(keys.stage));
      keys.advance();
    }
    if (i > 0) {
      barrier_wait(barriers.values_empty(values.stage), values.parity);
      copy_panels<C, C::kKeys>(shared + C::kValuesAt + values.stage * C::kTileBytes, maps.values,
                               row - C::kKeys, head, work.batch,
                               barriers.values_full(values.stage));
      values.advance();
    }
  }
}

template <typename C>
__device__ __forceinline__ void produce(const VlmkAttentionParams& p, const Maps& maps,
                                        const Schedule& s, char* shared, const Barriers& barriers) {
  const bool leader = lane_index() == 0;
  const uint32_t base = shared_address(shared);
  const int heads_of_key = p.num_heads / p.num_kv_heads, blocks = static_cast<int>(gridDim.x);
  // The first turn of a stage waits for nobody.
  Ring<C::kQueryStages> queries(1);
  Ring<C::kStages> keys(1), values(1);
  if (leader) {
    prefetch_map(maps.queries);
    prefetch_map(maps.keys);
    prefetch_map(maps.values);
  }
  int tile = static_cast<int>(blockIdx.x);
  while (true) {
    const bool more = tile < s.tiles;
    int taken = tile;
    // Asked for before it is needed: the answer takes a microsecond.
    if (s.dynamic && more && leader) taken = atomicAdd(p.counter, 1);
    int4 bounds = make_int4(0, 0, 0, 0);
    Work work;
    work.num_tiles = kNoMore;
    if (more) work = work_of_tile<C>(p, s, tile, bounds);
    barrier_wait(barriers.queries_empty(queries.stage), queries.parity);
    if (leader) reinterpret_cast<Work*>(shared + C::kWorkAt)[queries.stage] = work;
    if (lane_index() < C::kGroups) {
      reinterpret_cast<int4*>(shared + C::kBoundsAt)[queries.stage * C::kGroups + lane_index()] =
          bounds;
    }
    __syncwarp();
    if (leader && work.num_tiles <= 0) {
      barrier_arrive(barriers.queries_full(queries.stage));
    } else if (leader) {
      copy_panels<C, C::kQueries>(base + queries.stage * C::kQueryBytes, maps.queries,
                                  work.first_query, work.head, work.batch,
                                  barriers.queries_full(queries.stage));
      copy_tiles<C>(maps, work, work.head / heads_of_key, base, barriers, keys, values);
    }
    if (!more) return;
    queries.advance();
    tile = blocks + __shfl_sync(kAllLanes, taken, 0);
  }
}

}  // namespace attention
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The warp that feeds a block: it takes tiles of queries in order, finds the keys that they see,
// and copies queries, keys and values to shared memory.
#pragma once

#include <cstdint>

#include "attention/config.h"
#include "attention/order.h"
#include "attention/ranges.h"
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

// Tiles of queries go in chunks, from the end of an image or as order.h has sorted them: one head's
// tiles of a chunk, then the next head's. The longest rows start first, the keys that tiles share
// stay in L2, and so do memory's bursts that lie across two heads' rows. Lane g is given the bounds
// of warpgroup g's queries.
template <typename C>
__device__ __forceinline__ Work work_of_tile(const VlmkAttentionParams& p, const Schedule& s,
                                             const uint16_t* order, int tile, int4& own_bounds) {
  const int per_chunk = p.num_heads * s.chunk;
  const int chunk = tile / per_chunk, in_chunk = tile - chunk * per_chunk;
  const int first = chunk * s.chunk, tiles = min(s.chunk, s.entries - first);
  const int head = in_chunk / tiles, index = first + in_chunk - head * tiles;
  const Entry entry(s, C::kMasked && index >= s.sorted_from ? order[index - s.sorted_from] : index);
  Work work;
  work.batch = entry.image;
  work.head = head;
  work.first_query = entry.template first_query<C>(s);
  int lo = C::kMasked ? p.num_keys : 0, hi = C::kMasked ? 0 : p.num_keys;
  if constexpr (C::kMasked) {
#pragma unroll
    for (int group = 0; group < C::kGroups; ++group) {
      const int4 bounds =
          bounds_of_queries(p, work.batch, work.first_query + group * kGroupQueries);
      if (lane_index() == group) own_bounds = bounds;
      lo = min(lo, bounds.x);
      hi = max(hi, bounds.y);
    }
  }
  work.first_key = lo;
  work.stop_key = hi;
  work.num_tiles = hi > lo ? ceil_div(hi - lo, C::kKeys) : 0;
  return work;
}

template <typename C>
struct Producer {
  using Columns = typename C::Columns;
  const VlmkAttentionParams& p;
  const Maps& maps;
  const Schedule& schedule;
  char* shared;
  Barriers barriers;
  // The first turn of a stage waits for nobody.
  Ring<C::kQueryStages> queries{1};
  Ring<C::kStages> keys{1}, values{1};
  int tile = static_cast<int>(blockIdx.x), round = 0;
  bool ordered = false;

  // All panels of a tile.
  template <int kRows, int kPanels>
  __device__ __forceinline__ void copy(uint32_t destination, const CUtensorMap& map,
                                       const CUtensorMap& last_map, int bytes, int row, int head,
                                       int batch, uint32_t barrier) {
    if (lane_index() != 0) return;
    barrier_expect(barrier, bytes);
#pragma unroll
    for (int panel = 0; panel < kPanels; ++panel) {
      copy_tile(destination + panel * kRows * kRowBytes, panel < kPanels - 1 ? map : last_map,
                panel * kPanel, row, head, batch, barrier);
    }
  }

  // Finds what the next tile of queries sees, tells the warpgroups, and copies the queries.
  __device__ __forceinline__ Work next() {
    const bool more = tile < schedule.tiles;
    int taken = 0;
    // Asked for before it is needed: the answer takes a microsecond.
    if (schedule.dynamic && more && lane_index() == 0) {
      taken = atomicInc(reinterpret_cast<unsigned*>(p.counter), schedule.tiles - 1);
    }
    int4 bounds = make_int4(0, 0, 0, 0);
    Work work;
    work.num_tiles = kNoMore;
    if (C::kMasked && !ordered && tile >= schedule.sorted_from * p.num_heads &&
        schedule.sorted_from < schedule.entries) {
      __syncwarp();
      named_wait<64>(kOrderedBarrier);
      ordered = true;
    }
    const auto* order = reinterpret_cast<const uint16_t*>(shared + C::kOrderAt);
    if (more) work = work_of_tile<C>(p, schedule, order, tile, bounds);
    const int stage = queries.stage;
    barrier_wait(barriers.queries_empty(stage), queries.parity);
    if (lane_index() == 0) reinterpret_cast<Work*>(shared + C::kWorkAt)[stage] = work;
    if (C::kMasked && lane_index() < C::kGroups) {
      reinterpret_cast<int4*>(shared + C::kBoundsAt)[stage * C::kGroups + lane_index()] = bounds;
    }
    __syncwarp();
    if (work.num_tiles <= 0) {
      if (lane_index() == 0) barrier_arrive(barriers.queries_full(stage));
    } else {
      copy<C::kQueries, Columns::kCount>(
          shared_address(shared) + stage * C::kQueryBytes, maps.queries,
          Columns::kNarrow ? maps.last_queries : maps.queries, C::kQueryBytes, work.first_query,
          work.head, work.batch, barriers.queries_full(stage));
    }
    queries.advance();
    const int block = static_cast<int>(blockIdx.x), blocks = static_cast<int>(gridDim.x);
    ++round;
    tile = schedule.dynamic ? blocks + __shfl_sync(kAllLanes, taken, 0)
                            : round * blocks + (block + round) % blocks;
    return work;
  }

  __device__ __forceinline__ void copy_keys(int row, int head, int batch) {
    barrier_wait(barriers.keys_empty(keys.stage), keys.parity);
    copy<C::kKeys, Columns::kCount>(shared_address(shared) + C::kKeysAt + keys.stage * C::kKeyBytes,
                                    maps.keys, Columns::kNarrow ? maps.last_keys : maps.keys,
                                    C::kKeys * Columns::kRow, row, head, batch,
                                    barriers.keys_full(keys.stage));
    keys.advance();
  }

  __device__ __forceinline__ void copy_values(int row, int head, int batch) {
    barrier_wait(barriers.values_empty(values.stage), values.parity);
    copy<C::kKeys, C::kValuePanels>(
        shared_address(shared) + C::kValuesAt + values.stage * C::kValueBytes, maps.values,
        maps.values, C::kValueBytes, row, head, batch, barriers.values_full(values.stage));
    values.advance();
  }

  // Copies are started in the order in which they are used: the scores of a tile come before the
  // sum of the values of the tile before. The last values of a tile of queries wait for their stage
  // longer than the next queries do, if these have a second one.
  __device__ __forceinline__ void run() {
    if (lane_index() == 0) {
      prefetch_map(maps.queries);
      prefetch_map(maps.keys);
      prefetch_map(maps.values);
    }
    const int heads_of_key = p.num_heads / p.num_kv_heads;
    int row = kNoMore, head = 0, batch = 0;  // of values that are still to be copied
    while (true) {
      const Work work = next();
      if (C::kStaged && row != kNoMore) copy_values(row, head, batch);
      if (work.num_tiles == kNoMore) return;
      row = kNoMore;
      head = work.head / heads_of_key;
      batch = work.batch;
#pragma unroll 1
      for (int i = 0; i < work.num_tiles; ++i) {
        const int at = work.first_key + i * C::kKeys;
        copy_keys(at, head, batch);
        if (i > 0) copy_values(row, head, batch);
        row = at;
      }
      if (!C::kStaged && work.num_tiles > 0) copy_values(row, head, batch);
    }
  }
};

}  // namespace attention
}  // namespace vlmk

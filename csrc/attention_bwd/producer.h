// SPDX-License-Identifier: Apache-2.0
// The warp that feeds a block: it takes tiles of keys in order, finds the tiles of queries that see
// them, and copies all to shared memory.
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

using attention::lane_index;

// Of 64 queries: see bounds_of_queries.
__device__ __forceinline__ int4 bounds_of_tile(const VlmkAttentionBwdParams& p, const Schedule& s,
                                               const Workspace& w, int batch, int tile) {
  if (p.start) {
    const int64_t row = p.range_stride_b ? int64_t{batch} * ceil_div(p.num_queries, kQueries) : 0;
    return reinterpret_cast<const int4*>(static_cast<char*>(p.workspace) + w.q_bounds)[row + tile];
  }
  if (!p.causal) return make_int4(0, s.main_keys, 0, s.main_keys);
  const int first = tile * kQueries, last = min(first + kQueries, p.num_queries) - 1;
  const int shift = p.num_keys - p.num_queries;
  return make_int4(0, min(last + 1 + shift, p.num_keys), 0, min(first + 1 + shift, p.num_keys));
}

template <typename C>
struct Producer {
  const VlmkAttentionBwdParams& p;
  const Maps& maps;
  const Schedule& schedule;
  const Workspace& workspace;
  char* shared;
  Barriers barriers;
  // The first turn of a stage waits for nobody.
  Ring<C::kItemStages> keys{1};
  Ring<C::kStages> queries{1};
  Ring<C::kTileSlots> tiles{0};
  uint32_t values_parity = 1;
  bool values_due = false;
  int num_tiles = ceil_div(p.num_queries, kQueries);
  int heads_clear = schedule.cleared;

  __device__ __forceinline__ const char* place(int64_t at) const {
    return static_cast<const char*>(p.workspace) + at;
  }

  // The tiles of queries [x, y) outside of which none sees any of a tile of keys.
  __device__ __forceinline__ int2 span_of_keys(int batch, int tile) const {
    if (p.start) {
      const int tiles = ceil_div(p.num_keys, VLMK_TILE);  // of which the bounds are
      const int64_t row = p.range_stride_b ? int64_t{batch} * tiles : 0;
      const auto* bounds = reinterpret_cast<const int4*>(place(workspace.k_bounds)) + row;
      constexpr int kOfTile = C::kKeys / VLMK_TILE;
      int4 span = bounds[kOfTile * tile];
      if (kOfTile > 1 && kOfTile * tile + 1 < tiles) {
        const int4 more = bounds[kOfTile * tile + 1];
        span = make_int4(min(span.x, more.x), max(span.y, more.y), 0, 0);
      }
      return make_int2(min(span.x, span.y), span.y);
    }
    if (!p.causal) return make_int2(0, num_tiles);
    const int first = max(tile * C::kKeys - (p.num_keys - p.num_queries), 0);
    return make_int2(min(first / kQueries, num_tiles), num_tiles);
  }

  // In chunks, from the first keys of an image: one head's tiles of a chunk, then the next head's.
  // The longest rows of a causal mask start first, and the queries that tiles share stay in L2.
  __device__ __forceinline__ int2 head_and_tile(int item) const {
    const int per_image = schedule.image_heads * schedule.tiles_of_head;
    const int per_chunk = schedule.image_heads * schedule.chunk;
    const int image = item / per_image, in_image = item - image * per_image;
    const int chunk = in_image / per_chunk, in_chunk = in_image - chunk * per_chunk;
    const int tiles = min(schedule.chunk, schedule.tiles_of_head - chunk * schedule.chunk);
    const int head = in_chunk / tiles;
    return make_int2(image * schedule.image_heads + head,
                     chunk * schedule.chunk + in_chunk - head * tiles);
  }

  // Which of 32 tiles of queries see any key of the item; of this lane's, the bounds.
  struct Seen {
    uint32_t any;
    int4 bounds;
  };
  __device__ __forceinline__ Seen look(const Item& item, int tile, int end) const {
    Seen seen;
    seen.bounds = tile < end ? bounds_of_tile(p, schedule, workspace, item.batch, tile)
                             : make_int4(0, 0, 0, 0);
    const int4& b = seen.bounds;
    seen.any = __ballot_sync(kAllLanes, b.x < min(item.first_key + C::kKeys, p.num_keys) &&
                                            b.y > max(item.first_key, b.x));
    return seen;
  }

  // How many tiles of queries there are of a head, the last of them, and what they see of the
  // item's keys.
  __device__ __forceinline__ void count(Item& item, int2 span) const {
    const int last = num_tiles - 1;
    int tiles = 0, lo = p.num_keys, hi = 0;
    item.tail = 0;
    for (int base = span.x; base < span.y; base += 32) {
      const Seen seen = look(item, base + lane_index(), span.y);
      tiles += __popc(seen.any);
      if (last - base < 32 && seen.any >> (last - base) & 1) {
        item.tail = !C::kWide && p.num_queries - last * kQueries <= kTail;
      }
      if (seen.any >> lane_index() & 1) {
        lo = min(lo, seen.bounds.x);
        hi = max(hi, seen.bounds.y);
      }
    }
    item.lo = __reduce_min_sync(kAllLanes, lo);
    item.hi = __reduce_max_sync(kAllLanes, hi);
    item.count = tiles;
  }

  __device__ __forceinline__ void copy_panels(int to, const CUtensorMap& map, int64_t stride_b,
                                              const Item& item, uint32_t barrier) {
    const int head = item.head / schedule.parts;
#pragma unroll 1  // registers are few
    for (int panel = 0; panel < C::kPanels; ++panel) {
      copy_tile_once(shared_address(shared) + to + panel * C::kKeys * C::kRowBytes, map,
                     panel * C::kPanel, item.first_key, head, stride_b ? item.batch : 0, barrier);
    }
  }

  // Behind the first queries, as they wait for the end of the item before.
  __device__ __forceinline__ void copy_values_alone(const Item& item) {
    barrier_wait(barriers.values_empty(), values_parity);
    values_parity ^= 1;
    values_due = false;
    if (lane_index() == 0) {
      if (item.count == 0) {
        barrier_arrive(barriers.values_full());
      } else {
        barrier_expect(barriers.values_full(), C::kKeysBytes);
        copy_panels(C::values_at(0), maps.values, p.v_stride_b, item, barriers.values_full());
      }
    }
    __syncwarp();
  }

  __device__ __forceinline__ void copy_keys(const Item& item) {
    const int stage = keys.stage;
    barrier_wait(barriers.keys_empty(stage), keys.parity);
    if (lane_index() == 0) {
      item_at<C>(shared, stage) = item;
      const uint32_t barrier = barriers.keys_full(stage);
      if (item.count <= 0) {
        barrier_arrive(barrier);
      } else {
        barrier_expect(barrier, (C::kCopiedSums ? 1 : 2) * C::kKeysBytes);
        copy_panels(C::keys_at(stage), maps.keys, p.k_stride_b, item, barrier);
        if (!C::kCopiedSums) {
          copy_panels(C::values_at(stage), maps.values, p.v_stride_b, item, barrier);
        }
      }
    }
    __syncwarp();
    keys.advance();
  }

  // By one lane.
  __device__ __forceinline__ void copy_queries(const Item& item, int of_group, int of_head,
                                               uint32_t flags) {
    const int stage = queries.stage, first = of_head * kQueries;
    const int head = item.head * schedule.group_heads + of_group;
    const int row = item.batch * p.num_heads + head;
    const int row_of_sums =
        C::kWhole ? static_cast<int>(blockIdx.x) * schedule.group_heads + of_group : row;
    const QueryTile tile{flags, item.batch, head, first, row_of_sums * num_tiles + of_head};
    const int slot = C::kTileSlots > C::kStages ? tiles.stage : stage;
    query_tile_at<C>(shared, slot) = tile;
    const uint32_t barrier = barriers.queries_full(stage), base = shared_address(shared);
    barrier_expect(barrier, C::kStageBytes);
    constexpr bool kEnds = C::kSums == Sums::kBehind;  // the last panel
#pragma unroll 1
    for (int panel = 0; panel < C::kPanels - kEnds; ++panel) {
      const int at = panel * kQueries * C::kRowBytes;
      copy_tile(base + C::queries_at(stage) + at, maps.queries, panel * C::kPanel, first, head,
                p.q_stride_b ? item.batch : 0, barrier);
      copy_tile(base + C::dout_at(stage) + at, maps.dout, panel * C::kPanel, first, head,
                p.dout_stride_b ? item.batch : 0, barrier);
    }
    if (kEnds) {
      const int at = (C::kPanels - 1) * kQueries * C::kRowBytes;
      const int end = (row * num_tiles + of_head) * kQueries;
      copy_tile(base + C::queries_at(stage) + at, maps.query_ends, 0, end, 0, 0, barrier);
      copy_tile(base + C::dout_at(stage) + at, maps.dout_ends, 0, end, 0, 0, barrier);
    }
    const int64_t range_row = p.range_stride_b ? item.batch : 0;
    copy_from_global(base + C::ranges_at(stage),
                     place(workspace.ranges + (range_row * num_tiles + of_head) * C::kRangesBytes),
                     C::kRangesBytes, barrier);
    if (C::kSumsBytes) {
      copy_from_global(base + C::sums_at(stage),
                       place(workspace.sums + (int64_t{row} * num_tiles + of_head) * C::kSumsBytes),
                       C::kSumsBytes, barrier);
    }
  }

  // A block that has a whole head goes through its queries forwards and backwards in turn: what it
  // has just read is still in L2, where all that the blocks' heads have finds no room. A short tile
  // comes last.
  __device__ __forceinline__ void copy_all_queries(const Item& item, int2 span) {
#pragma unroll 1
    for (int of_group = 0; of_group < schedule.group_heads; ++of_group) {
#pragma unroll 1
      for (int base = span.x; base < span.y; base += 32) {
        const bool backwards = C::kWhole && item.first_key / C::kKeys % 2;
        const int next = base + lane_index(), end = span.y - item.tail;
        const int own = backwards && next < end ? span.x + end - 1 - next : next;
        const Seen seen = look(item, own, span.y);
        const int4& b = seen.bounds;
        // Behind the last key nothing is seen.
        const bool masked = b.z > item.first_key || b.w < item.first_key + C::kKeys;
        const uint32_t flags = (masked ? kMasked : 0) | (b.x >= item.first_key ? kFirst : 0) |
                               (b.y <= item.first_key + C::kKeys ? kLast : 0);
        for (uint32_t left = seen.any; left; left &= left - 1) {
          barrier_wait(barriers.queries_empty(queries.stage), queries.parity);
          const uint32_t tile = __shfl_sync(kAllLanes, own * 8 + flags, __ffs(left) - 1);
          if (lane_index() == 0) {
            copy_queries(item, of_group, static_cast<int>(tile / 8), tile % 8);
          }
          __syncwarp();
          queries.advance();
          tiles.advance();
          if (C::kCopiedSums && values_due) copy_values_alone(item);
        }
      }
    }
  }

  // Until the sums of dQ of a head of keys are clear, and of those before.
  __device__ __forceinline__ void wait_for_sums(int head) {
    const Counters counters(p, schedule, workspace);
    const int all = schedule.group_heads * num_tiles;
    while (heads_clear <= head) {
      const int own = heads_clear + lane_index();
      heads_clear += leading(own < schedule.heads && load_acquire(counters.cleared(own)) == all);
    }
  }

  // The next tile of keys that nobody has, for lane 0.
  __device__ __forceinline__ int take() const {
    return lane_index() == 0 ? atomicAdd(Counters(p, schedule, workspace).items(), 1) : 0;
  }

  __device__ __forceinline__ void run_item(int head, int tile) {
    Item item;
    item.batch = head / schedule.image_heads;
    item.head = head - item.batch * schedule.image_heads;
    item.first_key = tile * C::kKeys;
    const int2 span = span_of_keys(item.batch, tile);
    count(item, span);
    item.done = head * schedule.chunks + (schedule.masked ? tile / kChunk : 0);
    copy_keys(item);
    if (!C::kWhole) wait_for_sums(head);
    values_due = true;
    if (C::kCopiedSums && item.count == 0) copy_values_alone(item);
    copy_all_queries(item, span);
  }

  __device__ __forceinline__ void run() {
    if (lane_index() == 0) {
      prefetch_map(maps.queries);
      prefetch_map(maps.dout);
      prefetch_map(maps.keys);
      prefetch_map(maps.values);
    }
    if (C::kWhole) {
      const int blocks = static_cast<int>(gridDim.x);
      for (int head = static_cast<int>(blockIdx.x); head < schedule.heads; head += blocks) {
        for (int tile = 0; tile < schedule.tiles_of_head; ++tile) run_item(head, tile);
      }
    } else {
      // Whoever is there takes them: others may have part of the GPU, and blocks that come late
      // must not keep anything that the rest waits for.
      int item = __shfl_sync(kAllLanes, take(), 0);
      while (item < schedule.items) {
        // With a mask not before an item's last queries are on their way: taken an item ahead, the
        // last ones wait for long ones (causal, 4096 tokens, H200: D 128 3.15 instead of 2.87 ms,
        // D 64 1.45 instead of 1.39). Equal ones are, as an answer takes a microsecond, unless
        // there are so few that a block's second would be another's first.
        const bool ahead = !schedule.masked && schedule.items > 4 * static_cast<int>(gridDim.x);
        int next = 0;
        if (ahead) next = take();
        const int2 at = head_and_tile(item);
        run_item(at.x, at.y);
        if (!ahead) next = take();
        item = __shfl_sync(kAllLanes, next, 0);
      }
    }
    Item end = {};
    end.count = kNoMore;
    copy_keys(end);
  }
};

}  // namespace attention_bwd
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// What a block copies, in the order in which it uses it: tiles of keys and values of one head after
// another, so that those of the next are under way before this one is done.
#pragma once

#include <cstdint>

#include "attention/ranges.h"
#include "attention/rows.h"
#include "attention_few/config.h"
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "common/threads.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_few {

// What a block works on at a time: all rows that read a key head of a batch entry, head by head; or
// a tile of the queries of one head, of which there are so many tiles.
struct Rows {
  int batch, head;  // of keys
  int query_head, first_query;
  int count;
};

template <typename C>
__device__ __forceinline__ Rows rows_of_item(const VlmkAttentionParams& p, const Items& items,
                                             int item) {
  const bool tiled = items.tiles_of_head > 0;
  const int head = tiled ? item / items.tiles_of_head : item;  // of the whole batch
  Rows rows;
  rows.batch = head / items.heads;
  const int of_batch = head - rows.batch * items.heads;
  rows.head = tiled ? of_batch / items.group : of_batch;
  rows.query_head = tiled ? of_batch : of_batch * items.group;
  // The last tile first, as those of a causal mask see most.
  rows.first_query = tiled ? ((head + 1) * items.tiles_of_head - 1 - item) * C::kRows : 0;
  rows.count =
      tiled ? min(C::kRows, p.num_queries - rows.first_query) : p.num_queries * items.group;
  return rows;
}

// The tiles that a block visits of a head: [begin, end), the first of all tiles beginning with the
// first key that any row sees.
struct Span {
  int4 bounds;  // of the keys that rows see: see bounds_of_queries
  int begin, end;
};

template <typename C>
__device__ __forceinline__ Span span_of_rows(const VlmkAttentionParams& p, const Items& items,
                                             const Rows& rows) {
  const unsigned rank = cluster_rank(), ranks = cluster_size();
  Span span;
  span.bounds = attention::bounds_of_run(p, rows.batch, rows.first_query,
                                         items.tiles_of_head > 0 ? C::kRows : p.num_queries);
  // Of at most 2^24, shared out among 16.
  const unsigned count = max(ceil_div(span.bounds.y - span.bounds.x, C::kKeys), 0);
  span.begin = static_cast<int>(count * rank / ranks);
  span.end = static_cast<int>(count * (rank + 1) / ranks);
  return span;
}

// By the block's first warp, whose first lane starts the copies.
template <typename C>
struct Loader {
  const VlmkAttentionParams& p;
  const Maps& maps;
  uint32_t shared;
  Barriers barriers;
  const Items& items;
  int item, stride;
  Rows rows;
  int first_key, tile = 0, end = 0;

  // Goes to the next tile, if need be of the next rows that see any keys.
  __device__ __forceinline__ void find_next() {
    if (++tile < end) return;
#pragma unroll 1
    while ((item += stride) < items.count) {
      rows = rows_of_item<C>(p, items, item);
      const Span span = span_of_rows<C>(p, items, rows);
      first_key = span.bounds.x, tile = span.begin, end = span.end;
      if (tile < end) return;
    }
  }

  // The tile at hand, if there is one, to a stage (-1: nowhere), and goes to the next.
  __device__ __forceinline__ void load(int stage) {
    if (item >= items.count) return;
    if (stage >= 0 && lane_index() == 0) {
      const uint32_t barrier = barriers.full(stage);
      const uint32_t at = shared + C::kStagesAt + stage * 2 * C::kTileBytes;
      barrier_expect(barrier, 2 * C::kTileBytes);
#pragma unroll
      for (int i = 0; i < 2 * C::kPanels; ++i) {
        const int panel = i % C::kPanels;
        const bool of_values = i >= C::kPanels, narrow = C::kNarrow && panel == C::kPanels - 1;
        const CUtensorMap& map = of_values ? (narrow ? maps.last_values : maps.values)
                                           : (narrow ? maps.last_keys : maps.keys);
        copy_tile(at + of_values * C::kTileBytes + panel * C::kKeys * kRowBytes, map,
                  panel * kPanel, first_key + tile * C::kKeys, rows.head, rows.batch, barrier);
      }
    }
    __syncwarp();
    find_next();
  }

  // By one thread. A tile comes with zeros behind the last query.
  __device__ __forceinline__ void load_rows(int of_item) {
    const Rows x = rows_of_item<C>(p, items, of_item);
    const int count = items.tiles_of_head > 0 ? C::kRows : x.count;
    barrier_expect(barriers.rows_full(), C::kPanels * count * kRowBytes);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      copy_tile(shared + panel * C::kRows * kRowBytes, maps.queries, panel * kPanel, x.first_query,
                x.query_head, x.batch, barriers.rows_full());
    }
  }
};

}  // namespace attention_few
}  // namespace vlmk

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
__device__ __forceinline__ Rows rows_of_item(const VlmkAttentionParams& p, int tiles, int item) {
  const int group = p.num_heads / p.num_kv_heads;
  Rows rows;
  if (tiles == 0) {
    rows.batch = item / p.num_kv_heads;
    rows.head = item - rows.batch * p.num_kv_heads;
    rows.query_head = rows.head * group;
    rows.first_query = 0;
    rows.count = p.num_queries * group;
  } else {
    const int head = item / tiles;  // of the whole batch
    // The last first, as those of a causal mask see most.
    rows.first_query = (tiles - 1 - (item - head * tiles)) * C::kRows;
    rows.batch = head / p.num_heads;
    rows.query_head = head - rows.batch * p.num_heads;
    rows.head = rows.query_head / group;
    rows.count = min(C::kRows, p.num_queries - rows.first_query);
  }
  return rows;
}

// The tiles that a block visits of a head: [begin, end), the first of all tiles beginning with the
// first key that any row sees.
struct Span {
  int4 bounds;  // of the keys that rows see: see bounds_of_queries
  int begin, end;
};

template <typename C>
__device__ __forceinline__ Span span_of_rows(const VlmkAttentionParams& p, int tiles,
                                             const Rows& rows) {
  const unsigned rank = cluster_rank(), ranks = cluster_size();
  Span span;
  span.bounds = tiles == 0 ? attention::bounds_of_rows(p, rows.batch)
                           : attention::bounds_of_queries(p, rows.batch, rows.first_query);
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
  int tiles_of_head;
  int item, items, stride;  // see Rows
  Rows rows;
  int first_key, tile, end;

  // Goes to the rows at hand, or the next that see any keys.
  __device__ __forceinline__ void find() {
    for (; item < items; item += stride) {
      rows = rows_of_item<C>(p, tiles_of_head, item);
      const Span span = span_of_rows<C>(p, tiles_of_head, rows);
      first_key = span.bounds.x, tile = span.begin, end = span.end;
      if (tile < end) return;
    }
  }

  // The next tile, if there is one.
  __device__ __forceinline__ void load(int stage) {
    if (item >= items) return;
    if (lane_index() == 0) {
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
    if (++tile == end) {
      item += stride;
      find();
    }
  }

  // By one thread. A tile comes with zeros behind the last query.
  __device__ __forceinline__ void load_rows(int of_item) {
    const Rows x = rows_of_item<C>(p, tiles_of_head, of_item);
    const int count = tiles_of_head == 0 ? x.count : C::kRows;
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

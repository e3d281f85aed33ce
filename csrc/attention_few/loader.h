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

using attention::Head;

// The tiles that a block visits of a head: [begin, end), the first of all tiles beginning with the
// first key that any row sees.
struct Span {
  int4 bounds;  // of the keys that rows see: see bounds_of_queries
  int begin, end;
};

template <typename C>
__device__ __forceinline__ Span span_of_head(const VlmkAttentionParams& p, int batch) {
  const unsigned rank = cluster_rank(), ranks = cluster_size();
  Span span;
  span.bounds = attention::bounds_of_rows(p, batch);
  // Of at most 2^24, shared out among 16.
  const unsigned tiles = max(ceil_div(span.bounds.y - span.bounds.x, C::kKeys), 0);
  span.begin = static_cast<int>(tiles * rank / ranks);
  span.end = static_cast<int>(tiles * (rank + 1) / ranks);
  return span;
}

// By the block's first warp, whose first lane starts the copies.
template <typename C>
struct Loader {
  const VlmkAttentionParams& p;
  const Maps& maps;
  uint32_t shared;
  Barriers barriers;
  int item, items, stride;  // heads of all batch entries
  Head head;
  int first_key, tile, end;

  // Goes to the head at hand, or the next that has tiles.
  __device__ __forceinline__ void find() {
    for (; item < items; item += stride) {
      head = attention::head_of_item(p, item);
      const Span span = span_of_head<C>(p, head.batch);
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
                  panel * kPanel, first_key + tile * C::kKeys, head.head, head.batch, barrier);
      }
    }
    __syncwarp();
    if (++tile == end) {
      item += stride;
      find();
    }
  }

  // The rows of a head. By one thread.
  __device__ __forceinline__ void load_rows(const Head& rows_of) {
    barrier_expect(barriers.rows_full(), C::kPanels * rows_of.rows * kRowBytes);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      copy_tile(shared + panel * C::kRows * kRowBytes, maps.queries, panel * kPanel, 0,
                rows_of.head * rows_of.heads, rows_of.batch, barriers.rows_full());
    }
  }
};

}  // namespace attention_few
}  // namespace vlmk

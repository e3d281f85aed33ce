// SPDX-License-Identifier: Apache-2.0
// Few queries: those of all heads that read one key head, as the rows of one tile.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "attention/config.h"
#include "attention/ranges.h"
#include "common/tensor_map.h"

namespace vlmk {
namespace attention {

constexpr int kMaxRows = 128;

// A key head of a batch entry. Row r is query r % num_queries of query head heads * head + r /
// num_queries.
struct Head {
  int batch, head;
  int heads;  // that read it
  int rows;
};

template <typename Params>
__device__ __forceinline__ Head head_of_item(const Params& p, int item) {
  Head head;
  head.batch = item / p.num_kv_heads;
  head.head = item - head.batch * p.num_kv_heads;
  head.heads = p.num_heads / p.num_kv_heads;
  head.rows = p.num_queries * head.heads;
  return head;
}

// Of `count` queries, as bounds_of_queries. A loop, as its code is large where it is needed in
// several places.
template <typename Params>
__device__ __forceinline__ int4 bounds_of_run(const Params& p, int batch, int first, int count) {
  int4 bounds = make_int4(p.num_keys, 0, 0, p.num_keys);
#pragma unroll 1
  for (int i = 0; i < count; i += kGroupQueries) {
    const int4 more = bounds_of_queries(p, batch, first + i);
    bounds = make_int4(min(bounds.x, more.x), max(bounds.y, more.y), max(bounds.z, more.z),
                       min(bounds.w, more.w));
  }
  return bounds;
}

// A tensor [batch, queries, heads, dim] whose tile is 16, 32 or 64 columns of all queries of a key
// head, or of `tile` queries of one head. Where the batch has stride 0 it is one entry.
template <typename Params>
int encode_rows(CUtensorMap& map, const void* data, bool half, const Params& p, int64_t stride_b,
                int64_t stride_s, int64_t stride_h, int columns = 64, int tile = 0) {
  const int batch = stride_b == 0 ? 1 : p.batch;
  const auto bytes = [](int count, int64_t stride) {
    return static_cast<cuuint64_t>(count > 1 ? 2 * stride : 16);
  };
  return encode_tiles(
      map, data, half,
      {static_cast<cuuint64_t>(p.dim), static_cast<cuuint64_t>(p.num_queries),
       static_cast<cuuint64_t>(p.num_heads), static_cast<cuuint64_t>(batch)},
      {bytes(p.num_queries, stride_s), bytes(p.num_heads, stride_h), bytes(batch, stride_b)},
      {static_cast<cuuint32_t>(columns), static_cast<cuuint32_t>(tile ? tile : p.num_queries),
       static_cast<cuuint32_t>(tile ? 1 : p.num_heads / p.num_kv_heads), 1},
      swizzle_of(columns));
}

}  // namespace attention
}  // namespace vlmk

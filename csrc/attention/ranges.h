// SPDX-License-Identifier: Apache-2.0
// Which keys queries see: of one query, of the 64 of a warpgroup, and of a block's tile; and the
// masking of scores.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "attention/config.h"
#include "common/hopper.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

// A signed remainder. With that of common/threads.h the dense tiles of 80 keys of D 80 spill.
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x) % 32; }

// threadIdx.x for what is seldom worked out: it is asked for anew, where nvcc would rather keep all
// that depends on it in registers.
__device__ __forceinline__ int thread_again() {
  int thread;
  asm volatile("mov.u32 %0, %%tid.x;" : "=r"(thread));
  return thread;
}

// A warp arrives, once all its lanes have.
__device__ __forceinline__ void release(uint32_t barrier) {
  __syncwarp();
  if (lane_index() == 0) barrier_arrive(barrier);
}

// [x, y) as it is given, which may reach beyond the keys; empty behind the last query. Params are
// those of the forward or of the backward pass.
template <typename Params>
__device__ __forceinline__ int2 range_of_query(const Params& p, int batch, int query) {
  if (query >= p.num_queries) return make_int2(0, 0);
  if (p.start) {
    const int64_t at = batch * p.range_stride_b + query;
    return make_int2(p.start[at], p.stop[at]);
  }
  if (p.causal) return make_int2(0, query + 1 + p.num_keys - p.num_queries);
  return make_int2(0, p.num_keys);
}

// Apart from the load, so that a warp waits for it where it needs the range.
template <typename Params>
__device__ __forceinline__ int2 cut(const Params& p, int2 range) {
  return make_int2(max(range.x, 0), min(range.y, p.num_keys));
}

// Of the 64 queries from `first` on: [x, y) is the hull of their ranges, (num_keys, 0) if all are
// empty; [z, w) what every one of them sees. By a whole warp.
template <typename Params>
__device__ __forceinline__ int4 bounds_of_queries(const Params& p, int batch, int first) {
  if (first >= p.num_queries) return make_int4(p.num_keys, 0, p.num_keys, 0);
  if (!p.start) {
    const int last = min(first + kGroupQueries, p.num_queries) - 1;
    const int shift = p.causal ? p.num_keys - p.num_queries : p.num_keys;
    const int hi = min(max(last + 1 + shift, 0), p.num_keys);
    return make_int4(hi > 0 ? 0 : p.num_keys, hi, 0, min(first + 1 + shift, p.num_keys));
  }
  int lo = p.num_keys, hi = 0, full_lo = 0, full_hi = p.num_keys;
#pragma unroll
  for (int i = 0; i < kGroupQueries; i += 32) {
    const int query = first + i + lane_index();
    int2 range = cut(p, range_of_query(p, batch, query));
    // As [num_keys, 0) an empty range widens no hull and empties the intersection.
    if (range.x >= range.y) range = make_int2(p.num_keys, 0);
    lo = min(lo, range.x);
    hi = max(hi, range.y);
    if (query < p.num_queries) {
      full_lo = max(full_lo, range.x);
      full_hi = min(full_hi, range.y);
    }
  }
  return make_int4(__reduce_min_sync(kAllLanes, lo), __reduce_max_sync(kAllLanes, hi),
                   __reduce_max_sync(kAllLanes, full_lo), __reduce_min_sync(kAllLanes, full_hi));
}

// Of a thread's scores of one query, which are the columns 8 j + 2 (lane % 4) + {0, 1} of a tile in
// this order, how many lie left of `column`.
__device__ __forceinline__ int scores_before(int column) {
  const int x = max(column - 2 * (lane_index() % 4), 0);
  return 2 * (x / 8) + min(x % 8, 2);
}

// The lowest `count` of 32 bits, for any count.
__device__ __forceinline__ uint32_t low_bits(int count) {
  return count >= 32 ? ~0u : count <= 0 ? 0u : (1u << count) - 1;
}

// Scores of keys outside of the two queries' ranges become -inf. A range is relative to the tile.
template <int kColumns, int kAll>
__device__ __forceinline__ void mask_scores(float (&scores)[kAll], const int2 (&range)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int from = scores_before(range[half].x), to = scores_before(range[half].y);
#pragma unroll
    for (int first = 0; first < kColumns / 4; first += 32) {
      const uint32_t seen = low_bits(to - first) & ~low_bits(from - first);
#pragma unroll
      for (int i = 0; i < 32 && first + i < kColumns / 4; ++i) {
        float& score = scores[(first + i) / 2 * 4 + 2 * half + i % 2];
        if (!(seen >> i & 1)) score = -INFINITY;
      }
    }
  }
}

// Scores of the columns from `count` on become -inf.
template <int kColumns, int kAll>
__device__ __forceinline__ void mask_end(float (&scores)[kAll], int count) {
  const int to = scores_before(count);
#pragma unroll
  for (int i = 0; i < kColumns / 4; ++i) {
    float* pair = &scores[i / 2 * 4 + i % 2];
    if (i >= to) pair[0] = pair[2] = -INFINITY;
  }
}

}  // namespace attention
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The tiles of keys and values that pass by a block's rows: scores, softmax and the sum of values.
#pragma once

#include <cstdint>

#include "attention/ranges.h"
#include "attention/rows.h"
#include "attention/softmax.h"
#include "attention_few/config.h"
#include "common/float16.h"
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_few {

using attention::Head;
using attention::lane_index;

constexpr int kTileBarrier = 1;

template <typename C>
struct Tiles {
  using T = typename C::Element;

  const VlmkAttentionParams& p;
  const Maps& maps;
  const Head& head;
  char* shared;
  Barriers barriers;
  int4 bounds;     // of the keys that rows see: see bounds_of_queries. Tiles begin at the first
  int begin, end;  // this block's tiles
  Ring<C::kStages> ring{0};

  int2 range[2];  // of this thread's two rows
  attention::Softmax softmax;
  float scores[C::kKeys / 2];
  uint32_t weights[C::kKeys / 4];
  float sums[C::kWidth / 2];

  __device__ __forceinline__ int group() const { return static_cast<int>(threadIdx.x) / 128; }
  // This thread's first row; the second is 8 behind it.
  __device__ __forceinline__ int own_row() const {
    return static_cast<int>(threadIdx.x) / 32 * 16 + lane_index() / 4;
  }
  // Whether this warp has rows at all.
  __device__ __forceinline__ bool has_rows() const {
    return static_cast<int>(threadIdx.x) / 32 * 16 < head.rows;
  }
  __device__ __forceinline__ uint32_t keys_at(int stage) const {
    return shared_address(shared) + C::kStagesAt + stage * 2 * C::kTileBytes;
  }
  __device__ __forceinline__ uint32_t values_at(int stage) const {
    return keys_at(stage) + C::kTileBytes;
  }

  // Starts the copies of a tile. By one thread.
  __device__ __forceinline__ void load(int tile, int stage) {
    const uint32_t barrier = barriers.full(stage);
    const int first_key = bounds.x + tile * C::kKeys;
    barrier_expect(barrier, 2 * C::kTileBytes);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      copy_tile(keys_at(stage) + panel * C::kKeys * kRowBytes, maps.keys, panel * kPanel, first_key,
                head.head, head.batch, barrier);
    }
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      copy_tile(values_at(stage) + panel * C::kKeys * kRowBytes, maps.values, panel * kPanel,
                first_key, head.head, head.batch, barrier);
    }
  }

  // Starts the copies of the rows and of the first tiles. By one thread.
  __device__ __forceinline__ void load_first() {
    barrier_expect(barriers.rows_full(), C::kPanels * head.rows * kRowBytes);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      copy_tile(shared_address(shared) + panel * C::kRows * kRowBytes, maps.queries, panel * kPanel,
                0, head.head * head.heads, head.batch, barriers.rows_full());
    }
#pragma unroll
    for (int stage = 0; stage < C::kStages; ++stage) {
      if (begin + stage < end) load(begin + stage, stage);
    }
  }

  // This warp is done with the stage at hand; once all are, brings the tile that comes there next.
  __device__ __forceinline__ void refill(int tile) {
    if (tile >= end) return;
    attention::release(barriers.empty(ring.stage));
    if (threadIdx.x == 0) {
      barrier_wait(barriers.empty(ring.stage), ring.parity);
      load(tile, ring.stage);
    }
    __syncwarp();
  }

  // Rows behind the last, of a warp that has others, count in none of what it decides for all.
  __device__ __forceinline__ void clear_rows() {
    constexpr int kWords = kRowBytes / 16;
    const int count = (ceil_div(head.rows, 16) * 16 - head.rows) * kWords;
    for (int i = static_cast<int>(threadIdx.x); i < C::kPanels * count; i += C::kThreads) {
      auto* rows = reinterpret_cast<uint4*>(shared + i / count * C::kRows * kRowBytes);
      rows[head.rows * kWords + i % count] = make_uint4(0, 0, 0, 0);
    }
    fence_async_proxy();
  }

  // scores = rows times keys of the stage at hand.
  __device__ __forceinline__ void start_scores() {
    const uint32_t rows = shared_address(shared) + group() * attention::kGroupQueries * kRowBytes;
    const uint64_t a = swizzled_descriptor(rows, 16);
    const uint64_t b = swizzled_descriptor(keys_at(ring.stage), 16);
    keep(scores);
    mma_fence();
#pragma unroll
    for (int step = 0; step < C::kWidth / 16; ++step) {
      const int panel = step * 16 / kPanel, inside = step * 32 % kRowBytes;
      mma<T, C::kKeys>(scores, a + ((panel * C::kRows * kRowBytes + inside) >> 4),
                       b + ((panel * C::kKeys * kRowBytes + inside) >> 4), step > 0);
    }
    mma_commit();
  }

  // sums += weights times values of the stage at hand.
  __device__ __forceinline__ void start_sums() {
    const uint64_t b = swizzled_descriptor(values_at(ring.stage), C::kKeys * kRowBytes);
    keep(sums);
    keep(weights);
    mma_fence();
#pragma unroll
    for (int step = 0; step < C::kKeys / 16; ++step) {
      const uint32_t a[4] = {weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                             weights[4 * step + 3]};
      mma<T, C::kWidth, true>(sums, a, b + (step * 16 * kRowBytes >> 4), true);
    }
    mma_commit();
  }

  // The last tile may reach behind what any row sees, where infinity and NaN may lie: times a
  // weight of 0 they are NaN. Behind the last key there are zeros.
  __device__ __forceinline__ void clear_unseen(int first_key) {
    const int seen = bounds.y - first_key;
    if (seen >= C::kKeys || bounds.y == p.num_keys) return;
    constexpr int kWords = kRowBytes / 16;
    char* values = shared + C::kStagesAt + ring.stage * 2 * C::kTileBytes + C::kTileBytes;
#pragma unroll 1
    for (int panel = 0; panel < C::kPanels; ++panel) {
      auto* words = reinterpret_cast<uint4*>(values + panel * C::kKeys * kRowBytes);
      for (int i = static_cast<int>(threadIdx.x); i < (C::kKeys - seen) * kWords;
           i += C::kThreads) {
        words[seen * kWords + i] = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async_proxy();
    named_wait<C::kThreads>(kTileBarrier);
  }

  // Scores become weights, relative to the maximum; where that grows, the sums so far shrink.
  __device__ __forceinline__ void weigh(int first_key) {
    float unit = p.scale * attention::kLog2E;
    if (p.softcap > 0) {
      attention::cap_scores<C::kKeys / 2>(scores, unit, p.softcap);
      unit = 1;
    }
    if (first_key < bounds.z || first_key + C::kKeys > bounds.w) {
      const int2 relative[2] = {make_int2(range[0].x - first_key, range[0].y - first_key),
                                make_int2(range[1].x - first_key, range[1].y - first_key)};
      attention::mask_scores<C::kKeys>(scores, relative);
    }
    const bool grows = softmax.raise<C::kKeys / 2>(scores, unit);
    softmax.weigh<C::kKeys / 2>(
        scores, unit, [this](int, int i) { weights[i / 2] = pack<T>(scores[i], scores[i + 1]); });
    if (grows) {
#pragma unroll
      for (int i = 0; i < C::kWidth / 2; ++i) sums[i] *= softmax.shrink[i / 2 % 2];
    }
  }

  __device__ __forceinline__ void attend(int tile) {
    const int first_key = bounds.x + tile * C::kKeys;
    barrier_wait(barriers.full(ring.stage), ring.parity);
    start_scores();
    mma_wait<0>();
    keep(scores);
    if (has_rows()) weigh(first_key);
    clear_unseen(first_key);
    start_sums();
    mma_wait<0>();
    keep(sums);
    keep(weights);
    refill(tile + C::kStages);
    ring.advance();
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = own_row() + 8 * half;
      range[half] =
          row < head.rows
              ? attention::cut(p, attention::range_of_query(p, head.batch, row % p.num_queries))
              : make_int2(0, 0);
    }
#pragma unroll
    for (int i = 0; i < C::kWidth / 2; ++i) sums[i] = 0;
#pragma unroll
    for (int i = 0; i < C::kKeys / 4; ++i) weights[i] = 0;
    barrier_wait(barriers.rows_full(), 0);
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) attend(tile);
    softmax.finish();
  }
};

}  // namespace attention_few
}  // namespace vlmk

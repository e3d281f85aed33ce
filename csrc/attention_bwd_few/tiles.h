// SPDX-License-Identifier: Apache-2.0
// The tiles of keys and values that pass by a block's rows.
//
// Products are transposed, so that the few rows are the narrow side: scores S^T = K Q^T and dP^T =
// V dO^T have keys as rows, and P^T and dS^T come out as the left operands of dV = P^T dO and dK =
// dS^T Q. For dQ^T = K^T dS^T, dS goes through shared memory.
#pragma once

#include <cstdint>

#include "attention/ranges.h"
#include "attention_bwd_few/config.h"
#include "attention_bwd_few/queries.h"
#include "common/approximate.h"
#include "common/float16.h"
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd_few {

constexpr int kTileBarrier = 1;

template <typename C>
struct Tiles {
  using T = typename C::Element;

  const VlmkAttentionBwdParams& p;
  const Maps& maps;
  const Head& head;
  char* shared;
  Barriers barriers;
  int4 bounds;  // of the keys that rows see: see bounds_of_queries
  int warp;
  int begin, end;
  Ring<C::kStages> ring{0};

  float dq[C::kOwnPanels][C::kRows / 2];  // transposed
  float scores[C::kRows / 2], dp[C::kRows / 2];
  uint32_t weights[C::kRows / 4], ds[C::kRows / 4];
  float dv[C::kWidth / 2], dk[C::kWidth / 2];

  __device__ __forceinline__ int group() const { return warp / 4; }
  __device__ __forceinline__ uint32_t keys_at(int stage) const {
    return shared_address(shared) + C::kStagesAt + stage * 2 * C::kTileBytes;
  }
  __device__ __forceinline__ uint32_t values_at(int stage) const {
    return keys_at(stage) + C::kTileBytes;
  }
  __device__ __forceinline__ void meet() { named_wait<C::kThreads>(kTileBarrier); }

  // Starts the copies of a tile. By one thread.
  __device__ __forceinline__ void load(int tile, int stage) {
    const uint32_t barrier = barriers.full(stage);
    barrier_expect(barrier, 2 * C::kTileBytes);
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      const int at = panel * C::kKeys * kRowBytes;
      const PanelMaps& of_panel = maps_of<C>(maps, panel);
      copy_tile(keys_at(stage) + at, of_panel.keys, panel * kPanel, tile * C::kKeys, head.head,
                p.k_stride_b ? head.batch : 0, barrier);
      copy_tile(values_at(stage) + at, of_panel.values, panel * kPanel, tile * C::kKeys, head.head,
                p.v_stride_b ? head.batch : 0, barrier);
    }
  }

  __device__ __forceinline__ void load_first() {
#pragma unroll
    for (int stage = 0; stage < C::kStages; ++stage) {
      if (begin + stage < end) load(begin + stage, stage);
    }
  }

  // Once the results of the tile before have left its stage, brings the tile that comes there next.
  __device__ __forceinline__ void refill(int tile) {
    const int next = tile - 1 + C::kStages;
    if (tile == begin || next >= end) return;
    const bool wraps = ring.stage == 0;
    const int stage = wraps ? C::kStages - 1 : ring.stage - 1;
    if (lane_index() == 0) {
      store_wait_read();
      barrier_arrive(barriers.empty(stage));
    }
    if (threadIdx.x == 0) {
      barrier_wait(barriers.empty(stage), ring.parity ^ wraps);
      load(next, stage);
    }
    __syncwarp();
  }

  // Keys that no row sees become zero: whatever they hold, infinity and NaN too, would come into dQ
  // with a weight of 0. Behind the last key they are.
  __device__ __forceinline__ void clear_unseen(int first_key) {
    const int lo = bounds.x - first_key;
    const int hi = bounds.y < p.num_keys ? bounds.y - first_key : C::kKeys;
    if (lo <= 0 && hi >= C::kKeys) return;
    char* keys = shared + C::kStagesAt + ring.stage * 2 * C::kTileBytes;
#pragma unroll
    for (int panel = 0; panel < C::kPanels; ++panel) {
      const int words = C::Columns::row_bytes(panel) / 16;
      auto* rows = reinterpret_cast<uint4*>(keys + panel * C::kKeys * kRowBytes);
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < C::kKeys * words; i += C::kThreads) {
        const int key = i / words;
        if (key < lo || key >= hi) rows[i] = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async_proxy();
    meet();
  }

  // sums = tile times rows, both with their columns along the product.
  __device__ __forceinline__ void start_product(float (&sums)[C::kRows / 2], uint32_t tile,
                                                uint32_t rows) {
#pragma unroll
    for (int step = 0; step < C::kWidth / 16; ++step) {
      const int panel = step * 16 / kPanel, inside = step * 32 % kRowBytes;
      const int bytes = C::Columns::row_bytes(panel);
      const uint64_t a =
          row_descriptor(tile + panel * C::kKeys * kRowBytes + group() * 64 * bytes, bytes);
      const uint64_t b = row_descriptor(rows + panel * C::kRows * kRowBytes, bytes);
      mma<T, C::kRows>(sums, a + (inside >> 4), b + (inside >> 4), step > 0);
    }
  }

  // sums = weights times rows: dV or dK.
  __device__ __forceinline__ void start_gradient(float (&sums)[C::kWidth / 2],
                                                 const uint32_t (&left)[C::kRows / 4],
                                                 uint32_t rows) {
    const uint64_t b = swizzled_descriptor(rows, C::kRows * kRowBytes);
    constexpr int kLast = C::kPanels - 1, kLastBytes = C::Columns::row_bytes(kLast);
    const uint64_t last = row_descriptor(rows + kLast * C::kRows * kRowBytes, kLastBytes);
#pragma unroll
    for (int step = 0; step < C::kRows / 16; ++step) {
      const uint32_t a[4] = {left[4 * step], left[4 * step + 1], left[4 * step + 2],
                             left[4 * step + 3]};
      if constexpr (C::kNarrow) {
        constexpr int kWhole = kLast * kPanel;
        mma<T, kWhole, true>(reinterpret_cast<float (&)[kWhole / 2]>(sums), a,
                             b + (step * 16 * kRowBytes >> 4), step > 0);
        mma<T, C::kLastColumns, true>(
            reinterpret_cast<float (&)[C::kLastColumns / 2]>(sums[kWhole / 2]), a,
            last + (step * 16 * kLastBytes >> 4), step > 0);
      } else {
        mma<T, C::kWidth, true>(sums, a, b + (step * 16 * kRowBytes >> 4), step > 0);
      }
    }
  }

  // dQ^T += K^T dS^T, of this warpgroup's columns. A product takes 64 of them: those of a narrow
  // panel twice.
  __device__ __forceinline__ void start_queries() {
    const int first = group() * C::kOwnPanels;
    const uint64_t b = swizzled_descriptor(shared_address(shared) + C::kScoresAt, 16);
#pragma unroll
    for (int panel = 0; panel < C::kOwnPanels; ++panel) {
      const int bytes = C::Columns::row_bytes(first + panel);
      const uint64_t a =
          row_descriptor(keys_at(ring.stage) + (first + panel) * C::kKeys * kRowBytes, bytes);
      keep(dq[panel]);
      mma_fence();
#pragma unroll
      for (int step = 0; step < C::kKeys / 16; ++step) {
        mma<T, C::kRows, true>(dq[panel], a + (step * 16 * bytes >> 4),
                               b + ((step / 4 * C::kRows * kRowBytes + step % 4 * 32) >> 4), true);
      }
    }
  }

  // Scores become weights, dP becomes dS; what a row does not see is 0 in both, whatever it was.
  template <bool kMasked>
  __device__ __forceinline__ void weigh(int first_key) {
    const float scale = p.scale * kLog2E;
    const uint32_t rows = shared_address(shared) + C::kSumsAt + lane_index() % 4 * 16;
    const int key = first_key + warp * 16 + lane_index() / 4;
#pragma unroll
    for (int i = 0; i < C::kRows / 8; ++i) {
      uint4 sums, ranges;
      load_shared(rows + i * 64, sums);
      if (kMasked) load_shared(rows + C::kRangesAt - C::kSumsAt + i * 64, ranges);
      const float lse[2] = {__uint_as_float(sums.x), __uint_as_float(sums.y)};
      const float delta[2] = {__uint_as_float(sums.z), __uint_as_float(sums.w)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float weight[2], gradient[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int at = 4 * i + 2 * half + j;
          weight[j] = exp2_approximate(fmaf(scores[at], scale, lse[j]));
          gradient[j] = weight[j] * (dp[at] - delta[j]);
          if (kMasked) {
            const uint32_t from = j ? ranges.y : ranges.x, count = j ? ranges.w : ranges.z;
            const bool seen = static_cast<uint32_t>(key + 8 * half) - from < count;
            weight[j] = seen ? weight[j] : 0;
            gradient[j] = seen ? gradient[j] : 0;
          }
        }
        weights[2 * i + half] = pack<T>(weight[0], weight[1]);
        ds[2 * i + half] = pack<T>(gradient[0], gradient[1]);
      }
    }
  }

  // A warp's 16 rows of dK or dV, by way of where its keys or values were.
  __device__ __forceinline__ void store(const float (&sums)[C::kWidth / 2], float scale,
                                        uint32_t tile, CUtensorMap PanelMaps::* map,
                                        int first_key) {
    const int lane = lane_index();
    const auto rows = [&](int panel) {
      return tile + panel * C::kKeys * kRowBytes + warp * 16 * C::Columns::row_bytes(panel);
    };
#pragma unroll
    for (int block = 0; block < C::kWidth / 8; block += 2) {
      const float* x = &sums[4 * block];
      const int bytes = C::Columns::row_bytes(block / 8);
      const int turn = bytes == kRowBytes ? lane % 8 : lane / 2 % 4;  // the copy engine's swizzle
      const uint32_t row = rows(block / 8) + lane % 16 * bytes + ((lane / 16 ^ turn) << 4);
      store_matrices(row ^ (block % 8 << 4),
                     {pack<T>(x[0] * scale, x[1] * scale), pack<T>(x[2] * scale, x[3] * scale),
                      pack<T>(x[4] * scale, x[5] * scale), pack<T>(x[6] * scale, x[7] * scale)});
    }
    fence_async_proxy();
    __syncwarp();
    const int first = first_key + warp * 16;
    if (lane == 0 && first < p.num_keys) {
#pragma unroll
      for (int panel = 0; panel < C::kPanels; ++panel) {
        store_tile(maps_of<C>(maps, panel).*map, rows(panel), panel * kPanel, first, head.head,
                   head.batch);
      }
      store_commit();
    }
    __syncwarp();
  }

  __device__ __forceinline__ void attend(int tile) {
    const uint32_t queries = shared_address(shared), dout = queries + C::kDoutAt;
    const uint32_t keys = keys_at(ring.stage), values = values_at(ring.stage);
    const int first_key = tile * C::kKeys;
    barrier_wait(barriers.full(ring.stage), ring.parity);
    clear_unseen(first_key);

    keep(scores);
    keep(dp);
    mma_fence();
    start_product(scores, keys, queries);
    start_product(dp, values, dout);
    mma_commit();
    refill(tile);
    mma_wait<0>();
    keep(scores);
    keep(dp);
    if (first_key < bounds.z || first_key + C::kKeys > bounds.w) {
      weigh<true>(first_key);
    } else {
      weigh<false>(first_key);
    }

    keep(dv);
    keep(weights);
    mma_fence();
    start_gradient(dv, weights, dout);
    mma_commit();
#pragma unroll
    for (int step = 0; step < C::kRows / 16; ++step) {
      const uint32_t x[4] = {ds[4 * step], ds[4 * step + 1], ds[4 * step + 2], ds[4 * step + 3]};
      store_columns(shared_address(shared) + C::kScoresAt + group() * C::kRows * kRowBytes, step,
                    x);
    }
    fence_async_proxy();
    meet();  // dS is there, and nobody multiplies values any more
    start_queries();
    if (C::kTogether) {
      keep(dk);
      keep(ds);
      mma_fence();
      start_gradient(dk, ds, queries);
    }
    mma_commit();
    mma_wait<1>();
    keep(dv);
    keep(weights);
    store(dv, 1, values, &PanelMaps::dv, first_key);
    if (!C::kTogether) {
      keep(dk);
      keep(ds);
      mma_fence();
      start_gradient(dk, ds, queries);
      mma_commit();
    }
    mma_wait<0>();
    keep(dk);
    keep(ds);
#pragma unroll
    for (int panel = 0; panel < C::kOwnPanels; ++panel) keep(dq[panel]);
    meet();  // nobody multiplies keys or dS any more
    store(dk, p.scale, keys, &PanelMaps::dk, first_key);
    ring.advance();
  }

  __device__ __forceinline__ void run() {
#pragma unroll
    for (int panel = 0; panel < C::kOwnPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < C::kRows / 2; ++i) dq[panel][i] = 0;
    }
#pragma unroll 1
    for (int tile = begin; tile < end; ++tile) attend(tile);
  }
};

}  // namespace attention_bwd_few
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The tiles of keys and values that pass by a head's rows: scores, softmax and the sum of values.
#pragma once

#include <cstdint>

#include "attention/ranges.h"
#include "attention/softmax.h"
#include "attention_few/config.h"
#include "attention_few/loader.h"
#include "common/approximate.h"
#include "common/float16.h"
#include "common/hopper.h"
#include "common/mma.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_few {

constexpr int kTileBarrier = 1;

template <typename C>
struct Tiles {
  using T = typename C::Element;

  const VlmkAttentionParams& p;
  char* shared;
  Barriers barriers;
  int warp;  // 16 rows each
  Ring<C::kStages> ring{0};
  uint32_t rows_parity = 0;

  Rows at_hand;
  Span span;
  // Of this thread's two rows; the query, from the first at hand on, is num_queries behind the
  // last.
  int of_group[2], query[2];
  int2 range[2];
  attention::Softmax softmax;
  uint32_t rows[C::kWidth / 16][4];
  float scores[C::kKeys / 2];
  uint32_t weights[C::kKeys / 4];
  float sums[C::kWidth / 2];

  // This thread's first row; the second is 8 behind it.
  __device__ __forceinline__ int own_row() const { return warp * 16 + lane_index() / 4; }
  __device__ __forceinline__ bool has_rows() const { return warp * 16 < at_hand.count; }
  __device__ __forceinline__ uint32_t keys_at(int stage) const {
    return shared_address(shared) + C::kStagesAt + stage * 2 * C::kTileBytes;
  }
  // Of a tile of keys or values.
  __device__ __forceinline__ uint32_t last_panel(uint32_t tile) const {
    return tile + (C::kPanels - 1) * C::kKeys * kRowBytes;
  }
  __device__ __forceinline__ void meet() { named_wait<C::kThreads>(kTileBarrier); }

  // Of so many, of one head or of all that read a head of keys.
  __device__ __forceinline__ void name_rows(int count, bool of_one_head) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = own_row() + 8 * half;
      of_group[half] = of_one_head ? 0 : row / p.num_queries;
      query[half] = row < count ? row - of_group[half] * p.num_queries : p.num_queries;
    }
  }

  // Rows behind the last, of a warp that has others, must not change what it decides for all.
  __device__ __forceinline__ void clear_rows(int count) {
    constexpr int kWords = kRowBytes / 16;
    const int words = (ceil_div(count, 16) * 16 - count) * kWords;
#pragma unroll 1
    for (int i = static_cast<int>(threadIdx.x); i < C::kPanels * words; i += C::kThreads) {
      auto* panel = reinterpret_cast<uint4*>(shared + i / words * C::kRows * kRowBytes);
      panel[count * kWords + i % words] = make_uint4(0, 0, 0, 0);
    }
  }

  // The rows of a head come to registers, the left operand of the scores; those of the next may
  // then take their place.
  __device__ __forceinline__ void take_rows() {
    const int lane = lane_index();
    const uint32_t row = shared_address(shared) + (warp * 16 + lane % 16) * kRowBytes;
    barrier_wait(barriers.rows_full(), rows_parity);
    rows_parity ^= 1;
#pragma unroll
    for (int step = 0; step < C::kWidth / 16; ++step) {
      const int panel = step * 16 / kPanel, word = step * 2 % (kRowBytes / 16);
      load_matrices(rows[step],
                    row + panel * C::kRows * kRowBytes + ((word + lane / 16 ^ lane % 8) << 4));
    }
    meet();
  }

  // scores = rows times keys of the stage at hand.
  __device__ __forceinline__ void start_scores() {
    const uint64_t b = swizzled_descriptor(keys_at(ring.stage), 16);
    const uint64_t last = row_descriptor(last_panel(keys_at(ring.stage)), C::kLastBytes);
    keep(scores);
    mma_fence();
#pragma unroll
    for (int step = 0; step < C::kWidth / 16; ++step) {
      const int panel = step * 16 / kPanel, inside = step * 32 % kRowBytes;
      const bool narrow = C::kNarrow && panel == C::kPanels - 1;
      mma<T, C::kKeys>(
          scores, rows[step],
          narrow ? last + (inside >> 4) : b + ((panel * C::kKeys * kRowBytes + inside) >> 4),
          step > 0);
    }
    mma_commit();
  }

  // sums += weights times values of the stage at hand.
  __device__ __forceinline__ void start_sums() {
    const uint32_t values = keys_at(ring.stage) + C::kTileBytes;
    const uint64_t b = swizzled_descriptor(values, C::kKeys * kRowBytes);
    const uint64_t last = row_descriptor(last_panel(values), C::kLastBytes);
    keep(sums);
    keep(weights);
    mma_fence();
#pragma unroll
    for (int step = 0; step < C::kKeys / 16; ++step) {
      const uint32_t a[4] = {weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                             weights[4 * step + 3]};
      if constexpr (C::kNarrow) {
        constexpr int kWhole = C::kWidth - C::kLastColumns;
        mma<T, kWhole, true>(reinterpret_cast<float (&)[kWhole / 2]>(sums), a,
                             b + (step * 16 * kRowBytes >> 4), true);
        mma<T, C::kLastColumns, true>(
            reinterpret_cast<float (&)[C::kLastColumns / 2]>(sums[kWhole / 2]), a,
            last + (step * 16 * C::kLastBytes >> 4), true);
      } else {
        mma<T, C::kWidth, true>(sums, a, b + (step * 16 * kRowBytes >> 4), true);
      }
    }
    mma_commit();
  }

  // The last tile may reach behind what any row sees, where infinity and NaN may lie: times a
  // weight of 0 they are NaN. Behind the last key there are zeros.
  __device__ __forceinline__ void clear_unseen(int first_key) {
    const int seen = span.bounds.y - first_key;
    if (seen >= C::kKeys || span.bounds.y == p.num_keys) return;
    char* values = shared + C::kStagesAt + ring.stage * 2 * C::kTileBytes + C::kTileBytes;
#pragma unroll 1
    for (int panel = 0; panel < C::kPanels; ++panel) {
      const int in_row = (panel == C::kPanels - 1 ? C::kLastBytes : kRowBytes) / 16;
      auto* words = reinterpret_cast<uint4*>(values + panel * C::kKeys * kRowBytes);
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x); i < (C::kKeys - seen) * in_row;
           i += C::kThreads) {
        words[seen * in_row + i] = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async_proxy();
    meet();
  }

  // Scores become weights, relative to the maximum; where that grows, the sums so far shrink.
  __device__ __forceinline__ void weigh(int first_key) {
    float unit = p.scale * kLog2E;
    if constexpr (C::kCapped) {
      attention::cap_scores<C::kKeys / 2>(scores, unit, p.softcap);
      unit = 1;
    }
    if (first_key < span.bounds.z || first_key + C::kKeys > span.bounds.w) {
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

  // A tile; `loader` brings the next to its stage, once all warps are done with it.
  __device__ __forceinline__ void attend(int first_key, Loader<C>& loader) {
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
    attention::release(barriers.empty(ring.stage));
    if (warp == 0) {
      barrier_wait(barriers.empty(ring.stage), ring.parity);
      loader.load(ring.stage);
    }
    ring.advance();
  }

  // Of rows that are taken.
  __device__ __forceinline__ void run(Loader<C>& loader) {
    softmax = attention::Softmax();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      range[half] = attention::cut(
          p, attention::range_of_query(p, at_hand.batch, at_hand.first_query + query[half]));
    }
#pragma unroll
    for (int i = 0; i < C::kWidth / 2; ++i) sums[i] = 0;
#pragma unroll
    for (int i = 0; i < C::kKeys / 4; ++i) weights[i] = 0;
#pragma unroll 1
    for (int tile = span.begin; tile < span.end; ++tile) {
      attend(span.bounds.x + tile * C::kKeys, loader);
    }
    softmax.finish();
  }
};

}  // namespace attention_few
}  // namespace vlmk

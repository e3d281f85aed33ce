// SPDX-License-Identifier: Apache-2.0
// The two warpgroups that have 64 keys each: scores, their gradients, and the sums of dK and dV.
//
// Products are transposed: scores S^T = K Q^T and dP^T = V dO^T have keys as rows, so that P^T and
// dS^T are the left operands of dV = P^T dO and dK = dS^T Q as they come. dS goes through shared
// memory to the warpgroup that multiplies it with K (queries.h).
#pragma once

#include <cstdint>

#include "attention/ranges.h"
#include "attention/softmax.h"
#include "attention_bwd/config.h"
#include "attention_bwd/store.h"
#include "common/float16.h"
#include "common/hopper.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

using attention::lane_index;
using attention::release;

template <typename C>
struct KeyGroup {
  using T = typename C::Element;

  const VlmkAttentionBwdParams& p;
  char* shared;
  Barriers barriers;
  int group;
  Ring<2> keys{0};
  Ring<C::kStages> queries{0};
  Ring<C::kScoreStages> buffer{1};  // of dS; its first turn waits for nobody

  float scores[kQueries / 2], dp[kQueries / 2];
  uint32_t weights[kQueries / 4], ds[kQueries / 4];
  float dk[C::kWidth / 2], dv[C::kWidth / 2];

  __device__ __forceinline__ uint32_t at(int offset) const {
    return shared_address(shared) + offset;
  }

  // sums = this warpgroup's rows of `tile` times `rows`, both with their columns along the product.
  __device__ __forceinline__ void start_product(float (&sums)[kQueries / 2], uint32_t tile,
                                                uint32_t rows) {
    const uint64_t a = swizzled_descriptor(tile + group * 64 * kRowBytes, 16);
    const uint64_t b = swizzled_descriptor(rows, 16);
    keep(sums);
    mma_fence();
#pragma unroll
    for (int step = 0; step < C::kDepth / 16; ++step) {
      const int panel = step * 16 / kPanel, inside = step * 32 % kRowBytes;
      mma<T, kQueries>(sums, a + ((panel * kKeys * kRowBytes + inside) >> 4),
                       b + ((panel * kQueries * kRowBytes + inside) >> 4), step > 0);
    }
    mma_commit();
  }

  // sums += left times rows: dV or dK.
  __device__ __forceinline__ void start_gradient(float (&sums)[C::kWidth / 2],
                                                 uint32_t (&left)[kQueries / 4], uint32_t rows) {
    const uint64_t b = swizzled_descriptor(rows, kQueries * kRowBytes);
    keep(sums);
    keep(left);
    mma_fence();
#pragma unroll
    for (int step = 0; step < kQueries / 16; ++step) {
      const uint32_t a[4] = {left[4 * step], left[4 * step + 1], left[4 * step + 2],
                             left[4 * step + 3]};
      mma<T, C::kWidth, true>(sums, a, b + (step * 16 * kRowBytes >> 4), true);
    }
    mma_commit();
  }

  // Scores become weights; of what a query does not see 0, whatever they were.
  template <bool kMasked>
  __device__ __forceinline__ void weigh(int first_key) {
    const float scale = p.scale * attention::kLog2E;
    const uint32_t table = at(C::sums_at(queries.stage)) + lane_index() % 4 * 16;
    const int key =
        first_key + group * 64 + static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane_index() / 4;
#pragma unroll
    for (int i = 0; i < kQueries / 8; ++i) {
      uint2 sums;
      uint4 ranges;
      load_shared(table + i * 64, sums);
      if (kMasked) load_shared(table + C::kTableBytes + i * 64, ranges);
      const float lse[2] = {__uint_as_float(sums.x), __uint_as_float(sums.y)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = scores[4 * i + 2 * half + j];
          score = attention::exp2_approximate(fmaf(score, scale, lse[j]));
          if (kMasked) {
            const uint32_t from = j ? ranges.y : ranges.x, count = j ? ranges.w : ranges.z;
            score = static_cast<uint32_t>(key + 8 * half) - from < count ? score : 0;
          }
        }
        const int at = 4 * i + 2 * half;
        weights[2 * i + half] = pack<T>(scores[at], scores[at + 1]);
      }
    }
  }

  // dP becomes dS. A weight of 0 stands for what is not seen, where dP may be anything.
  template <bool kMasked>
  __device__ __forceinline__ void differentiate() {
    const uint32_t table = at(C::sums_at(queries.stage)) + lane_index() % 4 * 16 + 8;
#pragma unroll
    for (int i = 0; i < kQueries / 8; ++i) {
      uint2 sums;
      load_shared(table + i * 64, sums);
      const float delta[2] = {__uint_as_float(sums.x), __uint_as_float(sums.y)};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float gradient[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int at = 4 * i + 2 * half + j;
          gradient[j] = scores[at] * (dp[at] - delta[j]);
          if (kMasked) gradient[j] = scores[at] == 0 ? 0 : gradient[j];
        }
        ds[2 * i + half] = pack<T>(gradient[0], gradient[1]);
      }
    }
  }

  // dS as [queries, keys], for the warpgroup of dQ.
  __device__ __forceinline__ void hand_over_scores() {
    barrier_wait(barriers.scores_empty(buffer.stage), buffer.parity);
    const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / 32 % 4;
    const uint32_t panel = at(C::scores_at(buffer.stage)) + group * kQueries * kRowBytes;
    const uint32_t row = panel + (lane / 16 * 8 + lane % 8) * kRowBytes +
                         ((2 * warp + lane / 8 % 2 ^ lane % 8) << 4);
#pragma unroll
    for (int step = 0; step < kQueries / 16; ++step) {
      store_transposed(row + step * 16 * kRowBytes,
                       {ds[4 * step], ds[4 * step + 1], ds[4 * step + 2], ds[4 * step + 3]});
    }
    fence_async_proxy();
    release(barriers.scores_full(buffer.stage));
    buffer.advance();
  }

  // What the tile of queries before gave to dK is there: nobody here reads its stage any more.
  __device__ __forceinline__ void end_tile(int stage) {
    keep(dk);
    keep(ds);
    release(barriers.queries_empty(stage));
  }

  // A tile of queries. Its scores begin before the last product of the tile before is done, and its
  // own last one is under way at the end; dP waits for that one, whose left operand is where dP
  // was.
  __device__ __forceinline__ void attend(int first_key, int stage_before, bool first) {
    const int stage = queries.stage;
    barrier_wait(barriers.queries_full(stage), queries.parity);
    start_product(scores, at(C::keys_at(keys.stage)), at(C::queries_at(stage)));
    const bool masked =
        reinterpret_cast<const QueryTile*>(shared + C::kQueryTilesAt)[stage].flags & kMasked;
    mma_wait<1>();
    if (!first) end_tile(stage_before);
    start_product(dp, at(C::values_at(keys.stage)), at(C::dout_at(stage)));
    mma_wait<1>();
    keep(scores);
    if (masked) {
      weigh<true>(first_key);
    } else {
      weigh<false>(first_key);
    }
    start_gradient(dv, weights, at(C::dout_at(stage)));
    mma_wait<1>();
    keep(dp);
    if (masked) {
      differentiate<true>();
    } else {
      differentiate<false>();
    }
    hand_over_scores();
    start_gradient(dk, ds, at(C::queries_at(stage)));
    mma_wait<1>();
    keep(dv);
    keep(weights);
    queries.advance();
  }

  __device__ __forceinline__ void store(const Item& item) {
    const int first = item.first_key + group * 64, rows = p.num_keys, heads = p.num_kv_heads;
    store_rows<T, C::kWidth>(head_of<T>(p.dv, item.batch, rows, heads, item.head, p.value_dim),
                             int64_t{heads} * p.value_dim, first, rows, p.value_dim, dv, 1);
    store_rows<T, C::kWidth>(head_of<T>(p.dk, item.batch, rows, heads, item.head, p.dim),
                             int64_t{heads} * p.dim, first, rows, p.dim, dk, p.scale);
  }

  __device__ __forceinline__ void run() {
    while (true) {
      barrier_wait(barriers.keys_full(keys.stage), keys.parity);
      const Item item = reinterpret_cast<const Item*>(shared + C::kItemsAt)[keys.stage];
      if (item.count == kNoMore) return;
#pragma unroll
      for (int i = 0; i < C::kWidth / 2; ++i) dk[i] = dv[i] = 0;
      int stage = 0;
#pragma unroll 1
      for (int i = 0; i < item.count; ++i) {
        const int before = stage;
        stage = queries.stage;
        attend(item.first_key, before, i == 0);
      }
      mma_wait<0>();
      if (item.count > 0) end_tile(stage);
      release(barriers.keys_empty(keys.stage));
      keys.advance();
      store(item);
    }
  }
};

}  // namespace attention_bwd
}  // namespace vlmk

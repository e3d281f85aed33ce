// SPDX-License-Identifier: Apache-2.0
// The two warpgroups of heads of more than 128 columns. The sums of dK and dV of 64 keys take half
// of both's registers: each has half of the columns, and of those of dQ. Scores are cheap to share
// out by queries: each works out those of 32 with all keys, and both meet once for all sums.
#pragma once

#include <cstdint>

#include "attention_bwd/config.h"
#include "attention_bwd/pairs.h"
#include "common/hopper.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

template <typename C>
struct HalfGroup : PairGroup<C> {
  using Base = PairGroup<C>;
  using T = typename C::Element;
  using Base::at, Base::barriers, Base::buffer, Base::dk, Base::dq, Base::dv, Base::group, Base::p;
  using Base::queries, Base::shared, Base::x;

  // sums += (what lies at `scores`, as [queries, keys])^T times `rows`: dV or dK.
  __device__ __forceinline__ void start_gradient(float (&sums)[C::kOwnColumns / 2], uint32_t scores,
                                                 uint32_t rows) {
    constexpr int kPanelBytes = kQueries * C::kRowBytes;
    const uint64_t a = swizzled_descriptor(scores, kQueries * kScoreRow);
    static_assert(C::kOwnColumns % C::kPanel == 0);
    const uint64_t b = swizzled_descriptor(
        rows + group * (C::kOwnColumns / C::kPanel) * kPanelBytes, kPanelBytes, C::kRowBytes);
    keep(sums);
    mma_fence();
#pragma unroll
    for (int step = 0; step < kQueries / 16; ++step) {
      mma<T, C::kOwnColumns, true, true>(sums, a + (step * 16 * kScoreRow >> 4),
                                         b + (step * 16 * C::kRowBytes >> 4), true);
    }
    mma_commit();
  }

  template <bool kMasked>
  __device__ __forceinline__ void weigh_and_differentiate(int first_key,
                                                          const float2 (&lse)[C::kOwnQueries / 8]) {
    this->template weigh<kMasked>(x, first_key, lse);
    mma_wait<0>();
    keep(x.dp);
    this->template differentiate<kMasked>(x);
  }

  __device__ __forceinline__ void attend(int first_key) {
    const int stage = queries.stage;
    barrier_wait(barriers.queries_full(stage), queries.parity);
    this->begin_dp(x, stage);
    this->start_scores(x, stage);
    const QueryTile tile = query_tile_at<C>(shared, stage);
    this->start_dp(x, stage);
    float2 lse[C::kOwnQueries / 8];
#pragma unroll
    for (int i = 0; i < C::kOwnQueries / 8; ++i) lse[i] = this->load_pair(C::sums_at(stage), i);
    mma_wait<1>();
    keep(x.scores);
    if (tile.flags & kMasked) {
      weigh_and_differentiate<true>(first_key, lse);
    } else {
      weigh_and_differentiate<false>(first_key, lse);
    }
    const uint32_t ds = at(C::scores_at(buffer.stage)), weights = ds + kQueries * kScoreRow;
    const uint32_t own = C::own_query(group) * kScoreRow;
    this->store_scores(x.ds, ds + own);
    this->store_scores(x.weights, weights + own);
    fence_async_proxy();
    this->meet();
    this->start_own_columns(buffer.stage);
    start_gradient(dv, weights, at(C::dout_at(stage)));
    start_gradient(dk, ds, at(C::queries_at(stage)));
    mma_wait<2>();
    keep(dq);
    this->add_up(tile);
    buffer.advance();
    mma_wait<0>();
    keep(dv);
    this->end_tile(x, stage);
    queries.advance();
  }
};

}  // namespace attention_bwd
}  // namespace vlmk

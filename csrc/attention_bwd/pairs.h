// SPDX-License-Identifier: Apache-2.0
// The two warpgroups of wide heads. What keys.h does for 64 keys of each takes all registers but
// those of the scores, and these are free once dS is worked out: then the two meet, and each
// multiplies the dS of both with half of the columns of K.
#pragma once

#include <cstdint>

#include "attention_bwd/adder.h"
#include "attention_bwd/config.h"
#include "attention_bwd/counters.h"
#include "attention_bwd/keys.h"
#include "attention_bwd/queries.h"
#include "attention_bwd/store.h"
#include "common/hopper.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

constexpr int kPairBarrier = 11;  // of the first, then of the second

// One of two warpgroups, with so many columns of dQ.
template <typename C, int kColumns = C::kColumnsOfSums>
struct PairGroup : KeyGroup<C> {
  using Base = KeyGroup<C>;
  using T = typename C::Element;
  using Base::at, Base::barriers, Base::buffer, Base::dk, Base::dv, Base::group, Base::keys;
  using Base::p, Base::queries, Base::schedule, Base::shared, Base::workspace;

  Scores<C::kOwnQueries> x;
  float dq[kColumns / 2];
  uint32_t values_parity = 0;
  Ring<C::kTileSlots> tiles{0};  // what it gives to dQ is whose

  // Each at a barrier of its own, as they may come from two places (docs/sanitizer.md, synccheck).
  __device__ __forceinline__ void meet() {
    named_arrive<128 * kKeyGroups>(kPairBarrier + (group ^ 1));
    named_wait<128 * kKeyGroups>(kPairBarrier + group);
  }

  __device__ __forceinline__ int first_column() const { return group * C::kColumnsOfSums; }

  // dq = dS K, of this warpgroup's columns of K.
  __device__ __forceinline__ void start_own_columns(int stage) {
    const uint64_t a = swizzled_descriptor(at(C::scores_at(stage)), 16);
    constexpr int kPanelBytes = C::kKeys * C::kRowBytes;
    const uint64_t b =
        swizzled_descriptor(at(C::keys_at(keys.stage)) + first_column() / C::kPanel * kPanelBytes,
                            kPanelBytes, C::kRowBytes);
    keep(dq);
    mma_fence();
#pragma unroll
    for (int step = 0; step < C::kKeys / 16; ++step) {
      mma<T, kColumns, false, true>(dq,
                                    a + ((step / 4 * kQueries * kScoreRow + step % 4 * 32) >> 4),
                                    b + (step * 16 * C::kRowBytes >> 4), step > 0);
    }
    mma_commit();
  }

  __device__ __forceinline__ float4 sums(int i) const {
    return make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
  }

  __device__ __forceinline__ float4* place(const QueryTile& tile) const {
    return sums_of_tile<C>(static_cast<char*>(p.workspace) + workspace.dq, tile.dq) +
           first_column() / 8 * 128;
  }

  // To what other blocks add, by way of the warpgroup's adder.
  __device__ __forceinline__ void give(const QueryTile& tile) {
    const int thread = attention::thread_again() % 128, of = tile.dq;
    const uint32_t staging = at(C::sums_staging_at(group)) + thread * 16;
    named_wait<kGiveThreads>(kStagingFree + group);
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) store_shared(staging + i * 128 * 16, sums(i));
    tell_adder(of);
  }
  __device__ __forceinline__ void tell_adder(int tile) {
    store_shared_if(attention::thread_again() % 128 == 0,
                    shared_address(&staged_tile_at<C>(shared, group)), tile);
    __syncwarp();
    named_arrive<kGiveThreads>(kStagingFull + group);
  }

  // All that an item gives to dQ has been added, or its adder has it.
  __device__ __forceinline__ void tell_done(int counter) {
    if constexpr (C::kCopiedSums) {
      named_wait<kGiveThreads>(kStagingFree + group);
      tell_adder(kItemDone - counter);
    } else {
      Counters::add(Counters(p, schedule, workspace).done(counter));
    }
  }

  // Of a tile of queries, as QueryGroup::add_up.
  __device__ __forceinline__ void add_up(const QueryTile& tile) {
    if constexpr (C::kCopiedSums) {
      if (!C::kWhole) return give(tile);
    }
    float4* const sums_there = place(tile);
    const bool first = C::kWhole && tile.flags & kFirst;
    const bool last = C::kWhole && tile.flags & kLast;
    if (last && !first) {
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
        const float4 x = __ldcg(sums_there + i * 128);
        dq[4 * i] += x.x, dq[4 * i + 1] += x.y, dq[4 * i + 2] += x.z, dq[4 * i + 3] += x.w;
      }
    }
    if (last) {
      T* rows = head_of<T>(p.dq, tile.batch, p.num_queries, p.dq_stride_s, tile.head, p.dim);
      store_rows<T, kColumns>(rows + first_column(), p.dq_stride_s, tile.first_query, p.num_queries,
                              p.dim - first_column(), dq, p.scale);
      return;
    }
#pragma unroll
    for (int i = 0; i < kColumns / 8; ++i) {
      if (first) {
        __stcg(sums_there + i * 128, sums(i));
      } else {
        add_to_global(sums_there + i * 128, sums(i));
      }
    }
  }

  // dQ of the tile of queries before, of which both have stored dS a while ago.
  __device__ __forceinline__ void start_dq(int stage, uint32_t parity) {
    barrier_wait(barriers.scores_full(stage), parity);
    start_own_columns(stage);
  }
  __device__ __forceinline__ void end_dq(int stage) {
    release(barriers.scores_empty(stage));
    add_up(query_tile_at<C>(shared, tiles.stage));
    tiles.advance();
  }

  // The log-sum-exps of a tile of queries; dP begins as what each adds to it.
  __device__ __forceinline__ void load_numbers(int stage, float2 (&lse)[kQueries / 8]) {
#pragma unroll
    for (int i = 0; i < kQueries / 8; ++i) {
      uint4 pair;
      load_shared(at(C::sums_at(stage)) + lane_index() % 4 * 16 + i * 64, pair);
      lse[i] = make_float2(__uint_as_float(pair.x), __uint_as_float(pair.y));
      x.dp[4 * i] = x.dp[4 * i + 2] = __uint_as_float(pair.z);
      x.dp[4 * i + 1] = x.dp[4 * i + 3] = __uint_as_float(pair.w);
    }
    keep(x.dp);
  }

  // A tile of queries, with `behind` others.
  template <bool kBehind>
  __device__ __forceinline__ void attend(int first_key) {
    const int stage = queries.stage;
    barrier_wait(barriers.queries_full(stage), queries.parity);
    float2 lse[kQueries / 8];
    load_numbers(stage, lse);
    this->start_scores(x, stage);
    barrier_wait(barriers.values_full(), values_parity);
    this->start_dp(x, stage);
    const int slot = tiles.stage + kBehind == C::kTileSlots ? 0 : tiles.stage + kBehind;
    const bool masked = query_tile_at<C>(shared, slot).flags & kMasked;
    mma_wait<1>();
    keep(x.scores);
    if (masked) {
      this->template weigh<true>(x, first_key, lse);
    } else {
      this->template weigh<false>(x, first_key, lse);
    }
    this->start_gradient(dv, x.weights, at(C::dout_at(stage)));
    mma_wait<1>();
    keep(x.dp);
    if (masked) {
      this->template differentiate<true>(x);
    } else {
      this->template differentiate<false>(x);
    }
    barrier_wait(barriers.scores_empty(buffer.stage), buffer.parity);
    const uint32_t full = barriers.scores_full(buffer.stage);
    this->store_scores(x.ds, this->own_scores());
    buffer.advance();
    if (kBehind) start_dq(buffer.stage, buffer.parity);
    this->start_gradient(dk, x.ds, at(C::queries_at(stage)));
    // Beside these products, as nobody multiplies this dS before the next tile.
    fence_async_proxy();
    release(full);
    mma_wait<1>();
    keep(dv);
    keep(x.weights);
    if (kBehind) {
      keep(dq);
      end_dq(buffer.stage);
    }
    mma_wait<0>();
    this->end_tile(x, stage);
    queries.advance();
  }

  // What is left of an item behind its last tile of queries.
  __device__ __forceinline__ void end_all() {
    const int stage = buffer.stage ^ 1;
    start_dq(stage, buffer.parity ^ buffer.stage);
    mma_wait<0>();
    keep(dq);
    end_dq(stage);
  }

  // With what takes the first tile of queries of an item and the next ones, and what is left then.
  template <typename First, typename Next, typename End>
  __device__ __forceinline__ void run(First first, Next next, End end) {
    for (int items = 0;; ++items) {
      barrier_wait(barriers.keys_full(keys.stage), keys.parity);
      const Item& item = item_at<C>(shared, keys.stage);
      if (item.count == kNoMore) break;
      const int count = item.count * schedule.group_heads, first_key = item.first_key;
#pragma unroll
      for (int i = 0; i < C::kOwnColumns / 2; ++i) dk[i] = dv[i] = 0;
      if (count > 0) {
        clear_unseen<C, 128 * kKeyGroups>(p, item, shared + C::keys_at(keys.stage),
                                          [&] { meet(); });
      }
      if (!C::kHalves) {
        if (count > 0) first(first_key);
        if (items > 0) this->end_item(keys.stage ^ 1);
      }
#pragma unroll 1
      for (int i = C::kHalves ? 0 : 1; i < count; ++i) next(first_key);
      if (C::kCopiedSums && count == 0) barrier_wait(barriers.values_full(), values_parity);
      if (count > 0) end();
      meet();  // nobody multiplies the keys any more
      if (!C::kWhole && schedule.parts > 1) {
        add_part(*this);
      } else {
        this->write(dv, 1, this->dv_tile());
        this->write(dk, p.scale, this->dk_tile());
        this->send();
      }
      if (!C::kWhole) tell_done(item_at<C>(shared, keys.stage).done);
      if (C::kItemStages == 1) this->end_item(keys.stage);
      if (C::kCopiedSums) {
        if (lane_index() == 0) store_wait_read<1>();  // all but dK's
        release(barriers.values_empty());
        values_parity ^= 1;
      }
      keys.advance();
    }
    if constexpr (C::kCopiedSums) {
      named_wait<kGiveThreads>(kStagingFree + group);
      tell_adder(kNoTile);
    }
    if (lane_index() == 0) store_wait_read();
  }
};

}  // namespace attention_bwd
}  // namespace vlmk

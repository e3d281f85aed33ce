// SPDX-License-Identifier: Apache-2.0
// The warpgroup of dQ: for each tile of queries, dS times K, added to what other tiles of keys
// give.
#pragma once

#include <cstdint>

#include "attention/ranges.h"
#include "attention_bwd/config.h"
#include "attention_bwd/counters.h"
#include "attention_bwd/last_keys.h"
#include "attention_bwd/store.h"
#include "common/hopper.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

constexpr int kQueryGroupBarrier = 1;

// Keys of an item that nobody sees become zero: whatever they hold, infinity and NaN too, would
// come into dQ with a gradient of 0. Meanwhile others may read them for scores that are masked
// anyway.
template <typename C, int kThreads, typename Meet>
__device__ __forceinline__ void clear_unseen(const VlmkAttentionBwdParams& p, const Item& item,
                                             char* keys, Meet meet) {
  const int lo = item.lo - item.first_key, hi = item.hi - item.first_key;
  if (lo <= 0 && (hi >= C::kKeys || item.hi >= p.num_keys)) return;
  constexpr int kWords = C::kRowBytes / 16;
#pragma unroll 1
  for (int i = attention::thread_again() % kThreads; i < C::kKeysBytes / 16; i += kThreads) {
    const int key = i / kWords % C::kKeys;
    if (key < lo || key >= hi) reinterpret_cast<uint4*>(keys)[i] = make_uint4(0, 0, 0, 0);
  }
  fence_async_proxy();
  meet();
}

template <typename C>
struct QueryGroup {
  using T = typename C::Element;

  const VlmkAttentionBwdParams& p;
  const Schedule& schedule;
  const Workspace& workspace;
  char* shared;
  Barriers barriers;
  Ring<C::kItemStages> keys{0};
  Ring<C::kStages> queries{0};
  Ring<C::kScoreStages> buffer{0};

  float dq[C::kWidth / 2];

  // dq += dS K.
  __device__ __forceinline__ void multiply() {
    barrier_wait(barriers.scores_full(buffer.stage), buffer.parity);
    fence_async_proxy();
    const uint32_t base = shared_address(shared);
    const uint64_t a = swizzled_descriptor(base + C::scores_at(buffer.stage), 16);
    uint32_t tile_of_keys = base + C::keys_at(keys.stage);
    asm volatile("" : "+r"(tile_of_keys));  // what nvcc works out before all tiles takes registers
    const uint64_t b = swizzled_descriptor(tile_of_keys, C::kKeys * C::kRowBytes, C::kRowBytes);
    keep(dq);
    mma_fence();
#pragma unroll
    for (int step = 0; step < C::kKeys / 16; ++step) {
      mma<T, C::kWidth, false, true>(dq,
                                     a + ((step / 4 * kQueries * kScoreRow + step % 4 * 32) >> 4),
                                     b + (step * 16 * C::kRowBytes >> 4), true);
    }
    mma_commit();
    mma_wait<0>();
    keep(dq);
    attention::release(barriers.scores_empty(buffer.stage));
    buffer.advance();
  }

  __device__ __forceinline__ float4 sums(int i) const {
    return make_float4(dq[4 * i], dq[4 * i + 1], dq[4 * i + 2], dq[4 * i + 3]);
  }

  __device__ __forceinline__ void store(float4* place) const {
#pragma unroll
    for (int i = 0; i < C::kWidth / 8; ++i) __stcg(place + i * 128, sums(i));
  }

  // Of a tile of queries. Where blocks share a head, each adds to the sums in memory, in the order
  // in which they come. Else the first tile of keys leaves its sums there, others add to them, and
  // the last takes them up again and stores the result: they have stayed in L2, and every thread
  // finds there what it has left itself.
  __device__ __forceinline__ void add_up(const QueryTile& tile, int of_item) {
    float4* place = sums_of_tile<C>(static_cast<char*>(p.workspace) + workspace.dq, tile.dq);
    const bool first = C::kWhole && tile.flags & kFirst;
    const bool last = C::kWhole && tile.flags & kLast;
    if (last && !first) {
      take_sums(place, dq);  // while dS is not there yet
    } else {
#pragma unroll
      for (int i = 0; i < C::kWidth / 2; ++i) dq[i] = 0;
    }
    multiply();
    if (of_item >= 0) last_keys(of_item).add_to(dq);
    if (last) {
      store_rows<T, C::kWidth>(
          head_of<T>(p.dq, tile.batch, p.num_queries, p.dq_stride_s, tile.head, p.dim),
          p.dq_stride_s, tile.first_query, p.num_queries, p.dim, dq, p.scale);
    } else if (first) {
      store(place);
    } else {
      add_sums(place, dq);
    }
  }

  __device__ __forceinline__ LastKeys<C> last_keys(int tile) const {
    return {p, schedule, workspace, shared, keys.stage, tile};
  }

  __device__ __forceinline__ void run() {
    while (true) {
      barrier_wait(barriers.keys_full(keys.stage), keys.parity);
      const Item& item = item_at<C>(shared, keys.stage);
      if (item.count == kNoMore) return;
      const int count = item.count * schedule.group_heads;
      if (count > 0) {
        clear_unseen<C, 128>(p, item, shared + C::keys_at(keys.stage),
                             [] { named_wait<128>(kQueryGroupBarrier); });
      }
      const bool with_last_keys = C::kTakesLastKeys && schedule.main_keys < p.num_keys &&
                                  item.first_key + C::kKeys == schedule.main_keys;
      if (with_last_keys) last_keys(0).begin();
#pragma unroll 1
      for (int i = 0; i < count; ++i) {
        barrier_wait(barriers.queries_full(queries.stage), queries.parity);
        if (with_last_keys) last_keys(i).attend(queries.stage);
        const QueryTile tile = query_tile_at<C>(shared, queries.stage);
        attention::release(barriers.queries_empty(queries.stage));
        queries.advance();
        add_up(tile, with_last_keys ? i : -1);
      }
      if (!C::kWhole) {
        Counters::add(Counters(p, schedule, workspace).done(item.done));
      } else if (with_last_keys) {
        last_keys(0).end();
      }
      attention::release(barriers.keys_empty(keys.stage));
      keys.advance();
    }
  }
};

}  // namespace attention_bwd
}  // namespace vlmk

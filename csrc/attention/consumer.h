// SPDX-License-Identifier: Apache-2.0
// A warpgroup's 64 queries: scores, softmax and the sum of values, over the tiles of keys that the
// producer brings.
//
// While the softmax of one tile runs, the tensor cores multiply the weights of the tile before with
// its values, and the scores of the other warpgroups: these take turns, so that one's products run
// beside another's softmax.
#pragma once

#include <cstdint>

#include "attention/config.h"
#include "attention/ranges.h"
#include "attention/softmax.h"
#include "common/hopper.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

// Barriers in hardware.
constexpr int kTurnBarrier = 1;  // and one more for each further warpgroup
constexpr int kGroupsBarrier = 5;

template <typename C>
struct Consumer {
  const VlmkAttentionParams& p;
  char* shared;
  Barriers barriers;
  int group;
  float scale;  // of scores, to units of log2
  Ring<C::kQueryStages> queries{0};
  Ring<C::kStages> keys{0}, values{0};

  float scores[C::kKeys / 2];
  uint32_t weights[C::kKeys / 4];
  float sums[C::kWidth / 2];

  __device__ __forceinline__ void wait_turn() { named_wait<256>(kTurnBarrier + group); }
  __device__ __forceinline__ void pass_turn() {
    named_arrive<256>(kTurnBarrier + (group + 1 < C::kGroups ? group + 1 : 0));
  }

  __device__ __forceinline__ void release(uint32_t barrier) {
    __syncwarp();
    if (lane_index() == 0) barrier_arrive(barrier);
  }

  // scores = queries times keys of the stage at hand.
  __device__ __forceinline__ void start_scores() {
    const uint32_t q =
        shared_address(shared) + queries.stage * C::kQueryBytes + group * kGroupQueries * kRowBytes;
    const uint32_t k = shared_address(shared) + C::kKeysAt + keys.stage * C::kTileBytes;
    const uint64_t a = swizzled_descriptor(q, 16);
    const uint64_t b = swizzled_descriptor(k, 16);
    keep(scores);
    mma_fence();
#pragma unroll
    for (int step = 0; step < C::kDepth / 16; ++step) {
      const int panel = step * 16 / kPanel, inside = step * 32 % kRowBytes;
      mma<typename C::Element, C::kKeys>(
          scores, a + ((panel * C::kQueries * kRowBytes + inside) >> 4),
          b + ((panel * C::kKeys * kRowBytes + inside) >> 4), step > 0);
    }
    mma_commit();
  }

  __device__ __forceinline__ void end_scores(bool last) {
    keep(scores);
    release(barriers.keys_empty(keys.stage));
    keys.advance();
    if (last) release(barriers.queries_empty(queries.stage));
  }

  // sums += weights times values of the stage at hand.
  __device__ __forceinline__ void start_sums(bool add) {
    const uint32_t v = shared_address(shared) + C::kValuesAt + values.stage * C::kTileBytes;
    const uint64_t b = swizzled_descriptor(v, C::kKeys * kRowBytes);
    keep(sums);
    keep(weights);
    mma_fence();
#pragma unroll
    for (int step = 0; step < C::kKeys / 16; ++step) {
      const uint32_t a[4] = {weights[4 * step], weights[4 * step + 1], weights[4 * step + 2],
                             weights[4 * step + 3]};
      mma<typename C::Element, C::kWidth, true>(sums, a, b + (step * 16 * kRowBytes >> 4),
                                                add || step > 0);
    }
    mma_commit();
  }

  __device__ __forceinline__ void end_sums() {
    keep(sums);
    keep(weights);
    release(barriers.values_empty(values.stage));
    values.advance();
  }

  // The last tile may reach behind what any query of the block sees, where infinity and NaN may
  // lie: times a weight of 0 they are NaN.
  __device__ __forceinline__ void clear_unseen(const Work& work) {
    const int first = work.stop_key - work.first_key - (work.num_tiles - 1) * C::kKeys;
    if (first == C::kKeys || work.stop_key == p.num_keys) return;
    if (group == 0) {
      char* tile = shared + C::kValuesAt + values.stage * C::kTileBytes;
      constexpr int kWords = kRowBytes / 16;
      const int count = (C::kKeys - first) * kWords;
#pragma unroll 1
      for (int panel = 0; panel < C::kPanels; ++panel) {
        auto* words =
            reinterpret_cast<uint4*>(tile + panel * C::kKeys * kRowBytes) + first * kWords;
        for (int i = static_cast<int>(threadIdx.x) % 128; i < count; i += 128) {
          words[i] = make_uint4(0, 0, 0, 0);
        }
      }
      fence_async_proxy();
    }
    named_wait<128 * C::kGroups>(kGroupsBarrier);
  }

  __device__ __forceinline__ void wait_values(const Work& work, int i) {
    barrier_wait(barriers.values_full(values.stage), values.parity);
    if (i == work.num_tiles - 1) clear_unseen(work);
  }

  __device__ __forceinline__ float2 attend(Softmax& softmax, const int4& bounds,
                                           const int2 (&range)[2], int first_key) {
    float unit = scale;
    if (p.softcap > 0) {
      cap_scores(scores, scale, p.softcap);
      unit = 1;
    }
    if (first_key < bounds.z || first_key + C::kKeys > bounds.w) {
      const int2 seen[2] = {cut(p, range[0]), cut(p, range[1])};
      const int2 relative[2] = {make_int2(seen[0].x - first_key, seen[0].y - first_key),
                                make_int2(seen[1].x - first_key, seen[1].y - first_key)};
      mask_scores<C::kKeys>(scores, relative);
    }
    return softmax.step(scores, unit);
  }

  // A tile that no query of this warpgroup sees.
  __device__ __forceinline__ void pass_tile(const Work& work, int i) {
    barrier_wait(barriers.keys_full(keys.stage), keys.parity);
    release(barriers.keys_empty(keys.stage));
    keys.advance();
    wait_turn();
    pass_turn();
    wait_values(work, i);
    release(barriers.values_empty(values.stage));
    values.advance();
  }

  __device__ __forceinline__ void work_on(const Work& work, int4 bounds) {
    // Of the block's tiles, those that this warpgroup's queries see.
    const int begin = bounds.y > bounds.x ? (bounds.x - work.first_key) / C::kKeys : work.num_tiles;
    const int end = bounds.y > bounds.x ? ceil_div(bounds.y - work.first_key, C::kKeys) : begin;
    const int query = work.first_query + group * kGroupQueries +
                      static_cast<int>(threadIdx.x) % 128 / 32 * 16 + lane_index() / 4;
    const int2 range[2] = {range_of_query(p, work.batch, query),
                           range_of_query(p, work.batch, query + 8)};
    Softmax softmax;
    for (int i = 0; i < begin; ++i) pass_tile(work, i);
    if (begin < end) {
      barrier_wait(barriers.keys_full(keys.stage), keys.parity);
      wait_turn();
      start_scores();
      pass_turn();
      mma_wait<0>();
      end_scores(begin == end - 1);
      attend(softmax, bounds, range, work.first_key + begin * C::kKeys);
      pack_weights<C>(weights, scores);
      for (int i = begin + 1; i < end; ++i) {
        barrier_wait(barriers.keys_full(keys.stage), keys.parity);
        wait_turn();
        start_scores();
        wait_values(work, i - 1);
        start_sums(i - 1 > begin);
        pass_turn();
        mma_wait<1>();
        end_scores(i == end - 1);
        const float2 shrink = attend(softmax, bounds, range, work.first_key + i * C::kKeys);
        mma_wait<0>();
        end_sums();
#pragma unroll
        for (int j = 0; j < C::kWidth / 2; j += 4) {
          sums[j] *= shrink.x, sums[j + 1] *= shrink.x;
          sums[j + 2] *= shrink.y, sums[j + 3] *= shrink.y;
        }
        pack_weights<C>(weights, scores);
      }
      wait_values(work, end - 1);
      start_sums(end - 1 > begin);
      mma_wait<0>();
      end_sums();
    } else {
      release(barriers.queries_empty(queries.stage));
#pragma unroll
      for (int j = 0; j < C::kWidth / 2; ++j) sums[j] = 0;
    }
    for (int i = end; i < work.num_tiles; ++i) pass_tile(work, i);
    softmax.finish();
    store_queries<C>(p, work.batch, work.head, query, sums, softmax);
  }

  __device__ __forceinline__ void run() {
    // The first warpgroup may begin.
    if (group == C::kGroups - 1) pass_turn();
    while (true) {
      const int stage = queries.stage;
      barrier_wait(barriers.queries_full(stage), queries.parity);
      const Work work = reinterpret_cast<const Work*>(shared + C::kWorkAt)[stage];
      if (work.num_tiles == kNoMore) return;
      work_on(work,
              reinterpret_cast<const int4*>(shared + C::kBoundsAt)[stage * C::kGroups + group]);
      queries.advance();
    }
  }
};

}  // namespace attention
}  // namespace vlmk

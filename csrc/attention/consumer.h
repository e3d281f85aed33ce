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
#include "attention/store.h"
#include "common/hopper.h"
#include "common/mma.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

// Barriers in hardware.
constexpr int kTurnBarrier = 1;   // and one more for each further warpgroup
constexpr int kGroupBarrier = 5;  // the same

template <typename C>
struct Consumer {
  using Columns = typename C::Columns;
  const VlmkAttentionParams& p;
  const Maps& maps;
  const Schedule& schedule;
  char* shared;
  Barriers barriers;
  int group;
  Ring<C::kQueryStages> queries{0};
  Ring<C::kStages> keys{0}, values{0};

  // The tile of queries at hand, and the tiles of keys that any query of this warpgroup sees.
  Work work;
  int begin, end;
  int4 bounds;    // see bounds_of_queries; not with kTight
  int2 range[2];  // of this thread's two queries; the same
  // Whether all queries are settled: with kPackEarly, where the warps of a warpgroup must not
  // differ in where they wait for sums. (PTX asks that of them.)
  bool trusting;

  float scores[C::kKeys / 2];
  uint32_t weights[C::kKeys / 4];
  float sums[C::kWidth / 2];

  __device__ __forceinline__ void wait_turn() { named_wait<256>(kTurnBarrier + group); }
  __device__ __forceinline__ void pass_turn() {
    named_arrive<256>(kTurnBarrier + (group + 1 < C::kGroups ? group + 1 : 0));
  }

  // scores = queries times keys of the stage at hand.
  __device__ __forceinline__ void start_scores() {
    const uint32_t q = shared_address(shared) + queries.stage * C::kQueryBytes;
    const uint32_t k = shared_address(shared) + C::kKeysAt + keys.stage * C::kKeyBytes;
    keep(scores);
    mma_fence();
#pragma unroll
    for (int step = 0; step < C::kDepth / 16; ++step) {
      const int panel = step * 16 / kPanel, inside = step * 32 % kRowBytes;
      const int bytes = Columns::row_bytes(panel);
      const uint64_t a = row_descriptor(
          q + panel * C::kQueries * kRowBytes + group * kGroupQueries * bytes, bytes);
      const uint64_t b = row_descriptor(k + panel * C::kKeys * kRowBytes, bytes);
      mma<typename C::Element, C::kKeys>(scores, a + (inside >> 4), b + (inside >> 4), step > 0);
    }
    mma_commit();
  }

  // This warp's scores of the same stage once more, by its own products.
  __device__ __forceinline__ void multiply_keys_again() {
    const int thread = thread_again(), lane = thread % 32, first = thread / 32 * 16;
    const uint32_t q = shared_address(shared) + queries.stage * C::kQueryBytes;
    const uint32_t k = shared_address(shared) + C::kKeysAt + keys.stage * C::kKeyBytes;
#pragma unroll
    for (int i = 0; i < C::kKeys / 2; ++i) scores[i] = 0;
#pragma unroll 1
    for (int step = 0; step < C::kDepth / 16; ++step) {
      uint32_t a[4], b[4];
      load_matrices(a,
                    q + Columns::template word_at<C::kQueries>(first + lane % 16, step, lane / 16));
      const uint32_t rows =
          k + Columns::template word_at<C::kKeys>(lane % 8 + lane / 16 * 8, step, lane / 8 % 2);
      const int bytes = Columns::row_bytes(step * 16 / kPanel);
#pragma unroll
      for (int i = 0; i < C::kKeys / 16; ++i) {
        load_matrices(b, rows + i * 16 * bytes);
        mma_add<typename C::Element>(&scores[8 * i], a, b[0], b[1]);
        mma_add<typename C::Element>(&scores[8 * i + 4], a, b[2], b[3]);
      }
    }
  }

  __device__ __forceinline__ void end_keys() {
    release(barriers.keys_empty(keys.stage));
    keys.advance();
  }

  // No scores of the tile of queries at hand are to come.
  __device__ __forceinline__ void end_queries() {
    if (!C::kStaged) release(barriers.queries_empty(queries.stage));
  }

  // sums += weights times values of the stage at hand.
  __device__ __forceinline__ void start_sums(bool add) {
    const uint32_t v = shared_address(shared) + C::kValuesAt + values.stage * C::kValueBytes;
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

  __device__ __forceinline__ void end_values() {
    release(barriers.values_empty(values.stage));
    values.advance();
  }

  __device__ __forceinline__ void end_sums() {
    keep(sums);
    keep(weights);
    end_values();
  }

  // The last tile may reach behind what any query of the block sees, where infinity and NaN may
  // lie: times a weight of 0 they are NaN. Each warpgroup that reads it writes the same zeros.
  __device__ __forceinline__ void clear_unseen() {
    const int first = work.stop_key - work.first_key - (work.num_tiles - 1) * C::kKeys;
    if (first == C::kKeys || work.stop_key == p.num_keys) return;
    char* tile = shared + C::kValuesAt + values.stage * C::kValueBytes;
    constexpr int kWords = kRowBytes / 16;
    const int count = (C::kKeys - first) * kWords;
#pragma unroll 1
    for (int panel = 0; panel < C::kValuePanels; ++panel) {
      auto* words = reinterpret_cast<uint4*>(tile + panel * C::kKeys * kRowBytes) + first * kWords;
#pragma unroll 1
      for (int i = static_cast<int>(threadIdx.x) % 128; i < count; i += 128) {
        words[i] = make_uint4(0, 0, 0, 0);
      }
    }
    fence_async_proxy();
    named_wait<128>(kGroupBarrier + group);
  }

  __device__ __forceinline__ void wait_values(int i) {
    barrier_wait(barriers.values_full(values.stage), values.parity);
    if (C::kMasked && i == work.num_tiles - 1) clear_unseen();
  }

  __device__ __forceinline__ int4 bounds_at_hand() const {
    if (!C::kTight) return bounds;
    const int at = queries.stage * C::kGroups + group;
    uint4 x;
    load_shared(shared_address(shared) + C::kBoundsAt + at * sizeof(int4), x);
    return make_int4(x.x, x.y, x.z, x.w);
  }

  __device__ __forceinline__ int2 range_at_hand(int half) const {
    return C::kTight ? range_of_query(p, work.batch, own_query(work) + 8 * half) : range[half];
  }

  // Softcap and mask, on the scores of a tile's first kColumns; their unit over log2.
  template <int kColumns>
  __device__ __forceinline__ float finish_scores(int first_key) {
    const float scale = p.scale * kLog2E;
    float unit = scale;
    if constexpr (C::kCapped) {
      cap_scores<kColumns / 2>(scores, scale, p.softcap);
      unit = 1;
    }
    if constexpr (C::kMasked) {
      const int4 own = bounds_at_hand();
      if (first_key < own.z || first_key + kColumns > own.w) {
        const int2 seen[2] = {cut(p, range_at_hand(0)), cut(p, range_at_hand(1))};
        const int2 relative[2] = {make_int2(seen[0].x - first_key, seen[0].y - first_key),
                                  make_int2(seen[1].x - first_key, seen[1].y - first_key)};
        mask_scores<kColumns>(scores, relative);
      }
    } else if (first_key + kColumns > p.num_keys) {
      mask_end<kColumns>(scores, p.num_keys - first_key);
    }
    return unit;
  }

  // No use any more for the keys of tile i, nor for the queries if it is the last.
  __device__ __forceinline__ void end_scores(int i) {
    end_keys();
    if (i == end - 1) end_queries();
  }

  // Scores at i and i + 1, which are weights by now, as the operand of the next product.
  __device__ __forceinline__ void pack_weights(int i) {
    weights[i / 2] = pack<typename C::Element>(scores[i], scores[i + 1]);
  }

  // Whether every query of the warpgroup has a maximum, or sees no key.
  __device__ __forceinline__ bool all_settled(const Softmax& softmax) const {
    bool settled = true;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      bool empty = false;
      if constexpr (C::kMasked) {
        const int2 seen = cut(p, range_at_hand(half));
        empty = seen.x >= seen.y;
      }
      settled &= empty || softmax.maximum[half] > -INFINITY;
    }
    return !named_any<128>(kGroupBarrier + group, !settled);
  }

  // The registers that packed weights go to are in use until the sums of the tile before are there.
  template <bool kSumming>
  __device__ __forceinline__ void free_weights() {
    if (kSumming) {
      mma_wait<0>();
      end_sums();
    }
  }

  // What to do as weights come. With kSumming the sums of the tile before are waited for halfway,
  // when they have long been there, so that packing runs beside exponentials.
  template <int kColumns, bool kSumming>
  __device__ __forceinline__ auto pack_from_halfway() {
    return [this](int half, int i) {
      if (!C::kPackEarly || half == 0) return;
      if (i == 2) {
        free_weights<kSumming>();
#pragma unroll
        for (int j = 0; j < kColumns / 2; j += 4) pack_weights(j);
      }
      pack_weights(i);
    };
  }

  // The weights of columns that nobody sees, behind the first kColumns.
  template <int kColumns>
  __device__ __forceinline__ void clear_weights() {
#pragma unroll
    for (int j = kColumns / 2; j < C::kKeys / 2; j += 2) {
      if (C::kPackEarly) {
        weights[j / 2] = 0;
      } else {
        scores[j] = scores[j + 1] = 0;
      }
    }
  }

  // The scores of a tile's first kColumns become weights by the maximum at hand. False if that is
  // too small, which shows in the weights: to look for it beforehand would be a fifth of the
  // softmax's instructions, which are what bounds it.
  template <int kColumns, bool kSumming>
  __device__ __forceinline__ bool trust(Softmax& softmax, int first_key) {
    const float unit = finish_scores<kColumns>(first_key);
    const auto pack = pack_from_halfway<kColumns, kSumming>();
    if (!softmax.template weigh<kColumns / 2>(scores, unit, pack)) return false;
    clear_weights<kColumns>();
    return true;
  }

  // The same by their own maximum; true if the sums so far have to shrink.
  template <int kColumns, typename Pack>
  __device__ __forceinline__ bool look(Softmax& softmax, int first_key, Pack pack) {
    const float unit = finish_scores<kColumns>(first_key);
    const bool grows = softmax.template raise<kColumns / 2>(scores, unit);
    softmax.template weigh<kColumns / 2>(scores, unit, pack);
    clear_weights<kColumns>();
    return grows;
  }

  // Whether a tile that is not the first is weighed by the maximum at hand.
  __device__ __forceinline__ bool trusts(const Softmax& softmax) {
    if (C::kTight) return softmax.settled_now();
    if (!C::kPackEarly) return softmax.settled;
    if (!trusting) trusting = all_settled(softmax);
    return trusting;
  }

  // Weighs the first kColumns of a tile; true if the sums so far have to shrink.
  template <int kColumns, bool kSumming>
  __device__ __forceinline__ bool weigh_columns(Softmax& softmax, int first_key) {
    if constexpr (!C::kTrusting) {
      return look<kColumns>(softmax, first_key, pack_from_halfway<kColumns, kSumming>());
    }
    if (!kSumming) {
      trusting = false;
    } else if (trusts(softmax)) {
      if (trust<kColumns, kSumming>(softmax, first_key)) return false;
      multiply_keys_again();
    } else if (C::kPackEarly) {
      free_weights<kSumming>();
    }
    return look<kColumns>(softmax, first_key, [this](int, int i) {
      if (C::kPackEarly) pack_weights(i);
    });
  }

  // The weights of tile i, packed.
  template <bool kSumming>
  __device__ __forceinline__ bool attend(Softmax& softmax, int i) {
    const int first_key = work.first_key + i * C::kKeys;
    const int stop_key = C::kMasked ? bounds_at_hand().y : p.num_keys;
    if (!C::kTrusting) end_scores(i);
    const bool grows = first_key + C::kPart >= stop_key
                           ? weigh_columns<C::kPart, kSumming>(softmax, first_key)
                           : weigh_columns<C::kKeys, kSumming>(softmax, first_key);
    if (C::kTrusting) end_scores(i);
    if (!C::kPackEarly) {
      free_weights<kSumming>();
#pragma unroll
      for (int j = 0; j < C::kKeys / 2; j += 2) pack_weights(j);
    }
    return grows;
  }

  __device__ __forceinline__ void pass_scores() {
    barrier_wait(barriers.keys_full(keys.stage), keys.parity);
    end_keys();
    wait_turn();
    pass_turn();
  }

  __device__ __forceinline__ void pass_values() {
    barrier_wait(barriers.values_full(values.stage), values.parity);
    end_values();
  }

  __device__ __forceinline__ Work work_at(int stage) const {
    return reinterpret_cast<const Work*>(shared + C::kWorkAt)[stage];
  }

  // This thread's first query of two.
  __device__ __forceinline__ int own_query(const Work& work) const {
    const int thread = thread_again();
    return work.first_query + thread / 32 * 16 + thread % 32 / 4;
  }

  // Waits for the next tile of queries; false if there is none.
  __device__ __forceinline__ bool take() {
    barrier_wait(barriers.queries_full(queries.stage), queries.parity);
    work = work_at(queries.stage);
    if (work.num_tiles == kNoMore) return false;
    const int first = work.first_query + group * kGroupQueries;
    if constexpr (C::kMasked) {
      const int4 own =
          reinterpret_cast<const int4*>(shared + C::kBoundsAt)[queries.stage * C::kGroups + group];
      const bool any = own.y > own.x;
      begin = any ? (own.x - work.first_key) / C::kKeys : work.num_tiles;
      end = any ? ceil_div(own.y - work.first_key, C::kKeys) : begin;
      if (!C::kTight) {
        bounds = own;
        range[0] = range_of_query(p, work.batch, own_query(work));
        range[1] = range_of_query(p, work.batch, own_query(work) + 8);
      }
    } else {
      begin = 0;
      end = first < schedule.main_queries ? work.num_tiles : 0;
    }
    return true;
  }

  // The scores of the first tile.
  __device__ __forceinline__ void begin_scores(bool there) {
    if (there) {
      barrier_wait(barriers.keys_full(keys.stage), keys.parity);
      wait_turn();
    }
    start_scores();
    if (there) pass_turn();
  }

  // From the scores of the first tile on, which are there, until the last product is under way.
  __device__ __forceinline__ void attend_tiles(Softmax& softmax) {
    attend<false>(softmax, begin);
    for (int i = begin + 1; i < end; ++i) {
      barrier_wait(barriers.keys_full(keys.stage), keys.parity);
      wait_turn();
      start_scores();
      if (C::kTurnOfScores) pass_turn();
      wait_values(i - 1);
      start_sums(i - 1 > begin);
      if (!C::kTurnOfScores) pass_turn();
      mma_wait<1>();
      keep(scores);
      if (attend<true>(softmax, i)) {
#pragma unroll
        for (int j = 0; j < C::kWidth / 2; ++j) sums[j] *= softmax.shrink[j / 2 % 2];
      }
    }
    wait_values(end - 1);
    start_sums(end - 1 > begin);
  }

  __device__ __forceinline__ void pass_tiles(int count) {
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      pass_scores();
      pass_values();
    }
  }

  // The results of the tile of queries whose stage this is.
  __device__ __forceinline__ void store(Softmax& softmax, int stage) {
    softmax.finish();
    if constexpr (C::kStaged) {
      const Work done = work_at(stage);
      store_lse(p, done, own_query(done), softmax);
      store_staged<C>(p, maps, done, shared_address(shared) + stage * C::kQueryBytes, sums,
                      softmax);
      store_wait_read();
      release(barriers.queries_empty(stage));
    } else {
      store_direct<C>(p, work, own_query(work), sums, softmax);
      store_lse(p, work, own_query(work), softmax);
    }
  }

  // Of queries that see no key.
  __device__ __forceinline__ void store_nothing(int stage) {
    const Work done = work_at(stage);
    const int own = own_query(done);
    store_zeros<C>(p, done, own);
    store_lse(p, done, own, Softmax());
    release(barriers.queries_empty(stage));
  }

  // While the results of a tile of queries are stored, the first scores of the next are under way.
  // The next tile is taken in two places: in one, behind both cases, D 72 spilled a register.
  __device__ __forceinline__ void run_overlapped() {
    bool more = take();
    begin_scores(more);
    while (more) {
      mma_wait<0>();
      keep(scores);
      if (begin < end) {
        Softmax softmax;
        attend_tiles(softmax);
        queries.advance();
        more = take();
        begin_scores(more);
        mma_wait<1>();
        end_sums();
        store(softmax, queries.stage ^ 1);
      } else {
        end_keys();
        pass_values();
        pass_tiles(work.num_tiles - 1);
        queries.advance();
        more = take();
        begin_scores(more);
        release(barriers.queries_empty(queries.stage ^ 1));
      }
    }
    mma_wait<0>();
  }

  // Takes the next tile of queries, and begins its first scores if nothing has to be passed over
  // before them. Else what is begun is nobody's.
  __device__ __forceinline__ bool take_early(bool& more) {
    queries.advance();
    more = take();
    const bool early = more && begin == 0 && end > 0;
    begin_scores(early);
    return early;
  }

  // The same with a mask. Who sees none of the last keys stores while the others go on; and where
  // keys are few, memory is what is waited for, and the store must not wait for the next of them.
  __device__ __forceinline__ void run_masked() {
    constexpr int kFewTiles = 4;
    bool more = take(), early = false;
    while (more) {
      const int stage = queries.stage;
      if (!early) {
        mma_wait<0>();  // ptxas gives the registers of scores that are nobody's to addresses
        pass_tiles(begin);
        if (begin == end) {
          store_nothing(stage);
          early = take_early(more);
          continue;
        }
        begin_scores(true);
      }
      mma_wait<0>();
      keep(scores);
      Softmax softmax;
      attend_tiles(softmax);
      const int rest = work.num_tiles - end;
      if (rest > 0 || work.num_tiles <= kFewTiles) {
        mma_wait<0>();
        end_sums();
        store(softmax, stage);
        pass_tiles(rest);
        early = take_early(more);
      } else {
        early = take_early(more);
        mma_wait<1>();
        end_sums();
        store(softmax, stage);
      }
    }
    mma_wait<0>();
  }

  __device__ __forceinline__ void run_apart() {
    while (take()) {
      Softmax softmax;
      pass_tiles(begin);
      if (begin < end) {
        begin_scores(true);
        mma_wait<0>();
        keep(scores);
        attend_tiles(softmax);
        mma_wait<0>();
        end_sums();
      } else {
        end_queries();
#pragma unroll
        for (int j = 0; j < C::kWidth / 2; ++j) sums[j] = 0;
      }
      pass_tiles(work.num_tiles - end);
      queries.advance();
      store(softmax, 0);
    }
  }

  __device__ __forceinline__ void run() {
    // The first warpgroup may begin.
    if (group == C::kGroups - 1) pass_turn();
    if constexpr (C::kOverlapped) {
      run_overlapped();
    } else if constexpr (C::kStaged) {
      run_masked();
    } else {
      run_apart();
    }
  }
};

}  // namespace attention
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The two warpgroups that have 64 keys each: scores, their gradients, and the sums of dK and dV.
//
// Products are transposed: scores S^T = K Q^T and dP^T = V dO^T have keys as rows, so that P^T and
// dS^T are the left operands of dV = P^T dO and dK = dS^T Q as they come. dS goes through shared
// memory to the warpgroup that multiplies it with K (queries.h).
#pragma once

#include <cstdint>

#include "attention/ranges.h"
#include "attention_bwd/config.h"
#include "attention_bwd/parts.h"
#include "attention_bwd/store.h"
#include "common/approximate.h"
#include "common/float16.h"
#include "common/hopper.h"
#include "common/mma.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

using attention::lane_index;
using attention::release;

constexpr int kKeyGroupBarrier = 2;  // and the next

// A softcap of a score, softcap tanh(scale score / softcap), in units of log2 like all that is made
// of it. tanh(x) = 1 - below with below = 2 / (exp(2 x) + 1) overflows at neither end.
struct Cap {
  float inner, outer;

  // Worked out anew in every tile, like what thread_again() gives: kept they were a register too
  // many at head dim 256.
  __device__ __forceinline__ void begin(float scale, float softcap) {
    asm volatile("mov.b32 %0, %1;" : "=f"(outer) : "f"(softcap * kLog2E));
    inner = 2 * kLog2E * kLog2E * scale * reciprocal_approximate(outer);
  }

  // The weights of two scores, of which `minus_lse` are the log-sum-exps'; the scores become the
  // weights times the softcap's slope, 1 - tanh^2. Of two numbers there is one reciprocal, that of
  // their product, which the limit keeps from overflowing.
  __device__ __forceinline__ float2 weigh(float* scores, float2 minus_lse) const {
    constexpr float kMost = 60;
    const float lse[2] = {minus_lse.x, minus_lse.y};
    float sums[2], weights[2];
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      sums[j] = exp2_approximate(fminf(fmaf(scores[j], inner, -1), kMost)) + 0.5f;
    }
    const float both = reciprocal_approximate(sums[0] * sums[1]);
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      const float below = both * sums[1 - j];
      weights[j] = exp2_approximate(fmaf(below, -outer, outer + lse[j]));
      scores[j] = weights[j] * (below * (2 - below));
    }
    return make_float2(weights[0], weights[1]);
  }
};

// The weights of a number's parts, in a row of 8 columns of which a thread has two.
template <typename T>
__device__ __forceinline__ uint32_t weights_of_parts() {
  const int column = lane_index() % 4;
  return column == 0 ? pack<T>(kParts[0], kParts[1]) : column == 1 ? pack<T>(kParts[2], 0) : 0;
}

// Of 64 keys of a warpgroup and so many queries, what a thread has.
template <int kRows>
struct Scores {
  float scores[kRows / 2], dp[kRows / 2];
  uint32_t weights[kRows / 4], ds[kRows / 4];
};

template <typename C>
struct KeyGroup {
  using Shape = C;
  using T = typename C::Element;

  const VlmkAttentionBwdParams& p;
  const Maps& maps;
  const Schedule& schedule;
  const Workspace& workspace;
  char* shared;
  Barriers barriers;
  int group;
  Ring<C::kItemStages> keys{0};
  Ring<C::kStages> queries{0};
  Ring<C::kScoreStages> buffer{1};  // of dS; its first turn waits for nobody

  float dk[C::kOwnColumns / 2], dv[C::kOwnColumns / 2];
  uint32_t own_keys[C::kDepth / 16][4], own_values[C::kDepth / 16][4];

  __device__ __forceinline__ uint32_t at(int offset) const {
    return shared_address(shared) + offset;
  }

  // This warpgroup's rows of a tile, as left operands: with one of them in registers a product
  // reads half as much of shared memory, whose bandwidth is what bounds this kernel.
  __device__ __forceinline__ void load_own(uint32_t (&own)[C::kDepth / 16][4], uint32_t tile) {
    const int thread = attention::thread_again(), lane = thread % 32, warp = thread / 32 % 4;
    const uint32_t row = tile + (group * 64 + warp * 16 + lane % 16) * C::kRowBytes +
                         (C::swizzled(lane / 16, lane) << 4);
#pragma unroll
    for (int step = 0; step < C::kDepth / 16; ++step) {
      const int panel = step * 16 / C::kPanel, inside = step * 32 % C::kRowBytes;
      load_matrices(own[step], (row ^ inside) + panel * C::kKeys * C::kRowBytes);
    }
  }

  // They go behind the keys, in registers, and behind the values, where nothing lies.
  __device__ __forceinline__ void put_parts_behind() {
    own_keys[C::kDepth / 16 - 1][2] = own_keys[C::kDepth / 16 - 1][3] = weights_of_parts<T>();
    const int row = static_cast<int>(threadIdx.x) % 128;
    if (row < 64) {
      auto* end =
          reinterpret_cast<uint4*>(shared + C::values_at(keys.stage) +
                                   ((C::kPanels - 1) * C::kKeys + group * 64 + row) * C::kRowBytes);
      end[C::swizzled(1, row)] =
          make_uint4(pack<T>(kParts[0], kParts[1]), pack<T>(kParts[2], 0), 0, 0);
    }
    fence_async_proxy();
    named_wait<128>(kKeyGroupBarrier + group);
  }

  // sums = the warpgroup's own rows times `rows`, both with their columns along the product, or
  // sums += ...; and, where they are kept so, the numbers of a table of the queries.
  template <bool kAdd, bool kInRegisters, int kHalf>
  __device__ __forceinline__ void start_product(float (&sums)[kHalf],
                                                uint32_t (&own)[C::kDepth / 16][4], uint32_t tile,
                                                uint32_t rows, uint32_t table) {
    const uint64_t a = row_descriptor(tile + C::own_key(group) * C::kRowBytes, C::kRowBytes);
    const uint64_t b = row_descriptor(rows + C::own_query(group) * C::kRowBytes, C::kRowBytes);
    uint32_t parts[4];
    if (C::kSums == Sums::kApart) {
      parts[0] = parts[1] = weights_of_parts<T>();
      parts[2] = parts[3] = 0;
    }
    keep(sums);
    if (kInRegisters) {
#pragma unroll
      for (int step = 0; step < C::kDepth / 16; ++step) keep(own[step]);
    }
    mma_fence();
#pragma unroll
    for (int step = 0; step < C::kDepth / 16; ++step) {
      const int panel = step * 16 / C::kPanel, inside = step * 32 % C::kRowBytes;
      const uint64_t right = b + ((panel * kQueries * C::kRowBytes + inside) >> 4);
      if constexpr (kInRegisters) {
        mma<T, 2 * kHalf>(sums, own[step], right, kAdd || step > 0);
      } else {
        mma<T, 2 * kHalf>(sums, a + ((panel * C::kKeys * C::kRowBytes + inside) >> 4), right,
                          kAdd || step > 0);
      }
    }
    if constexpr (C::kSums == Sums::kApart) {
      // Behind the table's 8 columns its bytes once more, for the zeros.
      mma<T, 2 * kHalf>(sums, parts, plain_descriptor(table, 0), true);
    }
    mma_commit();
  }

  // Two numbers of each of the pairs of queries that this thread has.
  __device__ __forceinline__ float2 load_pair(int table, int i) const {
    uint2 x;
    load_shared(at(table) + C::own_query(group) * 8 + lane_index() % 4 * 16 + i * 64, x);
    return make_float2(__uint_as_float(x.x), __uint_as_float(x.y));
  }

  // Scores, which may have the log-sum-exps subtracted.
  template <int kRows>
  __device__ __forceinline__ void start_scores(Scores<kRows>& x, int stage) {
    start_product<false, C::kKeysInRegisters>(x.scores, own_keys, at(C::keys_at(keys.stage)),
                                              at(C::queries_at(stage)), at(C::sums_at(stage)));
  }

  // dP begins as what each query adds to it.
  template <int kRows>
  __device__ __forceinline__ void begin_dp(Scores<kRows>& x, int stage) {
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const float2 delta = load_pair(C::sums_at(stage) + 8, i);
      x.dp[4 * i] = x.dp[4 * i + 2] = delta.x;
      x.dp[4 * i + 1] = x.dp[4 * i + 3] = delta.y;
    }
    keep(x.dp);
  }

  template <int kRows>
  __device__ __forceinline__ void start_dp(Scores<kRows>& x, int stage) {
    start_product<!C::kSumsInProducts, C::kValuesInRegisters>(
        x.dp, own_values, at(C::values_at(keys.stage)), at(C::dout_at(stage)),
        at(C::sums_at(stage) + C::kSumsBytes / 2));
  }

  // sums += left times rows: dV or dK.
  template <int kQuarter>
  __device__ __forceinline__ void start_gradient(float (&sums)[C::kOwnColumns / 2],
                                                 uint32_t (&left)[kQuarter], uint32_t rows) {
    const uint64_t b = swizzled_descriptor(rows, kQueries * C::kRowBytes, C::kRowBytes);
    keep(sums);
    keep(left);
    mma_fence();
#pragma unroll
    for (int step = 0; step < kQuarter / 4; ++step) {
      const uint32_t a[4] = {left[4 * step], left[4 * step + 1], left[4 * step + 2],
                             left[4 * step + 3]};
      mma<T, C::kWidth, true>(sums, a, b + (step * 16 * C::kRowBytes >> 4), true);
    }
    mma_commit();
  }

  // Scores become weights; of what a query does not see 0, whatever they were. With a softcap those
  // in 32 bits, which dS is made of, have its slope as a factor.
  template <bool kMasked, int kRows>
  __device__ __forceinline__ void weigh(Scores<kRows>& x, int first_key,
                                        const float2 (&lse)[kRows / 8]) {
    const float scale = p.scale * kLog2E;
    [[maybe_unused]] Cap cap;
    if constexpr (C::kCapped) cap.begin(p.scale, p.softcap);
    const uint32_t table =
        at(C::ranges_at(queries.stage)) + C::own_query(group) * 8 + lane_index() % 4 * 16;
    const int thread = kMasked ? attention::thread_again() : 0;
    const int key = first_key + C::own_key(group) + thread % 128 / 32 * 16 + thread % 32 / 4;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      uint4 ranges;
      if (kMasked) load_shared(table + i * 64, ranges);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        [[maybe_unused]] float2 weights;
        if constexpr (C::kCapped) weights = cap.weigh(&x.scores[4 * i + 2 * half], lse[i]);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& score = x.scores[4 * i + 2 * half + j];
          if constexpr (!C::kCapped) {
            score = exp2_approximate(
                C::kSumsInProducts ? score * scale : fmaf(score, scale, j ? lse[i].y : lse[i].x));
          }
          if (kMasked) {
            const uint32_t from = j ? ranges.y : ranges.x, count = j ? ranges.w : ranges.z;
            const bool seen = static_cast<uint32_t>(key + 8 * half) - from < count;
            score = seen ? score : 0;
            float& weight = j ? weights.y : weights.x;
            if constexpr (C::kCapped) weight = seen ? weight : 0;
          }
        }
        if constexpr (C::kCapped) x.weights[2 * i + half] = pack<T>(weights.x, weights.y);
      }
    }
    if constexpr (!C::kCapped) {
#pragma unroll
      for (int i = 0; i < kRows / 4; ++i) {
        x.weights[i] = pack<T>(x.scores[2 * i], x.scores[2 * i + 1]);
      }
    }
  }

  // dP becomes dS. A weight of 0 stands for what is not seen, where dP may be anything.
  template <bool kMasked, int kRows>
  __device__ __forceinline__ void differentiate(Scores<kRows>& x) {
#pragma unroll
    for (int i = 0; i < kRows / 2; i += 2) {
      float gradient[2];
#pragma unroll
      for (int j = 0; j < 2; ++j) {
        gradient[j] = x.scores[i + j] * x.dp[i + j];
        if (kMasked) gradient[j] = x.scores[i + j] == 0 ? 0 : gradient[j];
      }
      x.ds[i / 2] = pack<T>(gradient[0], gradient[1]);
    }
  }

  // dS, or weights, as [queries, keys], the first of them at `first`. Behind the rows of a short
  // tile are those of another: what they give to dQ is nobody's.
  template <int kQuarter>
  __device__ __forceinline__ void store_scores(const uint32_t (&x)[kQuarter], uint32_t first) {
    const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / 32 % 4;
    const uint32_t row = first + (lane / 16 * 8 + lane % 8) * kScoreRow +
                         ((2 * warp + lane / 8 % 2 ^ lane % 8) << 4);
#pragma unroll
    for (int step = 0; step < kQuarter / 4; ++step) {
      store_transposed(row + step * 16 * kScoreRow,
                       {x[4 * step], x[4 * step + 1], x[4 * step + 2], x[4 * step + 3]});
    }
  }

  __device__ __forceinline__ uint32_t own_scores() const {
    return at(C::scores_at(buffer.stage)) + group * kQueries * kScoreRow;
  }

  // dS to the warpgroup of dQ, and into dK. The fence between these stores and the tensor cores'
  // reads is the reader's: here, a warp stood at it for a seventh of its time (D 64, H200).
  template <int kRows>
  __device__ __forceinline__ void give_scores(Scores<kRows>& x, int stage) {
    barrier_wait(barriers.scores_empty(buffer.stage), buffer.parity);
    store_scores(x.ds, own_scores());
    start_gradient(dk, x.ds, at(C::queries_at(stage)));
    release(barriers.scores_full(buffer.stage));
    buffer.advance();
  }

  // The first of this warpgroup's 64 rows of dK or dV in a tile, and their first panel.
  static constexpr int kOwnPanels = ceil_div(C::kOwnColumns, C::kPanel);
  __device__ __forceinline__ int first_panel() const { return C::kHalves ? group * kOwnPanels : 0; }
  __device__ __forceinline__ uint32_t stored_rows(uint32_t tile) const {
    return tile + (first_panel() * C::kKeys + C::own_key(group)) * C::kRowBytes;
  }

  // dV goes by way of where the own values were, dK of where the keys were or of a place of its
  // own.
  __device__ __forceinline__ uint32_t dv_tile() const { return at(C::values_at(keys.stage)); }
  __device__ __forceinline__ uint32_t dk_tile() const {
    return at(C::kStaged ? C::kStagingAt : C::keys_at(keys.stage));
  }

  __device__ __forceinline__ void write(const float (&sums)[C::kOwnColumns / 2], float scale,
                                        uint32_t tile) const {
    const int thread = attention::thread_again(), lane = thread % 32, warp = thread / 32 % 4;
    const uint32_t row = stored_rows(tile) + (warp * 16 + lane % 16) * C::kRowBytes +
                         (C::swizzled(lane / 16, lane) << 4);
    constexpr int kOfPanel = C::kPanel / 8;
#pragma unroll
    for (int block = 0; block < C::kOwnColumns / 8; block += 2) {
      const float* x = &sums[4 * block];
      const uint32_t to =
          (row + block / kOfPanel * C::kKeys * C::kRowBytes) ^ (block % kOfPanel << 4);
      const uint32_t low = pack<T>(x[0] * scale, x[1] * scale);
      const uint32_t high = pack<T>(x[2] * scale, x[3] * scale);
      if (block + 1 < C::kOwnColumns / 8) {
        store_matrices(to, {low, high, pack<T>(x[4] * scale, x[5] * scale),
                            pack<T>(x[6] * scale, x[7] * scale)});
      } else {
        store_matrices(to, {low, high});
      }
    }
  }

  // And from there to memory, behind one fence for both, by one thread: each warp's own 16 rows
  // kept the copy engine busy for longer (EVA-g, 257 tokens: 0.293 instead of 0.280 ms, H200). The
  // copies go on until its store_wait_read().
  __device__ __forceinline__ void send() const {
    fence_async_proxy();
    named_wait<128>(kKeyGroupBarrier + group);
    const Item& item = item_at<C>(shared, keys.stage);
    const int key = item.first_key + C::own_key(group);
    if (attention::thread_again() % 128 == 0 && key < p.num_keys) {
      const auto copy = [&](const CUtensorMap& map, uint32_t tile) {
#pragma unroll
        for (int panel = 0; panel < kOwnPanels; ++panel) {
          store_tile_once(map, stored_rows(tile) + panel * C::kKeys * C::kRowBytes,
                          (first_panel() + panel) * C::kPanel, key, item.head, item.batch);
        }
        store_commit();
      };
      copy(maps.dv, dv_tile());
      copy(maps.dk, dk_tile());
    }
    __syncwarp();
  }

  // The warpgroup of dQ is done with the keys of an item once it has given back the last dS.
  __device__ __forceinline__ void wait_for_queries() {
    const bool wrapped = buffer.stage == 0;
    barrier_wait(barriers.scores_empty(wrapped ? C::kScoreStages - 1 : buffer.stage - 1),
                 buffer.parity ^ !wrapped);
  }

  // An item's keys and values are where its results are stored from.
  __device__ __forceinline__ void end_item(int stage) {
    if (lane_index() == 0) store_wait_read();
    release(barriers.keys_empty(stage));
  }

  // What a tile of queries gave to dK is there: nobody here reads its stage any more.
  template <int kRows>
  __device__ __forceinline__ void end_tile(Scores<kRows>& x, int stage) {
    keep(dk);
    keep(x.ds);
    release(barriers.queries_empty(stage));
  }

  // A tile of queries. Its scores begin before the last product of the tile before is done, and its
  // own last one is under way at the end; dP waits for that one, whose left operand is where dP
  // was. What is read from shared memory comes late, and is asked for long before it is needed.
  template <int kRows>
  __device__ __forceinline__ void attend(Scores<kRows>& x, int first_key, int stage_before,
                                         bool first) {
    const int stage = queries.stage;
    barrier_wait(barriers.queries_full(stage), queries.parity);
    start_scores(x, stage);
    const uint32_t flags = query_tile_at<C>(shared, stage).flags;
    float2 lse[kRows / 8];
    if constexpr (!C::kSumsInProducts) {
#pragma unroll
      for (int i = 0; i < kRows / 8; ++i) lse[i] = load_pair(C::sums_at(stage), i);
    }
    mma_wait<1>();
    if (!first) end_tile(x, stage_before);
    if constexpr (!C::kSumsInProducts) begin_dp(x, stage);
    start_dp(x, stage);
    mma_wait<1>();
    keep(x.scores);
    if (flags & kMasked) {
      weigh<true>(x, first_key, lse);
    } else {
      weigh<false>(x, first_key, lse);
    }
    start_gradient(dv, x.weights, at(C::dout_at(stage)));
    mma_wait<1>();
    keep(x.dp);
    if (flags & kMasked) {
      differentiate<true>(x);
    } else {
      differentiate<false>(x);
    }
    give_scores(x, stage);
    mma_wait<1>();
    keep(dv);
    keep(x.weights);
    queries.advance();
  }

  // The few queries of a short tile. Nothing else is under way before it or after it.
  __device__ __forceinline__ void attend_tail(int first_key) {
    Scores<kTail> x;
    const int stage = queries.stage;
    attend(x, first_key, stage, true);
    mma_wait<0>();
    end_tile(x, stage);
  }

  // Whether all keys of this warpgroup lie behind the last, as of 257 = 2 x 128 + 1. Then it stands
  // aside, and what it gives to dQ is zero.
  __device__ __forceinline__ bool beyond(const Item& item) const {
    return item.first_key + group * 64 >= p.num_keys;
  }

  __device__ __forceinline__ void stand_aside(int tiles, bool after_other) {
    if (after_other) end_item(keys.stage ^ 1);
    const int thread = static_cast<int>(threadIdx.x) % 128;
#pragma unroll 1
    for (int i = 0; i < tiles; ++i) {
      barrier_wait(barriers.queries_full(queries.stage), queries.parity);
      barrier_wait(barriers.scores_empty(buffer.stage), buffer.parity);
      const uint32_t half = own_scores();
#pragma unroll
      for (int at = thread * 16; at < kQueries * kScoreRow; at += 128 * 16) {
        store_shared(half + at, make_uint4(0, 0, 0, 0));
      }
      release(barriers.scores_full(buffer.stage));
      buffer.advance();
      release(barriers.queries_empty(queries.stage));
      queries.advance();
    }
  }

  // All tiles of queries of an item, and in between the end of the item before.
  __device__ __forceinline__ void attend_all(int count, bool tail, int first_key,
                                             bool after_other) {
    const int heads = schedule.group_heads;
    const int runs = tail ? heads : 1, whole = tail ? count - 1 : count * heads;
    bool ended = !after_other;
    for (int run = 0; run < runs; ++run) {
      Scores<kQueries> x;
      int stage = queries.stage;
#pragma unroll 1
      for (int i = 0; i < whole; ++i) {
        const int before = stage;
        stage = queries.stage;
        attend(x, first_key, before, i == 0);
        if (!ended) end_item(keys.stage ^ 1);
        ended = true;
      }
      mma_wait<0>();
      if (whole > 0) end_tile(x, stage);
      if (tail) attend_tail(first_key);
    }
    if (!ended) end_item(keys.stage ^ 1);
  }

  __device__ __forceinline__ void run() {
    for (int items = 0;; ++items) {
      barrier_wait(barriers.keys_full(keys.stage), keys.parity);
      const Item& item = item_at<C>(shared, keys.stage);
      const int count = item.count;
      if (count == kNoMore) break;
#pragma unroll
      for (int i = 0; i < C::kWidth / 2; ++i) dk[i] = dv[i] = 0;
      if (count > 0) {
        if (C::kKeysInRegisters) load_own(own_keys, at(C::keys_at(keys.stage)));
        if (C::kValuesInRegisters) load_own(own_values, at(C::values_at(keys.stage)));
        if (C::kSums == Sums::kBehind) put_parts_behind();
      }
      if (beyond(item)) {
        stand_aside(count * schedule.group_heads, items > 0);
      } else {
        attend_all(count, item.tail, item.first_key, items > 0);
      }
      if (!C::kWhole && schedule.parts > 1) {
        add_part(*this);
      } else {
        write(dv, 1, dv_tile());
        if (C::kStaged) {
          named_wait<128>(kKeyGroupBarrier + group);  // the item before has left that place
        } else {
          wait_for_queries();
        }
        write(dk, p.scale, dk_tile());
        send();
      }
      keys.advance();
    }
    if (lane_index() == 0) store_wait_read();
  }
};

}  // namespace attention_bwd
}  // namespace vlmk

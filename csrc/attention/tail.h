// SPDX-License-Identifier: Apache-2.0
// The few queries of a head behind a multiple of 64, as a class token leaves them (197, 257, 577):
// as a tile of their own they would cost as much as 64 to 192 others. The three warps beside the
// producer take them along with the head's last tile, from the same keys and values.
//
// Products are transposed, so that 8 queries are the narrow side: scores = K Q^T, sums = V^T P^T.
// The warps share out the keys, 16 at a time, and add up what they have at the end.
#pragma once

#include <cstdint>

#include "attention/config.h"
#include "attention/ranges.h"
#include "attention/softmax.h"
#include "common/float16.h"
#include "common/hopper.h"
#include "common/mma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

constexpr int kTailBarrier = 9;

template <typename C>
struct Tail {
  // Lanes that differ in their upper three bits share two queries, as mma.sync deals out columns.
  using Softmax = SoftmaxOver<4, 32>;
  static constexpr int kSteps = C::kKeys / 16;
  static constexpr int kOwnSteps = ceil_div(kSteps, kTailWarps);
  static constexpr int kRows = ceil_div(C::kWidth, 16) * 16;  // of sums: columns of a value

  const VlmkAttentionParams& p;
  const Schedule& s;
  char* shared;
  Barriers barriers;
  int warp;  // of kTailWarps
  Ring<C::kQueryStages> queries{0};
  Ring<C::kStages> stages{0};  // of keys and of values alike

  const uint32_t* own_query;    // in pairs; read for each tile again: registers are few
  int own_columns;              // none behind the last query
  float scores[4 * kOwnSteps];  // of a step: two keys of the first query, two of the second
  float sums[kRows / 4];        // of 16 columns: (row, both queries), (row + 8, both queries)

  // The n-th of this warp's steps in a tile.
  __device__ __forceinline__ int step_at(int n) const { return warp + n * kTailWarps; }

  // Scores of this warp's keys in the tile; -inf from `count` on.
  __device__ __forceinline__ void score(int count) {
    using Columns = typename C::Columns;
    const uint32_t tile = shared_address(shared) + C::kKeysAt + stages.stage * C::kKeyBytes;
    const int lane = thread_again() % 32;
    uint32_t query[C::kDepth / 8];
#pragma unroll
    for (int i = 0; i < C::kDepth / 8; ++i) query[i] = 8 * i < own_columns ? own_query[4 * i] : 0;
#pragma unroll
    for (int i = 0; i < 4 * kOwnSteps; ++i) scores[i] = 0;
    barrier_wait(barriers.keys_full(stages.stage), stages.parity);
#pragma unroll
    for (int i = 0; i < C::kDepth / 16; ++i) {
      const uint32_t word =
          tile + Columns::template word_at<C::kKeys>(16 * warp + lane % 16, i, lane / 16);
#pragma unroll
      for (int n = 0; n < kOwnSteps; ++n) {
        if (16 * step_at(n) >= count) continue;
        uint32_t a[4];
        load_matrices(a, word + n * kTailWarps * 16 * Columns::row_bytes(i / 4));
        mma_add<typename C::Element>(&scores[4 * n], a, query[2 * i], query[2 * i + 1]);
      }
    }
#pragma unroll
    for (int n = 0; n < kOwnSteps; ++n) {
      const float second = scores[4 * n + 1];
      scores[4 * n + 1] = scores[4 * n + 2], scores[4 * n + 2] = second;
    }
    release(barriers.keys_empty(stages.stage));
#pragma unroll
    for (int i = 0; i < 4 * kOwnSteps; ++i) {
      if (16 * step_at(i / 4) + lane / 4 + i % 2 * 8 >= count) scores[i] = -INFINITY;
    }
  }

  // sums += weights times values, of this warp's keys in the tile.
  __device__ __forceinline__ void add_values(int count) {
    using Columns = Panels<C::kValuePanels * kPanel>;
    const uint32_t tile = shared_address(shared) + C::kValuesAt + stages.stage * C::kValueBytes;
    const int lane = thread_again() % 32;
    uint32_t weights[2 * kOwnSteps];
#pragma unroll
    for (int i = 0; i < 2 * kOwnSteps; ++i) {
      const float* x = &scores[i / 2 * 4 + i % 2];
      weights[i] = transpose_matrix(pack<typename C::Element>(x[0], x[2]));
    }
    barrier_wait(barriers.values_full(stages.stage), stages.parity);
#pragma unroll
    for (int n = 0; n < kOwnSteps; ++n) {
      if (16 * step_at(n) >= count) continue;
#pragma unroll
      for (int i = 0; i < kRows / 16; ++i) {
        const uint32_t word = tile + Columns::template word_at<C::kKeys>(
                                         16 * warp + lane % 8 + lane / 16 * 8, i, lane / 8 % 2);
        uint32_t a[4];
        load_transposed(a, word + n * kTailWarps * 16 * kRowBytes);
        mma_add<typename C::Element>(&sums[4 * i], a, weights[2 * n], weights[2 * n + 1]);
      }
    }
    release(barriers.values_empty(stages.stage));
    stages.advance();
  }

  __device__ __forceinline__ void attend(Softmax& softmax, const Work& work) {
    const int row = s.main_queries + lane_index() / 4;
    own_query = reinterpret_cast<const uint32_t*>(static_cast<const typename C::Element*>(p.q) +
                                                  work.batch * p.q_stride_b + row * p.q_stride_s +
                                                  work.head * p.q_stride_h) +
                lane_index() % 4;
    own_columns = row < p.num_queries ? p.dim : 0;
#pragma unroll
    for (int i = 0; i < kRows / 4; ++i) sums[i] = 0;
    const float scale = p.scale * kLog2E;
#pragma unroll 1
    for (int i = 0; i < work.num_tiles; ++i) {
      const int count = min(C::kKeys, p.num_keys - i * C::kKeys);
      score(count);
      const bool grows = softmax.raise<4 * kOwnSteps>(scores, scale);
      softmax.weigh<4 * kOwnSteps>(scores, scale, [](int, int) {});
      if (grows) {
#pragma unroll
        for (int j = 0; j < kRows / 4; ++j) sums[j] *= softmax.shrink[j % 2];
      }
      add_values(count);
    }
    softmax.finish();
  }

  // The first warp gets what the others have.
  __device__ __forceinline__ void combine(Softmax& softmax) {
    auto* parts = reinterpret_cast<float4*>(shared + C::kExchangeAt) + thread_again() % 32;
    constexpr int kSums = kRows / 16, kPart = 32 * (kSums + 1);
    named_wait<32 * kTailWarps>(kTailBarrier);  // the last ones have been read
    if (warp > 0) {
      float4* own = parts + (warp - 1) * kPart;
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        own[32 * i] = make_float4(sums[4 * i], sums[4 * i + 1], sums[4 * i + 2], sums[4 * i + 3]);
      }
      own[32 * kSums] =
          make_float4(softmax.maximum[0], softmax.maximum[1], softmax.sum[0], softmax.sum[1]);
    }
    named_wait<32 * kTailWarps>(kTailBarrier);
    if (warp > 0) return;
#pragma unroll
    for (int other = 0; other < kTailWarps - 1; ++other) {
      const float4* part = parts + other * kPart;
      const float4 theirs = part[32 * kSums];
      const float maximum[2] = {theirs.x, theirs.y}, sum[2] = {theirs.z, theirs.w};
      float own_share[2], share[2];
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const float before = softmax.maximum[i];
        softmax.maximum[i] = fmaxf(before, maximum[i]);
        own_share[i] = exp2_approximate(before - softmax.shift(i));
        share[i] = exp2_approximate(maximum[i] - softmax.shift(i));
        softmax.sum[i] = softmax.sum[i] * own_share[i] + sum[i] * share[i];
      }
#pragma unroll
      for (int i = 0; i < kSums; ++i) {
        const float4 x = part[32 * i];
        sums[4 * i] = sums[4 * i] * own_share[0] + x.x * share[0];
        sums[4 * i + 1] = sums[4 * i + 1] * own_share[1] + x.y * share[1];
        sums[4 * i + 2] = sums[4 * i + 2] * own_share[0] + x.z * share[0];
        sums[4 * i + 3] = sums[4 * i + 3] * own_share[1] + x.w * share[1];
      }
    }
  }

  __device__ __forceinline__ void store(const Softmax& softmax, const Work& work) {
    const float inverse[2] = {__fdividef(1.0f, softmax.sum[0]), __fdividef(1.0f, softmax.sum[1])};
    const int lane = thread_again() % 32, query = s.main_queries + lane / 4;
    auto* out =
        static_cast<typename C::Element*>(p.out) +
        ((int64_t{work.batch} * p.num_queries + query) * p.num_heads + work.head) * p.value_dim;
#pragma unroll
    for (int i = 0; i < kRows / 8; ++i) {
      const uint32_t pair = transpose_matrix(
          pack<typename C::Element>(sums[2 * i] * inverse[0], sums[2 * i + 1] * inverse[1]));
      const int column = 8 * i + 2 * (lane % 4);
      if (query < p.num_queries && column < p.value_dim) {
        *reinterpret_cast<uint32_t*>(out + column) = pair;
      }
    }
    if (!p.lse || lane >= 4) return;
    float* lse = p.lse + (int64_t{work.batch} * p.num_heads + work.head) * p.num_queries;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int own = s.main_queries + 2 * lane + i;
      if (own < p.num_queries) lse[own] = softmax.log_sum_exp(i);
    }
  }

  __device__ __forceinline__ void pass_tiles(int count) {
    for (int i = 0; i < count; ++i) {
      barrier_wait(barriers.keys_full(stages.stage), stages.parity);
      release(barriers.keys_empty(stages.stage));
      barrier_wait(barriers.values_full(stages.stage), stages.parity);
      release(barriers.values_empty(stages.stage));
      stages.advance();
    }
  }

  __device__ __forceinline__ void run() {
    while (true) {
      barrier_wait(barriers.queries_full(queries.stage), queries.parity);
      const Work work = reinterpret_cast<const Work*>(shared + C::kWorkAt)[queries.stage];
      release(barriers.queries_empty(queries.stage));
      queries.advance();
      if (work.num_tiles == kNoMore) return;
      if (work.first_query + C::kQueries < s.main_queries) {
        pass_tiles(work.num_tiles);
      } else {
        Softmax softmax;
        attend(softmax, work);
        combine(softmax);
        if (warp == 0) store(softmax, work);
      }
    }
  }
};

}  // namespace attention
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The results of a block's rows; of all blocks of a cluster, each of which has had some of the
// keys.
#pragma once

#include <cstdint>

#include "attention/store.h"
#include "attention_few/config.h"
#include "attention_few/tiles.h"
#include "common/approximate.h"
#include "common/float16.h"
#include "common/hopper.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_few {

// Of this thread's first or second row.
template <typename C>
__device__ __forceinline__ typename C::Element* out_of_row(const Tiles<C>& tiles, int half) {
  const VlmkAttentionParams& p = tiles.p;
  const Rows& rows = tiles.at_hand;
  const int64_t query = int64_t{rows.batch} * p.num_queries + rows.first_query + tiles.query[half];
  const int64_t at = query * p.num_heads + rows.query_head + tiles.of_group[half];
  return static_cast<typename C::Element*>(p.out) + at * p.value_dim;
}

__device__ __forceinline__ void store_lse(const VlmkAttentionParams& p, const Rows& rows, int own,
                                          const attention::Softmax& softmax) {
  if (!p.lse || lane_index() % 4 != 0) return;
  const int64_t head = int64_t{rows.batch} * p.num_heads + rows.query_head;
  float* lse = p.lse + head * p.num_queries + rows.first_query;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = own + 8 * half;
    if (row < rows.count) lse[row] = softmax.log_sum_exp(half);
  }
}

// What nobody sees is 0, even times infinity.
template <typename T>
__device__ __forceinline__ uint32_t scaled(float x, float y, float inverse) {
  return inverse == 0 ? 0 : pack<T>(x * inverse, y * inverse);
}

// Straight to memory, 16 bytes a thread.
template <typename C>
__device__ __forceinline__ void store_rows(const Tiles<C>& tiles) {
  using T = typename C::Element;
  const VlmkAttentionParams& p = tiles.p;
  const attention::Softmax& softmax = tiles.softmax;
  store_lse(p, tiles.at_hand, tiles.own_row(), softmax);
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = tiles.own_row() + 8 * half;
    const float inverse = softmax.sum[half] == 0 ? 0 : __fdividef(1.0f, softmax.sum[half]);
    T* out = out_of_row(tiles, half);
#pragma unroll
    for (int block = 0; block < C::kWidth / 8; block += 4) {
      uint32_t word[4] = {};
#pragma unroll
      for (int i = 0; i < 4 && block + i < C::kWidth / 8; ++i) {
        const float* x = &tiles.sums[4 * (block + i) + 2 * half];
        word[i] = scaled<T>(x[0], x[1], inverse);
      }
      attention::transpose_words(word, lane_index());
      const int column = 8 * (block + lane_index() % 4);
      if (row < tiles.at_hand.count && column < p.value_dim) {
        *reinterpret_cast<uint4*>(out + column) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

// Of this thread's two rows, the maximum and the sum over the cluster; shares of each block's sums
// in the result go to shared memory, at `shares` in pairs of rows. The four lanes that have the
// same rows deal out the blocks.
template <typename C>
__device__ __forceinline__ void combine_totals(attention::Softmax& softmax, uint32_t totals,
                                               float2* shares, int ranks) {
  constexpr int kOwn = kMaxSplits / 4;
  float4 x[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int other = 4 * i + lane_index() % 4;
    x[i] = make_float4(-INFINITY, 0, -INFINITY, 0);
    if (other < ranks) x[i] = load_from_block(in_block(totals, other));
  }
  float maximum[2] = {-INFINITY, -INFINITY};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    maximum[0] = fmaxf(maximum[0], x[i].x);
    maximum[1] = fmaxf(maximum[1], x[i].z);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    softmax.maximum[half] =
        attention::Softmax::of_query(maximum[half], [](float x, float y) { return fmaxf(x, y); });
    softmax.sum[half] = 0;
  }
  float2 share[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    share[i] = make_float2(exp2_approximate(x[i].x - softmax.shift(0)),
                           exp2_approximate(x[i].z - softmax.shift(1)));
    softmax.sum[0] += x[i].y * share[i].x;
    softmax.sum[1] += x[i].w * share[i].y;
  }
  softmax.finish();
  const float inverse[2] = {softmax.sum[0] == 0 ? 0 : __fdividef(1.0f, softmax.sum[0]),
                            softmax.sum[1] == 0 ? 0 : __fdividef(1.0f, softmax.sum[1])};
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const int other = 4 * i + lane_index() % 4;
    if (other < ranks) {
      shares[other * (C::kRows / 2)] =
          make_float2(share[i].x * inverse[0], share[i].y * inverse[1]);
    }
  }
  __syncwarp();
}

// Eight columns at a time are dealt out to the blocks, those of `i` to block i % ranks: each adds
// up its own over all blocks, always in the same order, which begins with itself, so that not all
// read from one block at a time.
template <typename C>
__device__ __forceinline__ void combine_sums(const Tiles<C>& tiles, uint32_t sums,
                                             const float2* shares, int rank, int ranks) {
  using T = typename C::Element;
  constexpr int kAtOnce = 8;  // loads before the first use of one
  const VlmkAttentionParams& p = tiles.p;
  const int of_rank = ranks - 1;  // a mask: ranks are a power of 2
  const int count = (C::kWidth / 8 - rank + of_rank) & ~of_rank;
  float4 total;
#pragma unroll 1
  for (int first = 0; first < count; first += kAtOnce) {
    float4 x[kAtOnce];
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      // Behind the last, its own again: those of another could come when that block is gone.
      const int n = first + j < count ? first + j : 0, i = rank + (n & ~of_rank);
      x[j] = load_from_block(in_block(sums + i * C::kThreads * 16, (rank + n) & of_rank));
    }
#pragma unroll
    for (int j = 0; j < kAtOnce; ++j) {
      const int n = first + j;
      if (n >= count) break;
      if ((n & of_rank) == 0) total = make_float4(0, 0, 0, 0);
      const float2 share = shares[((rank + n) & of_rank) * (C::kRows / 2)];
      total.x += x[j].x * share.x, total.y += x[j].y * share.x;
      total.z += x[j].z * share.y, total.w += x[j].w * share.y;
      if ((n & of_rank) != of_rank) continue;
      const int column = 8 * (rank + (n & ~of_rank)) + lane_index() % 4 * 2;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (tiles.own_row() + 8 * half >= tiles.at_hand.count || column >= p.value_dim) continue;
        const uint32_t word = half ? pack<T>(total.z, total.w) : pack<T>(total.x, total.y);
        auto* out = reinterpret_cast<uint32_t*>(out_of_row(tiles, half) + column);
        *out = tiles.softmax.sum[half] == 0 ? 0 : word;
      }
    }
  }
}

template <typename C>
__device__ __forceinline__ void combine_rows(Tiles<C>& tiles) {
  const int rank = static_cast<int>(cluster_rank()), ranks = static_cast<int>(cluster_size());
  const int pair = tiles.warp * 8 + lane_index() / 4;
  __syncthreads();  // nobody multiplies any more
  auto* sums = reinterpret_cast<float4*>(tiles.shared + C::kSumsAt) + threadIdx.x;
#pragma unroll
  for (int i = 0; i < C::kWidth / 8; ++i) {
    const float* x = &tiles.sums[4 * i];
    sums[i * C::kThreads] = make_float4(x[0], x[1], x[2], x[3]);
  }
  auto* totals = reinterpret_cast<float4*>(tiles.shared + C::kTotalsAt) + pair;
  const float (&maximum)[2] = tiles.softmax.maximum, (&sum)[2] = tiles.softmax.sum;
  if (lane_index() % 4 == 0) *totals = make_float4(maximum[0], sum[0], maximum[1], sum[1]);
  cluster_sync();
  if (tiles.has_rows()) {
    auto* shares = reinterpret_cast<float2*>(tiles.shared + C::kSharesAt) + pair;
    combine_totals<C>(tiles.softmax, shared_address(totals), shares, ranks);
    if (rank == 0) store_lse(tiles.p, tiles.at_hand, tiles.own_row(), tiles.softmax);
    combine_sums(tiles, shared_address(sums), shares, rank, ranks);
  }
  // Others may still read this block's sums; what this one has read has come to its registers.
  cluster_arrive();
  cluster_wait();
}

}  // namespace attention_few
}  // namespace vlmk

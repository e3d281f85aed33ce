// SPDX-License-Identifier: Apache-2.0
// The results of a warp's 16 queries: sums over the sum of the weights, and the log-sum-exp.
#pragma once

#include <cstdint>

#include "attention/config.h"
#include "attention/ranges.h"
#include "attention/softmax.h"
#include "common/float16.h"
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

// Two neighbouring sums as results. What nobody sees is 0, even times infinity.
template <typename C>
__device__ __forceinline__ uint32_t quotient(float x, float y, float total) {
  const float inverse = __fdividef(1.0f, total);
  return C::kMasked && total == 0 ? 0 : pack<typename C::Element>(x * inverse, y * inverse);
}

__device__ __forceinline__ void store_lse(const VlmkAttentionParams& p, const Work& work, int own,
                                          const Softmax& softmax) {
  if (!p.lse) return;
  float* lse = p.lse + (int64_t{work.batch} * p.num_heads + work.head) * p.num_queries;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = own + 8 * half;
    if (thread_again() % 4 == 0 && query < p.num_queries) lse[query] = softmax.log_sum_exp(half);
  }
}

// By way of shared memory, where the warp's queries were. The copy goes on until store_wait_read().
template <typename C>
__device__ __forceinline__ void store_staged(const VlmkAttentionParams& p, const Maps& maps,
                                             const Work& work, uint32_t stage,
                                             const float (&sums)[C::kWidth / 2],
                                             const Softmax& softmax) {
  using Columns = typename C::Columns;
  const int thread = thread_again(), lane = thread % 32, first = thread / 32 * 16;
#pragma unroll
  for (int block = 0; block < C::kWidth / 8; block += 2) {
    const uint32_t at =
        stage + Columns::template word_at<C::kQueries>(first + lane % 16, block / 2, lane / 16);
    const float* x = &sums[4 * block];
    const uint32_t low = quotient<C>(x[0], x[1], softmax.sum[0]);
    const uint32_t high = quotient<C>(x[2], x[3], softmax.sum[1]);
    if (block + 1 < C::kWidth / 8) {
      store_matrices(at, {low, high, quotient<C>(x[4], x[5], softmax.sum[0]),
                          quotient<C>(x[6], x[7], softmax.sum[1])});
    } else {
      store_matrices(at, {low, high});
    }
  }
  fence_async_proxy();
  __syncwarp();
  if (lane == 0 && work.first_query + first < p.num_queries) {
#pragma unroll
    for (int panel = 0; panel < Columns::kCount; ++panel) {
      const bool last = Columns::kNarrow && panel == Columns::kCount - 1;
      const uint32_t rows =
          stage + panel * C::kQueries * kRowBytes + first * Columns::row_bytes(panel);
      store_tile(last ? maps.last_out : maps.out, rows, panel * kPanel, work.first_query + first,
                 work.head, work.batch);
    }
    store_commit();
  }
}

// 4 x 4 words of four neighbouring lanes, of which this is one, transposed.
__device__ __forceinline__ void transpose_words(uint32_t (&word)[4], int lane) {
  const bool upper = lane & 2, odd = lane & 1;
  uint32_t a = __shfl_xor_sync(kAllLanes, upper ? word[0] : word[2], 2);
  uint32_t b = __shfl_xor_sync(kAllLanes, upper ? word[1] : word[3], 2);
  word[0] = upper ? a : word[0], word[2] = upper ? word[2] : a;
  word[1] = upper ? b : word[1], word[3] = upper ? word[3] : b;
  a = __shfl_xor_sync(kAllLanes, odd ? word[0] : word[1], 1);
  b = __shfl_xor_sync(kAllLanes, odd ? word[2] : word[3], 1);
  word[0] = odd ? a : word[0], word[1] = odd ? word[1] : a;
  word[2] = odd ? b : word[2], word[3] = odd ? word[3] : b;
}

// Straight to memory, 16 bytes a thread.
template <typename C>
__device__ __forceinline__ void store_direct(const VlmkAttentionParams& p, const Work& work,
                                             int own, const float (&sums)[C::kWidth / 2],
                                             const Softmax& softmax) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int query = own + 8 * half;
    auto* out =
        static_cast<typename C::Element*>(p.out) +
        ((int64_t{work.batch} * p.num_queries + query) * p.num_heads + work.head) * p.value_dim;
#pragma unroll
    for (int block = 0; block < C::kWidth / 8; block += 4) {
      uint32_t word[4] = {};
#pragma unroll
      for (int i = 0; i < 4 && block + i < C::kWidth / 8; ++i) {
        const int at = 4 * (block + i) + 2 * half;
        word[i] = quotient<C>(sums[at], sums[at + 1], softmax.sum[half]);
      }
      transpose_words(word, lane_index());
      const int column = 8 * (block + lane_index() % 4);
      if (query < p.num_queries && column < p.value_dim) {
        *reinterpret_cast<uint4*>(out + column) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
  }
}

template <typename C>
__device__ __forceinline__ void store_zeros(const VlmkAttentionParams& p, const Work& work,
                                            int own) {
#pragma unroll 1
  for (int query = own; query < min(own + 16, p.num_queries); query += 8) {
    auto* out =
        static_cast<typename C::Element*>(p.out) +
        ((int64_t{work.batch} * p.num_queries + query) * p.num_heads + work.head) * p.value_dim;
#pragma unroll 1
    for (int column = lane_index() % 4 * 8; column < p.value_dim; column += 32) {
      *reinterpret_cast<uint4*>(out + column) = make_uint4(0, 0, 0, 0);
    }
  }
}

}  // namespace attention
}  // namespace vlmk

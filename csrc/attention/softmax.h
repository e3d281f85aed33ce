// SPDX-License-Identifier: Apache-2.0
// The running softmax of a thread's two queries, in units of log2, and what becomes of the sums.
#pragma once

#include <cstdint>

#include "attention/config.h"
#include "attention/ranges.h"
#include "common/float16.h"

namespace vlmk {
namespace attention {

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Over the four threads that share a query.
template <typename Combine>
__device__ __forceinline__ float of_query(float x, Combine combine) {
  x = combine(x, __shfl_xor_sync(kAllLanes, x, 1));
  return combine(x, __shfl_xor_sync(kAllLanes, x, 2));
}

// softcap * tanh(scale * s / softcap), in units of log2: tanh(x) = 1 - 2 / (exp(2 x) + 1) overflows
// at neither end.
template <int kCount>
__device__ __forceinline__ void cap_scores(float (&scores)[kCount], float scale_log2,
                                           float softcap) {
  constexpr float kLog2E = 1.4426950408889634f;
  const float inner = 2 * scale_log2 / softcap, outer = softcap * kLog2E;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float e = exp2_approximate(scores[i] * inner);
    scores[i] = outer - 2 * outer * __fdividef(1.0f, e + 1);
  }
}

struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY};
  float sum[2] = {0, 0};  // of this thread's columns

  // Turns scores into weights relative to the new maximum, and returns by what those relative to
  // the old one shrink.
  template <int kCount>
  __device__ __forceinline__ float2 step(float (&scores)[kCount], float scale) {
    float shrink[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Two chains of each kind: a warp has few others beside it to wait with.
      float most[2] = {scores[2 * half], scores[2 * half + 1]};
#pragma unroll
      for (int i = 4; i < kCount; i += 4) {
        most[0] = fmaxf(most[0], scores[i + 2 * half]);
        most[1] = fmaxf(most[1], scores[i + 2 * half + 1]);
      }
      float largest = fmaxf(most[0], most[1]);
      largest = of_query(largest, [](float x, float y) { return fmaxf(x, y); });
      const float before = maximum[half];
      maximum[half] = fmaxf(before, largest * scale);
      // A query that has seen no key yet has -inf, and -inf - -inf is NaN.
      const float shift = maximum[half] == -INFINITY ? 0.0f : maximum[half];
      shrink[half] = exp2_approximate(before - shift);
      float total[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores[i + 2 * half + j];
          x = exp2_approximate(fmaf(x, scale, -shift));
          total[j] += x;
        }
      }
      sum[half] = fmaf(sum[half], shrink[half], total[0] + total[1]);
    }
    return make_float2(shrink[0], shrink[1]);
  }

  __device__ __forceinline__ void finish() {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[half] = of_query(sum[half], [](float x, float y) { return x + y; });
    }
  }
};

// Weights as the operand of the next product.
template <typename C>
__device__ __forceinline__ void pack_weights(uint32_t (&packed)[C::kKeys / 4],
                                             const float (&scores)[C::kKeys / 2]) {
#pragma unroll
  for (int i = 0; i < C::kKeys / 4; ++i)
    packed[i] = pack<typename C::Element>(scores[2 * i], scores[2 * i + 1]);
}

// 4 x 4 words of four neighbouring lanes, transposed.
__device__ __forceinline__ void transpose_words(uint32_t (&word)[4]) {
  const bool upper = lane_index() & 2, odd = lane_index() & 1;
  uint32_t a = __shfl_xor_sync(kAllLanes, upper ? word[0] : word[2], 2);
  uint32_t b = __shfl_xor_sync(kAllLanes, upper ? word[1] : word[3], 2);
  word[0] = upper ? a : word[0], word[2] = upper ? word[2] : a;
  word[1] = upper ? b : word[1], word[3] = upper ? word[3] : b;
  a = __shfl_xor_sync(kAllLanes, odd ? word[0] : word[1], 1);
  b = __shfl_xor_sync(kAllLanes, odd ? word[2] : word[3], 1);
  word[0] = odd ? a : word[0], word[1] = odd ? word[1] : a;
  word[2] = odd ? b : word[2], word[3] = odd ? word[3] : b;
}

// Divides the sums of a thread's two queries and stores them, 16 bytes a thread; and the
// log-sum-exp.
template <typename C>
__device__ __forceinline__ void store_queries(const VlmkAttentionParams& p, int batch, int head,
                                              int query, const float (&sums)[C::kWidth / 2],
                                              const Softmax& softmax) {
  const int quarter = lane_index() % 4;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int row = query + 8 * half;
    const float total = softmax.sum[half];
    const float inverse = total == 0 ? 0.0f : 1 / total;
    auto* out = static_cast<typename C::Element*>(p.out) +
                ((int64_t{batch} * p.num_queries + row) * p.num_heads + head) * p.value_dim;
#pragma unroll
    for (int block = 0; block < C::kWidth / 8; block += 4) {
      uint32_t word[4];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = 4 * (block + i) + 2 * half;
        if (block + i < C::kWidth / 8) {
          // What nobody sees is 0, even times infinity.
          word[i] = total == 0
                        ? 0
                        : pack<typename C::Element>(sums[at] * inverse, sums[at + 1] * inverse);
        } else {
          word[i] = 0;
        }
      }
      transpose_words(word);
      const int column = 8 * (block + quarter);
      if (row < p.num_queries && column < p.value_dim) {
        *reinterpret_cast<uint4*>(out + column) = make_uint4(word[0], word[1], word[2], word[3]);
      }
    }
    if (p.lse && quarter == 0 && row < p.num_queries) {
      constexpr float kLn2 = 0.6931471805599453f;
      p.lse[(int64_t{batch} * p.num_heads + head) * p.num_queries + row] =
          total == 0 ? -INFINITY : (softmax.maximum[half] + log2f(total)) * kLn2;
    }
  }
}

}  // namespace attention
}  // namespace vlmk

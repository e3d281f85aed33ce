// SPDX-License-Identifier: Apache-2.0
// The running softmax of a thread's two queries, in units of log2.
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
template <int kCount, int kAll>
__device__ __forceinline__ void cap_scores(float (&scores)[kAll], float scale_log2, float softcap) {
  constexpr float kLog2E = 1.4426950408889634f;
  const float inner = 2 * scale_log2 / softcap, outer = softcap * kLog2E;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const float e = exp2_approximate(scores[i] * inner);
    scores[i] = outer - 2 * outer * __fdividef(1.0f, e + 1);
  }
}

// How far above the maximum a score may lie before the maximum follows, in units of log2. A weight
// of 256 is as exact as one of 1, and sums seldom have to be rescaled: FlashAttention-4's rule for
// Blackwell. With it D 64 at 8,192 keys gained 5 % (H100).
constexpr float kSlack = 8;

struct Softmax {
  float maximum[2] = {-INFINITY, -INFINITY};  // or up to kSlack less
  float sum[2] = {0, 0};                      // of this thread's columns
  float shrink[2];

  // Turns the first kCount scores into weights relative to the maximum, the others, which nobody
  // sees, into 0. True if the maximum has grown for any query of the warp, and all that was summed
  // before has to shrink.
  template <int kCount, int kAll>
  __device__ __forceinline__ bool step(float (&scores)[kAll], float scale) {
    float largest[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      // Two chains of each kind: a warp has few others beside it to wait with.
      float most[2] = {scores[2 * half], scores[2 * half + 1]};
#pragma unroll
      for (int i = 4; i < kCount; i += 4) {
        most[0] = fmaxf(most[0], scores[i + 2 * half]);
        most[1] = fmaxf(most[1], scores[i + 2 * half + 1]);
      }
      largest[half] =
          of_query(fmaxf(most[0], most[1]), [](float x, float y) { return fmaxf(x, y); });
      largest[half] *= scale;
    }
    const bool grows =
        __any_sync(kAllLanes, largest[0] > maximum[0] + kSlack || largest[1] > maximum[1] + kSlack);
    if (grows) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float before = maximum[half];
        maximum[half] = fmaxf(before, largest[half]);
        shrink[half] = exp2_approximate(before - shift(half));
        sum[half] *= shrink[half];
      }
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float minus = -shift(half);
      float total[2] = {0, 0};
#pragma unroll
      for (int i = 0; i < kCount; i += 4) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores[i + 2 * half + j];
          x = exp2_approximate(fmaf(x, scale, minus));
          total[j] += x;
        }
      }
      sum[half] += total[0] + total[1];
    }
#pragma unroll
    for (int i = kCount; i < kAll; ++i) scores[i] = 0;
    return grows;
  }

  // A query that has seen no key yet has -inf, and -inf - -inf is NaN.
  __device__ __forceinline__ float shift(int half) const {
    return maximum[half] == -INFINITY ? 0.0f : maximum[half];
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

}  // namespace attention
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The running softmax of a thread's two queries, in units of log2.
#pragma once

#include <cstdint>

#include "attention/config.h"
#include "attention/ranges.h"
#include "common/approximate.h"
#include "common/float16.h"
#include "common/hopper.h"

namespace vlmk {
namespace attention {

// softcap * tanh(scale * s / softcap), in units of log2: tanh(x) = 1 - 2 / (exp(2 x) + 1) overflows
// at neither end.
template <int kCount, int kAll>
__device__ __forceinline__ void cap_scores(float (&scores)[kAll], float scale_log2, float softcap) {
  const float inner = 2 * scale_log2 / softcap, outer = softcap * kLog2E;
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (i % 8 == 0) stay_behind(softcap < 0);  // more of them at a time take more registers
    const float e = exp2_approximate(scores[i] * inner);
    scores[i] = outer - 2 * outer * __fdividef(1.0f, e + 1);
  }
}

// How far above the maximum a score may lie before the maximum follows, in units of log2, where it
// is looked for. A weight of 256 is as exact as one of 1, and sums seldom have to be rescaled:
// FlashAttention-4's rule for Blackwell. With it D 64 at 8,192 keys gained 5 % (H100).
constexpr float kSlack = 8;

// What a thread's weights of a tile may add up to, for one query, without anybody looking for the
// maximum again: 64 weights after it was looked for. fp16 holds up to 65,504.
constexpr float kMost = 16384;

// Of a thread's two queries. The lanes that share them differ in the bits from kFirstBit up to
// before kLastBit.
template <int kFirstBit, int kLastBit>
struct SoftmaxOver {
  float maximum[2] = {-INFINITY, -INFINITY};  // or less
  float sum[2] = {0, 0};                      // of this thread's columns
  float shrink[2];
  bool settled = false;  // every query of the warp has a maximum

  // The same as settled, for who has no register to keep it.
  __device__ __forceinline__ bool settled_now() const {
    return __all_sync(kAllLanes, fminf(maximum[0], maximum[1]) > -INFINITY);
  }

  // Looks for the maximum of the first kCount scores. True if it has grown for any query of the
  // warp, and all that was summed before has to shrink.
  template <int kCount, int kAll>
  __device__ __forceinline__ bool raise(const float (&scores)[kAll], float scale) {
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
      settled = __all_sync(kAllLanes, maximum[0] > -INFINITY && maximum[1] > -INFINITY);
    }
    return grows;
  }

  // Turns the first kCount scores into weights relative to the maximum, first one query's, then the
  // other's, and calls each(half, i) when those at i and i + 1 are there. False if the maximum is
  // far too small for any query of the warp: then the scores are lost, and nothing has been added
  // to the sums.
  template <int kCount, int kAll, typename Each>
  __device__ __forceinline__ bool weigh(float (&scores)[kAll], float scale, Each each) {
    float total[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float minus = -shift(half);
      float part[2] = {0, 0};
#pragma unroll
      for (int i = 2 * half; i < kCount; i += 4) {
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          float& x = scores[i + j];
          x = exp2_approximate(fmaf(x, scale, minus));
          part[j] += x;
        }
        each(half, i);
      }
      total[half] = part[0] + part[1];
    }
    if (__any_sync(kAllLanes, total[0] > kMost || total[1] > kMost)) return false;
    sum[0] += total[0], sum[1] += total[1];
    return true;
  }

  // Over the lanes that share a query.
  template <typename Combine>
  static __device__ __forceinline__ float of_query(float x, Combine combine) {
#pragma unroll
    for (int bit = kFirstBit; bit < kLastBit; bit *= 2) {
      x = combine(x, __shfl_xor_sync(kAllLanes, x, bit));
    }
    return x;
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

  // After finish().
  __device__ __forceinline__ float log_sum_exp(int half) const {
    constexpr float kLn2 = 0.6931471805599453f;
    return sum[half] == 0 ? -INFINITY : (maximum[half] + __log2f(sum[half])) * kLn2;
  }
};

// Four neighbouring lanes share a query, as wgmma deals out its sums.
using Softmax = SoftmaxOver<1, 4>;

}  // namespace attention
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// What a thread does with the sums of a tile while the next one is multiplied.
#pragma once

#include <cstdint>

#include "activated_linear/activation.h"
#include "activated_linear/config.h"
#include "common/float16.h"
#include "common/hopper.h"
#include "common/threads.h"
#include "vlmkernels.h"

namespace vlmk {
namespace activated_linear {

// A thread's part of a tile that waits: eights of columns in two rows.
template <typename C>
struct Waiting {
  using Token = typename C::Token;
  uint4 eights[C::kProducts][C::kEights][2];
  int row[2] = {-1, -1};  // -1 where there is none
  int column = 0;         // the first: there are 8 in every 32

  __device__ __forceinline__ bool there(const typename C::Params& p, int h, int g) const {
    return row[h] >= 0 && column + 32 * g < p.dim;
  }

  __device__ __forceinline__ int64_t place(const typename C::Params& p, int h, int g) const {
    return int64_t{row[h]} * p.dim + column + 32 * g;
  }

  __device__ __forceinline__ void finish(const typename C::Params& p, int g) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint4 x = eights[0][g][h], factor = eights[C::kProducts - 1][g][h];
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = to_floats<Token>((&x.x)[i]), by = to_floats<Token>((&factor.x)[i]);
        const float first = activate<C::kActivation>(pair.x);
        const float second = activate<C::kActivation>(pair.y);
        (&x.x)[i] =
            C::kGated ? pack<Token>(first * by.x, second * by.y) : pack<Token>(first, second);
      }
      auto* out = static_cast<Token*>(p.out) + place(p, h, g);
      if (there(p, h, g)) store_global(out, x);
      if constexpr (C::kPass == Pass::kForward) {
        auto* before = static_cast<Token*>(p.before) + place(p, h, g);
        if (there(p, h, g)) store_global(before, eights[0][g][h]);
      }
    }
  }

  // The sums of a tile with their bias, if there is one, rounded.
  __device__ __forceinline__ void take(const typename C::Params& p, const int (&next)[2],
                                       int next_column, const float (&sum)[C::kSums],
                                       uint32_t bias) {
    row[0] = next[0], row[1] = next[1], column = next_column;
#pragma unroll
    for (int g = 0; g < C::kEights; ++g) {
      uint4 added = {};
      if constexpr (C::kBiased) load_shared(bias + 64 * g, added);
#pragma unroll
      for (int i = 0; i < 8 * C::kProducts; ++i) {
        const int product = i / 8, u = i / 2 % 4, h = i % 2;
        const float* x = &sum[product * C::kSums / 2 + 4 * (u * C::kEights + g) + 2 * h];
        const float2 b = to_floats<Token>((&added.x)[u]);
        (&eights[product][g][h].x)[u] =
            C::kBiased ? pack<Token>(x[0] + b.x, x[1] + b.y) : pack<Token>(x[0], x[1]);
      }
    }
  }
};

// The same of a gradient, which is multiplied by the slope of the activation at what was before it.
template <typename C>
struct WaitingGradient : Waiting<C> {
  using Token = typename C::Token;
  using Params = typename C::Params;
  static_assert(VLMK_FEED_FORWARD_SUM_ROWS == 16);  // a warp's, in wgmma's sums

  int slot = -1;  // of this warp's sums

  // `before`: the address of this thread's first eight of what stood before the activation.
  __device__ __forceinline__ void finish(const Params& p, int g, uint32_t before) const {
    float sum[8] = {};
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      uint4 x = this->eights[0][g][h], stood;
      load_shared(before + 8 * h * kBeforeRowBytes, stood);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float2 pair = to_floats<Token>((&x.x)[i]), at = to_floats<Token>((&stood.x)[i]);
        const float first = pair.x * slope<C::kActivation>(at.x);
        const float second = pair.y * slope<C::kActivation>(at.y);
        sum[2 * i] += first, sum[2 * i + 1] += second;
        (&x.x)[i] = pack<Token>(first, second);
      }
      if (this->there(p, h, g)) {
        store_global(static_cast<Token*>(p.out) + this->place(p, h, g), x);
      }
    }
    add_up(sum);
    if (slot >= 0 && this->column + 32 * g < p.dim) {
      p.sums[int64_t{slot} * p.dim + this->column + 32 * g + lane_index() / 4] = sum[0];
    }
  }

  // Over the 8 lanes that have the same columns: each is left with the sum of one of them, in turn.
  static __device__ __forceinline__ void add_up(float (&sum)[8]) {
    const int lane = lane_index();
#pragma unroll
    for (int half = 4; half > 0; half /= 2) {
      const bool upper = lane & 4 * half;
#pragma unroll
      for (int i = 0; i < half; ++i) {
        const float kept = upper ? sum[i + half] : sum[i], given = upper ? sum[i] : sum[i + half];
        sum[i] = kept + __shfl_xor_sync(kAllLanes, given, 4 * half);
      }
    }
  }
};

}  // namespace activated_linear
}  // namespace vlmk

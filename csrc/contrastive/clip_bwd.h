// SPDX-License-Identifier: Apache-2.0
// CLIP's backward pass: the gradient of a panel of logits.
#pragma once

#include "contrastive/logits.h"

namespace vlmk {
namespace contrastive {

// How far apart the log-sum-exps of rows and columns may be for one exponential to serve both, to
// the base 2: then 2^60 times 2^-60 is exact.
constexpr float kNarrowRange = 60;

struct ClipBackward {
  const VlmkContrastiveParams& p;
  int group;
  float* scratch;  // of each column the log-sum-exp, and behind them all the shares
  Totals totals;
  float scale, gain, lowest;
  bool narrow;
  float row_lse[2], row_share[2];
  float2 column_lse;  // of the two columns that this thread reads for all

  __device__ __forceinline__ ClipBackward(const VlmkContrastiveParams& p, int group, float* scratch)
      : p(p),
        group(group),
        scratch(scratch),
        totals{reinterpret_cast<double*>(scratch + 2 * kTile)},
        scale(binary_scale(p)),
        gain(p.numbers[kGain]),
        lowest(p.numbers[kLowest]),
        narrow(p.numbers[kHighest] - lowest < kNarrowRange) {
    totals.clear(1);
  }

  __device__ __forceinline__ static float factor(const VlmkContrastiveParams& p) {
    return p.numbers[kTimes] * *p.scale;
  }

  __device__ __forceinline__ void begin(const Part& part) {
#pragma unroll
    for (int half = 0; half < 2; ++half) row_lse[half] = p.shifted[part.row(half)];
    const float* columns = p.shifted + p.rows + part.first_column;
    column_lse = reinterpret_cast<const float2*>(columns)[group_thread()];
  }

  // exp2(s - lse) of row and column is exp2(s - lowest) times exp2(lowest - lse).
  __device__ __forceinline__ float share_of(float lse) const {
    return exp2_approximate(lowest - lse);
  }

  __device__ __forceinline__ void prepare() {
    named_wait<128>(kGroupBarrier + group);  // all have read those of the tile before
    auto* columns = reinterpret_cast<float2*>(scratch) + group_thread();
    columns[0] = column_lse;
    columns[kTile / 2] = make_float2(share_of(column_lse.x), share_of(column_lse.y));
#pragma unroll
    for (int half = 0; half < 2; ++half) row_share[half] = share_of(row_lse[half]);
    named_wait<128>(kGroupBarrier + group);
  }

  __device__ __forceinline__ void finish(const Task& task, const Part& part,
                                         const float (&x)[kSums]) {
    if (!narrow) {
      store<true, false>(task, part, x);
    } else if (part.near()) {
      store<true, true>(task, part, x);
    } else {
      store<false, true>(task, part, x);
    }
  }

  __device__ __forceinline__ void end(double* sums) { totals.store(0, group, sums); }

 private:
  template <bool kNear, bool kNarrow>
  __device__ __forceinline__ void store(const Task& task, const Part& part,
                                        const float (&x)[kSums]) {
    const GradientRows out(p, task, part);
    float dscale = 0;
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) {
      stay_behind(p.rows < 0);
      const float* column = scratch + 32 * eight + lane_index() % 4 * 8;
      float g[2][8];
#pragma unroll
      for (int i = 0; i < 8; i += 4) {
        const float4 each = *reinterpret_cast<const float4*>(column + (kNarrow ? kTile : 0) + i);
        const float of_column[4] = {each.x, each.y, each.z, each.w};
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int j = 0; j < 4; ++j) {
            const float product = x[product_at(eight, half, i + j)];
            if (kNarrow) {
              g[half][i + j] = exp2_approximate(fmaf(product, scale, -lowest)) *
                               (row_share[half] + of_column[j]);
            } else {
              g[half][i + j] = exp2_approximate(fmaf(product, scale, -row_lse[half])) +
                               exp2_approximate(fmaf(product, scale, -of_column[j]));
            }
          }
        }
      }
      if (kNear) subtract_targets(part, eight, g);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int i = 0; i < 8; ++i) dscale += g[half][i] * x[product_at(eight, half, i)];
        out.store(half, eight, g[half]);
      }
    }
    totals.add(0, dscale);
  }

  __device__ __forceinline__ void subtract_targets(const Part& part, int eight, float (&g)[2][8]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float row = p.row_positive[min(part.row(half), p.valid_rows - 1)];
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int column = part.column(eight) + i;
        if (part.belongs(half, column)) g[half][i] -= gain * (row + p.column_positive[column]);
      }
    }
  }
};

}  // namespace contrastive
}  // namespace vlmk

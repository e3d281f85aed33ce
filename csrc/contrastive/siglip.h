// SPDX-License-Identifier: Apache-2.0
// SigLIP's loss: every pair by itself, so that one pass gives a panel's loss and its gradient.
#pragma once

#include "contrastive/logits.h"

namespace vlmk {
namespace contrastive {

template <bool kGradients>
struct SigLip {
  const VlmkContrastiveParams& p;
  int group;
  Totals totals;  // the loss to the base 2
  float scale, bias;

  __device__ __forceinline__ SigLip(const VlmkContrastiveParams& p, int group, float* scratch)
      : p(p),
        group(group),
        totals{reinterpret_cast<double*>(scratch)},
        scale(binary_scale(p)),
        bias(*p.bias * kLog2E) {
    totals.clear(kGradients ? 3 : 1);
  }

  __device__ __forceinline__ static float factor(const VlmkContrastiveParams& p) {
    return p.weight * *p.scale;
  }

  __device__ __forceinline__ void begin(const Part&) {}
  __device__ __forceinline__ void prepare() {}

  __device__ __forceinline__ void finish(const Task& task, const Part& part,
                                         const float (&x)[kSums]) {
    if (part.near()) {
      add_up<true>(task, part, x);
    } else {
      add_up<false>(task, part, x);
    }
  }

  __device__ __forceinline__ void end(double* sums) {
#pragma unroll
    for (int i = 0; i < (kGradients ? 3 : 1); ++i) totals.store(i, group, sums + i * p.slots);
  }

 private:
  template <bool kNear>
  __device__ __forceinline__ void add_up(const Task& task, const Part& part,
                                         const float (&x)[kSums]) {
    const GradientRows out(p, task, part);
    float loss = 0, dscale = 0, dbias = 0;
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) {
      stay_behind(p.rows < 0);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float g[8], product = 1, tile_loss = 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          const float similarity = x[product_at(eight, half, i)];
          const bool belongs = kNear && part.belongs(half, part.column(eight) + i);
          // Positive where the logit has the wrong sign.
          float wrong = fmaf(similarity, scale, bias);
          if (belongs) wrong = -wrong;
          // The loss is log(1 + exp(wrong)) = max(wrong, 0) + log(1 + e). One logarithm serves
          // eight pairs, and none those of small e, which are most, as 1 + e would forget what they
          // are.
          const float e = exp2_approximate(-fabsf(wrong)), one = 1 + e;
          const bool small = e < 1.0f / 64;
          tile_loss += fmaxf(wrong, 0);
          if (small) {
            tile_loss += e * (kLog2E - e * (0.5f * kLog2E - e * (kLog2E / 3)));
          } else {
            product *= one;
          }
          if (kGradients) {
            const float inverse = reciprocal_approximate(one);
            g[i] = wrong >= 0 ? inverse : e * inverse;
            if (wrong != wrong) g[i] = wrong;
            if (belongs) g[i] = -g[i];
            dbias += g[i];
            dscale += g[i] * similarity;
          }
        }
        loss += tile_loss + log2_approximate(product);
        if (kGradients) out.store(half, eight, g);
      }
    }
    totals.add(0, loss * kLn2);
    if (!kGradients) return;
    totals.add(1, dscale);
    totals.add(2, dbias);
  }
};

}  // namespace contrastive
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// Activations in fp32, to well below the rounding of 16 bits.
#pragma once

#include "common/approximate.h"
#include "vlmkernels.h"

namespace vlmk {
namespace activated_linear {

// x / (1 + exp(-logit)).
__device__ __forceinline__ float gated(float x, float logit) {
  return x * reciprocal_approximate(1.f + exp2_approximate(-kLog2E * logit));
}

// x (1 + erf(x / sqrt 2)) / 2 = (x + |x|) / 2 - |x| erfc(|x| / sqrt 2) / 2, with a polynomial for
// the logarithm of what |x| is multiplied by, within 5e-5 of it up to 6. What is less is nothing.
// Another formula took 137 us where this product alone takes 120 (BERT, 16,384 rows, H200).
__device__ __forceinline__ float gelu(float x) {
  const float size = fminf(fabsf(x), 6.f);
  float p = fmaf(2.2990056e-5f, size, -6.1110011e-4f);
  p = fmaf(p, size, 7.1955677e-3f);
  p = fmaf(p, size, -5.1185351e-2f);
  p = fmaf(p, size, -0.46127188f);
  p = fmaf(p, size, -1.1501743f);
  p = fmaf(p, size, -1.0000647f);
  return fmaf(-size, exp2_approximate(p), 0.5f * x + 0.5f * fabsf(x));
}

template <int kActivation>
__device__ __forceinline__ float activate(float x) {
  if constexpr (kActivation == VLMK_GELU) {
    return gelu(x);
  } else if constexpr (kActivation == VLMK_GELU_TANH) {
    // (1 + tanh(y)) / 2 = 1 / (1 + exp(-2 y))
    return gated(x, 1.5957691216f * x * fmaf(0.044715f * x, x, 1.f));
  } else {
    static_assert(kActivation == VLMK_QUICK_GELU || kActivation == VLMK_SILU);
    return gated(x, kActivation == VLMK_SILU ? x : 1.702f * x);
  }
}

}  // namespace activated_linear
}  // namespace vlmk

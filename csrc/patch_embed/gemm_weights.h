// SPDX-License-Identifier: Apache-2.0
// The weight of gathered rows in rows of whole stages, which the copy engine can bring, and the sum
// over its frames where a still image meets several of them.
#pragma once

#include <cstdint>

#include "common/float16.h"
#include "common/hopper.h"
#include "common/launch.h"
#include "patch_embed/gemm_config.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace gemm {

// Columns of the prepared weight.
__host__ __device__ inline int prepared_depth(const VlmkPatchEmbedParams& p) {
  return ceil_div(p.depth, kStageDepth) * kStageDepth;
}

constexpr int kPrepareThreads = 256;  // four columns of a row each

template <typename Token>
__global__ void __launch_bounds__(kPrepareThreads)
    prepare_weights_kernel(const __grid_constant__ VlmkPatchEmbedParams p) {
  let_next_grid_start();
  const int fours = prepared_depth(p) / 4;
  const int place = static_cast<int>(blockIdx.x * kPrepareThreads + threadIdx.x);
  const int row = place / fours, column = place % fours * 4;
  if (row >= p.dim) return;
  float sum[4] = {};
  if (column < p.depth) {
    const int run = column / p.frame_run, inside = column % p.frame_run;
    const Token* from = static_cast<const Token*>(p.weight) +
                        (int64_t{row} * p.depth + run * p.frame_run) * p.frames + inside;
    for (int frame = 0; frame < p.frames; ++frame) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        sum[j] += TokenType<Token>::to_float(from[frame * p.frame_run + j]);
      }
    }
  }
  static_cast<uint2*>(p.scratch)[place] =
      make_uint2(pack<Token>(sum[0], sum[1]), pack<Token>(sum[2], sum[3]));
}

}  // namespace gemm
}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// What is done with vectors, before the tiles and behind them: each a launch, where torch would
// take up to two dozen.
#pragma once

#include "contrastive/logits.h"

namespace vlmk {
namespace contrastive {

// sum * 2^top.
struct Exponentials {
  float top = -INFINITY, sum = 0;

  __device__ __forceinline__ void add(float other_top, float other_sum) {
    const float next = fmaxf(top, other_top);
    sum = sum * exp2_approximate(top - next) + other_sum * exp2_approximate(other_top - next);
    top = next;
  }
};

// Log-sum-exps over the first dimension of shares [tiles, size], which are to the base 2, to that
// of the logits; in a fixed order. With `add`, together with what is there already.
struct Merge {
  const float* shares;
  float* lse;
  int32_t tiles, size;
  int32_t stride;  // of the shares' tiles
  bool add;
};

// One warp for all tiles of a row or a column would wait for memory most of the time.
constexpr int kMergeWarps = 8;

__global__ void __launch_bounds__(32 * kMergeWarps)
    contrastive_merge_kernel(const __grid_constant__ Merge rows,
                             const __grid_constant__ Merge columns) {
  __shared__ float2 parts[kMergeWarps][32];
  const int block = static_cast<int>(blockIdx.x), row_blocks = rows.size / 32;
  const Merge& m = block < row_blocks ? rows : columns;
  const int lane = lane_index(), warp = warp_index();
  const int at = (block < row_blocks ? block : block - row_blocks) * 32 + lane;
  Exponentials part;
#pragma unroll 8
  for (int tile = warp; tile < m.tiles; tile += kMergeWarps) {
    part.add(m.shares[int64_t{tile} * m.stride + at], 1);
  }
  parts[warp][lane] = make_float2(part.top, part.sum);
  __syncthreads();
  if (warp > 0) return;
  Exponentials all;
  if (m.add) all.add(m.lse[at] * kLog2E, 1);
#pragma unroll
  for (const auto& each : parts) all.add(each[lane].x, each[lane].y);
  m.lse[at] = (all.top + log2_approximate(all.sum)) * kLn2;
}

constexpr int kPrepareThreads = 1024;

// The greatest of all threads' numbers, to all of them.
__device__ __forceinline__ float greatest(float x) {
  __shared__ float warps[kPrepareThreads / 32];
  const int warp = warp_index();
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x = fmaxf(x, __shfl_xor_sync(kAllLanes, x, lanes));
  __syncthreads();  // all have read those of the call before
  if (lane_index() == 0) warps[warp] = x;
  __syncthreads();
  for (const float other : warps) x = fmaxf(x, other);
  return x;
}

// CLIP's backward pass, before the tiles: the vectors and numbers that they read. One block, as the
// greatest weight comes first.
__global__ void __launch_bounds__(kPrepareThreads)
    contrastive_prepare_kernel(const __grid_constant__ VlmkContrastiveParams p) {
  const auto for_all = [&](auto each) {
    const auto of = [&](const float* weights, const float* lse, float* shifted, int size) {
#pragma unroll 4
      for (int i = static_cast<int>(threadIdx.x); i < size / 4; i += kPrepareThreads) {
        each(reinterpret_cast<const float4*>(weights) + i, reinterpret_cast<const float4*>(lse) + i,
             reinterpret_cast<float4*>(shifted) + i);
      }
    };
    of(p.row, p.lse_a, p.shifted, p.rows);
    of(p.column, p.lse_b, p.shifted + p.rows, p.columns);
  };
  float most = 1e-30f;
  for_all([&](const float4* weights, const float4*, float4*) {
    const float4 w = *weights;
    most = fmaxf(fmaxf(most, fmaxf(w.x, w.y)), fmaxf(w.z, w.w));
  });
  const float gain = 1 / greatest(most);
  float lowest = INFINITY, highest = -INFINITY;
  // Where a row counts for nothing, this log-sum-exp of its is infinite.
  const auto shift = [&](float lse, float weight) {
    const float x = fmaf(lse, kLog2E, -log2f(weight * gain));
    if (fabsf(x) < INFINITY) {
      lowest = fminf(lowest, x);
      highest = fmaxf(highest, x);
    }
    return x;
  };
  for_all([&](const float4* weights, const float4* lse, float4* shifted) {
    const float4 w = *weights, x = *lse;
    *shifted = make_float4(shift(x.x, w.x), shift(x.y, w.y), shift(x.z, w.z), shift(x.w, w.w));
  });
  lowest = -greatest(-lowest);
  highest = greatest(highest);
  if (threadIdx.x > 0) return;
  p.numbers[kGain] = gain;
  p.numbers[kTimes] = *p.dloss / gain;
  p.numbers[kLowest] = lowest < INFINITY ? lowest : 0;
  p.numbers[kHighest] = lowest < INFINITY ? highest : 0;
}

// Behind the tiles: the totals, over all launches and warpgroups, times what is asked for.
__global__ void __launch_bounds__(3 * 32)
    contrastive_total_kernel(const __grid_constant__ VlmkContrastiveParams p, int panels,
                             const float* times) {
  const int warp = warp_index();
  double sum = 0;
  for (int panel = 0; panel < panels; ++panel) {
    const double* sums = p.sums + (int64_t{panel} * 3 + warp) * p.slots;
    for (int slot = lane_index(); slot < p.slots; slot += 32) sum += sums[slot];
  }
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(kAllLanes, sum, lanes);
  if (lane_index() > 0) return;
  p.totals[warp] = static_cast<float>(sum * p.weight * (times ? *times : 1.0f));
}

}  // namespace contrastive
}  // namespace vlmk

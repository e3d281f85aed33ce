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
static_assert(kPrepareThreads / 32 == 32);

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
  // Fours of weights and log-sum-exps, and where the shifted ones belong; behind the last, zeros.
  const auto for_all = [&](auto each) {
    const auto of = [&](const float* weights, const float* lse, float* shifted, int size,
                        int valid) {
      const auto four_of = [&](const float* x, int i) {
        if (i + 4 <= valid) return *reinterpret_cast<const float4*>(x + i);
        const auto one = [&](int k) { return i + k < valid ? x[i + k] : 0; };
        return make_float4(one(0), one(1), one(2), one(3));
      };
#pragma unroll 4
      for (int i = 4 * static_cast<int>(threadIdx.x); i < size; i += 4 * kPrepareThreads) {
        each(
            four_of(weights, i), [&] { return four_of(lse, i); },
            reinterpret_cast<float4*>(shifted + i));
      }
    };
    of(p.row, p.lse_a, p.shifted, p.rows, p.valid_rows);
    of(p.column, p.lse_b, p.shifted + p.rows, p.columns, p.valid_columns);
  };
  float most = 1e-30f;
  for_all([&](float4 w, auto, float4*) {
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
  for_all([&](float4 w, auto lse, float4* shifted) {
    const float4 x = lse();
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

// Where the sums over all tiles belong, times what is asked for.
struct TotalPlaces {
  float* to[3];
};

// Behind the tiles, a warp for each of the sums.
__global__ void contrastive_total_kernel(const __grid_constant__ VlmkContrastiveParams p,
                                         const __grid_constant__ TotalPlaces totals,
                                         const float* times) {
  const int warp = warp_index();
  double sum = 0;
  for (int slot = lane_index(); slot < p.slots; slot += 32) sum += p.sums[warp * p.slots + slot];
  sum = sum_of_lanes(sum);
  if (lane_index() == 0) {
    *totals.to[warp] = static_cast<float>(sum * p.weight * (times ? *times : 1.0f));
  }
}

// CLIP's loss, of the log-sum-exps and of what so many launches have found that it subtracts.
__global__ void __launch_bounds__(kPrepareThreads)
    contrastive_clip_loss_kernel(const __grid_constant__ VlmkContrastiveParams p, int launches) {
  __shared__ double parts[2][kPrepareThreads / 32];
  const int thread = static_cast<int>(threadIdx.x), warp = warp_index();
  double rows = 0, columns = 0;
  for (int launch = 0; launch < launches; ++launch) {
    for (int slot = thread; slot < p.slots; slot += kPrepareThreads) {
      rows -= p.sums[int64_t{launch} * 3 * p.slots + slot];
    }
  }
#pragma unroll 8
  for (int i = thread; i < p.valid_rows; i += kPrepareThreads) rows += p.row[i] * p.lse_a[i];
#pragma unroll 8
  for (int i = thread; i < p.valid_columns; i += kPrepareThreads) {
    columns += p.column[i] * p.lse_b[i];
  }
  rows = sum_of_lanes(rows);
  columns = sum_of_lanes(columns);
  if (lane_index() == 0) parts[0][warp] = rows, parts[1][warp] = columns;
  __syncthreads();
  if (warp > 0) return;
  rows = sum_of_lanes(parts[0][lane_index()]);
  columns = sum_of_lanes(parts[1][lane_index()]);
  if (lane_index() > 0) return;
  *p.totals = static_cast<float>(rows);
  *p.loss = static_cast<float>(rows + columns);
}

}  // namespace contrastive
}  // namespace vlmk

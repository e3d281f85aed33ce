// SPDX-License-Identifier: Apache-2.0
// The LayerNorm taken back, row by row: with u a row of total normalised, r the reciprocal of its
// deviation and d = grad * norm_weight,
//   d_total = r (d - mean(d) - u mean(d u)),
// and shares of the gradients of the norm's parameters, sum(grad u) and sum(grad).
#pragma once

#include <cstdint>

#include "common/float16.h"
#include "common/hopper.h"
#include "common/threads.h"
#include "patch_embed/bwd_config.h"

namespace vlmk {
namespace patch_embed {
namespace bwd {

// A warp has a row, and each lane the same channels of every row, so that sums over rows stay in
// its registers. Rows to come are under way to shared memory, where a lane reads its own copies.
constexpr int kNormWarps = 4;
constexpr int kNormBlocks = 3;   // of a multiprocessor
constexpr int kNormStages = 3;   // rows that are there or on their way
constexpr int kNormVectors = 4;  // of 8 channels that a lane has at most
constexpr int kNormColumns = kNormVectors * 32 * 8;

struct NormJob {
  const void* grad;
  const void* total;
  const void* weight;
  void* d_total;
  float* shares;  // [blocks, 2, dim]
  int64_t rows;
  int32_t dim;
  float eps;
};

template <int kCount>
__device__ __forceinline__ void add_up_warp(float (&x)[kCount]) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) {
#pragma unroll
    for (int i = 0; i < kCount; ++i) x[i] += __shfl_xor_sync(kAllLanes, x[i], lanes);
  }
}

// A lane's part of rows: where they come to, and pairs of channels as floats.
template <typename Token, int kVectors>
struct NormRows {
  static constexpr int kRowBytes = kVectors * 512;
  static constexpr int kStageBytes = 2 * kRowBytes;  // grad and total

  const NormJob& p;
  uint32_t own;  // the lane's place in its warp's ring

  __device__ __forceinline__ bool there(int v) const { return (v * 32 + lane_index()) * 8 < p.dim; }

  // Rows behind the last one stay away; so does what lies behind the last channel.
  __device__ __forceinline__ void copy(int64_t row, int stage) const {
    const int64_t first = row * p.dim + lane_index() * 8;
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      const uint32_t place = own + stage * kStageBytes + v * 512;
      if (row >= p.rows || !there(v)) continue;
      copy_async(place, static_cast<const Token*>(p.grad) + first + v * 256);
      copy_async(place + kRowBytes, static_cast<const Token*>(p.total) + first + v * 256);
    }
    copies_commit();
  }

  // Of total.
  __device__ __forceinline__ float first_channel(int stage) const {
    uint4 total;
    load_shared(own + stage * kStageBytes + kRowBytes, total);
    return __shfl_sync(kAllLanes, to_floats<Token>(total.x).x, 0);
  }

  // f(pair, channels of grad, of total) for all pairs of channels.
  template <typename F>
  __device__ __forceinline__ void for_pairs(int stage, const F& f) const {
#pragma unroll
    for (int v = 0; v < kVectors; ++v) {
      uint4 grad, total;
      load_shared(own + stage * kStageBytes + v * 512, grad);
      load_shared(own + stage * kStageBytes + v * 512 + kRowBytes, total);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        f(4 * v + i, to_floats<Token>((&grad.x)[i]), to_floats<Token>((&total.x)[i]));
      }
    }
  }
};

template <typename Token, int kVectors>
__global__ void __launch_bounds__(32 * kNormWarps, kNormBlocks)
    patch_embed_bwd_norm_kernel(const __grid_constant__ NormJob p) {
  using Rows = NormRows<Token, kVectors>;
  constexpr int kOwn = kVectors * 4;  // pairs of channels
  __shared__ __align__(16) char shared[kNormWarps * kNormStages * Rows::kStageBytes];
  const int lane = lane_index(), warp = warp_index();
  const Rows rows{p, shared_address(shared) + warp * kNormStages * Rows::kStageBytes + lane * 16};
  uint4 weight[kVectors];
#pragma unroll
  for (int v = 0; v < kVectors; ++v) {
    weight[v] =
        load_global(static_cast<const Token*>(p.weight) + (v * 32 + lane) * 8, rows.there(v));
#pragma unroll
    for (int i = 0; i < 2 * kNormStages; ++i) {
      store_shared(rows.own + i * Rows::kRowBytes + v * 512, make_uint4(0, 0, 0, 0));
    }
  }
  const auto weights = [&](int i) { return to_floats<Token>((&weight[i / 4].x)[i % 4]); };
  const int64_t step = int64_t{gridDim.x} * kNormWarps;
  int64_t row = int64_t{blockIdx.x} * kNormWarps + warp;
#pragma unroll
  for (int i = 0; i < kNormStages - 1; ++i) rows.copy(row + i * step, i);
  let_next_grid_start();
  const float share = 1.0f / static_cast<float>(p.dim);
  float2 d_weight[kOwn] = {}, d_bias[kOwn] = {};
  int stage = 0;
#pragma unroll 1
  for (; row < p.rows; row += step) {
    rows.copy(row + (kNormStages - 1) * step, stage == 0 ? kNormStages - 1 : stage - 1);
    copies_wait<kNormStages - 1>();
    // Less the row's first channel: no channel is further from the mean than sqrt(dim) deviations,
    // so what the squares lose to cancellation is at most dim roundings.
    const float pivot = rows.first_channel(stage);
    float sums[4] = {};  // of x, of its squares, of d, and of x d
    rows.for_pairs(stage, [&](int i, float2 g, float2 x) {
      const float2 w = weights(i);
      if (!rows.there(i / 4)) return;
      x.x -= pivot;
      x.y -= pivot;
      sums[0] += x.x + x.y;
      sums[1] += x.x * x.x + x.y * x.y;
      sums[2] += g.x * w.x + g.y * w.y;
      sums[3] += g.x * w.x * x.x + g.y * w.y * x.y;
    });
    add_up_warp(sums);
    const float shift = sums[0] * share, mean = pivot + shift, mean_d = sums[2] * share;
    const float r = rsqrtf(fmaxf(sums[1] * share - shift * shift, 0) + p.eps);
    const float along = (sums[3] * share - shift * mean_d) * r;
    auto* out = static_cast<Token*>(p.d_total) + row * p.dim + lane * 8;
    uint4 rounded;
    rows.for_pairs(stage, [&](int i, float2 g, float2 x) {
      const float2 w = weights(i), u = make_float2((x.x - mean) * r, (x.y - mean) * r);
      d_weight[i].x += g.x * u.x;
      d_weight[i].y += g.y * u.y;
      d_bias[i].x += g.x;
      d_bias[i].y += g.y;
      (&rounded.x)[i % 4] = pack<Token>((g.x * w.x - mean_d - u.x * along) * r,
                                        (g.y * w.y - mean_d - u.y * along) * r);
      if (i % 4 == 3 && rows.there(i / 4)) store_global(out + i / 4 * 256, rounded);
    });
    stage = stage + 1 == kNormStages ? 0 : stage + 1;
  }
  copies_wait<0>();
  float (&sums)[kNormWarps][kVectors * 256] =
      *reinterpret_cast<float (*)[kNormWarps][kVectors * 256]>(shared);
#pragma unroll
  for (int kind = 0; kind < 2; ++kind) {
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      const float2 x = kind == 0 ? d_weight[i] : d_bias[i];
      *reinterpret_cast<float2*>(&sums[warp][(i / 4 * 32 + lane) * 8 + i % 4 * 2]) = x;
    }
    __syncthreads();
    for (int column = threadIdx.x; column < p.dim; column += 32 * kNormWarps) {
      float x = 0;
#pragma unroll
      for (int i = 0; i < kNormWarps; ++i) x += sums[i][column];
      p.shares[(int64_t{blockIdx.x} * 2 + kind) * p.dim + column] = x;
    }
  }
}

}  // namespace bwd
}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// What the blocks of the other kernels have left, added up in a fixed order: the gradients of
// weight, bias and norm. And that of the prefix tokens, which no other kernel sums up.
#pragma once

#include <cstdint>

#include "common/float16.h"
#include "common/hopper.h"
#include "common/threads.h"
#include "patch_embed/bwd_schedule.h"

namespace vlmk {
namespace patch_embed {
namespace bwd {

// 8 channels of a tile of the weight's gradient.
template <typename C>
__device__ __forceinline__ void finish_weight(const Job& p, int block, char* shared) {
  using Token = typename C::Token;
  constexpr int kPitch = C::kTilePixels + 2;
  const int tile = block / C::kEights, eight = block % C::kEights;
  const int row_tile = p.column_tiles.divide(tile);
  const int column_tile = tile - row_tile * p.column_tiles.divisor;
  const float4* parts =
      reinterpret_cast<const float4*>(p.parts) + int64_t{eight} * C::kConsumers + threadIdx.x;
  float4 sum = make_float4(0, 0, 0, 0);
  for_slots(p, tile, [&](int slot) {
    const float4 part = __ldcg(parts + int64_t{slot} * C::kPartFloats / 4);
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  });
  // [8, kPitch]
  Token* tokens = reinterpret_cast<Token*>(shared) + lane_index() % 4 * 2 * kPitch;
  const auto put = [&](int second, float x, float y) {
    const int pixel = C::pixel_of(warp_index(), lane_index() / 4, second);
    if (pixel >= C::kTilePixels) return;
    const uint32_t pair = pack<Token>(x, y);
    reinterpret_cast<uint16_t*>(tokens)[pixel] = static_cast<uint16_t>(pair);
    reinterpret_cast<uint16_t*>(tokens)[kPitch + pixel] = static_cast<uint16_t>(pair >> 16);
  };
  put(0, sum.x, sum.y);
  put(1, sum.z, sum.w);
  __syncthreads();
  constexpr int kPairs = C::kTilePixels / 2;
  const int first_channel = column_tile * C::kColumns + eight * 8;
  const int first_pixel = row_tile * C::kTilePixels;
  for (int i = threadIdx.x; i < 8 * kPairs; i += C::kConsumers) {
    const int channel = first_channel + i / kPairs;
    const int pixel = first_pixel + i % kPairs * 2;
    if (channel >= p.dim || pixel >= p.k) continue;
    reinterpret_cast<uint32_t*>(p.d_weight)[(int64_t{channel} * p.k + pixel) / 2] =
        *reinterpret_cast<uint32_t*>(shared + (i / kPairs * kPitch + i % kPairs * 2) * 2);
  }
}

// 64 channels of a sum over rows: threads that have the same of them have added up some of the rows
// each, `kOwn` channels from the one of `lane` on. Returns two of them to the first 32 threads.
template <typename C, int kOwn>
__device__ __forceinline__ float2 add_up_threads(const float (&own)[kOwn], char* shared) {
  constexpr int kLanes = kPanel / kOwn, kRows = C::kConsumers / kLanes;
  const int thread = static_cast<int>(threadIdx.x);
  float* sums = reinterpret_cast<float*>(shared);  // [kRows, 64]
#pragma unroll
  for (int i = 0; i < kOwn; ++i) sums[thread * kOwn + i] = own[i];
  __syncthreads();
  float2 total = make_float2(0, 0);
  if (thread >= kPanel / 2) return total;
  for (int row = 0; row < kRows; ++row) {
    total.x += sums[row * kPanel + 2 * thread];
    total.y += sums[row * kPanel + 2 * thread + 1];
  }
  return total;
}

// 64 channels of the bias's gradient.
template <typename C>
__device__ __forceinline__ void finish_bias(const Job& p, int panel) {
  const int thread = static_cast<int>(threadIdx.x), channel = panel * kPanel + 2 * thread;
  if (thread >= kPanel / 2 || channel >= p.dim) return;
  const int tile = panel % C::kPanels * p.column_tiles.divisor + panel / C::kPanels;
  float2 total = make_float2(0, 0);
  for_slots(p, tile, [&](int slot) {
#pragma unroll
    for (int adder = 0; adder < kAdders; ++adder) {
      const float* share = p.bias_shares + (int64_t{slot} * kAdders + adder) * kPanel;
      const float2 pair = __ldcg(reinterpret_cast<const float2*>(share) + thread);
      total.x += pair.x;
      total.y += pair.y;
    }
  });
  static_cast<uint32_t*>(p.d_bias)[channel / 2] = pack<typename C::Token>(total.x, total.y);
}

// 64 channels of what comes in shares of fp32, rows of dim.
template <typename C>
__device__ __forceinline__ void finish_vector(const Job& p, const Shares& shares, int panel,
                                              char* shared) {
  constexpr int kLanes = kPanel / 4;
  const int thread = static_cast<int>(threadIdx.x);
  const int column = panel * kPanel + thread % kLanes * 4;
  float sum[4] = {};
  if (column < p.dim) {
#pragma unroll 4
    for (int i = thread / kLanes; i < shares.count; i += C::kConsumers / kLanes) {
      const float4 share = __ldcg(
          reinterpret_cast<const float4*>(shares.first + i * int64_t{shares.stride} + column));
      sum[0] += share.x;
      sum[1] += share.y;
      sum[2] += share.z;
      sum[3] += share.w;
    }
  }
  const float2 total = add_up_threads<C>(sum, shared);
  const int channel = panel * kPanel + 2 * thread;
  if (thread >= kPanel / 2 || channel >= p.dim) return;
  static_cast<uint32_t*>(shares.result)[channel / 2] = pack<typename C::Token>(total.x, total.y);
}

// 64 channels of a prefix token, summed over the images.
template <typename C>
__device__ __forceinline__ void finish_prefix(const Job& p, int token, int panel, char* shared) {
  using Token = typename C::Token;
  const int thread = static_cast<int>(threadIdx.x), tokens = p.num_prefix + p.grid_y * p.grid_x;
  const int column = panel * kPanel + thread % 8 * 8;
  const auto* grad = static_cast<const Token*>(p.grad) + int64_t{token} * p.dim + column;
  float sum[8] = {};
#pragma unroll 4
  for (int image = thread / 8; image < p.batch; image += C::kConsumers / 8) {
    const uint4 x = load_global(grad + int64_t{image} * tokens * p.dim, column < p.dim);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_floats<Token>((&x.x)[i]);
      sum[2 * i] += pair.x;
      sum[2 * i + 1] += pair.y;
    }
  }
  const float2 total = add_up_threads<C>(sum, shared);
  const int channel = panel * kPanel + 2 * thread;
  if (thread >= kPanel / 2 || channel >= p.dim) return;
  const int64_t place = (int64_t{token} * p.dim + channel) / 2;
  const uint32_t rounded = pack<Token>(total.x, total.y);
  if (p.d_prefix) static_cast<uint32_t*>(p.d_prefix)[place] = rounded;
  if (p.d_pos && p.pos_prefix) static_cast<uint32_t*>(p.d_pos)[place] = rounded;
}

template <typename C>
__global__ void __launch_bounds__(C::kConsumers, 4)
    patch_embed_bwd_finish_kernel(const __grid_constant__ Job p) {
  __shared__ __align__(16) char shared[C::kConsumers / 8 * kPanel * 4];
  const int panels = ceil_div(p.dim, kPanel);
  int block = static_cast<int>(blockIdx.x);
  wait_for_previous_grids();
  if (block < p.prefix_sums * panels) {
    finish_prefix<C>(p, block / panels, block % panels, shared);
    return;
  }
  block -= p.prefix_sums * panels;
  if (p.d_bias && block < panels) {
    finish_bias<C>(p, block);
    return;
  }
  if (p.d_bias) block -= panels;
  if (block < p.num_vectors * panels) {
    finish_vector<C>(p, p.vectors[block / panels], block % panels, shared);
  } else {
    finish_weight<C>(p, block - p.num_vectors * panels, shared);
  }
}

}  // namespace bwd
}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// What the blocks of the products have left, added up in a fixed order: the gradients of weight and
// bias. And that of the prefix tokens, which the products have nothing to do with.
#pragma once

#include <cstdint>

#include "common/float16.h"
#include "common/hopper.h"
#include "common/threads.h"
#include "patch_embed/bwd_config.h"

namespace vlmk {
namespace patch_embed {
namespace bwd {

// 8 channels of a tile of the weight's gradient.
template <typename C>
__device__ __forceinline__ void finish_weight(const Job& p, int block, char* shared) {
  using Token = typename C::Token;
  constexpr int kPitch = C::kPartPixels + 2;
  const int tile = block / C::kEights, eight = block % C::kEights;
  const int row_tile = p.column_tiles.divide(tile);
  const int column_tile = tile - row_tile * p.column_tiles.divisor;
  const int64_t split_parts = int64_t{p.tiles.divisor} * C::kPartFloats / 4;
  const float4* parts =
      reinterpret_cast<const float4*>(p.parts) + int64_t{block} * C::kConsumers + threadIdx.x;
  float4 sum = make_float4(0, 0, 0, 0);
#pragma unroll 4
  for (int split = 0; split < p.splits; ++split) {
    const float4 part = __ldcg(parts + split * split_parts);
    sum.x += part.x;
    sum.y += part.y;
    sum.z += part.z;
    sum.w += part.w;
  }
  // [8, kPitch]
  Token* tokens = reinterpret_cast<Token*>(shared) + lane_index() % 4 * 2 * kPitch;
  const auto put = [&](int second, float x, float y) {
    const int pixel = C::pixel_of(warp_index(), lane_index() / 4, second);
    if (pixel >= C::kPartPixels) return;
    const uint32_t pair = pack<Token>(x, y);
    reinterpret_cast<uint16_t*>(tokens)[pixel] = static_cast<uint16_t>(pair);
    reinterpret_cast<uint16_t*>(tokens)[kPitch + pixel] = static_cast<uint16_t>(pair >> 16);
  };
  put(0, sum.x, sum.y);
  put(1, sum.z, sum.w);
  __syncthreads();
  constexpr int kPairs = C::kPartPixels / 2;
  const int first_channel = column_tile * C::kColumns + eight % (C::kColumns / 8) * 8;
  const int first_pixel = row_tile * C::kTilePixels + eight / (C::kColumns / 8) * C::kPartPixels;
  for (int i = threadIdx.x; i < 8 * kPairs; i += C::kConsumers) {
    const int channel = first_channel + i / kPairs;
    const int pixel = first_pixel + i % kPairs * 2;
    if (channel >= p.dim || pixel >= p.k) continue;
    reinterpret_cast<uint32_t*>(p.d_weight)[(int64_t{channel} * p.k + pixel) / 2] =
        *reinterpret_cast<uint32_t*>(shared + (i / kPairs * kPitch + i % kPairs * 2) * 2);
  }
}

template <typename C>
__device__ __forceinline__ void finish_bias(const Job& p, int block) {
  const int pair = block * C::kConsumers + static_cast<int>(threadIdx.x);
  if (2 * pair >= p.dim) return;
  float2 sum = make_float2(0, 0);
#pragma unroll 4
  for (int i = 0; i < p.splits * kAdders; ++i) {
    const float2 share =
        __ldcg(reinterpret_cast<const float2*>(p.bias_shares + int64_t{i} * p.dim) + pair);
    sum.x += share.x;
    sum.y += share.y;
  }
  static_cast<uint32_t*>(p.d_bias)[pair] = pack<typename C::Token>(sum.x, sum.y);
}

// 64 channels of a prefix token, summed over the images.
template <typename C>
__device__ __forceinline__ void finish_prefix(const Job& p, int block, char* shared) {
  using Token = typename C::Token;
  constexpr int kRows = C::kConsumers / 8;
  const int blocks = ceil_div(p.dim, kPanel), token = block / blocks;
  const int column = block % blocks * kPanel + threadIdx.x % 8 * 8;
  const int row = threadIdx.x / 8, tokens = p.num_prefix + p.grid_y * p.grid_x;
  const bool there = column < p.dim;
  float sum[8] = {};
#pragma unroll 4
  for (int image = row; image < p.batch; image += kRows) {
    const auto* grad =
        static_cast<const Token*>(p.grad) + (int64_t{image} * tokens + token) * p.dim + column;
    const uint4 x = load_global(grad, there);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 pair = to_floats<Token>((&x.x)[i]);
      sum[2 * i] += pair.x;
      sum[2 * i + 1] += pair.y;
    }
  }
  float* sums = reinterpret_cast<float*>(shared);  // [kRows, 64]
#pragma unroll
  for (int i = 0; i < 8; ++i) sums[row * kPanel + threadIdx.x % 8 * 8 + i] = sum[i];
  __syncthreads();
  const int pair = static_cast<int>(threadIdx.x), channel = block % blocks * kPanel + 2 * pair;
  if (pair >= kPanel / 2 || channel >= p.dim) return;
  float2 total = make_float2(0, 0);
  for (int i = 0; i < kRows; ++i) {
    total.x += sums[i * kPanel + 2 * pair];
    total.y += sums[i * kPanel + 2 * pair + 1];
  }
  const int64_t place = (int64_t{token} * p.dim + channel) / 2;
  const uint32_t rounded = pack<Token>(total.x, total.y);
  if (p.d_prefix) static_cast<uint32_t*>(p.d_prefix)[place] = rounded;
  if (p.d_pos && p.pos_prefix) static_cast<uint32_t*>(p.d_pos)[place] = rounded;
}

// How many blocks each of the three takes.
struct FinishBlocks {
  int weight, bias, prefix;

  template <typename C>
  static FinishBlocks of(const Job& p) {
    const bool prefix = p.num_prefix && (p.d_prefix || (p.d_pos && p.pos_prefix));
    return {p.tiles.divisor * C::kEights, p.d_bias ? ceil_div(p.dim / 2, C::kConsumers) : 0,
            prefix ? p.num_prefix * ceil_div(p.dim, kPanel) : 0};
  }
  int all() const { return weight + bias + prefix; }
};

template <typename C>
__global__ void __launch_bounds__(C::kConsumers)
    patch_embed_bwd_finish_kernel(const __grid_constant__ Job p, FinishBlocks blocks) {
  __shared__ __align__(16) char shared[C::kConsumers / 8 * kPanel * 4];
  const int block = static_cast<int>(blockIdx.x);
  // The prefix tokens need nothing of the products.
  if (block < blocks.prefix) {
    finish_prefix<C>(p, block, shared);
    return;
  }
  wait_for_previous_grids();
  if (block < blocks.prefix + blocks.bias) {
    finish_bias<C>(p, block - blocks.prefix);
  } else {
    finish_weight<C>(p, block - blocks.prefix - blocks.bias, shared);
  }
}

}  // namespace bwd
}  // namespace patch_embed
}  // namespace vlmk

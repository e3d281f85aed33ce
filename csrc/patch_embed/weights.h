// SPDX-License-Identifier: Apache-2.0
// A block's columns of the weight, on their way into shared memory: uint8's normalisation is folded
// in, and they are laid out as wgmma reads them, k in the order in which lanes hold the pixels.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "common/launch.h"
#include "patch_embed/config.h"
#include "patch_embed/tiles.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {

// Where weight (column n, k) lies in bytes. Columns are dealt out so that a thread's sums are 8
// neighbouring channels of a token. k is dealt out so that lane q of four has rows q, q + 4, ... of
// the patch's pixels; of the last two rows of 14, two lanes share each.
template <typename C>
__device__ __forceinline__ int weight_offset(int n, int k) {
  const int column = (n & ~31) | (n & 6) << 2 | (n >> 2 & 6) | (n & 1);
  const int row = k / C::kPatch, x = k % C::kPatch;
  int quad = row / 4 * (C::kPatch / 2) + x / 2, lane = row % 4;
  if constexpr (C::kRows % 4 == 2) {
    if (row >= C::kRows - 2) quad = C::kRows / 4 * (C::kPatch / 2) + x / 2 % 4, lane += x / 8 * 2;
    if (k >= C::kDepth)
      quad = 2 * C::kSteps - 1, lane = k / 2 % 4;  // zeros in the places left over
  }
  return quad * C::kWeightStride + column * 16 + (2 * lane + (k & 1)) * 2;
}

// A power of two that brings the largest of a row's folded weights to 2^14: fp16 then holds the
// row's smaller ones too.
__device__ __forceinline__ float row_scale(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);
  return __uint_as_float(static_cast<uint32_t>(min(max(268 - exponent, 1), 253)) << 23);
}

// One column of the weight, dealt out to a warp: 4 neighbouring weights at a time.
template <typename C>
struct WeightColumn {
  static constexpr int kFours = C::kSteps * 4;  // with zeros behind the last
  static constexpr int kEach = ceil_div(kFours, 32);
  uint2 fours[kEach];
  float bias;

  __device__ __forceinline__ void load(const VlmkPatchEmbedParams& p, int column, int lane) {
    const auto* source = static_cast<const uint2*>(p.weight) + int64_t{column} * (C::kDepth / 4);
    const bool inside = column < p.dim;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool there = inside && lane + 32 * i < C::kDepth / 4;
      fours[i] = there ? __ldg(source + lane + 32 * i) : make_uint2(0, 0);
    }
    bias = inside && p.bias ? C::to_float(static_cast<const typename C::Token*>(p.bias)[column])
                            : 0.0f;
  }

  // pixel * scale + shift is folded into the weight and the bias; pixels are multiplied less 128.
  __device__ __forceinline__ float fold(const VlmkPatchEmbedParams& p, int lane) {
    float scale = 1.0f;
    if constexpr (C::kFold) {
      float largest = 0.0f, shift = 0.0f;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int channel = channel_of(lane + 32 * i);
        const float to_weight = p.pixel_scale[channel];
        const float2 x = C::to_floats(C::from_bits(fours[i].x));
        const float2 y = C::to_floats(C::from_bits(fours[i].y));
        const float larger = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(y.x), fabsf(y.y)));
        largest = fmaxf(largest, larger * fabsf(to_weight));
        shift += (x.x + x.y + y.x + y.y) * (p.pixel_shift[channel] + 128.0f * to_weight);
      }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
        shift += __shfl_xor_sync(~0u, shift, lanes);
      }
      bias += shift;
      scale = row_scale(largest);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float factor = p.pixel_scale[channel_of(lane + 32 * i)] * scale;
        const float2 x = C::to_floats(C::from_bits(fours[i].x));
        const float2 y = C::to_floats(C::from_bits(fours[i].y));
        fours[i].x = to_bits(__floats2half2_rn(x.x * factor, x.y * factor));
        fours[i].y = to_bits(__floats2half2_rn(y.x * factor, y.y * factor));
      }
    }
    return scale;
  }

  __device__ __forceinline__ void store(char* weights, int n, int lane) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int k = 4 * (lane + 32 * i);
      if (k >= 16 * C::kSteps) break;
      *reinterpret_cast<uint32_t*>(weights + weight_offset<C>(n, k)) = fours[i].x;
      *reinterpret_cast<uint32_t*>(weights + weight_offset<C>(n, k + 2)) = fours[i].y;
    }
  }

  __device__ static int channel_of(int four) {
    return min(four / (C::kPatch * C::kPatch / 4), kChannels - 1);
  }
};

// The block's columns of the weight, by all warps; the next column is on its way meanwhile.
template <typename C>
__device__ __forceinline__ void load_weights(const VlmkPatchEmbedParams& p, int first_column,
                                             char* weights, float2* affine) {
  const int lane = lane_index();
  int n = static_cast<int>(threadIdx.x / 32);
  WeightColumn<C> next;
  next.load(p, first_column + n, lane);
#pragma unroll 1
  while (n < C::kColumns) {
    WeightColumn<C> column = next;
    const int after = n + kThreads / 32;
    if (after < C::kColumns) next.load(p, first_column + after, lane);
    const float scale = column.fold(p, lane);
    column.store(weights, n, lane);
    if (lane == 0) affine[n] = make_float2(1.0f / scale, column.bias);
    n = after;
  }
}

}  // namespace patch_embed
}  // namespace vlmk

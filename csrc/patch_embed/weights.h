// SPDX-License-Identifier: Apache-2.0
// A block's columns of the weight, on their way into shared memory: uint8's normalisation is folded
// in, and they are laid out as wgmma reads them, k in the order in which lanes hold the pixels.
#pragma once

#include <cstdint>

#include "common/launch.h"
#include "patch_embed/config.h"
#include "patch_embed/tiles.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {

// Where the weights k and k + 1 of a column lie, k being even: in which brick, and where in the 16
// bytes that a column has there. Lane q of four has rows q, q + 4, ... of a patch's pixels and word
// q of each brick. Of the last two rows of 14, two lanes share each.
template <typename C>
__device__ __forceinline__ int2 place_along_k(int k) {
  constexpr int kWhole = C::kRows / 8 * 8;  // rows in whole slots
  const int row = k / C::kPatch, x = k % C::kPatch;
  if constexpr (!C::kFold) {
    if (k >= C::kDepth) return make_int2(C::kBricks - 1, k / 2 % 4 * 4);  // a zero, left over
    if (row < kWhole || C::kPatch == 16) {
      return make_int2(row / 4 * (C::kPatch / 2) + x / 2, row % 4 * 4);
    }
    return make_int2(kWhole * C::kPatch / 8 + x / 2 % 4, (row % 4 + x / 8 * 2) * 4);
  } else if constexpr (C::kPatch == 16) {
    return make_int2(row / 4 * 4 + x / 4, row % 4 * 4 + x % 4);
  } else {
    if (k >= C::kDepth) {
      const int left = (k - C::kDepth) / 2;
      return left < 2 ? make_int2(C::kBricks - 2, left * 4 + 10)
                      : make_int2(C::kBricks - 1, left * 2 - 4);
    }
    if (row >= kWhole)
      return make_int2(kWhole * 14 / 16 + x % 8 / 4, (row % 4 + x / 8 * 2) * 4 + x % 4);
    // Rows q and q + 4 are three words each, and their last two pixels share one between them.
    const int second = row / 4 % 2;
    if (x >= 12) return make_int2(row / 8 * 7 + 3, row % 4 * 4 + second * 2);
    return make_int2(row / 8 * 7 + second * 4 + x / 4, row % 4 * 4 + x % 4);
  }
}

// Where column n lies in a brick, in bytes. Columns are dealt out so that a thread's sums are 8
// neighbouring channels of a token.
__device__ __forceinline__ int place_of_column(int n) {
  return ((n & ~31) | (n & 6) << 2 | (n >> 2 & 6) | (n & 1)) * 16;
}

// One column of the weight, dealt out to a warp: 4 neighbouring weights at a time.
template <typename C>
struct WeightColumn {
  static constexpr int kFours = C::kBricks * 4 / C::kWeights;  // with zeros behind the last
  static constexpr int kEach = ceil_div(kFours, 32);
  uint2 fours[kEach];
  float bias;

  // What is the same for every column: where each two of the lane's weights lie in column 0, in
  // bytes, and the normalisation of their channel for pixels less 128.
  struct Places {
    int bytes[kEach][2];
    float to_weight[kEach], to_bias[kEach];

    __device__ Places(const VlmkPatchEmbedParams& p, int lane) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int channel = min((lane + 32 * i) / (C::kPatch * C::kPatch / 4), kChannels - 1);
        to_weight[i] = p.pixel_scale[channel];
        to_bias[i] = p.pixel_shift[channel] + 128.0f * to_weight[i];
#pragma unroll
        for (int pair = 0; pair < 2; ++pair) {
          const int2 place = place_along_k<C>(4 * (lane + 32 * i) + 2 * pair);
          bytes[i][pair] = place.x * C::kWeightStride + place.y;
        }
      }
    }
  };

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

  __device__ __forceinline__ void store(char* there, const Places& places, int lane) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (lane + 32 * i >= kFours) break;
      *reinterpret_cast<uint32_t*>(there + places.bytes[i][0]) = fours[i].x;
      *reinterpret_cast<uint32_t*>(there + places.bytes[i][1]) = fours[i].y;
    }
  }

  // For uint8: pixel * scale + shift is folded into the weight and the bias, and the weight becomes
  // a whole number of 16 bits, the upper and the lower byte in columns of their own. Returns by
  // what the sums are to be multiplied.
  __device__ __forceinline__ float fold_and_store(char* there, const Places& places, int lane) {
    float largest = 0.0f, magnitude = 0.0f, shift = 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float2 x = C::to_floats(C::from_bits(fours[i].x));
      const float2 y = C::to_floats(C::from_bits(fours[i].y));
      for (float w : {x.x, x.y, y.x, y.y}) {
        const float folded = fabsf(w * places.to_weight[i]);
        shift += w * places.to_bias[i];
        magnitude += folded;
        largest = fmaxf(largest, folded);
      }
    }
#pragma unroll
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
      magnitude += __shfl_xor_sync(~0u, magnitude, lanes);
      shift += __shfl_xor_sync(~0u, shift, lanes);
    }
    bias += shift;
    // Both bytes fit, and so does the sum over pixels of up to 128 in 31 bits. Where all is zero,
    // any factor will do.
    const float factor = fminf(fminf(32512.0f / largest, 1.67e7f / magnitude), 1e37f);
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      if (lane + 32 * i >= kFours) break;
      const float to_whole = places.to_weight[i] * factor;
#pragma unroll
      for (int pair = 0; pair < 2; ++pair) {
        const float2 w = C::to_floats(C::from_bits((&fours[i].x)[pair]));
        const uint32_t x = round_to_bits(w.x * to_whole), y = round_to_bits(w.y * to_whole);
        char* place = there + places.bytes[i][pair];
        *reinterpret_cast<uint16_t*>(place) =
            static_cast<uint16_t>(__byte_perm(x + 128, y + 128, 0x51));
        *reinterpret_cast<uint16_t*>(place + C::kColumns * 16) =
            static_cast<uint16_t>(__byte_perm(x, y, 0x40));
      }
    }
    // Not a number where a weight is not finite: magnitude shows it.
    return 1.0f / factor + (magnitude - magnitude);
  }

  // The nearest whole number in the lower bits: from 2^23 on, floats are whole.
  __device__ static uint32_t round_to_bits(float x) { return __float_as_uint(x + 12582912.0f); }
};

// The block's columns of the weight, by all warps; the next column is on its way meanwhile. Beside
// them, for each column: the sums' factor for uint8, and the bias.
template <typename C>
__device__ __forceinline__ void load_weights(const VlmkPatchEmbedParams& p, int first_column,
                                             char* weights, float* scales, float* biases) {
  const int lane = lane_index();
  const typename WeightColumn<C>::Places places(p, lane);
  int n = static_cast<int>(threadIdx.x / 32);
  WeightColumn<C> next;
  next.load(p, first_column + n, lane);
#pragma unroll 1
  while (n < C::kColumns) {
    WeightColumn<C> column = next;
    const int after = n + C::kThreads / 32;
    if (after < C::kColumns) next.load(p, first_column + after, lane);
    char* there = weights + place_of_column(n);
    if constexpr (C::kFold) {
      const float scale = column.fold_and_store(there, places, lane);
      if (lane == 0) scales[n] = scale;
    } else {
      column.store(there, places, lane);
    }
    if (lane == 0) biases[n] = column.bias;
    n = after;
  }
}

// The block's columns of the norm's weight, and behind them those of its bias.
template <typename C, int kThreads>
__device__ __forceinline__ void load_norm(const VlmkPatchEmbedParams& p, int first_column,
                                          typename C::Token* norm) {
  using Token = typename C::Token;
  for (int n = static_cast<int>(threadIdx.x); n < C::kColumns; n += kThreads) {
    norm[n] = static_cast<const Token*>(p.norm_weight)[first_column + n];
    norm[C::kColumns + n] =
        p.norm_bias ? static_cast<const Token*>(p.norm_bias)[first_column + n] : C::to_token(0.0f);
  }
}

}  // namespace patch_embed
}  // namespace vlmk

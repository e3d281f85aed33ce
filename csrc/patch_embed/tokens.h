// SPDX-License-Identifier: Apache-2.0
// From sums to tokens: bias and position, the LayerNorm with statistics that the blocks of a
// cluster share, and the stores. Prefix tokens, which have no pixels, are made here too.
#pragma once

#include <cstdint>

#include "common/hopper.h"
#include "patch_embed/config.h"
#include "patch_embed/tiles.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {

// The thread's columns of the positions of its two tokens: 8 in every 32.
template <typename C>
struct Positions {
  uint4 columns[2][C::kColumns / 32];

  __device__ __forceinline__ void load(const VlmkPatchEmbedParams& p, const Schedule& s,
                                       const int (&patch)[2], int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Place place(p, s, patch[h]);
      const auto* pos =
          static_cast<const typename C::Token*>(p.pos) + place.image * p.pos_stride_b +
          (place.patch + (p.pos_on_prefix ? p.num_prefix : 0)) * p.pos_stride_n + column;
#pragma unroll
      for (int g = 0; g < C::kColumns / 32; ++g) {
        const bool add = p.pos && place.there && column + 32 * g < p.dim;
        columns[h][g] = load_global(pos + 32 * g, add);
      }
    }
  }
};

// The sum over the four lanes that hold a row.
__device__ __forceinline__ float sum_of_four(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// Takes the mean of a row's columns in this block, which four lanes hold, from each of them.
// Returns the mean and the summed squares of what is left.
template <typename C>
__device__ __forceinline__ float2 centre(float (&total)[C::kTotals], int h) {
  float sum = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < C::kTotals / 4; ++i) sum += total[4 * i + 2 * h] + total[4 * i + 2 * h + 1];
  const float mean = sum_of_four(sum) / C::kColumns;
#pragma unroll
  for (int i = 0; i < C::kTotals / 4; ++i) {
    float& x = total[4 * i + 2 * h];
    float& y = total[4 * i + 2 * h + 1];
    x -= mean, y -= mean;
    squares += x * x + y * y;
  }
  return make_float2(mean, sum_of_four(squares));
}

// Mean and 1 / standard deviation of a row from the parts of all blocks, of which each of the four
// lanes takes two; exact for a large mean too.
template <typename C>
__device__ __forceinline__ float2 combine(const float2* parts, int cluster, float eps) {
  static_assert(kMaxCluster == 8);
  const int q = lane_index() % 4;
  const float2 none = make_float2(0.0f, 0.0f);
  const float2 x = q < cluster ? parts[q * kTile] : none;
  const float2 y = q + 4 < cluster ? parts[(q + 4) * kTile] : none;
  float mean = x.x + y.x;
  mean = sum_of_four(mean);
  mean /= cluster;
  float squares = 0.0f;
  if (q < cluster) squares += x.y + C::kColumns * (x.x - mean) * (x.x - mean);
  if (q + 4 < cluster) squares += y.y + C::kColumns * (y.x - mean) * (y.x - mean);
  squares = sum_of_four(squares);
  return make_float2(mean, rsqrtf(squares / (cluster * C::kColumns) + eps));
}

// Of a thread's first row, in the statistics of a block's part of 64 rows.
__device__ __forceinline__ int slot_of_row() { return group_thread() / 32 * 16 + lane_index() / 4; }

// Blocks exchange the statistics of their parts, 64 rows in one copy for each other block: 8 bytes
// at a time would take longer than the products.
__device__ __forceinline__ void send_statistics(int cluster, const float2 (&own)[2], float2* parts,
                                                uint32_t barrier) {
  const int thread = group_thread(), group = static_cast<int>(threadIdx.x / 128);
  const int rank = static_cast<int>(cluster_rank());
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    if (thread % 4 == 0) parts[rank * kTile + slot_of_row() + 8 * h] = own[h];
  }
  fence_async_proxy();
  named_wait<128>(group + 1);
  if (thread == 0) barrier_expect(barrier, (cluster - 1) * kTile * 8);
  if (thread < cluster && thread != rank) {
    const uint32_t here = shared_address(parts + rank * kTile);
    copy_to_block(in_block(here, thread), here, kTile * 8, in_block(barrier, thread));
  }
}

// Mean and 1 / standard deviation of the thread's two rows, from what all blocks have sent.
template <typename C>
__device__ __forceinline__ void receive_statistics(const VlmkPatchEmbedParams& p, int cluster,
                                                   const float2* parts, uint32_t barrier,
                                                   uint32_t parity, float2 (&mean_rstd)[2]) {
  barrier_wait(barrier, parity);
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    mean_rstd[h] = combine<C>(parts + slot_of_row() + 8 * h, cluster, p.eps);
  }
}

// The thread's columns of its two tokens, where there are such patches and columns.
template <typename C>
__device__ __forceinline__ void store_tokens(const VlmkPatchEmbedParams& p, const Schedule& s,
                                             void* tokens, const float (&total)[C::kTotals],
                                             const int (&patch)[2], int first_column) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Place place(p, s, patch[h]);
    const int64_t row =
        int64_t{place.image} * (p.grid_y * p.grid_x + p.num_prefix) + p.num_prefix + place.patch;
    auto* out = static_cast<typename C::Token*>(tokens) + row * p.dim + first_column;
#pragma unroll
    for (int g = 0; g < C::kColumns / 32; ++g) {
      uint4 packed;
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int i = (4 * g + u) * 4 + 2 * h;
        (&packed.x)[u] = pack<typename C::Token>(total[i], total[i + 1]);
      }
      if (place.there && first_column + 32 * g < p.dim) {
        *reinterpret_cast<uint4*>(out + 32 * g) = packed;
      }
    }
  }
}

// Four neighbouring channels of a table in shared memory.
__device__ __forceinline__ float4 four_of(const float* table, int channel) {
  return *reinterpret_cast<const float4*>(table + channel);
}

// What the sums of the thread's products come to, with the bias and the positions. The tables begin
// at the thread's first channel.
template <typename C>
__device__ __forceinline__ void add_up(float (&total)[C::kTotals],
                                       const typename C::Sum (&sum)[C::kSums],
                                       const Positions<C>& positions, const float* scales,
                                       const float* biases) {
#pragma unroll
  for (int i = 0; i < C::kTotals / 4; i += 2) {
    const int channel = 32 * (i / 4) + 2 * (i % 4);
    const float4 bias = four_of(biases, channel);
    const float4 scale = C::kFold ? four_of(scales, channel) : make_float4(1, 1, 1, 1);
#pragma unroll
    for (int j = 0; j < 4; ++j) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int index = 4 * (i + j / 2) + 2 * h + j % 2;
        const float2 position =
            C::to_floats(C::from_bits((&positions.columns[h][i / 4].x)[i % 4 + j / 2]));
        const float added = (&bias.x)[j] + (j % 2 ? position.y : position.x);
        if constexpr (C::kFold) {
          const int whole = sum[index] * 256 + sum[index + C::kTotals];
          total[index] = static_cast<float>(whole) * (&scale.x)[j] + added;
        } else {
          total[index] = sum[index] + added;
        }
      }
    }
  }
}

// LayerNorm of the thread's columns of its two tokens, with tables that begin there too.
template <typename C>
__device__ __forceinline__ void normalise(const VlmkPatchEmbedParams& p, const Schedule& s,
                                          float (&total)[C::kTotals], const int (&patch)[2],
                                          int column, const typename C::Token* weights,
                                          const typename C::Token* biases, float2* parts,
                                          uint32_t barrier, uint32_t parity) {
  const float2 own[2] = {centre<C>(total, 0), centre<C>(total, 1)};
  send_statistics(s.cluster, own, parts, barrier);
  if (p.total) {  // stored while the statistics are under way
    float uncentred[C::kTotals];
#pragma unroll
    for (int i = 0; i < C::kTotals; ++i) uncentred[i] = total[i] + own[i / 2 % 2].x;
    store_tokens<C>(p, s, p.total, uncentred, patch, column);
  }
  float2 mean_rstd[2];
  receive_statistics<C>(p, s.cluster, parts, barrier, parity, mean_rstd);
  const float shift[2] = {(own[0].x - mean_rstd[0].x) * mean_rstd[0].y,
                          (own[1].x - mean_rstd[1].x) * mean_rstd[1].y};
#pragma unroll
  for (int g = 0; g < C::kColumns / 32; ++g) {
    const uint4 weight = *reinterpret_cast<const uint4*>(weights + 32 * g);
    const uint4 bias = *reinterpret_cast<const uint4*>(biases + 32 * g);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      const float2 w = C::to_floats(C::from_bits((&weight.x)[u]));
      const float2 b = C::to_floats(C::from_bits((&bias.x)[u]));
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& x = total[(4 * g + u) * 4 + 2 * h];
        float& y = total[(4 * g + u) * 4 + 2 * h + 1];
        x = (x * mean_rstd[h].y + shift[h]) * w.x + b.x;
        y = (y * mean_rstd[h].y + shift[h]) * w.y + b.y;
      }
    }
  }
}

// One warp: one prefix token of one image.
template <typename C>
__device__ void prefix_token(const VlmkPatchEmbedParams& p, int row, int tokens_per_image) {
  using Token = typename C::Token;
  const int lane = lane_index();
  const int64_t b = row / p.num_prefix;
  const int i = row % p.num_prefix;
  const Token* prefix = static_cast<const Token*>(p.prefix) + int64_t{i} * p.dim;
  const Token* pos =
      p.pos_on_prefix ? static_cast<const Token*>(p.pos) + b * p.pos_stride_b + i * p.pos_stride_n
                      : nullptr;
  const int64_t out = (b * tokens_per_image + i) * p.dim;
  const auto for_each_8 = [&](auto use) {
#pragma unroll 1
    for (int d = 8 * lane; d < p.dim; d += 256) {
      const uint4 token = load_global(prefix + d, true), position = load_global(pos + d, pos);
      float x[8];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const float2 a = C::to_floats(C::from_bits((&token.x)[j]));
        const float2 c = C::to_floats(C::from_bits((&position.x)[j]));
        x[2 * j] = a.x + c.x, x[2 * j + 1] = a.y + c.y;
      }
      use(d, x);
    }
  };
  const auto store = [&](void* tokens, int d, const float (&x)[8]) {
    uint4 packed;
#pragma unroll
    for (int j = 0; j < 4; ++j) (&packed.x)[j] = pack<typename C::Token>(x[2 * j], x[2 * j + 1]);
    *reinterpret_cast<uint4*>(static_cast<Token*>(tokens) + out + d) = packed;
  };
  float mean = 0.0f, rstd = 1.0f;
  if constexpr (C::kNormed) {
    float sum = 0.0f, squares = 0.0f;
    for_each_8([&](int, const float (&x)[8]) {
      for (float y : x) sum += y;
    });
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    mean = sum / p.dim;
    for_each_8([&](int, const float (&x)[8]) {
      for (float y : x) squares += (y - mean) * (y - mean);
    });
    for (int lanes = 16; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
    rstd = rsqrtf(squares / p.dim + p.eps);
  }
  for_each_8([&](int d, float (&x)[8]) {
    if (p.total) store(p.total, d, x);
    if constexpr (C::kNormed) {
      const auto* weight = static_cast<const Token*>(p.norm_weight) + d;
      const auto* bias = static_cast<const Token*>(p.norm_bias) + d;
      for (int j = 0; j < 8; ++j) {
        x[j] = (x[j] - mean) * rstd * C::to_float(weight[j]);
        if (p.norm_bias) x[j] += C::to_float(bias[j]);
      }
    }
    store(p.out, d, x);
  });
}

}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// From a tile's sums to tokens: what both warpgroups have of the same sums, bias, position,
// LayerNorm with statistics that the blocks of a cluster share, and the stores. Prefix tokens,
// which have no pixels, are made here too.
#pragma once

#include <cstdint>

#include "common/hopper.h"
#include "patch_embed/small_config.h"
#include "patch_embed/small_products.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace small {

// The threads that multiply.
__device__ __forceinline__ void sync_groups() { named_wait<128 * kGroups>(1); }

// The sum over the four lanes that hold a row.
__device__ __forceinline__ float sum_of_four_lanes(float x) {
  x += __shfl_xor_sync(~0u, x, 1);
  return x + __shfl_xor_sync(~0u, x, 2);
}

// A thread's tokens, one or two: four neighbours in every 16 of the block's columns.
template <typename C>
struct Tokens {
  using Token = typename C::Token;
  float4 columns[C::kUnits][C::kFours];
  uint2 positions[C::kUnits][C::kFours];
  int rows[C::kUnits];    // of the tile
  int tokens[C::kUnits];  // of the output; -1 where there is none
  int column;             // the first

  // Asks for the positions; nothing waits for them yet. No __ldg: what it reads must not be written
  // while the kernel runs, and the ones before it may still do so when it starts.
  __device__ __forceinline__ void load_positions(const VlmkPatchEmbedParams& p, const Schedule& s,
                                                 int first_patch) {
#pragma unroll
    for (int unit = 0; unit < C::kUnits; ++unit) {
      const int counted = first_patch + rows[unit];
      const int row = s.width.divide(counted), image = s.grid_y.divide(row);
      const int patch = counted - image * s.grid_y.divisor * s.width.divisor;
      const bool there = row < s.rows && rows[unit] < C::kPatches;
      tokens[unit] = there ? counted + (image + 1) * p.num_prefix : -1;
      const auto* pos = static_cast<const Token*>(p.pos) + image * p.pos_stride_b +
                        (patch + (p.pos_on_prefix ? p.num_prefix : 0)) * p.pos_stride_n + column;
#pragma unroll
      for (int i = 0; i < C::kFours; ++i) {
        const bool add = p.pos && there && column + 16 * i < p.dim;
        positions[unit][i] = add ? *reinterpret_cast<const uint2*>(pos + 16 * i) : make_uint2(0, 0);
      }
    }
  }

  // Takes the sums, and of a warpgroup that shares its patches, of the other one: each finishes one
  // of a thread's two rows. The other's go through what was the ring.
  __device__ __forceinline__ void take(const Sums<C>& sums, int group, char* exchange,
                                       float* constants) {
    const int thread = static_cast<int>(threadIdx.x % 128), lane = lane_index();
    auto* others = reinterpret_cast<float4*>(exchange) + thread;
    if constexpr (C::kGroupsK > 1) sync_groups();
#pragma unroll
    for (int i = 0; i < C::kFours; ++i) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const int j = 8 * i + 2 * h;
        const float4 x = make_float4(sums.at(j), sums.at(j + 1), sums.at(j + 4), sums.at(j + 5));
        if (C::kGroupsK == 1) {
          columns[h][i] = x;
        } else if (h == group) {
          columns[0][i] = x;
        } else {
          others[((1 - group) * C::kFours + i) * 128] = x;
        }
        // Rows 6 and 7 of the last warp, behind the patches.
        if (C::kBytes && h == 1 && group >= kGroups - C::kGroupsK && thread >= 96) {
          const auto both = [&](float y) { return y + __shfl_xor_sync(~0u, y, 4); };
          const float4 constant = make_float4(both(x.x), both(x.y), both(x.z), both(x.w));
          float* part = constants + (C::kGroupsK > 1 ? group * C::kColumns : 0);
          if (lane >= 28) *reinterpret_cast<float4*>(part + 16 * i + 4 * (lane % 4)) = constant;
        }
      }
    }
    if constexpr (C::kGroupsK > 1 || C::kBytes) sync_groups();
    if constexpr (C::kGroupsK > 1) {
#pragma unroll
      for (int i = 0; i < C::kFours; ++i) add(0, i, others[(group * C::kFours + i) * 128]);
    }
    if constexpr (C::kBytes) {
#pragma unroll
      for (int k = 0; k < C::kGroupsK; ++k) add_vector(constants + k * C::kColumns);
    }
  }

  __device__ __forceinline__ void add(int unit, int i, float4 x) {
    float4& sum = columns[unit][i];
    sum.x += x.x, sum.y += x.y, sum.z += x.z, sum.w += x.w;
  }

  // A vector of the block's columns.
  __device__ __forceinline__ void add_vector(const float* vector) {
#pragma unroll
    for (int i = 0; i < C::kFours; ++i) {
#pragma unroll
      for (int unit = 0; unit < C::kUnits; ++unit) add(unit, i, four(vector, i));
    }
  }

  __device__ static float4 four(const float* vector, int i) {
    return *reinterpret_cast<const float4*>(vector + 16 * i + 4 * (lane_index() % 4));
  }

  __device__ __forceinline__ void add_positions() {
#pragma unroll
    for (int unit = 0; unit < C::kUnits; ++unit) {
#pragma unroll
      for (int i = 0; i < C::kFours; ++i) {
        const float2 x = C::to_floats(positions[unit][i].x), y = C::to_floats(positions[unit][i].y);
        add(unit, i, make_float4(x.x, x.y, y.x, y.y));
      }
    }
  }

  // LayerNorm. Of each row, the blocks tell each other mean and squared deviations of their
  // columns.
  __device__ __forceinline__ void normalise(const VlmkPatchEmbedParams& p, int blocks,
                                            const float* weight, const float* bias,
                                            float2* statistics, uint32_t barrier) {
    static_assert(kMaxColumnGroups == 8);
    const int q = lane_index() % 4, rank = static_cast<int>(cluster_rank());
    cluster_wait();
#pragma unroll
    for (int unit = 0; unit < C::kUnits; ++unit) {
      float total = 0.0f, squares = 0.0f;
#pragma unroll
      for (int i = 0; i < C::kFours; ++i) {
        const float4 x = columns[unit][i];
        total += (x.x + x.y) + (x.z + x.w);
      }
      const float mean = sum_of_four_lanes(total) * (1.0f / C::kColumns);
#pragma unroll
      for (int i = 0; i < C::kFours; ++i) {
        const float4 x = columns[unit][i];
        squares += (x.x - mean) * (x.x - mean) + (x.y - mean) * (x.y - mean);
        squares += (x.z - mean) * (x.z - mean) + (x.w - mean) * (x.w - mean);
      }
      squares = sum_of_four_lanes(squares);
      const uint32_t there = shared_address(statistics + rank * C::kRows + rows[unit]);
#pragma unroll
      for (int block = q; block < kMaxColumnGroups; block += 4) {
        if (block < blocks) {
          store_to_block(in_block(there, block), make_float2(mean, squares),
                         in_block(barrier, block));
        }
      }
    }
    barrier_wait(barrier, 0);
    float mean[C::kUnits], rstd[C::kUnits];
#pragma unroll
    for (int unit = 0; unit < C::kUnits; ++unit) {
      // Each of the four lanes takes the parts of two blocks; exact for a large mean too.
      const float2 none = make_float2(0.0f, 0.0f);
      const float2* parts = statistics + rows[unit];
      const float2 x = q < blocks ? parts[q * C::kRows] : none;
      const float2 y = q + 4 < blocks ? parts[(q + 4) * C::kRows] : none;
      mean[unit] = sum_of_four_lanes(x.x + y.x) / blocks;
      float squares = 0.0f;
      if (q < blocks) squares += x.y + C::kColumns * (x.x - mean[unit]) * (x.x - mean[unit]);
      if (q + 4 < blocks) squares += y.y + C::kColumns * (y.x - mean[unit]) * (y.x - mean[unit]);
      rstd[unit] = rsqrtf(sum_of_four_lanes(squares) / (blocks * C::kColumns) + p.eps);
    }
#pragma unroll
    for (int i = 0; i < C::kFours; ++i) {
      const float4 w = four(weight, i), b = four(bias, i);
#pragma unroll
      for (int unit = 0; unit < C::kUnits; ++unit) {
        float4& x = columns[unit][i];
        x.x = (x.x - mean[unit]) * rstd[unit] * w.x + b.x;
        x.y = (x.y - mean[unit]) * rstd[unit] * w.y + b.y;
        x.z = (x.z - mean[unit]) * rstd[unit] * w.z + b.z;
        x.w = (x.w - mean[unit]) * rstd[unit] * w.w + b.w;
      }
    }
  }

  __device__ __forceinline__ void store(const VlmkPatchEmbedParams& p, void* out) const {
#pragma unroll
    for (int unit = 0; unit < C::kUnits; ++unit) {
      if (tokens[unit] < 0) continue;
      auto* there = static_cast<Token*>(out) + int64_t{tokens[unit]} * p.dim + column;
#pragma unroll
      for (int i = 0; i < C::kFours; ++i) {
        const float4 x = columns[unit][i];
        if (column + 16 * i < p.dim) {
          *reinterpret_cast<uint2*>(there + 16 * i) =
              make_uint2(pack<typename C::Token>(x.x, x.y), pack<typename C::Token>(x.z, x.w));
        }
      }
    }
  }
};

// One warp: a vector of the output's columns, those of the block. The loads don't wait for each
// other, as they would if each were made or not.
template <typename C>
__device__ __forceinline__ void load_vector(const void* source, int first_column, int dim,
                                            float* vector) {
  constexpr int kEach = ceil_div(C::kColumns, 32);
  float x[kEach] = {};
  if (source) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int column = min(first_column + lane_index() + 32 * i, dim - 1);
      x[i] = C::to_float(static_cast<const typename C::Token*>(source)[column]);
    }
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i) {
    const int column = lane_index() + 32 * i;
    if (column < C::kColumns) vector[column] = x[i];
  }
}

// One warp: one prefix token of one image.
template <typename C>
__device__ void prefix_token(const VlmkPatchEmbedParams& p, int row) {
  using Token = typename C::Token;
  // 8 neighbours for each lane, 4 times: all the columns that a norm takes at most.
  constexpr int kTimes = 4;
  static_assert(!C::kNormed || 256 * kTimes >= kMaxColumnGroups * C::kColumns);
  const int image = row / p.num_prefix, i = row - image * p.num_prefix;
  const Token* prefix = static_cast<const Token*>(p.prefix) + int64_t{i} * p.dim;
  const Token* pos = static_cast<const Token*>(p.pos) + image * p.pos_stride_b + i * p.pos_stride_n;
  const int64_t out = (int64_t{image} * (p.grid_y * p.grid_x + p.num_prefix) + i) * p.dim;
  for (int begin = 0; begin < p.dim; begin += 256 * kTimes) {
    const int first = begin + 8 * lane_index();
    float x[kTimes][8];
    uint4 positions[kTimes] = {};
    const auto column = [&](int j) { return min(first + 256 * j, p.dim - 8); };
    const auto load = [&](float (&to)[8], const void* from, int j) {
#pragma unroll
      for (int e = 0; e < 8; ++e)
        to[e] = C::to_float(static_cast<const Token*>(from)[column(j) + e]);
    };
#pragma unroll
    for (int j = 0; j < kTimes; ++j) {
      load(x[j], prefix, j);
      if (p.pos_on_prefix) positions[j] = *reinterpret_cast<const uint4*>(pos + column(j));
    }
    const auto store = [&](void* tokens) {
#pragma unroll
      for (int j = 0; j < kTimes; ++j) {
        uint4 packed;
#pragma unroll
        for (int e = 0; e < 4; ++e)
          (&packed.x)[e] = pack<typename C::Token>(x[j][2 * e], x[j][2 * e + 1]);
        if (first + 256 * j < p.dim) {
          *reinterpret_cast<uint4*>(static_cast<Token*>(tokens) + out + column(j)) = packed;
        }
      }
    };
#pragma unroll
    for (int j = 0; j < kTimes; ++j) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const float2 position = C::to_floats((&positions[j].x)[e]);
        x[j][2 * e] += position.x, x[j][2 * e + 1] += position.y;
      }
    }
    if constexpr (C::kNormed) {
      if (p.total) store(p.total);
      const auto sum = [&](auto of) {
        float total = 0.0f;
#pragma unroll
        for (int j = 0; j < kTimes; ++j) {
#pragma unroll
          for (int e = 0; e < 8; ++e) total += first + 256 * j < p.dim ? of(x[j][e]) : 0.0f;
        }
#pragma unroll
        for (int lanes = 16; lanes > 0; lanes /= 2) total += __shfl_xor_sync(~0u, total, lanes);
        return total;
      };
      const float mean = sum([](float y) { return y; }) / p.dim;
      const float squares = sum([&](float y) { return (y - mean) * (y - mean); });
      const float rstd = rsqrtf(squares / p.dim + p.eps);
#pragma unroll
      for (int j = 0; j < kTimes; ++j) {
        float weight[8], bias[8] = {};
        load(weight, p.norm_weight, j);
        if (p.norm_bias) load(bias, p.norm_bias, j);
#pragma unroll
        for (int e = 0; e < 8; ++e) x[j][e] = (x[j][e] - mean) * rstd * weight[e] + bias[e];
      }
    }
    store(p.out);
  }
}

}  // namespace small
}  // namespace patch_embed
}  // namespace vlmk

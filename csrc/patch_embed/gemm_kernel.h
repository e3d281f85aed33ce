// SPDX-License-Identifier: Apache-2.0
// 16-bit pixels as an ordinary product of matrices: many patches of 16 x 16, or rows. A row of a
// patch is 32 bytes, and the copy engine gathers those of 128 patches one after another, from one
// image to the next, as if for a convolution.
//
// One thread copies pixels and weights to shared memory; two warpgroups multiply them, 64 patches
// by 256 columns each, and store the tokens of one tile during the products of the next.
#pragma once

#include <cstdint>

#include "common/float16.h"
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "common/wgmma.h"
#include "patch_embed/gemm_config.h"
#include "patch_embed/tokens.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace gemm {

// The thread that copies.
template <typename C>
__device__ __forceinline__ void copy_tiles(const Schedule& s, const Maps& maps, Ring<C> ring) {
  for (int tile = static_cast<int>(blockIdx.x); tile < s.tiles; tile += gridDim.x) {
    const int row = s.column_tiles.divide(tile), patch = row * kPatches;
    const int column_tile = tile - row * s.column_tiles.divisor;
    const int image = s.grid.divide(patch), in_image = patch - image * s.grid.divisor;
    const int y = s.grid_x.divide(in_image), x = in_image - y * s.grid_x.divisor;
#pragma unroll 1
    for (int step = 0; step < s.steps; ++step) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      barrier_expect(ring.full(), C::kStageBytes);
      if (s.are_rows()) {
        copy_gathered(ring.stage(), maps.pixels[0], step * kStageDepth, 0, y, image, 0,
                      ring.full());
      } else {
        constexpr int kPerChannel = kPatch / kStageRows;
        const int channel = step / kPerChannel, first = step % kPerChannel * kStageRows;
#pragma unroll
        for (int i = 0; i < kStageRows; ++i) {
          copy_gathered(ring.stage() + i * kStepBytes, maps.pixels[channel], 0,
                        x / (s.in_pairs() ? 2 : 1), y, image, first + i, ring.full());
        }
      }
      copy_tile(ring.stage() + C::kPixelBytes, maps.weight, step * kStageDepth, 0,
                column_tile * (C::kColumns / 8), 0, ring.full());
      ring.advance();
    }
  }
}

// The thread's columns of its two tokens, 8 in every 32: first their positions, then what they come
// to, which is stored little by little while the next tile is multiplied: stored at once, tokens
// would hold up the products.
template <typename C>
struct Tokens {
  using Token = typename C::Token;
  uint4 eights[2][C::kEights];
  int row[2] = {-1, -1};  // of the result, -1 where there is no such patch
  int column = 0;         // the first

  __device__ __forceinline__ void load_positions(const VlmkPatchEmbedParams& p, const Schedule& s,
                                                 const int (&patch)[2], int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int image = s.grid.divide(patch[h]), n = patch[h] - image * s.grid.divisor;
      const auto* pos = static_cast<const Token*>(p.pos) + image * p.pos_stride_b +
                        (n + (p.pos_on_prefix ? p.num_prefix : 0)) * p.pos_stride_n + column;
#pragma unroll
      for (int g = 0; g < C::kEights; ++g) {
        const bool add = p.pos && patch[h] < s.patches && column + 32 * g < p.dim;
        eights[h][g] = load_global(pos + 32 * g, add);
      }
    }
  }

  __device__ __forceinline__ void add_up(const VlmkPatchEmbedParams& p, const Schedule& s,
                                         const int (&patch)[2], int first_column,
                                         const float (&sum)[C::kSums]) {
    column = first_column;
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int before = (s.grid.divide(patch[h]) + 1) * p.num_prefix;
      row[h] = patch[h] < s.patches ? patch[h] + before : -1;
    }
    const auto* bias = static_cast<const Token*>(p.bias) + column;
    const auto load_bias = [&](int g) {
      return load_global(bias + 32 * g, p.bias && column + 32 * g < p.dim);
    };
    uint4 next = load_bias(0);
#pragma unroll
    for (int g = 0; g < C::kEights; ++g) {
      const uint4 added = next;
      if (g + 1 < C::kEights) next = load_bias(g + 1);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const float2 b = C::to_floats(C::from_bits((&added.x)[u]));
#pragma unroll
        for (int h = 0; h < 2; ++h) {
          uint32_t& word = (&eights[h][g].x)[u];
          const float2 position = C::to_floats(C::from_bits(word));
          const float* x = &sum[4 * (u * C::kEights + g) + 2 * h];
          word = pack<Token>(x[0] + (b.x + position.x), x[1] + (b.y + position.y));
        }
      }
    }
  }

  __device__ __forceinline__ void store(const VlmkPatchEmbedParams& p, int g) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      auto* out = static_cast<Token*>(p.out) + int64_t{row[h]} * p.dim + column + 32 * g;
      if (row[h] >= 0 && column + 32 * g < p.dim) *reinterpret_cast<uint4*>(out) = eights[h][g];
    }
  }
};

// All tiles of one warpgroup.
template <typename C>
__device__ __forceinline__ void embed_tiles(const VlmkPatchEmbedParams& p, const Schedule& s,
                                            int group, Ring<C> ring) {
  const int lane = lane_index();
  // Of two patches that are copied as one, each warpgroup takes one.
  const uint64_t pixels = row_descriptor(
      ring.stages + group * (s.in_pairs() ? kPatch * 2 : 64 * s.run_bytes), s.run_bytes);
  const uint64_t weights = row_descriptor(ring.stages + C::kPixelBytes, kStageDepth * 2);
  const uint32_t pixels_step = (s.are_rows() ? kPatch * 2 : kStepBytes) >> 4;
  float sum[C::kSums];
  Tokens<C> tokens;
  // The products of a stage, and `meanwhile`.
  const auto multiply = [&](bool first, auto meanwhile) {
    barrier_wait(ring.full(), ring.parity);
    mma_fence();
    const uint32_t slot = ring.slot * C::kStageBytes >> 4;
#pragma unroll
    for (int i = 0; i < kStageRows; ++i) {
      mma<typename C::Token, C::kColumns>(sum, pixels + slot + i * pixels_step,
                                          weights + slot + (i * kPatch * 2 >> 4), !first || i > 0);
    }
    mma_commit();
    meanwhile();
    mma_wait<1>();
    if (group_thread() == 0 && !first) barrier_arrive(ring.empty_before());
    ring.advance();
  };
#pragma unroll 1
  for (int tile = static_cast<int>(blockIdx.x); tile < s.tiles; tile += gridDim.x) {
#pragma unroll
    for (int step = 0; step < C::kEights; ++step) {
      multiply(step == 0, [&] { tokens.store(p, step); });
    }
    const int row = s.column_tiles.divide(tile);
    const int column = (tile - row * s.column_tiles.divisor) * C::kColumns + lane % 4 * 8;
    int patch[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = group_thread() / 32 * 16 + 8 * h + lane / 4;
      patch[h] = row * kPatches + (s.in_pairs() ? 2 * own + group : 64 * group + own);
    }
    tokens.load_positions(p, s, patch, column);
    stay_behind(p.batch < 0);
#pragma unroll 1
    for (int step = C::kEights; step < s.steps; ++step) multiply(false, [] {});
    mma_wait<0>();
    if (group_thread() == 0) barrier_arrive(ring.empty_before());
    // ptxas would unpack the positions, and so wait for them, before the last products.
    stay_behind(p.batch < 0);
    tokens.add_up(p, s, patch, column, sum);
  }
#pragma unroll
  for (int g = 0; g < C::kEights; ++g) tokens.store(p, g);
}

template <typename C>
__global__ void __launch_bounds__(kThreads, 1)
    patch_embed_gemm_kernel(const __grid_constant__ VlmkPatchEmbedParams p,
                            const __grid_constant__ Schedule s, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char shared[];
  const int warp = warp_index();
  const Ring<C> ring(shared_address(shared));
  if (threadIdx.x == 0) {
    for (Ring<C> each = ring; each.parity == 0; each.advance()) {
      barrier_init(each.full(), 1);
      barrier_init(each.empty(), kGroups);
    }
    fence_barrier_init();
  }
  __syncthreads();
  if (warp >= 4 * kGroups) {
    shrink_registers<kProducerRegisters>();
    const int helper = warp - 4 * kGroups;
    if (helper == 0) {
      if (lane_index() == 0) copy_tiles<C>(s, maps, ring);
    } else {
      const int blocks = static_cast<int>(gridDim.x);
      for (int row = static_cast<int>(blockIdx.x) + (helper - 1) * blocks;
           row < p.batch * p.num_prefix; row += 3 * blocks) {
        prefix_token<C>(p, row, s.grid.divisor + p.num_prefix);
      }
    }
  } else {
    grow_registers<kConsumerRegisters>();
    embed_tiles<C>(p, s, warp / 4, ring);
  }
}

}  // namespace gemm
}  // namespace patch_embed
}  // namespace vlmk

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
__device__ __forceinline__ void copy_tiles(const Schedule& s, const Maps& maps, TileRing<C> ring) {
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

// A thread's part of a tile: columns of two tokens.
struct Part {
  int row[2] = {-1, -1};  // of the result, -1 where there is no such patch
  int column = 0;         // the first: there are 8 in every 32

  __device__ __forceinline__ bool there(const VlmkPatchEmbedParams& p, int h, int g) const {
    return row[h] >= 0 && column + 32 * g < p.dim;
  }
};

// What a part comes to. Eights of it are stored one after another while the next tile is
// multiplied, and give way to the positions of that one. All at once they would hold up its
// products.
template <typename C>
struct Tokens {
  using Token = typename C::Token;
  uint4 eights[2][C::kEights];
  Part part;

  __device__ __forceinline__ void store(const VlmkPatchEmbedParams& p, int g) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      auto* out = static_cast<Token*>(p.out) + int64_t{part.row[h]} * p.dim + part.column;
      if (part.there(p, h, g)) *reinterpret_cast<uint4*>(out + 32 * g) = eights[h][g];
    }
  }

  __device__ __forceinline__ void load_positions(const VlmkPatchEmbedParams& p, const Part& next,
                                                 const Token* const (&positions)[2], int g) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      eights[h][g] = load_global(positions[h] + 32 * g, p.pos && next.there(p, h, g));
    }
  }

  // The part whose positions were loaded.
  __device__ __forceinline__ void add_up(const VlmkPatchEmbedParams& p, const Part& next_part,
                                         const float (&sum)[C::kSums]) {
    part = next_part;
    const auto* bias = static_cast<const Token*>(p.bias) + part.column;
    const auto load_bias = [&](int g) {
      return load_global(bias + 32 * g, p.bias && part.column + 32 * g < p.dim);
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
};

// All tiles of one warpgroup.
template <typename C>
__device__ __forceinline__ void embed_tiles(const VlmkPatchEmbedParams& p, const Schedule& s,
                                            int group, TileRing<C> ring) {
  using Token = typename C::Token;
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
      mma<Token, C::kColumns>(sum, pixels + slot + i * pixels_step,
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
    const int row_tile = s.column_tiles.divide(tile);
    const int column_tile = tile - row_tile * s.column_tiles.divisor;
    Part part;
    part.column = column_tile * C::kColumns + lane % 4 * 8;
    const Token* positions[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = group_thread() / 32 * 16 + 8 * h + lane / 4;
      const int patch = row_tile * kPatches + (s.in_pairs() ? 2 * own + group : 64 * group + own);
      const int image = s.grid.divide(patch), n = patch - image * s.grid.divisor;
      if (patch < s.patches) part.row[h] = patch + (image + 1) * p.num_prefix;
      positions[h] = static_cast<const Token*>(p.pos) + image * p.pos_stride_b +
                     (n + (p.pos_on_prefix ? p.num_prefix : 0)) * p.pos_stride_n + part.column;
    }
#pragma unroll
    for (int step = 0; step <= C::kEights; ++step) {
      multiply(step == 0, [&] {
        if (step < C::kEights) tokens.store(p, step);
        // One behind: the registers of this step's may still be read.
        if (step > 0) tokens.load_positions(p, part, positions, step - 1);
        stay_behind(p.batch < 0);  // ptxas would put the loads of all steps in one place
      });
    }
#pragma unroll 1
    for (int step = C::kEights + 1; step < s.steps; ++step) multiply(false, [] {});
    mma_wait<0>();
    if (group_thread() == 0) barrier_arrive(ring.empty_before());
    // ptxas would unpack the positions, and so wait for them, before the last products.
    stay_behind(p.batch < 0);
    tokens.add_up(p, part, sum);
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
  const TileRing<C> ring(shared_address(shared));
  if (threadIdx.x == 0) {
    for (TileRing<C> each = ring; each.parity == 0; each.advance()) {
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

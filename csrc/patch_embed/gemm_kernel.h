// SPDX-License-Identifier: Apache-2.0
// 16-bit pixels as an ordinary product of matrices: many patches of 16 x 16 or 32 x 32, or rows. A
// row of a patch is 32 or 64 bytes, and the copy engine gathers those of 128 patches one after
// another, from one image to the next, as if for a convolution. Rows that it can't bring, a
// warpgroup gathers.
//
// One thread copies pixels and weights to shared memory; two warpgroups multiply them, 64 patches
// by 256 columns each, and store the tokens of one tile during the products of the next. With a
// LayerNorm, the blocks of a cluster hold all columns and add up its statistics.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/hopper.h"
#include "common/tensor_map.h"
#include "common/wgmma.h"
#include "patch_embed/gemm_config.h"
#include "patch_embed/gemm_gather.h"
#include "patch_embed/gemm_tokens.h"
#include "patch_embed/tokens.h"
#include "patch_embed/weights.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace gemm {

// The thread that copies.
template <typename C>
__device__ __forceinline__ void copy_tiles(const Schedule& s, const Maps& maps, TileRing<C> ring) {
  const int copy_bytes = kStagePixelBytes / s.copies;
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
        const int first = step * s.copies;
#pragma unroll
        for (int i = 0; i < kStageSteps; ++i) {
          if (i == s.copies) break;
          copy_gathered(ring.stage() + i * copy_bytes, maps.pixels[first / kMapRows], 0,
                        x / (s.in_pairs() ? 2 : 1), y, image, first % kMapRows + i, ring.full());
        }
      }
      copy_tile(ring.stage() + C::kPixelBytes, maps.weight, step * kStageDepth, 0,
                column_tile * (C::kColumns / 8), 0, ring.full());
      ring.advance();
    }
  }
}

// All tiles of one warpgroup.
template <typename C>
__device__ __forceinline__ void embed_tiles(const VlmkPatchEmbedParams& p, const Schedule& s,
                                            char* shared, int group, TileRing<C> ring) {
  using Token = typename C::Token;
  using Whole = std::integral_constant<int, kStageSteps>;
  const int lane = lane_index();
  // Of two patches that are copied as one, each warpgroup takes one.
  const int run_bytes = C::kGathered ? kStageDepth * 2 : s.run_bytes;
  const bool pairs = !C::kGathered && s.in_pairs();
  const uint64_t pixels =
      row_descriptor(ring.stages + group * (pairs ? kStep * 2 : 64 * run_bytes), run_bytes);
  const uint64_t weights = row_descriptor(ring.stages + C::kPixelBytes, kStageDepth * 2);
  // From a step of 16 pixels to the next, and to the one behind that.
  const int copies = C::kGathered ? 1 : s.copies;
  const uint32_t copy = kStagePixelBytes / copies >> 4;
  const uint32_t next = copies <= 2 ? kStep * 2 >> 4 : copy;
  const uint32_t second = copies == 2 ? copy : 2 * next;
  float sum[C::kSums];
  Tokens<C> tokens;
  // The products of a stage, and `meanwhile`.
  const auto multiply = [&](bool first, auto steps, auto meanwhile) {
    barrier_wait(ring.full(), ring.parity);
    // Here and not where they are stored: there it would wait for all loads that are under way.
    if constexpr (C::kGathered) fence_async_proxy();
    mma_fence();
    const uint32_t slot = ring.slot * C::kStageBytes >> 4;
#pragma unroll
    for (int i = 0; i < decltype(steps)::value; ++i) {
      mma<Token, C::kColumns>(sum, pixels + slot + i / 2 * second + i % 2 * next,
                              weights + slot + (i * kStep * 2 >> 4), !first || i > 0);
    }
    mma_commit();
    meanwhile();
    mma_wait<1>();
    if (group_thread() == 0 && !first) barrier_arrive(ring.empty_before());
    ring.advance();
  };
#pragma unroll 1
  for (int done = 0;; ++done) {
    const int tile = static_cast<int>(blockIdx.x + done * gridDim.x);
    if (tile >= s.tiles) break;
    const int row_tile = s.column_tiles.divide(tile);
    const int column_tile = tile - row_tile * s.column_tiles.divisor;
    Part part;
    part.column = column_tile * C::kColumns + lane % 4 * 8;
    int positions[2];  // in 8 channels
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const int own = group_thread() / 32 * 16 + 8 * h + lane / 4;
      const int patch = row_tile * kPatches + (pairs ? 2 * own + group : 64 * group + own);
      const int image = s.grid.divide(patch), n = patch - image * s.grid.divisor;
      if (patch < s.patches) part.row[h] = patch + (image + 1) * p.num_prefix;
      const int64_t first =
          image * p.pos_stride_b + (n + (p.pos_on_prefix ? p.num_prefix : 0)) * p.pos_stride_n;
      positions[h] = static_cast<int>(first / 8) + part.column / 8;
    }
    if constexpr (C::kGathered) {
      multiply(true, Whole(), [] {});
#pragma unroll 1
      for (int step = 1; step < s.steps - 2; ++step) multiply(false, Whole(), [] {});
      multiply(false, Whole(), [&] {
#pragma unroll
        for (int g = 0; g < Tokens<C>::kKept; ++g) tokens.load_positions(p, part, positions, g);
        stay_behind(p.batch < 0);
      });
      multiply(false, std::integral_constant<int, kMaxLeft / 16>(), [] {});
    } else {
#pragma unroll
      for (int step = 0; step <= C::kEights; ++step) {
        multiply(step == 0, Whole(), [&] {
          if (step < C::kEights) tokens.store(p, p.out, step);
          // One behind: the registers of this step's may still be read.
          if (step > 0) tokens.load_positions(p, part, positions, step - 1);
          stay_behind(p.batch < 0);  // ptxas would put the loads of all steps in one place
        });
      }
#pragma unroll 1
      for (int step = C::kEights + 1; step < s.steps; ++step) multiply(false, Whole(), [] {});
    }
    mma_wait<0>();
    if (group_thread() == 0) barrier_arrive(ring.empty_before());
    // ptxas would unpack the positions, and so wait for them, before the last products.
    stay_behind(p.batch < 0);
    tokens.add_up(p, part, positions, sum);
    if constexpr (C::kNormed) {
      tokens.normalise(p, sum, Sharing<C>{shared, s.column_tiles.divisor, done});
    }
  }
  if constexpr (!C::kGathered) {
#pragma unroll
    for (int g = 0; g < C::kEights; ++g) tokens.store(p, p.out, g);
  }
}

// The prefix tokens, shared out among so many warps of each block.
template <typename C>
__device__ __forceinline__ void prefix_tokens(const VlmkPatchEmbedParams& p, const Schedule& s,
                                              int warp, int warps) {
  const int blocks = static_cast<int>(gridDim.x);
  for (int row = static_cast<int>(blockIdx.x) + warp * blocks; row < p.batch * p.num_prefix;
       row += warps * blocks) {
    prefix_token<C>(p, row, s.grid.divisor + p.num_prefix);
  }
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
      barrier_init(each.full(), C::kGathered ? 1 + kGatherers / 32 : 1);
      barrier_init(each.empty(), kGroups);
    }
    if constexpr (C::kNormed) {
      for (int i = 0; i < 2 * kGroups; ++i) {
        barrier_init(shared_address(shared + C::kStatisticsThere) + 8 * i, 1);
      }
    }
    fence_barrier_init();
  }
  wait_for_previous_grids();
  if constexpr (C::kNormed) {
    load_norm<C, kThreads>(p, static_cast<int>(cluster_rank()) * C::kColumns,
                           reinterpret_cast<typename C::Token*>(shared + C::kNorm));
    cluster_sync();
  } else {
    __syncthreads();
  }
  if (warp >= 4 * kGroups) {
    shrink_registers<C::kProducerRegisters>();
    const int helper = warp - 4 * kGroups;
    if constexpr (C::kGathered) {
      gather_tiles<C>(p, s, maps, ring);
      prefix_tokens<C>(p, s, helper, kGatherers / 32);
    } else if (helper > 0) {
      prefix_tokens<C>(p, s, helper - 1, 3);
    } else if (lane_index() == 0) {
      copy_tiles<C>(s, maps, ring);
    }
  } else {
    grow_registers<C::kConsumerRegisters>();
    embed_tiles<C>(p, s, shared, warp / 4, ring);
  }
  // No block leaves while others may still write to it.
  if constexpr (C::kNormed) cluster_sync();
}

}  // namespace gemm
}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The gradient of the weight of 16-bit images, and in the same pass those of positions and bias.
//
// dW^T = X^T G with X the patches and G the gradient, both with a token for each row. X is the
// operand in registers: rows of pixels lie in shared memory as the copy engine brings them, those
// of neighbouring patches together, and a lane picks out what is its. Two warps add up G meanwhile.
#pragma once

#include <cstdint>

#include "common/float16.h"
#include "common/hopper.h"
#include "common/mma.h"
#include "common/tensor_map.h"
#include "common/threads.h"
#include "common/wgmma.h"
#include "patch_embed/bwd_config.h"

namespace vlmk {
namespace patch_embed {
namespace bwd {

// What a block works on.
struct Work {
  int split, row_tile, column_tile;
  int first_group, last_group;  // the last one is not its

  __device__ __forceinline__ explicit Work(const Job& p) {
    const int block = static_cast<int>(blockIdx.x);
    split = p.tiles.divide(block);
    const int tile = block - split * p.tiles.divisor;
    row_tile = p.column_tiles.divide(tile);
    column_tile = tile - row_tile * p.column_tiles.divisor;
    first_group = split * p.groups + min(split, p.longer);
    last_group = first_group + p.groups + (split < p.longer);
  }

  template <typename C>
  __device__ __forceinline__ bool adds_up(const Job& p) const {
    return row_tile < C::kPanels && (p.d_pos || p.d_bias);
  }
};

// The thread that copies. Each copy takes it some 100 cycles, whatever its size.
template <typename C>
__device__ __forceinline__ void copy_stages(const Job& p, const Work& work, const Maps& maps,
                                            TileRing<C> ring) {
  const TileRows<C> rows(work.row_tile);
  const CUtensorMap* pixels = maps.pixels[work.row_tile];
  const uint32_t bytes = (rows.count[0] + rows.count[1]) * C::kRowBytes + C::kPanels * kPanelBytes;
#pragma unroll 1
  for (int group = work.first_group; group < work.last_group; ++group) {
    const int y = p.groups_of_row.divide(group);
    const int x = (group - y * p.groups_of_row.divisor) * C::kPositions;
#pragma unroll 1
    for (int step = 0; step < p.image_steps; ++step) {
      const int image = step * C::kImages;
      barrier_wait(ring.empty(), ring.parity ^ 1);
      barrier_expect(ring.full(), bytes);
      copy_tile(ring.stage(), pixels[0], x * C::kPatch, image, y * C::kPatch + rows.first,
                rows.channel, ring.full());
      if (rows.count[1] > 0) {
        copy_tile(ring.stage() + rows.count[0] * C::kRowBytes, pixels[1], x * C::kPatch, image,
                  y * C::kPatch, rows.channel + 1, ring.full());
      }
#pragma unroll
      for (int i = 0; i < C::kPanels; ++i) {
        copy_tile(ring.stage() + C::kPixelBytes + i * kPanelBytes, maps.grad,
                  work.column_tile * C::kColumns + i * kPanel, image, x, y, ring.full());
      }
      ring.advance();
    }
  }
}

// Where a lane finds its pixels of the first 16 tokens, behind a stage's beginning.
template <typename C>
__device__ __forceinline__ uint32_t first_pixels(int warp) {
  const int lane = lane_index();
  if constexpr (C::kPatch == 16) {
    // Of a row of pixels, 8 images and half a patch for each 8 lanes, swizzled in runs of 64 bytes.
    const int image = lane % 8 + lane / 16 * 8, half = lane / 8 % 2;
    return warp * C::kRowBytes + image * C::kRunBytes + (half ^ (lane / 2 % 4)) * 16;
  } else {
    // A pair of pixels in two neighbouring images. The last of 64 pairs is none.
    const int pair = min(8 * warp + lane / 4, C::kTilePixels / 2 - 1);
    return pair / 7 * C::kRowBytes + pair % 7 * 4 + lane % 4 * 2 * C::kRunBytes;
  }
}

// The operand of the products of 16 tokens: one position in 16 images.
template <typename C>
__device__ __forceinline__ void load_pixels(uint32_t (&a)[4], uint32_t stage, uint32_t first,
                                            int sixteen) {
  if constexpr (C::kPatch == 16) {
    load_transposed(a, stage + (first ^ (sixteen / 2 * 32)) + sixteen % 2 * 16 * C::kRunBytes);
  } else {
    const uint32_t place = stage + first + sixteen * C::kPatch * 2;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t x, y;
      load_shared(place + 8 * i * C::kRunBytes, x);
      load_shared(place + (8 * i + 1) * C::kRunBytes, y);
      a[2 * i] = __byte_perm(x, y, 0x5410);
      a[2 * i + 1] = __byte_perm(x, y, 0x7632);
    }
  }
}

// All products of one warpgroup, and its part of the gradient of the weight.
template <typename C>
__device__ __forceinline__ void multiply(const Job& p, const Work& work, TileRing<C> ring) {
  const uint32_t first = first_pixels<C>(warp_index());
  const uint64_t grads = swizzled_descriptor(ring.stages + C::kPixelBytes, kPanelBytes);
  const int steps = (work.last_group - work.first_group) * p.image_steps;
  float sum[C::kColumns / 2];
  uint32_t pixels[2][4];  // of products that are under way, and of the next
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    barrier_wait(ring.full(), ring.parity);
    const uint32_t slot = ring.slot * C::kStageBytes >> 4;
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      load_pixels<C>(pixels[i % 2], ring.stage(), first, i);
      mma_fence();
      mma<typename C::Token, C::kColumns, true>(
          sum, pixels[i % 2], grads + slot + (i * 16 * kTokenBytes >> 4), step > 0 || i > 0);
      mma_commit();
      mma_wait<1>();
      // Each warp by itself, as each has read pixels.
      if (i == 0 && step > 0 && lane_index() == 0) barrier_arrive(ring.empty_before());
    }
    ring.advance();
  }
  mma_wait<0>();
  keep(sum);
  float4* parts =
      reinterpret_cast<float4*>(p.parts) + int64_t{blockIdx.x} * C::kPartFloats / 4 + threadIdx.x;
#pragma unroll
  for (int i = 0; i < C::kEights; ++i) {
    const float* x = &sum[4 * i];
    parts[i * C::kConsumers] = make_float4(x[0], x[1], x[2], x[3]);
  }
}

// The sums of 8 channels in each lane over the lanes that are 8 apart: two channels for each.
__device__ __forceinline__ float2 share_out(const float (&sum)[8], int lane) {
  float four[4], two[2];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const bool upper = lane & 16;
    four[i] =
        (upper ? sum[i + 4] : sum[i]) + __shfl_xor_sync(kAllLanes, upper ? sum[i] : sum[i + 4], 16);
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const bool upper = lane & 8;
    two[i] = (upper ? four[i + 2] : four[i]) +
             __shfl_xor_sync(kAllLanes, upper ? four[i] : four[i + 2], 8);
  }
  return make_float2(two[0], two[1]);
}

// A warp that adds up half of the tokens of every stage, in 64 channels: 8 to a lane, of every
// fourth token.
template <typename C>
__device__ __forceinline__ void add_up(const Job& p, const Work& work, int adder,
                                       TileRing<C> ring) {
  using Token = typename C::Token;
  constexpr int kOwn = C::kPositions / kAdders;
  const int lane = lane_index();
  const int column = work.column_tile * C::kColumns + work.row_tile * kPanel + lane % 8 * 8 +
                     lane / 16 * 4 + lane / 8 % 2 * 2;
  const uint32_t first = C::kPixelBytes + work.row_tile * kPanelBytes +
                         (adder * (kDepth / kAdders) + lane / 8) * kTokenBytes +
                         (lane % 8 ^ lane / 8) * 16;
  float2 all = make_float2(0, 0);
#pragma unroll 1
  for (int group = work.first_group; group < work.last_group; ++group) {
    float sum[kOwn][8] = {};
#pragma unroll 1
    for (int step = 0; step < p.image_steps; ++step) {
      barrier_wait(ring.full(), ring.parity);
      const uint32_t place = ring.stage() + first;
#pragma unroll
      for (int i = 0; i < kDepth / kAdders / 4; i += 2) {
        uint4 x[2];
#pragma unroll
        for (int j = 0; j < 2; ++j) load_shared((place ^ j * 64) + (i + j) * 4 * kTokenBytes, x[j]);
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float2 pair = widened<Token>((&x[j / 4].x)[j % 4]);
          float* own = sum[i * 4 / C::kImages] + j % 4 * 2;
          own[0] += pair.x;
          own[1] += pair.y;
        }
      }
      __syncwarp();
      if (lane == 0) barrier_arrive(ring.empty());
      ring.advance();
    }
    const int y = p.groups_of_row.divide(group);
    const int x = (group - y * p.groups_of_row.divisor) * C::kPositions + adder * kOwn;
#pragma unroll
    for (int own = 0; own < kOwn; ++own) {
      const float2 total = share_out(sum[own], lane);
      all.x += total.x;
      all.y += total.y;
      if (p.d_pos && x + own < p.grid_x && column < p.dim) {
        auto* pos = static_cast<Token*>(p.d_pos) +
                    (int64_t{y} * p.grid_x + x + own + p.pos_prefix) * p.dim + column;
        *reinterpret_cast<uint32_t*>(pos) = pack<Token>(total.x, total.y);
      }
    }
  }
  if (p.d_bias && column < p.dim) {
    float* share = p.bias_shares + int64_t{work.split * kAdders + adder} * p.dim + column;
    *reinterpret_cast<float2*>(share) = all;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    patch_embed_bwd_kernel(const __grid_constant__ Job p, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char shared[];
  const int warp = warp_index();
  const Work work(p);
  const bool adds_up = work.adds_up<C>(p);
  TileRing<C> ring(shared_address(shared));
  if (threadIdx.x == 0) {
    for (TileRing<C> each = ring; each.parity == 0; each.advance()) {
      barrier_init(each.full(), 1);
      barrier_init(each.empty(), 4 * C::kGroups + (adds_up ? kAdders : 0));
    }
    fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous_grids();
  let_next_grid_start();
  if (warp >= 4 * C::kGroups) {
    shrink_registers<C::kProducerRegisters>();
    const int helper = warp - 4 * C::kGroups;
    if (helper == 0) {
      if (lane_index() == 0) copy_stages<C>(p, work, maps, ring);
    } else if (adds_up && helper <= kAdders) {
      add_up<C>(p, work, helper - 1, ring);
    }
  } else {
    grow_registers<C::kConsumerRegisters>();
    multiply<C>(p, work, ring);
  }
}

}  // namespace bwd
}  // namespace patch_embed
}  // namespace vlmk

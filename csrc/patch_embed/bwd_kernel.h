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
#include "patch_embed/bwd_schedule.h"

namespace vlmk {
namespace patch_embed {
namespace bwd {

// The thread that copies. Each copy takes it some 100 cycles, whatever its size.
template <typename C>
__device__ __forceinline__ void copy_stages(const Job& p, const Maps& maps, TileRing<C>& ring,
                                            const Segment& s) {
  const TileRows<C> rows(s.row_tile);
  const CUtensorMap* pixels = maps.pixels[s.row_tile];
  const uint32_t bytes = (rows.count[0] + rows.count[1]) * C::kRowBytes + C::kPanels * kPanelBytes;
#pragma unroll 1
  for (int group = s.first_group; group < s.last_group; ++group) {
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
                  s.column_tile * C::kColumns + i * kPanel, image, x, y, ring.full());
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

// The products of one warpgroup, and its part of the gradient of the weight.
template <typename C>
__device__ __forceinline__ void multiply(const Job& p, TileRing<C>& ring, const Segment& s) {
  const uint32_t first = first_pixels<C>(warp_index());
  const uint64_t grads = swizzled_descriptor(ring.stages + C::kPixelBytes, kPanelBytes);
  const int steps = (s.last_group - s.first_group) * p.image_steps;
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
  if (lane_index() == 0) barrier_arrive(ring.empty_before());
  keep(sum);
  float4* parts =
      reinterpret_cast<float4*>(p.parts) + int64_t{s.slot} * C::kPartFloats / 4 + threadIdx.x;
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
// fourth token. Of the tiles that read the same gradient, each has 64 channels to add up, or none.
template <typename C>
__device__ __forceinline__ void add_up(const Job& p, TileRing<C>& ring, const Segment& s,
                                       int adder) {
  using Token = typename C::Token;
  constexpr int kOwn = C::kPositions / kAdders;
  const int lane = lane_index();
  const bool adds = s.row_tile < C::kPanels && (p.d_pos || p.d_bias);
  const int own_channels = lane % 8 * 8 + lane / 16 * 4 + lane / 8 % 2 * 2;
  const int column = s.column_tile * C::kColumns + s.row_tile * kPanel + own_channels;
  const uint32_t first = C::kPixelBytes + s.row_tile * kPanelBytes +
                         (adder * (kDepth / kAdders) + lane / 8) * kTokenBytes +
                         (lane % 8 ^ lane / 8) * 16;
  float2 all = make_float2(0, 0);
#pragma unroll 1
  for (int group = s.first_group; group < s.last_group; ++group) {
    float sum[kOwn][8] = {};
#pragma unroll 1
    for (int step = 0; step < p.image_steps; ++step) {
      barrier_wait(ring.full(), ring.parity);
      const uint32_t place = ring.stage() + first;
      if (adds) {
#pragma unroll
        for (int i = 0; i < kDepth / kAdders / 4; i += 2) {
          uint4 x[2];
#pragma unroll
          for (int j = 0; j < 2; ++j) {
            load_shared((place ^ j * 64) + (i + j) * 4 * kTokenBytes, x[j]);
          }
#pragma unroll
          for (int j = 0; j < 8; ++j) {
            const float2 pair = to_floats<Token>((&x[j / 4].x)[j % 4]);
            float* own = sum[i * 4 / C::kImages] + j % 4 * 2;
            own[0] += pair.x;
            own[1] += pair.y;
          }
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
      if (adds && p.d_pos && x + own < p.grid_x && column < p.dim) {
        auto* pos = static_cast<Token*>(p.d_pos) +
                    (int64_t{y} * p.grid_x + x + own + p.pos_prefix) * p.dim + column;
        *reinterpret_cast<uint32_t*>(pos) = pack<Token>(total.x, total.y);
      }
    }
  }
  if (adds && p.d_bias) {
    float* share = p.bias_shares + (int64_t{s.slot} * kAdders + adder) * kPanel + own_channels;
    *reinterpret_cast<float2*>(share) = all;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1)
    patch_embed_bwd_kernel(const __grid_constant__ Job p, const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char shared[];
  const int warp = warp_index();
  TileRing<C> ring(shared_address(shared));
  if (threadIdx.x == 0) {
    for (TileRing<C> each = ring; each.parity == 0; each.advance()) {
      barrier_init(each.full(), 1);
      barrier_init(each.empty(), 4 * C::kGroups + kAdders);
    }
    fence_barrier_init();
  }
  __syncthreads();
  wait_for_previous_grids();
  let_next_grid_start();
  Segments segments(p);
  Segment s;
  if (warp >= 4 * C::kGroups) {
    shrink_registers<C::kProducerRegisters>();
    const int helper = warp - 4 * C::kGroups;
    if (helper == 0 && lane_index() == 0) {
      while (segments.next(s)) copy_stages<C>(p, maps, ring, s);
    } else if (helper > 0 && helper <= kAdders) {
      while (segments.next(s)) add_up<C>(p, ring, s, helper - 1);
    }
  } else {
    grow_registers<C::kConsumerRegisters>();
    while (segments.next(s)) multiply<C>(p, ring, s);
  }
}

}  // namespace bwd
}  // namespace patch_embed
}  // namespace vlmk

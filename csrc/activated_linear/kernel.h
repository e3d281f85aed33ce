// SPDX-License-Identifier: Apache-2.0
// A linear layer and its activation, maybe times a second layer. One thread copies, two warpgroups
// multiply, 64 rows by all columns of a tile each. What they get waits in registers, rounded, and
// is activated and stored during the products of the next tile: only the bias is added between the
// products of two tiles.
#pragma once

#include <cstdint>
#include <type_traits>

#include "activated_linear/config.h"
#include "activated_linear/waiting.h"
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "common/threads.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace activated_linear {

// The thread that copies: this block's rows, and half of the weights for both blocks.
template <typename C>
__device__ __forceinline__ void copy_tiles(const typename C::Params& p, const Schedule& s,
                                           const Maps& maps, uint32_t shared, TileRing<C> ring) {
  const int rank = block_in_cluster();
  const CUtensorMap& weight = C::kGated && rank == 1 ? maps.up : maps.weight;
  int bias_slot = 0;
  int2 waits = make_int2(-1, 0);  // the tile before: its first row here, and its first column
  const auto copy_before = [&](int step) {
    copy_tile(ring.stage() + C::kFactorBytes, maps.before, waits.y + step * kBeforeColumns, waits.x,
              0, 0, ring.full());
  };
#pragma unroll 1
  for (int tile = cluster_index(); tile < s.tiles(); tile += clusters(), bias_slot ^= 1) {
    const int2 place = s.place(tile);
    const int row = place.x * kTile + rank * kRows, column = place.y * C::kOut;
    const int bias_bytes = C::kBiased ? 2 * min(C::kOut, p.dim - column) : 0;
#pragma unroll 1
    for (int step = 0; step < s.steps; ++step) {
      barrier_wait(ring.empty(), ring.parity ^ 1);
      const bool with_before = C::kBeforeBytes && step < C::kEights && waits.x >= 0;
      barrier_expect(ring.full(), C::kFactorBytes + (step == 0 ? bias_bytes : 0) +
                                      (with_before ? C::kBeforeBytes : 0));
      if (with_before) copy_before(step);
      if (C::kBiased && step == 0) {
        copy_from_global(shared + C::kBias + bias_slot * C::kBiasBytes,
                         static_cast<const typename C::Token*>(p.bias) + column, bias_bytes,
                         ring.full());
      }
      copy_tile(ring.stage(), maps.rows, step * kDepth, row, 0, 0, ring.full());
      copy_tile_to_blocks(ring.stage() + kLeftBytes + rank * (C::kColumns / 2) * kRowBytes, weight,
                          step * kDepth, 0, column / 8, C::kGated ? 0 : 2 * rank, ring.full(), 3);
      ring.advance();
    }
    waits = make_int2(row, column);
  }
  if constexpr (C::kBeforeBytes > 0) {
    copy_stages<C::kBeforeBytes>(ring, C::kEights,
                                 [&](uint32_t, uint32_t, int step) { copy_before(step); });
  }
}

// All tiles of one warpgroup.
template <typename C>
__device__ __forceinline__ void multiply_tiles(const typename C::Params& p, const Schedule& s,
                                               uint32_t shared, int group, TileRing<C> ring) {
  const uint64_t left = swizzled_descriptor(ring.stages + group * 64 * kRowBytes, 16);
  const uint64_t right = swizzled_descriptor(ring.stages + kLeftBytes, 16);
  const int thread = group_thread(), lane = lane_index();
  const int own_row =
      static_cast<int>(cluster_rank()) * kRows + group * 64 + thread / 32 * 16 + lane / 4;
  const uint32_t bias = shared + C::kBias + lane % 4 * 16;
  const uint32_t before =
      C::kFactorBytes + (group * 64 + thread / 32 * 16) * kBeforeRowBytes + lane * 16;
  int bias_slot = 0;
  bool ahead = false;  // whether the distance between the warpgroups is there
  float sum[C::kSums];
  std::conditional_t<C::kPass == Pass::kBackward, WaitingGradient<C>, Waiting<C>> waiting;
  const auto finish = [&](int step) {
    if constexpr (C::kPass == Pass::kBackward) {
      waiting.finish(p, step, ring.stage() + before);
      named_wait<128>(kGroupBarrier + group);  // all warps have read it when one lets go
    } else {
      waiting.finish(p, step);
    }
  };
  // The products of a stage, and `meanwhile`.
  const auto multiply = [&](bool first, auto meanwhile) {
    barrier_wait(ring.full(), ring.parity);
    mma_fence();
    const uint32_t slot = ring.slot * C::kStageBytes >> 4;
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      mma<typename C::Token, C::kColumns>(sum, left + slot + 2 * i, right + slot + 2 * i,
                                          !first || i > 0);
    }
    mma_commit();
    meanwhile();
    mma_wait<1>();
    if (!first) release_before(ring);
    ring.advance();
  };
  if (group == 1) named_wait<256>(kAheadBarrier);
#pragma unroll 1
  for (int tile = cluster_index(); tile < s.tiles(); tile += clusters()) {
    const int2 place = s.place(tile);
    const int row = place.x * kTile + own_row;
    const int rows[2] = {row < p.rows ? row : -1, row + 8 < p.rows ? row + 8 : -1};
    const int column = place.y * C::kOut + lane % 4 * 8;
#pragma unroll
    for (int step = 0; step < C::kEights; ++step) {
      multiply(step == 0, [&] {
        stay_behind(p.rows < 0);  // ptxas would have the products wait for activations
        finish(step);
      });
      if (step == kAhead - 1 && !ahead && group == 0) named_arrive<256>(kAheadBarrier);
    }
    ahead = true;
#pragma unroll 1
    for (int step = C::kEights; step < s.steps; ++step) multiply(false, [] {});
    mma_wait<0>();
    release_before(ring);
    keep(sum);
    waiting.take(p, rows, column, sum, bias + bias_slot * C::kBiasBytes);
    if constexpr (C::kPass == Pass::kBackward) {
      waiting.slot = p.sums ? row / VLMK_FEED_FORWARD_SUM_ROWS : -1;
    }
    bias_slot ^= 1;
  }
#pragma unroll
  for (int step = 0; step < C::kEights; ++step) {
    if constexpr (C::kPass == Pass::kBackward) barrier_wait(ring.full(), ring.parity);
    finish(step);
    if constexpr (C::kPass == Pass::kBackward) {
      ring.advance();
      release_before(ring);
    }
  }
}

template <typename C>
__global__ void __launch_bounds__(kThreads, 1)
    activated_linear_fwd_kernel(const __grid_constant__ typename C::Params p,
                                const __grid_constant__ Schedule s,
                                const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char storage[];
  const uint32_t shared = shared_address(storage);
  run<kConsumerRegisters, kProducerRegisters>(
      TileRing<C>(shared),
      [&](const TileRing<C>& ring) { copy_tiles<C>(p, s, maps, shared, ring); },
      [&](const TileRing<C>& ring, int group) { multiply_tiles<C>(p, s, shared, group, ring); },
      [](int) {});
}

}  // namespace activated_linear
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// What the kernels of the contrastive losses are made of: tiles of 256 rows that the two blocks of
// a cluster share, and the ring of stages through which both sides of a product come.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "common/hopper.h"
#include "common/pairs.h"
#include "common/ring.h"
#include "common/tensor_map.h"
#include "common/threads.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace contrastive {

using namespace pairs;

constexpr int kSums = kTile / 2;           // products of each thread
constexpr int kBoxBytes = 64 * kRowBytes;  // 64 rows of 64 columns
constexpr int kConsumerRegisters = 224, kProducerRegisters = 56;

// Named barriers. Of each warpgroup that multiplies: its own, and with the warp that publishes what
// it stored, before and behind that. And for the second warpgroup to wait for the first.
constexpr int kGroupBarrier = 1, kStoredBarrier = kGroupBarrier + kGroups,
              kPublishedBarrier = kStoredBarrier + kGroups,
              kAheadBarrier = kPublishedBarrier + kGroups;

constexpr int kScratchFloats = 4 * kTile + 4;  // of each warpgroup

// What CLIP's backward pass works out first: the gain, what the gradients of features and scale are
// multiplied by in the end, and the least and the greatest of the finite shifted log-sum-exps.
enum Number { kGain, kTimes, kLowest, kHighest };

// The layout of shared memory.
struct Layout {
  static constexpr int kStageBytes = kLeftBytes + kTile * kRowBytes;
  static constexpr int kScratchBytes = kGroups * kScratchFloats * 4;
  static constexpr int kStages = 4;
  static constexpr int kScratch = kStages * kStageBytes;
  static constexpr int kBarriers = kScratch + kScratchBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
  static_assert(kStageBytes % 1024 == 0 && kBarriers % 16 == 0 && kStages > kAhead);
  static_assert(kSharedBytes <= kSharedLimit);
};
using StageRing = TileRing<Layout>;

// Of the features, tiles of rows as the rows of logits, as their columns, and as what a gradient of
// logits is multiplied by; of the panels of those, rows, and columns.
struct Maps {
  CUtensorMap rows_a, columns_b, factor_a, factor_b, panel_rows, panel_columns;
};

// A part of the matrix of all logits.
struct Panel {
  int32_t first_row, first_column;
  int32_t row_tiles, column_tiles;
  int32_t kept_row;  // where the first row is in the panels that are kept, or which launch it is
};

// The products of a tile. Rows along K: 64 of them for each 64 columns, else K along the rows.
template <int kColumns, bool kLeftAlongK, bool kRightAlongK>
__device__ __forceinline__ void multiply(float (&sum)[kColumns / 2], StageRing& ring, int group,
                                         int steps, bool first_tile) {
  constexpr int kLeftStep = kLeftAlongK ? 16 * kRowBytes : 32;
  constexpr int kRightStep = kRightAlongK ? 16 * kRowBytes : 32;
  const uint64_t left = swizzled_descriptor(ring.stages + group * kBoxBytes, 16);
  const uint64_t right = swizzled_descriptor(ring.stages + kLeftBytes, kBoxBytes);
  if (first_tile && group == 1) named_wait<256>(kAheadBarrier);
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    barrier_wait(ring.full(), ring.parity);
    mma_fence();
    const uint32_t slot = ring.slot * Layout::kStageBytes >> 4;
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      mma<__nv_bfloat16, kColumns, kLeftAlongK, kRightAlongK>(
          sum, left + slot + (i * kLeftStep >> 4), right + slot + (i * kRightStep >> 4),
          step > 0 || i > 0);
    }
    mma_commit();
    mma_wait<1>();
    if (step > 0) release_before(ring);
    if (first_tile && group == 0 && step == kAhead - 1) named_arrive<256>(kAheadBarrier);
    ring.advance();
  }
  mma_wait<0>();
  release_before(ring);
  keep(sum);
}

// Stores the sum over a warpgroup's threads.
__device__ __forceinline__ void store_sum(float x, float* scratch, int group, float* sums) {
  const int thread = group_thread();
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  named_wait<128>(kGroupBarrier + group);
  if (thread % 32 == 0) scratch[thread / 32] = x;
  named_wait<128>(kGroupBarrier + group);
  if (thread == 0) {
    sums[static_cast<int>(blockIdx.x) * kGroups + group] =
        (scratch[0] + scratch[1]) + (scratch[2] + scratch[3]);
  }
}

}  // namespace contrastive
}  // namespace vlmk

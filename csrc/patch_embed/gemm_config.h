// SPDX-License-Identifier: Apache-2.0
// What the kernel that multiplies from shared memory is made of: its tiles, and how they are dealt
// out.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/ring.h"
#include "patch_embed/config.h"
#include "patch_embed/gemm.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace gemm {

constexpr int kStep = 16;     // pixels that a product multiplies
constexpr int kMapRows = 16;  // rows of pixels of each patch that a map covers
constexpr int kGroups = 2;    // warpgroups that multiply, 64 patches each
constexpr int kThreads = 128 * (kGroups + 1);
constexpr int kPatches = 64 * kGroups;  // of a tile
constexpr int kStageDepth = 64;  // pixels of each patch in a stage: rows of 16 or of 32, or a run
constexpr int kStageSteps = kStageDepth / kStep;
constexpr int kStagePixelBytes = kPatches * kStageDepth * 2;

// Copies of pixels, a map for 16 rows of each channel, and of weights.
struct Maps {
  CUtensorMap pixels[2 * kChannels];
  CUtensorMap weight;
};

// Block i takes the tiles i, i + blocks, ..., column by column: pixels that come from memory for
// the first columns are in L2 for the others.
struct Schedule {
  int32_t patches;  // of all images
  int32_t tiles;
  int32_t steps;      // stages that a tile takes
  int32_t run_bytes;  // copied as one: a row of a patch or of two neighbours, 64 pixels of a row
  int32_t copies;     // of a stage's pixels: a row of all patches each
  Divisor column_tiles;
  Divisor grid;  // patches of an image
  Divisor grid_x;

  __device__ bool are_rows() const { return copies == 1; }
  __device__ bool in_pairs() const { return copies * run_bytes > kStageDepth * 2; }
};

// kGathered: pixels are brought not by the copy engine but by a warpgroup. See gemm_gather.h.
template <typename Token_, int kColumns_, bool kGathered_, bool kNormed_>
struct Config : TokenType<Token_> {
  static constexpr bool kGathered = kGathered_;
  static constexpr bool kNormed = kNormed_;
  static_assert(!kGathered || !kNormed);
  static constexpr int kColumns = kColumns_;     // of a tile
  static constexpr int kSums = kColumns / 2;     // of each thread
  static constexpr int kEights = kColumns / 32;  // of neighbouring columns, of a thread in each row
  static constexpr int kTotals = kSums;

  // Together no more than a block of this size is launched with: more are waited for without end.
  static constexpr int kConsumerRegisters = kGathered ? 192 : kNormed ? 224 : 232;
  static constexpr int kProducerRegisters = kGathered ? 120 : kNormed ? 56 : 40;
  static_assert(kGroups * kConsumerRegisters + kProducerRegisters <= 3 * 168 && kGroups == 2);

  static constexpr int kPixelBytes = kStagePixelBytes;
  static constexpr int kStageBytes = kPixelBytes + kColumns * kStageDepth * 2;
  static constexpr int kNormBytes =
      kNormed ? kGroups * 2 * kMaxCluster * kTile * 8 + 2 * kColumns * 2 : 0;
  static constexpr int kStages = (kSharedLimit - 1024 - kNormBytes) / kStageBytes;
  static constexpr int kBarriers = kStages * kStageBytes;
  static constexpr int kStatisticsThere = kBarriers + 2 * kStages * 8;  // two for each warpgroup
  static constexpr int kStatistics = (kStatisticsThere + 2 * kGroups * 8 + 127) / 128 * 128;
  static constexpr int kNorm = kStatistics + (kNormed ? kGroups * 2 * kMaxCluster * kTile * 8 : 0);
  static constexpr int kSharedBytes = kNorm + (kNormed ? 2 * kColumns * 2 : 0);
  static_assert(kStageBytes % 1024 == 0 && kStages >= 4);
  static_assert(kDepthStep == kStageDepth && kMinDepth > kEights * kStageDepth);  // see embed_tiles
};

}  // namespace gemm
}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// What the kernel of the gradients of weight, bias and positions is made of: its tiles and stages.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/hopper.h"
#include "common/launch.h"
#include "common/ring.h"
#include "patch_embed/config.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace bwd {

constexpr int kDepth = 64;  // tokens of a stage
constexpr int kPanel = 64;  // channels that lie side by side
constexpr int kTokenBytes = kPanel * 2;
constexpr int kPanelBytes = kDepth * kTokenBytes;
constexpr int kAdders = 2;  // warps that add up positions, half of a stage each

constexpr int kMaxRowTiles = 6;

// Copies of the rows of pixels of each row of tiles, those of one channel and of the next, and of
// the gradient.
struct Maps {
  CUtensorMap pixels[kMaxRowTiles][2];
  CUtensorMap grad;
};

template <typename Token_, int kPatch_, int kColumns_, int kGroups_>
struct Config {
  using Token = Token_;
  static constexpr int kPatch = kPatch_;
  static constexpr int kColumns = kColumns_;  // channels of a tile
  static_assert(kPatch == 14 || kPatch == 16);

  // Warpgroups that multiply, 64 pixels of a patch each. Rows of 14 pixels come in nines, 126 of
  // 588 in a tile.
  static constexpr int kGroups = kGroups_;
  static constexpr int kConsumers = 128 * kGroups;
  static constexpr int kThreads = kConsumers + 128;
  static constexpr int kConsumerRegisters = kGroups == 3 ? 152 : 224;
  static constexpr int kProducerRegisters = 56;
  static constexpr int kTileRows = kPatch == 16 ? 4 * kGroups : 9;
  static constexpr int kTilePixels = kTileRows * kPatch;
  static constexpr int kRowTiles = ceil_div(kChannels * kPatch, kTileRows);
  // Of a thread's sums, so many times four, and what a tile's parts consist of.
  static constexpr int kEights = kColumns / 8;
  static constexpr int kPartFloats = kEights * kConsumers * 4;

  // A run of the copy engine is one row of so many neighbouring patches: whole 16 bytes, and as
  // long as it may be, as the engine takes as long for a short one.
  static constexpr int kPositions = kPatch == 16 ? 2 : 4;
  static constexpr int kRunBytes = kPositions * kPatch * 2;
  static constexpr int kImages = kDepth / kPositions;
  static constexpr int kRowBytes = kImages * kRunBytes;
  static_assert(kTileRows <= kPatch && kRowTiles <= kMaxRowTiles);

  static constexpr int kPanels = kColumns / kPanel;
  static_assert(kPanels <= kRowTiles);  // each is added up by one row of tiles
  static constexpr int kPixelBytes = ceil_div(kTileRows * kRowBytes, 1024) * 1024;
  static constexpr int kStageBytes = kPixelBytes + kPanels * kPanelBytes;
  static constexpr int kStages = (kSharedLimit - 256) / kStageBytes;
  static constexpr int kBarriers = kStages * kStageBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
  static_assert(kStages >= 4 && kSharedBytes <= kSharedLimit);

  // The pixel of a tile whose sums a lane i / 4 = row of a warp has, the first or the second.
  __device__ static int pixel_of(int warp, int row, int second) {
    return kPatch == 16 ? 16 * warp + 8 * second + row : 2 * (8 * warp + row) + second;
  }
};

// The rows of pixels of a row of tiles. Behind the last channel there are none, and what is
// multiplied in their place does not matter.
template <typename C>
struct TileRows {
  int channel, first;
  int count[2];  // in this channel and in the next

  __host__ __device__ explicit TileRows(int row_tile) {
    const int row = row_tile * C::kTileRows;
    channel = row / C::kPatch;
    first = row % C::kPatch;
    const int left = C::kPatch - first;
    count[0] = left < C::kTileRows ? left : C::kTileRows;
    count[1] = channel + 1 < kChannels ? C::kTileRows - count[0] : 0;
  }
};

}  // namespace bwd
}  // namespace patch_embed
}  // namespace vlmk

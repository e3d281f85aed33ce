// SPDX-License-Identifier: Apache-2.0
// What a variant of the kernel for few patches is made of: the tile of a block, the warps that make
// it, and the chunks in which its pixels and weights come.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/launch.h"
#include "patch_embed/config.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace small {

constexpr int kGroups = 2;           // warpgroups that multiply
constexpr int kMaxColumnGroups = 8;  // blocks that hold a row's columns, for a norm
// Warps that copy. With one more there are 16: a block has the registers of the whole SM.
constexpr int kWeightWarps = 4, kPixelWarps = 3;
constexpr int kThreads = 32 * (4 * kGroups + kWeightWarps + kPixelWarps + 1);

// One tile for each block. With a norm, the blocks of a cluster hold all columns of the same
// patches.
struct Schedule {
  int32_t column_groups;  // tiles side by side
  int32_t rows;           // of patches, in all images
  Divisor width;          // of a row, in patches
  Divisor grid_y;         // rows of an image
  Divisor row_pieces;     // 16 bytes each, in a row of pixels
  // Of uint8 pixels less 128: what the pixel lacks that is 0 when normalised, and the scale of the
  // channel before over that of this one.
  float missing[kChannels], rescale[kChannels];
};

template <int kPatch_, int kColumns_, int kGroupsM_, typename Pixel_, typename Token_,
          bool kNormed_>
struct Config : TokenType<Token_> {
  using Pixel = Pixel_;
  static constexpr bool kBytes = std::is_same_v<Pixel, uint8_t>;
  static constexpr bool kNormed = kNormed_;
  static constexpr int kPatch = kPatch_;
  static constexpr int kColumns = kColumns_;  // of the output, in each block
  static_assert(kPatch == 14 || kPatch == 16);

  // The warpgroups each take 64 patches, or they share 64: then each takes its half of every
  // channel. Of uint8, the last two rows are no patches: they are of the constant that the pixels
  // lack, in two parts of 16 bits.
  static constexpr int kGroupsM = kGroupsM_, kGroupsK = kGroups / kGroupsM;
  static constexpr int kRows = 64 * kGroupsM;
  static constexpr int kPatches = kRows - (kBytes ? 2 : 0);
  static constexpr int kUnits = 2 / kGroupsK;   // of a thread's two rows, those that it finishes
  static constexpr int kFours = kColumns / 16;  // of neighbouring columns, of a thread in each row
  // Of tiles of 128 x 128, positions are loaded behind the products: there are no registers before.
  static constexpr bool kPositionsLast = kUnits * kFours > 12;
  static constexpr int kProduct = kColumns == 96 ? 48 : kColumns == 128 ? 64 : kColumns;
  static constexpr int kProducts = kColumns / kProduct;  // side by side

  // A chunk is half the rows of pixels of a channel, 8 or less, and the weights for them.
  static constexpr int kChunkRows = 8;
  static constexpr int kChunks = 2 * kChannels;
  static constexpr int kSteps = kChunkRows * kPatch / 16;

  // Bytes. A row of pixels has room for segments that don't begin and end at multiples of 16.
  static constexpr int kRowBytes = kPatch * static_cast<int>(sizeof(Pixel));
  static constexpr int kPadding = kPatch == 14 ? 2 * kRows : 0;
  static constexpr int kRoom = kPatches * kRowBytes + kPadding;
  static constexpr int kPitch = ceil_div(kRoom, 128) * 128;
  static constexpr int kWeightRow = kChannels * kPatch * kPatch * 2;
  // The weights of a column, 256 bytes or 224, are rows of two swizzled panels: what comes in one
  // piece from L2 is then written in one piece.
  static constexpr int kPanelBytes = kColumns * 128;
  static constexpr int kWeights = kChunkRows * kPitch;
  static constexpr int kSlotBytes = kWeights + 2 * kPanelBytes;
  static_assert(kWeights % 1024 == 0 && kPanelBytes % 1024 == 0 && kProduct % 8 == 0);

  // Shared memory: barriers, vectors of the block's columns, statistics of the blocks, the ring.
  // The vectors are bias, norm weight and norm bias, and of uint8, the constant, a part for each of
  // the warpgroups that share patches.
  static constexpr int kFull = 0, kEmpty = 8 * kChunks, kVectorsThere = 16 * kChunks;
  static constexpr int kStatisticsThere = kVectorsThere + 8;
  static constexpr int kVectors = 128, kConstants = kVectors + 3 * kColumns * 4;
  static constexpr int kStatistics = kConstants + kGroupsK * kColumns * 4;
  static constexpr int kStatisticsBytes = kNormed ? kMaxColumnGroups * kRows * 8 : 0;
  static constexpr int kRing = ceil_div(kStatistics + kStatisticsBytes, 1024) * 1024;
  static_assert(kStatisticsThere + 8 <= kVectors && kStatistics % 16 == 0);
  // Sums of warpgroups that share patches change hands where the ring was.
  static_assert(kGroupsK == 1 || 2 * kSlotBytes >= kRows * kColumns * 4);
  // As many as there are chunks, if they fit.
  static constexpr int kFitting = (kSharedLimit - kRing) / kSlotBytes;
  static constexpr int kSlots = kFitting < kChunks ? kFitting : kChunks;
  static_assert(kSlots >= 2);

  static constexpr int kSharedBytes = kRing + kSlots * kSlotBytes;

  // The patch of row 8 h + i of a warp's 16. With 28 bytes to a row of pixels, patches 4 apart are
  // read together: their words lie in different banks.
  __device__ static int patch_of(int warp, int h, int i) {
    if constexpr (kRowBytes == 28) return warp / 2 * 32 + 4 * i + warp % 2 * 2 + h;
    return 16 * warp + 8 * h + i;
  }

  __device__ static float2 to_floats(uint32_t bits) {
    return TokenType<Token_>::to_floats(TokenType<Token_>::from_bits(bits));
  }
};

// The ring of chunks: the next one's slot, and how often the ring has been gone through.
template <typename C>
struct Ring {
  uint32_t barriers, slots;  // addresses
  int slot = 0, round = 0;

  __device__ __forceinline__ explicit Ring(uint32_t shared)
      : barriers(shared), slots(shared + C::kRing) {}
  __device__ uint32_t place() const { return slots + slot * C::kSlotBytes; }
  __device__ uint32_t full() const { return barriers + C::kFull + 8 * slot; }
  __device__ uint32_t empty() const { return barriers + C::kEmpty + 8 * slot; }
  __device__ __forceinline__ void advance() {
    const bool last = slot + 1 == C::kSlots;
    slot = last ? 0 : slot + 1;
    round += last;
  }
};

}  // namespace small
}  // namespace patch_embed
}  // namespace vlmk

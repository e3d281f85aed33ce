// SPDX-License-Identifier: Apache-2.0
// Pixels on their way to shared memory, one row of pixels of a whole tile after another, as they
// lie in memory: patches are told apart only where operands are read.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/hopper.h"
#include "common/launch.h"
#include "patch_embed/config.h"
#include "patch_embed/tiles.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {

// Where the rows of pixels of a patch begin, in bytes behind its first.
template <typename C>
__device__ __forceinline__ void tabulate_rows(const VlmkPatchEmbedParams& p, int64_t* rows) {
  const int row = static_cast<int>(threadIdx.x);
  if (row >= C::kRows) return;
  rows[row] = (row / C::kPatch * p.pixel_stride_c + row % C::kPatch * p.pixel_stride_y) *
              static_cast<int>(sizeof(typename C::Pixel));
}

// A warp's share of what one warpgroup multiplies: both halves of each slot, or the one of its own.
// It copies 16 bytes at a time, the same places of every row of pixels.
template <typename C>
__device__ void copy_pixels(const VlmkPatchEmbedParams& p, const Schedule& s, int group, int feeder,
                            uint32_t pixels, const int64_t* rows, Barriers barriers) {
  constexpr int kPieces = ceil_div(C::kRoom / 16, 32);
  constexpr int kWhole = C::kRows / (2 * kStageRows) * 2 * kStageRows;  // rows in whole slots
  const int lane = lane_index();
  const int worker = static_cast<int>(blockIdx.x) / s.cluster / s.column_groups;
  Ring<C> ring(1);
  for (int tile = worker + group * s.clusters; tile < s.tiles; tile += C::kGroups * s.clusters) {
    const Tile t = tile_at<C>(s, tile);
    const int last_begin = (t.first_row + t.segments - 1) * s.width.divisor;
    const int last_bytes = round_up_16((t.last_patch - last_begin + 1) * C::kRowBytes);
    const int bytes = t.segments == 1 ? t.first_bytes
                                      : t.first_bytes + (t.segments - 2) * t.row_bytes + last_bytes;
    const char* sources[kPieces];
    bool copied[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int place = (lane + 32 * i) * 16;
      int row = t.first_row, inside = place - t.shift + t.first_x * C::kRowBytes, behind = place;
      int segment_bytes = t.first_bytes;
      while (behind >= segment_bytes && behind < bytes) {
        behind -= segment_bytes, inside = behind, segment_bytes = t.row_bytes, ++row;
      }
      // What rows have been widened by is not there.
      copied[i] = place < bytes && inside < round_up_16(p.grid_x * C::kRowBytes);
      const int b = s.grid_y.divide(row), gy = row - b * s.grid_y.divisor;
      sources[i] = static_cast<const char*>(p.pixels) + inside +
                   (b * p.pixel_stride_b + gy * p.pixel_stride_gy) *
                       static_cast<int>(sizeof(typename C::Pixel));
      asm volatile("" : "+l"(sources[i]));  // nvcc would add it up for every copy
    }
    const auto copy_rows = [&](int first, int half, auto count) {
      constexpr int kCount = decltype(count)::value;
      if (C::kFeeders == 2 && half != feeder) return;
      const uint32_t stage = pixels + ring.slot * C::kSlotBytes + half * C::kStageBytes + lane * 16;
      int64_t offsets[kStageRows];
#pragma unroll
      for (int j = 0; j < kCount; ++j) offsets[j] = rows[first + half * kStageRows + j];
      barrier_wait(barriers.empty(ring.slot, half / C::kFeeders), ring.parity);
#pragma unroll
      for (int j = 0; j < kCount; ++j) {
#pragma unroll
        for (int i = 0; i < kPieces; ++i) {
          if (copied[i]) copy_async(stage + j * C::kPitch + i * 512, sources[i] + offsets[j]);
        }
      }
      barrier_arrive_after_copies(barriers.full(ring.slot, half / C::kFeeders));
    };
    using Stage = std::integral_constant<int, kStageRows>;
#pragma unroll 1
    for (int first = 0; first < kWhole; first += 2 * kStageRows) {
      copy_rows(first, 0, Stage());
      copy_rows(first, 1, Stage());
      ring.advance();
    }
    if constexpr (C::kRows > kWhole) {
      copy_rows(kWhole, 0, std::integral_constant<int, C::kRows - kWhole>());
      copy_rows(kWhole, 1, std::integral_constant<int, 0>());
      ring.advance();
    }
  }
}

}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// Pixels and weights on their way to shared memory, as they lie in memory, 16 bytes at a time.
#pragma once

#include <cstdint>

#include "common/hopper.h"
#include "patch_embed/small_config.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace small {

// The patches of a tile, in the order of memory: segments, each the patches of one row of one
// image's grid.
template <typename C>
struct Tile {
  int first_patch, last_patch;
  int first_row, first_x;
  int shift;        // bytes from the first segment's begin to the first patch
  int first_bytes;  // of the first segment

  __device__ __forceinline__ Tile(const Schedule& s, int tile) {
    const int width = s.width.divisor;
    first_patch = tile * C::kPatches;
    last_patch = min(first_patch + C::kPatches, s.rows * width) - 1;
    first_row = s.width.divide(first_patch);
    first_x = first_patch - first_row * width;
    shift = (first_x * C::kRowBytes) & 15;
    first_bytes = round_up_16(shift + (width - first_x) * C::kRowBytes);
  }

  // Where in a row of pixels of a slot those of a patch begin. Patches behind the last one are not
  // there; they are taken as the last.
  __device__ __forceinline__ int offset(const Schedule& s, int patch) const {
    patch = min(patch, last_patch);
    const int row = s.width.divide(patch), x = patch - row * s.width.divisor;
    const int behind = row - first_row - 1;
    return behind < 0 ? shift + (x - first_x) * C::kRowBytes
                      : first_bytes + behind * s.row_pieces.divisor * 16 + x * C::kRowBytes;
  }
};

// Copies every chunk, as copy(chunk, place) does it.
template <typename C, typename Copy>
__device__ __forceinline__ void copy_chunks(Ring<C> ring, const Copy& copy) {
#pragma unroll 1
  for (int chunk = 0; chunk < C::kChunks; ++chunk) {
    if (ring.round > 0) barrier_wait(ring.empty(), (ring.round - 1) & 1);
    copy(chunk, ring.place());
    barrier_arrive_after_copies(ring.full());
    ring.advance();
  }
}

// The weights that a thread copies of every chunk: of some columns, 8 bytes of 28 or, of 16 pixels,
// 16 bytes of 16. Columns are dealt out so that a thread's sums are of four neighbours in every 16.
template <typename C>
struct WeightCopies {
  static constexpr int kPieceBytes = C::kPatch == 14 ? 8 : 16;
  static constexpr int kPieces = C::kPatch == 14 ? 32 : 16;     // threads for a column
  static constexpr int kColumns = 32 * kWeightWarps / kPieces;  // that are copied at once
  const char* source;
  int piece, first, columns;  // the thread's first column, and those from there on

  __device__ __forceinline__ WeightCopies(const VlmkPatchEmbedParams& p, int first_column,
                                          int thread)
      : piece(thread % kPieces), first(thread / kPieces) {
    source = static_cast<const char*>(p.weight) + piece * kPieceBytes +
             int64_t{first_column + first} * C::kWeightRow;
    columns = p.dim - first_column - first;
  }

  __device__ __forceinline__ void copy(int chunk, uint32_t slot) const {
    const int first_y = chunk / 2 * C::kPatch + chunk % 2 * C::kChunkRows;
    const char* from = source + first_y * C::kPatch * 2;
    const int bytes = piece * kPieceBytes;
    const uint32_t to = slot + C::kWeights + bytes / 128 * C::kPanelBytes + bytes % 16;
    // Of 14 rows, the second half are 6: 21 pieces. The products take 24, the last of which are 0.
    const int there = C::kPatch == 16 ? 16 : chunk % 2 == 0 ? 28 : 21;
    if (C::kPatch == 14 && piece >= 28) return;
#pragma unroll
    for (int i = 0; i < C::kColumns; i += kColumns) {
      const int n = first | i;
      const int column = (n & ~15) | (n & 2) << 2 | (n >> 1 & 6) | (n & 1);
      const uint32_t place = to + column * 128 + ((bytes / 16 ^ column) & 7) * 16;
      if (i >= columns) break;
      if constexpr (C::kPatch == 14) {
        copy_async_8(place, from + i * C::kWeightRow, piece < there);
      } else {
        copy_async(place, from + i * C::kWeightRow);
      }
    }
  }
};

// The pixels that a thread copies of every chunk: the same places of some rows.
template <typename C>
struct PixelCopies {
  static constexpr int kSize = static_cast<int>(sizeof(typename C::Pixel));
  static constexpr int kPieces = ceil_div(C::kRoom, 512);
  const char* sources[kPieces];
  bool copied[kPieces];
  int first_row;

  __device__ __forceinline__ PixelCopies(const VlmkPatchEmbedParams& p, const Schedule& s,
                                         const Tile<C>& t, int warp)
      : first_row(warp) {
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int place = (lane_index() + 32 * i) * 16;
      int row = t.first_row, inside = place - t.shift + t.first_x * C::kRowBytes;
      if (place >= t.first_bytes) {
        const int piece = (place - t.first_bytes) / 16;
        const int behind = s.row_pieces.divide(piece);
        row += 1 + behind, inside = (piece - behind * s.row_pieces.divisor) * 16;
      }
      copied[i] = row < s.rows && place < C::kRoom;
      const int b = s.grid_y.divide(row), gy = row - b * s.grid_y.divisor;
      sources[i] = static_cast<const char*>(p.pixels) + inside +
                   (b * p.pixel_stride_b + gy * p.pixel_stride_gy) * kSize;
    }
  }

  __device__ __forceinline__ void copy(const VlmkPatchEmbedParams& p, int chunk,
                                       uint32_t slot) const {
    const int first_y = chunk % 2 * C::kChunkRows + first_row;
    const int64_t step = kPixelWarps * p.pixel_stride_y * kSize;
    int64_t offset = (chunk / 2 * p.pixel_stride_c + first_y * p.pixel_stride_y) * kSize;
    slot += first_row * C::kPitch + lane_index() * 16;
#pragma unroll
    for (int j = 0; j < C::kChunkRows; j += kPixelWarps) {
      if (first_row + j >= C::kChunkRows || first_y + j >= C::kPatch) break;
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        if (copied[i]) copy_async(slot + j * C::kPitch + i * 512, sources[i] + offset);
      }
      offset += step;
    }
  }
};

}  // namespace small
}  // namespace patch_embed
}  // namespace vlmk

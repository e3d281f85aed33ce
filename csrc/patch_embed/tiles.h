// SPDX-License-Identifier: Apache-2.0
// What the warps of a block agree on: which patches a tile is made of and how their pixels lie in a
// slot, where their tokens go, and the rings of slots and barriers by which pixels are handed over.
#pragma once

#include <cstdint>

#include "patch_embed/config.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {

// A tile of 64 patches in the order of memory: segments, each the patches of one row of one image's
// grid.
struct Tile {
  int first_patch, last_patch;  // the first and the last one there is
  int first_row, segments;      // rows of patches, counted through all images
  int first_x;                  // of the first segment; the others begin at the image's edge
  int shift;                    // bytes from the copied segment's begin to its first patch
  int first_bytes, row_bytes;   // copied for the first segment, and for a whole row of patches
};

template <typename C>
__device__ __forceinline__ Tile tile_at(const Schedule& s, int tile) {
  const int width = s.width.divisor;
  Tile t;
  t.first_patch = tile * kTile;
  t.last_patch = min(t.first_patch + kTile, s.rows * width) - 1;
  t.first_row = s.width.divide(t.first_patch);
  t.first_x = t.first_patch - t.first_row * width;
  t.segments = s.width.divide(t.last_patch) - t.first_row + 1;
  t.shift = (t.first_x * C::kRowBytes) & 15;
  const int in_first = min(width - t.first_x, t.last_patch - t.first_patch + 1);
  t.first_bytes = round_up_16(t.shift + in_first * C::kRowBytes);
  t.row_bytes = round_up_16(width * C::kRowBytes);
  return t;
}

// Where the tokens of a patch go and its position comes from.
struct Place {
  bool there;
  int image, patch;

  __device__ __forceinline__ Place(const VlmkPatchEmbedParams& p, const Schedule& s, int counted) {
    const int row = s.width.divide(counted), x = counted - row * s.width.divisor;
    image = s.grid_y.divide(row);
    patch = (row - image * s.grid_y.divisor) * p.grid_x + x;
    there = row < s.rows && x < p.grid_x;
  }
};

// The barriers of one warpgroup: pixels are in half a slot of its ring, or no longer needed there
// (the first half's stand for the whole slot where it is multiplied at once); the other blocks'
// statistics are here; it is this warpgroup's turn.
struct Barriers {
  uint32_t base;
  __device__ uint32_t full(int slot, int half) const { return base + (2 * slot + half) * 16; }
  __device__ uint32_t empty(int slot, int half) const { return full(slot, half) + 8; }
  __device__ uint32_t statistics(int set) const { return base + (4 * kMaxSlots + set) * 8; }
  __device__ uint32_t turn() const { return statistics(2); }
};

// The next slot of a ring, and the parity of the wait for it.
template <typename C>
struct Ring {
  int slot = 0;
  uint32_t parity;
  __device__ explicit Ring(uint32_t first_parity) : parity(first_parity) {}
  __device__ __forceinline__ void advance() {
    const bool last = slot + 1 == C::kSlots;
    slot = last ? 0 : slot + 1;
    parity ^= last;
  }
};

}  // namespace patch_embed
}  // namespace vlmk

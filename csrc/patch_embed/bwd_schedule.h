// SPDX-License-Identifier: Apache-2.0
// How the products of the weight's gradient are dealt out to blocks, and where their parts lie.
#pragma once

#include <cstdint>

#include "patch_embed/bwd_config.h"

namespace vlmk {
namespace patch_embed {
namespace bwd {

// A vector of dim channels in so many shares of fp32, to be added up.
struct Shares {
  const float* first;
  int32_t count;
  int32_t stride;
  void* result;
};

// A split of the tokens is some positions in all images, so that what a position's gradient sums
// over comes to one block. Block i has tile i % tiles: those of a split, which read the same, run
// side by side and find it in L2. Where that leaves multiprocessors over, the last positions are
// no split's: the rests of all tiles, one after another, are cut evenly for so many blocks more.
// With a norm, `grad` is what it has become behind that.
struct Job : VlmkPatchEmbedBwdParams {
  int32_t splits;
  int32_t groups;  // of positions that are copied together, of a split
  int32_t longer;  // splits that have one more: the first
  int32_t rest;    // groups of each tile that are left
  int32_t rest_of_block;
  int32_t image_steps;
  int32_t k;  // columns of the weight
  Divisor column_tiles;
  Divisor tiles;
  Divisor groups_of_row;
  float* parts;         // [slots, kEights, kConsumers, 4]: of the weight's gradient
  float* bias_shares;   // [slots, kAdders, kPanel]
  int32_t prefix_sums;  // prefix tokens whose gradient is asked for: all or none
  int32_t num_vectors;
  Shares vectors[2];  // the norm's parameters
};

// What a block works on at a time. No two have the same slot.
struct Segment {
  int row_tile, column_tile;
  int first_group, last_group;  // the last one is not its
  int slot;
};

// Those of a block.
class Segments {
 public:
  __device__ __forceinline__ explicit Segments(const Job& job)
      : p(job), rest(static_cast<int>(blockIdx.x) - p.splits * p.tiles.divisor) {
    unit = rest < 0 ? 0 : rest * p.rest_of_block;
    end = rest < 0 ? 1 : min(unit + p.rest_of_block, p.tiles.divisor * p.rest);
  }

  __device__ __forceinline__ bool next(Segment& s) {
    if (unit >= end) return false;
    int tile;
    if (rest < 0) {
      const int block = static_cast<int>(blockIdx.x), split = p.tiles.divide(block);
      tile = block - split * p.tiles.divisor;
      s.first_group = split * p.groups + min(split, p.longer);
      s.last_group = s.first_group + p.groups + (split < p.longer);
      s.slot = block;
      unit = end;
    } else {
      tile = unit / p.rest;
      const int first = unit - tile * p.rest, count = min(p.rest - first, end - unit);
      s.first_group = p.splits * p.groups + p.longer + first;
      s.last_group = s.first_group + count;
      s.slot = p.splits * p.tiles.divisor + rest + tile;
      unit += count;
    }
    s.row_tile = p.column_tiles.divide(tile);
    s.column_tile = tile - s.row_tile * p.column_tiles.divisor;
    return true;
  }

 private:
  const Job& p;
  int rest;       // which of the blocks that have rests; negative for those that have none
  int unit, end;  // of its rests
};

// Calls f(slot) for all parts of a tile, always in the same order.
template <typename F>
__device__ __forceinline__ void for_slots(const Job& p, int tile, const F& f) {
#pragma unroll 4
  for (int split = 0; split < p.splits; ++split) f(split * p.tiles.divisor + tile);
  if (p.rest == 0) return;
  const int last = ((tile + 1) * p.rest - 1) / p.rest_of_block;
  for (int block = tile * p.rest / p.rest_of_block; block <= last; ++block) {
    f(p.splits * p.tiles.divisor + block + tile);
  }
}

}  // namespace bwd
}  // namespace patch_embed
}  // namespace vlmk

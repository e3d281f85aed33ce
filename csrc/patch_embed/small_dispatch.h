// SPDX-License-Identifier: Apache-2.0
// Whether the kernel for few patches takes them, and by which tiles.
#pragma once

#include <algorithm>

#include "common/launch.h"
#include "patch_embed/small.h"
#include "patch_embed/small_kernel.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace small {

// Launches this variant if the GPU holds all its blocks at once and rows of pixels have the room.
template <typename C>
int embed_at_once(const VlmkPatchEmbedParams& p, void* stream, bool& done) {
  const int groups = ceil_div(p.dim, C::kColumns), rows = p.batch * p.grid_y;
  const int tiles = ceil_div(rows * p.grid_x, C::kPatches);
  const int row_bytes = p.grid_x * C::kRowBytes, pieces = ceil_div(row_bytes, 16);
  const int segments = 1 + ceil_div(C::kPatches - 1, p.grid_x);
  if (C::kPatch == 14 && 15 + segments * (pieces * 16 - row_bytes) > C::kPadding) return 0;
  // The statistics of a row come from one cluster, with no column outside the row. A block that is
  // alone would send them to itself, where memcheck sees no cluster and ends the process.
  if (C::kNormed && (p.dim % C::kColumns || groups == 1 || groups > kMaxColumnGroups)) return 0;
  const int cluster = C::kNormed ? groups : 1;
  int most = 0, processors = 0;
  int code = active_clusters<patch_embed_small_kernel<C>, kThreads, C::kSharedBytes>(cluster, most);
  if (code) return code;
  code = multiprocessors<patch_embed_small_kernel<C>, C::kSharedBytes>(processors);
  if (code) return code;
  if (int64_t{groups / cluster} * tiles > std::min(most, processors / cluster)) return 0;
  done = true;
  Schedule s{groups, rows, Divisor(p.grid_x), Divisor(p.grid_y), Divisor(pieces), {}, {}};
  if constexpr (C::kBytes) {
    for (int c = 0; c < kChannels; ++c) {
      s.missing[c] = 128.0f + p.pixel_shift[c] / p.pixel_scale[c];
      s.rescale[c] = p.pixel_scale[std::max(c - 1, 0)] / p.pixel_scale[c];
    }
  }
  const LaunchConfig config(dim3(groups, tiles), dim3(kThreads), cluster, C::kSharedBytes, stream,
                            true);
  return launch("patch_embed_small_kernel", patch_embed_small_kernel<C>, config, p, s);
}

// The first variant that takes it.
template <typename... Variants>
int embed_by_first(const VlmkPatchEmbedParams& p, void* stream, bool& done) {
  int code = 0;
  ((code = code || done ? code : embed_at_once<Variants>(p, stream, done)), ...);
  return code;
}

// The smaller the tile, the more blocks share the work.
template <int kPatch, typename Pixel, typename Token, bool kNormed>
int embed(const VlmkPatchEmbedParams& p, void* stream, bool& done) {
  using Tile64x48 = Config<kPatch, 48, 1, Pixel, Token, kNormed>;
  using Tile64x64 = Config<kPatch, 64, 1, Pixel, Token, kNormed>;
  using Tile64x96 = Config<kPatch, 96, 1, Pixel, Token, kNormed>;
  using Tile64x128 = Config<kPatch, 128, 1, Pixel, Token, kNormed>;
  using Tile128x96 = Config<kPatch, 96, 2, Pixel, Token, kNormed>;
  using Tile128x128 = Config<kPatch, 128, 2, Pixel, Token, kNormed>;
  if constexpr (kNormed) {
    return embed_by_first<Tile64x96, Tile64x128, Tile128x96, Tile128x128>(p, stream, done);
  } else {
    return embed_by_first<Tile64x48, Tile64x64, Tile64x96, Tile64x128, Tile128x96, Tile128x128>(
        p, stream, done);
  }
}

template <typename Pixel, typename Token>
int embed(const VlmkPatchEmbedParams& p, void* stream, bool& done) {
  if (p.patch == 14) {
    return p.norm_weight ? embed<14, Pixel, Token, true>(p, stream, done)
                         : embed<14, Pixel, Token, false>(p, stream, done);
  }
  return p.norm_weight ? embed<16, Pixel, Token, true>(p, stream, done)
                       : embed<16, Pixel, Token, false>(p, stream, done);
}

}  // namespace small
}  // namespace patch_embed
}  // namespace vlmk

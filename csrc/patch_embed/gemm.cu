// SPDX-License-Identifier: Apache-2.0
// Which variant of the kernel runs, how tiles are dealt out, and where the copy engine finds them.
#include <algorithm>

#include "common/launch.h"
#include "common/tensor_map.h"
#include "patch_embed/gemm.h"
#include "patch_embed/gemm_kernel.h"

namespace vlmk {
namespace patch_embed {
namespace gemm {

int depth_of(const VlmkPatchEmbedParams& p) {
  return p.patch ? kChannels * kPatch * kPatch : p.depth;
}

// Rows are images of one patch in a row, whose pixels are copied 64 at a time.
int encode_maps(Maps& maps, const VlmkPatchEmbedParams& p, int run, int columns) {
  const bool half = p.token_type == VLMK_FLOAT16, rows = p.patch == 0;
  const auto size = [](int64_t count) { return static_cast<cuuint64_t>(count); };
  // Where there is one of something, its stride does not matter.
  const auto bytes = [](int count, int64_t stride) {
    return static_cast<cuuint64_t>(count > 1 ? 2 * stride : 16);
  };
  const int neighbours = rows ? 1 : run / kPatch;
  for (int c = 0; c < (rows ? 1 : kChannels); ++c) {
    const int code = encode_gathering(
        maps.pixels[c], static_cast<const uint16_t*>(p.pixels) + c * p.pixel_stride_c, half,
        {size(rows ? p.depth : run), size(p.grid_x / neighbours), size(p.grid_y),
         size(rows ? 1 : kPatch), size(p.batch)},
        {size(2 * run), bytes(p.grid_y, p.pixel_stride_gy),
         bytes(rows ? 1 : kPatch, p.pixel_stride_y), bytes(p.batch, p.pixel_stride_b)},
        run, kPatches / neighbours);
    if (code) return code;
  }
  // Column 32 g + 8 q + 2 u + e becomes row (columns / 4) u + 8 g + 2 q + e of a tile: of a
  // product's sums, a thread is given two of every eight rows, and so 8 neighbouring columns.
  const cuuint64_t column = 2 * depth_of(p);
  return encode_tiles(maps.weight, p.weight, half, {column / 2, 2, size(p.dim / 8), 4},
                      {column, 8 * column, 2 * column},
                      {kStageDepth, 2, static_cast<cuuint32_t>(columns / 8), 4});
}

template <typename C>
int run(const VlmkPatchEmbedParams& p, const Schedule& s, int blocks, void* stream) {
  Maps maps;
  const int code = encode_maps(maps, p, s.run_bytes / 2, C::kColumns);
  if (code) return code;
  return launch("patch_embed_gemm_kernel", patch_embed_gemm_kernel<C>, dim3(blocks), dim3(kThreads),
                C::kSharedBytes, stream, p, s, maps);
}

// With 192 or 256 columns in a tile, whichever is done first.
template <typename Token>
int embed_tokens(const VlmkPatchEmbedParams& p, void* stream) {
  using Narrow = Config<Token, 192>;
  using Wide = Config<Token, 256>;
  int processors = 0;
  int code = multiprocessors<patch_embed_gemm_kernel<Narrow>, Narrow::kSharedBytes>(processors);
  if (code) return code;
  code = multiprocessors<patch_embed_gemm_kernel<Wide>, Wide::kSharedBytes>(processors);
  if (code) return code;
  const int patches = p.batch * p.grid_y * p.grid_x, row_tiles = ceil_div(patches, kPatches);
  const int run_length = p.patch == 0 ? kStageDepth : p.grid_x % 2 ? kPatch : 2 * kPatch;
  const auto tiles = [&](int columns) { return row_tiles * ceil_div(p.dim, columns); };
  // A tile costs more than its columns: copies of its pixels, which take twice as long where they
  // are of one patch, and its end. As long as so many more columns (H100):
  const int more = run_length == kPatch ? 160 : 48;
  const auto cost = [&](int columns) {
    return int64_t{ceil_div(tiles(columns), processors)} * (columns + more);
  };
  const bool wide = cost(Wide::kColumns) <= cost(Narrow::kColumns);
  const int columns = wide ? Wide::kColumns : Narrow::kColumns;
  const Schedule s{patches,
                   tiles(columns),
                   ceil_div(depth_of(p), kStageDepth),
                   2 * run_length,
                   Divisor(ceil_div(p.dim, columns)),
                   Divisor(p.grid_y * p.grid_x),
                   Divisor(p.grid_x)};
  const int blocks = std::min(s.tiles, processors);
  return wide ? run<Wide>(p, s, blocks, stream) : run<Narrow>(p, s, blocks, stream);
}

int embed(const VlmkPatchEmbedParams& p, void* stream) {
  return p.token_type == VLMK_FLOAT16 ? embed_tokens<__half>(p, stream)
                                      : embed_tokens<__nv_bfloat16>(p, stream);
}

}  // namespace gemm
}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// Which variant of the kernel runs, how tiles are dealt out, and where the copy engine finds them.
#include <algorithm>
#include <climits>

#include "common/launch.h"
#include "common/tensor_map.h"
#include "patch_embed/gemm.h"
#include "patch_embed/gemm_kernel.h"
#include "patch_embed/gemm_weights.h"

namespace vlmk {
namespace patch_embed {
namespace gemm {

bool takes(const VlmkPatchEmbedParams& p) {
  const bool wide = p.dim % 256 == 0 && p.dim / 256 <= kMaxCluster;
  const bool narrow = p.dim % 192 == 0 && p.dim / 192 <= kMaxCluster;
  return (p.patch == 16 || p.patch == 32) && (!p.norm_weight || wide || narrow);
}

int depth_of(const VlmkPatchEmbedParams& p) {
  return p.patch ? kChannels * p.patch * p.patch : p.depth;
}

// Rows are images of one patch in a row, whose pixels are copied 64 at a time. Patches of 32 rows
// have two maps for each channel: the engine's window is no deeper than 16.
int encode_pixels(Maps& maps, const VlmkPatchEmbedParams& p, int run) {
  const bool half = p.token_type == VLMK_FLOAT16, rows = p.patch == 0;
  const auto size = [](int64_t count) { return static_cast<cuuint64_t>(count); };
  // Where there is one of something, its stride does not matter.
  const auto bytes = [](int count, int64_t stride) {
    return static_cast<cuuint64_t>(count > 1 ? 2 * stride : 16);
  };
  const int neighbours = rows ? 1 : run / p.patch, parts = rows ? 1 : p.patch / kMapRows;
  for (int i = 0; i < (rows ? 1 : kChannels * parts); ++i) {
    const int64_t first = i / parts * p.pixel_stride_c + i % parts * (kMapRows * p.pixel_stride_y);
    const int code = encode_gathering(
        maps.pixels[i], static_cast<const uint16_t*>(p.pixels) + first, half,
        {size(rows ? p.depth : run), size(p.grid_x / neighbours), size(p.grid_y),
         size(rows ? 1 : kMapRows), size(p.batch)},
        {size(2 * run), bytes(p.grid_y, p.pixel_stride_gy),
         bytes(rows ? 1 : kMapRows, p.pixel_stride_y), bytes(p.batch, p.pixel_stride_b)},
        run, kPatches / neighbours);
    if (code) return code;
  }
  return 0;
}

int encode_weight(Maps& maps, const VlmkPatchEmbedParams& p, const void* weight, int depth,
                  int columns) {
  // Column 32 g + 8 q + 2 u + e becomes row (columns / 4) u + 8 g + 2 q + e of a tile: of a
  // product's sums, a thread is given two of every eight rows, and so 8 neighbouring columns.
  const cuuint64_t column = 2 * depth;
  return encode_tiles(maps.weight, weight, p.token_type == VLMK_FLOAT16,
                      {column / 2, 2, static_cast<cuuint64_t>(p.dim / 8), 4},
                      {column, 8 * column, 2 * column},
                      {kStageDepth, 2, static_cast<cuuint32_t>(columns / 8), 4});
}

struct Plan {
  int64_t cost;  // in columns times tiles of the busiest block
  int columns, column_tiles, blocks;
};

// Makes this variant's plan the plan, if it fits and costs less.
template <typename C>
int improve(const VlmkPatchEmbedParams& p, int run_length, Plan& plan) {
  const int column_tiles = ceil_div(p.dim, C::kColumns);
  const int row_tiles = ceil_div(p.batch * p.grid_y * p.grid_x, kPatches);
  // The statistics of a row come from one cluster, with no column outside the row.
  if (C::kNormed && (p.dim % C::kColumns || column_tiles > kMaxCluster)) return 0;
  const int cluster = C::kNormed ? column_tiles : 1;
  int most = 0;
  const int code =
      active_clusters<patch_embed_gemm_kernel<C>, kThreads, C::kSharedBytes>(cluster, most);
  if (code) return code;
  const int clusters = std::min(most, row_tiles * column_tiles / cluster);
  if (clusters == 0) return 0;
  // A tile costs more than its columns: copies of its pixels, which take twice as long where they
  // are of 16, and its end. As long as so many more columns (H100):
  const int more = run_length == 16 ? 160 : 48;
  const int64_t cost =
      int64_t{ceil_div(row_tiles * column_tiles, clusters * cluster)} * (C::kColumns + more);
  if (cost <= plan.cost) plan = {cost, C::kColumns, column_tiles, clusters * cluster};
  return 0;
}

template <typename C>
int run(const VlmkPatchEmbedParams& p, const Plan& plan, int run_length, void* stream) {
  const int patches = p.batch * p.grid_y * p.grid_x, depth = depth_of(p);
  const Schedule s{patches,
                   ceil_div(patches, kPatches) * plan.column_tiles,
                   ceil_div(depth, kStageDepth),
                   2 * run_length,
                   p.patch ? kStageDepth / p.patch : 1,
                   Divisor(plan.column_tiles),
                   Divisor(p.grid_y * p.grid_x),
                   Divisor(p.grid_x)};
  Maps maps;
  if constexpr (!C::kGathered) {
    const int code = encode_pixels(maps, p, run_length);
    if (code) return code;
  }
  const int code = encode_weight(maps, p, C::kGathered ? p.scratch : p.weight,
                                 C::kGathered ? prepared_depth(p) : depth, C::kColumns);
  if (code) return code;
  if constexpr (C::kGathered) {
    const int blocks = ceil_div(p.dim * (prepared_depth(p) / 4), kPrepareThreads);
    const int prepared = launch("prepare_weights_kernel", prepare_weights_kernel<typename C::Token>,
                                dim3(blocks), dim3(kPrepareThreads), 0, stream, p);
    if (prepared) return prepared;
  }
  const LaunchConfig config(dim3(plan.blocks), dim3(kThreads), C::kNormed ? plan.column_tiles : 1,
                            C::kSharedBytes, stream, C::kGathered);
  return launch("patch_embed_gemm_kernel", patch_embed_gemm_kernel<C>, config, p, s, maps);
}

// With 192 or 256 columns in a tile, whichever is done first.
template <typename Token, bool kGathered, bool kNormed>
int embed_by(const VlmkPatchEmbedParams& p, void* stream) {
  using Narrow = Config<Token, 192, kGathered, kNormed>;
  using Wide = Config<Token, 256, kGathered, kNormed>;
  const bool pairs = p.patch == 16 && p.grid_x % 2 == 0;
  const int run_length = p.patch == 0 ? kStageDepth : pairs ? 2 * p.patch : p.patch;
  Plan plan{INT64_MAX, 0, 0, 0};
  int code = improve<Narrow>(p, run_length, plan);
  if (code) return code;
  code = improve<Wide>(p, run_length, plan);
  if (code) return code;
  VLMK_CHECK(plan.blocks > 0, "no tile fits dim %d on this GPU", p.dim);
  return plan.columns == Wide::kColumns ? run<Wide>(p, plan, run_length, stream)
                                        : run<Narrow>(p, plan, run_length, stream);
}

template <typename Token>
int embed_tokens(const VlmkPatchEmbedParams& p, void* stream) {
  if (p.patch == 0 && p.depth % 8) return embed_by<Token, true, false>(p, stream);
  return p.norm_weight ? embed_by<Token, false, true>(p, stream)
                       : embed_by<Token, false, false>(p, stream);
}

int embed(const VlmkPatchEmbedParams& p, void* stream) {
  return p.token_type == VLMK_FLOAT16 ? embed_tokens<__half>(p, stream)
                                      : embed_tokens<__nv_bfloat16>(p, stream);
}

}  // namespace gemm
}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The gradients of patch embedding, the host's side: what the kernel takes, and how its work is
// cut.
#include <algorithm>
#include <climits>

#include "common/error.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "patch_embed/bwd_config.h"
#include "patch_embed/bwd_finish.h"
#include "patch_embed/bwd_kernel.h"
#include "patch_embed/bwd_norm.h"
#include "patch_embed/bwd_schedule.h"

namespace vlmk {
namespace patch_embed {
namespace bwd {

using Params = VlmkPatchEmbedBwdParams;

int check(const Params& p) {
  VLMK_CHECK(p.patch == 14 || p.patch == 16, "patch %d: 14 or 16", p.patch);
  VLMK_CHECK(p.type == VLMK_FLOAT16 || p.type == VLMK_BFLOAT16, "type %d", p.type);
  VLMK_CHECK(p.batch >= 0 && p.grid_y > 0 && p.grid_x > 0 && p.num_prefix >= 0,
             "batch %d, grid %d x %d, %d prefix tokens", p.batch, p.grid_y, p.grid_x, p.num_prefix);
  VLMK_CHECK(p.pos_prefix == 0 || p.pos_prefix == p.num_prefix, "%d of %d prefix tokens in pos",
             p.pos_prefix, p.num_prefix);
  VLMK_CHECK(int64_t{p.grid_y} * p.grid_x + p.num_prefix < INT_MAX / 2, "more than 2^30 tokens");
  VLMK_CHECK(p.dim > 0 && p.dim % 8 == 0, "dim %d: a multiple of 8", p.dim);
  VLMK_CHECK(!p.norm_weight || p.dim <= kNormColumns, "dim %d with a norm: at most %d", p.dim,
             kNormColumns);
  for (int64_t stride : {p.pixel_stride_b, p.pixel_stride_c, p.pixel_stride_y}) {
    VLMK_CHECK(stride > 0 && stride % 8 == 0,
               "a stride of pixels of %lld elements: positive multiples of 16 bytes",
               static_cast<long long>(stride));
  }
  // Images go through the tensor cores in so many at a time, with zeros for those that are missing.
  const int images =
      p.patch == 16 ? Config<__half, 16, 256, 2>::kImages : Config<__half, 14, 256, 2>::kImages;
  const int copied = ceil_div(p.batch, images) * images;
  VLMK_CHECK(copied - p.batch <= copied / 5, "%d images: multiples of %d, or few less", p.batch,
             images);
  return 0;
}

// How a variant cuts the work: `groups` of positions come in splits, `rest` of them are left.
struct Cut {
  int column_tiles, tiles, splits, groups, rest, rest_of_block, blocks, slots;
  int busiest;  // groups of the block that has most of them
  int norm_blocks;
};

template <typename C>
Cut cut(const Params& p, int multiprocessors) {
  Cut c = {};
  c.column_tiles = ceil_div(p.dim, C::kColumns);
  c.tiles = C::kRowTiles * c.column_tiles;
  const int groups = p.grid_y * ceil_div(p.grid_x, C::kPositions);
  // Where there are more tiles than multiprocessors, nothing is left over.
  c.splits = std::min(std::max(1, multiprocessors / c.tiles), groups);
  const int left = std::max(0, multiprocessors - c.splits * c.tiles);
  const int even =
      static_cast<int>(ceil_div(int64_t{c.tiles} * groups, int64_t{c.splits} * c.tiles + left));
  c.groups = std::min(groups, c.splits * even);
  c.rest = groups - c.groups;
  c.rest_of_block = c.rest ? ceil_div(c.tiles * c.rest, left) : 0;
  const int rest_blocks = c.rest ? ceil_div(c.tiles * c.rest, c.rest_of_block) : 0;
  c.blocks = c.splits * c.tiles + rest_blocks;
  c.slots = c.blocks + (c.rest ? c.tiles : 0);
  c.busiest =
      std::max(ceil_div(c.groups, c.splits), c.rest_of_block) * ceil_div(c.blocks, multiprocessors);
  c.norm_blocks = p.norm_weight ? multiprocessors * kNormBlocks : 0;
  return c;
}

// What lies in the workspace, in floats: parts of the weight's gradient, shares of the bias's, and
// of those of the norm's two parameters.
template <typename C>
struct Workspace {
  int64_t bias, norm, size;

  Workspace(const Params& p, const Cut& c)
      : bias(int64_t{c.slots} * C::kPartFloats),
        norm(bias + int64_t{c.slots} * kAdders * kPanel),
        size(norm + int64_t{c.norm_blocks} * 2 * p.dim) {}
};

template <typename C>
int encode_maps(const Params& p, Maps& maps) {
  const bool half = p.type == VLMK_FLOAT16;
  const auto size = [](int64_t count) { return static_cast<cuuint64_t>(count); };
  for (int row_tile = 0; row_tile < C::kRowTiles; ++row_tile) {
    const TileRows<C> rows(row_tile);
    for (int i = 0; i < 2 && rows.count[i] > 0; ++i) {
      const int code = encode_tiles(
          maps.pixels[row_tile][i], p.pixels, half,
          {size(p.grid_x * C::kPatch), size(p.batch), size(p.grid_y * C::kPatch), kChannels},
          {size(2 * p.pixel_stride_b), size(2 * p.pixel_stride_y), size(2 * p.pixel_stride_c)},
          {C::kRunBytes / 2, C::kImages, static_cast<cuuint32_t>(rows.count[i]), 1},
          C::kPatch == 16 ? CU_TENSOR_MAP_SWIZZLE_64B : CU_TENSOR_MAP_SWIZZLE_NONE,
          CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
      if (code) return code;
    }
  }
  const int64_t tokens = int64_t{p.grid_y} * p.grid_x + p.num_prefix;
  return encode_tiles(
      maps.grad, static_cast<const uint16_t*>(p.grad) + int64_t{p.num_prefix} * p.dim, half,
      {size(p.dim), size(p.batch), size(p.grid_x), size(p.grid_y)},
      {size(2 * tokens * p.dim), size(2 * p.dim), size(int64_t{2} * p.grid_x * p.dim)},
      {kPanel, C::kImages, C::kPositions, 1});
}

template <typename Token>
int take_norm_back(const Params& p, int blocks, float* shares, void* stream) {
  const int64_t tokens = int64_t{p.grid_y} * p.grid_x + p.num_prefix;
  const NormJob job{p.grad, p.total,          p.norm_weight, p.d_total,
                    shares, p.batch * tokens, p.dim,         p.eps};
  const auto kernel = p.dim <= 768 ? patch_embed_bwd_norm_kernel<Token, 3>
                                   : patch_embed_bwd_norm_kernel<Token, kNormVectors>;
  return launch("patch_embed_bwd_norm_kernel", kernel, dim3(blocks), dim3(32 * kNormWarps), 0,
                stream, job);
}

template <typename C>
Job job_of(const Params& p, const Cut& c) {
  const Workspace<C> w(p, c);
  auto* floats = static_cast<float*>(p.workspace);
  Job job{p,
          c.splits,
          c.groups / c.splits,
          c.groups % c.splits,
          c.rest,
          c.rest_of_block,
          ceil_div(p.batch, C::kImages),
          kChannels * C::kPatch * C::kPatch,
          Divisor(c.column_tiles),
          Divisor(c.tiles),
          Divisor(ceil_div(p.grid_x, C::kPositions)),
          floats,
          floats + w.bias,
          p.d_prefix || (p.d_pos && p.pos_prefix) ? p.num_prefix : 0,
          0,
          {}};
  const auto add = [&](const float* first, int count, int stride, void* result) {
    if (result) job.vectors[job.num_vectors++] = {first, count, stride, result};
  };
  add(floats + w.norm, c.norm_blocks, 2 * p.dim, p.d_norm_weight);
  add(floats + w.norm + p.dim, c.norm_blocks, 2 * p.dim, p.d_norm_bias);
  return job;
}

template <typename C>
int run(const Params& params, const Cut& c, void* stream) {
  Params p = params;
  if (p.norm_weight) {
    float* shares = static_cast<float*>(p.workspace) + Workspace<C>(p, c).norm;
    const int code = take_norm_back<typename C::Token>(p, c.norm_blocks, shares, stream);
    if (code) return code;
    p.grad = p.d_total;
  }
  Maps maps;
  int code = encode_maps<C>(p, maps);
  if (code) return code;
  const Job job = job_of<C>(p, c);
  const LaunchConfig products(dim3(c.blocks), dim3(C::kThreads), 1, C::kSharedBytes, stream, true);
  code = launch("patch_embed_bwd_kernel", patch_embed_bwd_kernel<C>, products, job, maps);
  if (code) return code;
  const int vectors = job.prefix_sums + (p.d_bias ? 1 : 0) + job.num_vectors;
  const int blocks = c.tiles * C::kEights + vectors * ceil_div(p.dim, kPanel);
  const LaunchConfig finish(dim3(blocks), dim3(C::kConsumers), 1, 0, stream, true);
  return launch("patch_embed_bwd_finish_kernel", patch_embed_bwd_finish_kernel<C>, finish, job);
}

struct Choice {
  int64_t cost = INT64_MAX;  // products of the busiest block
  int64_t workspace_bytes = 0;
  Cut cut = {};
  int (*run)(const Params& p, const Cut& c, void* stream) = nullptr;
};

// Makes this variant the choice, if it costs less by 5 %. Those of 256 columns come first: tiles of
// 192 take longer than their products (CLIP-L on an H200: 244 us, not 157, for 12 % more of them).
template <typename C>
int improve(const Params& p, Choice& choice) {
  int count = 0;
  const int code = multiprocessors<patch_embed_bwd_kernel<C>, C::kSharedBytes>(count);
  if (code) return code;
  const Cut c = cut<C>(p, count);
  const int64_t cost = int64_t{c.busiest} * C::kPartFloats;
  if (cost >= choice.cost - choice.cost / 20) return 0;
  choice = {cost, 4 * Workspace<C>(p, c).size, c, run<C>};
  return 0;
}

template <typename Token>
int choose(const Params& p, Choice& choice) {
  const int code = p.patch == 16 ? improve<Config<Token, 16, 256, 2>>(p, choice)
                                 : improve<Config<Token, 14, 256, 2>>(p, choice);
  if (code) return code;
  return p.patch == 16 ? improve<Config<Token, 16, 192, 3>>(p, choice)
                       : improve<Config<Token, 14, 192, 2>>(p, choice);
}

int choose(const Params& p, Choice& choice) {
  const int code = check(p);
  if (code) return code;
  return p.type == VLMK_FLOAT16 ? choose<__half>(p, choice) : choose<__nv_bfloat16>(p, choice);
}

}  // namespace bwd
}  // namespace patch_embed
}  // namespace vlmk

int vlmk_patch_embed_bwd_check(VlmkPatchEmbedBwdParams* params) {
  vlmk::patch_embed::bwd::Choice choice;
  const int code = vlmk::patch_embed::bwd::choose(*params, choice);
  params->workspace_bytes = choice.workspace_bytes;
  return code;
}

int vlmk_patch_embed_bwd(const VlmkPatchEmbedBwdParams* params, void* stream) {
  vlmk::patch_embed::bwd::Choice choice;
  const int code = vlmk::patch_embed::bwd::choose(*params, choice);
  if (code) return code;
  VLMK_CHECK(params->batch > 0, "no images: nothing to launch, the gradients are zeros");
  VLMK_CHECK(params->workspace_bytes >= choice.workspace_bytes,
             "workspace of %lld bytes: %lld are needed",
             static_cast<long long>(params->workspace_bytes),
             static_cast<long long>(choice.workspace_bytes));
  return choice.run(*params, choice.cut, stream);
}

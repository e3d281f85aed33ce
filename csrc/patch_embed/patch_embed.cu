// SPDX-License-Identifier: Apache-2.0
// Patch embedding, the host's side: what the kernels take, and which one does it.
#include <climits>

#include "common/error.h"
#include "patch_embed/config.h"
#include "patch_embed/gemm.h"
#include "patch_embed/small.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {

// Whether the rows of a tile's patches fit the room that a stage has.
int check_pitch(const VlmkPatchEmbedParams& p) {
  const int row = p.patch * (p.pixel_type == VLMK_UINT8 ? 1 : 2);
  const int width = (p.grid_x + 1) & ~1, segments = 1 + ceil_div(kTile - 1, width);
  const int64_t padding = int64_t{15} + segments * (round_up_16(width * row) - width * row);
  VLMK_CHECK(row % 16 == 0 || padding <= kPadding, "%d patches side by side: too few", p.grid_x);
  return 0;
}

int check_rows(const VlmkPatchEmbedParams& p) {
  using namespace gemm;
  VLMK_CHECK(p.pixel_type != VLMK_UINT8 && !p.norm_weight, "rows: of 16 bits, without a norm");
  const bool gathered = p.depth % 8 == 4 && p.depth % kDepthStep <= kMaxLeft;
  VLMK_CHECK((gathered || p.depth % kDepthStep == 0) && p.depth >= kMinDepth,
             "rows of %d pixels: multiples of %d, or 4 or 12 more, at least %d", p.depth,
             kDepthStep, kMinDepth);
  VLMK_CHECK(!gathered || (p.pixel_stride_gy % 4 == 0 &&
                           (p.batch < 2 || p.pixel_stride_b == p.grid_y * p.pixel_stride_gy)),
             "rows of %d pixels, %lld apart: multiples of 4, from one image to the next too",
             p.depth, static_cast<long long>(p.pixel_stride_gy));
  VLMK_CHECK(gathered ? p.frames > 0 && p.frame_run > 0 && p.frame_run % 4 == 0 : p.frames == 1,
             "%d frames in runs of %d", p.frames, p.frame_run);
  VLMK_CHECK(p.grid_x == 1, "rows: grid_x %d", p.grid_x);
  VLMK_CHECK(p.batch == 0 || p.batch * p.grid_y >= kMinRows, "%d rows: at least %d",
             p.batch * p.grid_y, kMinRows);
  return 0;
}

int check_large(const VlmkPatchEmbedParams& p) {
  using namespace gemm;
  VLMK_CHECK(p.pixel_type != VLMK_UINT8, "patches of 32: 16-bit pixels");
  VLMK_CHECK(takes(p), "dim %d with a norm, patches of 32: at most 8 times 192 or 256", p.dim);
  const int64_t patches = int64_t{p.batch} * p.grid_y * p.grid_x;
  VLMK_CHECK(patches == 0 || patches >= kMinLargePatches, "%lld patches of 32: at least %d",
             static_cast<long long>(patches), kMinLargePatches);
  return 0;
}

int check(const VlmkPatchEmbedParams& p) {
  const bool bytes = p.pixel_type == VLMK_UINT8;
  VLMK_CHECK(p.patch == 0 || p.patch == 14 || p.patch == 16 || p.patch == 32,
             "patch %d: 14, 16 or 32", p.patch);
  VLMK_CHECK(p.token_type == VLMK_FLOAT16 || p.token_type == VLMK_BFLOAT16, "token_type %d",
             p.token_type);
  VLMK_CHECK(bytes || p.pixel_type == p.token_type, "pixel_type %d", p.pixel_type);
  VLMK_CHECK(p.batch >= 0 && p.grid_y > 0 && p.grid_x > 0 && p.num_prefix >= 0,
             "batch %d, grid %d x %d, %d prefix tokens", p.batch, p.grid_y, p.grid_x, p.num_prefix);
  const int64_t tokens = int64_t{p.grid_y} * p.grid_x + p.num_prefix;
  VLMK_CHECK(2 * p.batch * tokens < INT_MAX - kTile, "more than 2^30 tokens");
  VLMK_CHECK(p.dim > 0 && p.dim % 8 == 0, "dim %d: a multiple of 8", p.dim);
  const int code = p.patch == 0 ? check_rows(p) : p.patch == 32 ? check_large(p) : 0;
  if (code) return code;
  const bool wide = p.patch == 14 && p.dim % 128 == 0 && p.dim / 128 <= kMaxCluster;
  const bool narrow = p.dim % 96 == 0 && p.dim / 96 <= kMaxCluster;
  VLMK_CHECK(!p.norm_weight || narrow || wide || p.patch == 32,
             "dim %d with a norm: at most 8 times 96%s", p.dim, p.patch == 14 ? " or 128" : "");
  const int per_16 = p.patch == 0 && p.depth % 8 ? 1 : bytes ? 16 : 8;
  for (int64_t stride : {p.pixel_stride_b, p.pixel_stride_gy, p.pixel_stride_c, p.pixel_stride_y}) {
    VLMK_CHECK(stride % per_16 == 0, "a stride of pixels of %lld elements: multiples of 16 bytes",
               static_cast<long long>(stride));
  }
  VLMK_CHECK(p.pos_stride_b % 8 == 0 && p.pos_stride_n % 8 == 0,
             "the strides of pos: multiples of 8 elements");
  VLMK_CHECK(p.batch * p.pos_stride_b + tokens * p.pos_stride_n < int64_t{8} * INT_MAX,
             "positions of 32 GiB or more");
  return p.patch == 0 ? 0 : check_pitch(p);
}

}  // namespace patch_embed
}  // namespace vlmk

int vlmk_patch_embed_check(const VlmkPatchEmbedParams* params) {
  return vlmk::patch_embed::check(*params);
}

int vlmk_patch_embed(const VlmkPatchEmbedParams* params, void* stream) {
  using namespace vlmk::patch_embed;
  const VlmkPatchEmbedParams& p = *params;
  const int code = check(p);
  if (code) return code;
  if (p.batch == 0) return 0;
  if (p.patch == 0 || p.patch == 32) return gemm::embed(p, stream);
  const bool bytes = p.pixel_type == VLMK_UINT8;
  bool done = false;
  const int small_code =
      bytes ? small::embed_uint8(p, stream, done) : small::embed_float16(p, stream, done);
  if (small_code || done) return small_code;
  return bytes ? embed_uint8(p, stream) : embed_float16(p, stream);
}

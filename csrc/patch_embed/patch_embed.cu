// SPDX-License-Identifier: Apache-2.0
// Patch embedding, the host's side: which variant of the kernel, and how tiles are dealt out.
#include <algorithm>
#include <atomic>
#include <climits>

#include "common/launch.h"
#include "patch_embed/kernel.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {

constexpr int kMaxDevices = 64;

struct Plan {
  int64_t cost;  // of the busiest block, in columns times tiles
  Schedule schedule{1, 1, 1, 0, 0, Divisor(1), Divisor(1)};
};

// How many clusters of this size the GPU holds at once; 0 where the kernel can't run.
template <typename C>
int most_clusters(int cluster, int& count) {
  static std::atomic<int> known[kMaxDevices][kMaxCluster + 1];  // one more than the count
  int device = 0;
  VLMK_CUDA(cudaGetDevice(&device));
  VLMK_CHECK(device < kMaxDevices, "GPU %d: at most %d are supported", device, kMaxDevices);
  std::atomic<int>& cached = known[device][cluster];
  count = cached.load(std::memory_order_relaxed) - 1;
  if (count >= 0) return 0;
  VLMK_CUDA(cudaFuncSetAttribute(patch_embed_kernel<C>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                 C::kSharedBytes));
  cudaLaunchAttribute attribute = {};
  attribute.id = cudaLaunchAttributeClusterDimension;
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(cluster);
  config.blockDim = dim3(kThreads);
  config.dynamicSmemBytes = C::kSharedBytes;
  config.attrs = &attribute;
  config.numAttrs = 1;
  VLMK_CUDA(cudaOccupancyMaxActiveClusters(&count, patch_embed_kernel<C>, &config));
  cached.store(count + 1, std::memory_order_relaxed);
  return 0;
}

// Makes this variant's plan the plan, if it fits and costs less.
template <typename C>
int improve(const VlmkPatchEmbedParams& p, Plan& plan) {
  const int blocks = ceil_div(p.dim, C::kColumns);
  const int rows = p.batch * p.grid_y, width = C::width(p.grid_x);
  const int tiles = ceil_div(rows * width, kTile);
  // The statistics of a row come from one cluster, with no column outside the row.
  if (C::kNormed && (p.dim % C::kColumns || blocks > kMaxCluster)) return 0;
  const int cluster = C::kNormed ? blocks : 1;
  int most = 0;
  const int code = most_clusters<C>(cluster, most);
  if (code) return code;
  const int clusters = std::min(most / (blocks / cluster), tiles);
  if (clusters == 0) return 0;
  const int64_t cost = int64_t{ceil_div(tiles, clusters)} * C::kColumns;
  if (cost < plan.cost) {
    plan = {cost,
            {cluster, blocks / cluster, clusters, tiles, rows, Divisor(width), Divisor(p.grid_y)}};
  }
  return 0;
}

template <typename C>
int run(const VlmkPatchEmbedParams& p, const Schedule& s, void* stream) {
  return launch_clusters("patch_embed_kernel", patch_embed_kernel<C>,
                         dim3(s.cluster * s.column_groups * s.clusters), dim3(kThreads), s.cluster,
                         C::kSharedBytes, stream, p, s);
}

// With 96 or 128 columns in a block, whichever is done first. 128 leave less room for pixels:
// without two slots of them they are taken only where a norm needs them.
template <int kPatch, typename Pixel, typename Token, bool kNormed>
int dispatch(const VlmkPatchEmbedParams& p, void* stream) {
  using Narrow = Config<kPatch, 96, Pixel, Token, kNormed>;
  using Wide = Config<kPatch, 128, Pixel, Token, kNormed>;
  Plan plan{INT64_MAX};
  int code = improve<Narrow>(p, plan);
  if (code) return code;
  if constexpr (Wide::kSlots > (kNormed ? 0 : 1)) {
    const int64_t narrow = plan.cost;
    code = improve<Wide>(p, plan);
    if (code) return code;
    if (plan.cost < narrow) return run<Wide>(p, plan.schedule, stream);
  }
  VLMK_CHECK(plan.cost < INT64_MAX, "no tile fits dim %d on this GPU", p.dim);
  return run<Narrow>(p, plan.schedule, stream);
}

template <typename Pixel, typename Token>
int dispatch(const VlmkPatchEmbedParams& p, void* stream) {
  if (p.patch == 14) {
    return p.norm_weight ? dispatch<14, Pixel, Token, true>(p, stream)
                         : dispatch<14, Pixel, Token, false>(p, stream);
  }
  return p.norm_weight ? dispatch<16, Pixel, Token, true>(p, stream)
                       : dispatch<16, Pixel, Token, false>(p, stream);
}

// Whether the rows of a tile's patches fit the room that a stage has.
int check_pitch(const VlmkPatchEmbedParams& p) {
  const int row = p.patch * (p.pixel_type == VLMK_UINT8 ? 1 : 2);
  const int width = (p.grid_x + 1) & ~1, segments = 1 + ceil_div(kTile - 1, width);
  const int64_t padding = int64_t{15} + segments * (round_up_16(width * row) - width * row);
  VLMK_CHECK(row % 16 == 0 || padding <= kPadding, "%d patches side by side: too few", p.grid_x);
  return 0;
}

int check(const VlmkPatchEmbedParams& p) {
  const bool bytes = p.pixel_type == VLMK_UINT8;
  VLMK_CHECK(p.patch == 14 || p.patch == 16, "patch %d: 14 or 16", p.patch);
  VLMK_CHECK(p.token_type == VLMK_FLOAT16 || p.token_type == VLMK_BFLOAT16, "token_type %d",
             p.token_type);
  VLMK_CHECK(bytes || p.pixel_type == p.token_type, "pixel_type %d", p.pixel_type);
  VLMK_CHECK(p.batch >= 0 && p.grid_y > 0 && p.grid_x > 0 && p.num_prefix >= 0,
             "batch %d, grid %d x %d, %d prefix tokens", p.batch, p.grid_y, p.grid_x, p.num_prefix);
  const int64_t tokens = int64_t{p.grid_y} * p.grid_x + p.num_prefix;
  VLMK_CHECK(2 * p.batch * tokens < INT_MAX - kTile, "more than 2^30 tokens");
  VLMK_CHECK(p.dim > 0 && p.dim % 8 == 0, "dim %d: a multiple of 8", p.dim);
  const bool wide = p.patch == 14 && p.dim % 128 == 0 && p.dim / 128 <= kMaxCluster;
  const bool narrow = p.dim % 96 == 0 && p.dim / 96 <= kMaxCluster;
  VLMK_CHECK(!p.norm_weight || narrow || wide, "dim %d with a norm: at most 8 times 96%s", p.dim,
             p.patch == 14 ? " or 128" : "");
  const int per_16 = bytes ? 16 : 8;
  for (int64_t stride : {p.pixel_stride_b, p.pixel_stride_gy, p.pixel_stride_c, p.pixel_stride_y}) {
    VLMK_CHECK(stride % per_16 == 0, "a stride of pixels of %lld elements: multiples of 16 bytes",
               static_cast<long long>(stride));
  }
  VLMK_CHECK(p.pos_stride_b % 8 == 0 && p.pos_stride_n % 8 == 0,
             "the strides of pos: multiples of 8 elements");
  return check_pitch(p);
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
  const bool half = p.token_type == VLMK_FLOAT16;
  if (p.pixel_type == VLMK_UINT8) {
    return half ? dispatch<uint8_t, __half>(p, stream)
                : dispatch<uint8_t, __nv_bfloat16>(p, stream);
  }
  return half ? dispatch<__half, __half>(p, stream)
              : dispatch<__nv_bfloat16, __nv_bfloat16>(p, stream);
}

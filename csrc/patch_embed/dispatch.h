// SPDX-License-Identifier: Apache-2.0
// Which variant of the kernel runs, and how tiles are dealt out.
#pragma once

#include <algorithm>
#include <climits>

#include "common/launch.h"
#include "patch_embed/gemm.h"
#include "patch_embed/kernel.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {

struct Plan {
  int64_t cost;  // of the busiest block, in columns times tiles
  Schedule schedule{1, 1, 1, 0, 0, Divisor(1), Divisor(1)};
};

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
  const int code =
      active_clusters<patch_embed_kernel<C>, C::kThreads, C::kSharedBytes>(cluster, most);
  if (code) return code;
  const int clusters = std::min(most / (blocks / cluster), tiles);
  if (clusters == 0) return 0;
  // Pixels and stores take a tile of uint8 as long as the products of 96 more columns (H100).
  const int64_t cost = int64_t{ceil_div(tiles, clusters)} * (C::kColumns + (C::kFold ? 96 : 0));
  if (cost < plan.cost) {
    plan = {cost,
            {cluster, blocks / cluster, clusters, tiles, rows, Divisor(width), Divisor(p.grid_y)}};
  }
  return 0;
}

template <typename C>
int run(const VlmkPatchEmbedParams& p, const Schedule& s, void* stream) {
  return launch_clusters("patch_embed_kernel", patch_embed_kernel<C>,
                         dim3(s.cluster * s.column_groups * s.clusters), dim3(C::kThreads),
                         s.cluster, C::kSharedBytes, stream, p, s);
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
  if constexpr (!std::is_same_v<Pixel, uint8_t>) {
    if (gemm::takes(p)) return gemm::embed(p, stream);
  }
  if (p.patch == 14) {
    return p.norm_weight ? dispatch<14, Pixel, Token, true>(p, stream)
                         : dispatch<14, Pixel, Token, false>(p, stream);
  }
  if (p.norm_weight) return dispatch<16, Pixel, Token, true>(p, stream);
  if constexpr (std::is_same_v<Pixel, uint8_t>) {
    return dispatch<16, Pixel, Token, false>(p, stream);
  } else {
    return gemm::embed(p, stream);
  }
}

}  // namespace patch_embed
}  // namespace vlmk

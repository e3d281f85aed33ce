// SPDX-License-Identifier: Apache-2.0
// Linear layers, the host's side: with tiles of how many columns, and the launch.
#pragma once

#include <algorithm>
#include <climits>

#include "activated_linear/kernel.h"
#include "common/error.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "vlmkernels.h"

namespace vlmk {
namespace activated_linear {

struct Plan {
  int64_t cost = INT64_MAX;
  int columns = 0, blocks = 0;
};

// Makes this variant's plan the plan, if it costs less: in cycles of the busiest cluster.
template <typename C>
int improve(const typename C::Params& p, Plan& plan) {
  const int tiles = ceil_div(p.rows, kTile) * ceil_div(p.dim, C::kOut);
  int most = 0;
  const int code =
      active_clusters<activated_linear_fwd_kernel<C>, kThreads, C::kSharedBytes>(kBlocks, most);
  if (code) return code;
  const int count = std::min(most, tiles);
  if (count == 0) return 0;
  const int64_t tile = int64_t{ceil_div(p.depth, kDepth)} * 4 * C::kColumns + 600;
  const int64_t cost = ceil_div(tiles, count) * tile;
  if (cost < plan.cost) plan = {cost, C::kColumns, count * kBlocks};
  return 0;
}

template <typename C>
int run(const typename C::Params& p, const Plan& plan, void* stream) {
  const bool half = p.type == VLMK_FLOAT16;
  Maps maps;
  const auto size = [](int64_t count) { return static_cast<cuuint64_t>(count); };
  int code = encode_tensor_map(maps.rows, p.x, half, 1, p.rows, 1, p.depth, 0, p.depth, 0, kRows);
  if (code) return code;
  // Column 32 g + 8 q + 2 u + e becomes row (columns / 4) u + 8 g + 2 q + e of a tile: of a
  // product's sums, a thread is given two of every eight rows, and so 8 neighbouring columns. A
  // block copies half of the u, or all of one product's.
  const auto weights = [&](CUtensorMap& map, const void* data) {
    const cuuint64_t row = size(2 * p.depth);
    return encode_tiles(map, data, half, {size(p.depth), 2, size(p.dim / 8), 4},
                        {row, 8 * row, 2 * row}, {kDepth, 2, C::kOut / 8, 2 * C::kProducts});
  };
  code = weights(maps.weight, p.weight);
  if constexpr (C::kGated) code = code ? code : weights(maps.up, p.up);
  if constexpr (C::kBeforeBytes > 0) {
    const cuuint64_t row = size(2 * p.dim);
    code = code ? code
                : encode_tiles(maps.before, p.before, half, {size(p.dim), size(p.rows), 1, 1},
                               {row, row, row}, {kBeforeColumns, kRows, 1, 1},
                               CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_L2_128B);
  }
  if (code) return code;
  const Schedule s{ceil_div(p.rows, kTile), ceil_div(p.dim, C::kOut), ceil_div(p.depth, kDepth)};
  return launch_clusters("activated_linear_fwd_kernel", activated_linear_fwd_kernel<C>,
                         dim3(plan.blocks), dim3(kThreads), kBlocks, C::kSharedBytes, stream, p, s,
                         maps);
}

// The fastest of these variants.
template <typename First, typename... Others>
int launch_best(const typename First::Params& p, void* stream) {
  Plan plan;
  int code = improve<First>(p, plan);
  ((code = code ? code : improve<Others>(p, plan)), ...);
  if (code) return code;
  if (plan.columns == 0) {
    return fail(cudaErrorInvalidValue, "no cluster of %d blocks fits this GPU", kBlocks);
  }
  if (plan.columns == First::kColumns) return run<First>(p, plan, stream);
  ((code = plan.columns == Others::kColumns ? run<Others>(p, plan, stream) : code), ...);
  return code;
}

// Those with a second product.
int launch_gated(const VlmkActivatedLinearParams& p, void* stream);

}  // namespace activated_linear
}  // namespace vlmk

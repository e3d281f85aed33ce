// SPDX-License-Identifier: Apache-2.0
// Linear layers, the host's side: what the kernels take, and with tiles of how many columns.
#include <algorithm>
#include <climits>

#include "activated_linear/kernel.h"
#include "common/error.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "vlmkernels.h"

namespace vlmk {
namespace activated_linear {

int check(const VlmkActivatedLinearParams& p) {
  VLMK_CHECK(p.type == VLMK_FLOAT16 || p.type == VLMK_BFLOAT16, "type %d", p.type);
  VLMK_CHECK(p.activation >= VLMK_GELU && p.activation <= VLMK_QUICK_GELU, "activation %d",
             p.activation);
  VLMK_CHECK(p.rows >= 0 && p.rows < INT_MAX - kTile, "%d rows", p.rows);
  VLMK_CHECK(p.depth >= VLMK_ACTIVATED_LINEAR_MIN_DEPTH && p.depth % 8 == 0,
             "%d columns of x: a multiple of 8, at least %d", p.depth,
             VLMK_ACTIVATED_LINEAR_MIN_DEPTH);
  VLMK_CHECK(p.dim > 0 && p.dim % 8 == 0, "%d columns of the result: a multiple of 8", p.dim);
  return 0;
}

struct Plan {
  int64_t cost = INT64_MAX;
  int columns = 0, blocks = 0;
};

// Makes this variant's plan the plan, if it costs less: in cycles of the busiest cluster.
template <typename C>
int improve(const VlmkActivatedLinearParams& p, Plan& plan) {
  const int tiles = ceil_div(p.rows, kTile) * ceil_div(p.dim, C::kColumns);
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
int run(const VlmkActivatedLinearParams& p, const Plan& plan, void* stream) {
  const bool half = p.type == VLMK_FLOAT16;
  Maps maps;
  const auto size = [](int64_t count) { return static_cast<cuuint64_t>(count); };
  int code = encode_tensor_map(maps.rows, p.x, half, 1, p.rows, 1, p.depth, 0, p.depth, 0, kRows);
  if (code) return code;
  // Column 32 g + 8 q + 2 u + e becomes row (columns / 4) u + 8 g + 2 q + e of a tile: of a
  // product's sums, a thread is given two of every eight rows, and so 8 neighbouring columns.
  const cuuint64_t row = size(2 * p.depth);
  code = encode_tiles(maps.weight, p.weight, half, {size(p.depth), 2, size(p.dim / 8), 4},
                      {row, 8 * row, 2 * row}, {kDepth, 2, C::kColumns / 8, 4 / kBlocks});
  if (code) return code;
  const int column_tiles = ceil_div(p.dim, C::kColumns);
  const Schedule s{ceil_div(p.rows, kTile) * column_tiles, column_tiles, ceil_div(p.depth, kDepth)};
  return launch_clusters("activated_linear_fwd_kernel", activated_linear_fwd_kernel<C>,
                         dim3(plan.blocks), dim3(kThreads), kBlocks, C::kSharedBytes, stream, p, s,
                         maps);
}

template <typename Token, int kActivation>
int launch_variant(const VlmkActivatedLinearParams& p, void* stream) {
  using Wide = Config<Token, 256, kActivation>;
  using Middle = Config<Token, 192, kActivation>;
  using Narrow = Config<Token, 128, kActivation>;
  Plan plan;
  int code = improve<Wide>(p, plan);
  if (code == 0) code = improve<Middle>(p, plan);
  if (code == 0) code = improve<Narrow>(p, plan);
  if (code) return code;
  switch (plan.columns) {
    case 256:
      return run<Wide>(p, plan, stream);
    case 192:
      return run<Middle>(p, plan, stream);
    case 128:
      return run<Narrow>(p, plan, stream);
  }
  return fail(cudaErrorInvalidValue, "no cluster of %d blocks fits this GPU", kBlocks);
}

template <typename Token>
int launch_variant(const VlmkActivatedLinearParams& p, void* stream) {
  switch (p.activation) {
    case VLMK_GELU:
      return launch_variant<Token, VLMK_GELU>(p, stream);
    case VLMK_GELU_TANH:
      return launch_variant<Token, VLMK_GELU_TANH>(p, stream);
    default:
      return launch_variant<Token, VLMK_QUICK_GELU>(p, stream);
  }
}

}  // namespace activated_linear
}  // namespace vlmk

int vlmk_activated_linear_check(const VlmkActivatedLinearParams* params) {
  return vlmk::activated_linear::check(*params);
}

int vlmk_activated_linear(const VlmkActivatedLinearParams* params, void* stream) {
  const VlmkActivatedLinearParams& p = *params;
  const int code = vlmk::activated_linear::check(p);
  if (code || p.rows == 0) return code;
  return p.type == VLMK_FLOAT16 ? vlmk::activated_linear::launch_variant<__half>(p, stream)
                                : vlmk::activated_linear::launch_variant<__nv_bfloat16>(p, stream);
}

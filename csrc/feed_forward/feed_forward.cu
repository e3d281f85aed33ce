// SPDX-License-Identifier: Apache-2.0
// Feed-forwards that learn: the first layer with its activation, and the second layer's gradient
// back to before the activation.
#include <cstdint>

#include "activated_linear/dispatch.h"
#include "common/hopper.h"
#include "common/launch.h"
#include "vlmkernels.h"

namespace vlmk {
namespace activated_linear {
namespace {

constexpr int kTurned = 64, kTurners = 256;  // rows and columns of a tile, and its threads

// to[j][i] = from[i][j], of 16-bit numbers, in eights along both.
__global__ void __launch_bounds__(kTurners)
    feed_forward_turn_kernel(const uint16_t* from, uint16_t* to, int rows, int columns) {
  __shared__ __align__(4) uint16_t tile[kTurned][kTurned + 2];
  const int first_row = blockIdx.y * kTurned, first_column = blockIdx.x * kTurned;
#pragma unroll
  for (int i = threadIdx.x; i < kTurned * kTurned / 8; i += kTurners) {
    const int y = i / 8, x = i % 8 * 8, row = first_row + y, column = first_column + x;
    const uint4 eight =
        load_global(from + int64_t{row} * columns + column, row < rows && column < columns);
    auto* place = reinterpret_cast<uint32_t*>(&tile[y][x]);
    for (int k = 0; k < 4; ++k) place[k] = (&eight.x)[k];
  }
  __syncthreads();
#pragma unroll
  for (int i = threadIdx.x; i < kTurned * kTurned / 8; i += kTurners) {
    const int x = i / 8, y = i % 8 * 8, row = first_row + y, column = first_column + x;
    uint4 eight;
    for (int k = 0; k < 4; ++k) {
      (&eight.x)[k] = tile[y + 2 * k][x] | static_cast<uint32_t>(tile[y + 2 * k + 1][x]) << 16;
    }
    if (row < rows && column < columns) store_global(to + int64_t{column} * rows + row, eight);
  }
}

int turn_weight(VlmkFeedForwardParams& p, void* stream) {
  const dim3 grid(ceil_div(p.dim, kTurned), ceil_div(p.depth, kTurned));
  const auto* weight = static_cast<const uint16_t*>(p.weight);
  p.weight = p.turned;
  return vlmk::launch("feed_forward_turn_kernel", feed_forward_turn_kernel, grid, dim3(kTurners), 0,
                      stream, weight, static_cast<uint16_t*>(p.turned), p.depth, p.dim);
}

// Tiles of 256 columns alone: whoever learns has many rows, and for all towers of the benchmark
// they leave as few multiprocessors without work at the end as those of 192 or fewer.
template <typename Token, int kActivation, Pass kPass>
int launch_activation(const VlmkFeedForwardParams& p, void* stream) {
  return launch_best<Config<Token, 256, kActivation, false, kPass>>(p, stream);
}

template <typename Token, Pass kPass>
int launch_type(const VlmkFeedForwardParams& p, void* stream) {
  switch (p.activation) {
    case VLMK_GELU:
      return launch_activation<Token, VLMK_GELU, kPass>(p, stream);
    case VLMK_GELU_TANH:
      return launch_activation<Token, VLMK_GELU_TANH, kPass>(p, stream);
    default:
      return launch_activation<Token, VLMK_QUICK_GELU, kPass>(p, stream);
  }
}

template <Pass kPass>
int launch(VlmkFeedForwardParams p, void* stream) {
  int code = vlmk_feed_forward_check(&p);
  if (code || p.rows == 0) return code;
  if (kPass == Pass::kBackward) code = turn_weight(p, stream);
  if (code) return code;
  return p.type == VLMK_FLOAT16 ? launch_type<__half, kPass>(p, stream)
                                : launch_type<__nv_bfloat16, kPass>(p, stream);
}

}  // namespace
}  // namespace activated_linear
}  // namespace vlmk

int vlmk_feed_forward_check(const VlmkFeedForwardParams* params) {
  // What a linear layer with a bias takes.
  static const char there = 0;
  VlmkActivatedLinearParams p = {};
  p.bias = &there;
  p.rows = params->rows, p.depth = params->depth, p.dim = params->dim;
  p.activation = params->activation, p.type = params->type;
  return vlmk_activated_linear_check(&p);
}

int vlmk_feed_forward_fwd(const VlmkFeedForwardParams* params, void* stream) {
  return vlmk::activated_linear::launch<vlmk::activated_linear::Pass::kForward>(*params, stream);
}

int vlmk_feed_forward_bwd(const VlmkFeedForwardParams* params, void* stream) {
  return vlmk::activated_linear::launch<vlmk::activated_linear::Pass::kBackward>(*params, stream);
}

// SPDX-License-Identifier: Apache-2.0
// Linear layers and their activations: what the kernels take, and those of one product.
#include <climits>

#include "activated_linear/dispatch.h"
#include "common/error.h"
#include "vlmkernels.h"

namespace vlmk {
namespace activated_linear {

int check(const VlmkActivatedLinearParams& p) {
  VLMK_CHECK(p.type == VLMK_FLOAT16 || p.type == VLMK_BFLOAT16, "type %d", p.type);
  VLMK_CHECK(!p.bias != !p.up, "it takes a bias or a second weight");
  const bool known = p.up ? p.activation == VLMK_SILU || p.activation == VLMK_GELU_TANH
                          : p.activation >= VLMK_GELU && p.activation <= VLMK_QUICK_GELU;
  VLMK_CHECK(known, "activation %d with %s", p.activation, p.up ? "a second weight" : "a bias");
  VLMK_CHECK(p.rows >= 0 && p.rows < INT_MAX - kTile, "%d rows", p.rows);
  VLMK_CHECK(p.depth >= VLMK_ACTIVATED_LINEAR_MIN_DEPTH && p.depth % 8 == 0,
             "%d columns of x: a multiple of 8, at least %d", p.depth,
             VLMK_ACTIVATED_LINEAR_MIN_DEPTH);
  VLMK_CHECK(p.dim > 0 && p.dim % 8 == 0, "%d columns of the result: a multiple of 8", p.dim);
  return 0;
}

template <typename Token, int kActivation>
int launch_activation(const VlmkActivatedLinearParams& p, void* stream) {
  return launch_best<Config<Token, 256, kActivation>, Config<Token, 192, kActivation>,
                     Config<Token, 128, kActivation>>(p, stream);
}

template <typename Token>
int launch(const VlmkActivatedLinearParams& p, void* stream) {
  switch (p.activation) {
    case VLMK_GELU:
      return launch_activation<Token, VLMK_GELU>(p, stream);
    case VLMK_GELU_TANH:
      return launch_activation<Token, VLMK_GELU_TANH>(p, stream);
    default:
      return launch_activation<Token, VLMK_QUICK_GELU>(p, stream);
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
  if (p.up) return vlmk::activated_linear::launch_gated(p, stream);
  return p.type == VLMK_FLOAT16 ? vlmk::activated_linear::launch<__half>(p, stream)
                                : vlmk::activated_linear::launch<__nv_bfloat16>(p, stream);
}

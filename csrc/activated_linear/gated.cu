// SPDX-License-Identifier: Apache-2.0
// Linear layers whose activations are multiplied by what a second layer makes of the same rows.
#include "activated_linear/dispatch.h"
#include "vlmkernels.h"

namespace vlmk {
namespace activated_linear {
namespace {

template <typename Token, int kActivation>
int launch_activation(const VlmkActivatedLinearParams& p, void* stream) {
  return launch_best<Config<Token, 256, kActivation, true>, Config<Token, 192, kActivation, true>>(
      p, stream);
}

template <typename Token>
int launch_type(const VlmkActivatedLinearParams& p, void* stream) {
  return p.activation == VLMK_SILU ? launch_activation<Token, VLMK_SILU>(p, stream)
                                   : launch_activation<Token, VLMK_GELU_TANH>(p, stream);
}

}  // namespace

int launch_gated(const VlmkActivatedLinearParams& p, void* stream) {
  return p.type == VLMK_FLOAT16 ? launch_type<__half>(p, stream)
                                : launch_type<__nv_bfloat16>(p, stream);
}

}  // namespace activated_linear
}  // namespace vlmk

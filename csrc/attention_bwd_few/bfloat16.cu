// SPDX-License-Identifier: Apache-2.0
// The variants for bfloat16: a file of their own, so that they compile beside the others.
#include "attention_bwd_few/dispatch.h"

namespace vlmk {
namespace attention_bwd_few {

int backward_bfloat16(const VlmkAttentionBwdParams& p, void* stream) {
  return dispatch<__nv_bfloat16>(p, stream);
}

}  // namespace attention_bwd_few
}  // namespace vlmk

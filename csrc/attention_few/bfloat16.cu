// SPDX-License-Identifier: Apache-2.0
// The variants for bfloat16: a file of their own, so that they compile beside the others.
#include "attention_few/dispatch.h"

namespace vlmk {
namespace attention_few {

int forward_bfloat16(const VlmkAttentionParams& p, void* stream) {
  return dispatch<__nv_bfloat16>(p, stream);
}

}  // namespace attention_few
}  // namespace vlmk

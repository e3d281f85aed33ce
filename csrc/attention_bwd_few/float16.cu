// SPDX-License-Identifier: Apache-2.0
// The variants for float16: a file of their own, so that they compile beside the others.
#include "attention_bwd_few/dispatch.h"

namespace vlmk {
namespace attention_bwd_few {

int backward_float16(const VlmkAttentionBwdParams& p, void* stream) {
  return dispatch<__half>(p, stream);
}

}  // namespace attention_bwd_few
}  // namespace vlmk

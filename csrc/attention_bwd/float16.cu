// SPDX-License-Identifier: Apache-2.0
// The variants for float16: a file of their own, so that they compile beside the others.
#include "attention_bwd/dispatch.h"

namespace vlmk {
namespace attention_bwd {

int backward_float16(const VlmkAttentionBwdParams& p, void* stream) {
  return dispatch<__half>(p, stream);
}

}  // namespace attention_bwd
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The variants for float16: a file of their own, so that they compile beside the others.
#include "attention_few/dispatch.h"

namespace vlmk {
namespace attention_few {

int forward_float16(const VlmkAttentionParams& p, void* stream) {
  return dispatch<__half>(p, stream);
}

}  // namespace attention_few
}  // namespace vlmk

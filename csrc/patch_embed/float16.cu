// SPDX-License-Identifier: Apache-2.0
// The variants for pixels in the 16 bits of the tokens: a file of their own, so that they compile
// beside the others.
#include "patch_embed/dispatch.h"

namespace vlmk {
namespace patch_embed {

int embed_float16(const VlmkPatchEmbedParams& p, void* stream) {
  return p.token_type == VLMK_FLOAT16 ? dispatch<__half, __half>(p, stream)
                                      : dispatch<__nv_bfloat16, __nv_bfloat16>(p, stream);
}

}  // namespace patch_embed
}  // namespace vlmk

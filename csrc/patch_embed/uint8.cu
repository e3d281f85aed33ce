// SPDX-License-Identifier: Apache-2.0
// The variants for uint8 pixels: a file of their own, so that they compile beside the others.
#include "patch_embed/dispatch.h"

namespace vlmk {
namespace patch_embed {

int embed_uint8(const VlmkPatchEmbedParams& p, void* stream) {
  return p.token_type == VLMK_FLOAT16 ? dispatch<uint8_t, __half>(p, stream)
                                      : dispatch<uint8_t, __nv_bfloat16>(p, stream);
}

}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The variants for few patches, of uint8 pixels: a file of their own, so that they compile
// beside the others.
#include "patch_embed/small_dispatch.h"

namespace vlmk {
namespace patch_embed {
namespace small {

int embed_uint8(const VlmkPatchEmbedParams& p, void* stream, bool& done) {
  return p.token_type == VLMK_FLOAT16 ? embed<uint8_t, __half>(p, stream, done)
                                      : embed<uint8_t, __nv_bfloat16>(p, stream, done);
}

}  // namespace small
}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The variants for few patches, of pixels in the 16 bits of the tokens: a file of their own, so
// that they compile beside the others.
#include "patch_embed/small_dispatch.h"

namespace vlmk {
namespace patch_embed {
namespace small {

int embed_float16(const VlmkPatchEmbedParams& p, void* stream, bool& done) {
  return p.token_type == VLMK_FLOAT16 ? embed<__half, __half>(p, stream, done)
                                      : embed<__nv_bfloat16, __nv_bfloat16>(p, stream, done);
}

}  // namespace small
}  // namespace patch_embed
}  // namespace vlmk

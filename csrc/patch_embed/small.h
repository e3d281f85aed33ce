// SPDX-License-Identifier: Apache-2.0
// The launches of the kernel for few patches, each in a file of its own: small_uint8.cu and
// small_float16.cu.
#pragma once

#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace small {

// Where the patches are so few that the GPU makes all their tokens at once, launches it and sets
// `done`.
int embed_uint8(const VlmkPatchEmbedParams& p, void* stream, bool& done);
int embed_float16(const VlmkPatchEmbedParams& p, void* stream, bool& done);

}  // namespace small
}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The launch of the kernel for 16-bit pixels without a norm: many patches of 16 x 16, and rows.
#pragma once

#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace gemm {

// Rows that it takes: whole lines of memory, and so many that their tiles occupy the GPU. Fewer are
// done as soon by the tiles of other backends (H100).
constexpr int kDepthStep = 64, kMinDepth = 576, kMinRows = 1536;

int embed(const VlmkPatchEmbedParams& p, void* stream);

}  // namespace gemm
}  // namespace patch_embed
}  // namespace vlmk

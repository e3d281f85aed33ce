// SPDX-License-Identifier: Apache-2.0
// The launch of the kernel that multiplies from shared memory: 16-bit pixels, many patches or rows.
#pragma once

#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace gemm {

// Rows that it takes: whole lines of memory, and so many that their tiles occupy the GPU. Fewer are
// done as soon by the tiles of other backends (H100).
constexpr int kDepthStep = 64, kMinDepth = 576, kMinRows = 1536;

// Patches of 32 x 32: 48 tiles or more of 64 pixels, one after another, are done no sooner for few
// patches. 1,568 of CLIP-B/32 take 28 us, and torch.compile 21, but 3,136 30 us instead of 38
// (H200).
constexpr int kMinLargePatches = 2304;

// Rows of others than multiples of 8 pixels are gathered, and of the last 64, no more than so many.
constexpr int kMaxLeft = 16;

// Whether it takes these images.
bool takes(const VlmkPatchEmbedParams& p);

int embed(const VlmkPatchEmbedParams& p, void* stream);

}  // namespace gemm
}  // namespace patch_embed
}  // namespace vlmk

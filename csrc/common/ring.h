// SPDX-License-Identifier: Apache-2.0
// The ring of stages in shared memory through which tiles come to the products.
#pragma once

#include <cstdint>

namespace vlmk {

// Its barriers: a stage is there; all warpgroups that multiply are done with it.
template <typename C>
struct TileRing {
  uint32_t stages, barriers;  // addresses
  int slot = 0;
  uint32_t parity = 0;

  __device__ __forceinline__ explicit TileRing(uint32_t shared)
      : stages(shared), barriers(shared + C::kBarriers) {}
  __device__ uint32_t stage() const { return stages + slot * C::kStageBytes; }
  __device__ uint32_t full() const { return barriers + 16 * slot; }
  __device__ uint32_t empty() const { return full() + 8; }
  __device__ uint32_t empty_before() const {  // of the stage before
    return barriers + 16 * (slot > 0 ? slot - 1 : C::kStages - 1) + 8;
  }
  __device__ __forceinline__ void advance() {
    const bool last = slot + 1 == C::kStages;
    slot = last ? 0 : slot + 1;
    parity ^= last;
  }
};

}  // namespace vlmk

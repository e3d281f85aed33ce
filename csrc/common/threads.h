// SPDX-License-Identifier: Apache-2.0
// Where a thread stands.
#pragma once

namespace vlmk {

// The thread in its warp and in its warpgroup. Remainders of unsigned numbers: those of signed ones
// take more instructions and keep registers that the widest variants don't have.
__device__ __forceinline__ int lane_index() { return static_cast<int>(threadIdx.x % 32); }
__device__ __forceinline__ int group_thread() { return static_cast<int>(threadIdx.x % 128); }

// Known to be the same in all threads of a warp, so that what follows from it costs no registers.
__device__ __forceinline__ int warp_index() {
  return static_cast<int>(__shfl_sync(~0u, threadIdx.x / 32, 0));
}

}  // namespace vlmk

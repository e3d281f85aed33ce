// SPDX-License-Identifier: Apache-2.0
// The frame of kernels whose blocks work in pairs on tiles of 256 rows: in each a thread copies,
// and two warpgroups multiply.
//
// Both blocks need the same columns, and each copies half of them for both: so 800 TFLOP/s take
// 6.3 TB/s from L2, and in tiles of 128 x 256 by themselves 9.4.
#pragma once

#include <cstdint>

#include "common/hopper.h"
#include "common/ring.h"
#include "common/threads.h"

namespace vlmk {
namespace pairs {

constexpr int kBlocks = 2;  // of a cluster, kRows of its tile each
constexpr int kGroups = 2;  // warpgroups of a block that multiply, 64 rows each
constexpr int kThreads = 128 * (kGroups + 1);
constexpr int kRows = 64 * kGroups;
constexpr int kTile = kBlocks * kRows;
constexpr int kDepth = 64;  // of a stage
constexpr int kRowBytes = kDepth * 2;
constexpr int kLeftBytes = kRows * kRowBytes;

// How far the first warpgroup is ahead of the second, in stages: while one finishes a tile, the
// other still multiplies.
constexpr int kAhead = 3;

__device__ __forceinline__ int cluster_index() { return static_cast<int>(blockIdx.x) / kBlocks; }
__device__ __forceinline__ int clusters() { return static_cast<int>(gridDim.x) / kBlocks; }
__device__ __forceinline__ int block_in_cluster() { return static_cast<int>(cluster_rank()); }

// `copy(ring)` by one thread, `work(ring, group)` by the warpgroups that multiply, and `help(i)` by
// a warp beside each of those. Registers of all together no more than a block of this size is
// launched with: more are waited for without end.
template <int kConsumerRegisters, int kProducerRegisters, typename Ring, typename Copy,
          typename Work, typename Help>
__device__ __forceinline__ void run(const Ring& ring, Copy copy, Work work, Help help) {
  static_assert(kGroups * kConsumerRegisters + kProducerRegisters <= 3 * 168 && kGroups == 2);
  const int warp = warp_index();
  if (threadIdx.x == 0) {
    for (Ring each = ring; each.parity == 0; each.advance()) {
      barrier_init(each.full(), 1);
      barrier_init(each.empty(), kBlocks * kGroups);
    }
    fence_barrier_init();
  }
  cluster_sync();
  if (warp >= 4 * kGroups) {
    shrink_registers<kProducerRegisters>();
    const int helper = warp - 4 * kGroups - 1;
    if (helper < 0) {
      if (lane_index() == 0) copy(ring);
    } else if (helper < kGroups) {
      help(helper);
    }
    __syncwarp();
  } else {
    grow_registers<kConsumerRegisters>();
    work(ring, warp / 4);
  }
  // A block is copied to and arrived at until the other is done.
  cluster_sync();
}

// A tile's stages, one after another: `copy(stage, barrier, step)` starts the copies of one, of so
// many bytes.
template <int kBytes, typename Ring, typename Copy>
__device__ __forceinline__ void copy_stages(Ring& ring, int steps, Copy copy) {
#pragma unroll 1
  for (int step = 0; step < steps; ++step) {
    barrier_wait(ring.empty(), ring.parity ^ 1);
    barrier_expect(ring.full(), kBytes);
    copy(ring.stage(), ring.full(), step);
    ring.advance();
  }
}

// Both blocks may fill the stage before again, as far as this warpgroup is concerned.
template <typename Ring>
__device__ __forceinline__ void release_before(const Ring& ring) {
  const int thread = group_thread();
  if (thread < kBlocks) barrier_arrive_in_block(in_block(ring.empty_before(), thread));
}

}  // namespace pairs
}  // namespace vlmk

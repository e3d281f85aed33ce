// SPDX-License-Identifier: Apache-2.0
// What the kernels of the contrastive losses are made of: tiles of 256 rows that the two blocks of
// a cluster share, and the ring of stages through which both sides of a product come.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>

#include <cstdint>

#include "common/hopper.h"
#include "common/pairs.h"
#include "common/ring.h"
#include "common/tensor_map.h"
#include "common/threads.h"
#include "common/wgmma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace contrastive {

using namespace pairs;

constexpr int kSums = kTile / 2;           // products of each thread
constexpr int kNarrow = 128;               // channels of the last tile, where it has not kTile
constexpr int kBoxBytes = 64 * kRowBytes;  // 64 rows of 64 columns
constexpr int kConsumerRegisters = 216, kProducerRegisters = 72;

// Named barriers. Of each warpgroup that multiplies: its own, and with the warp that publishes what
// it stored, before and behind that. And for the second warpgroup to wait for the first.
constexpr int kGroupBarrier = 1, kStoredBarrier = kGroupBarrier + kGroups,
              kPublishedBarrier = kStoredBarrier + kGroups,
              kAheadBarrier = kPublishedBarrier + kGroups;

// Of each warpgroup: sums of columns of its four warps, a shift, and sums over tiles.
constexpr int kScratchFloats = 4 * kTile + 4 + 2 * 128;

// What CLIP's backward pass works out first: the gain, what the gradients of features and scale are
// multiplied by in the end, and the least and the greatest of the finite shifted log-sum-exps.
enum Number { kGain, kTimes, kLowest, kHighest };

// What the thread that copies tells the others about a tile. Found by each of them, it took 1200 of
// the 31000 cycles of a tile on an H200.
enum Kind : int32_t { kLogits, kGradientA, kGradientB, kNoMore };
struct Task {
  Kind kind;
  int32_t steps;             // of kDepth
  int32_t row, column;       // of the logits or of a gradient
  int32_t kept_row;          // of logits in the panels that are kept or in the strip; of a gradient
                             // in what is kept beside it
  int32_t kept_column;       // of logits in the panel
  int32_t has_sum, is_last;  // whether there is a part of the sum, whether it is complete with this
  int32_t counter, turns;    // to be counted at when it has been stored; turns is the first
                             // warpgroup's, or -1
};
// Whoever copies is at most two tiles ahead of whoever multiplies, and that one of who publishes.
constexpr int kTasks = 4;

// The layout of shared memory.
struct Layout {
  static constexpr int kStageBytes = kLeftBytes + kTile * kRowBytes;
  static constexpr int kScratchBytes = kGroups * kScratchFloats * 4;
  static constexpr int kStages = 4;
  static constexpr int kScratch = kStages * kStageBytes;
  static constexpr int kTaskBytes = kTasks * sizeof(Task);
  static constexpr int kTaskPlace = kScratch + kScratchBytes;
  static constexpr int kNumbers = kTaskPlace + kTaskBytes;
  static constexpr int kBarriers = kNumbers + 16;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8 + 2 * 8;  // and of the numbers
  static_assert(kStageBytes % 1024 == 0 && kBarriers % 16 == 0 && kStages > kAhead);
  static_assert(kSharedBytes <= kSharedLimit);
};
using StageRing = TileRing<Layout>;

// Of the features, tiles of rows as the rows of logits, as their columns, and as what a gradient of
// logits is multiplied by; of the panels of those, rows, and columns.
struct Maps {
  CUtensorMap rows_a, columns_b, factor_a, factor_b, panel_rows, panel_columns;
};

// A part of the matrix of all logits.
struct Panel {
  int32_t first_row, first_column;
  int32_t row_tiles, column_tiles;
  int32_t kept_row;  // where the first row is in the panels that are kept
  int32_t index;     // of launches for a panel each
};

// The thread that copies, and how it comes by tiles: the clusters take their numbers in turn, as
// each has room for the stages of another. The first block's thread does, and tells the second.
struct Dealer {
  StageRing ring;
  char* shared;
  int32_t* dealt;  // how many numbers have been taken
  unsigned count = 0;
  int taken = 0;

  __device__ __forceinline__ Dealer(StageRing ring, char* shared, int32_t* dealt)
      : ring(ring), shared(shared), dealt(dealt) {
    if (block_in_cluster() == 0) {
      take();
      tell();
    }
  }

  // By one thread, before barriers are fenced.
  __device__ __forceinline__ static void init(const StageRing& ring) {
    for (int i = 0; i < 2; ++i) barrier_init(told(ring, i), 1);
  }

  // The number of the next tile.
  __device__ __forceinline__ int next() {
    const unsigned turn = count++;
    if (block_in_cluster() == 0) return taken;
    barrier_expect(told(ring, turn), sizeof(int32_t));
    barrier_wait(told(ring, turn), turn / 2 % 2);
    return reinterpret_cast<const int32_t*>(shared + Layout::kNumbers)[turn % 2];
  }

  // Of the tile whose number came last, to be written before its first stage is under way.
  __device__ __forceinline__ Task& task() const {
    return reinterpret_cast<Task*>(shared + Layout::kTaskPlace)[(count - 1) % kTasks];
  }

  // The stages of that tile.
  template <int kBytes, typename Copy>
  __device__ __forceinline__ void copy(Copy copy) {
    const int steps = task().steps;
    copy_stages<kBytes>(ring, steps, [&](uint32_t stage, uint32_t barrier, int step) {
      copy(stage, barrier, step);
      if (block_in_cluster() == 0) {
        // The answer takes a microsecond.
        if (step == max(steps - kStages, 0)) take();
        if (step == steps - 1) tell();
      }
    });
  }

  __device__ __forceinline__ void end() {
    task().kind = kNoMore;
    barrier_wait(ring.empty(), ring.parity ^ 1);
    barrier_arrive(ring.full());
  }

 private:
  static constexpr int kStages = Layout::kStages;

  __device__ __forceinline__ void take() { taken = atomicAdd(dealt, 1); }
  __device__ __forceinline__ void tell() const {
    const uint32_t number = ring.stages + Layout::kNumbers + count % 2 * 4;
    store_to_block(in_block(number, 1), taken, in_block(told(ring, count), 1));
  }
  // The barrier at which the second block waits for the number of a turn.
  __device__ __forceinline__ static uint32_t told(const StageRing& ring, unsigned turn) {
    return ring.barriers + 16 * kStages + turn % 2 * 8;
  }
};

// All tiles, as the warpgroups that multiply learn of them: `one(task, first)`. Whether there were
// any: a cluster that starts late may find none left.
template <typename One>
__device__ __forceinline__ bool for_tasks(const char* shared, StageRing& ring, One one) {
  const Task* tasks = reinterpret_cast<const Task*>(shared + Layout::kTaskPlace);
#pragma unroll 1
  for (unsigned count = 0;; ++count) {
    const Task& task = tasks[count % kTasks];
    barrier_wait(ring.full(), ring.parity);
    if (task.kind == kNoMore) return count > 0;
    one(task, count == 0);
  }
}

// The products of a tile. Rows along K: 64 of them for each 64 columns, else K along the rows.
// `prepare()` is called when all but the last products are under way.
template <int kColumns, bool kLeftAlongK, bool kRightAlongK, typename Prepare>
__device__ __forceinline__ void multiply(float (&sum)[kColumns / 2], StageRing& ring, int group,
                                         int steps, bool first_tile, Prepare prepare) {
  constexpr int kLeftStep = kLeftAlongK ? 16 * kRowBytes : 32;
  constexpr int kRightStep = kRightAlongK ? 16 * kRowBytes : 32;
  const uint64_t left = swizzled_descriptor(ring.stages + group * kBoxBytes, 16);
  const uint64_t right = swizzled_descriptor(ring.stages + kLeftBytes, kBoxBytes);
  if (first_tile && group == 1) named_wait<256>(kAheadBarrier);
  const auto multiply_stage = [&](bool add) {
    barrier_wait(ring.full(), ring.parity);
    mma_fence();
    const uint32_t slot = ring.slot * Layout::kStageBytes >> 4;
#pragma unroll
    for (int i = 0; i < kDepth / 16; ++i) {
      mma<__nv_bfloat16, kColumns, kLeftAlongK, kRightAlongK>(
          sum, left + slot + (i * kLeftStep >> 4), right + slot + (i * kRightStep >> 4),
          add || i > 0);
    }
    mma_commit();
  };
  const auto leave_stage = [&](int step) {
    mma_wait<1>();
    if (step > 0) release_before(ring);
    if (first_tile && group == 0 && step == kAhead - 1) named_arrive<256>(kAheadBarrier);
    ring.advance();
  };
#pragma unroll 1
  for (int step = 0; step < steps - 1; ++step) {
    multiply_stage(step > 0);
    leave_stage(step);
  }
  multiply_stage(true);
  prepare();
  leave_stage(steps - 1);
  mma_wait<0>();
  release_before(ring);
  keep(sum);
}

// The sum over a warp, to its first lane.
__device__ __forceinline__ double sum_of_lanes(double x) {
#pragma unroll
  for (int lanes = 16; lanes > 0; lanes /= 2) x += __shfl_xor_sync(kAllLanes, x, lanes);
  return x;
}

// Sums over tiles, of each thread its own: in fp64, as which tiles a block has is not the same in
// every run, and the results are fp32.
struct Totals {
  double* of_threads;  // kNumbers of each

  __device__ __forceinline__ double& of_thread(int number) const {
    return of_threads[number * 128 + group_thread()];
  }
  __device__ __forceinline__ void clear(int numbers) const {
    for (int i = 0; i < numbers; ++i) of_thread(i) = 0;
  }
  __device__ __forceinline__ void add(int number, float x) const { of_thread(number) += x; }

  // Stores a sum over a warpgroup's threads.
  __device__ __forceinline__ void store(int number, int group, double* sums) const {
    const int thread = group_thread();
    named_wait<128>(kGroupBarrier + group);
    if (thread >= 32) return;
    double x = 0;
    for (int i = thread; i < 128; i += 32) x += of_threads[number * 128 + i];
    x = sum_of_lanes(x);
    if (thread == 0) sums[static_cast<int>(blockIdx.x) * kGroups + group] = x;
  }
};

}  // namespace contrastive
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// What the kernels of linear layers are made of: tiles of 256 rows that the two blocks of a cluster
// share, and the ring of stages through which rows and weights come.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "common/hopper.h"
#include "common/pairs.h"
#include "vlmkernels.h"

namespace vlmk {
namespace activated_linear {

using namespace pairs;

constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
// A named barrier, for the second warpgroup to wait for the first.
constexpr int kAheadBarrier = 1;

struct Maps {
  CUtensorMap rows, weight;
};

// Cluster i takes the tiles i, i + clusters, ..., column by column: rows that come from memory for
// the first columns are in L2 for the others.
struct Schedule {
  int32_t tiles;
  int32_t column_tiles;
  int32_t steps;  // stages that a tile takes
};

// kActivation: VLMK_GELU or one of the others.
template <typename Token_, int kColumns_, int kActivation_>
struct Config {
  using Token = Token_;
  static constexpr int kColumns = kColumns_;  // of a tile
  static constexpr int kActivation = kActivation_;
  static constexpr int kSums = kColumns / 2;     // of each thread
  static constexpr int kEights = kColumns / 32;  // of neighbouring columns, of a thread in each row
  static constexpr int kBiasBytes = kColumns * 2;

  static constexpr int kStageBytes = kLeftBytes + kColumns * kRowBytes;
  static constexpr int kStages = (kSharedLimit - 2 * kBiasBytes - 256) / kStageBytes;
  static constexpr int kBias = kStages * kStageBytes;  // of two tiles in turn
  static constexpr int kBarriers = kBias + 2 * kBiasBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
  static_assert(kStageBytes % 1024 == 0 && kStages > kAhead && kSharedBytes <= kSharedLimit);
  static_assert(VLMK_ACTIVATED_LINEAR_MIN_DEPTH >= kEights * kDepth);  // see multiply_tiles
};

}  // namespace activated_linear
}  // namespace vlmk

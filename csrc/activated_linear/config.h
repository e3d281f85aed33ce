// SPDX-License-Identifier: Apache-2.0
// What the kernels of linear layers are made of: tiles of 256 rows that the two blocks of a cluster
// share, and the ring of stages through which rows and weights come. Where what is activated is
// multiplied by a second product, half of a tile's columns are that one's: each block copies the
// weights of one of them.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "common/hopper.h"
#include "common/pairs.h"
#include "vlmkernels.h"

namespace vlmk {
namespace activated_linear {

using namespace pairs;

constexpr int kConsumerRegisters = 232, kProducerRegisters = 40;
// Named barriers: for the second warpgroup to wait for the first, and for the warps of each.
constexpr int kAheadBarrier = 1, kGroupBarrier = 2;
constexpr int kBeforeColumns = 32, kBeforeRowBytes = kBeforeColumns * 2;

struct Maps {
  CUtensorMap rows, weight, up, before;
};

// Cluster i takes the tiles i, i + clusters, ..., in bands of 8 tiles of rows, down the columns of
// a band: at any time 66 clusters read 8 tiles of rows and 9 of columns. In bands of one, LLaVA's
// weights come from memory with each: 2,069 us instead of 2,036 (H200; CLIP-L, SigLIP: no change).
struct Schedule {
  static constexpr int kBand = 8;

  int32_t row_tiles, column_tiles;
  int32_t steps;  // stages that a tile takes

  __host__ __device__ __forceinline__ int32_t tiles() const { return row_tiles * column_tiles; }

  // The first row and the first column of the result, in tiles.
  __device__ __forceinline__ int2 place(int tile) const {
    const int of_band = kBand * column_tiles, band = tile / of_band, rest = tile - band * of_band;
    const int rows = min(kBand, row_tiles - band * kBand), column = rest / rows;
    return make_int2(band * kBand + rest - column * rows, column);
  }
};

// kForward and kBackward are those of a feed-forward that learns: what is activated is stored too,
// or read, and the product multiplied by the slope of the activation there.
enum class Pass { kInference, kForward, kBackward };

// kActivation: VLMK_GELU or one of the others. kGated: whether there is a second product.
template <typename Token_, int kColumns_, int kActivation_, bool kGated_ = false,
          Pass kPass_ = Pass::kInference>
struct Config {
  using Token = Token_;
  using Params = std::conditional_t<kPass_ == Pass::kInference, VlmkActivatedLinearParams,
                                    VlmkFeedForwardParams>;
  static constexpr Pass kPass = kPass_;
  static constexpr int kColumns = kColumns_;  // of a tile's products
  static constexpr int kActivation = kActivation_;
  static constexpr bool kGated = kGated_;
  static constexpr int kProducts = kGated ? 2 : 1;
  static constexpr int kOut = kColumns / kProducts;  // columns of a tile's result
  static constexpr int kSums = kColumns / 2;         // of each thread
  static constexpr int kEights = kOut / 32;  // of neighbouring columns, of a thread in each row
  static constexpr bool kBiased = !kGated && kPass != Pass::kBackward;
  static constexpr int kBiasBytes = kBiased ? kColumns * 2 : 0;

  // A stage has factors of products, and backwards, of the tile that waits, 32 columns of what
  // stood before the activation: these were loaded a stage ahead, and CLIP-L's pass took 327 us
  // (H200).
  static constexpr int kFactorBytes = kLeftBytes + kColumns * kRowBytes;
  static constexpr int kBeforeBytes = kPass == Pass::kBackward ? kRows * kBeforeRowBytes : 0;
  static constexpr int kStageBytes = kFactorBytes + kBeforeBytes;
  static constexpr int kStages = (kSharedLimit - 2 * kBiasBytes - 256) / kStageBytes;
  static constexpr int kBias = kStages * kStageBytes;  // of two tiles in turn
  static constexpr int kBarriers = kBias + 2 * kBiasBytes;
  static constexpr int kSharedBytes = kBarriers + 2 * kStages * 8;
  static_assert(kStageBytes % 1024 == 0 && kStages > kAhead && kSharedBytes <= kSharedLimit);
  // See multiply_tiles.
  static_assert(VLMK_ACTIVATED_LINEAR_MIN_DEPTH >= kEights * kDepth && kEights >= kAhead);
};

}  // namespace activated_linear
}  // namespace vlmk

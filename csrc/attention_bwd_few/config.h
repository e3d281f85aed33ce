// SPDX-License-Identifier: Apache-2.0
// What a variant of attention's backward kernel is made of: tiles, layout of shared memory, stages.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "attention/config.h"
#include "common/hopper.h"
#include "common/launch.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd_few {

using attention::kPanel;
using attention::kRowBytes;
using attention::Ring;

constexpr int kMaxSplits = 8;  // blocks of a cluster
constexpr int kMaxStages = 4;
constexpr int kMaxWidth = 128;

struct PanelMaps {
  CUtensorMap queries, dout, keys, values, dk, dv;
};
struct Maps {
  PanelMaps whole, last;  // the last panel's, where that is narrow
};

// A row is a query of one of the heads that read the block's key head, head by head.
template <typename T, int kWidth_, int kRows_>
struct Config {
  using Element = T;
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr int kWidth = kWidth_;  // columns of a head
  static constexpr int kRows = kRows_;
  // Warpgroups. Each has 64 keys of a tile and, of dQ, all columns or one panel of two.
  static constexpr int kGroups = kWidth > 64 && kRows > 64 ? 2 : 1;
  static constexpr int kThreads = 128 * kGroups;
  static constexpr int kKeys = 64 * kGroups;  // of a tile
  // The last panel is as narrow as its columns, in shared memory too: see attention_few/config.h.
  using Columns = attention::Panels<kWidth>;
  static_assert(Columns::kRow == 2 * kWidth);  // nothing is filled up
  static constexpr int kPanels = Columns::kCount;
  static constexpr int kLastColumns = Columns::kLast;
  static constexpr bool kNarrow = Columns::kNarrow;
  static constexpr int kOwnPanels = kPanels / kGroups;
  // Of a multiprocessor: as many as have registers for their sums.
  static constexpr int kBlocks = kWidth <= 64 ? (kRows <= 32   ? 4
                                                 : kRows <= 64 ? 3
                                                               : 2)
                                              : (kRows <= 16   ? 3
                                                 : kRows <= 64 ? 2
                                                               : 1);
  // dK beside dV in registers, where these are there.
  static constexpr int kSums = kOwnPanels * kRows / 2 + kRows / 2 + kWidth;
  static constexpr bool kTogether = kRows < 128 && kSums + 50 <= 65536 / (kBlocks * kThreads);

  // As many stages as fit of a tile of keys and one of values.
  static constexpr int kRowsBytes = kRows * Columns::kRow;
  static constexpr int kScoresBytes = kGroups * kRows * kRowBytes;
  static constexpr int kTileBytes = kKeys * Columns::kRow;
  static constexpr int kExtraBytes = kRows * 16 + (1 + 2 * kMaxStages) * 8;
  static constexpr int kRoom = (228 * 1024 / kBlocks - 1024) / 16 * 16;  // the driver takes 1 KB
  static constexpr int kFitting =
      (kRoom - 2 * kRowsBytes - kScoresBytes - kExtraBytes) / (2 * kTileBytes);
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static_assert(kStages >= 2 && kRowsBytes % 1024 == 0 && kTileBytes % 1024 == 0);

  // Bytes from the beginning of shared memory.
  static constexpr int kDoutAt = kRowsBytes;
  static constexpr int kScoresAt = 2 * kRowsBytes;
  static constexpr int kStagesAt = kScoresAt + kScoresBytes;
  static constexpr int kSumsAt = kStagesAt + kStages * 2 * kTileBytes;
  static constexpr int kRangesAt = kSumsAt + kRows * 8;
  static constexpr int kBarriersAt = kRangesAt + kRows * 8;
  static constexpr int kSharedBytes = kBarriersAt + (1 + 2 * kMaxStages) * 8;
  static_assert(kSharedBytes <= kRoom);
  static_assert(kPanels * kRows * 256 <= kStages * 2 * kTileBytes);  // see store_queries
  static_assert(kPanels * kRows * kRowBytes <= 2 * kRowsBytes);
};

int backward_bfloat16(const VlmkAttentionBwdParams& p, void* stream);
int backward_float16(const VlmkAttentionBwdParams& p, void* stream);

}  // namespace attention_bwd_few
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// What a variant of the attention kernel for few queries is made of: tiles, layout of shared
// memory, stages.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "attention/config.h"
#include "common/hopper.h"
#include "common/launch.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_few {

using attention::kPanel;
using attention::kRowBytes;
using attention::Ring;

constexpr int kMaxWidth = 128;
constexpr int kMaxSplits = 16;  // blocks of a cluster
constexpr int kMaxStages = 6;

struct Maps {
  CUtensorMap queries, keys, values;
  CUtensorMap last_keys, last_values;  // of their last panel, where that is narrow
};

// What blocks take one after another: all rows of a head of keys, or a tile of one head's queries.
struct Items {
  int32_t count;
  int32_t tiles_of_head;  // 0: all rows
  int32_t heads;          // of an image: of keys, or of queries
  int32_t group;          // heads of queries that read a head of keys
};

// A row is a query of one of the heads that read the block's key head, head by head.
// kCapped: with a softcap.
template <typename T, int kWidth_, int kGroups_, bool kCapped_ = false>
struct Config {
  using Element = T;
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr int kWidth = kWidth_;    // columns of a head
  static constexpr int kGroups = kGroups_;  // warpgroups of 64 rows
  static constexpr bool kCapped = kCapped_;
  static constexpr int kRows = kGroups * attention::kGroupQueries;
  static constexpr int kThreads = kGroups * 128;
  static constexpr int kKeys = 64;  // of a tile
  using Columns = attention::Panels<kWidth>;
  static constexpr int kPanels = Columns::kCount;
  // Keys and values have a last panel of as many columns as are left: the copy engine takes as long
  // over a row of a panel whose columns aren't there. Copies alone of 64 x 321 of head dim 96 took
  // 23.5 us instead of 28.5, of head dim 80 21.1 instead of 28.7 (H200).
  static constexpr int kLastColumns = Columns::kLast;
  static constexpr int kLastBytes = 2 * kLastColumns;  // of a row
  static constexpr bool kNarrow = Columns::kNarrow;
  // Of a multiprocessor.
  static constexpr int kBlocks = kGroups == 2 ? 1 : kWidth <= 64 ? 3 : 2;
  static_assert(Columns::kRow == 2 * kWidth && kWidth <= kMaxWidth);  // nothing is filled up

  // As many stages as fit of a tile of keys and one of values.
  static constexpr int kRowsBytes = kPanels * kRows * kRowBytes;
  static constexpr int kTileBytes = kKeys * Columns::kRow;
  static constexpr int kBarrierBytes = (1 + 2 * kMaxStages) * 8;
  static constexpr int kRoom = (228 * 1024 / kBlocks - 1024) / 16 * 16;  // the driver takes 1 KB
  static constexpr int kFitting = (kRoom - kRowsBytes - kBarrierBytes) / (2 * kTileBytes);
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static_assert(kStages >= 2 && kTileBytes % 1024 == 0);

  // Bytes from the beginning of shared memory.
  static constexpr int kStagesAt = kRowsBytes;
  static constexpr int kBarriersAt = kStagesAt + kStages * 2 * kTileBytes;
  static constexpr int kSharedBytes = kBarriersAt + kBarrierBytes;
  static_assert(kSharedBytes <= kRoom);

  // What the blocks of a cluster exchange at the end, where the stages were: sums; a maximum and a
  // sum of weights of each row; what each block's sums count for.
  static constexpr int kSumsAt = kStagesAt;
  static constexpr int kTotalsAt = kSumsAt + kRows * kWidth * 4;
  static constexpr int kSharesAt = kTotalsAt + kRows * 8;
  static_assert(kSharesAt + kMaxSplits * kRows * 4 <= kBarriersAt);
};

// All barriers of a block, as addresses in shared memory.
struct Barriers {
  uint32_t base;

  __device__ uint32_t rows_full() const { return base; }
  __device__ uint32_t full(int stage) const { return base + 8 * (1 + stage); }
  __device__ uint32_t empty(int stage) const { return base + 8 * (1 + kMaxStages + stage); }
};

// Whether rows are tiles of 64 queries of one head, not all that read a head of keys: with a mask,
// where these find room at once (8 x 12 heads of 256 tokens of D 64, causal, 8.4 us instead of
// 10.9, 32 heads of 256 of D 128 11.5 instead of 14.8, H200).
bool in_tiles(const VlmkAttentionParams& p);

// Whether these kernels take the call; those of attention/ take every one.
bool takes(const VlmkAttentionParams& p);

int forward_bfloat16(const VlmkAttentionParams& p, void* stream);
int forward_float16(const VlmkAttentionParams& p, void* stream);

}  // namespace attention_few
}  // namespace vlmk

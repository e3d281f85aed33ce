// SPDX-License-Identifier: Apache-2.0
// What a variant of the attention kernel is made of: tiles, layout of shared memory, registers.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/hopper.h"
#include "common/launch.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

constexpr int kGroupQueries = 64;  // of a warpgroup
constexpr int kMaxStages = 4;
constexpr int kMaxQueryStages = 2;
constexpr int kNoMore = -1;
constexpr int kPanel = 64;  // columns
constexpr int kRowBytes = 2 * kPanel;
constexpr int kTailQueries = 8;  // at most
constexpr int kTailWarps = 3;
constexpr int kMaxSorted = 512;  // entries

// How a tile of queries, keys or results lies in shared memory: in panels of 64 columns, the widest
// that can be swizzled, and in a narrower one what is left, if it is no more than 32. The copy
// engine takes as long for a row of 32 bytes as for one of 128: in panels of 16 columns D 72 at
// 4,096 keys ran at 350 TFLOP/s instead of 430 (H100).
template <int kColumns>
struct Panels {
  static constexpr int kCount = ceil_div(kColumns, kPanel);
  static constexpr int kRest = kColumns - (kCount - 1) * kPanel;
  static constexpr int kLast = kRest <= 16 ? 16 : kRest <= 32 ? 32 : kPanel;  // columns
  static constexpr bool kNarrow = kLast < kPanel;
  static constexpr int kRow = (kCount - 1) * kRowBytes + 2 * kLast;

  static __host__ __device__ constexpr int row_bytes(int panel) {
    return panel == kCount - 1 ? 2 * kLast : kRowBytes;
  }
  // Either half of 16 columns of a row, in a tile of so many rows: words of 16 bytes, which change
  // places by the number of the row.
  template <int kRows>
  static __device__ __forceinline__ uint32_t word_at(int row, int step, int half) {
    const int panel = step / 4, bytes = row_bytes(panel);
    const uint32_t first = row * bytes + ((row * bytes / kRowBytes % (bytes / 16) ^ half) << 4);
    return panel * kRows * kRowBytes + (first ^ step % 4 << 5);
  }
};

struct Maps {
  CUtensorMap queries, keys, values, out;
  CUtensorMap last_queries, last_keys, last_out;  // panels, where they are narrow
};

// What a block works on: its queries' tile, and the keys that any of them sees. Written by the
// producer for the warpgroups that multiply. Read 16 bytes at a time: else nvcc loses sight of it
// being the same for all lanes, and spills registers.
struct alignas(16) Work {
  int32_t batch, head, first_query;
  int32_t first_key;
  int32_t num_tiles;  // of keys; kNoMore behind the last piece of work
  int32_t stop_key;   // behind the last key that any query of the block sees
};

// The order in which blocks take tiles of queries.
struct Schedule {
  int32_t main_queries;  // of a head, in tiles; the others are a tail
  int32_t tiles;         // of all heads
  int32_t tiles_of_head;
  int32_t chunk;          // tiles of a head at a time
  int32_t entries;        // tiles of one head of all images
  int32_t across_images;  // the last entry of all images first, and not all of an image
  int32_t minor;          // how many entries that is: images, or tiles of a head
  int32_t sorted_from;    // the entry from which on they are sorted (order.h)
  // Whoever is free takes the next tile. Else they are dealt out, in turns that shift: the last
  // tile of a head has few rows, and must not always fall to the same blocks.
  int32_t dynamic;
};

// kMasked: with ranges, or causal. Without, every query sees every key. kCapped: with a softcap, of
// which the code would else be 20 to 30 KB of each masked kernel: 1 x 28 heads of 1500, causal,
// took 44.8 instead of 40.5 us (H200, cold).
template <typename T, int kWidth_, int kKeys_, int kGroups_, bool kMasked_, bool kCapped_ = false>
struct Config {
  using Element = T;
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr bool kMasked = kMasked_, kCapped = kCapped_;
  static constexpr int kWidth = kWidth_;                    // columns of a head
  static constexpr int kDepth = ceil_div(kWidth, 16) * 16;  // of queries times keys
  static constexpr int kKeys = kKeys_;                      // of a tile
  static constexpr int kGroups = kGroups_;                  // warpgroups that multiply
  static constexpr int kQueries = kGroups * kGroupQueries;
  // On a multiprocessor. Heads of few queries fill a tile of two warpgroups, and two such blocks
  // hide each other's softmax as four warpgroups do.
  static constexpr int kBlocks = kGroups == 2 && kWidth <= 64 ? 2 : 1;
  static constexpr int kThreads = (kGroups + 1) * 128;
  // What the launch gives to all threads alike, dealt out anew: more than that there is not, and a
  // warpgroup that asks for more waits for ever.
  static constexpr int kLaunchRegisters = 65536 / kBlocks / kThreads / 8 * 8;
  // Tails (tail.h) need more, and are taken apart where that leaves enough for scores, weights,
  // sums and 40 others, and weights are not packed early, as with two warpgroups.
  static constexpr int kTailRegisters = 80;
  static constexpr int registers_beside(int producer) {
    return ((kGroups + 1) * kLaunchRegisters - producer) / kGroups / 8 * 8;
  }
  static constexpr bool kTailsFit =
      kWidth <= 80 && kKeys / 2 + kKeys / 4 + kWidth / 2 + 40 <= registers_beside(kTailRegisters);
  // Where no query of a warpgroup sees more of a tile than this, the rest has no part in the
  // softmax.
  static constexpr int kPart = kMasked ? kKeys / 32 * 16 : 32;
  static_assert(kGroups >= 2 && kGroups <= 4 && (kMasked || !kCapped));
  static_assert(kKeys % 16 == 0 && kKeys <= 256);

  // Values are multiplied across panels, which must be alike for that.
  using Columns = Panels<kDepth>;
  static constexpr int kValuePanels = ceil_div(kWidth, kPanel);

  // As many stages as fit of tiles of keys and of values, and a second one of queries for the next
  // piece of work if there is room.
  static constexpr int kQueryBytes = kQueries * Columns::kRow;
  static constexpr int kKeyBytes = ceil_div(kKeys * Columns::kRow, 1024) * 1024;
  static constexpr int kValueBytes = kKeys * kValuePanels * kRowBytes;
  static constexpr int kBarrierBytes = 1024;  // and Work
  static constexpr int kOrderBytes = kMasked ? 3 * kMaxSorted : 0;
  static constexpr int kExtraBytes = kBarrierBytes + kOrderBytes;
  // Of a block: of two half of 228 KB each, of which the driver takes 1.
  static constexpr int kSharedMost = kBlocks == 1 ? kSharedLimit : 113 << 10;
  static constexpr int kRoom = kSharedMost - kExtraBytes;
  static constexpr int kStageBytes = kKeyBytes + kValueBytes;
  static constexpr int kQueryStages = kRoom >= 2 * (kQueryBytes + kStageBytes) ? 2 : 1;
  // With a second stage, a tile's results are gathered where its queries were.
  static constexpr bool kStaged = kQueryStages == 2;
  // Without a mask all warpgroups see all tiles: the first scores of a tile of queries can always
  // begin before the tile before is stored.
  static constexpr bool kOverlapped = kStaged && !kMasked;
  static constexpr bool kTails = kOverlapped && kTailsFit && kGroups > 2;
  static constexpr int kProducerRegisters = kTails         ? kTailRegisters
                                            : kBlocks == 2 ? 24
                                            : kGroups == 2 ? 40
                                                           : 32;
  static constexpr int kConsumerRegisters = registers_beside(kProducerRegisters);
  // A tile is weighed with the maximum at hand, and its keys are kept until that turns out to do.
  // Where two stages of keys are all there is, that costs more than it saves: D 104 3 %, D 256 2 %
  // (H100).
  static constexpr bool kTrusting = kWidth <= 96 || kWidth == 128;
  // Weights are packed beside the exponentials of the others, where registers allow it: 2 to 4 %,
  // with a mask up to 7 % (H200). Four warpgroups hide it anyway.
  static constexpr bool kPackEarly =
      (kGroups == 2 && kBlocks == 1) || (kGroups == 3 && (!kTrusting || !kMasked || kWidth < 96));
  // Four warpgroups have no registers for what a mask takes: it is read again.
  static constexpr bool kTight = kMasked && kGroups * kBlocks == 4;
  // The next warpgroup's turn comes as soon as this one's scores are under way, not its sums too.
  // 1 to 3 % faster here; tiles of 96 keys at D 64 to 96 lose 4 to 13 %, of 80 up to 3 % (H200).
  static constexpr bool kTurnOfScores = kWidth > 96;
  static constexpr int kFitting = (kRoom - kQueryStages * kQueryBytes) / kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static_assert(kStages >= 2);

  // Bytes from the beginning of shared memory.
  static constexpr int kKeysAt = kQueryStages * kQueryBytes;
  static constexpr int kValuesAt = kKeysAt + kStages * kKeyBytes;
  static constexpr int kBarriersAt = kValuesAt + kStages * kValueBytes;
  static constexpr int kWorkAt = kBarriersAt + (4 * kMaxStages + 2 * kMaxQueryStages) * 8;
  // Of each warpgroup's queries: lo, hi, full_lo, full_hi.
  static constexpr int kBoundsAt = kWorkAt + kMaxQueryStages * static_cast<int>(sizeof(Work));
  static constexpr int kOrderAt = kBarriersAt + kBarrierBytes;
  // What two of the tail's warps have for the third: sums, maxima, sums of weights.
  static constexpr int kExchangeAt = kBarriersAt + kExtraBytes;
  static constexpr int kExchangeBytes =
      kTails ? (kTailWarps - 1) * 32 * (ceil_div(kWidth, 16) * 4 + 4) * 4 : 0;
  static constexpr int kSharedBytes = kExchangeAt + kExchangeBytes;
  static_assert(kSharedBytes <= kSharedMost);
};

// All barriers of a block, as addresses in shared memory.
struct Barriers {
  uint32_t base;

  __device__ uint32_t queries_full(int stage) const { return at(stage); }
  __device__ uint32_t queries_empty(int stage) const { return at(kMaxQueryStages + stage); }
  __device__ uint32_t keys_full(int stage) const { return at(kFirst + stage); }
  __device__ uint32_t keys_empty(int stage) const { return at(kFirst + kMaxStages + stage); }
  __device__ uint32_t values_full(int stage) const { return at(kFirst + 2 * kMaxStages + stage); }
  __device__ uint32_t values_empty(int stage) const { return at(kFirst + 3 * kMaxStages + stage); }

 private:
  static constexpr int kFirst = 2 * kMaxQueryStages;
  __device__ uint32_t at(int index) const { return base + 8 * index; }
};

// A place in a ring of stages, and the parity of its turn.
template <int kStages>
struct Ring {
  int stage = 0;
  uint32_t parity;
  __device__ explicit Ring(uint32_t first_parity) : parity(first_parity) {}
  __device__ void advance() {
    if (++stage == kStages) {
      stage = 0;
      parity ^= 1;
    }
  }
};

// With a softcap too, as only masked variants have one.
inline bool needs_mask(const VlmkAttentionParams& p) {
  return p.causal || p.start || p.softcap > 0;
}

// Refuses strides that the copy engine can't use; of a size up to 1 they don't matter.
int check_strides(const char* name, int64_t rows, int64_t heads, int64_t batch, int64_t stride_s,
                  int64_t stride_h, int64_t stride_b);

// A number that is 0, by which a launch's blocks count, and which they leave as 0.
int find_counter(const VlmkAttentionParams& p, void* stream, int32_t*& counter);

int forward_bfloat16(const VlmkAttentionParams& p, void* stream);
int forward_float16(const VlmkAttentionParams& p, void* stream);

}  // namespace attention
}  // namespace vlmk

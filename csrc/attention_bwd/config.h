// SPDX-License-Identifier: Apache-2.0
// What a variant of attention's backward kernel is made of: tiles, layout of shared memory,
// registers; and how the workspace is laid out.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <type_traits>

#include "attention/config.h"
#include "common/hopper.h"
#include "common/launch.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

using attention::kNoMore;
using attention::Ring;

constexpr int kQueries = 64;    // of a tile
constexpr int kScoreRow = 128;  // bytes, of 64 keys' dS
constexpr int kTail = 16;     // of a head's last tile, if it has no more: 197 and 577 leave 5 and 1
constexpr int kLastKeys = 8;  // at most: see last_keys.h
constexpr int kChunk = 2;     // tiles of keys: see Schedule
constexpr int kKeyGroups = 2;
constexpr int kMaxWidth = 256;
constexpr int kMaxStages = 4;
constexpr int kMaxScoreStages = 3;

struct Maps {
  CUtensorMap queries, dout, keys, values, dk, dv;
  CUtensorMap query_ends, dout_ends;  // with Sums::kBehind
};

// A tile of keys, with all queries that see any of them, of all heads that read its head. Written
// by the producer for the others, as is what they need to know of a tile of queries.
struct alignas(16) Item {
  int32_t batch, head, first_key;
  int32_t count;   // tiles of queries of one head; kNoMore behind the last item
  int32_t tail;    // whether the last of them is short, which those of wide heads never are
  int32_t lo, hi;  // the hull of the keys that are seen
  int32_t done;    // which counter it goes into (Counters::done)
};

struct alignas(16) QueryTile {
  uint32_t flags;
  int32_t batch, head, first_query;
  int32_t dq;  // which of the tiles of sums in memory is its own
};
constexpr uint32_t kMasked = 1;  // not all queries see all keys
constexpr uint32_t kFirst = 2;   // this is the first tile of keys that any of the queries sees
constexpr uint32_t kLast = 4;    // or the last

// Where the sums of dQ are kept, and in which order blocks take the tiles of keys.
struct Schedule {
  int32_t tiles_of_head;
  int32_t items;  // tiles of keys of all heads
  // A block takes whole heads: nobody else adds to their dQ. Else blocks share out the tiles and
  // add to dQ in memory, in the order in which they come.
  int32_t whole;
  int32_t chunk, chunks;  // tiles of a head at a time, and how often: with a mask kChunk, else all
  int32_t masked;
  // That tiles have; those behind go with a head's last one (last_keys.h).
  int32_t main_keys;
  // The query heads that read a head of keys may be shared out, as if there were so many heads of
  // keys: dK and dV of these parts are added up in memory (parts.h).
  int32_t parts;
  int32_t image_heads;  // of keys, or parts of them
  int32_t heads;        // the same, of the whole batch
  int32_t cleared;      // of them, those whose sums of dQ the kernel before has cleared
  int32_t group_heads;  // of queries, that read one of them

  __host__ __device__ int32_t counters() const { return 3 + heads * (1 + chunks); }
};

// The workspace, in bytes from its beginning.
struct Workspace {
  int64_t sums;                   // [batch, num_heads, tiles]: see store_sums
  int64_t query_ends, dout_ends;  // [batch, num_heads, tiles, kQueries, kEndColumns]
  int64_t ranges;  // [batch or 1, tiles]: of two queries two first keys, two numbers of keys
  int64_t q_bounds, k_bounds;  // of vlmk_tile_bounds
  int64_t counters;
  int64_t part_counters;  // of each warp's 16 keys, the parts that have been added
  int64_t part_sums;      // of each warpgroup's dV and dK: see parts.h
  int64_t zeros_end;      // of what begins as zeros: counters and what follows them
  int64_t last_keys;      // fp32 sums of dV and dK, of each block
  int64_t dq;             // fp32 sums, tile by tile, in the order in which a warpgroup holds them
  int64_t bytes;
};

// All barriers of a block, as addresses in shared memory.
struct Barriers {
  static constexpr int kScores = 4, kQueriesFull = kScores + 2 * kMaxScoreStages;
  static constexpr int kValues = kQueriesFull + 2 * kMaxStages;
  static constexpr int kCount = kValues + 2;
  uint32_t base;

  __device__ uint32_t keys_full(int stage) const { return at(stage); }
  __device__ uint32_t keys_empty(int stage) const { return at(2 + stage); }
  __device__ uint32_t values_full() const { return at(kValues); }  // where they are alone
  __device__ uint32_t values_empty() const { return at(kValues + 1); }
  __device__ uint32_t scores_full(int stage) const { return at(kScores + stage); }
  __device__ uint32_t scores_empty(int stage) const {
    return at(kScores + kMaxScoreStages + stage);
  }
  __device__ uint32_t queries_full(int stage) const { return at(kQueriesFull + stage); }
  __device__ uint32_t queries_empty(int stage) const {
    return at(kQueriesFull + kMaxStages + stage);
  }

 private:
  __device__ uint32_t at(int index) const { return base + 8 * index; }
};

// The width of the variant that takes heads of so many columns. With a softcap there are those of
// 64, 128 and 256 alone: the heads of the models that have one are of 128 and 256.
constexpr int width_for(int columns, bool capped) {
  return columns <= 64   ? 64
         : capped        ? ceil_div(columns, 128) * 128
         : columns <= 88 ? ceil_div(columns, 8) * 8
         : columns <= 96 ? 96
                         : ceil_div(columns, 64) * 64;
}

// Of a tile: 64 of each of two warpgroups. Above 128 columns the two share 64, as their registers
// hold the sums of no more.
constexpr int keys_of_tile(int width) { return width <= 128 ? 128 : 64; }

// What a query adds to its scores and to dP. Read as numbers, two of them, they are a fifth of all
// that passes through shared memory (D 64, H200), as 8 threads read alike. Up to 64 columns they
// are further columns of Q and dO that lie apart, 16 bytes for each of the two, which keys of
// constants multiply (KeyGroup::start_product). At 72 they lie in columns that products take along
// anyway, as their depth is 80: the workspace has the last 16 columns of Q and dO, where they are
// the latter 8. That takes 3.17 instead of 3.63 ms where blocks share heads (4096 tokens, H200),
// but 0.78 instead of 0.74 where each has whole ones (729). Wider heads have no room for either,
// and a softcap comes before the log-sum-exp is subtracted.
enum class Sums { kNumbers, kApart, kBehind };
constexpr Sums sums_of(int width, bool whole_heads, bool capped) {
  if (capped) return Sums::kNumbers;
  return width <= 64 ? Sums::kApart : width == 72 && !whole_heads ? Sums::kBehind : Sums::kNumbers;
}
// Bytes of a query: in a table, and of each of its rows' ends.
constexpr int bytes_of_query(Sums sums) {
  return sums == Sums::kApart ? 32 : sums == Sums::kBehind ? 0 : 8;
}
// Whether the warpgroup of dQ takes a head's last few keys (last_keys.h). At 72 columns those of
// keys, which have them in registers, leave none for it.
constexpr bool takes_last_keys(int width, bool capped) {
  return width <= 88 && width != 72 && !capped;
}
// Of a block: four numbers of each thread, for dV and dK, and every fourth 16 columns.
constexpr int bytes_of_last_keys(int width) { return 2 * ceil_div(width, 64) * 128 * 16; }
constexpr int kEndsFrom = 64;  // what lies in them instead: the last 8 columns of 72, then a number
constexpr int kEndColumns = 16, kEndBytes = kEndColumns * 2;

// A number in 16-bit floats: three of them, with these weights. fp16 has neither the bits nor the
// range for less.
__device__ constexpr float kParts[] = {32768, 1, 1.f / 4096};
constexpr float kLargest = 65504;  // of fp16

// kWhole: blocks have whole heads. Else they share them, and what each needs of the other is some
// 20 KB of code that a launch may find in no cache.
template <typename T, int kWidth_, bool kWhole_, bool kCapped_ = false>
struct Config {
  using Element = T;
  static constexpr bool kWhole = kWhole_;
  static constexpr bool kCapped = kCapped_;  // with a softcap
  static constexpr bool kHalf = std::is_same_v<T, __half>;
  static constexpr int kWidth = kWidth_;                    // columns of a head
  static constexpr int kDepth = ceil_div(kWidth, 16) * 16;  // of queries times keys
  // Rows of queries, dout, keys and values lie in panels of so many columns. Where 64 would leave
  // most of the second panel empty there is room for a stage of queries more: with two, those of
  // keys waited for queries for a third of their time (D 72, 729 tokens, H200). And half of 192
  // columns are no panels of 64.
  static constexpr int kPanel = (kWidth > 64 && kWidth <= 96) || kWidth == 192 ? 32 : 64;
  static constexpr int kRowBytes = 2 * kPanel;  // over which they are swizzled
  static constexpr int kPanels = ceil_div(kDepth, kPanel);
  // Where in a row 8 columns are.
  __device__ static constexpr int swizzled(int columns, int row) {
    return columns ^ (kPanel == 64 ? row % 8 : row / 2 % 4);
  }
  static_assert(kWidth <= kMaxWidth);

  // Wide heads leave no registers for a warpgroup of dQ: those of keys have its columns too.
  static constexpr bool kWide = kWidth > 88;
  // And above 128 columns a warpgroup has half of the queries of a tile for its scores, then half
  // of the columns of all sums (halves.h); else half of the keys, and of the columns of dQ alone.
  static constexpr bool kHalves = kWidth > 128;
  static constexpr int kKeys = keys_of_tile(kWidth);
  static constexpr int kItemStages = kHalves ? 1 : 2;
  static constexpr int kOwnColumns = kHalves ? kWidth / 2 : kWidth;  // of dK and dV
  static constexpr int kColumnsOfSums = kHalves ? kWidth / 2 : 64;   // of dQ, of the first group
  static constexpr int kOwnQueries = kHalves ? kQueries / 2 : kQueries;
  __device__ static constexpr int own_key(int group) { return kHalves ? 0 : group * 64; }
  __device__ static constexpr int own_query(int group) { return kHalves ? group * kOwnQueries : 0; }
  static constexpr Sums kSums = sums_of(kWidth, kWhole, kCapped);
  static constexpr bool kSumsInProducts = kSums != Sums::kNumbers;
  static_assert(!(kCapped && kSumsInProducts));
  static constexpr int kGroups = kWide ? kKeyGroups : kKeyGroups + 1;  // that multiply
  static constexpr int kThreads = (kGroups + 1) * 128;                 // and one that copies
  // Warps that tell of an item that what it gives to dQ is in memory.
  static constexpr int kDone = kHalves ? 8 : kWide ? 2 : 4;

  static constexpr bool kTakesLastKeys = kWhole && takes_last_keys(kWidth, kCapped);
  // The warpgroup of dQ has its sums and 28 others, with last keys 40, those of keys what is left
  // of what a block is launched with: whoever asks for more than that waits for ever.
  static constexpr int kRegisters = 65536 / kThreads / 8 * 8 * (kGroups + 1);
  static constexpr int kProducerRegisters = kWide || kTakesLastKeys ? 24 : 32;
  static constexpr int kQueryRegisters = kWide             ? 0
                                         : !kTakesLastKeys ? ceil_div(kWidth / 2 + 28, 8) * 8
                                         : kWidth <= 64    ? 72
                                                           : 88;
  static constexpr int kKeyRegisters =
      (kRegisters - kProducerRegisters - kQueryRegisters) / kKeyGroups / 8 * 8;

  // Keys as left operands are, values where they find room: a softcap's numbers take it.
  static constexpr bool kKeysInRegisters = kWidth < 80;
  static constexpr bool kValuesInRegisters = kWidth <= 64 && !kCapped;

  // Sums of dQ that the copy engine adds (adder.h): where a warpgroup adds itself, it waits until
  // its registers have left.
  static constexpr bool kCopiedSums = kWide && !kHalves;
  // Keys and values of this item and the next, but where sums are copied no other values; as many
  // stages of queries and dout as fit.
  static constexpr int kKeysBytes = kPanels * kKeys * kRowBytes;
  static constexpr int kItemBytes = (2 * kItemStages - kCopiedSums) * kKeysBytes;
  static constexpr int kQueriesBytes = kPanels * kQueries * kRowBytes;
  // dS; of halves both have all keys, and their weights too.
  static constexpr int kScoresBytes = kKeyGroups * kQueries * kScoreRow;
  static constexpr int kScoreStages = 2;
  static constexpr int kSumsBytes = kQueries * bytes_of_query(kSums), kRangesBytes = kQueries * 8;
  static constexpr int kTablesBytes = kSumsBytes + kRangesBytes;
  static constexpr int kStageBytes = 2 * kQueriesBytes + kTablesBytes;
  // dK has a place of its own to be stored from: the keys' is free only once dQ is done.
  static constexpr bool kStaged = kWidth <= 64;
  // And sums of dQ that are to be added, of each warpgroup's columns.
  static constexpr int kStagingBytes = kStaged       ? kKeysBytes
                                       : kCopiedSums ? kQueries * kWidth * 4
                                                     : 0;
  static constexpr int kLastKeysBytes = kTakesLastKeys ? 4 * kKeys * 16 : 0;
  static constexpr int kExtraBytes = 512;  // barriers, Item, QueryTile, staged tiles
  static constexpr int kFitting = (kSharedLimit - kExtraBytes - kItemBytes - kStagingBytes -
                                   kLastKeysBytes - kScoreStages * kScoresBytes) /
                                  kStageBytes;
  static constexpr int kStages = kFitting < kMaxStages ? kFitting : kMaxStages;
  static_assert(kStages >= 2);
  // Where dQ comes a tile later, one more is to be known.
  static constexpr int kTileSlots = kStages + (kWide && !kHalves);

  // Bytes from the beginning of shared memory.
  static constexpr int kQueriesAt = kItemBytes;
  static constexpr int kStagingAt = kQueriesAt + kStages * 2 * kQueriesBytes;
  // Not at the end: memcheck takes the product with a table's columns, a second time in place of
  // zeros (KeyGroup::start_product), to read as many bytes behind them.
  static constexpr int kTablesAt = kStagingAt + kStagingBytes;
  static constexpr int kLastKeysAt = kTablesAt + kStages * kTablesBytes;
  static constexpr int kScoresAt = kLastKeysAt + kLastKeysBytes;
  static_assert(kScoresAt % 1024 == 0);  // the swizzle repeats so often
  static constexpr int kBarriersAt = kScoresAt + kScoreStages * kScoresBytes;
  static constexpr int kItemsAt = kBarriersAt + Barriers::kCount * 8;
  static constexpr int kQueryTilesAt = kItemsAt + 2 * static_cast<int>(sizeof(Item));
  static constexpr int kStagedTilesAt =
      kQueryTilesAt + kTileSlots * static_cast<int>(sizeof(QueryTile));
  static constexpr int kSharedBytes = kStagedTilesAt + kKeyGroups * 4;
  static_assert(kSharedBytes <= kBarriersAt + kExtraBytes && kSharedBytes <= kSharedLimit);

  __device__ static constexpr int keys_at(int stage) {
    return stage * (kCopiedSums ? 1 : 2) * kKeysBytes;
  }
  __device__ static constexpr int values_at(int stage) {
    return kCopiedSums ? 2 * kKeysBytes : keys_at(stage) + kKeysBytes;
  }
  __device__ static constexpr int queries_at(int stage) {
    return kQueriesAt + stage * 2 * kQueriesBytes;
  }
  __device__ static constexpr int dout_at(int stage) { return queries_at(stage) + kQueriesBytes; }
  __device__ static constexpr int sums_at(int stage) { return kTablesAt + stage * kTablesBytes; }
  __device__ static constexpr int ranges_at(int stage) { return sums_at(stage) + kSumsBytes; }
  __device__ static constexpr int scores_at(int stage) { return kScoresAt + stage * kScoresBytes; }
  // Of a warpgroup: sums that are to be added.
  __device__ static constexpr int sums_staging_at(int group) {
    return kStagingAt + group * kQueries * kColumnsOfSums * 4;
  }
};

// What the producer tells the others, in shared memory: of the items, and of tiles of queries.
template <typename C>
__device__ __forceinline__ Item& item_at(char* shared, int stage) {
  return reinterpret_cast<Item*>(shared + C::kItemsAt)[stage];
}
template <typename C>
__device__ __forceinline__ QueryTile& query_tile_at(char* shared, int slot) {
  return reinterpret_cast<QueryTile*>(shared + C::kQueryTilesAt)[slot];
}
// And a warpgroup to its adder: to which of the tiles of sums in memory its own are to be added.
template <typename C>
__device__ __forceinline__ int& staged_tile_at(char* shared, int group) {
  return reinterpret_cast<int*>(shared + C::kStagedTilesAt)[group];
}

int backward_bfloat16(const VlmkAttentionBwdParams& p, void* stream);
int backward_float16(const VlmkAttentionBwdParams& p, void* stream);

int lay_out(const VlmkAttentionBwdParams& p, Schedule& s, Workspace& w);

}  // namespace attention_bwd
}  // namespace vlmk

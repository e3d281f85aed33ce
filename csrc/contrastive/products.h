// SPDX-License-Identifier: Apache-2.0
// From a panel G of the gradient of the logits to those of both features: tiles of G b and of G^T
// a, and how they are added up over panels.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/float16.h"
#include "contrastive/schedule.h"

namespace vlmk {
namespace contrastive {

// The tile of a number, of those that a panel adds to. First come a's, then b's. Returns how often
// the warpgroups have added to it when it is this one's turn.
__device__ __forceinline__ int set_products(Task& task, const Job& p, const Visit& visit, int tile,
                                            int counter) {
  const Panel& panel = visit.panel;
  const int of_a = panel.row_tiles * p.across;
  const bool of_b = tile >= of_a;
  if (of_b) tile -= of_a;
  const int row = tile / p.across * kTile, column = tile % p.across;
  const int turn = of_b ? visit.turn_b : visit.turn_a;
  task.kind = of_b ? kGradientB : kGradientA;
  task.steps = (of_b ? panel.row_tiles : panel.column_tiles) * (kTile / kDepth);
  task.row = (of_b ? panel.first_column : panel.first_row) + row;
  task.column = column * kTile;
  task.kept_row = of_b ? task.row : visit.slot * p.panel_rows + row;
  task.has_sum = turn > 0;
  task.is_last = turn == (of_b ? p.row_panels : p.column_panels) - 1;
  task.counter = counter;
  const int block = task.kept_row / kRows + block_in_cluster();
  task.turns = (of_b ? turns_of_b(p) : turns_of_a(p)) + (block * (p.dim / 64) + column) * kGroups;
  return of_b ? turn : visit.turns_of_slot + turn;
}

__device__ __forceinline__ bool is_narrow(const Job& p, const Task& task) {
  return p.dim - task.column < kTile;
}

template <int kColumns>
__device__ __forceinline__ void copy_products(const Maps& maps, const Visit& visit,
                                              Dealer& dealer) {
  const Panel& panel = visit.panel;
  const Task& task = dealer.task();
  const int rank = block_in_cluster();
  const bool of_b = task.kind == kGradientB;
  const int row = task.row - (of_b ? panel.first_column : panel.first_row) + rank * kRows,
            column = task.column;
  const CUtensorMap& factor = of_b ? maps.factor_a : maps.factor_b;
  const int first_k = of_b ? panel.first_row : panel.first_column;
  constexpr int kBytes = kLeftBytes + kColumns * kRowBytes;
  dealer.copy<kBytes>([&](uint32_t stage, uint32_t barrier, int step) {
    const int k = step * kDepth;
    if (of_b) {
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        copy_tile(stage + i * kBoxBytes, maps.panel_columns, row + 64 * i, panel.kept_row + k, 0, 0,
                  barrier);
      }
    } else {
      copy_tile(stage, maps.panel_rows, k, panel.kept_row + row, 0, 0, barrier);
    }
    // Half of the rows of every box for both blocks.
#pragma unroll
    for (int i = 0; i < kColumns / 64; ++i) {
      copy_tile_to_blocks(stage + kLeftBytes + i * kBoxBytes + rank * (kBoxBytes / 2), factor,
                          column + 64 * i, first_k + k + rank * (kDepth / 2), 0, 0, barrier, 3);
    }
  });
}

// Four bytes of two words, the first of the second being number 4.
template <unsigned kBytes>
__device__ __forceinline__ uint32_t pick_bytes(uint32_t x, uint32_t y) {
  return __byte_perm(x, y, kBytes);
}
// The same of floats. As integers, sums would be copied to other registers while products run.
template <unsigned kBytes>
__device__ __forceinline__ uint32_t pick_bytes(float x, float y) {
  uint32_t bytes;
  asm volatile("prmt.b32 %0, %1, %2, %3;" : "=r"(bytes) : "f"(x), "f"(y), "n"(kBytes));
  return bytes;
}

// Sums of 20 bits: 16 where the result will be, and 4 beside it, or behind them in its rows where
// it has 32. The others are cut off, and taken to be half of the last when the sum is read: neither
// takes an addition. (So infinity comes back as NaN.) A warp keeps those of its 16 rows in an order
// of its own, a thread's 8 neighbours in 16 bytes, and their low bits in a word: a byte has those
// of two, four columns apart.
template <int kColumns, bool kOfB, bool kWide>
struct Sums {
  using Element = std::conditional_t<kWide, float, uint16_t>;
  static constexpr int kChunks = kColumns / 16, kFours = kChunks / 4, kLowStep = kWide ? 2 : 128;
  static constexpr int kEarly = 2;  // fours of chunks that find room in registers beside the sums
  static constexpr uint32_t kKept = 0xfffff000, kHalf = 0x800;
  const Job& p;
  Element* out;  // of the warp's first row
  uint4* low;    // of the thread
  uint4 highs[kEarly][4], lows[kEarly];

  __device__ __forceinline__ Sums(const Job& p, const Task& task, int group) : p(p) {
    const int row = block_in_cluster() * kRows + group * 64, warp = group_thread() / 32;
    out = static_cast<Element*>(kOfB ? p.db : p.da) + int64_t{task.row + row + warp * 16} * p.dim +
          task.column;
    if (kWide) {
      low = reinterpret_cast<uint4*>(out + int64_t{lane_index() / 2} * p.dim + kColumns / 2) +
            lane_index() % 2;
    } else {
      const int64_t block = (task.kept_row + row) / 64;
      low = static_cast<uint4*>(kOfB ? p.low_b : p.low_a) + (block * p.dim + task.column) * 2 +
            group_thread();
    }
  }

  // 64 bytes of eight rows, and then of the other eight.
  __device__ __forceinline__ uint4* high(int chunk) const {
    return reinterpret_cast<uint4*>(out + int64_t{lane_index() / 4 + chunk % 2 * 8} * p.dim) +
           lane_index() % 4 + chunk / 2 * 4;
  }

  __device__ __forceinline__ void load(int four) {
    lows[four % kEarly] = __ldcg(&low[four * kLowStep]);
#pragma unroll
    for (int i = 0; i < 4; ++i) highs[four % kEarly][i] = __ldcg(high(four * 4 + i));
  }

  __device__ __forceinline__ void load_first() {
#pragma unroll
    for (int four = 0; four < kEarly; ++four) load(four);
  }

  __device__ __forceinline__ void add_to(float (&sum)[kColumns / 2]) {
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        float* to = sum + (four * 4 + i) * 8;
        const uint4 high = highs[four % kEarly][i];
        const uint32_t bits = (&lows[four % kEarly].x)[i];
        add_pair<0x5400, 0x7611>(to, bits, high.x);
        add_pair<0x5422, 0x7633>(to + 2, bits, high.y);
        add_pair<0x5400, 0x7611>(to + 4, bits << 4, high.z);
        add_pair<0x5422, 0x7633>(to + 6, bits << 4, high.w);
      }
      if (four + kEarly < kFours) load(four + kEarly);
    }
  }

  __device__ __forceinline__ void keep_sums(const float (&sum)[kColumns / 2]) const {
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      uint4 low_bits;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int at = (four * 4 + i) * 8;
        const auto upper = [&](int j) { return pick_bytes<0x7632>(sum[at + j], sum[at + j + 1]); };
        const auto second_bytes = [&](int j) {
          return pick_bytes<0x5410>(pick_bytes<0x51>(sum[at + j], sum[at + j + 1]),
                                    pick_bytes<0x51>(sum[at + j + 2], sum[at + j + 3]));
        };
        store_global(high(four * 4 + i), make_uint4(upper(0), upper(2), upper(4), upper(6)));
        constexpr uint32_t kUpper = 0xf0f0f0f0;
        (&low_bits.x)[i] = (second_bytes(0) & kUpper) | (second_bytes(4) >> 4 & ~kUpper);
      }
      store_global(&low[four * kLowStep], low_bits);
    }
  }

  // The result, where all lanes have read what lay there.
  __device__ __forceinline__ void store(const float (&sum)[kColumns / 2], float factor) const {
    __syncwarp();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Element* row = out + int64_t{8 * half + lane_index() / 4} * p.dim + lane_index() % 4 * 2;
#pragma unroll
      for (int i = 0; i < kColumns / 8; ++i) {
        const float x = sum[4 * i + 2 * half] * factor, y = sum[4 * i + 2 * half + 1] * factor;
        if constexpr (kWide) {
          *reinterpret_cast<float2*>(row + 8 * i) = make_float2(x, y);
        } else {
          *reinterpret_cast<uint32_t*>(row + 8 * i) = pack<__nv_bfloat16>(x, y);
        }
      }
    }
  }

 private:
  // The first and the second half of a word are the upper bits of two sums.
  template <unsigned kFirst, unsigned kSecond>
  __device__ __forceinline__ static void add_pair(float* to, uint32_t bits, uint32_t high) {
    to[0] += __uint_as_float((pick_bytes<kFirst>(bits, high) & kKept) | kHalf);
    to[1] += __uint_as_float((pick_bytes<kSecond>(bits, high) & kKept) | kHalf);
  }
};

// What a tile's products come to: another part of a sum, or with it the result.
template <typename Work, int kColumns, bool kOfB, bool kWide, typename Before>
__device__ __forceinline__ void add_products(const Job& p, const Task& task,
                                             float (&products)[kSums], StageRing& ring, int group,
                                             bool first_tile, Before before) {
  auto& sum = reinterpret_cast<float (&)[kColumns / 2]>(products);
  Sums<kColumns, kOfB, kWide> sums(p, task, group);
  // Loads on a condition would be spilled; what a first part loads is not used.
  multiply<kColumns, kOfB, true>(sum, ring, group, task.steps, first_tile,
                                 [&] { sums.load_first(); });
  before();
  if (task.has_sum) sums.add_to(sum);
  if (task.is_last) {
    sums.store(sum, Work::factor(p));
  } else {
    sums.keep_sums(sum);
  }
}

}  // namespace contrastive
}  // namespace vlmk

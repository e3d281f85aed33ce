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
template <int kColumns>
__device__ __forceinline__ int set_products(Task& task, const Job& p, const Visit& visit, int tile,
                                            int counter) {
  const Panel& panel = visit.panel;
  const int across = p.dim / kColumns, of_a = panel.row_tiles * across;
  const bool of_b = tile >= of_a;
  if (of_b) tile -= of_a;
  const int row = tile / across * kTile, column = tile % across;
  const int turn = of_b ? visit.turn_b : visit.turn_a;
  task.kind = of_b ? kGradientB : kGradientA;
  task.steps = (of_b ? panel.row_tiles : panel.column_tiles) * (kTile / kDepth);
  task.row = (of_b ? panel.first_column : panel.first_row) + row;
  task.column = column * kColumns;
  task.kept_row = of_b ? task.row : visit.slot * p.panel_rows + row;
  task.has_sum = turn > 0;
  task.is_last = turn == (of_b ? p.row_panels : p.column_panels) - 1;
  task.counter = counter;
  const int block = task.kept_row / kRows + block_in_cluster();
  task.turns = (of_b ? turns_of_b(p) : turns_of_a(p)) + (block * (p.dim / 64) + column) * kGroups;
  return of_b ? turn : visit.turns_of_slot + turn;
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

// Sums of 20 bits: 16 where the result will be, and 4 beside it, or behind them in its rows where
// it has 32. A warp keeps those of its 16 rows in an order of its own, a thread's 8 neighbours in
// 16 bytes.
template <int kColumns, bool kOfB, bool kWide>
struct Sums {
  using Element = std::conditional_t<kWide, float, uint16_t>;
  static constexpr int kChunks = kColumns / 16, kFours = kChunks / 4, kLowStep = kWide ? 2 : 128;
  // Fours of chunks that find room in registers beside the sums.
  static constexpr int kEarly = kColumns > 192 ? 2 : 3;
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
      const int64_t tile =
          int64_t{(task.kept_row + row) / 64} * (p.dim / kColumns) + task.column / kColumns;
      low = static_cast<uint4*>(kOfB ? p.low_b : p.low_a) + tile * kFours * 128 + group_thread();
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
        const uint4 high = highs[four % kEarly][i];
        const uint32_t bits = (&lows[four % kEarly].x)[i];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t pair = (&high.x)[j / 2];
          const uint32_t upper = j % 2 ? pair & 0xffff0000 : pair << 16;
          const uint32_t lower = j < 3 ? bits << (12 - 4 * j) : bits >> (4 * j - 12);
          sum[(four * 4 + i) * 8 + j] += __uint_as_float(upper | (lower & 0xf000));
        }
      }
      if (four + kEarly < kFours) load(four + kEarly);
    }
  }

  __device__ __forceinline__ void keep_sums(const float (&sum)[kColumns / 2]) const {
#pragma unroll
    for (int four = 0; four < kFours; ++four) {
      uint4 lows;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        uint4 highs;
        uint32_t bits = 0;
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const float x = sum[(four * 4 + i) * 8 + j];
          // The NaN of a GPU has all bits set, and more would make it a number.
          const uint32_t rounded = x == x ? __float_as_uint(x) + 0x800 : 0x7fc00000;
          bits |= (rounded >> 12 & 15) << 4 * j;
          uint32_t& pair = (&highs.x)[j / 2];
          pair = j % 2 ? pair | (rounded & 0xffff0000) : rounded >> 16;
        }
        store_global(high(four * 4 + i), highs);
        (&lows.x)[i] = bits;
      }
      store_global(&low[four * kLowStep], lows);
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
};

// What a tile's products come to: another part of a sum, or with it the result.
template <typename Work, int kColumns, bool kOfB, bool kWide, typename Before>
__device__ __forceinline__ void add_products(const Job& p, const Task& task,
                                             float (&products)[kSums], StageRing& ring, int group,
                                             bool first_tile, Before before) {
  auto& sum = reinterpret_cast<float (&)[kColumns / 2]>(products);
  Sums<kColumns, kOfB, kWide> sums(p, task, group);
  // On a condition, what is loaded would be spilled. There is memory before a first part, too.
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

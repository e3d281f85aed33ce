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

// The tile of a number, of those that a panel adds to. First come a's, then b's.
struct GradientTile {
  bool of_b;
  int first_row;  // in the panel
  int first_column;
  int row;       // in the gradient
  int kept_row;  // in what is kept beside it
  int turn, last_turn;
  int32_t* turns;    // how often both warpgroups of this block have added to it
  int turns_before;  // how often they have when it is this one's turn

  __device__ __forceinline__ int steps(const Panel& panel) const {
    return (of_b ? panel.row_tiles : panel.column_tiles) * (kTile / kDepth);
  }
};

template <int kColumns>
__device__ __forceinline__ GradientTile gradient_tile(const Job& p, const Visit& visit, int tile) {
  const int across = p.dim / kColumns, of_a = visit.panel.row_tiles * across;
  GradientTile t;
  t.of_b = tile >= of_a;
  if (t.of_b) tile -= of_a;
  t.first_row = tile / across * kTile;
  t.first_column = tile % across * kColumns;
  if (t.of_b) {
    t.row = t.kept_row = visit.panel.first_column + t.first_row;
    t.turn = t.turns_before = visit.turn_b;
    t.last_turn = p.row_panels - 1;
  } else {
    t.row = visit.panel.first_row + t.first_row;
    t.kept_row = visit.slot * p.panel_rows + t.first_row;
    t.turn = visit.turn_a;
    t.turns_before = visit.turns_of_slot + t.turn;
    t.last_turn = p.column_panels - 1;
  }
  const int block = t.kept_row / kRows + block_in_cluster();
  t.turns = (t.of_b ? counters_of_b(p) : counters_of_a(p)) +
            (int64_t{block} * (p.dim / 64) + t.first_column / kColumns) * kGroups;
  return t;
}

template <int kColumns>
__device__ __forceinline__ void copy_products(const Job& p, const Maps& maps, const Visit& visit,
                                              const GradientTile& t, StageRing& ring) {
  const Panel& panel = visit.panel;
  const int rank = block_in_cluster();
  const int row = t.first_row + rank * kRows;
  const CUtensorMap& factor = t.of_b ? maps.factor_a : maps.factor_b;
  const int first_k = t.of_b ? panel.first_row : panel.first_column;
  constexpr int kBytes = kLeftBytes + kColumns * kRowBytes;
  copy_stages<kBytes>(ring, t.steps(panel), [&](uint32_t stage, uint32_t barrier, int step) {
    const int k = step * kDepth;
    if (t.of_b) {
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
                          t.first_column + 64 * i, first_k + k + rank * (kDepth / 2), 0, 0, barrier,
                          3);
    }
  });
}

// lane_index() for what is worked out anew for each tile: nvcc would rather keep all that depends
// on it in registers.
__device__ __forceinline__ int lane_again() {
  int lane;
  asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));
  return lane;
}

// Sums of 20 bits: 16 where the result will be, and 4 beside it, or behind them in its rows where
// it has 32. A warp keeps those of its 16 rows in an order of its own, a thread's 8 neighbours in
// 16 bytes.
template <int kColumns, bool kWide>
struct Sums {
  using Element = std::conditional_t<kWide, float, uint16_t>;
  static constexpr int kChunks = kColumns / 16, kLowStep = kWide ? 2 : 128;
  static constexpr int kVector = 16 / sizeof(Element);
  Element* out;  // of the warp's first row
  uint4* low;    // of the thread
  int dim, lane;

  __device__ __forceinline__ Sums(const Job& p, const GradientTile& t, int group)
      : dim(p.dim), lane(kColumns % 256 ? lane_again() : lane_index()) {
    const int row = block_in_cluster() * kRows + group * 64, warp = group_thread() / 32;
    out = static_cast<Element*>(t.of_b ? p.db : p.da) + int64_t{t.row + row + warp * 16} * dim +
          t.first_column;
    if (kWide) {
      low = reinterpret_cast<uint4*>(out + int64_t{lane / 2} * dim + kColumns / 2) + lane % 2;
    } else {
      const int64_t tile =
          int64_t{(t.kept_row + row) / 64} * (dim / kColumns) + t.first_column / kColumns;
      low = static_cast<uint4*>(t.of_b ? p.low_b : p.low_a) + tile * (kChunks / 4) * 128 +
            group_thread();
    }
  }

  __device__ __forceinline__ uint4* high(int chunk) const {
    const int at = chunk * 32 + lane;
    return reinterpret_cast<uint4*>(out + int64_t{at / (kColumns / 8)} * dim +
                                    at % (kColumns / 8) * kVector);
  }

  __device__ __forceinline__ void add_to(float (&sum)[kColumns / 2]) const {
#pragma unroll
    for (int four = 0; four < kChunks / 4; ++four) {
      if (kWide) stay_behind(dim < 0);  // more of them at a time take more registers
      const uint4 lows = __ldcg(&low[four * kLowStep]);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const uint4 highs = __ldcg(high(four * 4 + i));
        const uint32_t bits = (&lows.x)[i];
#pragma unroll
        for (int j = 0; j < 8; ++j) {
          const uint32_t pair = (&highs.x)[j / 2];
          const uint32_t upper = j % 2 ? pair & 0xffff0000 : pair << 16;
          const uint32_t lower = j < 3 ? bits << (12 - 4 * j) : bits >> (4 * j - 12);
          sum[(four * 4 + i) * 8 + j] += __uint_as_float(upper | (lower & 0xf000));
        }
      }
    }
  }

  __device__ __forceinline__ void keep_sums(const float (&sum)[kColumns / 2]) const {
#pragma unroll
    for (int four = 0; four < kChunks / 4; ++four) {
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
      Element* row = out + int64_t{8 * half + lane / 4} * dim + lane % 4 * 2;
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
__device__ __forceinline__ void add_products(const Job& p, const Visit& visit,
                                             const GradientTile& t, float (&products)[kSums],
                                             StageRing& ring, int group, bool first_tile,
                                             Before before) {
  auto& sum = reinterpret_cast<float (&)[kColumns / 2]>(products);
  multiply<kColumns, kOfB, true>(sum, ring, group, t.steps(visit.panel), first_tile);
  before();
  const Sums<kColumns, kWide> sums(p, t, group);
  if (t.turn > 0) sums.add_to(sum);
  if (t.turn == t.last_turn) {
    sums.store(sum, Work::factor(p));
  } else {
    sums.keep_sums(sum);
  }
}

}  // namespace contrastive
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// Tiles of products a b^T, and what a loss makes of each before it is forgotten.
#pragma once

#include <cstdint>

#include "common/approximate.h"
#include "common/float16.h"
#include "contrastive/config.h"

namespace vlmk {
namespace contrastive {

constexpr float kLn2 = 0.6931471805599453f;
// Row tiles that go through all columns together: with them 66 clusters have 6 column tiles at a
// time, and every band of features comes from L2 after the first.
constexpr int kBand = 11;
constexpr int kEights = kTile / 32;  // of neighbouring columns, of a thread in each of its two rows

// Which of a thread's products is of its row `half`, and of this column of its eight.
__device__ __forceinline__ constexpr int product_at(int eight, int half, int column) {
  return 4 * (column / 2 * kEights + eight) + 2 * half + column % 2;
}

// The factor of the logits, to the base 2. No zero: a product that is hidden must not come to one.
__device__ __forceinline__ float binary_scale(const VlmkContrastiveParams& p) {
  const float scale = *p.scale * kLog2E;
  return fabsf(scale) < 1e-30f ? 1e-30f : scale;
}

// A thread's part of a tile: two rows, and of every 32 columns 8.
struct Part {
  int first_row, first_column;  // of the warpgroup
  int start[2], stop[2];        // the columns that its rows belong to

  __device__ __forceinline__ int row(int half) const {
    return first_row + group_thread() / 32 * 16 + 8 * half + lane_index() / 4;
  }
  __device__ __forceinline__ int column(int eight) const {
    return first_column + 32 * eight + lane_index() % 4 * 8;
  }
  // Whether any row of the warp belongs to any of the columns.
  __device__ __forceinline__ bool near() const {
    bool meets = false;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      meets |= max(start[half], first_column) < min(stop[half], first_column + kTile);
    }
    return __any_sync(kAllLanes, meets);
  }
  __device__ __forceinline__ bool belongs(int half, int column) const {
    return column >= start[half] && column < stop[half];
  }
  // Rows behind the last belong to nothing.
  __device__ __forceinline__ void load_ranges(const VlmkContrastiveParams& p) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const bool valid = row(half) < p.valid_rows;
      start[half] = valid ? p.start[row(half)] : 0;
      stop[half] = valid ? p.stop[row(half)] : 0;
    }
  }
  // Where there are no features, logits of -1e38: nothing to any sum, and their gradient is 0.
  __device__ __forceinline__ void hide_invalid(const VlmkContrastiveParams& p, float scale,
                                               float (&x)[kSums]) const {
    if (first_row + 64 <= p.valid_rows && first_column + kTile <= p.valid_columns) return;
    const float hidden = -copysignf(1e38f / fmaxf(fabsf(scale), 1), scale);
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int columns = row(half) < p.valid_rows ? p.valid_columns - column(eight) : 0;
#pragma unroll
        for (int i = 0; i < 8; ++i) {
          float& product = x[product_at(eight, half, i)];
          if (i >= columns) product = hidden;
        }
      }
    }
  }
};

// The tile of a number: a band of row tiles after the other, column by column.
__device__ __forceinline__ void set_logits(Task& task, const VlmkContrastiveParams& p,
                                           const Panel& panel, int tile, int counter) {
  const int band = tile / (kBand * panel.column_tiles),
            inside = tile % (kBand * panel.column_tiles);
  const int size = min(panel.row_tiles - band * kBand, kBand);
  const int row = (band * kBand + inside % size) * kTile, column = inside / size * kTile;
  task.kind = kLogits;
  task.steps = p.dim / kDepth;
  task.row = panel.first_row + row;
  task.column = panel.first_column + column;
  task.kept_row = panel.kept_row + row;
  task.kept_column = column;
  task.counter = counter;
  task.turns = -1;
}

// Column 32 g + 8 q + 2 u + e of a tile is row 64 u + 8 g + 2 q + e of the map's box: of a
// product's sums, a thread is given two of every eight, and so 8 neighbouring columns.
__device__ __forceinline__ void copy_logits(const Maps& maps, Dealer& dealer) {
  const int rank = block_in_cluster();
  const int row = dealer.task().row + rank * kRows, column = dealer.task().column;
  dealer.copy<Layout::kStageBytes>([&](uint32_t stage, uint32_t barrier, int step) {
    const int k = step * kDepth;
    copy_tile(stage, maps.rows_a, k, row, 0, 0, barrier);
    copy_tile_to_blocks(stage + kLeftBytes + rank * (kTile / 2 * kRowBytes), maps.columns_b, k, 0,
                        column / 8, 2 * rank, barrier, 3);
  });
}

// `Work` has `scale`, to the base 2, and members `begin(part)`, whose loads are under way during
// the products, `prepare()` for when these end, `finish(task, part, products)`, and `end(sums)` for
// behind the last tile; `before()` is called before `finish` stores anything.
template <typename Work, typename Before>
__device__ __forceinline__ void work_on_logits(Work& work, const Task& task,
                                               float (&products)[kSums], StageRing& ring, int group,
                                               bool first_tile, Before before) {
  Part part;
  part.first_row = task.row + block_in_cluster() * kRows + group * 64;
  part.first_column = task.column;
  part.load_ranges(work.p);
  work.begin(part);
  multiply<kTile, false, false>(products, ring, group, task.steps, first_tile,
                                [&] { work.prepare(); });
  part.hide_invalid(work.p, work.scale, products);
  before();
  work.finish(task, part, products);
}

// All tiles of one panel, of which nothing is kept.
template <typename Work>
__global__ void __launch_bounds__(kThreads, 1)
    contrastive_logits_kernel(const __grid_constant__ VlmkContrastiveParams p,
                              const __grid_constant__ Panel panel,
                              const __grid_constant__ Maps maps) {
  extern __shared__ __align__(1024) char shared[];
  const StageRing stages(shared_address(shared));
  if (threadIdx.x == 0) Dealer::init(stages);
  run<kConsumerRegisters, kProducerRegisters>(
      stages,
      [&](const StageRing& ring) {
        Dealer dealer(ring, shared, p.counters + panel.index);
        const int tiles = panel.row_tiles * panel.column_tiles;
#pragma unroll 1
        for (int tile = dealer.next(); tile < tiles; tile = dealer.next()) {
          set_logits(dealer.task(), p, panel, tile, 0);
          copy_logits(maps, dealer);
        }
        dealer.end();
      },
      [&](StageRing ring, int group) {
        float* scratch = reinterpret_cast<float*>(shared + Layout::kScratch);
        Work work(p, group, scratch + group * kScratchFloats);
        float products[kSums];
        for_tasks(shared, ring, [&](const Task& task, bool first) {
          work_on_logits(work, task, products, ring, group, first, [] {});
        });
        work.end(p.sums + int64_t{panel.index} * 3 * p.slots);
      },
      [](int) {});
}

// Where in the panel the gradients of a thread's two rows begin.
struct GradientRows {
  uint16_t* row[2];

  __device__ __forceinline__ GradientRows(const VlmkContrastiveParams& p, const Task& task,
                                          const Part& part) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      row[half] = static_cast<uint16_t*>(p.panel) +
                  int64_t{task.kept_row + part.row(half) - task.row} * p.panel_columns +
                  task.kept_column + part.column(0) - task.column;
    }
  }

  __device__ __forceinline__ void store(int half, int eight, const float (&g)[8]) const {
    store_global(row[half] + 32 * eight,
                 make_uint4(pack<__nv_bfloat16>(g[0], g[1]), pack<__nv_bfloat16>(g[2], g[3]),
                            pack<__nv_bfloat16>(g[4], g[5]), pack<__nv_bfloat16>(g[6], g[7])));
  }
};

}  // namespace contrastive
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// CLIP's forward pass: of each tile the log-sum-exps of its rows and columns, by one exponential
// for both, and what the loss subtracts.
#pragma once

#include "contrastive/logits.h"

namespace vlmk {
namespace contrastive {

// Sums over a warp's 16 rows: `part(eight, columns)` gives a thread's own eight columns of one of
// its eight eights; lane 4 g + q is left with those of eight g. 56 shuffles instead of 192.
template <int kLevel, typename AddUp>
__device__ __forceinline__ void sum_rows(float (&sum)[8], int eight, const AddUp& part) {
  if constexpr (kLevel == 0) {
    part(eight, sum);
  } else {
    float other[8];
    sum_rows<kLevel - 1>(sum, eight, part);
    sum_rows<kLevel - 1>(other, eight + (kEights >> kLevel), part);
    constexpr int kLanes = 32 >> kLevel;
    const bool upper = lane_index() & kLanes;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float kept = upper ? other[i] : sum[i], sent = upper ? sum[i] : other[i];
      sum[i] = kept + __shfl_xor_sync(kAllLanes, sent, kLanes);
    }
  }
}

// The same number, but not so that the compiler knew: it would keep all products with it for later.
__device__ __forceinline__ float again(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

// Exponentials of less than 2^-126 are 0, and sums of more than 2^128 infinite. A sum between these
// has lost nothing that counts.
__device__ __forceinline__ bool is_exact(float sum) { return sum > 0x1p-90f && sum < 0x1p120f; }

struct ClipForward {
  const VlmkContrastiveParams& p;
  int group;
  float* scratch;
  Totals totals;  // to the base 2
  float scale, shift = 0;

  __device__ __forceinline__ ClipForward(const VlmkContrastiveParams& p, int group, float* scratch)
      : p(p),
        group(group),
        scratch(scratch),
        totals{reinterpret_cast<double*>(scratch + kScratchFloats - 256)},
        scale(binary_scale(p)) {
    totals.clear(1);
  }

  __device__ __forceinline__ void meet() const { named_wait<128>(kGroupBarrier + group); }

  __device__ __forceinline__ void begin(const Part&) {}
  __device__ __forceinline__ void prepare() {}

  __device__ __forceinline__ void finish(const Task& task, const Part& part,
                                         const float (&x)[kSums]) {
    if (part.near()) pick(part, x);
    float rows[2] = {0, 0}, columns[8];
    sum_rows<3>(columns, 0, [&](int eight, float (&sum)[8]) {
      stay_behind(p.rows < 0);  // more exponentials at a time take more registers than there are
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const float upper = exp2_approximate(fmaf(x[product_at(eight, 0, i)], scale, -shift));
        const float lower = exp2_approximate(fmaf(x[product_at(eight, 1, i)], scale, -shift));
        rows[0] += upper;
        rows[1] += lower;
        sum[i] = upper + lower;
      }
    });
    add_lanes_of_rows(rows);
    float2 sums = exchange(columns, 0);
    {
      const float2 more[3] = {exchanged(1), exchanged(2), exchanged(3)};
      sums.x = (sums.x + more[0].x) + (more[1].x + more[2].x);
      sums.y = (sums.y + more[0].y) + (more[1].y + more[2].y);
    }
    const bool all = is_exact(rows[0]) && is_exact(rows[1]) && is_exact(sums.x) && is_exact(sums.y);
    if (__any_sync(kAllLanes, named_any<128>(kGroupBarrier + group, !all))) {
      finish_far(task, part, x);
      return;
    }
    store_columns(task, part,
                  make_float2(shift + log2_approximate(sums.x), shift + log2_approximate(sums.y)));
    store_rows(task, part, shift + log2_approximate(rows[0]), shift + log2_approximate(rows[1]));
  }

  __device__ __forceinline__ void end(double* sums) { totals.store(0, group, sums); }

 private:
  __device__ __forceinline__ static void add_lanes_of_rows(float (&rows)[2]) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      rows[half] += __shfl_xor_sync(kAllLanes, rows[half], 1);
      rows[half] += __shfl_xor_sync(kAllLanes, rows[half], 2);
    }
  }

  // What each warp has of the columns, to be read by whoever is to store them: a thread two.
  __device__ __forceinline__ float2 exchange(const float (&columns)[8], int warp) const {
    const int lane = lane_index();
    float4* mine = reinterpret_cast<float4*>(scratch + group_thread() / 32 * kTile + lane / 4 * 32 +
                                             lane % 4 * 8);
    mine[0] = make_float4(columns[0], columns[1], columns[2], columns[3]);
    mine[1] = make_float4(columns[4], columns[5], columns[6], columns[7]);
    meet();
    return exchanged(warp);
  }
  __device__ __forceinline__ float2 exchanged(int warp) const {
    return reinterpret_cast<const float2*>(scratch + warp * kTile)[group_thread()];
  }

  __device__ __forceinline__ void store_columns(const Task& task, const Part& part,
                                                float2 lse) const {
    float* out = p.share_b + int64_t{(task.kept_row + part.first_row - task.row) / 64} * p.columns +
                 part.first_column;
    reinterpret_cast<float2*>(out)[group_thread()] = lse;
  }
  __device__ __forceinline__ void store_rows(const Task& task, const Part& part, float upper,
                                             float lower) const {
    if (lane_index() % 4) return;
    float* out =
        p.share_a + int64_t{part.first_column / kTile} * p.panel_rows + task.kept_row - task.row;
    out[part.row(0)] = upper;
    out[part.row(1)] = lower;
  }

  // A row or a column lies too far from `shift`: each gets a maximum of its own, and the next tile
  // a shift from this one.
  __device__ __forceinline__ void finish_far(const Task& task, const Part& part,
                                             const float (&x)[kSums]) {
    float top[2], rows[2], columns[8];
    const float row_scale = again(scale), column_scale = again(scale);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float most = -INFINITY;
#pragma unroll
      for (int i = 0; i < kSums / 2; ++i) {
        most = fmaxf(most, x[i / 2 * 4 + 2 * half + i % 2] * row_scale);
      }
      most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 1));
      top[half] = fmaxf(most, __shfl_xor_sync(kAllLanes, most, 2));
      rows[half] = 0;
#pragma unroll
      for (int i = 0; i < kSums / 2; ++i) {
        rows[half] +=
            exp2_approximate(fmaf(x[i / 2 * 4 + 2 * half + i % 2], row_scale, -top[half]));
      }
    }
    add_lanes_of_rows(rows);
    store_rows(task, part, top[0] + log2_approximate(rows[0]), top[1] + log2_approximate(rows[1]));
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        stay_behind(p.rows < 0);
        const float upper = x[product_at(eight, 0, i)] * column_scale;
        const float lower = x[product_at(eight, 1, i)] * column_scale;
        float most = fmaxf(upper, lower);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          most = fmaxf(most, __shfl_xor_sync(kAllLanes, most, lanes));
        }
        float sum = exp2_approximate(upper - most) + exp2_approximate(lower - most);
#pragma unroll
        for (int lanes = 4; lanes < 32; lanes *= 2) {
          sum += __shfl_xor_sync(kAllLanes, sum, lanes);
        }
        if (lane_index() / 4 == eight) columns[i] = most + log2_approximate(sum);
      }
    }
    float2 lse = exchange(columns, 0);
#pragma unroll
    for (int warp = 1; warp < 4; ++warp) {
      const float2 other = exchanged(warp);
      lse = make_float2(add_logarithms(lse.x, other.x), add_logarithms(lse.y, other.y));
    }
    store_columns(task, part, lse);
    float& next = scratch[4 * kTile];
    if (group_thread() == 0) next = fabsf(lse.x) < 1e30f ? lse.x : 0;
    meet();
    shift = next;
  }

  __device__ __forceinline__ static float add_logarithms(float x, float y) {
    const float top = fmaxf(x, y);
    return top + log2_approximate(exp2_approximate(x - top) + exp2_approximate(y - top));
  }

  // Adds what the loss subtracts of these logits, to the base 2.
  __device__ __forceinline__ void pick(const Part& part, const float (&x)[kSums]) {
    const float pick_scale = again(scale);
    float picked = 0;
    const int last = p.valid_rows - 1;
    const float row[2] = {p.row_positive[min(part.row(0), last)],
                          p.row_positive[min(part.row(1), last)]};
#pragma unroll
    for (int eight = 0; eight < kEights; ++eight) {
      stay_behind(p.rows < 0);
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        const int column = part.column(eight) + i;
        const float share = p.column_positive[min(column, p.valid_columns - 1)];
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float s = x[product_at(eight, half, i)] * pick_scale;
          if (part.belongs(half, column)) picked += s * (row[half] + share);
        }
      }
    }
    totals.add(0, picked * kLn2);
  }
};

}  // namespace contrastive
}  // namespace vlmk

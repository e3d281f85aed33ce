// SPDX-License-Identifier: Apache-2.0
// The rows of a block: the queries of all heads that read its key head, with what the backward pass
// has to know of each; and their gradients at the end.
#pragma once

#include <cstdint>
#include <type_traits>

#include "attention/ranges.h"
#include "attention/rows.h"
#include "attention_bwd_few/config.h"
#include "common/approximate.h"
#include "common/float16.h"
#include "common/hopper.h"
#include "common/tensor_map.h"
#include "common/threads.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd_few {

using attention::Head;

// All barriers of a block, as addresses in shared memory.
struct Barriers {
  uint32_t base;

  __device__ uint32_t queries_full() const { return base; }
  __device__ uint32_t full(int stage) const { return base + 8 * (1 + stage); }
  __device__ uint32_t empty(int stage) const { return base + 8 * (1 + kMaxStages + stage); }
};

template <typename C>
__device__ __forceinline__ const PanelMaps& maps_of(const Maps& maps, int panel) {
  return C::kNarrow && panel == C::kPanels - 1 ? maps.last : maps.whole;
}

// Starts the copies of the rows of q and dout. By one thread.
template <typename C>
__device__ __forceinline__ void load_queries(const VlmkAttentionBwdParams& p, const Maps& maps,
                                             const Head& head, char* shared, uint32_t barrier) {
  const uint32_t base = shared_address(shared);
  const int first = head.head * head.heads;
  barrier_expect(barrier, 2 * head.rows * C::Columns::kRow);
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    const uint32_t at = base + panel * C::kRows * kRowBytes;
    const PanelMaps& of_panel = maps_of<C>(maps, panel);
    copy_tile(at, of_panel.queries, panel * kPanel, 0, first, p.q_stride_b ? head.batch : 0,
              barrier);
    copy_tile(at + C::kDoutAt, of_panel.dout, panel * kPanel, 0, first,
              p.dout_stride_b ? head.batch : 0, barrier);
  }
}

// What a row subtracts from dP: sum(dout * out) - dlse. Its log-sum-exp goes over to units of log2
// and changes its sign; a row that sees nothing has -inf, which makes its weights zero. Both lie in
// shared memory in pairs of rows: two log-sum-exps, two deltas; then two first keys, and how many
// keys two rows see. Rows behind the last see nothing, and are zero in shared memory.
template <typename C>
__device__ __forceinline__ void prepare_rows(const VlmkAttentionBwdParams& p, const Head& head,
                                             char* shared) {
  using T = typename C::Element;
  constexpr int kLanes = C::kWidth <= 64 ? 8 : 16;  // of a row
  constexpr int kStep = C::kThreads / kLanes;
  constexpr int kSteps = ceil_div(C::kRows, kStep);
  auto* sums = reinterpret_cast<float*>(shared + C::kSumsAt);
  auto* ranges = reinterpret_cast<int*>(shared + C::kRangesAt);
  const int chunk = static_cast<int>(threadIdx.x) % kLanes;
  const auto* dout = static_cast<const T*>(p.dout) + head.batch * p.dout_stride_b + 8 * chunk;
  const auto* out = static_cast<const T*>(p.out) +
                    int64_t{head.batch} * p.num_queries * p.num_heads * p.dim + 8 * chunk;
  // All loads before the first use of one: a block has little else to do meanwhile.
  uint4 x[kSteps], y[kSteps];
  float lse[kSteps], dlse[kSteps];
  int2 range[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int row = step * kStep + static_cast<int>(threadIdx.x) / kLanes;
    const int of_group = row / p.num_queries, query = row - of_group * p.num_queries;
    const int query_head = head.head * head.heads + of_group;
    const bool there = row < head.rows, columns = there && 8 * chunk < p.dim;
    x[step] = load_global(dout + query * p.dout_stride_s + query_head * p.dout_stride_h, columns);
    y[step] = load_global(out + (query * int64_t{p.num_heads} + query_head) * p.dim, columns);
    const int64_t at = (int64_t{head.batch} * p.num_heads + query_head) * p.num_queries + query;
    lse[step] = there ? p.lse[at] : -INFINITY;
    dlse[step] = there && p.dlse ? p.dlse[at] : 0;
    range[step] = there ? attention::range_of_query(p, head.batch, query) : make_int2(0, 0);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const uint32_t a[4] = {x[step].x, x[step].y, x[step].z, x[step].w};
    const uint32_t b[4] = {y[step].x, y[step].y, y[step].z, y[step].w};
    float delta = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float2 u = to_floats<T>(a[i]), v = to_floats<T>(b[i]);
      delta = fmaf(u.x, v.x, fmaf(u.y, v.y, delta));
    }
#pragma unroll
    for (int bit = 1; bit < kLanes; bit *= 2) delta += __shfl_xor_sync(kAllLanes, delta, bit);
    const int row = step * kStep + static_cast<int>(threadIdx.x) / kLanes;
    if (chunk == 0 && row < C::kRows) {
      const int at = row / 2 * 4 + row % 2;
      sums[at] = lse[step] == -INFINITY ? -INFINITY : -lse[step] * kLog2E;
      sums[at + 2] = delta - dlse[step];
      const int2 seen = attention::cut(p, range[step]);
      ranges[at] = seen.x;
      ranges[at + 2] = max(seen.y - seen.x, 0);
    }
  }
#pragma unroll
  for (int panel = 0; panel < C::kPanels; ++panel) {
    const int words = C::Columns::row_bytes(panel) / 16;
    char* at = shared + panel * C::kRows * kRowBytes;
#pragma unroll 1
    for (int i = head.rows * words + static_cast<int>(threadIdx.x); i < C::kRows * words;
         i += C::kThreads) {
      reinterpret_cast<uint4*>(at)[i] = make_uint4(0, 0, 0, 0);
      reinterpret_cast<uint4*>(at + C::kDoutAt)[i] = make_uint4(0, 0, 0, 0);
    }
  }
  fence_async_proxy();
}

// Two numbers of 8 x 8 blocks that wgmma deals out, in rows of a transposed, swizzled panel: to row
// 16 step and on, at the columns that this warp has as rows.
__device__ __forceinline__ void store_columns(uint32_t panel, int step, const uint32_t (&x)[4]) {
  const int lane = lane_index(), warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const uint32_t row = panel + (16 * step + lane / 16 * 8 + lane % 8) * kRowBytes;
  store_transposed(row + ((2 * warp + lane / 8 % 2 ^ lane % 8) << 4), x);
}

// dQ of all blocks of the cluster. Steps of 16 rows of a panel are dealt out to the blocks: each
// adds up its own over all in the order of their ranks, and stores them, by way of where q and dout
// were, in panels of 64 columns.
template <typename C>
__device__ __forceinline__ void store_queries(const VlmkAttentionBwdParams& p, const Head& head,
                                              char* shared,
                                              const float (&dq)[C::kOwnPanels][C::kRows / 2]) {
  constexpr int kSteps = C::kRows / 16;
  const int rank = static_cast<int>(cluster_rank()), ranks = static_cast<int>(cluster_size());
  const int thread = static_cast<int>(threadIdx.x) % 128;
  const int own_panel = static_cast<int>(threadIdx.x) / 128 * C::kOwnPanels;
  const uint32_t base = shared_address(shared);
  if (lane_index() == 0) store_wait_read();
  if (ranks > 1) {
    __syncthreads();
    auto* shares = reinterpret_cast<float4*>(shared + C::kStagesAt);
#pragma unroll
    for (int panel = 0; panel < C::kOwnPanels; ++panel) {
#pragma unroll
      for (int i = 0; i < C::kRows / 8; ++i) {
        const float* x = &dq[panel][4 * i];
        shares[((own_panel + panel) * (C::kRows / 8) + i) * 128 + thread] =
            make_float4(x[0], x[1], x[2], x[3]);
      }
    }
    cluster_sync();
  }
  const auto put = [&](int panel, int step, const float* sums) {
    uint32_t packed[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      packed[i] = pack<typename C::Element>(sums[2 * i] * p.scale, sums[2 * i + 1] * p.scale);
    }
    store_columns(base + (own_panel + panel) * C::kRows * kRowBytes, step, packed);
  };
  if (ranks > 1) {
    constexpr int kUnits = C::kOwnPanels * kSteps;
    // Two at a time while there are two: one waits for memory before the next begins (four images
    // of 64 x 1024 46.1 -> 40.4 us, H200).
    const auto add_up = [&](auto at_once, int own) {
      constexpr int kAtOnce = decltype(at_once)::value;
      float sums[kAtOnce][8] = {};
      for (int other = 0; other < ranks; ++other) {
#pragma unroll
        for (int i = 0; i < kAtOnce; ++i) {
          const int unit = own_panel * kSteps + own + i * ranks;
          const uint32_t at = in_block(base + C::kStagesAt + (2 * unit * 128 + thread) * 16, other);
          const float4 x = load_from_block(at), y = load_from_block(at + 128 * 16);
          sums[i][0] += x.x, sums[i][1] += x.y, sums[i][2] += x.z, sums[i][3] += x.w;
          sums[i][4] += y.x, sums[i][5] += y.y, sums[i][6] += y.z, sums[i][7] += y.w;
        }
      }
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        put((own + i * ranks) / kSteps, (own + i * ranks) % kSteps, sums[i]);
      }
    };
    const int of_rank = ranks - 1;  // a mask: ranks are a power of 2
#pragma unroll 1                    // 24 KB of code else, with 64 rows of 128 columns
    for (int own = (rank - own_panel * kSteps) & of_rank; own < kUnits; own += 2 * ranks) {
      if (own + ranks < kUnits) {
        add_up(std::integral_constant<int, 2>{}, own);
      } else {
        add_up(std::integral_constant<int, 1>{}, own);
      }
    }
  } else {
#pragma unroll
    for (int panel = 0; panel < C::kOwnPanels; ++panel) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) put(panel, step, &dq[panel][8 * step]);
    }
  }
  __syncthreads();
  const int chunks = p.dim / 8;
  for (int i = static_cast<int>(threadIdx.x); i < head.rows * chunks; i += C::kThreads) {
    const int row = i / chunks, chunk = i - row * chunks;
    if ((chunk / 8 * kSteps + row / 16) % ranks != rank) continue;
    const int of_group = row / p.num_queries, query = row - of_group * p.num_queries;
    uint4 x;
    load_shared(base + (chunk / 8 * C::kRows + row) * kRowBytes + ((chunk % 8 ^ row % 8) << 4), x);
    const int64_t of_batch = int64_t{head.batch} * p.num_queries + query;
    const int own = head.head * head.heads + of_group;
    static_cast<uint4*>(p.dq)[of_batch * (p.dq_stride_s / 8) + own * chunks + chunk] = x;
  }
  if (ranks > 1) cluster_sync();  // others may still read this block's shares
}

}  // namespace attention_bwd_few
}  // namespace vlmk

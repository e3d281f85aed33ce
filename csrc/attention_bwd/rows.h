// SPDX-License-Identifier: Apache-2.0
// What comes before the kernel that multiplies: what it has to know of each query, and the zeros
// that sums of dQ begin as, most of which it writes itself.
#pragma once

#include <cstdint>

#include "attention/ranges.h"
#include "attention_bwd/config.h"
#include "attention_bwd/counters.h"
#include "attention_bwd/store.h"
#include "common/approximate.h"
#include "common/float16.h"
#include "common/hopper.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

constexpr int kRowThreads = 256;

template <typename T>
__device__ __forceinline__ float dot(const uint4& x, const uint4& y) {
  const uint32_t a[4] = {x.x, x.y, x.z, x.w}, b[4] = {y.x, y.y, y.z, y.w};
  float sum = 0;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 u = to_floats<T>(a[i]), v = to_floats<T>(b[i]);
    sum = fmaf(u.x, v.x, fmaf(u.y, v.y, sum));
  }
  return sum;
}

// Three 16-bit floats that make up x with the weights of kParts.
template <typename T>
__device__ __forceinline__ void split(float x, float (&parts)[3]) {
  float rest = x;
#pragma unroll
  for (int i = 0; i < 3; ++i) {
    parts[i] = to_floats<T>(pack<T>(rest / kParts[i], 0)).x;
    rest -= parts[i] * kParts[i];
  }
}

// A row of 8 columns with a number in three parts.
template <typename T>
__device__ __forceinline__ uint4 columns_of(float x) {
  float parts[3];
  split<T>(x, parts);
  return make_uint4(pack<T>(parts[0], parts[1]), pack<T>(parts[2], 0), 0, 0);
}

// Of a query its log-sum-exp with its sign changed, and what is added to its dP, which is
// dlse - sum(dout * out). One that sees nothing has a log-sum-exp there that makes its weights
// zero, and so have those behind the last. As numbers, two queries stand together: two
// log-sum-exps, in units of log2, then two of the other. As columns they are in units of the
// scores; apart from Q and dO, all log-sum-exps of the tile come first.
template <typename C>
__device__ __forceinline__ void store_sums(const VlmkAttentionBwdParams& p, const Workspace& w,
                                           int row, float lse, float of_dp) {
  using T = typename C::Element;
  char* workspace = static_cast<char*>(p.workspace);
  const bool sees = lse != -INFINITY;
  if constexpr (C::kSums == Sums::kNumbers) {
    auto* entry =
        reinterpret_cast<float*>(workspace + w.sums + blockIdx.x * int64_t{C::kSumsBytes}) +
        row / 2 * 4 + row % 2;
    entry[0] = sees ? -lse * kLog2E : -INFINITY;
    entry[2] = of_dp;
    return;
  }
  const uint4 of_scores = columns_of<T>(sees ? -lse / p.scale : -kLargest * kParts[0]);
  if constexpr (C::kSums == Sums::kApart) {
    auto* table =
        reinterpret_cast<uint4*>(workspace + w.sums + blockIdx.x * int64_t{C::kSumsBytes});
    table[row] = of_scores;
    table[kQueries + row] = columns_of<T>(of_dp);
  } else {
    const int64_t end = 2 * (blockIdx.x * int64_t{kQueries} + row) + 1;
    reinterpret_cast<uint4*>(workspace + w.query_ends)[end] = of_scores;
    reinterpret_cast<uint4*>(workspace + w.dout_ends)[end] = columns_of<T>(of_dp);
  }
}

template <typename C>
__device__ __forceinline__ void prepare_sums(const VlmkAttentionBwdParams& p, const Workspace& w,
                                             int batch, int head, int tile) {
  using T = typename C::Element;
  char* workspace = static_cast<char*>(p.workspace);
  constexpr int kLanes = C::kWidth <= 64 ? 8 : C::kWidth <= 128 ? 16 : 32;  // of a row
  constexpr int kStep = kRowThreads / kLanes, kSteps = kQueries / kStep;
  const int chunk = static_cast<int>(threadIdx.x) % kLanes;
  const auto* dout =
      static_cast<const T*>(p.dout) + batch * p.dout_stride_b + head * p.dout_stride_h + 8 * chunk;
  const int64_t out_stride = int64_t{p.num_heads} * p.value_dim;
  const auto* out = head_of<const T>(const_cast<void*>(p.out), batch, p.num_queries, out_stride,
                                     head, p.value_dim) +
                    8 * chunk;
  uint4 x[kSteps], y[kSteps];
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int64_t query = tile * kQueries + step * kStep + static_cast<int>(threadIdx.x) / kLanes;
    const bool there = query < p.num_queries && 8 * chunk < p.value_dim;
    x[step] = load_global(dout + query * p.dout_stride_s, there);
    y[step] = load_global(out + query * out_stride, there);
  }
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    const int row = step * kStep + static_cast<int>(threadIdx.x) / kLanes;
    const int query = tile * kQueries + row;
    const int64_t of_row = (int64_t{batch} * p.num_heads + head) * p.num_queries + query;
    float delta = dot<T>(x[step], y[step]);
#pragma unroll
    for (int bit = 1; bit < kLanes; bit *= 2) delta += __shfl_xor_sync(kAllLanes, delta, bit);
    if (chunk == 0) {
      const bool there = query < p.num_queries;
      const float lse = there ? p.lse[of_row] : -INFINITY;
      store_sums<C>(p, w, row, lse, (there && p.dlse ? p.dlse[of_row] : 0) - delta);
    }
    if (C::kSums == Sums::kBehind && chunk == kEndsFrom / 8) {  // the 8 columns before those
      const int64_t end = 2 * (blockIdx.x * int64_t{kQueries} + row);
      const auto* q = static_cast<const T*>(p.q) + batch * p.q_stride_b + head * p.q_stride_h;
      const bool there = query < p.num_queries && kEndsFrom < p.dim;
      reinterpret_cast<uint4*>(workspace + w.query_ends)[end] =
          load_global(q + query * p.q_stride_s + kEndsFrom, there);
      reinterpret_cast<uint4*>(workspace + w.dout_ends)[end] = x[step];
    }
  }
}

// Of queries that see nothing, which are in no tile's sums.
template <typename T>
__device__ __forceinline__ void clear_queries(const VlmkAttentionBwdParams& p, int batch, int head,
                                              int tile) {
  const int chunks = p.dim / 8;
  for (int i = static_cast<int>(threadIdx.x); i < kQueries * chunks; i += kRowThreads) {
    const int query = tile * kQueries + i / chunks;
    const int2 seen = attention::cut(p, attention::range_of_query(p, batch, query));
    if (query >= p.num_queries || seen.x < seen.y) continue;
    T* dq =
        head_of<T>(p.dq, batch, p.num_queries, p.dq_stride_s, head, p.dim) + query * p.dq_stride_s;
    reinterpret_cast<uint4*>(dq)[i % chunks] = make_uint4(0, 0, 0, 0);
  }
}

// The fp32 sums of dQ of a tile of queries, of all tiles of all heads.
template <typename C, int kThreads>
__device__ __forceinline__ void clear_sums(const VlmkAttentionBwdParams& p, const Workspace& w,
                                           int64_t tile, int thread) {
  constexpr int kNumbers = C::kWidth / 8 * 128;
  auto* sums = reinterpret_cast<float4*>(static_cast<char*>(p.workspace) + w.dq) + tile * kNumbers;
#pragma unroll 4
  for (int i = thread; i < kNumbers; i += kThreads) __stcg(sums + i, make_float4(0, 0, 0, 0));
}

// What the kernel that multiplies finds in the workspace. A block has a tile of queries of one
// head. A table of ranges has two first keys and two numbers of keys for each pair of queries.
template <typename C>
__global__ void __launch_bounds__(kRowThreads)
    prepare_rows_kernel(const __grid_constant__ VlmkAttentionBwdParams p,
                        const __grid_constant__ Schedule s, const __grid_constant__ Workspace w) {
  const int num_tiles = ceil_div(p.num_queries, kQueries);
  const int tile = static_cast<int>(blockIdx.x) % num_tiles;
  const int row_of_heads = static_cast<int>(blockIdx.x) / num_tiles;
  const int batch = row_of_heads / p.num_heads, head = row_of_heads - batch * p.num_heads;
  char* workspace = static_cast<char*>(p.workspace);
  prepare_sums<C>(p, w, batch, head, tile);
  if (head == 0 && threadIdx.x < kQueries && (batch == 0 || p.range_stride_b)) {
    const int row = static_cast<int>(threadIdx.x);
    const int2 seen = attention::cut(p, attention::range_of_query(p, batch, tile * kQueries + row));
    int* ranges = reinterpret_cast<int*>(workspace + w.ranges +
                                         (int64_t{batch} * num_tiles + tile) * C::kRangesBytes);
    ranges[row / 2 * 4 + row % 2] = seen.x;
    ranges[row / 2 * 4 + row % 2 + 2] = max(seen.y - seen.x, 0);
  }
  if (s.whole) {
    clear_queries<typename C::Element>(p, batch, head, tile);
    return;
  }
  for (int64_t i = int64_t{blockIdx.x} * kRowThreads + threadIdx.x;
       i < (w.zeros_end - w.counters) / 16; i += int64_t{gridDim.x} * kRowThreads) {
    __stcg(reinterpret_cast<float4*>(workspace + w.counters) + i, make_float4(0, 0, 0, 0));
  }
  if (row_of_heads < s.cleared * s.group_heads) {
    clear_sums<C, kRowThreads>(p, w, blockIdx.x, static_cast<int>(threadIdx.x));
  }
}

// The sums of all other tiles, by warps of the kernel that multiplies which have nothing else to
// do: beside its products this takes no time, and the sums are in L2 when they are added to.
template <typename C>
__device__ __forceinline__ void clear_others(const VlmkAttentionBwdParams& p, const Schedule& s,
                                             const Workspace& w) {
  const Counters counters(p, s, w);
  const int of_head = s.group_heads * ceil_div(p.num_queries, kQueries);
  while (true) {
    int tile = attention::lane_index() == 0 ? atomicAdd(counters.to_clear(), 1) : 0;
    tile = s.cleared * of_head + __shfl_sync(kAllLanes, tile, 0);
    if (tile >= s.heads * of_head) return;
    clear_sums<C, 32>(p, w, tile, attention::lane_index());
    if (C::kCopiedSums) fence_async_proxy_global();
    Counters::add(counters.cleared(tile / of_head));
  }
}

}  // namespace attention_bwd
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The few keys of a head behind a multiple of 128, as a class token leaves them (257, 385): as a
// tile of their own they would cost as much as 64 to 128 others. The warpgroup of dQ takes them
// along with the head's last tile, from the same queries and dO, while it waits for dS.
//
// Each of its warps has 16 of the 64 queries for the scores of these 8 keys, then, of all queries,
// every fourth 16 columns of dK and dV: products of a warp, transposed so that 8 keys are the
// narrow side. Their sums lie in the workspace, where a thread finds what it has left itself.
#pragma once

#include <cstdint>

#include "attention_bwd/config.h"
#include "attention_bwd/keys.h"
#include "attention_bwd/store.h"
#include "common/approximate.h"
#include "common/float16.h"
#include "common/hopper.h"
#include "common/mma.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

constexpr int kLastKeysBarrier = 4;

template <typename C>
struct LastKeys {
  using T = typename C::Element;
  static constexpr int kBlocks = ceil_div(C::kWidth, 16);  // of columns of dK and dV
  static constexpr int kOwnBlocks = ceil_div(kBlocks, 4);

  const VlmkAttentionBwdParams& p;
  const Schedule& schedule;
  const Workspace& workspace;
  char* shared;
  int keys_stage;
  int tile;  // of queries: which of the item's

  __device__ __forceinline__ uint32_t at(int offset) const {
    return shared_address(shared) + offset;
  }

  // Of the warpgroup. Where warps branch by it (head dims 80 and 88), by a shuffle, as ptxas must
  // see that all lanes do the same, or products behind that branch take 10 % more instructions.
  __device__ __forceinline__ int warp() const {
    const int warp = attention::thread_again() / 32 % 4;
    return kBlocks % 4 ? __shfl_sync(kAllLanes, warp, 0) : warp;
  }

  // 16 bytes that this warpgroup keeps: row `row` of 128, column `column`.
  __device__ __forceinline__ uint32_t kept(int row, int column) const {
    return at(C::kLastKeysAt) + (column * C::kKeys + row) * 16;
  }
  // Of a query weights (0) or dS (1).
  __device__ __forceinline__ uint32_t exchange(int query, int which) const {
    return kept(tile % 2 * kQueries + query, which);
  }
  // Of four blocks of 8 columns of the keys (0) or values (1), `block` and on, this lane's row.
  __device__ __forceinline__ uint32_t last_row(int which, int block) const {
    return kept(block * 8 + attention::thread_again() % 32, 2 + which);
  }

  __device__ __forceinline__ void copy(int which, const Item& item, const void* tensor,
                                       int64_t stride_b, int64_t stride_s, int64_t stride_h,
                                       int columns) const {
    const int thread = attention::thread_again() % 128;
    const int key = schedule.main_keys + thread % 8, column = thread / 8 * 8;
    const T* row = static_cast<const T*>(tensor) + item.batch * stride_b + key * stride_s +
                   item.head * stride_h;
    const bool there = key < p.num_keys && column < columns;
    const uint4 x = load_global(row + column, there);
    if (column < C::kDepth) store_shared(kept(thread, 2 + which), x);
  }

  // The products of this warp's 16 queries, in `tile`, with the last keys or values; and of the
  // queries' columns in a table, where sums are kept so.
  __device__ __forceinline__ void multiply(float (&sums)[4], uint32_t tile, uint32_t table,
                                           int which) const {
    const int thread = attention::thread_again(), lane = thread % 32;
    const int row = thread / 32 % 4 * 16 + lane % 16;
    const uint32_t first_chunk = tile + row * C::kRowBytes + (C::swizzled(lane / 16, row) << 4);
    uint32_t b[4];
#pragma unroll
    for (int step = 0; step < C::kDepth / 16; ++step) {
      const int panel = step * 16 / C::kPanel, inside = step * 32 % C::kRowBytes;
      uint32_t a[4];
      load_matrices(a, (first_chunk ^ inside) + panel * kQueries * C::kRowBytes);
      if (step % 2 == 0) load_matrices(b, last_row(which, 2 * step));
      mma_add<T>(sums, a, b[step % 2 * 2], b[step % 2 * 2 + 1]);
    }
    if constexpr (C::kSums == Sums::kApart) {
      uint32_t a[4];
      load_matrices(a, table + row * 16);
      a[2] = a[3] = 0;
      mma_add<T>(sums, a, weights_of_parts<T>(), 0);
    }
  }

  // Weights and dS of this warp's queries, for all warps to read.
  __device__ __forceinline__ void weigh(int stage) const {
    const int thread = attention::thread_again(), lane = thread % 32;
    const int query = thread / 32 % 4 * 16 + lane / 4, count = p.num_keys - schedule.main_keys;
    float scores[4] = {}, dp[4] = {}, lse[2] = {};
    if constexpr (!C::kSumsInProducts) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int row = query + 8 * half;
        const auto* numbers =
            reinterpret_cast<const float*>(shared + C::sums_at(stage)) + row / 2 * 4 + row % 2;
        lse[half] = numbers[0];
        dp[2 * half] = dp[2 * half + 1] = numbers[2];
      }
    }
    multiply(scores, at(C::queries_at(stage)), at(C::sums_at(stage)), 0);
    multiply(dp, at(C::dout_at(stage)), at(C::sums_at(stage) + C::kSumsBytes / 2), 1);
    const float scale = p.scale * kLog2E;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float weight = exp2_approximate(
          C::kSumsInProducts ? scores[i] * scale : fmaf(scores[i], scale, lse[i / 2]));
      scores[i] = lane % 4 * 2 + i % 2 < count ? weight : 0;
      dp[i] *= scores[i];
    }
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int row = query + 8 * half, inside = lane % 4 * 4;
      store_shared(exchange(row, 0) + inside, pack<T>(scores[2 * half], scores[2 * half + 1]));
      store_shared(exchange(row, 1) + inside, pack<T>(dp[2 * half], dp[2 * half + 1]));
    }
  }

  // What a tile of queries adds to this warp's columns of dV (0), by its weights and dO, or of dK
  // (1), by dS and Q.
  __device__ __forceinline__ void add_gradient(int which, uint32_t rows) const {
    const int thread = attention::thread_again(), lane = thread % 32;
    uint32_t right[2][4];
    load_transposed(right[0], exchange(lane, which));
    load_transposed(right[1], exchange(lane + 32, which));
    const int row = lane / 16 * 8 + lane % 8;
#pragma unroll
    for (int n = 0; n < kOwnBlocks; ++n) {
      const int block = warp() + 4 * n;
      if (block >= kBlocks) break;
      constexpr int kOfPanel = C::kPanel / 16;
      const uint32_t from = rows + (block / kOfPanel * kQueries + row) * C::kRowBytes +
                            (C::swizzled(block % kOfPanel * 2 + lane / 8 % 2, row) << 4);
      float sums[4] = {};
#pragma unroll
      for (int step = 0; step < kQueries / 16; ++step) {
        uint32_t a[4];
        load_transposed(a, from + step * 16 * C::kRowBytes);
        mma_add<T>(sums, a, right[step / 2][step % 2 * 2], right[step / 2][step % 2 * 2 + 1]);
      }
      const float4 x = make_float4(sums[0], sums[1], sums[2], sums[3]);
      float4* const there = place(which, n);
      if (tile == 0) {
        __stcg(there, x);
      } else {
        add_to_global(there, x);
      }
    }
  }

  __device__ __forceinline__ float4* place(int which, int n) const {
    return reinterpret_cast<float4*>(static_cast<char*>(p.workspace) + workspace.last_keys) +
           ((blockIdx.x * 2 + which) * kOwnBlocks + n) * 128 + attention::thread_again() % 128;
  }

  __device__ __forceinline__ void begin() const {
    const Item& item = item_at<C>(shared, keys_stage);
    named_wait<128>(kLastKeysBarrier);  // none still reads what the head before has left there
    copy(0, item, p.k, p.k_stride_b, p.k_stride_s, p.k_stride_h, p.dim);
    copy(1, item, p.v, p.v_stride_b, p.v_stride_s, p.v_stride_h, p.value_dim);
    named_wait<128>(kLastKeysBarrier);
  }

  // A tile of queries.
  __device__ __forceinline__ void attend(int stage) const {
    weigh(stage);
    named_wait<128>(kLastKeysBarrier);
    add_gradient(0, at(C::dout_at(stage)));
    add_gradient(1, at(C::queries_at(stage)));
  }

  // dq += dS K: a warpgroup's sums lie in a warp as those of its own products do.
  __device__ __forceinline__ void add_to(float (&dq)[C::kWidth / 2]) const {
    const int thread = attention::thread_again(), lane = thread % 32;
    const int query = thread / 32 % 4 * 16 + lane / 4;
    uint32_t a[4] = {};
    load_shared(exchange(query, 1) + lane % 4 * 4, a[0]);
    load_shared(exchange(query + 8, 1) + lane % 4 * 4, a[1]);
#pragma unroll
    for (int i = 0; i < C::kWidth / 8; i += 4) {
      uint32_t b[4];
      load_transposed(b, last_row(0, i));
#pragma unroll
      for (int j = i; j < i + 4 && j < C::kWidth / 8; ++j) mma_add<T>(&dq[4 * j], a, b[j - i], 0);
    }
  }

  __device__ __forceinline__ void store(int which, void* tensor, int columns, int64_t stride,
                                        float scale) const {
    const int thread = attention::thread_again(), lane = thread % 32;
    const int key = schedule.main_keys + lane / 4;
    const Item& item = item_at<C>(shared, keys_stage);
    T* row = head_of<T>(tensor, item.batch, p.num_keys, stride, item.head, columns) + key * stride;
#pragma unroll
    for (int n = 0; n < kOwnBlocks; ++n) {
      const int block = warp() + 4 * n;
      if (block >= kBlocks) break;
      const float4 x = __ldcg(place(which, n));
      const uint32_t pairs[2] = {transpose_matrix(pack<T>(x.x * scale, x.y * scale)),
                                 transpose_matrix(pack<T>(x.z * scale, x.w * scale))};
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int column = 16 * block + 8 * half + lane % 4 * 2;
        if (key < p.num_keys && column < columns) {
          *reinterpret_cast<uint32_t*>(row + column) = pairs[half];
        }
      }
    }
  }

  // Behind the last tile of queries.
  __device__ __forceinline__ void end() const {
    store(0, p.dv, p.value_dim, p.dv_stride_s, 1);
    store(1, p.dk, p.dim, p.dk_stride_s, p.scale);
  }
};

}  // namespace attention_bwd
}  // namespace vlmk

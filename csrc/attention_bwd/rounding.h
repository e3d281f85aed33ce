// SPDX-License-Identifier: Apache-2.0
// dQ where blocks share heads: a block that finds no more keys turns the fp32 sums of tiles of
// queries into results, while others still have keys. As a kernel of its own this took 2 to 5 %
// longer where blocks are not done at once, as with masks (H200).
#pragma once

#include <cstdint>

#include "attention/ranges.h"
#include "attention_bwd/config.h"
#include "attention_bwd/counters.h"
#include "attention_bwd/producer.h"
#include "attention_bwd/store.h"
#include "common/hopper.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

// Named barriers: all that had anything in shared memory have left it, and rounding may begin.
constexpr int kLeft = 9, kBegun = 10;

template <typename C>
struct Rounding {
  using T = typename C::Element;

  // What a block has to know of a tile of queries, in shared memory.
  struct alignas(16) Chore {
    int32_t query, head;  // its first row in dQ, that of the first image being 0
    int32_t rows;         // that there are from there on; kNoMore behind the last tile
  };

  // All of it lies where other tiles lay before.
  static constexpr int kTileBytes = kQueries * C::kWidth * 4;
  // Each warpgroup has every second tile, and always the same stages.
  static constexpr int kFitting = (C::kBarriersAt - 1024) / kTileBytes / 2 * 2;
  static constexpr int kStages = kFitting < 8 ? kFitting : 8;
  static constexpr int kChoresAt = kStages * kTileBytes;
  static constexpr int kFullAt = kChoresAt + kStages * static_cast<int>(sizeof(Chore));
  static constexpr int kEmptyAt = kFullAt + kStages * 8;
  static_assert(kEmptyAt + kStages * 8 <= C::kBarriersAt);
  static constexpr int kTaken = (128 << 10) / kTileBytes;  // tiles at a time
  // Threads that meet: the warpgroups of keys and the loader, which was the producer, and of those
  // that leave that of dQ or the adders too.
  static constexpr int kBeginning = kKeyGroups * 128 + 32;
  static constexpr int kOfSums = !C::kWide ? 128 : C::kCopiedSums ? kKeyGroups * 32 : 0;
  static constexpr int kLeaving = kBeginning + kOfSums;

  const VlmkAttentionBwdParams& p;
  const Schedule& schedule;
  const Workspace& workspace;
  char* shared;

  __device__ __forceinline__ Counters counters() const { return {p, schedule, workspace}; }
  __device__ __forceinline__ uint32_t at(int offset) const {
    return shared_address(shared) + offset;
  }
  __device__ __forceinline__ Chore& chore_at(int stage) const {
    return reinterpret_cast<Chore*>(shared + kChoresAt)[stage];
  }
  __device__ __forceinline__ uint32_t full(int stage) const { return at(kFullAt + stage * 8); }
  __device__ __forceinline__ uint32_t empty(int stage) const { return at(kEmptyAt + stage * 8); }

  // By all others, when they need nothing any more of what they had in shared memory.
  __device__ __forceinline__ void leave() const {
    fence_async_proxy();
    named_arrive<kLeaving>(kLeft);
  }

  // The warp that takes tiles and has their sums copied to shared memory.
  struct Loader {
    const Rounding& rounding;
    Ring<kStages> ring{1};
    int done = 0;  // chunks that are, as far as this warp knows

    __device__ __forceinline__ int take() const {
      return lane_index() == 0 ? atomicAdd(rounding.counters().to_round(), kTaken) : 0;
    }

    // Until all keys up to a chunk have given what they give.
    __device__ __forceinline__ void wait_for_keys(int chunk) {
      const Schedule& s = rounding.schedule;
      while (done <= chunk) {
        const int own = done + lane_index();
        const int tiles = min(s.chunk, s.tiles_of_head - own % s.chunks * s.chunk);
        const int more = leading(own < s.heads * s.chunks &&
                                 load_acquire(rounding.counters().done(own)) == tiles * C::kDone);
        done += more;
        if (more == 0) __nanosleep(200);
      }
    }

    // Once all others have left.
    __device__ __forceinline__ void begin() const {
      fence_async_proxy();
      named_wait<kLeaving>(kLeft);
      if (lane_index() == 0) {
        for (int stage = 0; stage < kStages; ++stage) {
          barrier_init(rounding.full(stage), 1);
          barrier_init(rounding.empty(stage), 4);
        }
        fence_barrier_init();
      }
      __syncwarp();
      named_arrive<kBeginning>(kBegun);
    }

    __device__ __forceinline__ void run() {
      begin();
      const VlmkAttentionBwdParams& p = rounding.p;
      const Schedule& s = rounding.schedule;
      const int num_tiles = ceil_div(p.num_queries, kQueries);
      const int tiles = p.batch * p.num_heads * num_tiles;
      const char* sums = static_cast<const char*>(p.workspace) + rounding.workspace.dq;
      int next = take();
      while (true) {
        const int first = __shfl_sync(kAllLanes, next, 0), count = min(tiles - first, kTaken);
        if (count <= 0) break;
        next = take();  // an answer takes a while
        // A tile for each lane.
        const int own = min(first + lane_index(), tiles - 1);
        const int row = own / num_tiles, of_head = own - row * num_tiles;
        const int batch = row / p.num_heads, query = of_head * kQueries;
        const Chore chore{batch * p.num_queries + query, row - batch * p.num_heads,
                          p.num_queries - query};
        const int4 bounds = bounds_of_tile(p, s, rounding.workspace, batch, of_head);
        const int first_chunk = row / s.group_heads * s.chunks;
        const int last_chunk = first_chunk + max(bounds.y - 1, 0) / (s.chunk * C::kKeys);
        done = max(done, __shfl_sync(kAllLanes, first_chunk, 0));
#pragma unroll 1
        for (int i = 0; i < count; ++i) {
          wait_for_keys(__shfl_sync(kAllLanes, last_chunk, i));
          fence_async_proxy_global();
          barrier_wait(rounding.empty(ring.stage), ring.parity);
          if (lane_index() == i) {
            rounding.chore_at(ring.stage) = chore;
            const uint32_t barrier = rounding.full(ring.stage);
            barrier_expect(barrier, kTileBytes);
            copy_from_global(rounding.at(ring.stage * kTileBytes), sums + int64_t{own} * kTileBytes,
                             kTileBytes, barrier);
          }
          __syncwarp();
          ring.advance();
        }
      }
      for (int group = 0; group < kKeyGroups; ++group) {
        barrier_wait(rounding.empty(ring.stage), ring.parity);
        if (lane_index() == 0) {
          rounding.chore_at(ring.stage).rows = kNoMore;
          barrier_arrive(rounding.full(ring.stage));
        }
        __syncwarp();
        ring.advance();
      }
    }
  };

  // The warpgroups of the keys, each every second tile.
  __device__ __forceinline__ void round_all(int group) const {
    leave();
    named_wait<kBeginning>(kBegun);
    Ring<kStages> ring{0};
    if (group == 1) ring.advance();
    while (true) {
      barrier_wait(full(ring.stage), ring.parity);
      const Chore chore = chore_at(ring.stage);
      if (chore.rows == kNoMore) return;
      const uint32_t from = at(ring.stage * kTileBytes) + attention::thread_again() % 128 * 16;
      float sums[C::kWidth / 2];
#pragma unroll
      for (int i = 0; i < C::kWidth / 8; ++i) {
        uint4 x;
        load_shared(from + i * 128 * 16, x);
        sums[4 * i] = __uint_as_float(x.x), sums[4 * i + 1] = __uint_as_float(x.y);
        sums[4 * i + 2] = __uint_as_float(x.z), sums[4 * i + 3] = __uint_as_float(x.w);
      }
      release(empty(ring.stage));
      store_rows<T, C::kWidth>(static_cast<T*>(p.dq) + int64_t{chore.head} * p.dim, p.dq_stride_s,
                               chore.query, chore.query + chore.rows, p.dim, sums, p.scale);
      ring.advance();
      ring.advance();
    }
  }
};

}  // namespace attention_bwd
}  // namespace vlmk

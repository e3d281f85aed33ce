// SPDX-License-Identifier: Apache-2.0
// Key ranges of queries -> bounds of query tiles -> bounds of key tiles: what attention skips,
// masks and takes whole. One warp per tile in both kernels: the work is a few loads and reductions,
// so latency is all that counts.
#include <climits>

#include "common/hopper.h"
#include "common/launch.h"
#include "vlmkernels.h"

namespace vlmk {

constexpr int kTile = VLMK_TILE;
constexpr int kWarp = 32;
constexpr int kWarpsPerBlock = 4;

// The tile of this warp, or -1 in the warps past the last tile.
__device__ int64_t warp_tile(int64_t num_tiles) {
  const int64_t tile =
      static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + static_cast<int>(threadIdx.x) / kWarp;
  return tile < num_tiles ? tile : -1;
}

// An empty range is kept as [num_keys, 0): it then widens no hull and empties the intersection,
// without a branch.
__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    query_tile_bounds_kernel(const VlmkTileBoundsParams p, int num_q_tiles) {
  const int64_t tile = warp_tile(static_cast<int64_t>(p.batch) * num_q_tiles);
  if (tile < 0) return;
  const int64_t b = tile / num_q_tiles;
  const int64_t first_row = (tile - b * num_q_tiles) * kTile;
  const int lane = static_cast<int>(threadIdx.x) % kWarp;

  int lo = p.num_keys, hi = 0, full_lo = 0, full_hi = p.num_keys;
#pragma unroll
  for (int i = 0; i < kTile / kWarp; ++i) {
    const int64_t row = first_row + i * kWarp + lane;
    if (row >= p.num_queries) continue;
    int s = max(p.start[b * p.start_stride_b + row * p.start_stride_q], 0);
    int e = min(p.stop[b * p.stop_stride_b + row * p.stop_stride_q], p.num_keys);
    if (s >= e) s = p.num_keys, e = 0;
    lo = min(lo, s);
    hi = max(hi, e);
    full_lo = max(full_lo, s);
    full_hi = min(full_hi, e);
  }
  lo = __reduce_min_sync(kAllLanes, lo);
  hi = __reduce_max_sync(kAllLanes, hi);
  full_lo = __reduce_max_sync(kAllLanes, full_lo);
  full_hi = __reduce_min_sync(kAllLanes, full_hi);
  if (full_lo >= full_hi) full_lo = p.num_keys, full_hi = 0;
  if (lane == 0) reinterpret_cast<int4*>(p.q_bounds)[tile] = make_int4(lo, hi, full_lo, full_hi);
}

// The longest run of set bits, fed in order as words of 32 bits; every lane of a warp holds the
// same one.
struct LongestRun {
  int first = 0, length = 0;            // the longest so far
  int open_first = 0, open_length = 0;  // the run that may go on in the next word

  __device__ void close() {
    if (open_length > length) first = open_first, length = open_length;
    open_length = 0;
  }

  __device__ void push(unsigned word, int position) {
    int done = 0;
    while (done < kWarp) {
      const unsigned rest = word >> done;
      if (rest == 0) return close();
      const int zeros = __ffs(rest) - 1;
      if (zeros > 0) close();
      done += zeros;
      const unsigned inverted = ~(word >> done);  // shifted-in zeros end the run at the word's end
      const int ones = min(inverted == 0 ? kWarp : __ffs(inverted) - 1, kWarp - done);
      if (open_length == 0) open_first = position + done;
      open_length += ones;
      done += ones;
    }
  }
};

__global__ void __launch_bounds__(kWarp* kWarpsPerBlock)
    key_tile_bounds_kernel(const VlmkTileBoundsParams p, int num_q_tiles, int num_k_tiles) {
  const int64_t tile = warp_tile(static_cast<int64_t>(p.batch) * num_k_tiles);
  if (tile < 0) return;
  const int64_t b = tile / num_k_tiles;
  const int begin = static_cast<int>(tile - b * num_k_tiles) * kTile;
  const int end = min(begin + kTile, p.num_keys);
  const int lane = static_cast<int>(threadIdx.x) % kWarp;
  const int4* q_bounds = reinterpret_cast<const int4*>(p.q_bounds) + b * num_q_tiles;

  int first = num_q_tiles, last = 0;
  LongestRun run;
  for (int base = 0; base < num_q_tiles; base += kWarp) {
    const int t = base + lane;
    bool meets = false, full = false;
    if (t < num_q_tiles) {
      const int4 q = q_bounds[t];
      meets = q.x < end && q.y > begin;
      full = q.z <= begin && q.w >= end;
    }
    const unsigned meeting = __ballot_sync(kAllLanes, meets);
    if (meeting) {
      first = min(first, base + __ffs(meeting) - 1);
      last = base + kWarp - __clz(meeting);
    }
    run.push(__ballot_sync(kAllLanes, full), base);
  }
  run.close();
  const bool any = run.length > 0;
  if (lane == 0) {
    reinterpret_cast<int4*>(p.k_bounds)[tile] =
        make_int4(first, last, any ? run.first : num_q_tiles, any ? run.first + run.length : 0);
  }
}

static int launch_tile_bounds(const VlmkTileBoundsParams& p, void* stream) {
  const int num_q_tiles = ceil_div(p.num_queries, kTile);
  const int num_k_tiles = ceil_div(p.num_keys, kTile);
  const int64_t q_blocks = ceil_div<int64_t>(int64_t{p.batch} * num_q_tiles, kWarpsPerBlock);
  const int64_t k_blocks = ceil_div<int64_t>(int64_t{p.batch} * num_k_tiles, kWarpsPerBlock);
  VLMK_CHECK(q_blocks <= INT_MAX && k_blocks <= INT_MAX, "more than 2^31 - 1 blocks");
  const dim3 block(kWarp * kWarpsPerBlock);
  if (q_blocks > 0) {
    const int code =
        launch("query_tile_bounds_kernel", query_tile_bounds_kernel,
               dim3(static_cast<unsigned>(q_blocks)), block, 0, stream, p, num_q_tiles);
    if (code != 0) return code;
  }
  if (k_blocks == 0) return 0;
  return launch("key_tile_bounds_kernel", key_tile_bounds_kernel,
                dim3(static_cast<unsigned>(k_blocks)), block, 0, stream, p, num_q_tiles,
                num_k_tiles);
}

}  // namespace vlmk

int vlmk_tile_bounds(const VlmkTileBoundsParams* params, void* stream) {
  const VlmkTileBoundsParams& p = *params;
  VLMK_CHECK(p.batch >= 0 && p.num_queries >= 0 && p.num_keys >= 0,
             "batch %d, num_queries %d, num_keys %d: none may be negative", p.batch, p.num_queries,
             p.num_keys);
  VLMK_CHECK(p.num_queries <= INT_MAX - VLMK_TILE && p.num_keys <= INT_MAX - VLMK_TILE,
             "num_queries %d, num_keys %d: at most 2^31 - 65", p.num_queries, p.num_keys);
  return vlmk::launch_tile_bounds(p, stream);
}

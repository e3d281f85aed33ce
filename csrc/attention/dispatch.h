// SPDX-License-Identifier: Apache-2.0
// Which variant of the kernel runs, and in which order its blocks take the tiles.
#pragma once

#include <algorithm>
#include <climits>

#include "attention/kernel.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

// How many queries tail.h can take.
inline int tail_of(int num_queries) {
  const int tail = num_queries > kGroupQueries ? num_queries % kGroupQueries : 0;
  return tail <= kTailQueries ? tail : 0;
}

template <typename C>
int run(const VlmkAttentionParams& p, void* stream) {
  int count = 0;
  int code = multiprocessors<attention_kernel<C>, C::kSharedBytes>(count);
  if (code) return code;
  Maps maps;
  code = encode_tensor_map(maps.queries, p.q, C::kHalf, p.batch, p.num_queries, p.num_heads, p.dim,
                           p.q_stride_b, p.q_stride_s, p.q_stride_h, C::kQueries);
  if (code) return code;
  code = encode_tensor_map(maps.keys, p.k, C::kHalf, p.batch, p.num_keys, p.num_kv_heads, p.dim,
                           p.k_stride_b, p.k_stride_s, p.k_stride_h, C::kKeys);
  if (code) return code;
  code = encode_tensor_map(maps.values, p.v, C::kHalf, p.batch, p.num_keys, p.num_kv_heads,
                           p.value_dim, p.v_stride_b, p.v_stride_s, p.v_stride_h, C::kKeys);
  if (code) return code;
  if (C::kStaged) {  // a warp's rows of one head at a time; out is contiguous
    const int64_t row = int64_t{p.num_heads} * p.value_dim;
    code = encode_tensor_map(maps.out, p.out, C::kHalf, p.batch, p.num_queries, p.num_heads,
                             p.value_dim, p.num_queries * row, row, p.value_dim, 16);
    if (code) return code;
  }
  const int main_queries = p.num_queries - (C::kTails ? tail_of(p.num_queries) : 0);
  const int tiles_of_head = ceil_div(main_queries, C::kQueries);
  const int64_t tiles = int64_t{tiles_of_head} * p.batch * p.num_heads;
  VLMK_CHECK(tiles < INT_MAX / 2, "more than 2^30 tiles of queries");
  const int blocks = static_cast<int>(std::min<int64_t>(count, tiles));
  // Chunks of 4 were as fast as others or faster for every mask tried, from windows of 64 tokens to
  // 32,768 tokens, and better than tiles in the order of their rows over all heads that fit in L2
  // (H100: windows 47 -> 82 TFLOP/s).
  const Schedule s{main_queries, static_cast<int32_t>(tiles), tiles_of_head,
                   C::kMasked ? std::min(4, tiles_of_head) : tiles_of_head,
                   C::kMasked && tiles > blocks};
  if (s.dynamic) {
    VLMK_CUDA(cudaMemsetAsync(p.counter, 0, sizeof(int32_t), static_cast<cudaStream_t>(stream)));
  }
  return launch("attention_kernel", attention_kernel<C>, dim3(blocks), dim3(C::kThreads),
                C::kSharedBytes, stream, p, maps, s);
}

// Keys of a tile, and warpgroups of 64 queries.
template <int kKeys_, int kGroups_>
struct Tile {
  static constexpr int kKeys = kKeys_, kGroups = kGroups_;
};

// With a softcap too, whose registers only masked variants have.
inline bool needs_mask(const VlmkAttentionParams& p) {
  return p.causal || p.start || p.softcap > 0;
}

// For heads of a width: with a mask, and without.
template <typename T, int kWidth, typename Masked, typename Dense>
int run_width(const VlmkAttentionParams& p, void* stream) {
  if (needs_mask(p)) {
    return run<Config<T, kWidth, Masked::kKeys, Masked::kGroups, true>>(p, stream);
  }
  return run<Config<T, kWidth, Dense::kKeys, Dense::kGroups, false>>(p, stream);
}

// Whether a masked call takes less time in tiles of 256 queries than of 192: the rounds of tiles
// that the multiprocessors need, times what a tile of 256 takes in percent of the other.
inline bool better_in_256(const VlmkAttentionParams& p, int multiprocessors, int percent) {
  const auto rounds = [&](int queries) {
    const int64_t heads = int64_t{p.batch} * p.num_heads;
    return ceil_div<int64_t>(ceil_div(p.num_queries, queries) * heads, multiprocessors);
  };
  return p.softcap <= 0 && rounds(256) * percent < rounds(192) * 100;
}

// With a mask, or a softcap, in the better of two tiles.
template <typename T, int kWidth>
int run_masked(const VlmkAttentionParams& p, void* stream, int percent) {
  using Narrow = Config<T, kWidth, 96, 3, true>;
  int count = 0;
  const int code = multiprocessors<attention_kernel<Narrow>, Narrow::kSharedBytes>(count);
  if (code) return code;
  if (!better_in_256(p, count, percent)) return run<Narrow>(p, stream);
  return run<Config<T, kWidth, 64, 4, true>>(p, stream);
}

// Whether tiles of 192 queries with a tail take less time than tiles of 256, of which the last may
// hold only few rows: these take 5 % less for a row (H100). A head of one tile gains nothing.
inline bool better_with_tail(int num_queries) {
  const int tail = tail_of(num_queries);
  return tail > 0 && num_queries > 256 &&
         21 * 192 * ceil_div(num_queries - tail, 192) < 20 * 256 * ceil_div(num_queries, 256);
}

// The fastest of the tiles tried on an H100 (docs/attention.md). Four warpgroups hide each other's
// softmax best, but have registers for few columns; up to 256 queries they take a head at once.
template <typename T>
int dispatch(const VlmkAttentionParams& p, void* stream) {
  const int width = std::max(p.dim, p.value_dim);
  if (width <= 64) {
    // A row takes 7 % longer in tiles of 256 with a mask at D 64, 2 % less at D 72 (H200).
    if (needs_mask(p)) return run_masked<T, 64>(p, stream, 143);
    return better_with_tail(p.num_queries) ? run<Config<T, 64, 96, 3, false>>(p, stream)
                                           : run<Config<T, 64, 64, 4, false>>(p, stream);
  }
  if (width <= 72) {
    return needs_mask(p) ? run_masked<T, 72>(p, stream, 130)
                         : run<Config<T, 72, 64, 4, false>>(p, stream);
  }
  if (width <= 80) return run_width<T, 80, Tile<96, 3>, Tile<80, 3>>(p, stream);
  if (width <= 88) return run_width<T, 88, Tile<96, 3>, Tile<80, 3>>(p, stream);
  if (width <= 96) {  // behind the last of few keys a narrower tile wastes less
    return p.num_keys <= 1600 ? run_width<T, 96, Tile<96, 3>, Tile<80, 3>>(p, stream)
                              : run_width<T, 96, Tile<96, 3>, Tile<96, 3>>(p, stream);
  }
  if (width <= 104) return run_width<T, 104, Tile<96, 3>, Tile<96, 3>>(p, stream);
  if (width <= 128) return run_width<T, 128, Tile<128, 2>, Tile<128, 2>>(p, stream);
  return run_width<T, 256, Tile<80, 2>, Tile<80, 2>>(p, stream);
}

}  // namespace attention
}  // namespace vlmk

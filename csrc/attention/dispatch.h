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
int encode_maps(Maps& maps, const VlmkAttentionParams& p) {
  const auto queries = [&](CUtensorMap& map, int columns) {
    return encode_tensor_map(map, p.q, C::kHalf, p.batch, p.num_queries, p.num_heads, p.dim,
                             p.q_stride_b, p.q_stride_s, p.q_stride_h, C::kQueries, columns);
  };
  const auto keys = [&](CUtensorMap& map, int columns) {
    return encode_tensor_map(map, p.k, C::kHalf, p.batch, p.num_keys, p.num_kv_heads, p.dim,
                             p.k_stride_b, p.k_stride_s, p.k_stride_h, C::kKeys, columns);
  };
  const auto out = [&](CUtensorMap& map, int columns) {  // a warp's rows; contiguous
    const int64_t row = int64_t{p.num_heads} * p.value_dim;
    return encode_tensor_map(map, p.out, C::kHalf, p.batch, p.num_queries, p.num_heads, p.value_dim,
                             p.num_queries * row, row, p.value_dim, 16, columns);
  };
  int code = queries(maps.queries, kPanel);
  if (!code) code = keys(maps.keys, kPanel);
  if (!code) {
    code = encode_tensor_map(maps.values, p.v, C::kHalf, p.batch, p.num_keys, p.num_kv_heads,
                             p.value_dim, p.v_stride_b, p.v_stride_s, p.v_stride_h, C::kKeys);
  }
  if (!code && C::kStaged) code = out(maps.out, kPanel);
  if (code || !C::Columns::kNarrow) return code;
  constexpr int kLast = C::Columns::kLast;
  code = queries(maps.last_queries, kLast);
  if (!code) code = keys(maps.last_keys, kLast);
  if (!code && C::kStaged) code = out(maps.last_out, kLast);
  return code;
}

template <typename C>
int run(const VlmkAttentionParams& p, void* stream) {
  int count = 0;
  int code = multiprocessors<attention_kernel<C>, C::kSharedBytes>(count);
  if (code) return code;
  Maps maps;
  code = encode_maps<C>(maps, p);
  if (code) return code;
  const int main_queries = p.num_queries - (C::kTails ? tail_of(p.num_queries) : 0);
  const int tiles_of_head = ceil_div(main_queries, C::kQueries);
  const int64_t entries = int64_t{tiles_of_head} * p.batch, tiles = entries * p.num_heads;
  VLMK_CHECK(tiles < INT_MAX / 2, "more than 2^30 tiles of queries");
  const int blocks = static_cast<int>(std::min<int64_t>(count, tiles));
  Schedule s;
  s.main_queries = main_queries;
  s.tiles = static_cast<int32_t>(tiles);
  s.tiles_of_head = tiles_of_head;
  // Chunks of 4 were as fast as others or faster for every mask tried, from windows of 64 tokens to
  // 32,768 tokens, and better than tiles in the order of their rows over all heads that fit in L2
  // (H100: windows 47 -> 82 TFLOP/s).
  s.chunk = C::kMasked ? 4 : tiles_of_head;
  s.dynamic = C::kMasked && tiles > blocks;
  // Two tiles for each block are dealt out before the order must be known: with one, 512 windows
  // took 1 % longer (H200).
  s.entries = static_cast<int32_t>(entries);
  const int64_t dealt = int64_t{ceil_div(2 * blocks, p.num_heads * s.chunk)} * s.chunk;
  const bool sorted = s.dynamic && p.start && dealt < entries && entries - dealt <= kMaxSorted;
  s.sorted_from = sorted ? static_cast<int32_t>(dealt) : s.entries;
  VlmkAttentionParams counted = p;
  if (s.dynamic) code = find_counter(p, stream, counted.counter);
  if (code) return code;
  return launch("attention_kernel", attention_kernel<C>, dim3(blocks), dim3(C::kThreads),
                C::kSharedBytes, stream, counted, maps, s);
}

// With a softcap too, whose registers only masked variants have.
inline bool needs_mask(const VlmkAttentionParams& p) {
  return p.causal || p.start || p.softcap > 0;
}

// Heads of a width in one tile, with a mask and without.
template <typename T, int kWidth, int kKeys, int kGroups>
int run_width(const VlmkAttentionParams& p, void* stream) {
  if (needs_mask(p)) return run<Config<T, kWidth, kKeys, kGroups, true>>(p, stream);
  return run<Config<T, kWidth, kKeys, kGroups, false>>(p, stream);
}

// Whether tiles of 256 queries take less time than tiles of 192: the rounds of tiles that the
// multiprocessors need, times what a tile of 256 takes in percent of the other.
inline bool better_in_256(const VlmkAttentionParams& p, int multiprocessors, int percent) {
  const auto rounds = [&](int queries) {
    const int64_t heads = int64_t{p.batch} * p.num_heads;
    return ceil_div<int64_t>(ceil_div(p.num_queries, queries) * heads, multiprocessors);
  };
  return p.softcap <= 0 && rounds(256) * percent < rounds(192) * 100;
}

// The better of these two. A row takes 7 % longer in tiles of 256 with a mask, and else 4 % less
// (D 72, H200).
template <typename T, int kWidth, bool kMasked>
int run_256_or_192(const VlmkAttentionParams& p, void* stream) {
  using Narrow = Config<T, kWidth, 96, 3, kMasked>;
  int count = 0;
  const int code = multiprocessors<attention_kernel<Narrow>, Narrow::kSharedBytes>(count);
  if (code) return code;
  if (!better_in_256(p, count, kMasked ? 143 : 128)) return run<Narrow>(p, stream);
  return run<Config<T, kWidth, 64, 4, kMasked>>(p, stream);
}

// Without a mask, in tiles of 192 queries: of 96 keys, which takes 2 % less time for a key (H200),
// or of 80, if they cover less behind the last key, or leave a tail that would take a tile.
template <typename T, int kWidth>
int run_192(const VlmkAttentionParams& p, void* stream) {
  using Narrow = Config<T, kWidth, 80, 3, false>;
  const auto covered = [&](int keys) { return int64_t{ceil_div(p.num_keys, keys)} * keys; };
  const int tail = Narrow::kTails ? tail_of(p.num_queries) : 0;
  const bool saves_a_tile = ceil_div(p.num_queries - tail, 192) < ceil_div(p.num_queries, 192);
  if (saves_a_tile || covered(96) * 100 > covered(80) * 103) return run<Narrow>(p, stream);
  return run<Config<T, kWidth, 96, 3, false>>(p, stream);
}

// Whether tiles of 192 queries with a tail take less time than tiles of 256, of which the last may
// hold only few rows: these take 5 % less for a row (H100). A head of one tile gains nothing.
inline bool better_with_tail(int num_queries) {
  const int tail = tail_of(num_queries);
  return tail > 0 && num_queries > 256 &&
         21 * 192 * ceil_div(num_queries - tail, 192) < 20 * 256 * ceil_div(num_queries, 256);
}

// The fastest of the tiles tried (docs/attention_forward.md). Four warpgroups hide each other's
// softmax best, but have registers for few columns; up to 256 queries they take a head at once.
template <typename T>
int dispatch(const VlmkAttentionParams& p, void* stream) {
  const int width = std::max(p.dim, p.value_dim);
  const bool masked = needs_mask(p);
  if (width <= 64) {
    if (masked) return run_256_or_192<T, 64, true>(p, stream);
    return better_with_tail(p.num_queries) ? run<Config<T, 64, 96, 3, false>>(p, stream)
                                           : run<Config<T, 64, 64, 4, false>>(p, stream);
  }
  if (width <= 72) {
    return masked ? run_256_or_192<T, 72, true>(p, stream)
                  : run_256_or_192<T, 72, false>(p, stream);
  }
  if (width <= 80) {
    return masked ? run<Config<T, 80, 96, 3, true>>(p, stream) : run_192<T, 80>(p, stream);
  }
  if (width <= 88) {
    return masked ? run<Config<T, 88, 96, 3, true>>(p, stream) : run_192<T, 88>(p, stream);
  }
  if (width <= 96) {
    return masked ? run<Config<T, 96, 96, 3, true>>(p, stream) : run_192<T, 96>(p, stream);
  }
  if (width <= 104) return run_width<T, 104, 96, 3>(p, stream);
  if (width <= 128) return run_width<T, 128, 128, 2>(p, stream);
  return run_width<T, 256, 80, 2>(p, stream);
}

}  // namespace attention
}  // namespace vlmk

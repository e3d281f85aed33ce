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
  const int blocks = static_cast<int>(std::min<int64_t>(int64_t{count} * C::kBlocks, tiles));
  Schedule s;
  s.main_queries = main_queries;
  s.tiles = static_cast<int32_t>(tiles);
  s.tiles_of_head = tiles_of_head;
  // The longest rows of all heads start first, which leaves little to do at the end. But the tiles
  // of windows wait for memory, and in chunks of 4 find more of what they read in L2: 2,048 windows
  // of D 80 378 instead of 395 us, where many tiles of longer ranges take as long either way
  // (H200).
  const bool many = p.start && tiles > 12 * int64_t{blocks};
  s.chunk = !C::kMasked ? tiles_of_head : many ? 4 : 1;
  // Of all images, where a block takes few tiles: 4 x 8 heads of 2048, causal, of D 256 112 us
  // instead of 127, 3 x 8 of 1000 41 instead of 51. Where it takes more, or heads have few, that
  // costs 2 to 5 %: the shortest, which wait for memory, come all at once (H200).
  s.across_images = C::kMasked && tiles_of_head > 3 && tiles <= 5 * int64_t{blocks};
  s.minor = s.across_images ? p.batch : tiles_of_head;
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

// Heads of a width in one tile, with a mask and without.
template <typename T, int kWidth, int kKeys, int kGroups>
int run_width(const VlmkAttentionParams& p, void* stream) {
  if (needs_mask(p)) return run<Config<T, kWidth, kKeys, kGroups, true>>(p, stream);
  return run<Config<T, kWidth, kKeys, kGroups, false>>(p, stream);
}

// How many tiles of so many queries the busiest multiprocessor takes.
template <typename C>
int turns(const VlmkAttentionParams& p, int64_t& most) {
  int count = 0;
  const int code = multiprocessors<attention_kernel<C>, C::kSharedBytes>(count);
  if (code) return code;
  const int queries = p.num_queries - (C::kTails ? tail_of(p.num_queries) : 0);
  const int64_t tiles = int64_t{ceil_div(queries, C::kQueries)} * p.batch * p.num_heads;
  most = ceil_div<int64_t>(tiles, count);
  return 0;
}

// Whether the first of two variants is done first, or both are at once, where a tile of each costs
// so much.
template <typename First, typename Second>
int compare(const VlmkAttentionParams& p, int64_t first_cost, int64_t second_cost, bool& first) {
  int64_t of_first = 0, of_second = 0;
  int code = turns<First>(p, of_first);
  if (!code) code = turns<Second>(p, of_second);
  first = of_first * first_cost <= of_second * second_cost;
  return code;
}

template <typename First, typename Second>
int run_faster(const VlmkAttentionParams& p, int64_t first_cost, int64_t second_cost,
               void* stream) {
  bool first = false;
  const int code = compare<First, Second>(p, first_cost, second_cost, first);
  if (code) return code;
  return first ? run<First>(p, stream) : run<Second>(p, stream);
}

// With a mask. Heads that fit are one tile; else tiles of 192, of which a row takes 7 % less than
// of 256 (D 72, H200).
template <typename T, int kWidth>
int run_masked(const VlmkAttentionParams& p, void* stream) {
  const bool one_tile = p.num_queries > 192 && p.num_queries <= 256;
  return one_tile ? run<Config<T, kWidth, 64, 4, true>>(p, stream)
                  : run<Config<T, kWidth, 96, 3, true>>(p, stream);
}

// What a tile of 128 queries takes, in percent of one of 192, alone on a multiprocessor.
constexpr int kOfFew = 75;

// Without a mask, in tiles of 192 queries: of 96 keys, which takes 2 % less time for a key (H200),
// or of 80, if they cover less behind the last key, or leave a tail that would take a tile. Or of
// 128, where these find multiprocessors that have none else: images of a batch of 1.
template <typename T, int kWidth>
int run_192(const VlmkAttentionParams& p, void* stream) {
  using Narrow = Config<T, kWidth, 80, 3, false>;
  using Few = Config<T, kWidth, 96, 2, false>;
  const auto covered = [&](int keys) { return int64_t{ceil_div(p.num_keys, keys)} * keys; };
  const int tail = Narrow::kTails ? tail_of(p.num_queries) : 0;
  const bool saves_a_tile = ceil_div(p.num_queries - tail, 192) < ceil_div(p.num_queries, 192);
  if (saves_a_tile || covered(96) * 100 > covered(80) * 103) {
    return run_faster<Narrow, Few>(p, 100, kOfFew, stream);
  }
  return run_faster<Config<T, kWidth, 96, 3, false>, Few>(p, 100, kOfFew, stream);
}

// Whether tiles of 192 queries with a tail take less time than tiles of 256, of which the last may
// hold only few rows: these take 5 % less for a row (H100). A head of one tile gains nothing.
inline bool better_with_tail(int num_queries) {
  const int tail = tail_of(num_queries);
  return tail > 0 && num_queries > 256 &&
         21 * 192 * ceil_div(num_queries - tail, 192) < 20 * 256 * ceil_div(num_queries, 256);
}

// Up to 64 columns. Blocks of two warpgroups, two of them on a multiprocessor, take heads of up to
// 128 queries: CLIP's text, 77 tokens, 0.168 instead of 0.229 ms (12,288 heads, H200); or where
// there are few tiles. One of these takes 60 % of a tile of 256, 76 % of one of 192.
template <typename T>
int run_64(const VlmkAttentionParams& p, void* stream) {
  if (needs_mask(p)) {
    return p.num_queries <= 128 ? run<Config<T, 64, 48, 2, true>>(p, stream)
                                : run_masked<T, 64>(p, stream);
  }
  using Few = Config<T, 64, 48, 2, false>;
  return better_with_tail(p.num_queries)
             ? run_faster<Config<T, 64, 96, 3, false>, Few>(p, 100, 76, stream)
             : run_faster<Config<T, 64, 64, 4, false>, Few>(p, 100, 60, stream);
}

// Of 65 to 72, without a mask: tiles of 256, of which a row takes 4 % less than of 192 (H200), of
// 192, or of 128.
template <typename T>
int run_72(const VlmkAttentionParams& p, void* stream) {
  using Wide = Config<T, 72, 64, 4, false>;
  using Narrow = Config<T, 72, 96, 3, false>;
  bool narrow = false;
  const int code = compare<Narrow, Wide>(p, 100, 128, narrow);
  if (code) return code;
  if (!narrow) return run<Wide>(p, stream);
  return run_faster<Narrow, Config<T, 72, 96, 2, false>>(p, 100, kOfFew, stream);
}

// Those of which a softmax is taken, where no query has a mask: of the last tile maybe a part.
template <typename C>
int64_t weighed_keys(const VlmkAttentionParams& p) {
  const int rest = p.num_keys % C::kKeys;
  return p.num_keys - rest + (rest > C::kPart ? C::kKeys : rest > 0 ? C::kPart : 0);
}

// Whether tiles of 192 queries pay with a mask, which is finer with 128, at 105 to 128 columns:
// where they are fewer of a head, or long, or so many that blocks are done at about the same time
// and reach little further behind the last query. That is sooner so with ranges (2 x 32 heads of
// 2048, packed, 104 -> 87 us) than causal (2 x 32 of 1500 77.4 -> 74.2, H200).
inline bool wide_with_mask(const VlmkAttentionParams& p) {
  if (p.num_queries >= 4096) return true;
  const int wide = ceil_div(p.num_queries, 192), narrow = ceil_div(p.num_queries, 128);
  if (p.num_queries <= 384) return wide < narrow;
  const int64_t tiles = int64_t{wide} * p.num_heads * p.batch;
  const int more = 100 * wide * 192 / (narrow * 128);
  return p.start ? tiles >= 330 && more <= 113 : tiles >= 460 && more <= 100;
}

// Of 105 to 128. A key costs a tile of 192 queries a third more than one of 128 (H200).
template <typename T>
int run_128(const VlmkAttentionParams& p, void* stream) {
  // Heads of one tile, whose keys are two or more: 64 x 8 of 128 take 22.1 us instead of 24.6
  // (H200).
  if (p.num_queries <= 128 && p.num_keys <= 256) return run_width<T, 128, 64, 2>(p, stream);
  if (!needs_mask(p)) {
    using Wide = Config<T, 128, 80, 3, false>;
    using Narrow = Config<T, 128, 128, 2, false>;
    return run_faster<Wide, Narrow>(p, 133 * weighed_keys<Wide>(p), 100 * weighed_keys<Narrow>(p),
                                    stream);
  }
  return wide_with_mask(p) ? run<Config<T, 128, 80, 3, true>>(p, stream)
                           : run<Config<T, 128, 128, 2, true>>(p, stream);
}

// With a softcap.
template <typename T>
int run_capped(const VlmkAttentionParams& p, int width, void* stream) {
  if (width <= 64) return run<Config<T, 64, 96, 3, true, true>>(p, stream);
  if (width <= 128) return run<Config<T, 128, 128, 2, true, true>>(p, stream);
  return run<Config<T, 256, 80, 2, true, true>>(p, stream);
}

// The fastest of the tiles tried (docs/attention_forward.md). Four warpgroups hide each other's
// softmax best, but have registers for few columns; up to 256 queries they take a head at once.
template <typename T>
int dispatch(const VlmkAttentionParams& p, void* stream) {
  const int width = std::max(p.dim, p.value_dim);
  const bool masked = needs_mask(p);
  if (p.softcap > 0) return run_capped<T>(p, width, stream);
  if (width <= 64) return run_64<T>(p, stream);
  if (width <= 72) return masked ? run_masked<T, 72>(p, stream) : run_72<T>(p, stream);
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
  if (width <= 128) return run_128<T>(p, stream);
  if (width <= 192) return run_width<T, 192, 96, 2>(p, stream);
  return run_width<T, 256, 80, 2>(p, stream);
}

}  // namespace attention
}  // namespace vlmk

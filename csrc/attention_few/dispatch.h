// SPDX-License-Identifier: Apache-2.0
// Which variant of the kernel runs, and in how many blocks a head's keys are shared out.
#pragma once

#include <algorithm>
#include <climits>

#include "attention/rows.h"
#include "attention_few/kernel.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_few {

template <typename C>
int encode_maps(const VlmkAttentionParams& p, bool tiled, Maps& maps) {
  int code = attention::encode_rows(maps.queries, p.q, C::kHalf, p, p.q_stride_b, p.q_stride_s,
                                    p.q_stride_h, kPanel, tiled ? C::kRows : 0);
  if (code) return code;
  const auto encode = [&p](CUtensorMap& keys, CUtensorMap& values, int columns) {
    const int failed =
        encode_tensor_map(keys, p.k, C::kHalf, p.batch, p.num_keys, p.num_kv_heads, p.dim,
                          p.k_stride_b, p.k_stride_s, p.k_stride_h, C::kKeys, columns);
    if (failed) return failed;
    return encode_tensor_map(values, p.v, C::kHalf, p.batch, p.num_keys, p.num_kv_heads,
                             p.value_dim, p.v_stride_b, p.v_stride_s, p.v_stride_h, C::kKeys,
                             columns);
  };
  code = encode(maps.keys, maps.values, kPanel);
  if (code || !C::kNarrow) return code;
  return encode(maps.last_keys, maps.last_values, C::kLastColumns);
}

// In how many blocks the keys are shared out: as long as all find room on the GPU at once.
template <typename C>
int choose_splits(const VlmkAttentionParams& p, int64_t items, int64_t room, int& splits) {
  const int tiles = ceil_div(p.num_keys, C::kKeys);
  splits = 1;
  while (splits < kMaxSplits && 2 * splits * items <= room && 2 * splits <= tiles) {
    int clusters = 0;
    const int code = active_clusters<attention_few_kernel<C>, C::kThreads, C::kSharedBytes>(
        2 * splits, clusters);
    if (code) return code;
    if (clusters < items) break;
    splits *= 2;
  }
  // To add up takes as long as two or three tiles (H200).
  if (tiles - ceil_div(tiles, splits) < 3) splits = 1;
  return 0;
}

template <typename C>
int run(const VlmkAttentionParams& p, bool tiled, void* stream) {
  int count = 0, splits = 0;
  int code = multiprocessors<attention_few_kernel<C>, C::kSharedBytes>(count);
  if (code) return code;
  Maps maps;
  code = encode_maps<C>(p, tiled, maps);
  if (code) return code;
  Items of;
  of.tiles_of_head = tiled ? ceil_div(p.num_queries, C::kRows) : 0;
  of.heads = tiled ? p.num_heads : p.num_kv_heads;
  of.group = p.num_heads / p.num_kv_heads;
  const int64_t items = int64_t{p.batch} * of.heads * std::max(of.tiles_of_head, 1);
  VLMK_CHECK(items < INT_MAX / 2, "more than 2^30 tiles of queries");
  of.count = static_cast<int32_t>(items);
  const int64_t room = int64_t{count} * C::kBlocks;
  code = choose_splits<C>(p, items, room, splits);
  if (code) return code;
  // Blocks that stay have the next head's keys under way before this one's are done. But where a
  // row ends within one of memory's bursts, the heads of an image must pass by at the same time, as
  // those of new blocks do: 1 x 729 of head dim 72 306 us instead of 408, but 64 x 64 of head dim
  // 80 126 instead of 101 (H200).
  const bool stay = p.dim % 32 + p.value_dim % 32 == 0 || p.num_keys <= 2 * C::kKeys;
  const int64_t blocks = splits == 1 && stay ? std::min(items, room) : items * splits;
  // Early, as what comes before the first copy is a tenth of the time of one image.
  const LaunchConfig config(dim3(static_cast<unsigned>(blocks)), dim3(C::kThreads),
                            static_cast<unsigned>(splits), C::kSharedBytes, stream, true);
  return launch("attention_few_kernel", attention_few_kernel<C>, config, p, maps, of);
}

template <typename T, int kWidth, bool kCapped = false>
int run_width(const VlmkAttentionParams& p, void* stream) {
  const bool tiled = in_tiles(p);
  const int rows = p.num_queries * (p.num_heads / p.num_kv_heads);
  return tiled || rows <= attention::kGroupQueries
             ? run<Config<T, kWidth, 1, kCapped>>(p, tiled, stream)
             : run<Config<T, kWidth, 2, kCapped>>(p, false, stream);
}

template <typename T>
int dispatch(const VlmkAttentionParams& p, void* stream) {
  const int width = std::max(p.dim, p.value_dim);
  if (p.softcap > 0) {
    return width <= 64 ? run_width<T, 64, true>(p, stream) : run_width<T, 128, true>(p, stream);
  }
  if (width <= 64) return run_width<T, 64>(p, stream);
  if (width <= 80) return run_width<T, 80>(p, stream);
  if (width <= 96) return run_width<T, 96>(p, stream);
  return run_width<T, 128>(p, stream);
}

}  // namespace attention_few
}  // namespace vlmk

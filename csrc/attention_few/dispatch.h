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
int encode_maps(const VlmkAttentionParams& p, Maps& maps) {
  int code = attention::encode_rows(maps.queries, p.q, C::kHalf, p, p.q_stride_b, p.q_stride_s,
                                    p.q_stride_h);
  if (code) return code;
  code = encode_tensor_map(maps.keys, p.k, C::kHalf, p.batch, p.num_keys, p.num_kv_heads, p.dim,
                           p.k_stride_b, p.k_stride_s, p.k_stride_h, C::kKeys);
  if (code) return code;
  return encode_tensor_map(maps.values, p.v, C::kHalf, p.batch, p.num_keys, p.num_kv_heads,
                           p.value_dim, p.v_stride_b, p.v_stride_s, p.v_stride_h, C::kKeys);
}

template <typename C>
int run(const VlmkAttentionParams& p, void* stream) {
  int count = 0;
  int code = multiprocessors<attention_few_kernel<C>, C::kSharedBytes>(count);
  if (code) return code;
  Maps maps;
  code = encode_maps<C>(p, maps);
  if (code) return code;
  // As long as all blocks find room on the GPU at once, and each has two tiles.
  const int64_t heads = int64_t{p.batch} * p.num_kv_heads;
  const int tiles = ceil_div(p.num_keys, C::kKeys);
  int splits = 1;
  while (splits < kMaxSplits && 2 * splits * heads <= int64_t{count} * C::kBlocks &&
         4 * splits <= tiles) {
    int clusters = 0;
    code = active_clusters<attention_few_kernel<C>, C::kThreads, C::kSharedBytes>(2 * splits,
                                                                                  clusters);
    if (code) return code;
    if (clusters < heads) break;
    splits *= 2;
  }
  const int64_t blocks =
      splits > 1 ? heads * splits : std::min<int64_t>(heads, int64_t{count} * C::kBlocks);
  return launch_clusters("attention_few_kernel", attention_few_kernel<C>,
                         dim3(static_cast<unsigned>(blocks)), dim3(C::kThreads),
                         static_cast<unsigned>(splits), C::kSharedBytes, stream, p, maps);
}

template <typename T, int kWidth>
int run_width(const VlmkAttentionParams& p, void* stream) {
  const int rows = p.num_queries * (p.num_heads / p.num_kv_heads);
  return rows <= attention::kGroupQueries ? run<Config<T, kWidth, 1>>(p, stream)
                                          : run<Config<T, kWidth, 2>>(p, stream);
}

template <typename T>
int dispatch(const VlmkAttentionParams& p, void* stream) {
  const int width = std::max(p.dim, p.value_dim);
  if (width <= 64) return run_width<T, 64>(p, stream);
  if (width <= 80) return run_width<T, 80>(p, stream);
  if (width <= 96) return run_width<T, 96>(p, stream);
  return run_width<T, 128>(p, stream);
}

}  // namespace attention_few
}  // namespace vlmk

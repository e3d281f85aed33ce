// SPDX-License-Identifier: Apache-2.0
// Which variant of the kernel runs, and in how many blocks a head's keys are shared out.
#pragma once

#include <algorithm>
#include <climits>

#include "attention/rows.h"
#include "attention_bwd_few/kernel.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd_few {

// Of panels of so many columns.
template <typename C>
int encode_maps(const VlmkAttentionBwdParams& p, int columns, PanelMaps& maps) {
  int code = attention::encode_rows(maps.queries, p.q, C::kHalf, p, p.q_stride_b, p.q_stride_s,
                                    p.q_stride_h, columns);
  if (code) return code;
  code = attention::encode_rows(maps.dout, p.dout, C::kHalf, p, p.dout_stride_b, p.dout_stride_s,
                                p.dout_stride_h, columns);
  if (code) return code;
  code = encode_tensor_map(maps.keys, p.k, C::kHalf, p.k_stride_b == 0 ? 1 : p.batch, p.num_keys,
                           p.num_kv_heads, p.dim, p.k_stride_b, p.k_stride_s, p.k_stride_h,
                           C::kKeys, columns);
  if (code) return code;
  code = encode_tensor_map(maps.values, p.v, C::kHalf, p.v_stride_b == 0 ? 1 : p.batch, p.num_keys,
                           p.num_kv_heads, p.dim, p.v_stride_b, p.v_stride_s, p.v_stride_h,
                           C::kKeys, columns);
  if (code) return code;
  code = encode_tensor_map(maps.dk, p.dk, C::kHalf, p.batch, p.num_keys, p.num_kv_heads, p.dim,
                           p.num_keys * p.dk_stride_s, p.dk_stride_s, p.dim, 16, columns);
  if (code) return code;
  return encode_tensor_map(maps.dv, p.dv, C::kHalf, p.batch, p.num_keys, p.num_kv_heads, p.dim,
                           p.num_keys * p.dv_stride_s, p.dv_stride_s, p.dim, 16, columns);
}

template <typename C>
int run(const VlmkAttentionBwdParams& p, void* stream) {
  int count = 0;
  int code = multiprocessors<attention_bwd_few_kernel<C>, C::kSharedBytes>(count);
  if (code) return code;
  Maps maps;
  code = encode_maps<C>(p, kPanel, maps.whole);
  if (code) return code;
  if (C::kNarrow) code = encode_maps<C>(p, C::kLastColumns, maps.last);
  if (code) return code;
  const int64_t heads = int64_t{p.batch} * p.num_kv_heads;
  VLMK_CHECK(heads <= INT_MAX / kMaxSplits, "more than 2^28 heads of keys");
  int splits = 1;
  while (splits < kMaxSplits && 2 * splits * heads <= int64_t{count} * C::kBlocks &&
         2 * splits <= ceil_div(p.num_keys, C::kKeys)) {
    splits *= 2;
  }
  return launch_clusters("attention_bwd_few_kernel", attention_bwd_few_kernel<C>,
                         dim3(static_cast<unsigned>(heads * splits)), dim3(C::kThreads),
                         static_cast<unsigned>(splits), C::kSharedBytes, stream, p, maps);
}

template <typename T, int kWidth>
int run_width(const VlmkAttentionBwdParams& p, void* stream) {
  const int rows = p.num_queries * (p.num_heads / p.num_kv_heads);
  if (rows <= 16) return run<Config<T, kWidth, 16>>(p, stream);
  if (rows <= 32) return run<Config<T, kWidth, 32>>(p, stream);
  if (rows <= 64) return run<Config<T, kWidth, 64>>(p, stream);
  return run<Config<T, kWidth, 128>>(p, stream);
}

template <typename T>
int dispatch(const VlmkAttentionBwdParams& p, void* stream) {
  if (p.dim <= 64) return run_width<T, 64>(p, stream);
  if (p.dim <= 96) return run_width<T, 96>(p, stream);
  return run_width<T, 128>(p, stream);
}

}  // namespace attention_bwd_few
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// Which variant of the kernel runs.
#pragma once

#include <algorithm>
#include <utility>

#include "attention_bwd/kernel.h"
#include "attention_bwd/rows.h"
#include "common/launch.h"
#include "common/tensor_map.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

template <typename C>
int encode_maps(const VlmkAttentionBwdParams& p, const Workspace& w, Maps& maps) {
  const auto encode = [&](CUtensorMap& map, const void* data, int rows, int heads, int columns,
                          int64_t stride_b, int64_t stride_s, int64_t stride_h, int tile) {
    return encode_tensor_map(map, data, C::kHalf, stride_b == 0 ? 1 : p.batch, rows, heads, columns,
                             stride_b, stride_s, stride_h, tile, C::kPanel);
  };
  int code = encode(maps.queries, p.q, p.num_queries, p.num_heads, p.dim, p.q_stride_b,
                    p.q_stride_s, p.q_stride_h, kQueries);
  if (code) return code;
  code = encode(maps.dout, p.dout, p.num_queries, p.num_heads, p.value_dim, p.dout_stride_b,
                p.dout_stride_s, p.dout_stride_h, kQueries);
  if (code) return code;
  code = encode(maps.keys, p.k, p.num_keys, p.num_kv_heads, p.dim, p.k_stride_b, p.k_stride_s,
                p.k_stride_h, C::kKeys);
  if (code) return code;
  code = encode(maps.values, p.v, p.num_keys, p.num_kv_heads, p.value_dim, p.v_stride_b,
                p.v_stride_s, p.v_stride_h, C::kKeys);
  if (code) return code;
  const auto encode_result = [&](CUtensorMap& map, const void* data, int columns, int64_t stride) {
    return encode(map, data, p.num_keys, p.num_kv_heads, columns, p.num_keys * stride, stride,
                  columns, 64);
  };
  if (C::kSums == Sums::kBehind) {
    const int rows = p.batch * p.num_heads * ceil_div(p.num_queries, kQueries) * kQueries;
    for (auto [map, at] :
         {std::pair(&maps.query_ends, w.query_ends), std::pair(&maps.dout_ends, w.dout_ends)}) {
      code = encode_tensor_map(*map, static_cast<char*>(p.workspace) + at, C::kHalf, 1, rows, 1,
                               kEndColumns, 0, kEndColumns, kEndColumns, kQueries, C::kPanel);
      if (code) return code;
    }
  }
  code = encode_result(maps.dk, p.dk, p.dim, p.dk_stride_s);
  if (code) return code;
  return encode_result(maps.dv, p.dv, p.value_dim, p.dv_stride_s);
}

template <typename C>
int run(const VlmkAttentionBwdParams& p, const Schedule& s, const Workspace& w, void* stream) {
  int count = 0;
  int code = multiprocessors<attention_bwd_kernel<C>, C::kSharedBytes>(count);
  if (code) return code;
  Maps maps;
  code = encode_maps<C>(p, w, maps);
  if (code) return code;
  char* workspace = static_cast<char*>(p.workspace);
  if (p.start) {
    const VlmkTileBoundsParams bounds{p.start,
                                      p.stop,
                                      reinterpret_cast<int32_t*>(workspace + w.q_bounds),
                                      reinterpret_cast<int32_t*>(workspace + w.k_bounds),
                                      p.range_stride_b,
                                      1,
                                      p.range_stride_b,
                                      1,
                                      p.range_stride_b ? p.batch : 1,
                                      p.num_queries,
                                      p.num_keys};
    code = vlmk_tile_bounds(&bounds, stream);
    if (code) return code;
  }
  const int tiles = p.batch * p.num_heads * ceil_div(p.num_queries, kQueries);
  code = launch("prepare_rows_kernel", prepare_rows_kernel<C>, dim3(tiles), dim3(kRowThreads), 0,
                stream, p, s, w);
  if (code) return code;
  const int blocks = std::min(count, s.whole ? s.heads : s.items);
  return launch("attention_bwd_kernel", attention_bwd_kernel<C>, dim3(blocks), dim3(C::kThreads),
                C::kSharedBytes, stream, p, maps, s, w);
}

template <typename T, int kWidth>
int run_width(const VlmkAttentionBwdParams& p, const Schedule& s, const Workspace& w,
              void* stream) {
  if constexpr (width_for(kWidth, true) == kWidth) {
    if (p.softcap > 0) {
      return s.whole ? run<Config<T, kWidth, true, true>>(p, s, w, stream)
                     : run<Config<T, kWidth, false, true>>(p, s, w, stream);
    }
  }
  return s.whole ? run<Config<T, kWidth, true>>(p, s, w, stream)
                 : run<Config<T, kWidth, false>>(p, s, w, stream);
}

template <typename T>
int dispatch(const VlmkAttentionBwdParams& p, void* stream) {
  Schedule s;
  Workspace w;
  const int code = lay_out(p, s, w);
  if (code) return code;
  VLMK_CHECK(p.workspace && p.workspace_bytes >= w.bytes, "a workspace of %lld bytes, wanted %lld",
             static_cast<long long>(p.workspace_bytes), static_cast<long long>(w.bytes));
  switch (width_for(std::max(p.dim, p.value_dim), p.softcap > 0)) {
    case 64:
      return run_width<T, 64>(p, s, w, stream);
    case 72:
      return run_width<T, 72>(p, s, w, stream);
    case 80:
      return run_width<T, 80>(p, s, w, stream);
    case 88:
      return run_width<T, 88>(p, s, w, stream);
    case 96:
      return run_width<T, 96>(p, s, w, stream);
    case 128:
      return run_width<T, 128>(p, s, w, stream);
    case 192:
      return run_width<T, 192>(p, s, w, stream);
    default:
      return run_width<T, kMaxWidth>(p, s, w, stream);
  }
}

}  // namespace attention_bwd
}  // namespace vlmk

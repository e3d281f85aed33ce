// SPDX-License-Identifier: Apache-2.0
// Attention's backward pass, the host's side: what the kernel takes.
#include <climits>

#include "attention/rows.h"
#include "attention_bwd/config.h"
#include "common/error.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

int check(const VlmkAttentionBwdParams& p) {
  VLMK_CHECK(p.type == VLMK_FLOAT16 || p.type == VLMK_BFLOAT16, "type %d", p.type);
  VLMK_CHECK(p.dim >= 8 && p.dim <= 128 && p.dim % 8 == 0,
             "the backward takes head dims of 8 to 128 in steps of 8, this is %d", p.dim);
  VLMK_CHECK(p.batch >= 0 && p.num_queries >= 0 && p.num_keys >= 0 && p.num_heads > 0 &&
                 p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0,
             "batch %d, %d queries, %d keys, %d heads, %d heads of keys", p.batch, p.num_queries,
             p.num_keys, p.num_heads, p.num_kv_heads);
  const int64_t rows = int64_t{p.num_queries} * (p.num_heads / p.num_kv_heads);
  VLMK_CHECK(rows <= attention::kMaxRows,
             "the backward takes up to %d queries of all heads that read a key head, these are "
             "%lld",
             attention::kMaxRows, static_cast<long long>(rows));
  VLMK_CHECK(p.num_keys < INT_MAX / 2, "more than 2^30 keys");  // tiles reach beyond the end
  VLMK_CHECK(p.scale > 0, "scale %g: positive", static_cast<double>(p.scale));
  VLMK_CHECK(!p.start == !p.stop, "start and stop: both or neither");
  VLMK_CHECK(!p.start || !p.causal, "ranges or causal, not both");
  struct {
    const char* name;
    int rows, heads;
    int64_t s, h, b;
  } const tensors[] = {
      {"dout", p.num_queries, p.num_heads, p.dout_stride_s, p.dout_stride_h, p.dout_stride_b},
      {"q", p.num_queries, p.num_heads, p.q_stride_s, p.q_stride_h, p.q_stride_b},
      {"k", p.num_keys, p.num_kv_heads, p.k_stride_s, p.k_stride_h, p.k_stride_b},
      {"v", p.num_keys, p.num_kv_heads, p.v_stride_s, p.v_stride_h, p.v_stride_b},
  };
  for (const auto& x : tensors) {
    const int batch = x.b == 0 ? 1 : p.batch;
    const int code = attention::check_strides(x.name, x.rows, x.heads, batch, x.s, x.h, x.b);
    if (code) return code;
  }
  return 0;
}

}  // namespace attention_bwd
}  // namespace vlmk

int vlmk_attention_bwd_check(const VlmkAttentionBwdParams* params) {
  return vlmk::attention_bwd::check(*params);
}

int vlmk_attention_bwd(const VlmkAttentionBwdParams* params, void* stream) {
  using namespace vlmk::attention_bwd;
  const VlmkAttentionBwdParams& p = *params;
  const int code = check(p);
  if (code) return code;
  if (p.batch == 0) return 0;
  VLMK_CHECK(p.num_queries > 0 && p.num_keys > 0,
             "no queries or no keys: nothing to launch, the gradients are zeros");
  return p.type == VLMK_FLOAT16 ? backward_float16(p, stream) : backward_bfloat16(p, stream);
}

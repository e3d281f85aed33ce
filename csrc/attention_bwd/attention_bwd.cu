// SPDX-License-Identifier: Apache-2.0
// Attention's backward pass, the host's side: what the kernels take, and which of them.
#include <algorithm>
#include <climits>
#include <cmath>

#include "attention/rows.h"
#include "attention_bwd/config.h"
#include "attention_bwd_few/config.h"
#include "common/error.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention_bwd {

// What blocks with whole heads have of dQ at once, in fp32, is to stay in L2, of 50 MB.
constexpr int64_t kMost = 28 << 20, kMostDeterministic = 40 << 20;
// Above 64 columns a head has no more queries or no more keys than this: with more of both, blocks
// that share heads are ahead, as Q and dO of fewer heads are in L2 (H200, ms, whole and shared: at
// 72 columns 400 tokens 0.264 and 0.271, 576 0.434 and 0.399, at 96 577 0.581 and 0.502; but at 64
// 729 0.432 and 0.439).
constexpr int kMostTokens = 512;

// Whole heads, where there are enough for all multiprocessors to be busy to the end.
static bool takes_whole_heads(const VlmkAttentionBwdParams& p, int multiprocessors, int width) {
  const int64_t heads = int64_t{p.batch} * p.num_kv_heads;
  const int64_t rounds = ceil_div<int64_t>(heads, multiprocessors);
  const int64_t of_head = int64_t{p.num_heads / p.num_kv_heads} * p.num_queries * width * 4;
  const int64_t at_once = of_head * std::min<int64_t>(heads, multiprocessors);
  if (at_once > (p.deterministic ? kMostDeterministic : kMost)) return false;
  const bool few = width <= 64 || std::min(p.num_queries, p.num_keys) <= kMostTokens;
  return (few || p.deterministic) && 10 * heads >= 9 * rounds * multiprocessors;
}

// Without the few keys that a class token and others leave behind a multiple of 128, which go with
// the last tile, if all see them and a block has whole heads: as one of many tiles that blocks
// share out, that one would be the longest (1025 tokens of head dim 64: 0.243 instead of 0.216 ms,
// H200).
static int main_keys(const VlmkAttentionBwdParams& p, int width, bool whole) {
  const int rest = p.num_keys % keys_of_tile(width);
  const bool few = whole && !p.start && !p.causal && takes_last_keys(width, p.softcap > 0) &&
                   rest <= kLastKeys && p.num_keys > rest;
  return few ? p.num_keys - rest : p.num_keys;
}

// In how many parts the query heads that read a head of keys are shared out, where blocks don't
// have whole heads: with few heads of keys (Qwen2-VL has four), most multiprocessors would have no
// tile of keys, or the last ones would be long. Estimated in tiles of queries; a part of a tile of
// keys costs some more, those of a mask are half as long on average.
static int parts_of_heads(const VlmkAttentionBwdParams& p, int64_t tiles_of_keys,
                          int multiprocessors) {
  const int group = p.num_heads / p.num_kv_heads;
  const auto estimate = [&](int parts) {
    const double more = parts > 1 ? 6 : 2, items = static_cast<double>(tiles_of_keys) * parts;
    const double tiles = static_cast<double>(group / parts) * ceil_div(p.num_queries, kQueries);
    if (!p.start && !p.causal) return std::ceil(items / multiprocessors) * (tiles + more);
    const double longest = tiles + more, all = items * (tiles / 2 + more) / multiprocessors;
    return std::max(longest, all) + longest / 4;
  };
  int best = 1;
  for (int parts = 2; parts <= group; ++parts) {
    // 10 % less, as this is a guess.
    const double least = best == 1 ? 0.9 * estimate(1) : estimate(best);
    if (group % parts == 0 && estimate(parts) < least) best = parts;
  }
  return best;
}

int lay_out(const VlmkAttentionBwdParams& p, Schedule& s, Workspace& w) {
  int device = 0, count = 0;
  VLMK_CUDA(cudaGetDevice(&device));
  VLMK_CUDA(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
  const int64_t num_tiles = ceil_div(p.num_queries, kQueries);
  const int64_t heads = int64_t{p.batch} * p.num_heads,
                kv_heads = int64_t{p.batch} * p.num_kv_heads;
  const int width = width_for(std::max(p.dim, p.value_dim), p.softcap > 0);
  const int64_t of_tile = int64_t{kQueries} * width * 4;
  s.whole = takes_whole_heads(p, count, width);
  s.main_keys = main_keys(p, width, s.whole);
  s.tiles_of_head = ceil_div(s.main_keys, keys_of_tile(width));
  const int64_t tiles_of_keys = kv_heads * s.tiles_of_head;
  s.parts = s.whole ? 1 : parts_of_heads(p, tiles_of_keys, count);
  VLMK_CHECK(tiles_of_keys * s.parts < INT_MAX / 4 && heads * num_tiles < INT_MAX / kQueries,
             "more than 2^29 tiles of keys, or 2^31 queries of all heads");
  s.items = static_cast<int32_t>(tiles_of_keys * s.parts);
  VLMK_CHECK(s.whole || !p.deterministic,
             "the same bits in every run only where blocks have whole heads: short sequences of "
             "many heads");
  s.masked = p.start || p.causal;
  s.chunk = s.masked ? std::min(kChunk, s.tiles_of_head) : s.tiles_of_head;
  s.chunks = ceil_div(s.tiles_of_head, s.chunk);
  s.image_heads = p.num_kv_heads * s.parts;
  s.heads = p.batch * s.image_heads;
  s.group_heads = p.num_heads / s.image_heads;
  // The images with which blocks begin.
  const int64_t images = ceil_div<int64_t>(count, int64_t{s.image_heads} * s.tiles_of_head);
  s.cleared = static_cast<int32_t>(std::min<int64_t>(s.heads, images * s.image_heads));

  int64_t at = 0;
  const auto take = [&at](int64_t bytes) {
    const int64_t begin = at;
    at += ceil_div<int64_t>(bytes, 256) * 256;
    return begin;
  };
  const int64_t ranges = p.range_stride_b ? p.batch : 1;
  const Sums sums = sums_of(width, s.whole, p.softcap > 0);
  w.sums = take(heads * num_tiles * kQueries * bytes_of_query(sums));
  const int64_t ends = sums == Sums::kBehind ? heads * num_tiles * kQueries : 0;
  w.query_ends = take(ends * kEndBytes);
  w.dout_ends = take(ends * kEndBytes);
  w.ranges = take(ranges * num_tiles * kQueries * 8);
  w.q_bounds = take(p.start ? ranges * num_tiles * 16 : 0);
  w.k_bounds = take(p.start ? ranges * ceil_div(p.num_keys, VLMK_TILE) * 16 : 0);
  const int64_t shared_out = s.parts > 1 ? tiles_of_keys : 0;
  w.counters = take(s.counters() * int64_t{4});
  w.part_counters = take(shared_out * kKeyGroups * 4 * int64_t{4});
  w.part_sums = take(shared_out * keys_of_tile(width) * width * 2 * int64_t{4});
  w.zeros_end = at;
  w.last_keys = take(s.main_keys < p.num_keys ? int64_t{count} * bytes_of_last_keys(width) : 0);
  const int64_t at_once = s.whole ? std::min<int64_t>(s.heads, count) * s.group_heads : heads;
  w.dq = take(at_once * num_tiles * of_tile);
  w.bytes = at;
  return 0;
}

// Whether the kernels for few queries run: those of all query heads that read a key head together.
// They know of no softcap.
static bool few_queries(const VlmkAttentionBwdParams& p) {
  return int64_t{p.num_queries} * (p.num_heads / p.num_kv_heads) <= attention::kMaxRows &&
         p.dim == p.value_dim && p.dim <= attention_bwd_few::kMaxWidth && p.softcap <= 0;
}

static int check_sizes(const VlmkAttentionBwdParams& p) {
  VLMK_CHECK(p.type == VLMK_FLOAT16 || p.type == VLMK_BFLOAT16, "type %d", p.type);
  VLMK_CHECK(p.batch >= 0 && p.num_queries >= 0 && p.num_keys >= 0 && p.num_heads > 0 &&
                 p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0,
             "batch %d, %d queries, %d keys, %d heads, %d heads of keys", p.batch, p.num_queries,
             p.num_keys, p.num_heads, p.num_kv_heads);
  for (int dim : {p.dim, p.value_dim}) {
    VLMK_CHECK(dim >= 8 && dim <= kMaxWidth && dim % 8 == 0,
               "the backward takes head dims of 8 to %d in steps of 8, this is %d", kMaxWidth, dim);
  }
  // Tiles reach beyond the end.
  VLMK_CHECK(p.num_queries < INT_MAX / 2 && p.num_keys < INT_MAX / 2, "more than 2^30 tokens");
  VLMK_CHECK(p.scale > 0, "scale %g: positive", static_cast<double>(p.scale));
  VLMK_CHECK(p.softcap >= 0, "softcap %g: 0 or positive", static_cast<double>(p.softcap));
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
  struct {
    const char* name;
    int64_t stride, columns;
  } const results[] = {
      {"dq", p.dq_stride_s, int64_t{p.num_heads} * p.dim},
      {"dk", p.dk_stride_s, int64_t{p.num_kv_heads} * p.dim},
      {"dv", p.dv_stride_s, int64_t{p.num_kv_heads} * p.value_dim},
  };
  for (const auto& x : results) {
    VLMK_CHECK(x.stride >= x.columns && x.stride % 8 == 0,
               "%s: rows %lld elements apart, wanted a multiple of 8 from %lld up", x.name,
               static_cast<long long>(x.stride), static_cast<long long>(x.columns));
  }
  return 0;
}

static bool nothing_to_do(const VlmkAttentionBwdParams& p) {
  return p.batch == 0 || p.num_queries == 0 || p.num_keys == 0;
}

static int check(const VlmkAttentionBwdParams& p, int64_t& workspace_bytes) {
  int code = check_sizes(p);
  if (code) return code;
  workspace_bytes = 0;
  if (nothing_to_do(p) || few_queries(p)) return 0;
  Schedule s;
  Workspace w;
  code = lay_out(p, s, w);
  workspace_bytes = w.bytes;
  return code;
}

}  // namespace attention_bwd
}  // namespace vlmk

int vlmk_attention_bwd_check(VlmkAttentionBwdParams* params) {
  return vlmk::attention_bwd::check(*params, params->workspace_bytes);
}

int vlmk_attention_bwd(const VlmkAttentionBwdParams* params, void* stream) {
  using namespace vlmk;
  using namespace vlmk::attention_bwd;
  const VlmkAttentionBwdParams& p = *params;
  const int code = check_sizes(p);
  if (code) return code;
  if (p.batch == 0) return 0;
  VLMK_CHECK(!nothing_to_do(p),
             "no queries or no keys: nothing to launch, the gradients are zeros");
  if (few_queries(p)) {
    return p.type == VLMK_FLOAT16 ? attention_bwd_few::backward_float16(p, stream)
                                  : attention_bwd_few::backward_bfloat16(p, stream);
  }
  return p.type == VLMK_FLOAT16 ? backward_float16(p, stream) : backward_bfloat16(p, stream);
}

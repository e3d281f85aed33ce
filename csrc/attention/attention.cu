// SPDX-License-Identifier: Apache-2.0
// Attention, the host's side: what the kernel takes.
#include <algorithm>
#include <atomic>
#include <climits>

#include "attention/config.h"
#include "attention/rows.h"
#include "attention_few/config.h"
#include "common/error.h"
#include "common/launch.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

int check_strides(const char* name, int64_t rows, int64_t heads, int64_t batch, int64_t stride_s,
                  int64_t stride_h, int64_t stride_b) {
  const int64_t sizes[] = {rows, heads, batch}, strides[] = {stride_s, stride_h, stride_b};
  for (int i = 0; i < 3; ++i) {
    if (sizes[i] <= 1) continue;
    VLMK_CHECK(strides[i] > 0 && strides[i] % 8 == 0 && strides[i] < int64_t{1} << 39,
               "a stride of %s of %lld elements: a multiple of 16 bytes, less than 2^40 of them",
               name, static_cast<long long>(strides[i]));
  }
  return 0;
}

constexpr int kStreams = 64;
__device__ int32_t counters[kStreams];

// Launches on a stream share one, as they run one after another: to set it for each took 3 us, of
// 115 for 512 windows (H200). A graph's launches may run beside others, and where more streams come
// than there are counters, the rest have none: these set the caller's.
int find_counter(const VlmkAttentionParams& p, void* stream, int32_t*& counter) {
  static std::atomic<uint64_t> owners[kMaxDevices][kStreams];
  static std::atomic<int32_t*> known[kMaxDevices];
  const auto of = static_cast<cudaStream_t>(stream);
  int device = 0;
  const int code = current_device(device);
  if (code) return code;
  cudaStreamCaptureStatus status;
  VLMK_CUDA(cudaStreamIsCapturing(of, &status));
  unsigned long long id = 0;
  if (status == cudaStreamCaptureStatusNone) {
    VLMK_CUDA(cudaStreamGetId(of, &id));
    int32_t* first = known[device].load(std::memory_order_relaxed);
    if (!first) {
      void* address = nullptr;
      VLMK_CUDA(cudaGetSymbolAddress(&address, counters));
      known[device].store(first = static_cast<int32_t*>(address), std::memory_order_relaxed);
    }
    for (int i = 0; i < kStreams; ++i) {
      const int place = static_cast<int>((id + i) % kStreams);
      uint64_t owner = 0;
      if (owners[device][place].compare_exchange_strong(owner, id + 1) || owner == id + 1) {
        counter = first + place;
        return 0;
      }
    }
  }
  counter = p.counter;
  VLMK_CUDA(cudaMemsetAsync(counter, 0, sizeof(int32_t), of));
  return 0;
}

int check(const VlmkAttentionParams& p) {
  VLMK_CHECK(p.type == VLMK_FLOAT16 || p.type == VLMK_BFLOAT16, "type %d", p.type);
  for (int dim : {p.dim, p.value_dim}) {
    VLMK_CHECK(dim >= 8 && dim <= 256 && dim % 8 == 0, "head dim %d: 8 to 256 in steps of 8", dim);
  }
  VLMK_CHECK(p.batch >= 0 && p.num_queries >= 0 && p.num_keys >= 0 && p.num_heads > 0 &&
                 p.num_kv_heads > 0 && p.num_heads % p.num_kv_heads == 0,
             "batch %d, %d queries, %d keys, %d heads, %d heads of keys", p.batch, p.num_queries,
             p.num_keys, p.num_heads, p.num_kv_heads);
  // Tiles reach beyond the end.
  VLMK_CHECK(p.num_queries < INT_MAX / 2 && p.num_keys < INT_MAX / 2, "more than 2^30 tokens");
  VLMK_CHECK(int64_t{p.batch} * p.num_heads <= INT_MAX, "more than 2^31 - 1 heads");
  VLMK_CHECK(p.scale > 0, "scale %g: positive", static_cast<double>(p.scale));
  VLMK_CHECK(p.softcap >= 0, "softcap %g: 0 or positive", static_cast<double>(p.softcap));
  VLMK_CHECK(!p.start == !p.stop, "start and stop: both or neither");
  VLMK_CHECK(!p.start || !p.causal, "ranges or causal, not both");
  int code = check_strides("q", p.num_queries, p.num_heads, p.batch, p.q_stride_s, p.q_stride_h,
                           p.q_stride_b);
  if (code) return code;
  code = check_strides("k", p.num_keys, p.num_kv_heads, p.batch, p.k_stride_s, p.k_stride_h,
                       p.k_stride_b);
  if (code) return code;
  return check_strides("v", p.num_keys, p.num_kv_heads, p.batch, p.v_stride_s, p.v_stride_h,
                       p.v_stride_b);
}

}  // namespace attention

namespace attention_few {

bool in_tiles(const VlmkAttentionParams& p) {
  const int group = p.num_heads / p.num_kv_heads;
  const int64_t rows = int64_t{p.num_queries} * group;
  const int width = std::max(p.dim, p.value_dim);
  if (!attention::needs_mask(p) || width > kMaxWidth) return false;
  if (rows <= (group > 1 ? attention::kMaxRows : attention::kGroupQueries)) return false;
  // As many as find room at once, and no more keys than that others read them faster: causal, 32
  // heads of 512 of D 128 take 17.0 instead of 18.4 us, 28 of 700 33 instead of 24 (H200).
  const int64_t tiles =
      int64_t{ceil_div(p.num_queries, attention::kGroupQueries)} * p.num_heads * p.batch;
  const int64_t work = tiles * ceil_div(p.num_keys, 64);
  return width <= 64 ? tiles <= 3 * 132 && work <= 1600 : tiles <= 2 * 132 && work <= 2048;
}

// Where they were faster, or as fast, on an H200 (docs/attention_forward.md).
bool takes(const VlmkAttentionParams& p) {
  if (in_tiles(p)) return true;
  const int group = p.num_heads / p.num_kv_heads, width = std::max(p.dim, p.value_dim);
  const int64_t rows = int64_t{p.num_queries} * group, heads = int64_t{p.batch} * p.num_kv_heads;
  if (rows > attention::kMaxRows || width > kMaxWidth || heads > INT_MAX / 2) return false;
  // The others read a key head once for each query head.
  if (group > 1) return true;
  // Enough to share out the keys among eight blocks each.
  if (heads <= 32) return true;
  // The others have a multiprocessor for each head, or rows that keep it as busy as memory.
  if (heads <= 132 || rows > attention::kGroupQueries) return false;
  return width <= 80 || width > 96 || p.num_keys <= 512;
}

}  // namespace attention_few
}  // namespace vlmk

int vlmk_attention_check(const VlmkAttentionParams* params) {
  return vlmk::attention::check(*params);
}

int vlmk_attention(const VlmkAttentionParams* params, void* stream) {
  using namespace vlmk;
  using namespace vlmk::attention;
  const VlmkAttentionParams& p = *params;
  const int code = check(p);
  if (code) return code;
  if (p.batch == 0 || p.num_queries == 0) return 0;
  VLMK_CHECK(p.num_keys > 0, "no keys: nothing to launch, the result is zeros");
  if (attention_few::takes(p)) {
    return p.type == VLMK_FLOAT16 ? attention_few::forward_float16(p, stream)
                                  : attention_few::forward_bfloat16(p, stream);
  }
  return p.type == VLMK_FLOAT16 ? forward_float16(p, stream) : forward_bfloat16(p, stream);
}

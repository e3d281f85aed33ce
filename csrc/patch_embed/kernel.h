// SPDX-License-Identifier: Apache-2.0
// Pixels -> tokens in one kernel: no matrix of patches, no prepared weight, no pass of its own for
// positions or the LayerNorm.
//
// A block keeps its columns of the weight in shared memory for good, with the normalisation of the
// pixels folded in. Three warpgroups share it; each takes 64 patches at a time through all of K, on
// its own: while one stores its tokens, the others keep the tensor cores busy. A fourth one copies
// rows of pixels, as they lie in memory, to shared memory; operands are read from there into
// registers. With a LayerNorm, the blocks of a cluster hold all columns and add up its statistics.
#pragma once

#include "common/hopper.h"
#include "common/launch.h"
#include "common/wgmma.h"
#include "patch_embed/config.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {

// A tile of 64 patches in the order of memory: segments, each the patches of one row of one image's
// grid.
struct Tile {
  int first_patch, last_patch;  // the first and the last one there is
  int first_row, segments;      // rows of patches, counted through all images
  int first_x;                  // of the first segment; the others begin at the image's edge
  int shift;                    // bytes from the copied segment's begin to its first patch
  int first_bytes, row_bytes;   // copied for the first segment, and for a whole row of patches
};

__host__ __device__ __forceinline__ int round_up_16(int bytes) { return (bytes + 15) & ~15; }

template <typename C>
__device__ __forceinline__ Tile tile_at(const Schedule& s, int tile) {
  const int width = s.width.divisor;
  Tile t;
  t.first_patch = tile * kTile;
  t.last_patch = min(t.first_patch + kTile, s.rows * width) - 1;
  t.first_row = s.width.divide(t.first_patch);
  t.first_x = t.first_patch - t.first_row * width;
  t.segments = s.width.divide(t.last_patch) - t.first_row + 1;
  t.shift = (t.first_x * C::kRowBytes) & 15;
  const int in_first = min(width - t.first_x, t.last_patch - t.first_patch + 1);
  t.first_bytes = round_up_16(t.shift + in_first * C::kRowBytes);
  t.row_bytes = round_up_16(width * C::kRowBytes);
  return t;
}

// Where the tokens of a patch go and its position comes from.
struct Place {
  bool there;
  int image, patch;

  __device__ __forceinline__ Place(const VlmkPatchEmbedParams& p, const Schedule& s, int counted) {
    const int row = s.width.divide(counted), x = counted - row * s.width.divisor;
    image = s.grid_y.divide(row);
    patch = (row - image * s.grid_y.divisor) * p.grid_x + x;
    there = row < s.rows && x < p.grid_x;
  }
};

// The barriers of one warpgroup. A slot of its ring of pixels has two halves of 4 rows of pixels.
struct Barriers {
  uint32_t base;
  __device__ uint32_t full(int slot, int half) const { return base + (2 * slot + half) * 16; }
  __device__ uint32_t empty(int slot, int half) const { return full(slot, half) + 8; }
  __device__ uint32_t statistics() const { return base + 4 * kMaxSlots * 8; }
  __device__ uint32_t turn() const { return statistics() + 8; }
};

// The next slot of a ring, and the parity of the wait for it.
template <typename C>
struct Ring {
  int slot = 0;
  uint32_t parity;
  __device__ explicit Ring(uint32_t first_parity) : parity(first_parity) {}
  __device__ __forceinline__ void advance() {
    const bool last = slot + 1 == C::kSlots;
    slot = last ? 0 : slot + 1;
    parity ^= last;
  }
};

// Known to be the same in all threads of a warp, so that what follows from it costs no registers.
__device__ __forceinline__ int warp_index() {
  return __shfl_sync(~0u, static_cast<int>(threadIdx.x) / 32, 0);
}

// ---- Weights -----------------------------------------------------------------------------------

// Where weight (column n, k) lies in bytes. Columns are dealt out so that a thread's sums are 8
// neighbouring channels of a token. k is dealt out so that lane q of four has rows q, q + 4, ... of
// the patch's pixels; of the last two rows of 14, two lanes share each.
template <typename C>
__device__ __forceinline__ int weight_offset(int n, int k) {
  const int column = (n & ~31) | (n & 6) << 2 | (n >> 2 & 6) | (n & 1);
  const int row = k / C::kPatch, x = k % C::kPatch;
  int quad = row / 4 * (C::kPatch / 2) + x / 2, lane = row % 4;
  if constexpr (C::kRows % 4 == 2) {
    if (row >= C::kRows - 2) quad = C::kRows / 4 * (C::kPatch / 2) + x / 2 % 4, lane += x / 8 * 2;
    if (k >= C::kDepth)
      quad = 2 * C::kSteps - 1, lane = k / 2 % 4;  // zeros in the places left over
  }
  return quad * C::kWeightStride + column * 16 + (2 * lane + (k & 1)) * 2;
}

// A power of two that brings the largest of a row's folded weights to 2^14: fp16 then holds the
// row's smaller ones too.
__device__ __forceinline__ float row_scale(float largest) {
  const int exponent = static_cast<int>(__float_as_uint(largest) >> 23);
  return __uint_as_float(static_cast<uint32_t>(min(max(268 - exponent, 1), 253)) << 23);
}

// One column of the weight, dealt out to a warp: 4 neighbouring weights at a time.
template <typename C>
struct WeightColumn {
  static constexpr int kFours = C::kSteps * 4;  // with zeros behind the last
  static constexpr int kEach = ceil_div(kFours, 32);
  uint2 fours[kEach];
  float bias;

  __device__ __forceinline__ void load(const VlmkPatchEmbedParams& p, int column, int lane) {
    const auto* source = static_cast<const uint2*>(p.weight) + int64_t{column} * (C::kDepth / 4);
    const bool inside = column < p.dim;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const bool there = inside && lane + 32 * i < C::kDepth / 4;
      fours[i] = there ? __ldg(source + lane + 32 * i) : make_uint2(0, 0);
    }
    bias = inside && p.bias ? C::to_float(static_cast<const typename C::Token*>(p.bias)[column])
                            : 0.0f;
  }

  // pixel * scale + shift is folded into the weight and the bias; pixels are multiplied less 128.
  __device__ __forceinline__ float fold(const VlmkPatchEmbedParams& p, int lane) {
    float scale = 1.0f;
    if constexpr (C::kFold) {
      float largest = 0.0f, shift = 0.0f;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int channel = channel_of(lane + 32 * i);
        const float to_weight = p.pixel_scale[channel];
        const float2 x = C::to_floats(C::from_bits(fours[i].x));
        const float2 y = C::to_floats(C::from_bits(fours[i].y));
        const float larger = fmaxf(fmaxf(fabsf(x.x), fabsf(x.y)), fmaxf(fabsf(y.x), fabsf(y.y)));
        largest = fmaxf(largest, larger * fabsf(to_weight));
        shift += (x.x + x.y + y.x + y.y) * (p.pixel_shift[channel] + 128.0f * to_weight);
      }
#pragma unroll
      for (int lanes = 16; lanes > 0; lanes /= 2) {
        largest = fmaxf(largest, __shfl_xor_sync(~0u, largest, lanes));
        shift += __shfl_xor_sync(~0u, shift, lanes);
      }
      bias += shift;
      scale = row_scale(largest);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const float factor = p.pixel_scale[channel_of(lane + 32 * i)] * scale;
        const float2 x = C::to_floats(C::from_bits(fours[i].x));
        const float2 y = C::to_floats(C::from_bits(fours[i].y));
        fours[i].x = to_bits(__floats2half2_rn(x.x * factor, x.y * factor));
        fours[i].y = to_bits(__floats2half2_rn(y.x * factor, y.y * factor));
      }
    }
    return scale;
  }

  __device__ __forceinline__ void store(char* weights, int n, int lane) const {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int k = 4 * (lane + 32 * i);
      if (k >= 16 * C::kSteps) break;
      *reinterpret_cast<uint32_t*>(weights + weight_offset<C>(n, k)) = fours[i].x;
      *reinterpret_cast<uint32_t*>(weights + weight_offset<C>(n, k + 2)) = fours[i].y;
    }
  }

  __device__ static int channel_of(int four) {
    return min(four / (C::kPatch * C::kPatch / 4), kChannels - 1);
  }
};

// The block's columns of the weight, by all warps; the next column is on its way meanwhile.
template <typename C>
__device__ __forceinline__ void load_weights(const VlmkPatchEmbedParams& p, int first_column,
                                             char* weights, float2* affine) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  int n = static_cast<int>(threadIdx.x) / 32;
  WeightColumn<C> next;
  next.load(p, first_column + n, lane);
#pragma unroll 1
  while (n < C::kColumns) {
    WeightColumn<C> column = next;
    const int after = n + kThreads / 32;
    if (after < C::kColumns) next.load(p, first_column + after, lane);
    const float scale = column.fold(p, lane);
    column.store(weights, n, lane);
    if (lane == 0) affine[n] = make_float2(1.0f / scale, column.bias);
    n = after;
  }
}

// ---- Prefix tokens -----------------------------------------------------------------------------

// One warp: one prefix token of one image.
template <typename C>
__device__ void prefix_token(const VlmkPatchEmbedParams& p, int row, int tokens_per_image) {
  using Token = typename C::Token;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int64_t b = row / p.num_prefix;
  const int i = row % p.num_prefix;
  const Token* prefix = static_cast<const Token*>(p.prefix) + int64_t{i} * p.dim;
  const Token* pos =
      p.pos_on_prefix ? static_cast<const Token*>(p.pos) + b * p.pos_stride_b + i * p.pos_stride_n
                      : nullptr;
  const int64_t out = (b * tokens_per_image + i) * p.dim;
  const auto token = [&](int d) {
    return C::to_float(prefix[d]) + (pos ? C::to_float(pos[d]) : 0.0f);
  };
  float mean = 0.0f, rstd = 1.0f;
  if constexpr (C::kNormed) {
    float sum = 0.0f, squares = 0.0f;
    for (int d = lane; d < p.dim; d += 32) sum += token(d);
    for (int lanes = 16; lanes > 0; lanes /= 2) sum += __shfl_xor_sync(~0u, sum, lanes);
    mean = sum / p.dim;
    for (int d = lane; d < p.dim; d += 32) squares += (token(d) - mean) * (token(d) - mean);
    for (int lanes = 16; lanes > 0; lanes /= 2) squares += __shfl_xor_sync(~0u, squares, lanes);
    rstd = rsqrtf(squares / p.dim + p.eps);
  }
  for (int d = lane; d < p.dim; d += 32) {
    float x = token(d);
    if (p.total) static_cast<Token*>(p.total)[out + d] = C::to_token(x);
    if constexpr (C::kNormed) {
      x = (x - mean) * rstd * C::to_float(static_cast<const Token*>(p.norm_weight)[d]);
      if (p.norm_bias) x += C::to_float(static_cast<const Token*>(p.norm_bias)[d]);
    }
    static_cast<Token*>(p.out)[out + d] = C::to_token(x);
  }
}

// ---- Pixels ------------------------------------------------------------------------------------

// Where the rows of pixels of a patch begin, in bytes behind its first.
template <typename C>
__device__ __forceinline__ void tabulate_rows(const VlmkPatchEmbedParams& p, int64_t* rows) {
  const int row = static_cast<int>(threadIdx.x);
  if (row >= C::kTabulated) return;  // some more than there are, for whole slots
  rows[row] = (row / C::kPatch * p.pixel_stride_c + row % C::kPatch * p.pixel_stride_y) *
              static_cast<int>(sizeof(typename C::Pixel));
}

// One warp feeds one warpgroup. It copies 16 bytes at a time, the same places of every row of
// pixels.
template <typename C>
__device__ void copy_pixels(const VlmkPatchEmbedParams& p, const Schedule& s, int group,
                            uint32_t pixels, const int64_t* rows, Barriers barriers) {
  constexpr int kPieces = ceil_div(C::kRoom / 16, 32);
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int worker = static_cast<int>(blockIdx.x) / s.cluster / s.column_groups;
  Ring<C> ring(1);
  for (int tile = worker + group * s.clusters; tile < s.tiles; tile += kGroups * s.clusters) {
    const Tile t = tile_at<C>(s, tile);
    const int last_begin = (t.first_row + t.segments - 1) * s.width.divisor;
    const int last_bytes = round_up_16((t.last_patch - last_begin + 1) * C::kRowBytes);
    const int bytes = t.segments == 1 ? t.first_bytes
                                      : t.first_bytes + (t.segments - 2) * t.row_bytes + last_bytes;
    const char* sources[kPieces];
    bool copied[kPieces];
#pragma unroll
    for (int i = 0; i < kPieces; ++i) {
      const int place = (lane + 32 * i) * 16;
      int row = t.first_row, inside = place - t.shift + t.first_x * C::kRowBytes, behind = place;
      int segment_bytes = t.first_bytes;
      while (behind >= segment_bytes && behind < bytes) {
        behind -= segment_bytes, inside = behind, segment_bytes = t.row_bytes, ++row;
      }
      // What rows have been widened by is not there.
      copied[i] = place < bytes && inside < round_up_16(p.grid_x * C::kRowBytes);
      const int b = s.grid_y.divide(row), gy = row - b * s.grid_y.divisor;
      sources[i] = static_cast<const char*>(p.pixels) + inside +
                   (b * p.pixel_stride_b + gy * p.pixel_stride_gy) *
                       static_cast<int>(sizeof(typename C::Pixel));
      asm volatile("" : "+l"(sources[i]));  // nvcc would add it up for every copy
    }
#pragma unroll 1
    for (int first = 0; first < C::kRows; first += 2 * kStageRows) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const uint32_t stage =
            pixels + ring.slot * C::kSlotBytes + half * C::kStageBytes + lane * 16;
        const int row = first + half * kStageRows;
        int64_t offsets[kStageRows];
#pragma unroll
        for (int j = 0; j < kStageRows; ++j) offsets[j] = rows[row + j];
        barrier_wait(barriers.empty(ring.slot, half), ring.parity);
#pragma unroll
        for (int j = 0; j < kStageRows; ++j) {
          if (C::kRows % (2 * kStageRows) && row + j >= C::kRows) break;
#pragma unroll
          for (int i = 0; i < kPieces; ++i) {
            if (copied[i]) copy_async(stage + j * C::kPitch + i * 512, sources[i] + offsets[j]);
          }
        }
        barrier_arrive_after_copies(barriers.full(ring.slot, half));
      }
      ring.advance();
    }
  }
}

// ---- Products ----------------------------------------------------------------------------------

// The pixels that a thread multiplies of half a slot, as they lie in memory: one row of each of its
// two patches.
template <typename C>
struct Pixels {
  static constexpr int kPairs = C::kPatch / 2;
  static constexpr int kWords = kPairs * static_cast<int>(sizeof(typename C::Pixel));
  uint32_t words[kWords];

  // From where the pixels of the first patch begin, and of the second if they aren't neighbours.
  __device__ __forceinline__ void load(uint32_t first, uint32_t second) {
#pragma unroll
    for (int i = 0; i < kWords;) {
      if constexpr (C::kPatch == 16) {
        load_shared(i < kWords / 2 ? first + i * 4 : second + i * 4 - kWords * 2,
                    *reinterpret_cast<uint4*>(words + i));
        i += 4;
      } else if constexpr (!C::kFold) {
        load_shared(first + i * 4, *reinterpret_cast<uint2*>(words + i));
        i += 2;
      } else {
        load_shared(first + i * 4, words[i]);
        i += 1;
      }
    }
  }

  // The pair of pixels `pair` of patch h.
  __device__ __forceinline__ uint32_t operand(int h, int pair) const {
    const int index = h * kPairs + pair;  // patches are behind each other in words too
    if constexpr (C::kFold) {
      return index % 2 ? C::template widen<0x4342>(words[index / 2])
                       : C::template widen<0x4140>(words[index / 2]);
    } else {
      // A register of its own: where a load fills a product's operand, ptxas waits for the products
      // before. It would see through a plain copy.
      uint32_t copy;
      const uint32_t zero = threadIdx.x >> 20;
      asm volatile("xor.b32 %0, %1, %2;" : "=r"(copy) : "r"(words[index]), "r"(zero));
      return copy;
    }
  }
};

// Adds the products of up to 8 rows of pixels, those of one slot; `patch` are the addresses of the
// thread's two patches in the first slot. One product runs while the next one's operand is formed.
template <typename C, int kBodyRows>
__device__ __forceinline__ void multiply(float (&sum)[C::kSums], const uint32_t (&patch)[2],
                                         uint64_t& b, Barriers barriers, Ring<C>& ring) {
  constexpr int kQuads = C::kPatch / 2;  // of half a slot
  constexpr bool kTwo = kBodyRows > kStageRows;
  constexpr int kSteps = ceil_div(kBodyRows * C::kPatch, 16);
  const int lane = static_cast<int>(threadIdx.x) % 32, q = lane % 4;
  // Of two rows, lanes q and q + 2 take the beginning and the end of the same one.
  const uint32_t own =
      kBodyRows > 2 ? q * C::kPitch : q % 2 * C::kPitch + q / 2 * 8 * sizeof(typename C::Pixel);
  const uint32_t offset = ring.slot * C::kSlotBytes + own;
  Pixels<C> halves[2];
  uint32_t a[2][4];
  const auto load = [&](int half) {
    barrier_wait(barriers.full(ring.slot, half), ring.parity);
    const uint32_t there = offset + half * C::kStageBytes;
    if (kTwo || half == 0) halves[half].load(patch[0] + there, patch[1] + there);
    __syncwarp();
    if (lane == 0) barrier_arrive(barriers.empty(ring.slot, half));
  };
  const auto form = [&](uint32_t (&operand)[4], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int quad = 2 * step + i / 2;
      operand[i] = halves[quad / kQuads].operand(i % 2, quad % kQuads);
      // Beyond the last pixel lie other patches': 0 times their NaN would be NaN.
      if (kBodyRows == 2 && !C::kFold && quad == 3 && q >= 2) operand[i] = 0;
    }
  };
  load(0);
  mma_wait<0>();
  form(a[0], 0);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    mma_fence();
    mma<typename C::Operand, C::kColumns>(sum, a[step & 1], b, true);
    mma_commit();
    b += 2 * C::kWeightStride >> 4;
    if (step == 0) load(1);
    if (step + 1 == kSteps) break;
    mma_wait<1>();
    form(a[(step + 1) & 1], step + 1);
  }
  ring.advance();
}

// ---- Tokens ------------------------------------------------------------------------------------

// The thread's columns of the positions of its two tokens: 8 in every 32.
template <typename C>
struct Positions {
  uint4 columns[2][C::kColumns / 32];

  __device__ __forceinline__ void load(const VlmkPatchEmbedParams& p, const Schedule& s,
                                       const int (&patch)[2], int column) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const Place place(p, s, patch[h]);
      const auto* pos =
          static_cast<const typename C::Token*>(p.pos) + place.image * p.pos_stride_b +
          (place.patch + (p.pos_on_prefix ? p.num_prefix : 0)) * p.pos_stride_n + column;
#pragma unroll
      for (int g = 0; g < C::kColumns / 32; ++g) {
        const bool add = p.pos && place.there && column + 32 * g < p.dim;
        columns[h][g] =
            add ? __ldg(reinterpret_cast<const uint4*>(pos + 32 * g)) : make_uint4(0, 0, 0, 0);
      }
    }
  }
};

// Mean and summed squares of the deviations from it, of a row's columns in this block: four lanes
// hold them.
template <typename C>
__device__ __forceinline__ float2 row_statistics(const float (&sum)[C::kSums], int h) {
  float total = 0.0f, squares = 0.0f;
#pragma unroll
  for (int i = 0; i < C::kSums / 4; ++i) total += sum[4 * i + 2 * h] + sum[4 * i + 2 * h + 1];
  total += __shfl_xor_sync(~0u, total, 1);
  total += __shfl_xor_sync(~0u, total, 2);
  const float mean = total / C::kColumns;
#pragma unroll
  for (int i = 0; i < C::kSums / 4; ++i) {
    const float x = sum[4 * i + 2 * h] - mean, y = sum[4 * i + 2 * h + 1] - mean;
    squares += x * x + y * y;
  }
  squares += __shfl_xor_sync(~0u, squares, 1);
  squares += __shfl_xor_sync(~0u, squares, 2);
  return make_float2(mean, squares);
}

// Mean and 1 / standard deviation of a row from the parts of all blocks, of which each of the four
// lanes takes two; exact for a large mean too.
template <typename C>
__device__ __forceinline__ float2 combine(const float2* parts, int cluster, float eps) {
  static_assert(kMaxCluster == 8);
  const int q = static_cast<int>(threadIdx.x) % 4;
  const float2 none = make_float2(0.0f, 0.0f);
  const float2 x = q < cluster ? parts[q * kTile] : none;
  const float2 y = q + 4 < cluster ? parts[(q + 4) * kTile] : none;
  float mean = x.x + y.x;
  mean += __shfl_xor_sync(~0u, mean, 1);
  mean += __shfl_xor_sync(~0u, mean, 2);
  mean /= cluster;
  float squares = 0.0f;
  if (q < cluster) squares += x.y + C::kColumns * (x.x - mean) * (x.x - mean);
  if (q + 4 < cluster) squares += y.y + C::kColumns * (y.x - mean) * (y.x - mean);
  squares += __shfl_xor_sync(~0u, squares, 1);
  squares += __shfl_xor_sync(~0u, squares, 2);
  return make_float2(mean, rsqrtf(squares / (cluster * C::kColumns) + eps));
}

// The statistics of the thread's two rows. Blocks exchange theirs, 64 rows in one copy for each
// other block: 8 bytes at a time would take longer than the products.
template <typename C>
__device__ __forceinline__ void share_statistics(const VlmkPatchEmbedParams& p, const Schedule& s,
                                                 const float (&sum)[C::kSums], float2* parts,
                                                 Barriers barriers, uint32_t parity,
                                                 float2 (&mean_rstd)[2]) {
  const int thread = static_cast<int>(threadIdx.x) % 128,
            group = static_cast<int>(threadIdx.x) / 128;
  const int rank = static_cast<int>(cluster_rank());
  const int slot = thread / 32 * 16 + thread % 32 / 4;
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const float2 part = row_statistics<C>(sum, h);
    if (thread % 4 == 0) parts[rank * kTile + slot + 8 * h] = part;
  }
  fence_async_proxy();
  asm volatile("bar.sync %0, 128;" ::"r"(group + 1) : "memory");
  if (thread == 0) barrier_expect(barriers.statistics(), (s.cluster - 1) * kTile * 8);
  if (thread < s.cluster && thread != rank) {
    const uint32_t here = shared_address(parts + rank * kTile);
    copy_to_block(in_block(here, thread), here, kTile * 8, in_block(barriers.statistics(), thread));
  }
  barrier_wait(barriers.statistics(), parity);
#pragma unroll
  for (int h = 0; h < 2; ++h) mean_rstd[h] = combine<C>(parts + slot + 8 * h, s.cluster, p.eps);
}

// The thread's columns of its two tokens, where there are such patches and columns.
template <typename C>
__device__ __forceinline__ void store_tokens(const VlmkPatchEmbedParams& p, const Schedule& s,
                                             void* tokens, const float (&sum)[C::kSums],
                                             const int (&patch)[2], int first_column) {
#pragma unroll
  for (int h = 0; h < 2; ++h) {
    const Place place(p, s, patch[h]);
    const int64_t row =
        int64_t{place.image} * (p.grid_y * p.grid_x + p.num_prefix) + p.num_prefix + place.patch;
    auto* out = static_cast<typename C::Token*>(tokens) + row * p.dim + first_column;
#pragma unroll
    for (int g = 0; g < C::kColumns / 32; ++g) {
      uint4 packed;
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const int i = (4 * g + u) * 4 + 2 * h;
        (&packed.x)[u] = to_bits(C::to_tokens(sum[i], sum[i + 1]));
      }
      if (place.there && first_column + 32 * g < p.dim) {
        *reinterpret_cast<uint4*>(out + 32 * g) = packed;
      }
    }
  }
}

template <typename C>
__device__ __forceinline__ void finish_tile(const VlmkPatchEmbedParams& p, const Schedule& s,
                                            float (&sum)[C::kSums], const Positions<C>& positions,
                                            const int (&patch)[2], int first_column,
                                            const float2* affine, const float2* norm,
                                            float2* statistics, Barriers barriers,
                                            uint32_t parity) {
  const int q = static_cast<int>(threadIdx.x) % 4;
  const int column = first_column + 8 * q;
#pragma unroll
  for (int i = 0; i < C::kSums / 4; ++i) {
    const int g = i / 4, u = i % 4;
    const float4 scale_bias = *reinterpret_cast<const float4*>(affine + 32 * g + 8 * q + 2 * u);
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      const float2 position = C::to_floats(C::from_bits((&positions.columns[h][g].x)[u]));
      float& x = sum[4 * i + 2 * h];
      float& y = sum[4 * i + 2 * h + 1];
      x = x * scale_bias.x + (scale_bias.y + position.x);
      y = y * scale_bias.z + (scale_bias.w + position.y);
    }
  }
  if constexpr (C::kNormed) {
    float2 mean_rstd[2];
    share_statistics<C>(p, s, sum, statistics, barriers, parity, mean_rstd);
    if (p.total) store_tokens<C>(p, s, p.total, sum, patch, column);
#pragma unroll
    for (int i = 0; i < C::kSums / 4; ++i) {
      const int place = 32 * (i / 4) + 8 * q + 2 * (i % 4);
      const float4 weight_bias = *reinterpret_cast<const float4*>(norm + place);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float& x = sum[4 * i + 2 * h];
        float& y = sum[4 * i + 2 * h + 1];
        x = (x - mean_rstd[h].x) * mean_rstd[h].y * weight_bias.x + weight_bias.y;
        y = (y - mean_rstd[h].x) * mean_rstd[h].y * weight_bias.z + weight_bias.w;
      }
    }
  }
  store_tokens<C>(p, s, p.out, sum, patch, column);
}

// ---- The kernel --------------------------------------------------------------------------------

template <typename C>
__device__ __forceinline__ void embed_tiles(const VlmkPatchEmbedParams& p, const Schedule& s,
                                            char* shared, int group, Barriers barriers,
                                            int first_column) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int warp = static_cast<int>(threadIdx.x) / 32 % 4;
  const uint32_t pixels = shared_address(shared + C::kPixels) + group * C::kRingBytes;
  const uint64_t weights = plain_descriptor(shared_address(shared), C::kWeightStride);
  const auto* affine = reinterpret_cast<const float2*>(shared + C::kAffine);
  const auto* norm = reinterpret_cast<const float2*>(shared + C::kNorm);
  auto* statistics =
      reinterpret_cast<float2*>(shared + C::kStatistics) + group * 2 * kMaxCluster * kTile;
  const int worker = static_cast<int>(blockIdx.x) / s.cluster / s.column_groups;
  const uint32_t next_turn = barriers.turn() + kBarrierBytes;
  Ring<C> ring(0);
  uint32_t norm_parity = 0;
  // Warpgroups that began together would also store together, and the tensor cores would wait.
  bool first = s.tiles > 2 * kGroups * s.clusters;
  if (first && group > 0) barrier_wait(barriers.turn(), 0);
  float sum[C::kSums];
  for (int tile = worker + group * s.clusters; tile < s.tiles; tile += kGroups * s.clusters) {
    const Tile t = tile_at<C>(s, tile);
    int patch[2];
    uint32_t address[2];
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      patch[h] = t.first_patch + C::patch_of(warp, h, lane / 4);
      // Neighbours stay neighbours at the end.
      const int there = min(patch[h], t.last_patch - (C::kPatch == 14 ? 1 - h : 0));
      const int row = s.width.divide(there), x = there - row * s.width.divisor;
      const int behind = row - t.first_row - 1;
      address[h] = pixels + (behind < 0 ? t.shift + (x - t.first_x) * C::kRowBytes
                                        : t.first_bytes + behind * t.row_bytes + x * C::kRowBytes);
    }
#pragma unroll
    for (float& x : sum) x = 0.0f;
    uint64_t b = weights;
    Positions<C> positions;
    constexpr int kWhole = C::kRows / (2 * kStageRows), kRest = C::kRows % (2 * kStageRows);
#pragma unroll 1
    for (int body = 0; body < kWhole; ++body) {
      // On their way while the last products run.
      if (body + 1 == kWhole) positions.load(p, s, patch, first_column + 8 * (lane % 4));
      multiply<C, 2 * kStageRows>(sum, address, b, barriers, ring);
      if (first && body == kWhole / kGroups) {
        first = false;
        if (threadIdx.x % 128 == 0 && group + 1 < kGroups) barrier_arrive(next_turn);
      }
    }
    if constexpr (kRest > 0) {
      multiply<C, kRest>(sum, address, b, barriers, ring);
    }
    mma_wait<0>();
    finish_tile<C>(p, s, sum, positions, patch, first_column, affine, norm,
                   statistics + norm_parity * kMaxCluster * kTile, barriers, norm_parity);
    norm_parity ^= 1;
  }
}

template <typename C>
__global__ void __launch_bounds__(kThreads, 1)
    patch_embed_kernel(const __grid_constant__ VlmkPatchEmbedParams p,
                       const __grid_constant__ Schedule s) {
  extern __shared__ __align__(128) char shared[];
  const int warp = warp_index();
  const int column_group = static_cast<int>(blockIdx.x) / s.cluster % s.column_groups;
  const int first_column =
      (column_group * s.cluster + static_cast<int>(cluster_rank())) * C::kColumns;
  const Barriers all{shared_address(shared + C::kBarriers)};
  if (threadIdx.x == 0) {
    for (int group = 0; group < kGroups; ++group) {
      const Barriers barriers{all.base + group * kBarrierBytes};
      for (int slot = 0; slot < C::kSlots; ++slot) {
        for (int half = 0; half < 2; ++half) {
          barrier_init(barriers.full(slot, half), 32);
          barrier_init(barriers.empty(slot, half), 4);
        }
      }
      barrier_init(barriers.turn(), 1);
      barrier_init(barriers.statistics(), 1);
    }
    fence_barrier_init();
  }
  tabulate_rows<C>(p, reinterpret_cast<int64_t*>(shared + C::kRowTable));
  load_weights<C>(p, first_column, shared, reinterpret_cast<float2*>(shared + C::kAffine));
  if constexpr (C::kNormed) {
    using Token = typename C::Token;
    for (int n = static_cast<int>(threadIdx.x); n < C::kColumns; n += kThreads) {
      const int column = first_column + n;
      const float bias =
          p.norm_bias ? C::to_float(static_cast<const Token*>(p.norm_bias)[column]) : 0.0f;
      reinterpret_cast<float2*>(shared + C::kNorm)[n] =
          make_float2(C::to_float(static_cast<const Token*>(p.norm_weight)[column]), bias);
    }
  }
  fence_async_proxy();
  cluster_sync();

  if (warp >= 4 * kGroups) {
    shrink_registers<kProducerRegisters>();
    const int group = warp - 4 * kGroups;
    if (group < kGroups) {
      copy_pixels<C>(p, s, group, shared_address(shared + C::kPixels) + group * C::kRingBytes,
                     reinterpret_cast<const int64_t*>(shared + C::kRowTable),
                     {all.base + group * kBarrierBytes});
    } else {
      const int tokens_per_image = p.grid_y * p.grid_x + p.num_prefix;
      for (int row = static_cast<int>(blockIdx.x); row < p.batch * p.num_prefix;
           row += static_cast<int>(gridDim.x)) {
        prefix_token<C>(p, row, tokens_per_image);
      }
    }
  } else {
    grow_registers<kConsumerRegisters>();
    const int group = warp / 4;
    embed_tiles<C>(p, s, shared, group, {all.base + group * kBarrierBytes}, first_column);
  }
  // No block leaves while others may still write to it.
  cluster_sync();
}

}  // namespace patch_embed
}  // namespace vlmk

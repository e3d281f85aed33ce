// SPDX-License-Identifier: Apache-2.0
// Pixels -> tokens in one kernel: no matrix of patches, no prepared weight, no pass of its own for
// positions or the LayerNorm.
//
// A block keeps its columns of the weight in shared memory for good, with the normalisation of the
// pixels folded in. Three warpgroups share it; each takes 64 patches at a time through all of K, on
// its own: while one stores its tokens, the others keep the tensor cores busy. Of a fourth one, a
// warp for each of them copies rows of pixels, as they lie in memory, to shared memory, from where
// operands are read into registers; its last warp makes the prefix tokens. With a LayerNorm, the
// blocks of a cluster hold all columns and add up its statistics.
#pragma once

#include <cstdint>

#include "common/hopper.h"
#include "common/launch.h"
#include "common/wgmma.h"
#include "patch_embed/config.h"
#include "patch_embed/pixels.h"
#include "patch_embed/tiles.h"
#include "patch_embed/tokens.h"
#include "patch_embed/weights.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {

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
  const int lane = lane_index(), q = lane % 4;
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
    mma<typename C::Operand, C::kColumns>(sum, a[step & 1], b);
    mma_commit();
    b += 2 * C::kWeightStride >> 4;
    if (step == 0) load(1);
    if (step + 1 == kSteps) break;
    mma_wait<1>();
    form(a[(step + 1) & 1], step + 1);
  }
  ring.advance();
}

// All tiles of one warpgroup.
template <typename C>
__device__ __forceinline__ void embed_tiles(const VlmkPatchEmbedParams& p, const Schedule& s,
                                            char* shared, int group, Barriers barriers,
                                            int first_column) {
  const int lane = lane_index();
  const int warp = group_thread() / 32;
  const uint32_t pixels = shared_address(shared + C::kPixels) + group * C::kRingBytes;
  const uint64_t weights = plain_descriptor(shared_address(shared), C::kWeightStride);
  const auto* affine = reinterpret_cast<const float2*>(shared + C::kAffine);
  const auto* norm = reinterpret_cast<const float2*>(shared + C::kNorm);
  // Of two tiles, each with its barrier: a block that has all others' may be one ahead of a block
  // that doesn't have them yet.
  auto* statistics =
      reinterpret_cast<float2*>(shared + C::kStatistics) + group * 2 * kMaxCluster * kTile;
  const int worker = static_cast<int>(blockIdx.x) / s.cluster / s.column_groups;
  const uint32_t next_turn = barriers.turn() + kBarrierBytes;
  Ring<C> ring(0);
  uint32_t done = 0;
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
        if (group_thread() == 0 && group + 1 < kGroups) barrier_arrive(next_turn);
      }
    }
    if constexpr (kRest > 0) {
      multiply<C, kRest>(sum, address, b, barriers, ring);
    }
    mma_wait<0>();
    finish_tile<C>(p, s, sum, positions, patch, first_column, affine, norm,
                   statistics + (done & 1) * kMaxCluster * kTile, barriers.statistics(done & 1),
                   done >> 1 & 1);
    ++done;
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
      for (int set = 0; set < 2; ++set) barrier_init(barriers.statistics(set), 1);
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

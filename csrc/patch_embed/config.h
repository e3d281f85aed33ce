// SPDX-License-Identifier: Apache-2.0
// What a variant of the patch embedding kernel is made of: sizes, layout of shared memory, and the
// types of pixels and tokens.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/launch.h"

namespace vlmk {
namespace patch_embed {

constexpr int kChannels = 3;
constexpr int kTile = 64;   // patches that a warpgroup takes at a time
constexpr int kGroups = 3;  // warpgroups that multiply
constexpr int kThreads = (kGroups + 1) * 128;
constexpr int kStageRows = 4;  // rows of pixels of each patch in half a slot
constexpr int kMaxSlots = 3;   // of the ring of pixels of each warpgroup
constexpr int kMaxCluster = 8;
constexpr int kBarrierBytes = (4 * kMaxSlots + 2) * 8;  // of each warpgroup
constexpr int kPadding = 112;            // bytes of a row in a stage that segments may leave unused
constexpr int kSharedLimit = 227 << 10;  // of a block on sm_90
constexpr int kConsumerRegisters = 152, kProducerRegisters = 56;

// How tiles are dealt out: column group g of cluster i takes the tiles i, i + clusters, ...
struct Schedule {
  int32_t cluster;        // blocks in a cluster: columns of the output that share pixels
  int32_t column_groups;  // clusters side by side that make up all columns
  int32_t clusters;       // of each column group
  int32_t tiles;
};

__device__ __forceinline__ uint32_t to_bits(__half2 x) { return *reinterpret_cast<uint32_t*>(&x); }
__device__ __forceinline__ uint32_t to_bits(__nv_bfloat162 x) {
  return *reinterpret_cast<uint32_t*>(&x);
}

template <int kPatch_, int kColumns_, typename Pixel_, typename Token_, bool kNormed_>
struct Config {
  using Pixel = Pixel_;
  using Token = Token_;
  // uint8 is multiplied as fp16, which holds 0..255 exactly and the folded weight to 11 bits.
  static constexpr bool kFold = std::is_same_v<Pixel, uint8_t>;
  using Operand = std::conditional_t<kFold, __half, Token>;
  using Pair = std::conditional_t<std::is_same_v<Token, __half>, __half2, __nv_bfloat162>;

  static constexpr bool kNormed = kNormed_;
  static constexpr int kPatch = kPatch_;      // pixels, in both directions
  static constexpr int kColumns = kColumns_;  // of the output, in each block
  static constexpr int kRows = kChannels * kPatch;
  static constexpr int kDepth = kRows * kPatch;
  static constexpr int kSteps = ceil_div(kDepth, 16);
  static constexpr int kSums = kColumns / 2;               // of each thread
  static constexpr int kVector = kPatch % 4 == 0 ? 4 : 2;  // pixels that a thread reads at once
  static_assert(kPatch == 14 || kPatch == 16);

  // Bytes. A row of pixels of all patches of a tile has room for segments that don't begin and end
  // at multiples of 16.
  static constexpr int kRowBytes = kPatch * static_cast<int>(sizeof(Pixel));
  static constexpr int kPitch = kTile * kRowBytes + (kRowBytes % 16 ? kPadding : 0);
  static constexpr int kStageBytes = kStageRows * kPitch;
  // Bricks of 8 columns that follow each other along k start in different banks: the stores of a
  // weight row don't collide.
  static constexpr int kWeightStride = kColumns * 16 + 16;

  // Shared memory: weights, what doesn't grow, and as many slots of pixels as fit beside them.
  static constexpr int kAffine = 2 * kSteps * kWeightStride;
  static constexpr int kBarriers = kAffine + kColumns * 8;
  static constexpr int kNorm = kBarriers + kGroups * kBarrierBytes;
  static constexpr int kStatistics = kNorm + (kNormed ? kColumns * 8 : 0);
  static constexpr int kPixels =
      kStatistics + (kNormed ? kGroups * 2 * kMaxCluster * kTile * 8 : 0);
  static constexpr int kSlotBytes = 2 * kStageBytes;
  static constexpr int kFitting = (kSharedLimit - kPixels) / (kGroups * kSlotBytes);
  static constexpr int kSlots = kFitting < kMaxSlots ? kFitting : kMaxSlots;
  static constexpr int kRingBytes = kSlots * kSlotBytes;
  static constexpr int kSharedBytes = kPixels + kGroups * kRingBytes;

  // The patch of row 8 h + i of a warp's 16. Four pairs of bf16 pixels of 8 patches that are 4
  // apart fill all 32 banks once: 28 bytes a row of a patch.
  __device__ static int patch_of(int warp, int h, int i) {
    if constexpr (kRowBytes == 28) return 32 * (warp >> 1) + 4 * i + 2 * (warp & 1) + h;
    return 16 * warp + 8 * h + i;
  }

  __device__ static float to_float(__half x) { return __half2float(x); }
  __device__ static float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
  __device__ static float2 to_floats(__half2 x) { return __half22float2(x); }
  __device__ static float2 to_floats(__nv_bfloat162 x) { return __bfloat1622float2(x); }
  __device__ static Pair from_bits(uint32_t x) { return *reinterpret_cast<Pair*>(&x); }
  __device__ static uint32_t to_bits(Pair x) { return patch_embed::to_bits(x); }
  __device__ static Pair zero_pair() { return from_bits(0); }
  __device__ static Token to_token(float x) {
    if constexpr (std::is_same_v<Token, __half>) {
      return __float2half_rn(x);
    } else {
      return __float2bfloat16_rn(x);
    }
  }
  __device__ static Pair to_tokens(float x, float y) {
    if constexpr (std::is_same_v<Token, __half>) {
      return __floats2half2_rn(x, y);
    } else {
      return __floats2bfloat162_rn(x, y);
    }
  }

  // Two bytes of `word` as fp16, less 128: 0x6400 + x is 1024 + x. Around 0 the rounding of the
  // folded weight weighs as little as that of a normalised pixel would.
  template <int kBytes>
  __device__ static uint32_t widen(uint32_t word) {
    const uint32_t bits = __byte_perm(word, 0x64, kBytes);
    const __half2 x = *reinterpret_cast<const __half2*>(&bits);
    return patch_embed::to_bits(__hsub2(x, __half2half2(__ushort_as_half(0x6480))));
  }

  __device__ static uint32_t load_two(uint32_t address) {
    uint32_t word;
    if constexpr (kFold) {
      uint16_t bytes;
      asm volatile("ld.shared.u16 %0, [%1];" : "=h"(bytes) : "r"(address) : "memory");
      return widen<0x4140>(bytes);
    } else {
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
      return word;
    }
  }

  __device__ static void load_four(uint32_t address, uint32_t& x, uint32_t& y) {
    if constexpr (kFold) {
      uint32_t word;
      asm volatile("ld.shared.u32 %0, [%1];" : "=r"(word) : "r"(address) : "memory");
      x = widen<0x4140>(word), y = widen<0x4342>(word);
    } else {
      asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(x), "=r"(y) : "r"(address) : "memory");
    }
  }
};

}  // namespace patch_embed
}  // namespace vlmk

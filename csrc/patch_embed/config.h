// SPDX-License-Identifier: Apache-2.0
// What a variant of the patch embedding kernel is made of: sizes, layout of shared memory, and the
// types of pixels and tokens.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

#include "common/float16.h"
#include "common/hopper.h"
#include "common/launch.h"
#include "common/threads.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {

constexpr int kChannels = 3;
constexpr int kTile = 64;      // patches that a warpgroup takes at a time
constexpr int kStageRows = 4;  // rows of pixels of each patch in half a slot
constexpr int kMaxSlots = 6;   // of the ring of pixels of each warpgroup
constexpr int kMaxCluster = 8;
constexpr int kBarrierBytes = (4 * kMaxSlots + 4) * 8;  // of each warpgroup, whole 16 bytes
constexpr int kPadding = 112;  // bytes of a row in a stage that segments may leave unused

__host__ __device__ __forceinline__ int round_up_16(int bytes) { return (bytes + 15) & ~15; }

// Division by a number that the host knows, for 0 <= n < 2^31: a tenth of a division's cycles.
struct Divisor {
  int32_t divisor;
  uint32_t multiplier;
  int32_t shift;

  explicit Divisor(int d) : divisor(d), multiplier(0), shift(0) {
    if (d <= 1) return;
    int bits = 0;
    while ((int64_t{1} << bits) < d) ++bits;
    multiplier = static_cast<uint32_t>(((uint64_t{1} << (31 + bits)) + d - 1) / d);
    shift = bits - 1;
  }

  __device__ __forceinline__ int divide(int n) const {
    return divisor == 1 ? n : static_cast<int>(__umulhi(n, multiplier) >> shift);
  }
};

// How tiles are dealt out: column group g of cluster i takes the tiles i, i + clusters, ...
struct Schedule {
  int32_t cluster;        // blocks in a cluster: columns of the output that share pixels
  int32_t column_groups;  // clusters side by side that make up all columns
  int32_t clusters;       // of each column group
  int32_t tiles;
  int32_t rows;    // of patches, in all images
  Divisor width;   // of a row, in patches; may be one more than there are
  Divisor grid_y;  // rows of an image
};

// What a token's type T is to the kernels: pairs of it, and the way to floats and back.
template <typename T>
struct TokenType {
  using Token = T;
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

  __device__ static float to_float(__half x) { return __half2float(x); }
  __device__ static float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }
  __device__ static float2 to_floats(__half2 x) { return __half22float2(x); }
  __device__ static float2 to_floats(__nv_bfloat162 x) { return __bfloat1622float2(x); }
  __device__ static Pair from_bits(uint32_t x) { return *reinterpret_cast<Pair*>(&x); }
  __device__ static Token to_token(float x) {
    if constexpr (std::is_same_v<Token, __half>) {
      return __float2half_rn(x);
    } else {
      return __float2bfloat16_rn(x);
    }
  }
};

template <int kPatch_, int kColumns_, typename Pixel_, typename Token_, bool kNormed_>
struct Config : TokenType<Token_> {
  using Pixel = Pixel_;
  // uint8 is multiplied as it is, less 128. The folded weight is a whole number of 16 bits, each
  // half of which is a column of bytes.
  static constexpr bool kFold = std::is_same_v<Pixel, uint8_t>;
  using Sum = std::conditional_t<kFold, int32_t, float>;

  static constexpr bool kNormed = kNormed_;
  static constexpr int kPatch = kPatch_;      // pixels, in both directions
  static constexpr int kColumns = kColumns_;  // of the output, in each block
  static constexpr int kRows = kChannels * kPatch;
  static constexpr int kDepth = kRows * kPatch;
  static constexpr int kTotals = kColumns / 2;  // of each thread
  static constexpr int kSums = kFold ? 2 * kTotals : kTotals;
  static_assert(kPatch == 14 || kPatch == 16);

  // Warpgroups that multiply: as many as there are registers for.
  static constexpr int kGroups = kFold ? 2 : 3;
  static constexpr int kThreads = (kGroups + 1) * 128;
  // Warps that copy pixels for each of them. One that issues every copy of 16 bytes would take
  // longer than the products.
  static constexpr int kFeeders = kFold ? 2 : 1;
  static constexpr int kConsumerRegisters = kFold ? 224 : 152;
  static constexpr int kProducerRegisters = 56;

  // The weight lies in bricks of 8 columns by 16 bytes along k, which a product takes two at a time
  // along k: a lane's operand is one word of each. Bricks that follow each other along k start in
  // different banks: the stores of a weight row don't collide.
  static constexpr int kWeights = kFold ? 1 : 2;                       // bytes of each
  static constexpr int kBricks = 2 * ceil_div(kDepth * kWeights, 32);  // along k
  static constexpr int kBrickColumns = kFold ? 2 * kColumns : kColumns;
  static constexpr int kWeightStride = kBrickColumns * 16 + 16;

  // Bytes. A row of pixels of all patches of a tile has room for segments that don't begin and end
  // at multiples of 16. Lane q of four reads row q: rows begin in banks such that all lanes' reads
  // together fill every bank once.
  static constexpr int kRowBytes = kPatch * static_cast<int>(sizeof(Pixel));
  static constexpr int kRoom = kTile * kRowBytes + (kPatch == 14 ? kPadding : 0);
  static constexpr int kPitch = ceil_div(kRoom, 128) * 128 + (kRowBytes == 32 ? 16 : 32);
  static constexpr int kStageBytes = kStageRows * kPitch;

  // Shared memory: weights, what doesn't grow, and as many slots of pixels as fit beside them.
  static constexpr int kAffine = kBricks * kWeightStride;
  static constexpr int kBarriers = kAffine + kColumns * 8;
  static constexpr int kRowTable = kBarriers + kGroups * kBarrierBytes;
  static constexpr int kNorm = kRowTable + kRows * 8;
  static constexpr int kStatistics = kNorm + (kNormed ? kColumns * 4 : 0);
  // Copies that begin in the middle of 32 bytes take half as long again.
  static constexpr int kPixels =
      ceil_div(kStatistics + (kNormed ? kGroups * 2 * kMaxCluster * kTile * 8 : 0), 128) * 128;
  static constexpr int kSlotBytes = 2 * kStageBytes;
  static constexpr int kFitting = (kSharedLimit - kPixels) / (kGroups * kSlotBytes);
  static constexpr int kSlots = kFitting < kMaxSlots ? kFitting : kMaxSlots;
  static constexpr int kRingBytes = kSlots * kSlotBytes;
  static constexpr int kSharedBytes = kPixels + kGroups * kRingBytes;

  // With 14 pixels, a thread's two patches are neighbours: 28 pixels are whole words, 14 are not.
  // So rows of patches are taken as even.
  static int width(int grid_x) { return kPatch == 14 ? (grid_x + 1) & ~1 : grid_x; }

  // The patch of row 8 h + i of a warp's 16.
  __device__ static int patch_of(int warp, int h, int i) {
    if constexpr (kPatch == 14) return 16 * warp + 2 * i + h;
    // Two lanes that are read together are 64 bytes apart: see kPitch.
    if constexpr (kRowBytes == 32) i = (i & 4) | (i & 1) << 1 | (i >> 1 & 1);
    return 16 * warp + 8 * h + i;
  }
};

// The launches, each in a file of its own: uint8.cu and float16.cu.
int embed_uint8(const VlmkPatchEmbedParams& p, void* stream);
int embed_float16(const VlmkPatchEmbedParams& p, void* stream);

}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The products of a chunk: pixels become operands in registers, 16 neighbours of each patch at a
// time.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

#include "common/hopper.h"
#include "common/wgmma.h"
#include "patch_embed/small_config.h"

namespace vlmk {
namespace patch_embed {
namespace small {

// The two bytes of `word` less 128, exactly. In fp16, 0x6400 + x is 1024 + x. bf16 has 7 bits for
// it: 0x4300 + x is 128 + x below 128, and the eighth bit is put into what is taken away.
template <typename Token>
__device__ __forceinline__ uint32_t centred(uint32_t word) {
  if constexpr (std::is_same_v<Token, __half>) {
    const uint32_t bits = __byte_perm(word, 0x64, 0x4140);
    const __half2 x = *reinterpret_cast<const __half2*>(&bits);
    return to_bits(__hsub2(x, __half2half2(__ushort_as_half(0x6480))));
  } else {
    const uint32_t bits = __byte_perm(word, 0x43, 0x4140);
    const uint32_t low = bits & 0xff7fff7f;
    uint32_t high;  // (~bits & 0x00800080) | 0x43004300, of which nvcc makes two instructions
    asm("lop3.b32 %0, %1, %2, %3, 0xae;"
        : "=r"(high)
        : "r"(bits), "r"(0x00800080), "r"(0x43004300));
    const __nv_bfloat162 x = *reinterpret_cast<const __nv_bfloat162*>(&low);
    return to_bits(__hsub2(x, *reinterpret_cast<const __nv_bfloat162*>(&high)));
  }
}

// A register of its own: where a load fills a product's operand, ptxas waits for the products
// before. It would see through a plain copy.
__device__ __forceinline__ uint32_t own_copy(uint32_t x) {
  uint32_t copy;
  const uint32_t zero = threadIdx.x >> 20;
  asm volatile("xor.b32 %0, %1, %2;" : "=r"(copy) : "r"(x), "r"(zero));
  return copy;
}

// A thread's sums of its two rows: x[i][j] with 8 n + 4 u + 2 h + e for i and j is row h, column
// 16 n + 4 (lane % 4) + 2 u + e.
template <typename C>
struct Sums {
  float x[C::kProducts][C::kProduct / 2];

  __device__ __forceinline__ float at(int index) const {
    return x[index / (C::kProduct / 2)][index % (C::kProduct / 2)];
  }
  __device__ __forceinline__ void scale(float factor) {
#pragma unroll
    for (int i = 0; i < C::kProducts; ++i) {
#pragma unroll
      for (float& sum : x[i]) sum *= factor;
    }
  }
};

// Where a thread's two patches lie in a row of pixels, and for rows that are no patches, what is
// multiplied instead.
template <typename C>
struct Operands {
  static constexpr int kSize = static_cast<int>(sizeof(typename C::Pixel));
  int patch[2];
  bool constant;  // the second row
  uint32_t missing;

  // 4 pairs of pixels, as they lie in memory: two of each patch, 8 apart.
  __device__ __forceinline__ void load(uint32_t (&pairs)[4], const char* slot, int s,
                                       int part) const {
    const int q = lane_index() % 4;
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      // Of 14 pixels, what lies behind 14 - 2 s is in the next row.
      const int x = (C::kPatch == 14 ? 2 * s : 0) + 2 * q + 8 * i;
      const int offset =
          s * C::kPitch + x * kSize + (C::kPatch == 14 && x >= 14 ? C::kPitch - 14 * kSize : 0);
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        const char* there = slot + patch[h] + offset;
        uint32_t& pair = pairs[2 * i + h];
        if constexpr (C::kBytes) {
          pair = *reinterpret_cast<const uint16_t*>(there);
        } else {
          pair = *reinterpret_cast<const uint32_t*>(there);
          // The last 16 pixels of a channel are but 4: of others, 0 times their NaN would be NaN.
          if (C::kPatch == 14 && s == 5 && part == 1 && (i == 1 || q >= 2)) pair = 0;
        }
      }
    }
  }

  __device__ __forceinline__ void form(uint32_t (&a)[4], const uint32_t (&pairs)[4]) const {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      if constexpr (C::kBytes) {
        const uint32_t pixels = centred<typename C::Token>(pairs[j]);
        a[j] = j % 2 == 1 && constant ? missing : pixels;
      } else {
        a[j] = own_copy(pairs[j]);
      }
    }
  }

  // Adds the products of a chunk, `part` of its channel. One runs while the next one's operand is
  // formed.
  __device__ __forceinline__ void multiply(Sums<C>& sums, const char* slot, int part) const {
    const int steps = C::kPatch == 14 ? 7 - part : C::kSteps;
    const uint64_t weights = swizzled_descriptor(shared_address(slot + C::kWeights), 16);
    uint32_t pairs[2][4], a[2][4];
    load(pairs[0], slot, 0, part);
#pragma unroll
    for (int s = 0; s < C::kSteps; ++s) {
      if (C::kPatch == 14 && s == 6 && s >= steps) break;
      form(a[s % 2], pairs[s % 2]);
      if (s + 1 < C::kSteps) load(pairs[(s + 1) % 2], slot, s + 1, part);
      mma_fence();
      const uint64_t b = weights + (s / 4 * C::kPanelBytes + s % 4 * 32) / 16;
#pragma unroll
      for (int i = 0; i < C::kProducts; ++i) {
        mma<typename C::Token, C::kProduct>(sums.x[i], a[s % 2], b + i * C::kProduct * 8, true);
      }
      mma_commit();
      mma_wait<1>();
    }
    mma_wait<0>();
  }
};

}  // namespace small
}  // namespace patch_embed
}  // namespace vlmk

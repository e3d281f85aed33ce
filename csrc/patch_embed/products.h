// SPDX-License-Identifier: Apache-2.0
// Pixels times weight, for one tile: pixels are read from shared memory into the registers that
// wgmma takes its first operand from.
#pragma once

#include <cstdint>
#include <type_traits>
#include <utility>

#include "common/hopper.h"
#include "common/launch.h"
#include "common/wgmma.h"
#include "patch_embed/config.h"
#include "patch_embed/tiles.h"

namespace vlmk {
namespace patch_embed {

// A register of its own: where a load fills a product's operand, ptxas waits for the products
// before. It would see through a plain copy.
__device__ __forceinline__ uint32_t copied(uint32_t word) {
  uint32_t copy;
  const uint32_t zero = threadIdx.x >> 20;
  asm volatile("xor.b32 %0, %1, %2;" : "=r"(copy) : "r"(word), "r"(zero));
  return copy;
}

// The pixels that a thread multiplies of half a slot, as they lie in memory: one row of each of its
// two patches. With 14 pixels, the second patch's begin in the middle of a word.
template <typename C>
struct Pixels {
  static constexpr int kWords = 2 * C::kRowBytes / 4;
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
};

// Waits for half of the ring's slot, reads a thread's pixels of it, and gives it back.
template <typename C>
__device__ __forceinline__ void take(Pixels<C>& pixels, const uint32_t (&patch)[2], uint32_t row,
                                     int half, bool there, const Barriers& barriers,
                                     const Ring<C>& ring) {
  barrier_wait(barriers.full(ring.slot, half), ring.parity);
  const uint32_t offset = ring.slot * C::kSlotBytes + half * C::kStageBytes + row;
  if (there) pixels.load(patch[0] + offset, patch[1] + offset);
  __syncwarp();
  if (lane_index() == 0) barrier_arrive(barriers.empty(ring.slot, half));
}

// Where a lane's row of four begins. Of two rows, lanes q and q + 2 take the beginning and the end
// of the same one.
template <typename C>
__device__ __forceinline__ uint32_t own_row(int rows) {
  const int q = lane_index() % 4;
  return rows > 2 ? q * C::kPitch : q % 2 * C::kPitch + q / 2 * 8 * sizeof(typename C::Pixel);
}

// The products of 16-bit pixels, of up to 8 rows: those of one slot. `patch` are the addresses of
// the thread's two patches in the first slot. One product runs while the next one's operand is
// formed.
template <typename C, int kBodyRows>
__device__ __forceinline__ void multiply_slot(float (&sum)[C::kSums], const uint32_t (&patch)[2],
                                              uint64_t& b, const Barriers& barriers,
                                              Ring<C>& ring) {
  constexpr int kPairs = C::kPatch / 2;  // of a row
  constexpr int kSteps = ceil_div(kBodyRows * C::kPatch, 16);
  const int q = lane_index() % 4;
  const uint32_t row = own_row<C>(kBodyRows);
  Pixels<C> halves[2];
  uint32_t a[2][4];
  const auto form = [&](uint32_t (&operand)[4], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pair = 2 * step + i / 2;
      operand[i] = copied(halves[pair / kPairs].words[i % 2 * kPairs + pair % kPairs]);
      // Beyond the last pixel lie other patches': 0 times their NaN would be NaN.
      if (kBodyRows == 2 && pair == 3 && q >= 2) operand[i] = 0;
    }
  };
  take(halves[0], patch, row, 0, true, barriers, ring);
  mma_wait<0>();
  form(a[0], 0);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    mma_fence();
    mma<typename C::Token, C::kBrickColumns>(sum, a[step & 1], b, true);
    mma_commit();
    b += 2 * C::kWeightStride >> 4;
    if (step == 0) take(halves[1], patch, row, 1, kBodyRows > kStageRows, barriers, ring);
    if (step + 1 == kSteps) break;
    mma_wait<1>();
    form(a[(step + 1) & 1], step + 1);
  }
  ring.advance();
}

// All products of a tile of 16-bit pixels. `begun` is called early in the tile, `ending` before the
// last products.
template <typename C, typename Begun, typename Ending>
__device__ __forceinline__ void multiply(float (&sum)[C::kSums], const uint32_t (&patch)[2],
                                         uint64_t b, const Barriers& barriers, Ring<C>& ring,
                                         Begun begun, Ending ending) {
  constexpr int kSlotRows = 2 * kStageRows;
  constexpr int kWhole = C::kRows / kSlotRows, kRest = C::kRows % kSlotRows;
#pragma unroll
  for (float& x : sum) x = 0.0f;
#pragma unroll 1
  for (int body = 0; body < kWhole; ++body) {
    if (body + 1 == kWhole) ending();
    multiply_slot<C, kSlotRows>(sum, patch, b, barriers, ring);
    if (body == kWhole / C::kGroups) begun();
  }
  if constexpr (kRest > 0) multiply_slot<C, kRest>(sum, patch, b, barriers, ring);
  mma_wait<0>();
}

// Calls f with the constants 0 ... kCount - 1: indices that depend on them are constants too, so
// that arrays stay in registers.
template <typename F, int... kIndices>
__device__ __forceinline__ void for_each(F f, std::integer_sequence<int, kIndices...>) {
  (f(std::integral_constant<int, kIndices>()), ...);
}

// The operands of uint8 pixels: four to a register, in the order of place_along_k.
template <typename C>
struct Bytes {
  uint32_t a[2][C::kBricks];

  // How many of them there are once so many halves of slots are read.
  __host__ __device__ static constexpr int formed(int halves) {
    if (C::kPatch == 16) return 4 * halves;
    return halves * kStageRows < C::kRows ? halves / 2 * 7 + halves % 2 * 3
                                          : C::kBricks - halves % 2;
  }

  // Those of half a slot; `last` are the pixels of the half before.
  template <int kHalf>
  __device__ __forceinline__ void form(const Pixels<C>& pixels, const Pixels<C>& last) {
    constexpr int kFirst = formed(kHalf), kRowsLeft = C::kRows - kHalf * kStageRows;
    const uint32_t (&w)[Pixels<C>::kWords] = pixels.words;
    if constexpr (C::kPatch == 16) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        a[0][kFirst + i] = copied(w[i]);
        a[1][kFirst + i] = copied(w[4 + i]);
      }
    } else if constexpr (kRowsLeft <= 0) {  // the weight is 0 here
      a[0][kFirst] = a[1][kFirst] = 0;
    } else {
      constexpr int kSecond = kHalf % 2;
#pragma unroll
      for (int i = 0; i < (kRowsLeft < kStageRows ? 2 : 3); ++i) {
        a[0][kFirst + kSecond + i] = copied(w[i]);
        a[1][kFirst + kSecond + i] = __byte_perm(w[3 + i], w[4 + i], 0x5432);
      }
      if constexpr (kSecond) {  // the last two pixels of both rows
        a[0][kFirst] = __byte_perm(last.words[3], w[3], 0x5410);
        a[1][kFirst] = __byte_perm(last.words[6], w[6], 0x7632);
      }
    }
  }
};

// All products of a tile of uint8 pixels. The products of half a slot run while the next half is
// read.
template <typename C, typename Begun, typename Ending>
__device__ __forceinline__ void multiply(int32_t (&sum)[C::kSums], const uint32_t (&patch)[2],
                                         uint64_t b, const Barriers& barriers, Ring<C>& ring,
                                         Begun begun, Ending ending) {
  constexpr int kHalves = 2 * ceil_div(C::kRows, 2 * kStageRows);
  Bytes<C> bytes;
  Pixels<C> halves[2];
  const auto multiply_half = [&](auto constant) {
    constexpr int kHalf = decltype(constant)::value, kRowsLeft = C::kRows - kHalf * kStageRows;
    constexpr int kFirst = Bytes<C>::formed(kHalf) / 2, kEnd = Bytes<C>::formed(kHalf + 1) / 2;
    take(halves[kHalf % 2], patch, own_row<C>(kRowsLeft), kHalf % 2, kRowsLeft > 0, barriers, ring);
    if (kHalf % 2) ring.advance();
    mma_wait<1>();
    bytes.template form<kHalf>(halves[kHalf % 2], halves[1 - kHalf % 2]);
    mma_fence();
#pragma unroll
    for (int step = kFirst; step < kEnd; ++step) {
      const uint32_t a[4] = {bytes.a[0][2 * step], bytes.a[1][2 * step], bytes.a[0][2 * step + 1],
                             bytes.a[1][2 * step + 1]};
      mma<C::kBrickColumns>(sum, a, b + step * (2 * C::kWeightStride >> 4), step > 0);
    }
    mma_commit();
    if (kHalf == kHalves / C::kGroups) begun();
    if (kHalf == kHalves - 4) ending();
  };
  for_each(multiply_half, std::make_integer_sequence<int, kHalves>());
  mma_wait<0>();
}

}  // namespace patch_embed
}  // namespace vlmk

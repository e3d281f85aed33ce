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

// The word with some bits flipped, in a register of its own: where a load fills a product's
// operand, ptxas waits for the products before. It would see through a plain copy.
__device__ __forceinline__ uint32_t flipped(uint32_t word, uint32_t bits) {
  uint32_t copy;
  asm volatile("xor.b32 %0, %1, %2;" : "=r"(copy) : "r"(word), "r"(bits));
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

// Where half of the ring's slot lies, behind the first slot's begin.
template <typename C>
__device__ __forceinline__ uint32_t stage_of(const Ring<C>& ring, int half) {
  return ring.slot * C::kSlotBytes + half * C::kStageBytes;
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
  const uint32_t none = threadIdx.x >> 20;  // 0, which ptxas doesn't see
  Pixels<C> halves[2];
  uint32_t a[2][4];
  const auto form = [&](uint32_t (&operand)[4], int step) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const int pair = 2 * step + i / 2;
      operand[i] = flipped(halves[pair / kPairs].words[i % 2 * kPairs + pair % kPairs], none);
      // Beyond the last pixel lie other patches': 0 times their NaN would be NaN.
      if (kBodyRows == 2 && pair == 3 && q >= 2) operand[i] = 0;
    }
  };
  const auto take = [&](int half) {
    barrier_wait(barriers.full(ring.slot, half), ring.parity);
    const uint32_t there = stage_of(ring, half) + row;
    if (kBodyRows > kStageRows || half == 0) halves[half].load(patch[0] + there, patch[1] + there);
    __syncwarp();
    if (lane_index() == 0) barrier_arrive(barriers.empty(ring.slot, half));
  };
  take(0);
  mma_wait<0>();
  form(a[0], 0);
#pragma unroll
  for (int step = 0; step < kSteps; ++step) {
    mma_fence();
    mma<typename C::Token, C::kBrickColumns>(sum, a[step & 1], b, true);
    mma_commit();
    b += 2 * C::kWeightStride >> 4;
    if (step == 0) take(1);
    if (step + 1 == kSteps) break;
    mma_wait<1>();
    form(a[(step + 1) & 1], step + 1);
  }
  ring.advance();
}

// All products of a tile of 16-bit pixels. `hand_over` is called where the next warpgroup may
// begin, `ending` some time before the last products are done.
template <typename C, typename HandOver, typename Ending>
__device__ __forceinline__ void multiply(float (&sum)[C::kSums], const uint32_t (&patch)[2],
                                         uint64_t b, const Barriers& barriers, Ring<C>& ring,
                                         HandOver hand_over, Ending ending) {
  constexpr int kSlotRows = 2 * kStageRows;
  constexpr int kWhole = C::kRows / kSlotRows, kRest = C::kRows % kSlotRows;
#pragma unroll
  for (float& x : sum) x = 0.0f;
#pragma unroll 1
  for (int body = 0; body < kWhole; ++body) {
    if (body + 1 == kWhole) ending();
    multiply_slot<C, kSlotRows>(sum, patch, b, barriers, ring);
    if (body == kWhole / C::kGroups) hand_over();
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

// The operands of uint8 pixels less 128: four to a register, in the order of place_along_k.
template <typename C>
struct Bytes {
  uint32_t a[2][C::kBricks];

  // How many of them there are once so many slots are read.
  __host__ __device__ static constexpr int formed(int slots) {
    const int rows = slots * 2 * kStageRows;
    return rows < C::kRows ? rows * C::kPatch / 16 : C::kBricks;
  }

  // Those of a slot.
  template <int kSlot>
  __device__ __forceinline__ void form(const Pixels<C> (&halves)[2]) {
    constexpr int kFirst = formed(kSlot);
    constexpr bool kRest = C::kRows < (kSlot + 1) * 2 * kStageRows;  // two rows, shared by lanes
    uint32_t w[2][Pixels<C>::kWords];
#pragma unroll
    for (int half = 0; half < (kRest ? 1 : 2); ++half) {
#pragma unroll
      for (int i = 0; i < Pixels<C>::kWords; ++i)
        w[half][i] = flipped(halves[half].words[i], 0x80808080);
    }
    if constexpr (C::kPatch == 16) {
#pragma unroll
      for (int i = 0; i < 8; ++i) {
        a[0][kFirst + i] = w[i / 4][i % 4];
        a[1][kFirst + i] = w[i / 4][4 + i % 4];
      }
    } else {
#pragma unroll
      for (int i = 0; i < (kRest ? 2 : 7); ++i) {
        if (i == 3) continue;
        const uint32_t (&row)[Pixels<C>::kWords] = w[i / 4];
        a[0][kFirst + i] = row[i % 4];
        a[1][kFirst + i] = __byte_perm(row[3 + i % 4], row[4 + i % 4], 0x5432);
      }
      if constexpr (kRest) {
        a[0][kFirst + 2] = a[1][kFirst + 2] = 0;  // the weight is 0 too
      } else {                                    // the last two pixels of both rows
        a[0][kFirst + 3] = __byte_perm(w[0][3], w[1][3], 0x5410);
        a[1][kFirst + 3] = __byte_perm(w[0][6], w[1][6], 0x7632);
      }
    }
  }
};

// All products of a tile of uint8 pixels.
template <typename C, typename HandOver, typename Ending>
__device__ __forceinline__ void multiply(int32_t (&sum)[C::kSums], const uint32_t (&patch)[2],
                                         uint64_t b, const Barriers& barriers, Ring<C>& ring,
                                         HandOver hand_over, Ending ending) {
  constexpr int kSlotsOfTile = ceil_div(C::kRows, 2 * kStageRows);
  Bytes<C> bytes;
  Pixels<C> halves[2];
  const auto load_slot = [&](int rows) {
    barrier_wait(barriers.full(ring.slot, 0), ring.parity);
#pragma unroll
    for (int half = 0; half < (rows > kStageRows ? 2 : 1); ++half) {
      const uint32_t there = stage_of(ring, half) + own_row<C>(rows);
      halves[half].load(patch[0] + there, patch[1] + there);
    }
    __syncwarp();
    if (lane_index() == 0) barrier_arrive(barriers.empty(ring.slot, 0));
    ring.advance();
  };
  const auto multiply_slot = [&](auto constant) {
    constexpr int kSlot = decltype(constant)::value,
                  kRowsBehind = C::kRows - (kSlot + 1) * 2 * kStageRows;
    bytes.template form<kSlot>(halves);
    // A product is issued once the one before has its operand: the next pixels arrive meanwhile.
    if (kRowsBehind > 0) load_slot(kRowsBehind);
    mma_fence();
#pragma unroll
    for (int step = Bytes<C>::formed(kSlot) / 2; step < Bytes<C>::formed(kSlot + 1) / 2; ++step) {
      const uint32_t a[4] = {bytes.a[0][2 * step], bytes.a[1][2 * step], bytes.a[0][2 * step + 1],
                             bytes.a[1][2 * step + 1]};
      mma<C::kBrickColumns>(sum, a, b + step * (2 * C::kWeightStride >> 4), step > 0);
    }
    mma_commit();
    mma_wait<1>();
    if (kSlot == kSlotsOfTile - 2) hand_over();
    if (kSlot == kSlotsOfTile - 3) ending();
  };
  load_slot(C::kRows);
  for_each(multiply_slot, std::make_integer_sequence<int, kSlotsOfTile>());
  mma_wait<0>();
}

}  // namespace patch_embed
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The order of tiles of queries whose rows see ranges: the longest first, so that what is left at
// the end is short, and all blocks are done at about the same time.
//
// Each block finds it by itself, all alike, in the warps beside the producer, while the first tiles
// are under way, which are dealt out as they come.
#pragma once

#include <cstdint>

#include "attention/config.h"
#include "attention/ranges.h"
#include "common/hopper.h"
#include "vlmkernels.h"

namespace vlmk {
namespace attention {

constexpr int kOrderBarrier = 10;    // of the three warps
constexpr int kOrderedBarrier = 11;  // of the first of them and the producer

// Tile `entry` of a head, counted from the end of each image: all of an image, or the last of all
// images first.
struct Entry {
  int image, from_end;
  __device__ __forceinline__ Entry(const Schedule& s, int entry) {
    const int major = entry / s.minor, minor = entry - major * s.minor;
    image = s.across_images ? minor : major;
    from_end = s.across_images ? major : minor;
  }
  template <typename C>
  __device__ __forceinline__ int first_query(const Schedule& s) const {
    return (s.tiles_of_head - 1 - from_end) * C::kQueries;
  }
};

template <typename C>
struct Order {
  static constexpr int kThreads = 96, kSizes = 32;

  const VlmkAttentionParams& p;
  const Schedule& s;
  char* shared;
  int warp;  // of three

  // How many keys the first and the last row of a tile span, by half an octave from 64 on.
  __device__ __forceinline__ int size_of(int index) const {
    const Entry entry(s, index);
    const int first = entry.template first_query<C>(s);
    const int2 a = cut(p, range_of_query(p, entry.image, first));
    const int2 b =
        cut(p, range_of_query(p, entry.image, min(first + C::kQueries, p.num_queries) - 1));
    const int keys = max(max(a.y, b.y) - min(a.x, b.x), 64);
    return min((__float_as_int(static_cast<float>(keys)) >> 22) - (127 + 6) * 2, kSizes - 1);
  }

  __device__ __forceinline__ void run() {
    const int count = s.entries - s.sorted_from, lane = lane_index();
    if (count <= 0) return;
    auto* order = reinterpret_cast<uint16_t*>(shared + C::kOrderAt);
    auto* sizes = reinterpret_cast<uint8_t*>(order + kMaxSorted);
#pragma unroll 1
    for (int i = 32 * warp + lane; i < count; i += kThreads) {
      sizes[i] = static_cast<uint8_t>(size_of(s.sorted_from + i));
    }
    __syncwarp();
    named_wait<kThreads>(kOrderBarrier);
    if (warp > 0) return;
    // Each lane has a size.
    int own = 0;
#pragma unroll 1
    for (int i = 0; i < count; ++i) own += sizes[i] == lane;
    int place = own;  // behind those of larger sizes
#pragma unroll
    for (int step = 1; step < 32; step *= 2) {
      const int more = __shfl_down_sync(kAllLanes, place, step);
      if (lane + step < 32) place += more;
    }
    place -= own;
#pragma unroll 1
    for (int i = 0; i < count; ++i) {
      if (sizes[i] == lane) order[place++] = static_cast<uint16_t>(s.sorted_from + i);
    }
    __syncwarp();
    named_arrive<64>(kOrderedBarrier);
  }
};

}  // namespace attention
}  // namespace vlmk

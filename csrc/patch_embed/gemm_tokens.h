// SPDX-License-Identifier: Apache-2.0
// From the sums of a tile to tokens that wait in registers: bias, positions, and the LayerNorm,
// whose statistics the blocks of a cluster share.
#pragma once

#include <cstdint>

#include "common/float16.h"
#include "common/hopper.h"
#include "patch_embed/gemm_config.h"
#include "patch_embed/tokens.h"
#include "vlmkernels.h"

namespace vlmk {
namespace patch_embed {
namespace gemm {

// A thread's part of a tile: columns of two tokens.
struct Part {
  int row[2] = {-1, -1};  // of the result, -1 where there is no such patch
  int column = 0;         // the first: there are 8 in every 32

  __device__ __forceinline__ bool there(const VlmkPatchEmbedParams& p, int h, int g) const {
    return row[h] >= 0 && column + 32 * g < p.dim;
  }
};

// What the warpgroups of a cluster need to share a row's statistics: of two tiles in turn.
template <typename C>
struct Sharing {
  char* shared;
  int cluster;
  int tiles;  // that are done

  __device__ __forceinline__ uint32_t parity() const { return tiles >> 1 & 1; }
  __device__ __forceinline__ float2* parts() const {
    const int group = static_cast<int>(threadIdx.x / 128);
    return reinterpret_cast<float2*>(shared + C::kStatistics) +
           (2 * group + tiles % 2) * kMaxCluster * kTile;
  }
  __device__ __forceinline__ uint32_t barrier() const {
    const int group = static_cast<int>(threadIdx.x / 128);
    return shared_address(shared + C::kStatisticsThere) + (2 * group + tiles % 2) * 8;
  }
};

// What a part comes to. Eights of it are stored one after another while the next tile is
// multiplied, and give way to the positions of that one. All at once they would hold up its
// products. But where pixels are gathered, that takes longer than the products, and the registers:
// there, they are stored at once, and positions are under way for a few of them.
template <typename C>
struct Tokens {
  using Token = typename C::Token;
  static constexpr int kKept = C::kGathered ? 3 : C::kEights;
  uint4 eights[kKept][2];
  Part part;

  __device__ __forceinline__ void store(const VlmkPatchEmbedParams& p, void* tokens, int g) const {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      auto* out = static_cast<Token*>(tokens) + int64_t{part.row[h]} * p.dim + part.column;
      if (part.there(p, h, g)) *reinterpret_cast<uint4*>(out + 32 * g) = eights[g % kKept][h];
    }
  }

  __device__ __forceinline__ void load_positions(const VlmkPatchEmbedParams& p, const Part& next,
                                                 const int (&positions)[2], int g) {
#pragma unroll
    for (int h = 0; h < 2; ++h) {
      eights[g % kKept][h] = load_global(static_cast<const uint4*>(p.pos) + positions[h] + 4 * g,
                                         p.pos && next.there(p, h, g));
    }
  }

  // Calls f(word of eights, first and second sum, u, h) for pairs of eight columns.
  template <typename F>
  __device__ __forceinline__ void for_pairs(float (&sum)[C::kSums], int g, int first, int pairs,
                                            const F& f) {
#pragma unroll
    for (int u = first; u < first + pairs; ++u) {
#pragma unroll
      for (int h = 0; h < 2; ++h) {
        float* x = &sum[4 * (u * C::kEights + g) + 2 * h];
        f((&eights[g % kKept][h].x)[u], x[0], x[1], u, h);
      }
    }
  }

  // The part whose first positions were loaded.
  __device__ __forceinline__ void add_up(const VlmkPatchEmbedParams& p, const Part& next_part,
                                         const int (&positions)[2], float (&sum)[C::kSums]) {
    part = next_part;
    const auto* bias = static_cast<const Token*>(p.bias) + part.column;
    const auto load_bias = [&](int four) {
      const int offset = four / 2 * 32 + four % 2 * 4;
      return p.bias && part.column + offset < p.dim
                 ? __ldg(reinterpret_cast<const uint2*>(bias + offset))
                 : make_uint2(0, 0);
    };
    uint2 next = load_bias(0);
#pragma unroll
    for (int four = 0; four < 2 * C::kEights; ++four) {
      const uint2 added = next;
      if (four + 1 < 2 * C::kEights) next = load_bias(four + 1);
      for_pairs(sum, four / 2, four % 2 * 2, 2,
                [&](uint32_t& word, float& x, float& y, int u, int) {
                  const float2 b = C::to_floats(C::from_bits(u % 2 ? added.y : added.x));
                  const float2 position = C::to_floats(C::from_bits(word));
                  x += b.x + position.x, y += b.y + position.y;
                  if (!C::kNormed || p.total) word = pack<Token>(x, y);
                });
      if (four % 2 == 0) continue;
      const int g = four / 2;
      if (C::kNormed && p.total) store(p, p.total, g);
      if (C::kGathered) store(p, p.out, g);
      if (g + kKept < C::kEights) load_positions(p, part, positions, g + kKept);
    }
  }

  // LayerNorm of what was added up.
  __device__ __forceinline__ void normalise(const VlmkPatchEmbedParams& p, float (&sum)[C::kSums],
                                            const Sharing<C>& sharing) {
    const float2 own[2] = {centre<C>(sum, 0), centre<C>(sum, 1)};
    float2 mean_rstd[2];
    send_statistics(sharing.cluster, own, sharing.parts(), sharing.barrier());
    receive_statistics<C>(p, sharing.cluster, sharing.parts(), sharing.barrier(), sharing.parity(),
                          mean_rstd);
    const float shift[2] = {(own[0].x - mean_rstd[0].x) * mean_rstd[0].y,
                            (own[1].x - mean_rstd[1].x) * mean_rstd[1].y};
    const auto* weights =
        reinterpret_cast<const Token*>(sharing.shared + C::kNorm) + lane_index() % 4 * 8;
#pragma unroll
    for (int g = 0; g < C::kEights; ++g) {
      const uint4 weight = *reinterpret_cast<const uint4*>(weights + 32 * g);
      const uint4 bias = *reinterpret_cast<const uint4*>(weights + C::kColumns + 32 * g);
      for_pairs(sum, g, 0, 4, [&](uint32_t& word, float x, float y, int u, int h) {
        const float2 w = C::to_floats(C::from_bits((&weight.x)[u]));
        const float2 b = C::to_floats(C::from_bits((&bias.x)[u]));
        word = pack<Token>((x * mean_rstd[h].y + shift[h]) * w.x + b.x,
                           (y * mean_rstd[h].y + shift[h]) * w.y + b.y);
      });
    }
  }
};

}  // namespace gemm
}  // namespace patch_embed
}  // namespace vlmk

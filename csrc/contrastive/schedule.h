// SPDX-License-Identifier: Apache-2.0
// The order in which panels of the gradient of the logits are computed and multiplied, all in one
// launch: the logits of one panel, then the products of the panel before, whose logits have had the
// time to arrive. Clusters take those tiles in turn, and wait where one is not ready: for the
// logits that a product reads, for the products that have read what logits write over, and for a
// sum that another panel is adding to. All clusters run at once, and whom one waits for is never
// behind it.
#pragma once

#include <cstdint>

#include "contrastive/config.h"

namespace vlmk {
namespace contrastive {

// Rows of panels go in pairs, the second of them so many columns ahead: panels that follow each
// other have no sum in common, and none waits for the one before.
constexpr int kShift = 2;

// What a launch works on, with what would have to be divided for.
struct Job : VlmkContrastiveParams {
  int32_t row_panels, column_panels;
  int32_t across;  // tiles of a gradient beside each other

  __device__ __forceinline__ int panels() const { return row_panels * column_panels; }
};

// A panel at its place in the order.
struct Visit {
  Panel panel;
  int turn_a, turn_b;  // how many panels add to its rows, and to its columns, before it
  int slot;            // which of two rows of panels, by what is kept of their sums
  int turns_of_slot;   // how many panels of other rows have used that before
};

__device__ __forceinline__ Visit visit_of(const Job& p, int number) {
  Visit v;
  const int pair = number / (2 * p.column_panels), inside = number % (2 * p.column_panels);
  const bool alone = 2 * pair + 1 == p.row_panels;
  v.slot = alone ? 0 : inside % 2;
  v.turn_a = alone ? inside : inside / 2;
  const int column = (v.turn_a + v.slot * kShift) % p.column_panels;
  // When the other row of the pair comes to this column.
  const int other = v.slot ? column : (column + kShift * (p.column_panels - 1)) % p.column_panels;
  v.turn_b = 2 * pair + (!alone && other < v.turn_a + v.slot);
  v.turns_of_slot = pair * p.column_panels;
  v.panel.first_row = (2 * pair + v.slot) * p.panel_rows;
  v.panel.first_column = column * p.panel_columns;
  v.panel.row_tiles = min(p.panel_rows, p.rows - v.panel.first_row) / kTile;
  v.panel.column_tiles = min(p.panel_columns, p.columns - v.panel.first_column) / kTile;
  v.panel.kept_row = number % p.kept_panels * p.panel_rows;
  return v;
}

// Tiles of logits that both blocks and both warpgroups of each have stored, of each panel; likewise
// of products that have read it; and by warpgroups, how often they have added to a tile of a sum:
// where these counters are.
__device__ __forceinline__ int counter_of_logits(int number) { return 1 + number; }
__device__ __forceinline__ int counter_of_products(const Job& p, int number) {
  return 1 + p.panels() + number;
}
__device__ __forceinline__ int turns_of_a(const Job& p) { return 1 + 2 * p.panels(); }
__device__ __forceinline__ int turns_of_b(const Job& p) {
  return turns_of_a(p) + 2 * p.panel_rows / kRows * (p.dim / 64) * kGroups;
}

__device__ __forceinline__ int tiles_of_logits(const Panel& panel) {
  return panel.row_tiles * panel.column_tiles;
}
__device__ __forceinline__ int tiles_of_products(const Job& p, const Panel& panel) {
  return (panel.row_tiles + panel.column_tiles) * p.across;
}

// All tiles of this block's cluster, one after another: `logits(number, visit, tile)` and
// `products(number, visit, tile)`, with the number of the panel.
template <typename Logits, typename Products>
__device__ __forceinline__ void for_tiles(const Job& p, Dealer& dealer, Logits logits,
                                          Products products) {
  const int panels = p.panels();
  int tile = dealer.next(), before = 0;  // this part of the list
#pragma unroll 1
  for (int number = 0; number <= panels; ++number) {
    if (number < panels) {
      const Visit visit = visit_of(p, number);
      const int tiles = tiles_of_logits(visit.panel);
#pragma unroll 1
      for (; tile < before + tiles; tile = dealer.next()) logits(number, visit, tile - before);
      before += tiles;
    }
    if (number > 0) {
      const Visit visit = visit_of(p, number - 1);
      const int tiles = tiles_of_products(p, visit.panel);
#pragma unroll 1
      for (; tile < before + tiles; tile = dealer.next()) {
        products(number - 1, visit, tile - before);
      }
      before += tiles;
    }
  }
}

}  // namespace contrastive
}  // namespace vlmk

// SPDX-License-Identifier: Apache-2.0
// The contrastive losses, the host's side: what the kernels take, and their launches.
#include <algorithm>
#include <initializer_list>

#include "common/error.h"
#include "common/launch.h"
#include "contrastive/clip_bwd.h"
#include "contrastive/clip_fwd.h"
#include "contrastive/gradients.h"
#include "contrastive/siglip.h"
#include "contrastive/vectors.h"

namespace vlmk {
namespace contrastive {

static_assert(kTile == VLMK_LOSS_TILE);

int check(const VlmkContrastiveParams& p) {
  const auto tiled = [](int size) { return size > 0 && size % kTile == 0; };
  VLMK_CHECK(tiled(p.rows) && tiled(p.columns),
             "it takes multiples of %d features of both kinds, these are %d and %d", kTile, p.rows,
             p.columns);
  VLMK_CHECK(p.valid_rows > 0 && p.valid_rows <= p.rows && p.valid_columns > 0 &&
                 p.valid_columns <= p.columns,
             "%d and %d features of %d and %d", p.valid_rows, p.valid_columns, p.rows, p.columns);
  VLMK_CHECK(p.dim >= kTile && p.dim % kNarrow == 0,
             "it takes multiples of %d channels from %d on, these are %d", kNarrow, kTile, p.dim);
  VLMK_CHECK(tiled(p.panel_rows) && tiled(p.panel_columns), "panels of %d rows, %d columns",
             p.panel_rows, p.panel_columns);
  VLMK_CHECK(
      p.a_stride >= p.dim && p.b_stride >= p.dim && p.a_stride % 8 == 0 && p.b_stride % 8 == 0,
      "it takes rows that are multiples of 8 elements apart, these are %lld and %lld",
      static_cast<long long>(p.a_stride), static_cast<long long>(p.b_stride));
  return 0;
}

int encode_matrix(CUtensorMap& map, const void* data, int64_t rows, int64_t columns, int64_t stride,
                  int tile_rows) {
  return encode_tensor_map(map, data, false, 1, rows, 1, columns, 0, stride, 0, tile_rows);
}

int encode_maps(const VlmkContrastiveParams& p, bool gradients, Maps& maps) {
  int code = encode_matrix(maps.rows_a, p.a, p.valid_rows, p.dim, p.a_stride, kRows);
  if (code) return code;
  const auto size = [](int64_t count) { return static_cast<cuuint64_t>(count); };
  const cuuint64_t row = size(2 * p.b_stride);
  code = encode_tiles(maps.columns_b, p.b, false,
                      {size(p.dim), 2, size(ceil_div(p.valid_columns, 8)), 4},
                      {row, 8 * row, 2 * row}, {kDepth, 2, kTile / 8, 4 / kBlocks});
  if (code || !gradients) return code;
  code = encode_matrix(maps.factor_a, p.a, p.valid_rows, p.dim, p.a_stride, kDepth / kBlocks);
  if (code) return code;
  code = encode_matrix(maps.factor_b, p.b, p.valid_columns, p.dim, p.b_stride, kDepth / kBlocks);
  if (code) return code;
  const int64_t rows = int64_t{p.kept_panels} * p.panel_rows, columns = p.panel_columns;
  code = encode_matrix(maps.panel_rows, p.panel, rows, columns, columns, kRows);
  if (code) return code;
  return encode_matrix(maps.panel_columns, p.panel, rows, columns, columns, kDepth);
}

// For so many tiles, on as many clusters as find room.
template <auto kKernel, typename Params, typename... Args>
int launch_for_tiles(const char* name, const Params& p, int64_t tiles, void* stream,
                     const Args&... args) {
  int count = 0;
  const int code = active_clusters<kKernel, kThreads, Layout::kSharedBytes>(kBlocks, count);
  if (code) return code;
  const int blocks = kBlocks * static_cast<int>(std::min<int64_t>(tiles, count));
  VLMK_CHECK(blocks > 0 && kGroups * blocks <= p.slots, "%d slots for %d blocks", p.slots, blocks);
  const LaunchConfig config(dim3(blocks), dim3(kThreads), kBlocks, Layout::kSharedBytes, stream);
  return launch(name, kKernel, config, p, args...);
}

template <typename Work>
int launch_logits(const VlmkContrastiveParams& p, const Panel& panel, const Maps& maps,
                  void* stream) {
  return launch_for_tiles<contrastive_logits_kernel<Work>>(
      "contrastive_logits_kernel", p, int64_t{panel.row_tiles} * panel.column_tiles, stream, panel,
      maps);
}

template <typename Work, bool kWideB>
int launch_gradients(const Job& p, const Maps& maps, void* stream) {
  // Of few pairs the gradients are more tiles than the logits.
  const int64_t rows = p.rows / kTile, columns = p.columns / kTile;
  return launch_for_tiles<contrastive_gradients_kernel<Work, kWideB>>(
      "contrastive_gradients_kernel", p, std::max(rows * columns, (rows + columns) * p.across),
      stream, maps);
}

int launch_merge(const Merge& rows, const Merge& columns, void* stream) {
  return launch("contrastive_merge_kernel", contrastive_merge_kernel,
                dim3((rows.size + columns.size) / 32), dim3(32 * kMergeWarps), 0, stream, rows,
                columns);
}

int launch_total(const VlmkContrastiveParams& p, std::initializer_list<float*> to,
                 const float* times, void* stream) {
  TotalPlaces totals = {};
  std::copy(to.begin(), to.end(), totals.to);
  return launch("contrastive_total_kernel", contrastive_total_kernel, dim3(1),
                dim3(32 * static_cast<unsigned>(to.size())), 0, stream, p, totals, times);
}

template <typename Work>
int gradients(const VlmkContrastiveParams& p, void* stream) {
  Maps maps;
  VLMK_CHECK(p.kept_panels > 1, "%d panels kept, wanted 2 or more", p.kept_panels);
  int code = encode_maps(p, true, maps);
  if (code) return code;
  const Job job{p, ceil_div(p.rows, p.panel_rows), ceil_div(p.columns, p.panel_columns),
                ceil_div(p.dim, kTile)};
  return p.wide_b ? launch_gradients<Work, true>(job, maps, stream)
                  : launch_gradients<Work, false>(job, maps, stream);
}

int clip_backward(const VlmkContrastiveParams& p, void* stream) {
  int code = check(p);
  if (code) return code;
  code = launch("contrastive_prepare_kernel", contrastive_prepare_kernel, dim3(1),
                dim3(kPrepareThreads), 0, stream, p);
  if (!code) code = gradients<ClipBackward>(p, stream);
  return code ? code : launch_total(p, {p.totals}, p.numbers + kTimes, stream);
}

int clip_forward(const VlmkContrastiveParams& p, void* stream) {
  Maps maps;
  int code = check(p);
  if (code) return code;
  VLMK_CHECK(p.panel_columns == p.columns, "panels of %d columns, wanted all %d", p.panel_columns,
             p.columns);
  code = encode_maps(p, false, maps);
  if (code) return code;
  Panel panel{0, 0, 0, p.columns / kTile, 0, 0};
  for (int row = 0; row < p.rows; row += p.panel_rows) {
    const int rows = std::min(p.panel_rows, p.rows - row);
    panel.first_row = row;
    panel.row_tiles = rows / kTile;
    code = launch_logits<ClipForward>(p, panel, maps, stream);
    if (code) return code;
    code = launch_merge({p.share_a, p.lse_a + row, panel.column_tiles, rows, p.panel_rows, false},
                        {p.share_b, p.lse_b, rows / 64, p.columns, p.columns, row > 0}, stream);
    if (code) return code;
    ++panel.index;
  }
  return launch("contrastive_clip_loss_kernel", contrastive_clip_loss_kernel, dim3(1),
                dim3(kPrepareThreads), 0, stream, p, panel.index);
}

int siglip(const VlmkContrastiveParams& p, void* stream) {
  int code = check(p);
  if (code) return code;
  if (p.da) {
    code = gradients<SigLip<true>>(p, stream);
    return code ? code : launch_total(p, {p.loss, p.totals, p.totals + 1}, nullptr, stream);
  }
  Maps maps;
  code = encode_maps(p, false, maps);
  if (code) return code;
  const Panel all{0, 0, p.rows / kTile, p.columns / kTile, 0, 0};
  code = launch_logits<SigLip<false>>(p, all, maps, stream);
  return code ? code : launch_total(p, {p.loss}, nullptr, stream);
}

}  // namespace contrastive
}  // namespace vlmk

int vlmk_contrastive_check(const VlmkContrastiveParams* params) {
  return vlmk::contrastive::check(*params);
}

int vlmk_clip_loss_fwd(const VlmkContrastiveParams* params, void* stream) {
  return vlmk::contrastive::clip_forward(*params, stream);
}

int vlmk_clip_loss_bwd(const VlmkContrastiveParams* params, void* stream) {
  return vlmk::contrastive::clip_backward(*params, stream);
}

int vlmk_siglip_loss(const VlmkContrastiveParams* params, void* stream) {
  return vlmk::contrastive::siglip(*params, stream);
}

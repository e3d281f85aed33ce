# SPDX-License-Identifier: Apache-2.0
"""The kernels of the contrastive losses: a tile of products, and what each loss makes of it before it is forgotten.

A program takes one tile of ``a @ b.T`` over the whole depth D and reduces it to what outlives it: log-sum-exps of its rows and
of its columns, sums, or the gradient of its products in the dtype of the features. Exponents are to the base 2.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# How far apart the log-sum-exps of a tile may be for one exponential to serve rows and columns: 2**60 times 2**-60 is exact.
NARROW = tl.constexpr(60.0)
# Arguments that say where a launch is: whether 16 divides them shall not make another kernel.
PLACE = ["first_row", "rows", "first_column", "columns", "M", "N"]


@triton.jit
def _place(tiles_m, tiles_n, GROUP: tl.constexpr):
    """Row and column of this program's tile: a group of row blocks goes through all columns, so that both stay in L2."""
    pid = tl.program_id(0)
    first = pid // (GROUP * tiles_n) * GROUP
    size = tl.minimum(tiles_m - first, GROUP)
    inside = pid % (GROUP * tiles_n)
    return first + inside % size, inside // size


@triton.jit
def _products(
    a_src, b_src, inverse_a_ptr, inverse_b_ptr, first_m, first_n, M, N, stride_am, stride_bn,
    D: tl.constexpr, USE_TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """``[BLOCK_M, BLOCK_N]`` fp32, of unit vectors where inverse norms are given; zeros past the last row and column."""
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_k in range(0, D, BLOCK_K):
        if USE_TMA:
            a = a_src.load([first_m, first_k])
            b = b_src.load([first_n, first_k])
        else:
            offs_k = first_k + tl.arange(0, BLOCK_K)
            a_rows = a_src + offs_m.to(tl.int64)[:, None] * stride_am
            b_rows = b_src + offs_n.to(tl.int64)[:, None] * stride_bn
            mask_k = (offs_k < D)[None, :]
            a = tl.load(a_rows + offs_k[None, :], mask=(offs_m < M)[:, None] & mask_k, other=0.0)
            b = tl.load(b_rows + offs_k[None, :], mask=(offs_n < N)[:, None] & mask_k, other=0.0)
        acc = tl.dot(a, b.T, acc, input_precision="ieee")
    if inverse_a_ptr is not None:
        acc *= tl.load(inverse_a_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
        acc *= tl.load(inverse_b_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    return acc


@triton.jit
def _ranges(start_ptr, stop_ptr, offs_m, M, first_n, BLOCK_N: tl.constexpr):
    """The ranges of a tile's rows, and whether any of them may reach into its columns."""
    mask_m = offs_m < M
    start = tl.load(start_ptr + offs_m, mask=mask_m, other=0)
    stop = tl.load(stop_ptr + offs_m, mask=mask_m, other=0)
    first = tl.min(tl.where(start < stop, start, 2147483647))
    return start, stop, (tl.max(stop) > first_n) & (first < first_n + BLOCK_N)


@triton.jit
def _belong(start, stop, offs_n):
    return (offs_n[None, :] >= start[:, None]) & (offs_n[None, :] < stop[:, None])


@triton.jit(do_not_specialize=["first_row", "rows", "M", "N"])
def _clip_fwd_kernel(
    a_src, b_src, inverse_a_ptr, inverse_b_ptr, scale_ptr, start_ptr, stop_ptr,
    row_ptr, row_positive_ptr, column_ptr, column_positive_ptr, lse_a_ptr, lse_b_ptr, picked_ptr,
    first_row, rows, M, N, stride_am, stride_bn, smooth_row, smooth_column,
    D: tl.constexpr, SMOOTH: tl.constexpr, EVEN: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Shares of the log-sum-exps, of rows ``[tiles_n, rows]`` and of columns ``[tiles_m, N]``, and of what the loss picks."""
    tile_m, tile_n = _place(tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    first_m, first_n = first_row + tile_m * BLOCK_M, tile_n * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    s = scale * _products(
        a_src, b_src, inverse_a_ptr, inverse_b_ptr, first_m, first_n, M, N, stride_am, stride_bn,
        D, USE_TMA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    start, stop, near = _ranges(start_ptr, stop_ptr, offs_m, M, first_n, BLOCK_N)
    picked = 0.0
    if near:
        row_positive = tl.load(row_positive_ptr + offs_m, mask=mask_m, other=0.0)
        column_positive = tl.load(column_positive_ptr + offs_n, mask=mask_n, other=0.0)
        belong = _belong(start, stop, offs_n)
        picked += tl.sum(tl.where(belong, s * (row_positive[:, None] + column_positive[None, :]), 0.0))
    if SMOOTH:
        row = tl.load(row_ptr + offs_m, mask=mask_m, other=0.0)
        column = tl.load(column_ptr + offs_n, mask=mask_n, other=0.0)
        share = smooth_row * row[:, None] + smooth_column * column[None, :]
        picked += tl.sum(tl.where(mask_m[:, None] & mask_n[None, :], s * share, 0.0))
    tl.store(picked_ptr + tl.program_id(0), picked * LN2)

    if not EVEN:
        s = tl.where(mask_m[:, None] & mask_n[None, :], s, float("-inf"))
    max_m, max_n = tl.max(s, 1), tl.max(s, 0)
    top = tl.max(max_m)
    lowest = tl.minimum(tl.min(tl.where(mask_m, max_m, top)), tl.min(tl.where(mask_n, max_n, top)))
    if top - lowest < NARROW:
        # One exponential for both directions: no row or column is so far below the tile's maximum that it would vanish.
        p = tl.exp2(s - top)
        lse_m = top + tl.log2(tl.sum(p, 1))
        lse_n = top + tl.log2(tl.sum(p, 0))
    else:
        lse_m = max_m + tl.log2(tl.sum(tl.exp2(s - max_m[:, None]), 1))
        lse_n = max_n + tl.log2(tl.sum(tl.exp2(s - max_n[None, :]), 0))
    local_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    tl.store(lse_a_ptr + tile_n.to(tl.int64) * rows + local_m, lse_m, mask=mask_m)
    tl.store(lse_b_ptr + tile_m.to(tl.int64) * N + offs_n, lse_n, mask=mask_n)


@triton.jit
def _merge_lse_kernel(
    share_ptr, lse_ptr, tiles, size, ADD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr
):  # fmt: skip
    """Log-sum-exp over the first dimension of ``[tiles, size]``, to the base 2, to that of the logits; in a fixed order."""
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < size
    top = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    if ADD:
        top = tl.load(lse_ptr + offs_s, mask=mask_s, other=0.0) * LOG2E
        total += 1.0
    for first in range(0, tiles, BLOCK_T):
        offs_t = first + tl.arange(0, BLOCK_T)
        mask = (offs_t < tiles)[:, None] & mask_s[None, :]
        share = tl.load(share_ptr + offs_t.to(tl.int64)[:, None] * size + offs_s[None, :], mask=mask, other=float("-inf"))
        new = tl.maximum(top, tl.max(share, 0))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(share - new[None, :]), 0)
        top = new
    tl.store(lse_ptr + offs_s, (top + tl.log2(total)) * LN2, mask=mask_s)


@triton.jit(do_not_specialize=PLACE)
def _clip_bwd_kernel(
    a_src, b_src, inverse_a_ptr, inverse_b_ptr, scale_ptr, start_ptr, stop_ptr,
    row_ptr, row_positive_ptr, column_ptr, column_positive_ptr, lse_a_ptr, lse_b_ptr, g_ptr, dscale_ptr,
    first_row, rows, first_column, columns, M, N, stride_am, stride_bn, stride_gm, smooth_row, smooth_column, gain,
    D: tl.constexpr, SMOOTH: tl.constexpr, EVEN: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``gain`` times the gradient of the logits of a panel, times the inverse norms, and shares of that of the scale."""
    tile_m, tile_n = _place(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    first_m, first_n = first_row + tile_m * BLOCK_M, first_column + tile_n * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    x = _products(
        a_src, b_src, inverse_a_ptr, inverse_b_ptr, first_m, first_n, M, N, stride_am, stride_bn,
        D, USE_TMA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip

    row = tl.load(row_ptr + offs_m, mask=mask_m, other=0.0)
    column = tl.load(column_ptr + offs_n, mask=mask_n, other=0.0)
    lse_m = tl.load(lse_a_ptr + offs_m, mask=mask_m, other=0.0) * LOG2E
    lse_n = tl.load(lse_b_ptr + offs_n, mask=mask_n, other=0.0) * LOG2E
    inf = float("inf")
    lowest = tl.minimum(tl.min(tl.where(mask_m, lse_m, inf)), tl.min(tl.where(mask_n, lse_n, inf)))
    highest = tl.maximum(tl.max(tl.where(mask_m, lse_m, -inf)), tl.max(tl.where(mask_n, lse_n, -inf)))
    if highest - lowest < NARROW:
        # exp2(s - lse_n) = exp2(s - lse_m) * exp2(lse_m - lowest) * exp2(lowest - lse_n): one exponential for each pair.
        weight = row[:, None] + tl.exp2(lse_m - lowest)[:, None] * (column * tl.exp2(lowest - lse_n))[None, :]
        g = tl.exp2(x * scale - lse_m[:, None]) * weight
    else:
        g = row[:, None] * tl.exp2(x * scale - lse_m[:, None]) + column[None, :] * tl.exp2(x * scale - lse_n[None, :])
    start, stop, near = _ranges(start_ptr, stop_ptr, offs_m, M, first_n, BLOCK_N)
    if near:
        row_positive = tl.load(row_positive_ptr + offs_m, mask=mask_m, other=0.0)
        column_positive = tl.load(column_positive_ptr + offs_n, mask=mask_n, other=0.0)
        g -= tl.where(_belong(start, stop, offs_n), row_positive[:, None] + column_positive[None, :], 0.0)
    if SMOOTH:
        g -= smooth_row * row[:, None] + smooth_column * column[None, :]
    _store_gradient(
        g, x, inverse_a_ptr, inverse_b_ptr, g_ptr, dscale_ptr, tile_m, tile_n, offs_m, offs_n, mask_m, mask_n, stride_gm, gain,
        EVEN, BLOCK_M, BLOCK_N,
    )  # fmt: skip


@triton.jit
def _store_gradient(
    g, x, inverse_a_ptr, inverse_b_ptr, g_ptr, dscale_ptr, tile_m, tile_n, offs_m, offs_n, mask_m, mask_n, stride_gm, gain,
    EVEN: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    mask = mask_m[:, None] & mask_n[None, :]
    if not EVEN:
        g = tl.where(mask, g, 0.0)
    tl.store(dscale_ptr + tl.program_id(0), tl.sum(g * x))
    if inverse_a_ptr is not None:
        g *= tl.load(inverse_a_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        g *= tl.load(inverse_b_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    # A panel has less than 2**31 elements.
    local_m = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    local_n = tile_n * BLOCK_N + tl.arange(0, BLOCK_N)
    offs = local_m[:, None] * stride_gm + local_n[None, :]
    g = (g * gain).to(g_ptr.dtype.element_ty)
    if EVEN:
        tl.store(g_ptr + offs, g)
    else:
        tl.store(g_ptr + offs, g, mask=mask)


@triton.jit(do_not_specialize=PLACE)
def _siglip_kernel(
    a_src, b_src, inverse_a_ptr, inverse_b_ptr, scale_ptr, bias_ptr, start_ptr, stop_ptr,
    g_ptr, loss_ptr, dscale_ptr, dbias_ptr,
    first_row, rows, first_column, columns, M, N, stride_am, stride_bn, stride_gm,
    D: tl.constexpr, EVEN: tl.constexpr, GRADS: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Shares of the loss of a panel, and with ``GRADS`` the gradient of its logits, and shares of those of scale and bias."""
    tile_m, tile_n = _place(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    first_m, first_n = first_row + tile_m * BLOCK_M, first_column + tile_n * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_m, mask_n = offs_m < M, offs_n < N
    x = _products(
        a_src, b_src, inverse_a_ptr, inverse_b_ptr, first_m, first_n, M, N, stride_am, stride_bn,
        D, USE_TMA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    # Positive where the logit has the wrong sign.
    wrong = x * (tl.load(scale_ptr).to(tl.float32) * LOG2E) + tl.load(bias_ptr).to(tl.float32) * LOG2E
    start, stop, near = _ranges(start_ptr, stop_ptr, offs_m, M, first_n, BLOCK_N)
    if near:
        wrong = tl.where(_belong(start, stop, offs_n), -wrong, wrong)
    e = tl.exp2(-tl.abs(wrong))
    # log(1 + e) forgets what 1 + e does, and most pairs are as small.
    log1p = tl.where(e < 1.0 / 64, e * (1.0 - e * (0.5 - e * (1.0 / 3))), tl.log2(1.0 + e) * LN2)
    loss = tl.maximum(wrong, 0.0, propagate_nan=tl.PropagateNan.ALL) * LN2 + log1p
    if not EVEN:
        loss = tl.where(mask_m[:, None] & mask_n[None, :], loss, 0.0)
    tl.store(loss_ptr + tl.program_id(0), tl.sum(loss))
    if GRADS:
        g = tl.where(wrong >= 0, 1.0, e) / (1.0 + e)
        if near:
            g = tl.where(_belong(start, stop, offs_n), -g, g)
        if not EVEN:
            g = tl.where(mask_m[:, None] & mask_n[None, :], g, 0.0)
        tl.store(dbias_ptr + tl.program_id(0), tl.sum(g))
        _store_gradient(
            g, x, inverse_a_ptr, inverse_b_ptr, g_ptr, dscale_ptr, tile_m, tile_n, offs_m, offs_n, mask_m, mask_n, stride_gm, 1.0,
            EVEN, BLOCK_M, BLOCK_N,
        )  # fmt: skip

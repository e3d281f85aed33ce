# SPDX-License-Identifier: Apache-2.0
"""The kernels of the contrastive losses: a tile of products, and what each loss makes of it before it is forgotten.

A program takes one tile of ``a @ b.T`` over the whole depth D and reduces it to what outlives it: log-sum-exps of its rows and
of its columns, sums, or the gradient of its products in the dtype of the features. Exponents are to the base 2.
"""

import triton
import triton.language as tl

from vlmkernels.backends.triton._product import product_tile

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# How far apart the log-sum-exps of a tile may be for one exponential to serve rows and columns: 2**60 times 2**-60 is exact.
NARROW = tl.constexpr(60.0)
# A sum of exponentials below this, where the largest of the tile is 1, may have lost terms: nothing below 2**-126 is there.
SMALLEST = tl.constexpr(2.0**-90)
#: Row blocks that go through all columns together.
GROUPED = 8
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
    acc = product_tile(
        a_src, b_src, M, stride_am, stride_bn, first_m, first_n, 0, D, N, D, USE_TMA, BLOCK_M, BLOCK_N, BLOCK_K
    )  # fmt: skip
    if inverse_a_ptr is not None:
        acc *= tl.load(inverse_a_ptr + offs_m, mask=offs_m < M, other=0.0)[:, None]
        acc *= tl.load(inverse_b_ptr + offs_n, mask=offs_n < N, other=0.0)[None, :]
    return acc


@triton.jit
def _halves(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """The left and the right half of the columns, which in the layout of a product costs nothing."""
    return tl.split(tl.permute(tl.reshape(x, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))


@triton.jit
def _quarters(x, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """``[BLOCK_M, BLOCK_N // 4]`` each: what is made of a tile at a time, as more would not fit in registers beside it."""
    left, right = _halves(x, BLOCK_M, BLOCK_N)
    first, second = _halves(left, BLOCK_M, BLOCK_N // 2)
    third, fourth = _halves(right, BLOCK_M, BLOCK_N // 2)
    return first, second, third, fourth


@triton.jit
def _panel_tile(
    a_src, b_src, inverse_a_ptr, inverse_b_ptr, first_row, rows, first_column, columns, M, N, stride_am, stride_bn,
    D: tl.constexpr, USE_TMA: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
    GROUP: tl.constexpr,
):  # fmt: skip
    """This program's tile of a panel: where it is in the panel and in the matrix, and the quarters of its products."""
    tile_m, tile_n = _place(tl.cdiv(rows, BLOCK_M), tl.cdiv(columns, BLOCK_N), GROUP)
    first_m, first_n = first_row + tile_m * BLOCK_M, first_column + tile_n * BLOCK_N
    x = _products(
        a_src, b_src, inverse_a_ptr, inverse_b_ptr, first_m, first_n, M, N, stride_am, stride_bn,
        D, USE_TMA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    return tile_m, tile_n, first_m, first_n, _quarters(x, BLOCK_M, BLOCK_N)


@triton.jit
def _reach(start, stop):
    """The first column that any row of a tile belongs to, and the end of the last."""
    return tl.min(tl.where(start < stop, start, 2147483647)), tl.max(stop)


@triton.jit
def _belong(start, stop, offs_n):
    return (offs_n[None, :] >= start[:, None]) & (offs_n[None, :] < stop[:, None])


@triton.jit
def _pick(
    s, start, stop, reach, row, row_positive, column_ptr, column_positive_ptr, offs_m, first_n, M, N,
    smooth_row, smooth_column, SMOOTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The sum of what the loss subtracts in these columns."""
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    picked = 0.0
    if (reach[1] > first_n) & (reach[0] < first_n + BLOCK_N):
        column_positive = tl.load(column_positive_ptr + offs_n, mask=mask_n, other=0.0)
        share = row_positive[:, None] + column_positive[None, :]
        picked += tl.sum(tl.where(_belong(start, stop, offs_n), s * share, 0.0))
    if SMOOTH:
        column = tl.load(column_ptr + offs_n, mask=mask_n, other=0.0)
        share = smooth_row * row[:, None] + smooth_column * column[None, :]
        picked += tl.sum(tl.where((offs_m < M)[:, None] & mask_n[None, :], s * share, 0.0))
    return picked


@triton.jit(do_not_specialize=["first_row", "rows", "M", "N"])
def _clip_fwd_kernel(
    a_src, b_src, inverse_a_ptr, inverse_b_ptr, scale_ptr, start_ptr, stop_ptr,
    row_ptr, row_positive_ptr, column_ptr, column_positive_ptr, lse_a_ptr, lse_b_ptr, shift_ptr, picked_ptr, count_ptr,
    first_row, rows, M, N, stride_am, stride_bn, smooth_row, smooth_column,
    D: tl.constexpr, SMOOTH: tl.constexpr, EVEN: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Shares of the log-sum-exps, of rows ``[tiles_n, rows]`` and of columns ``[tiles_m, N]``, and of what the loss picks.

    A share is the sum of ``exp2(s - shift)`` with the tile's ``shift`` ``[tiles_m, tiles_n]``, or itself where that is infinite.
    A count for the kernel behind this one begins with 0.
    """
    tile_m, tile_n = _place(tl.cdiv(rows, BLOCK_M), tl.cdiv(N, BLOCK_N), GROUP)
    first_m, first_n = first_row + tile_m * BLOCK_M, tile_n * BLOCK_N
    offs_m = first_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    s = (tl.load(scale_ptr).to(tl.float32) * LOG2E) * _products(
        a_src, b_src, inverse_a_ptr, inverse_b_ptr, first_m, first_n, M, N, stride_am, stride_bn,
        D, USE_TMA, BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    parts = _quarters(s, BLOCK_M, BLOCK_N)
    PART: tl.constexpr = BLOCK_N // 4

    start = tl.load(start_ptr + offs_m, mask=mask_m, other=0)
    stop = tl.load(stop_ptr + offs_m, mask=mask_m, other=0)
    row = tl.load(row_ptr + offs_m, mask=mask_m, other=0.0)
    row_positive = tl.load(row_positive_ptr + offs_m, mask=mask_m, other=0.0)
    reach = _reach(start, stop)
    picked = 0.0
    for i in tl.static_range(4):
        picked += _pick(
            parts[i], start, stop, reach, row, row_positive, column_ptr, column_positive_ptr, offs_m, first_n + i * PART, M, N,
            smooth_row, smooth_column, SMOOTH, PART,
        )  # fmt: skip
    tl.store(picked_ptr + tl.program_id(0), picked * LN2)
    if count_ptr is not None:
        tl.store(count_ptr, 0, mask=tl.program_id(0) == 0)
    # One exponential serves both directions, and its sums go out as they are: their logarithms are taken where they are merged.
    lse_a_ptr += tile_n.to(tl.int64) * rows + tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    lse_b_ptr += tile_m.to(tl.int64) * N + first_n
    local_n = tl.arange(0, PART)
    shift = tl.max(tl.max(s, 1))
    total = tl.zeros([BLOCK_M], tl.float32)
    least = tl.full([PART], 1.0, tl.float32)
    for i in tl.static_range(4):
        mask_n = first_n + i * PART + local_n < N
        p = tl.exp2(parts[i] - shift)
        if not EVEN:
            p = tl.where(mask_m[:, None] & mask_n[None, :], p, 0.0)
        total += tl.sum(p, 1)
        total_n = tl.sum(p, 0)
        least = tl.minimum(least, tl.where(mask_n, total_n, 1.0), propagate_nan=tl.PropagateNan.ALL)
        tl.store(lse_b_ptr + i * PART + local_n, total_n, mask=mask_n)
    least_m = tl.where(mask_m, total, 1.0)
    if (tl.min(least_m) < SMALLEST) | (tl.min(least) < SMALLEST):
        # A row or a column is so far below the tile's maximum that it would vanish: each gets its own, and its logarithm here.
        shift = float("inf")
        top_m = tl.full([BLOCK_M], float("-inf"), tl.float32)
        for i in tl.static_range(4):
            mask = mask_m[:, None] & (first_n + i * PART + local_n < N)[None, :]
            top_m = tl.maximum(top_m, tl.max(tl.where(mask, parts[i], float("-inf")), 1))
        total = tl.zeros([BLOCK_M], tl.float32)
        for i in tl.static_range(4):
            mask_n = first_n + i * PART + local_n < N
            part = tl.where(mask_m[:, None] & mask_n[None, :], parts[i], float("-inf"))
            top_n = tl.max(part, 0)
            total += tl.sum(tl.exp2(part - top_m[:, None]), 1)
            lse_n = top_n + tl.log2(tl.sum(tl.exp2(part - top_n[None, :]), 0))
            tl.store(lse_b_ptr + i * PART + local_n, lse_n, mask=mask_n)
        total = top_m + tl.log2(total)
    tl.store(lse_a_ptr, total, mask=mask_m)
    tl.store(shift_ptr + tile_m * tl.cdiv(N, BLOCK_N) + tile_n, shift)


@triton.jit
def merged_lse(
    share_ptr, shift_ptr, lse_ptr, offs_s, mask_s, tiles, size, stride_tiles, stride_size, BLOCK: tl.constexpr,
    ADD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """Log-sum-exp over the first dimension of ``[tiles, size]``, to the base 2, to that of the logits; in a fixed order."""
    top = tl.full([BLOCK_S], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_S], tl.float32)
    if ADD:
        top = tl.load(lse_ptr + offs_s, mask=mask_s, other=0.0) * LOG2E
        total += 1.0
    for first in range(0, tiles, BLOCK_T):
        offs_t = (first + tl.arange(0, BLOCK_T)).to(tl.int64)
        mask = (offs_t < tiles)[:, None] & mask_s[None, :]
        share = tl.load(share_ptr + offs_t[:, None] * size + offs_s[None, :], mask=mask, other=0.0)
        places = offs_t[:, None] * stride_tiles + (offs_s // BLOCK)[None, :] * stride_size
        shift = tl.load(shift_ptr + places, mask=mask, other=0.0)
        share = tl.where(shift == float("inf"), share, tl.log2(share) + shift)
        new = tl.maximum(top, tl.max(share, 0))
        total = total * tl.exp2(top - new) + tl.sum(tl.exp2(share - new[None, :]), 0)
        top = new
    return (top + tl.log2(total)) * LN2


@triton.jit
def _merge_lse_kernel(
    share_ptr, shift_ptr, lse_ptr, tiles, size, stride_tiles, stride_size, BLOCK: tl.constexpr,
    ADD: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    offs_s = tl.program_id(0) * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < size
    lse = merged_lse(
        share_ptr, shift_ptr, lse_ptr, offs_s, mask_s, tiles, size, stride_tiles, stride_size, BLOCK, ADD, BLOCK_T, BLOCK_S
    )  # fmt: skip
    tl.store(lse_ptr + offs_s, lse, mask=mask_s)


@triton.jit
def _add_narrow_kernel(
    x_ptr, high_ptr, low_ptr, size, FIRST: tl.constexpr, LAST: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add fp32 ``x`` to a sum of 24 bits, whose high 16 are a bf16, and round to nearest; with ``LAST`` add the sum to ``x``."""
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offs < size
    x = tl.load(x_ptr + offs, mask=mask, other=0.0)
    if not FIRST:
        high = tl.load(high_ptr + offs, mask=mask, other=0).to(tl.int32)
        low = tl.load(low_ptr + offs, mask=mask, other=0).to(tl.int32)
        x += ((high << 16) | (low << 8)).to(tl.float32, bitcast=True)
    if LAST:
        tl.store(x_ptr + offs, x, mask=mask)
    else:
        # The NaN of a GPU has all bits set, and one more would make it a number.
        bits = tl.where(x == x, x.to(tl.int32, bitcast=True) + 0x80, 0x7FC00000)
        tl.store(high_ptr + offs, (bits >> 16).to(tl.int16), mask=mask)
        tl.store(low_ptr + offs, ((bits >> 8) & 0xFF).to(tl.uint8), mask=mask)


@triton.jit
def _clip_gradient(
    x, scale, lse_m, far_m, lowest, narrow, start, stop, reach, row, row_positive, column_ptr, column_positive_ptr, lse_b_ptr,
    first_n, N, smooth_row, smooth_column, gain, SMOOTH: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """The gradient of the logits in these columns."""
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    lse_n = tl.load(lse_b_ptr + offs_n, mask=mask_n, other=0.0) * LOG2E
    g = tl.exp2(x * scale - lse_m[:, None])
    if narrow:
        # exp2(s - lse_n) = exp2(s - lse_m) * exp2(lse_m - lowest) * exp2(lowest - lse_n): one exponential for each pair.
        g *= 1.0 + far_m[:, None] * tl.exp2(lowest - lse_n)[None, :]
    else:
        g += tl.exp2(x * scale - lse_n[None, :])
    if (reach[1] > first_n) & (reach[0] < first_n + BLOCK_N):
        column_positive = tl.load(column_positive_ptr + offs_n, mask=mask_n, other=0.0)
        share = gain * (row_positive[:, None] + column_positive[None, :])
        g -= tl.where(_belong(start, stop, offs_n), share, 0.0)
    if SMOOTH:
        column = tl.load(column_ptr + offs_n, mask=mask_n, other=0.0)
        g -= gain * (smooth_row * row[:, None] + smooth_column * column[None, :])
    return g


@triton.jit
def _store_gradient(
    g, inverse_a_ptr, inverse_b_ptr, g_ptr, local_m, local_n, offs_m, offs_n, M, N, stride_gm, EVEN: tl.constexpr
):  # fmt: skip
    mask_m, mask_n = offs_m < M, offs_n < N
    if inverse_a_ptr is not None:
        g *= tl.load(inverse_a_ptr + offs_m, mask=mask_m, other=0.0)[:, None]
        g *= tl.load(inverse_b_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    # A panel has less than 2**31 elements.
    ptrs = g_ptr + (local_m[:, None] * stride_gm + local_n[None, :])
    g = g.to(g_ptr.dtype.element_ty)
    if EVEN:
        tl.store(ptrs, g)
    else:
        # Zeros up to the end of the panel's rows: 16 bytes are stored together where all or none of them are.
        tl.store(ptrs, g, mask=mask_m[:, None] & (local_n < stride_gm)[None, :])


@triton.jit(do_not_specialize=PLACE)
def _clip_bwd_kernel(
    a_src, b_src, inverse_a_ptr, inverse_b_ptr, scale_ptr, gain_ptr, start_ptr, stop_ptr,
    row_ptr, row_positive_ptr, column_ptr, column_positive_ptr, lse_a_ptr, lse_b_ptr, g_ptr, dscale_ptr,
    first_row, rows, first_column, columns, M, N, stride_am, stride_bn, stride_gm, smooth_row, smooth_column,
    D: tl.constexpr, SMOOTH: tl.constexpr, EVEN: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """``gain`` times the gradient of the logits of a panel, times the inverse norms, and shares of that of the scale.

    The log-sum-exps come less the logarithms of ``gain`` times the weights of rows and columns, so that each probability is
    weighted by its exponential.
    """
    tile_m, tile_n, first_m, first_n, parts = _panel_tile(
        a_src, b_src, inverse_a_ptr, inverse_b_ptr, first_row, rows, first_column, columns, M, N, stride_am, stride_bn,
        D, USE_TMA, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
    )  # fmt: skip
    offs_m = first_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    PART: tl.constexpr = BLOCK_N // 4

    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    gain = tl.load(gain_ptr)
    row = tl.load(row_ptr + offs_m, mask=mask_m, other=0.0)
    row_positive = tl.load(row_positive_ptr + offs_m, mask=mask_m, other=0.0)
    lse_m = tl.load(lse_a_ptr + offs_m, mask=mask_m, other=0.0) * LOG2E
    start = tl.load(start_ptr + offs_m, mask=mask_m, other=0)
    stop = tl.load(stop_ptr + offs_m, mask=mask_m, other=0)
    reach = _reach(start, stop)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    lse_n = tl.load(lse_b_ptr + offs_n, mask=offs_n < N, other=0.0) * LOG2E
    inf = float("inf")
    lowest = tl.minimum(tl.min(tl.where(mask_m, lse_m, inf)), tl.min(tl.where(offs_n < N, lse_n, inf)))
    highest = tl.maximum(tl.max(tl.where(mask_m, lse_m, -inf)), tl.max(tl.where(offs_n < N, lse_n, -inf)))
    far_m = tl.exp2(lse_m - lowest)
    dscale = tl.zeros([BLOCK_M], tl.float32)
    for i in tl.static_range(4):
        offs_n = first_n + i * PART + tl.arange(0, PART)
        g = _clip_gradient(
            parts[i], scale, lse_m, far_m, lowest, highest - lowest < NARROW, start, stop, reach, row, row_positive,
            column_ptr, column_positive_ptr, lse_b_ptr, first_n + i * PART, N, smooth_row, smooth_column, gain, SMOOTH, PART,
        )  # fmt: skip
        if not EVEN:
            g = tl.where(mask_m[:, None] & (offs_n < N)[None, :], g, 0.0)
        dscale += tl.sum(g * parts[i], 1)
        _store_gradient(
            g, inverse_a_ptr, inverse_b_ptr, g_ptr, tile_m * BLOCK_M + tl.arange(0, BLOCK_M),
            tile_n * BLOCK_N + i * PART + tl.arange(0, PART), offs_m, offs_n, M, N, stride_gm, EVEN,
        )  # fmt: skip
    tl.store(dscale_ptr + tl.program_id(0), tl.sum(dscale))


@triton.jit
def _multiply(x, y):
    return x * y


@triton.jit(do_not_specialize=PLACE)
def _siglip_kernel(
    a_src, b_src, inverse_a_ptr, inverse_b_ptr, scale_ptr, bias_ptr, start_ptr, stop_ptr,
    g_ptr, loss_ptr, dscale_ptr, dbias_ptr,
    first_row, rows, first_column, columns, M, N, stride_am, stride_bn, stride_gm,
    D: tl.constexpr, EVEN: tl.constexpr, GRADS: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """Shares of the loss of a panel, and with ``GRADS`` the gradient of its logits, and shares of those of scale and bias."""
    tile_m, tile_n, first_m, first_n, parts = _panel_tile(
        a_src, b_src, inverse_a_ptr, inverse_b_ptr, first_row, rows, first_column, columns, M, N, stride_am, stride_bn,
        D, USE_TMA, BLOCK_M, BLOCK_N, BLOCK_K, GROUP,
    )  # fmt: skip
    offs_m = first_m + tl.arange(0, BLOCK_M)
    mask_m = offs_m < M
    PART: tl.constexpr = BLOCK_N // 4

    scale = tl.load(scale_ptr).to(tl.float32) * LOG2E
    bias = tl.load(bias_ptr).to(tl.float32) * LOG2E
    start = tl.load(start_ptr + offs_m, mask=mask_m, other=0)
    stop = tl.load(stop_ptr + offs_m, mask=mask_m, other=0)
    reach = _reach(start, stop)
    loss = tl.zeros([BLOCK_M], tl.float32)
    dscale, dbias = loss, loss
    for i in tl.static_range(4):
        offs_n = first_n + i * PART + tl.arange(0, PART)
        # Positive where the logit has the wrong sign.
        wrong = parts[i] * scale + bias
        near = (reach[1] > first_n + i * PART) & (reach[0] < first_n + i * PART + PART)
        if near:
            wrong = tl.where(_belong(start, stop, offs_n), -wrong, wrong)
        if not EVEN:
            wrong = tl.where(mask_m[:, None] & (offs_n < N)[None, :], wrong, float("-inf"))
        # The loss is log(1 + exp(wrong)) = max(wrong, 0) + log(1 + e). A logarithm takes twenty instructions: one serves a row of
        # the part, and none the pairs of small e, which are most, as 1 + e would forget what they are.
        e = tl.exp2(-tl.abs(wrong))
        small = e < 1.0 / 64
        series = tl.where(small, e * (LOG2E - e * (0.5 * LOG2E - e * (LOG2E / 3))), 0.0)
        loss += tl.sum(tl.maximum(wrong, 0.0, propagate_nan=tl.PropagateNan.ALL) + series, 1)
        loss += tl.log2(tl.reduce(tl.where(small, 1.0, 1.0 + e), 1, _multiply))
        if GRADS:
            # 1 / (1 + e) in one instruction of the special function unit, where a division takes several others.
            root = tl.rsqrt(1.0 + e)
            g = tl.where(wrong >= 0, 1.0, e) * (root * root)
            if near:
                g = tl.where(_belong(start, stop, offs_n), -g, g)
            dbias += tl.sum(g, 1)
            dscale += tl.sum(g * parts[i], 1)
            _store_gradient(
                g, inverse_a_ptr, inverse_b_ptr, g_ptr, tile_m * BLOCK_M + tl.arange(0, BLOCK_M),
                tile_n * BLOCK_N + i * PART + tl.arange(0, PART), offs_m, offs_n, M, N, stride_gm, EVEN,
            )  # fmt: skip
    tl.store(loss_ptr + tl.program_id(0), tl.sum(loss) * LN2)
    if GRADS:
        tl.store(dscale_ptr + tl.program_id(0), tl.sum(dscale))
        tl.store(dbias_ptr + tl.program_id(0), tl.sum(dbias))


@triton.jit
def _times_part(ptr, block, size, factor, BLOCK: tl.constexpr):
    offs = block.to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(ptr + offs, mask=offs < size, other=0.0)
    tl.store(ptr + offs, (x.to(tl.float32) * factor).to(x.dtype), mask=offs < size)


@triton.jit
def _times_kernel(da_ptr, db_ptr, dnumbers_ptr, dloss_ptr, size_a, size_b, times, BLOCK: tl.constexpr):
    """All three times ``dloss``, the first two ``times`` so much, in place."""
    pid = tl.program_id(0)
    blocks_a = tl.cdiv(size_a, BLOCK)
    dloss = tl.load(dloss_ptr).to(tl.float32)
    if pid < blocks_a:
        _times_part(da_ptr, pid, size_a, dloss * times, BLOCK)
    else:
        _times_part(db_ptr, pid - blocks_a, size_b, dloss * times, BLOCK)
    if pid == 0:
        _times_part(dnumbers_ptr, pid, 2, dloss, 2)

# SPDX-License-Identifier: Apache-2.0
"""Attention backward in Triton: row sums of dO * O, then dK and dV by key tile and dQ by query tile, all in fixed order.

Both kernels recompute the probabilities from the log-sum-exp. dK and dV work on transposed scores, so that P and dS are
already laid out as the left operands of their products; the query heads of a group are summed in fp32 registers.
"""

import torch
import triton
import triton.language as tl

from vlmkernels.backends.triton import INTERPRETED, cdiv
from vlmkernels.backends.triton._attention_common import (
    CAUSAL,
    DENSE,
    LOG2E,
    MAX_ROW_STRIDE,
    PRECISION,
    TILE,
    aligned,
    capped_logits2,
    is_hopper,
    key_span,
    load_rows,
    make_mask,
    pieces,
    row_ranges,
    scale_strides,
    split_loop,
    store_rows,
    strides_in_eights,
    tile_bounds,
)


@triton.jit
def _delta_kernel(
    dout_ptr, out_ptr, dlse_ptr, delta_ptr, stride_db, stride_ds, stride_dh, heads, queries,
    DV: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr, BLOCK_M: tl.constexpr, HAS_DLSE: tl.constexpr,
):  # fmt: skip
    """delta = rowsum(dO * O) - dLSE: what each row subtracts from dP."""
    stride_db, stride_ds, stride_dh = scale_strides(stride_db, stride_ds, stride_dh)
    tile_m, bh = tl.program_id(0), tl.program_id(1)
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    first_m = tile_m.to(tl.int64) * BLOCK_M
    local_m = tl.arange(0, BLOCK_M)
    offs_m = tile_m * BLOCK_M + local_m
    mask_m = offs_m < queries
    dout_ptr += b * stride_db + h * stride_dh + first_m * stride_ds
    out_ptr += ((b * queries + first_m) * heads + h) * DV
    do1 = load_rows(dout_ptr, stride_ds, local_m, mask_m, 0, V1, DV, True).to(tl.float32)
    o1 = load_rows(out_ptr, heads * DV, local_m, mask_m, 0, V1, DV, True).to(tl.float32)
    delta = tl.sum(do1 * o1, 1)
    if V2 > 0:
        do2 = load_rows(dout_ptr, stride_ds, local_m, mask_m, V1, V2, DV, True).to(tl.float32)
        o2 = load_rows(out_ptr, heads * DV, local_m, mask_m, V1, V2, DV, True).to(tl.float32)
        delta += tl.sum(do2 * o2, 1)
    rows = (b * heads + h) * queries + offs_m
    if HAS_DLSE:
        delta -= tl.load(dlse_ptr + rows, mask=mask_m, other=0.0)
    tl.store(delta_ptr + rows, delta, mask=mask_m)


@triton.jit
def _logits2(s, qk_scale, softcap, SOFTCAP: tl.constexpr):
    """Logits in units of log2, from the raw products ``s``."""
    if SOFTCAP:
        return capped_logits2(s, qk_scale, softcap)
    else:
        return s * qk_scale


@triton.jit
def _load_row_sums(lse_ptr, delta_ptr, offs_m, mask_m, MASKED: tl.constexpr):
    """The log-sum-exp in units of log2, +inf (which makes P zero) for rows past the end and rows that see no key; and delta."""
    if MASKED:
        lse = tl.load(lse_ptr + offs_m, mask=mask_m, other=float("inf"))
        delta = tl.load(delta_ptr + offs_m, mask=mask_m, other=0.0)
    else:
        lse = tl.load(lse_ptr + offs_m)
        delta = tl.load(delta_ptr + offs_m)
    return tl.where(lse == float("-inf"), float("inf"), lse * LOG2E), delta


@triton.jit
def _dkdv_tile(
    dk1, dk2, dv1, dv2, k1, k2, v1, v2, q_ptr, do_ptr, lse_ptr, delta_ptr, start_ptr, stop_ptr, stride_qs, stride_ds,
    m, offs_n, queries, keys, qk_scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_M: tl.constexpr, MASK: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """What one query tile adds to dK and dV of a key tile."""
    first_m = tl.cast(m, tl.int64) * BLOCK_M
    local_m = tl.arange(0, BLOCK_M)
    offs_m = m * BLOCK_M + local_m
    mask_m = offs_m < queries
    q_ptr += first_m * stride_qs
    do_ptr += first_m * stride_ds

    q1 = load_rows(q_ptr, stride_qs, local_m, mask_m, 0, D1, D, MASKED)
    st = tl.dot(k1, tl.trans(q1), input_precision=PRECISION)  # [BLOCK_N, BLOCK_M]
    if D2 > 0:
        q2 = load_rows(q_ptr, stride_qs, local_m, mask_m, D1, D2, D, MASKED)
        st = tl.dot(k2, tl.trans(q2), st, input_precision=PRECISION)
    st = _logits2(st, qk_scale, softcap, SOFTCAP)
    lse2, delta = _load_row_sums(lse_ptr, delta_ptr, offs_m, mask_m, MASKED)
    pt = tl.exp2(st - lse2[None, :])
    if MASKED:
        start, stop = row_ranges(start_ptr, stop_ptr, 0, offs_m, queries, keys, MASK)
        pt = tl.where((offs_n[:, None] >= start[None, :]) & (offs_n[:, None] < stop[None, :]), pt, 0.0)
    do1 = load_rows(do_ptr, stride_ds, local_m, mask_m, 0, V1, DV, MASKED)
    dv1 = tl.dot(pt.to(do1.dtype), do1, dv1, input_precision=PRECISION)
    dpt = tl.dot(v1, tl.trans(do1), input_precision=PRECISION)
    if V2 > 0:
        do2 = load_rows(do_ptr, stride_ds, local_m, mask_m, V1, V2, DV, MASKED)
        dv2 = tl.dot(pt.to(do2.dtype), do2, dv2, input_precision=PRECISION)
        dpt = tl.dot(v2, tl.trans(do2), dpt, input_precision=PRECISION)
    dst = pt * (dpt - delta[None, :])
    if SOFTCAP:
        capped = st / (softcap * LOG2E)
        dst = dst * (1.0 - capped * capped)
    if MASKED:
        # dP of a pair that is masked out may be NaN, and 0 * NaN is NaN.
        dst = tl.where(pt == 0.0, 0.0, dst)
    dk1 = tl.dot(dst.to(q1.dtype), q1, dk1, input_precision=PRECISION)
    if D2 > 0:
        dk2 = tl.dot(dst.to(q2.dtype), q2, dk2, input_precision=PRECISION)
    return dk1, dk2, dv1, dv2


@triton.jit
def _query_span(bounds_ptr, tile_n, queries, keys, MASK: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    """Of a key tile: the query tiles of BLOCK_M with a row that sees any of its keys, and a run that all see all of them."""
    tiles_m = tl.cdiv(queries, BLOCK_M)
    if MASK == DENSE:
        first, last, full_first, full_last = 0, tiles_m, 0, tiles_m
    elif MASK == CAUSAL:
        shift = keys - queries
        first = tl.maximum(tile_n * BLOCK_N - shift, 0) // BLOCK_M
        full_first = tl.cdiv(tl.maximum(tl.minimum((tile_n + 1) * BLOCK_N, keys) - 1 - shift, 0), BLOCK_M)
        last, full_last = tiles_m, tiles_m
    else:
        first, last, full_first, full_last = tile_bounds(bounds_ptr, tile_n, keys, BLOCK_N)
        # The entries count tiles of TILE rows.
        full_first = tl.cdiv(full_first * TILE, BLOCK_M)
        full_last = full_last * TILE // BLOCK_M
        first = first * TILE // BLOCK_M
        last = tl.minimum(tl.cdiv(last * TILE, BLOCK_M), tiles_m)
    last = tl.maximum(last, first)
    full_first = tl.minimum(tl.maximum(full_first, first), last)
    # The last tile may have rows past the end: code without a mask would read them.
    full_last = tl.maximum(tl.minimum(full_last, queries // BLOCK_M), full_first)
    return first, last, full_first, full_last


@triton.jit
def _attention_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, start_ptr, stop_ptr, bounds_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh, row_stride, bounds_stride, key_heads, groups, queries, keys, scale, qk_scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qs, stride_qh = scale_strides(stride_qb, stride_qs, stride_qh)
    stride_kb, stride_ks, stride_kh = scale_strides(stride_kb, stride_ks, stride_kh)
    stride_vb, stride_vs, stride_vh = scale_strides(stride_vb, stride_vs, stride_vh)
    stride_db, stride_ds, stride_dh = scale_strides(stride_db, stride_ds, stride_dh)
    tiles_n = tl.cdiv(keys, BLOCK_N)
    tile_n, bh = tl.program_id(0) % tiles_n, tl.program_id(0) // tiles_n
    b, hk = (bh // key_heads).to(tl.int64), (bh % key_heads).to(tl.int64)
    first_n = tile_n.to(tl.int64) * BLOCK_N
    local_n = tl.arange(0, BLOCK_N)
    offs_n = tile_n * BLOCK_N + local_n
    mask_n = offs_n < keys
    k_ptr += b * stride_kb + hk * stride_kh + first_n * stride_ks
    v_ptr += b * stride_vb + hk * stride_vh + first_n * stride_vs
    k1 = load_rows(k_ptr, stride_ks, local_n, mask_n, 0, D1, D, True)
    v1 = load_rows(v_ptr, stride_vs, local_n, mask_n, 0, V1, DV, True)
    k2 = load_rows(k_ptr, stride_ks, local_n, mask_n, D1, D2, D, True) if D2 > 0 else k1
    v2 = load_rows(v_ptr, stride_vs, local_n, mask_n, V1, V2, DV, True) if V2 > 0 else v1
    first, last, full_first, full_last = _query_span(
        bounds_ptr + b * bounds_stride, tile_n, queries, keys, MASK, BLOCK_M, BLOCK_N
    )
    start_ptr += b * row_stride
    stop_ptr += b * row_stride
    left = full_first - first

    dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
    dk2 = tl.zeros([BLOCK_N, D2 if D2 > 0 else 1], tl.float32)
    dv1 = tl.zeros([BLOCK_N, V1], tl.float32)
    dv2 = tl.zeros([BLOCK_N, V2 if V2 > 0 else 1], tl.float32)
    for g in range(0, groups):
        h = hk * groups + g
        rows = (b * key_heads * groups + h) * queries
        qh_ptr = q_ptr + b * stride_qb + h * stride_qh
        doh_ptr = do_ptr + b * stride_db + h * stride_dh
        for m in range(full_first, full_last):
            dk1, dk2, dv1, dv2 = _dkdv_tile(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, qh_ptr, doh_ptr, lse_ptr + rows, delta_ptr + rows, start_ptr, stop_ptr,
                stride_qs, stride_ds, m, offs_n, queries, keys, qk_scale, softcap,
                D, DV, D1, D2, V1, V2, BLOCK_M, MASK, False, SOFTCAP,
            )  # fmt: skip
        for i in range(0, left + last - full_last):
            m = tl.where(i < left, first + i, full_last + i - left)
            dk1, dk2, dv1, dv2 = _dkdv_tile(
                dk1, dk2, dv1, dv2, k1, k2, v1, v2, qh_ptr, doh_ptr, lse_ptr + rows, delta_ptr + rows, start_ptr, stop_ptr,
                stride_qs, stride_ds, m, offs_n, queries, keys, qk_scale, softcap,
                D, DV, D1, D2, V1, V2, BLOCK_M, MASK, True, SOFTCAP,
            )  # fmt: skip

    row = (b * keys + first_n) * key_heads + hk
    store_rows(dk_ptr + row * D, key_heads * D, dk1 * scale, local_n, mask_n, 0, D1, D)
    store_rows(dv_ptr + row * DV, key_heads * DV, dv1, local_n, mask_n, 0, V1, DV)
    if D2 > 0:
        store_rows(dk_ptr + row * D, key_heads * D, dk2 * scale, local_n, mask_n, D1, D2, D)
    if V2 > 0:
        store_rows(dv_ptr + row * DV, key_heads * DV, dv2, local_n, mask_n, V1, V2, DV)


@triton.jit
def _dq_tile(
    dq1, dq2, q1, q2, do1, do2, lse2, delta, start, stop, k_ptr, v_ptr, stride_ks, stride_vs, n, lo, hi, qk_scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """What one key tile adds to dQ of a query tile."""
    first_n = tl.cast(n, tl.int64) * BLOCK_N
    local_n = tl.arange(0, BLOCK_N)
    offs_n = n * BLOCK_N + local_n
    keep = (offs_n >= lo) & (offs_n < hi)
    k_ptr += first_n * stride_ks
    v_ptr += first_n * stride_vs
    k1 = load_rows(k_ptr, stride_ks, local_n, keep, 0, D1, D, MASKED)
    s = tl.dot(q1, tl.trans(k1), input_precision=PRECISION)
    if D2 > 0:
        k2 = load_rows(k_ptr, stride_ks, local_n, keep, D1, D2, D, MASKED)
        s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
    v1 = load_rows(v_ptr, stride_vs, local_n, keep, 0, V1, DV, MASKED)
    dp = tl.dot(do1, tl.trans(v1), input_precision=PRECISION)
    if V2 > 0:
        v2 = load_rows(v_ptr, stride_vs, local_n, keep, V1, V2, DV, MASKED)
        dp = tl.dot(do2, tl.trans(v2), dp, input_precision=PRECISION)
    s = _logits2(s, qk_scale, softcap, SOFTCAP)
    ds = tl.exp2(s - lse2[:, None]) * (dp - delta[:, None])
    if SOFTCAP:
        capped = s / (softcap * LOG2E)
        ds = ds * (1.0 - capped * capped)
    if MASKED:
        ds = tl.where((offs_n[None, :] >= start[:, None]) & (offs_n[None, :] < stop[:, None]), ds, 0.0)
    dq1 = tl.dot(ds.to(k1.dtype), k1, dq1, input_precision=PRECISION)
    if D2 > 0:
        dq2 = tl.dot(ds.to(k2.dtype), k2, dq2, input_precision=PRECISION)
    return dq1, dq2


@triton.jit
def _attention_dq_kernel(
    q_ptr, k_ptr, v_ptr, do_ptr, lse_ptr, delta_ptr, dq_ptr, start_ptr, stop_ptr, bounds_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    stride_db, stride_ds, stride_dh, row_stride, bounds_stride, heads, groups, queries, keys, scale, qk_scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qs, stride_qh = scale_strides(stride_qb, stride_qs, stride_qh)
    stride_kb, stride_ks, stride_kh = scale_strides(stride_kb, stride_ks, stride_kh)
    stride_vb, stride_vs, stride_vh = scale_strides(stride_vb, stride_vs, stride_vh)
    stride_db, stride_ds, stride_dh = scale_strides(stride_db, stride_ds, stride_dh)
    # The last tile first: under a causal mask it is the longest.
    tiles_m = tl.cdiv(queries, BLOCK_M)
    tile_m, bh = tiles_m - 1 - tl.program_id(0) % tiles_m, tl.program_id(0) // tiles_m
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    first_m = tile_m.to(tl.int64) * BLOCK_M
    local_m = tl.arange(0, BLOCK_M)
    offs_m = tile_m * BLOCK_M + local_m
    mask_m = offs_m < queries
    q_ptr += b * stride_qb + h * stride_qh + first_m * stride_qs
    do_ptr += b * stride_db + h * stride_dh + first_m * stride_ds
    k_ptr += b * stride_kb + (h // groups) * stride_kh
    v_ptr += b * stride_vb + (h // groups) * stride_vh
    q1 = load_rows(q_ptr, stride_qs, local_m, mask_m, 0, D1, D, True)
    do1 = load_rows(do_ptr, stride_ds, local_m, mask_m, 0, V1, DV, True)
    q2 = load_rows(q_ptr, stride_qs, local_m, mask_m, D1, D2, D, True) if D2 > 0 else q1
    do2 = load_rows(do_ptr, stride_ds, local_m, mask_m, V1, V2, DV, True) if V2 > 0 else do1
    rows = (b * heads + h) * queries
    lse2, delta = _load_row_sums(lse_ptr + rows, delta_ptr + rows, offs_m, mask_m, True)
    start, stop = row_ranges(start_ptr, stop_ptr, b * row_stride, offs_m, queries, keys, MASK)
    lo, hi, full_lo, full_hi = key_span(bounds_ptr + b * bounds_stride, tile_m, queries, keys, MASK, BLOCK_M)
    first, last, full_first, full_last = split_loop(lo, hi, full_lo, full_hi, BLOCK_N)

    dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
    dq2 = tl.zeros([BLOCK_M, D2 if D2 > 0 else 1], tl.float32)
    for n in range(full_first, full_last):
        dq1, dq2 = _dq_tile(
            dq1, dq2, q1, q2, do1, do2, lse2, delta, start, stop, k_ptr, v_ptr, stride_ks, stride_vs, n, lo, hi, qk_scale,
            softcap, D, DV, D1, D2, V1, V2, BLOCK_N, False, SOFTCAP,
        )  # fmt: skip
    left = full_first - first
    for i in range(0, left + last - full_last):
        n = tl.where(i < left, first + i, full_last + i - left)
        dq1, dq2 = _dq_tile(
            dq1, dq2, q1, q2, do1, do2, lse2, delta, start, stop, k_ptr, v_ptr, stride_ks, stride_vs, n, lo, hi, qk_scale,
            softcap, D, DV, D1, D2, V1, V2, BLOCK_N, True, SOFTCAP,
        )  # fmt: skip

    dq_ptr += ((b * queries + first_m) * heads + h) * D
    store_rows(dq_ptr, heads * D, dq1 * scale, local_m, mask_m, 0, D1, D)
    if D2 > 0:
        store_rows(dq_ptr, heads * D, dq2 * scale, local_m, mask_m, D1, D2, D)


#: The kernels for a single query or key, which stays an argument: as the constant 1 it takes away the loop and the stages of its
#: loads, and a head dim in two pieces without these stopped with an illegal address (D 72, one query, H200, Triton 3.6). The
#: others know whether 16 divides their lengths, without which dK and dV spill registers (sm_90).
_KERNELS_OF_ONE = tuple(
    triton.jit(kernel.fn, do_not_specialize=["queries", "keys"]) for kernel in (_attention_dkdv_kernel, _attention_dq_kernel)
)


def _bwd_config(dim: int, itemsize: int, hopper: bool) -> tuple[tuple[int, int, int, int], tuple[int, int, int, int]]:
    """BLOCK_M, BLOCK_N, warps and stages of the dK/dV kernel, then of the dQ kernel."""
    if itemsize == 4 and not INTERPRETED:
        if dim <= 64:
            return (32, 16, 4, 1), (16, 32, 4, 1)
        return ((16, 16, 4, 1), (16, 16, 4, 1)) if dim <= 128 else ((16, 16, 8, 1), (16, 16, 8, 1))
    if not hopper:
        if dim > 128:
            return (32, 32, 8, 1), (64, 32, 8, 1)
        return (32, 32 if 64 < dim < 128 else 64, 8, 2), (64, 32, 4, 2)
    if dim > 128:
        return (64, 64, 8, 2), (128, 32, 8, 3)
    return (64, 64, 4, 2), (128, 64, 8, 3) if dim == 128 else (64, 64, 4, 3)


def attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, dim = q.shape
    keys, key_heads, value_dim = v.shape[1:]
    dq, dkv = q.new_empty(q.shape), k.new_empty(k.numel() + v.numel())
    if q.numel() == 0 or k.numel() == 0:
        return dq.zero_(), dkv.zero_()
    dk, dv = dkv[: k.numel()], dkv[k.numel() :]
    mask = make_mask(q, k, start, stop, causal)
    q, k, v, dout = aligned(q), aligned(k), aligned(v), aligned(dout)
    if dout.stride(1) > MAX_ROW_STRIDE:
        dout = dout.contiguous()
    out, lse = out.contiguous(), lse.contiguous()
    delta = torch.empty_like(lse)
    strides = strides_in_eights(q.stride(), k.stride(), v.stride(), dout.stride())
    dims = pieces(dim, value_dim)
    block_m = 64 if value_dim <= 64 else 32
    _delta_kernel[(cdiv(queries, block_m), batch * heads)](
        dout, out, delta if dlse is None else dlse.contiguous(), delta, *strides[-3:], heads, queries,
        DV=value_dim, V1=dims["V1"], V2=dims["V2"], BLOCK_M=block_m, HAS_DLSE=dlse is not None,
    )  # fmt: skip
    dkdv_config, dq_config = _bwd_config(max(dim, value_dim), q.element_size(), is_hopper(q.device))
    sizes = heads // key_heads, queries, keys, scale, scale * LOG2E.value, softcap
    constants = dict(D=dim, DV=value_dim, **dims, MASK=mask.kind, SOFTCAP=softcap > 0)
    block_m, block_n, warps, stages = dkdv_config
    dkdv_kernel, dq_kernel = _KERNELS_OF_ONE if 1 in (queries, keys) else (_attention_dkdv_kernel, _attention_dq_kernel)
    dkdv_kernel[(cdiv(keys, block_n) * batch * key_heads,)](
        q, k, v, dout, lse, delta, dk, dv, mask.start, mask.stop, mask.k_bounds,
        *strides, mask.row_stride, mask.k_stride, key_heads, *sizes,
        **constants, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    block_m, block_n, warps, stages = dq_config
    dq_kernel[(cdiv(queries, block_m) * batch * heads,)](
        q, k, v, dout, lse, delta, dq, mask.start, mask.stop, mask.q_bounds,
        *strides, mask.row_stride, mask.q_stride, heads, *sizes,
        **constants, BLOCK_M=block_m, BLOCK_N=block_n, num_warps=warps, num_stages=stages,
    )  # fmt: skip
    return dq, dkv

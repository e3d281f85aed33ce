# SPDX-License-Identifier: Apache-2.0
"""Attention forward in Triton: one query tile per program, full key tiles without mask code, then the partial ones.

The backward is in ``_attention_bwd.py``.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vlmkernels.backends.triton import INTERPRETED, cdiv
from vlmkernels.backends.triton._aot import AotCase
from vlmkernels.backends.triton._attention_bwd import attention_bwd
from vlmkernels.backends.triton._attention_common import (
    CAUSAL,
    DENSE,
    LN2,
    LOG2E,
    MAX_ROW_STRIDE,
    PRECISION,
    RANGES,
    aligned,
    capped_logits2,
    in_eights,
    is_hopper,
    key_span,
    load_rows,
    pieces,
    row_ranges,
    rows_span,
    scale_strides,
    split_loop,
    store_rows,
    strides_in_eights,
)
from vlmkernels.backends.triton._launch import LAUNCHES, Launch

__all__ = ["attention_bwd", "attention_fwd", "plan_attention_fwd", "why_not_attention_bwd", "why_not_attention_fwd"]


@triton.jit
def _attend_tile(
    acc1, acc2, m, l, q1, q2, start, stop, k_ptr, v_ptr, stride_ks, stride_vs, n, lo, hi, qk_scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_N: tl.constexpr, MASKED: tl.constexpr, SOFTCAP: tl.constexpr,
):  # fmt: skip
    """One key tile of the running softmax: scores in units of log2, ``acc`` and ``l`` relative to the running maximum ``m``."""
    local_n = tl.arange(0, BLOCK_N)
    first = tl.cast(n, tl.int64) * BLOCK_N
    offs_n = n * BLOCK_N + local_n
    keep = (offs_n >= lo) & (offs_n < hi)
    k_ptr += first * stride_ks
    v_ptr += first * stride_vs

    s = tl.dot(q1, tl.trans(load_rows(k_ptr, stride_ks, local_n, keep, 0, D1, D, MASKED)), input_precision=PRECISION)
    if D2 > 0:
        k2 = load_rows(k_ptr, stride_ks, local_n, keep, D1, D2, D, MASKED)
        s = tl.dot(q2, tl.trans(k2), s, input_precision=PRECISION)
    if SOFTCAP:
        s = capped_logits2(s, qk_scale, softcap)
        unit = 1.0
    else:
        unit = qk_scale
    if MASKED:
        s = tl.where((offs_n[None, :] >= start[:, None]) & (offs_n[None, :] < stop[:, None]), s, float("-inf"))
    m_new = tl.maximum(m, tl.max(s, 1) * unit)
    # A row that has seen no key yet has m = -inf, and -inf - -inf is NaN.
    shift = tl.where(m_new == float("-inf"), 0.0, m_new) if MASKED else m_new
    p = tl.exp2(s * unit - shift[:, None])
    alpha = tl.exp2(m - shift)
    l = l * alpha + tl.sum(p, 1)
    v1 = load_rows(v_ptr, stride_vs, local_n, keep, 0, V1, DV, MASKED)
    acc1 = tl.dot(p.to(v1.dtype), v1, acc1 * alpha[:, None], input_precision=PRECISION)
    if V2 > 0:
        v2 = load_rows(v_ptr, stride_vs, local_n, keep, V1, V2, DV, MASKED)
        acc2 = tl.dot(p.to(v2.dtype), v2, acc2 * alpha[:, None], input_precision=PRECISION)
    return acc1, acc2, m_new, l


@triton.jit
def _attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, out_ptr, lse_ptr, start_ptr, stop_ptr,
    stride_qb, stride_qs, stride_qh, stride_kb, stride_ks, stride_kh, stride_vb, stride_vs, stride_vh,
    row_stride, heads, groups, queries, keys, section, qk_scale, softcap,
    D: tl.constexpr, DV: tl.constexpr, D1: tl.constexpr, D2: tl.constexpr, V1: tl.constexpr, V2: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, MASK: tl.constexpr, SOFTCAP: tl.constexpr, SAVE_LSE: tl.constexpr,
):  # fmt: skip
    stride_qb, stride_qs, stride_qh = scale_strides(stride_qb, stride_qs, stride_qh)
    stride_kb, stride_ks, stride_kh = scale_strides(stride_kb, stride_ks, stride_kh)
    stride_vb, stride_vs, stride_vh = scale_strides(stride_vb, stride_vs, stride_vh)
    # Programs run over the last query tile of `section` heads first, then the one before it: the longest rows of a causal mask
    # start first, while the keys of one section stay in L2.
    tiles_m = tl.cdiv(queries, BLOCK_M)
    pid = tl.program_id(0)
    section_id = pid // (section * tiles_m)
    inside = pid - section_id * section * tiles_m
    in_section = tl.minimum(section, tl.num_programs(0) // tiles_m - section_id * section)
    tile_m = tiles_m - 1 - inside // in_section
    bh = section_id * section + inside % in_section
    b, h = (bh // heads).to(tl.int64), (bh % heads).to(tl.int64)
    first_m = tile_m.to(tl.int64) * BLOCK_M
    local_m = tl.arange(0, BLOCK_M)
    offs_m = tile_m * BLOCK_M + local_m
    mask_m = offs_m < queries

    q_ptr += b * stride_qb + h * stride_qh + first_m * stride_qs
    k_ptr += b * stride_kb + (h // groups) * stride_kh
    v_ptr += b * stride_vb + (h // groups) * stride_vh
    q1 = load_rows(q_ptr, stride_qs, local_m, mask_m, 0, D1, D, True)
    q2 = load_rows(q_ptr, stride_qs, local_m, mask_m, D1, D2, D, True) if D2 > 0 else q1
    start, stop = row_ranges(start_ptr, stop_ptr, b * row_stride, offs_m, queries, keys, MASK)
    if MASK == RANGES:
        lo, hi, full_lo, full_hi = rows_span(start, stop, mask_m, keys)
    else:
        lo, hi, full_lo, full_hi = key_span(None, tile_m, queries, keys, MASK, BLOCK_M)
    first, last, full_first, full_last = split_loop(lo, hi, full_lo, full_hi, BLOCK_N)

    acc1 = tl.zeros([BLOCK_M, V1], tl.float32)
    acc2 = tl.zeros([BLOCK_M, V2 if V2 > 0 else 1], tl.float32)
    m = tl.full([BLOCK_M], float("-inf"), tl.float32)
    l = tl.zeros([BLOCK_M], tl.float32)
    for n in range(full_first, full_last):
        acc1, acc2, m, l = _attend_tile(
            acc1, acc2, m, l, q1, q2, start, stop, k_ptr, v_ptr, stride_ks, stride_vs, n, lo, hi, qk_scale, softcap,
            D, DV, D1, D2, V1, V2, BLOCK_N, False, SOFTCAP,
        )  # fmt: skip
    left = full_first - first
    for i in range(0, left + last - full_last):
        n = tl.where(i < left, first + i, full_last + i - left)
        acc1, acc2, m, l = _attend_tile(
            acc1, acc2, m, l, q1, q2, start, stop, k_ptr, v_ptr, stride_ks, stride_vs, n, lo, hi, qk_scale, softcap,
            D, DV, D1, D2, V1, V2, BLOCK_N, True, SOFTCAP,
        )  # fmt: skip

    inverse = 1.0 / tl.where(l == 0.0, 1.0, l)
    out_ptr += ((b * queries + first_m) * heads + h) * DV
    store_rows(out_ptr, heads * DV, acc1 * inverse[:, None], local_m, mask_m, 0, V1, DV)
    if V2 > 0:
        store_rows(out_ptr, heads * DV, acc2 * inverse[:, None], local_m, mask_m, V1, V2, DV)
    if SAVE_LSE:
        tl.store(lse_ptr + (b * heads + h) * queries + offs_m, (m + tl.log2(l)) * LN2, mask=mask_m)


HEAD_DIMS = range(8, 257, 8)


def _fwd_config(dim: int, queries: int, itemsize: int, hopper: bool) -> tuple[int, int, int, int]:
    """BLOCK_M, BLOCK_N, warps and stages for the wider of the two head dims."""
    if itemsize == 4 and not INTERPRETED:  # the interpreter has no registers, and few large tiles are faster
        # Three TF32 products hold the high and the low halves of both operands in registers.
        return (32, 32, 4, 1) if dim <= 64 else (16, 32, 4, 1) if dim <= 128 else (16, 16, 8, 1)
    if queries <= 32:
        return 16 if queries <= 16 else 32, 64, 4, 2
    if not hopper:
        # What spills no registers and fits the 99 KB of sm_86, sm_89 and sm_120.
        if dim <= 96:
            return (64, 64, 4, 2) if dim <= 64 else (64, 32, 4, 2)
        return (64, 64, 8, 2) if dim <= 128 else (64, 32, 8, 2)
    if dim > 128:
        return 128, 64, 8, 2
    # Two programs of one warpgroup share a multiprocessor and hide each other's softmax: 527 TFLOP/s at D 128, S 8192 on an
    # H200, where 128 rows with two warpgroups reach 483. In two pieces (65 to 127) 32 keys pay: 163 TFLOP/s at D 88, S 257,
    # where 64 keys reach 125. One stage is not safe in two pieces on Hopper, see docs/attention.md.
    return (64, 32, 4, 3) if 64 < dim < 128 else (64, 64, 4, 3)


def why_not_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    save_lse: bool,
) -> str | None:
    dim, value_dim = q.size(-1), v.size(-1)
    if dim not in HEAD_DIMS or value_dim not in HEAD_DIMS:
        return f"it takes head dims of 8 to 256 in steps of 8, these are {dim} and {value_dim}"
    if q.dtype == torch.float64:
        return "it has no float64"
    if q.stride(1) > MAX_ROW_STRIDE or k.stride(1) > MAX_ROW_STRIDE or v.stride(1) > MAX_ROW_STRIDE:
        return f"it takes rows of up to {MAX_ROW_STRIDE} elements apart"
    return None if scale > 0 else f"it needs a positive scale, got {scale}"


def why_not_attention_bwd(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest
) -> str | None:
    _, _, start, stop, causal, scale, softcap = rest
    return why_not_attention_fwd(q, k, v, start, stop, causal, scale, softcap, True)


@functools.lru_cache(maxsize=LAUNCHES)
def _fwd_launch(
    device: torch.device, dtype: torch.dtype, q_shape: torch.Size, v_shape: torch.Size,
    q_strides: tuple[int, ...], k_strides: tuple[int, ...], v_strides: tuple[int, ...],
    mask: int, row_stride: int, scale: float, softcap: float, save_lse: bool,
) -> Launch | None:  # fmt: skip
    """The launch, or None where rows don't begin at multiples of 16 bytes."""
    if not all(map(in_eights, (q_strides, k_strides, v_strides))):
        return None
    batch, queries, heads, dim = q_shape
    _, keys, key_heads, value_dim = v_shape
    block_m, block_n, warps, stages = _fwd_config(max(dim, value_dim), queries, dtype.itemsize, is_hopper(device))
    # Keys and values of a section fill half of a 50 MB L2. A dense mask has no long rows: there one head after the other.
    fitting = (24 << 20) // max(1, keys * (dim + value_dim) * dtype.itemsize)
    section = 1 if mask == DENSE.value else max(1, fitting) * (heads // key_heads)
    scalars = (
        *strides_in_eights(q_strides, k_strides, v_strides), row_stride,
        heads, heads // key_heads, queries, keys, section, scale * LOG2E.value, softcap,
    )  # fmt: skip
    return Launch(
        _attention_fwd_kernel, (cdiv(queries, block_m) * batch * heads,), scalars,
        D=dim, DV=value_dim, **pieces(dim, value_dim), BLOCK_M=block_m, BLOCK_N=block_n,
        MASK=mask, SOFTCAP=softcap > 0, SAVE_LSE=save_lse, num_warps=warps, num_stages=stages,
    )  # fmt: skip


def plan_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    save_lse: bool,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:
    """The plan, or None where something must be copied first."""
    q_shape, v_shape, dtype, device = q.shape, v.shape, q.dtype, q.device
    batch, queries, heads, _ = q_shape
    mask, row_stride = CAUSAL.value if causal else DENSE.value, 0
    if start is not None and stop is not None:
        if not (start.is_contiguous() and stop.is_contiguous()):
            return None
        mask, row_stride = RANGES.value, queries if start.shape[0] > 1 else 0
    launch = _fwd_launch(
        device, dtype, q_shape, v_shape, q.stride(), k.stride(), v.stride(), mask, row_stride, scale, softcap, save_lse
    )
    if launch is None:
        return None
    shape, lse_shape = (batch, queries, heads, v_shape[3]), (batch, heads, queries)
    empty, fp32 = 0 in shape, q.new_empty(0, dtype=torch.float32)  # naming a dtype costs a microsecond

    def plan(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, start: torch.Tensor | None, stop: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out = q.new_empty(*shape)
        lse = fp32.new_empty(*lse_shape) if save_lse else fp32
        if not empty:
            launch(q, k, v, out, lse if save_lse else None, start, stop)
        return out, lse

    return plan


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    save_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    if start is not None and stop is not None:
        start, stop = start.contiguous(), stop.contiguous()
    q, k, v = aligned(q), aligned(k), aligned(v)
    plan = plan_attention_fwd(q, k, v, start, stop, causal, scale, softcap, save_lse)
    assert plan is not None  # all that a plan would copy is copied
    return plan(q, k, v, start, stop)


def aot_cases() -> list[AotCase]:
    """The calls whose kernels must compile for every architecture without spills."""

    def case(
        name: str, dim: int, dtype: torch.dtype = torch.bfloat16, queries: int = 1024, allowed: tuple = (), **options
    ) -> AotCase:
        def call() -> None:
            qkv = torch.empty(2, queries, 3, 8, dim, dtype=dtype)
            q, (_, k, v) = qkv[:, :, 0], torch.empty(2, 1024, 3, 8, dim, dtype=dtype).unbind(2)
            ranges = torch.zeros(2, queries, dtype=torch.int32) if options.get("ranges") else None
            settings = (ranges, ranges, options.get("causal", False), 0.125, options.get("softcap", 0.0))
            out, lse = attention_fwd(q, k, v, *settings, True)
            if queries > 32:
                attention_bwd(out, None, q, k, v, out, lse, *settings)

        return AotCase(name, call, *allowed)

    def hopper(stack: int) -> tuple:
        return {90: stack}, "the fastest tiles measured on an H200"

    wide = {80: 256, 90: 192, 100: 256}, "three TF32 products of 256 channels need more registers at the smallest tile too"
    cases = [case("bf16 D64 causal", 64, causal=True), case("bf16 D88 causal", 88, causal=True, allowed=hopper(128))]
    two = {80: 64, 90: 256}, "sm_80: 8 bytes for 128 registers, thus two programs; sm_90: the fastest tiles measured on an H200"
    cases += [case("bf16 D128 dense", 128, allowed=two), case("bf16 D128 ranges", 128, ranges=True, allowed=hopper(256))]
    cases += [case("bf16 D256 ranges softcap", 256, ranges=True, softcap=50.0, allowed=hopper(640))]
    cases += [case("fp16 D64 one query", 64, torch.float16, queries=1), case("bf16 D64 32 queries", 64, queries=32)]
    cases += [case("fp32 D64 ranges", 64, torch.float32, ranges=True), case("fp32 D128 dense", 128, torch.float32)]
    cases += [case("fp32 D256 dense", 256, torch.float32, allowed=wide)]
    return cases

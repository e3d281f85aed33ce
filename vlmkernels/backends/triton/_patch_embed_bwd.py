# SPDX-License-Identifier: Apache-2.0
"""The sums over rows in the backward pass of the patch embedding, in one pass over the gradient.

One kernel goes through the gradient position by position: it takes the LayerNorm back, adds up each position over the images (the
position table's gradient, and the prefix tokens') and adds up all rows (the gradients of bias, norm weight and norm bias). Each
program writes its shares in fp32, and a second kernel adds them in a fixed order: no atomics. docs/patch_embed.md has the rest.
"""

import functools
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.backends.triton import cdiv, next_power_of_2
from vlmkernels.backends.triton._launch import LAUNCHES, Launch


@triton.jit
def norm_gradients(grad, x, weight, mask_d, eps, D: tl.constexpr):
    """Of rows that a LayerNorm made from ``x``: the gradient of ``x``, and ``x`` as it was before the norm's weight and bias."""
    d_unit = grad * weight[None, :]
    sum_x, sum_d = tl.sum(x, 1), tl.sum(d_unit, 1)
    centred = tl.where(mask_d[None, :], x - (sum_x / D)[:, None], 0.0)
    squares, products = tl.sum(centred * centred, 1), tl.sum(d_unit * centred, 1)
    rstd = 1.0 / tl.sqrt(squares / D + eps)
    unit = centred * rstd[:, None]
    return (d_unit - (sum_d / D)[:, None] - unit * (products * rstd / D)[:, None]) * rstd[:, None], unit


@triton.jit
def _patch_embed_rows_bwd_kernel(
    grad_ptr, total_ptr, weight_ptr, d_rows_ptr, table_ptr, sums_ptr,
    batch, n_tokens, n_prefix, positions, shares, share, skipped, eps,
    D: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Gradients of the rows before the norm, their sums over images, and three sums over rows, for a block of columns.

    Without ``total`` there is no norm: the gradient passes through, and of the three sums only that for the bias is left. A piece
    of work is one position in a share of the images.
    """
    pid = tl.program_id(0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    d_bias = tl.zeros([BLOCK_D], tl.float32)
    d_norm_weight = tl.zeros([BLOCK_D], tl.float32)
    d_norm_bias = tl.zeros([BLOCK_D], tl.float32)
    if total_ptr is not None:
        weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    for piece in range(pid, positions * shares, tl.num_programs(0)):
        # Programs that run side by side read neighbouring positions: one run of memory.
        i = piece % positions
        first_b = piece // positions * share
        last_b = tl.minimum(first_b + share, batch)
        last_out = tl.where(i < skipped, 0, last_b)
        d_position = tl.zeros([BLOCK_D], tl.float32)
        for b in tl.range(first_b, last_b, BLOCK_B, num_stages=STAGES):
            offs_b = b + tl.arange(0, BLOCK_B)
            mask = (offs_b < last_b)[:, None] & mask_d[None, :]
            offs = (offs_b.to(tl.int64) * n_tokens + i)[:, None] * D + offs_d[None, :]
            grad = tl.load(grad_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            if total_ptr is not None:
                x = tl.load(total_ptr + offs, mask=mask, other=0.0).to(tl.float32)
                d_x, unit = norm_gradients(grad, x, weight, mask_d, eps, D)
                d_norm_weight += tl.sum(grad * unit, 0)
                d_norm_bias += tl.sum(grad, 0)
                grad = d_x
                if d_rows_ptr is not None:
                    out = (offs_b.to(tl.int64) * (n_tokens - skipped) + i - skipped)[:, None] * D + offs_d[None, :]
                    mask = (offs_b < last_out)[:, None] & mask_d[None, :]
                    tl.store(d_rows_ptr + out, grad.to(d_rows_ptr.dtype.element_ty), mask=mask)
            d_position += tl.sum(grad, 0)
        if table_ptr is not None:
            row = (piece // positions).to(tl.int64) * positions + i
            tl.store(table_ptr + row * D + offs_d, d_position, mask=mask_d)
        if i >= n_prefix:
            d_bias += d_position
    if sums_ptr is not None:
        kinds: tl.constexpr = 1 if total_ptr is None else 3
        sums_ptr += pid.to(tl.int64) * (kinds * D) + offs_d
        tl.store(sums_ptr, d_bias, mask=mask_d)
        if total_ptr is not None:
            tl.store(sums_ptr + D, d_norm_weight, mask=mask_d)
            tl.store(sums_ptr + 2 * D, d_norm_bias, mask=mask_d)


@triton.jit
def _add_rows(ptr, rows, stride, offs, mask, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr):
    total = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    for first in range(0, rows, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        addresses = ptr + r.to(tl.int64)[:, None] * stride + offs[None, :]
        total += tl.load(addresses, mask=(r < rows)[:, None] & mask[None, :], other=0.0)
    return tl.sum(total, 0)


@triton.jit
def _store_sum(ptr, offs, total, mask):
    if ptr is not None:
        tl.store(ptr + offs, total.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _patch_embed_sums_bwd_kernel(
    table_ptr, sums_ptr, d_prefix_ptr, d_pos_ptr, d_bias_ptr, d_norm_weight_ptr, d_norm_bias_ptr,
    shares, programs, positions, n_prefix, first_pos,
    D: tl.constexpr, KINDS: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_P: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """Adds up the shares of the sums over rows, a program for each block of each vector, then those of the table."""
    blocks_v: tl.constexpr = (D + BLOCK_V - 1) // BLOCK_V
    blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    pid = tl.program_id(0)
    if sums_ptr is not None and pid < KINDS * blocks_v:
        offs_v = pid % blocks_v * BLOCK_V + tl.arange(0, BLOCK_V)
        mask_v = offs_v < D
        kind = pid // blocks_v
        vector = _add_rows(sums_ptr + kind * D, programs, KINDS * D, offs_v, mask_v, BLOCK_P, BLOCK_V)
        if kind == 0:
            _store_sum(d_bias_ptr, offs_v, vector, mask_v)
        elif kind == 1:
            _store_sum(d_norm_weight_ptr, offs_v, vector, mask_v)
        else:
            _store_sum(d_norm_bias_ptr, offs_v, vector, mask_v)
    if table_ptr is not None and pid >= KINDS * blocks_v:
        block = pid - KINDS * blocks_v
        i = block // blocks_d
        first = i.to(tl.int64) * D
        offs_d = block % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        row = _add_rows(table_ptr + first, shares, positions * D, offs_d, mask_d, BLOCK_S, BLOCK_D)
        if i < n_prefix:
            _store_sum(d_prefix_ptr, first + offs_d, row, mask_d)
        if i >= first_pos:
            _store_sum(d_pos_ptr, first - first_pos * D + offs_d, row, mask_d)


@triton.jit
def _patch_embed_weight_bwd_kernel(
    grad_ptr, a_ptr, table_ptr, d_weight_ptr,
    rows, n_tokens, n_prefix, positions, shares, stride_am, stride_wd,
    D: tl.constexpr, K: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """The weight's gradient again without the prefix rows, where one of them isn't finite: its zeros in ``a`` gave NaN."""
    offs_d = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    finite = tl.full([BLOCK_R, BLOCK_D], 1, tl.int32)
    for first in range(0, shares * n_prefix, BLOCK_R):
        r = first + tl.arange(0, BLOCK_R)
        row = (r // n_prefix).to(tl.int64) * positions + r % n_prefix
        mask = (r < shares * n_prefix)[:, None] & mask_d[None, :]
        table = tl.load(table_ptr + row[:, None] * D + offs_d[None, :], mask=mask, other=0.0)
        finite &= (tl.abs(table) < float("inf")).to(tl.int32)
    if tl.min(tl.min(finite, 1), 0) == 0:
        offs_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
        mask_k = offs_k < K
        acc = tl.zeros([BLOCK_D, BLOCK_K], tl.float32)
        for first in range(0, rows, BLOCK_M):
            offs_m = first + tl.arange(0, BLOCK_M)
            mask_m = (offs_m < rows) & (offs_m % n_tokens >= n_prefix)
            m = offs_m.to(tl.int64)[:, None]
            grad = tl.load(grad_ptr + m * D + offs_d[None, :], mask=mask_m[:, None] & mask_d[None, :], other=0.0)
            a = tl.load(a_ptr + m * stride_am + offs_k[None, :], mask=mask_m[:, None] & mask_k[None, :], other=0.0)
            acc = tl.dot(grad.T, a, acc, input_precision="ieee")
        out = d_weight_ptr + offs_d.to(tl.int64)[:, None] * stride_wd + offs_k[None, :]
        tl.store(out, acc.to(d_weight_ptr.dtype.element_ty), mask=mask_d[:, None] & mask_k[None, :])


class RowsConfig(NamedTuple):
    """Images and columns of a tile, pipeline stages and warps of the kernel over rows, and its programs for a multiprocessor."""

    block_b: int
    block_d: int
    stages: int
    warps: int
    programs: int


def _rows_config(dim: int, norm: bool, itemsize: int) -> RowsConfig:
    """Tiles of which each thread has the same columns in every row: what is summed over images stays in its registers.

    With a norm 2.8 of 3.06 TB/s (CLIP-L at batch 128, H100); without the pipeline 2.6.
    """
    if not norm:
        return RowsConfig(16, min(next_power_of_2(dim), 256), 1, 1, 12)
    block_d = next_power_of_2(dim)
    warps = min(max(block_d // 256, 1), 16)
    if itemsize == 2 and block_d <= 1024:
        return RowsConfig(4, block_d, 2, warps, min(3 * 1024 // block_d, 12))
    return RowsConfig(2 if block_d <= 4096 else 1, block_d, 3, warps, max(1, min(4096 // block_d, 12)))


def _shares(batch: int, positions: int, programs: int, block_b: int, table_cost: float) -> tuple[int, int]:
    """How many shares the images come in, and how many images a share has.

    More shares keep the programs equally busy, but each takes a table of its own, and a row of it costs ``table_cost`` of those
    that are read.
    """
    tiles = max(1, cdiv(batch, block_b))

    def rows(share: int) -> float:
        shares = max(1, cdiv(batch, share))
        return cdiv(positions * shares, programs) * programs * share + table_cost * positions * shares

    share = min((cdiv(tiles, n) * block_b for n in range(1, min(tiles, 64) + 1)), key=rows)
    return max(1, cdiv(batch, share)), share


class _Rows(NamedTuple):
    """The launch of the kernel over rows, its shares and the programs that each leave a share of the three sums."""

    launch: Launch
    shares: int
    programs: int


@functools.lru_cache(maxsize=LAUNCHES)
def _rows_launch(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, n_prefix: int, positions: int, skipped: int, eps: float,
    norm: bool, wanted: tuple[bool, bool, bool], multiprocessors: int,
) -> _Rows:  # fmt: skip
    batch, n_tokens, dim = shape
    config = _rows_config(dim, norm, dtype.itemsize)
    blocks_d = cdiv(dim, config.block_d)
    programs = max(1, min(cdiv(multiprocessors * config.programs, blocks_d), positions * cdiv(batch, config.block_b)))
    table_cost = 0.0 if not wanted[1] else 8 / (dtype.itemsize * (3 if norm else 1))
    shares, share = _shares(batch, positions, programs, config.block_b, table_cost)
    launch = Launch(
        _patch_embed_rows_bwd_kernel, (programs, blocks_d),
        (batch, n_tokens, n_prefix, positions, shares, share, skipped, eps),
        D=dim, BLOCK_B=config.block_b, BLOCK_D=config.block_d, STAGES=config.stages, num_warps=config.warps,
    )  # fmt: skip
    return _Rows(launch, shares, programs)


class RowGradients(NamedTuple):
    """What one pass over the gradient gives; None for what was not asked for."""

    d_rows: Tensor | None  # [B, n, D]: of the rows before the norm
    table: Tensor | None  # [shares, positions, D] in fp32: d_rows summed over the images of each share
    sums: Tensor | None  # [programs, 1 or 3, D] in fp32: shares of the gradients of bias, norm weight and norm bias


def row_gradients(
    grad: Tensor,
    total: Tensor,
    norm_weight: Tensor | None,
    eps: float,
    n_prefix: int,
    positions: int,
    skipped: int,
    wanted: tuple[bool, bool, bool],
    multiprocessors: int,
) -> RowGradients:
    """Go through the first ``positions`` rows of each image in a contiguous gradient ``[B, n, D]``.

    Args:
        n_prefix: the rows of each image to which no bias was added.
        skipped: the first rows of each image that ``d_rows`` leaves out.
        wanted: which of the results; ``d_rows`` only with a norm, without one it is ``grad``.
    """
    batch, n_tokens, dim = grad.shape
    norm = norm_weight is not None
    launch, shares, programs = _rows_launch(
        grad.device, grad.dtype, grad.shape, n_prefix, positions, skipped, eps, norm, wanted, multiprocessors
    )
    fp32 = {"dtype": torch.float32, "device": grad.device}
    d_rows = grad.new_empty(batch, n_tokens - skipped, dim) if wanted[0] else None
    table = torch.empty((shares, positions, dim), **fp32) if wanted[1] else None
    sums = torch.empty((programs, 3 if norm else 1, dim), **fp32) if wanted[2] else None
    launch(grad, total if norm else None, None if norm_weight is None else norm_weight.contiguous(), d_rows, table, sums)
    return RowGradients(d_rows, table, sums)


@functools.lru_cache(maxsize=LAUNCHES)
def sums_launch(
    device: torch.device, dtype: torch.dtype, table: torch.Size | None, sums: torch.Size | None, n_prefix: int, first_pos: int,
    wanted: tuple[bool, ...],
) -> Launch:  # fmt: skip
    shares, positions, dim = table or (0, 0, 0)
    programs, kinds, dim = sums or (0, 0, dim)
    block_d, block_v = 256, 32
    return Launch(
        _patch_embed_sums_bwd_kernel, (kinds * cdiv(dim, block_v) + positions * cdiv(dim, block_d),),
        (shares, programs, positions, n_prefix, first_pos),
        D=dim, KINDS=kinds, BLOCK_S=min(next_power_of_2(shares), 16), BLOCK_D=block_d, BLOCK_P=128, BLOCK_V=block_v,
    )  # fmt: skip


def add_shares(
    rows: RowGradients, dtype: torch.dtype, n_prefix: int, first_pos: int, wanted: tuple[bool, ...]
) -> list[Tensor | None]:
    """Those ``wanted`` of the gradients of prefix tokens, positions from ``first_pos`` on, bias, norm weight and norm bias."""
    table, sums = rows.table, rows.sums
    some = sums if table is None else table
    if some is None or not any(wanted):
        return [None] * len(wanted)
    dim, device = some.shape[-1], some.device
    n_pos = 0 if table is None else table.shape[1] - first_pos
    shapes = ((n_prefix, dim), (n_pos, dim), (dim,), (dim,), (dim,))
    outs = [torch.empty(shape, dtype=dtype, device=device) if want else None for shape, want in zip(shapes, wanted, strict=True)]
    launch = sums_launch(
        device, dtype, None if table is None else table.shape, None if sums is None else sums.shape, n_prefix, first_pos, wanted
    )
    launch(table, sums, *outs)
    return outs


@functools.lru_cache(maxsize=LAUNCHES)
def _weight_launch(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, k: int, stride_a: int, n_prefix: int, table: torch.Size
) -> Launch:
    batch, n_tokens, dim = shape
    shares, positions, _ = table
    block_m, block = 32, 64
    return Launch(
        _patch_embed_weight_bwd_kernel, (cdiv(dim, block), cdiv(k, block)),
        (batch * n_tokens, n_tokens, n_prefix, positions, shares, stride_a, k),
        D=dim, K=k, BLOCK_R=min(next_power_of_2(shares * n_prefix), 16), BLOCK_M=block_m, BLOCK_D=block, BLOCK_K=block,
    )  # fmt: skip


def leave_out_prefix(d_weight: Tensor, d_rows: Tensor, a: Tensor, table: Tensor, n_prefix: int) -> None:
    """Mend the product ``[D, K]`` of all rows ``[B, n, D]`` with ``a``, which has rows of zeros for those of prefix tokens.

    Such rows give 0, but NaN where their gradient is infinite or NaN. The columns of ``d_rows`` with one are multiplied again.
    """
    launch = _weight_launch(a.device, a.dtype, d_rows.shape, a.shape[1], a.stride(0), n_prefix, table.shape)
    launch(d_rows, a, table, d_weight)

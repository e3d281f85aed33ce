# SPDX-License-Identifier: Apache-2.0
"""Pixels, or a weight, as a matrix in memory: rows that TMA can read, written by one kernel where they don't lie like that."""

import functools
import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.backends.triton import cdiv, multiprocessors, next_power_of_2
from vlmkernels.backends.triton._launch import LAUNCHES, Launch

CHANNELS_FIRST, CHANNELS_LAST = (4, 5, 6, 7), (5, 6, 7, 4)


@triton.jit(do_not_specialize=["stride_am"])
def _patch_embed_cut_kernel(
    x_ptr, a_ptr, stride_am,
    rows_1, rows_2, rows_3, run,
    stride_r0, stride_r1, stride_r2, stride_r3,
    stride_k0, stride_k1, stride_k2, stride_k3,
    K1: tl.constexpr, K2: tl.constexpr, K3: tl.constexpr, K: tl.constexpr, K_PADDED: tl.constexpr,
    SCALE: tl.constexpr, SHIFT: tl.constexpr, CHANNELS: tl.constexpr, CHANNEL_RUN: tl.constexpr,
    VEC: tl.constexpr, WIDE: tl.constexpr, GAP: tl.constexpr, BLOCK_G: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Rows and columns of the matrix are four dimensions of the pixels each; all strides but stride_k3 count groups of VEC.

    A program cuts the same rows and columns from ``run`` strips of patches, as finding its place takes more instructions than to
    cut one. In front of the patches of each image (which is r0 then) it leaves GAP rows of zeros.

    Triton doesn't learn that stride_am is a multiple of 16: it would give each thread 16 bytes to store, and with them loads
    that lie that far apart in neighbouring threads.
    """
    blocks_k: tl.constexpr = (K_PADDED + BLOCK_K - 1) // BLOCK_K
    pid = tl.program_id(0)
    offs_k = (pid % blocks_k) * BLOCK_K + tl.arange(0, BLOCK_K)
    pid = pid // blocks_k
    blocks_r = tl.cdiv(rows_3, BLOCK_R)
    block_r = pid % blocks_r
    offs_r = block_r * BLOCK_R + tl.arange(0, BLOCK_R)
    pid = pid // blocks_r
    runs = tl.cdiv(rows_2, run)
    first = pid % runs * run
    pid = pid // runs
    r1 = pid % rows_1
    r0 = pid // rows_1
    mask_k = offs_k < K
    mask_out = (offs_r < rows_3)[:, None] & (offs_k < K_PADDED)[None, :]
    mask = mask_out & mask_k[None, :]

    k2 = (offs_k // K3 % K2).to(tl.int64)
    k1 = (offs_k // (K3 * K2) % K1).to(tl.int64)
    k0 = (offs_k // (K3 * K2 * K1)).to(tl.int64)
    columns = (k0 * stride_k0 + k1 * stride_k1 + k2 * stride_k2) * VEC + (offs_k % K3).to(tl.int64) * stride_k3
    offs_x = (offs_r.to(tl.int64) * stride_r3 * VEC)[:, None] + columns[None, :]
    offs_a = (offs_r.to(tl.int64) * stride_am * VEC)[:, None] + offs_k[None, :]
    if not WIDE:
        offs_x = offs_x.to(tl.int32)
        offs_a = offs_a.to(tl.int32)
    x_ptr += (r0.to(tl.int64) * stride_r0 + r1.to(tl.int64) * stride_r1) * VEC
    a_ptr += (pid.to(tl.int64) * rows_2 * rows_3 + (r0 + 1) * GAP) * stride_am * VEC
    if GAP > 0 and r1 + first + block_r == 0:
        offs_g = tl.arange(0, BLOCK_G)
        zeros = a_ptr + ((offs_g - GAP).to(tl.int64) * stride_am * VEC)[:, None] + offs_k[None, :]
        mask_g = (offs_g < GAP)[:, None] & (offs_k < K_PADDED)[None, :]
        tl.store(zeros, tl.zeros([BLOCK_G, BLOCK_K], a_ptr.dtype.element_ty), mask=mask_g)
    if SCALE is not None:
        # Both are 0 behind the last column: x is 0 there, and so is what is stored.
        channel = offs_k // CHANNEL_RUN % CHANNELS
        scale = tl.zeros([BLOCK_K], tl.float32)
        shift = tl.zeros([BLOCK_K], tl.float32)
        for c in tl.static_range(CHANNELS):
            scale = tl.where((channel == c) & mask_k, SCALE[c], scale)
            shift = tl.where((channel == c) & mask_k, SHIFT[c], shift)
    for r2 in range(first, tl.minimum(first + run, rows_2)):
        strip = tl.cast(r2, tl.int64)
        x = tl.load(x_ptr + strip * stride_r2 * VEC + offs_x, mask=mask, other=0)
        if SCALE is not None:
            x = x.to(tl.float32) * scale[None, :] + shift[None, :]
        tl.store(a_ptr + strip * rows_3 * stride_am * VEC + offs_a, x.to(a_ptr.dtype.element_ty), mask=mask_out)


def collapse(sizes: list[int], strides: list[int]) -> tuple[list[int], list[int]]:
    """The same four dimensions in as few as they need, at the end of four: neighbours that are one run of memory become one."""
    merged: list[tuple[int, int]] = []
    for size, stride in zip(sizes, strides, strict=True):
        if size == 1:
            continue
        if merged and merged[-1][1] == stride * size:
            merged[-1] = (merged[-1][0] * size, stride)
        else:
            merged.append((size, stride))
    merged = [(1, 0)] * (4 - len(merged)) + merged
    return [size for size, _ in merged], [stride for _, stride in merged]


def columns_of(patches: Tensor) -> tuple[int, ...]:
    """The order of the matrix's columns: that of the pixels' memory, channels first or last."""
    return CHANNELS_LAST if patches.shape[4] > 1 and patches.stride(4) < patches.stride(7) else CHANNELS_FIRST


class Cut(NamedTuple):
    """A matrix in memory: ``m`` rows of ``k`` columns, ``stride`` apart; and the launch that writes it, None for a view."""

    m: int
    k: int  # with the columns of zeros where it is written
    stride: int
    launch: Launch | None


def _cut_tile(rows: int, k_padded: int, vec: int) -> tuple[int, int, int]:
    """Rows and columns that a program cuts at once, and its warps."""
    block_k = min(next_power_of_2(k_padded), 256 if vec >= 4 else 64)
    block_r = min(next_power_of_2(rows), 4096 // block_k)
    return block_r, block_k, max(1, min(4, block_r * block_k // 512))


@functools.lru_cache(maxsize=LAUNCHES)
def _cut(
    device: torch.device, dtype: torch.dtype, out_dtype: torch.dtype, shape: tuple[int, ...], strides: tuple[int, ...],
    columns: tuple[int, ...], address: int, mean: tuple[float, ...] | None, std: tuple[float, ...] | None, gap: int,
) -> Cut:  # fmt: skip
    """How patches ``[B, Gt, Gy, Gx, C, Pt, Py, Px]``, or the weight ``[D, C, Pt, Py, Px]``, become a matrix.

    ``address``: of the first pixel, modulo 64 bytes. ``gap``: the rows of zeros in front of each image's.
    """
    if len(shape) == 5:
        shape, strides = (1, 1, 1, *shape), (0, 0, 0, *strides)
    row_sizes, row_strides = collapse(list(shape[:4]), list(strides[:4]))
    if gap:  # images stay apart
        row_sizes, row_strides = collapse(list(shape[1:4]), list(strides[1:4]))
        row_sizes[0], row_strides[0] = shape[0], strides[0]
    col_sizes, col_strides = collapse([shape[d] for d in columns], [strides[d] for d in columns])
    m, k = math.prod(row_sizes) + shape[0] * gap, math.prod(col_sizes)
    one_run = col_sizes[3] == k and (col_strides[3] == 1 or k == 1)
    one_matrix = not gap and dtype == out_dtype and one_run and k % 8 == 0 and row_sizes[3] == m and row_strides[3] >= k
    if one_matrix and row_strides[3] * dtype.itemsize % 16 == 0 and address % 16 == 0:
        return Cut(m, k, row_strides[3], None)
    k_padded = cdiv(k, 8) * 8
    vec = 16 // out_dtype.itemsize if col_strides[3] == 1 else 1
    vec = math.gcd(vec, col_sizes[3], *row_strides, *col_strides[:3], address // dtype.itemsize)
    block_r, block_k, warps = _cut_tile(row_sizes[3], k_padded, vec)
    blocks = cdiv(row_sizes[3], block_r) * cdiv(k_padded, block_k)
    # As many strips for a program as leave enough programs, and about the same number for each.
    strips = max(1, row_sizes[2])
    runs = min(strips, cdiv(32 * multiprocessors(device), max(1, row_sizes[0] * row_sizes[1] * blocks)))
    run = cdiv(strips, runs)
    stride = cdiv(k, 64) * 64
    spans = zip((row_sizes[3], *col_sizes), (row_strides[3], *col_strides), strict=True)
    reach = max(row_sizes[3] * stride, sum((size - 1) * abs(step) for size, step in spans))
    scalars = (
        stride // vec, *row_sizes[1:], run,
        *(s // vec for s in row_strides), *(s // vec for s in col_strides[:3]), col_strides[3],
    )  # fmt: skip
    scale = shift = None
    if mean is not None and std is not None:
        scale, shift = tuple(1 / (255 * s) for s in std), tuple(-m / s for m, s in zip(mean, std, strict=True))
    launch = Launch(
        _patch_embed_cut_kernel, (row_sizes[0] * row_sizes[1] * cdiv(row_sizes[2], run) * blocks,), scalars,
        K1=col_sizes[1], K2=col_sizes[2], K3=col_sizes[3], K=k, K_PADDED=k_padded, SCALE=scale, SHIFT=shift, CHANNELS=shape[4],
        CHANNEL_RUN=1 if columns == CHANNELS_LAST else shape[5] * shape[6] * shape[7], VEC=vec,
        WIDE=reach >= 2**31, GAP=gap, BLOCK_G=next_power_of_2(gap), BLOCK_R=block_r, BLOCK_K=block_k, num_warps=warps,
    )  # fmt: skip
    return Cut(m, k_padded, stride, launch)


def cut_of(
    x: Tensor, columns: tuple[int, ...], dtype: torch.dtype, mean: list[float] | None = None, std: list[float] | None = None,
    gap: int = 0,
) -> Cut:  # fmt: skip
    """How patches or the weight become a matrix of ``dtype``, with ``gap`` rows of zeros in front of each image's."""
    affine = (None, None) if mean is None or std is None else (tuple(mean), tuple(std))
    return _cut(x.device, x.dtype, dtype, x.shape, x.stride(), columns, x.data_ptr() & 63, *affine, gap)


def written(x: Tensor, cut: Cut, like: Tensor) -> Tensor:
    """The matrix of ``x`` in memory: in ``x`` if ``cut`` finds one there, else in a new tensor of the dtype of ``like``.

    Its rows start at multiples of 16 bytes. Where it is written, K is rounded up to a multiple of 8 by columns of zeros.
    """
    if cut.launch is None:
        return x
    a = like.new_empty(cut.m, cut.stride)
    if cut.m:
        cut.launch(x, a)
    return a


def matrix_of(
    x: Tensor, columns: tuple[int, ...], dtype: torch.dtype, mean: list[float] | None = None, std: list[float] | None = None,
    gap: int = 0,
) -> Tensor:  # fmt: skip
    """The matrix of ``x`` as a tensor ``[M, K]``."""
    cut = cut_of(x, columns, dtype, mean, std, gap)
    return written(x, cut, torch.empty(0, dtype=dtype, device=x.device)).as_strided((cut.m, cut.k), (cut.stride, 1))

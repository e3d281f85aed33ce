# SPDX-License-Identifier: Apache-2.0
"""``pos_embed`` in Triton: rows gather cells of the table, and for the gradient cells gather rows, so nothing is atomic.

All coordinates are integers. Along an axis of ``size`` cells, cell ``j`` lies at ``a j`` and the patch ``i`` at ``c i - b``, in
units that make ``a``, ``b``, ``c`` and the half-width ``s`` of the tent integers. The cells of a patch, the patches of a cell and
the sum of a patch's weights then have closed forms, and no width is bounded by a constant.
"""

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.backends.triton import cdiv, next_power_of_2
from vlmkernels.backends.triton._aot import AotCase

_BLOCK_R = 16
_LANES = 16
_WARPS = 4
#: Forward programs below which the channels of a row are dealt out to several.
_PROGRAMS = 1024
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _axis(count, SIZE, ALIGN: tl.constexpr, ANTIALIAS: tl.constexpr):
    """``a``, ``b``, ``c`` and ``s`` for ``count`` patches."""
    if ALIGN:
        a = tl.maximum(count - 1, 1)
        b = count * 0
        c = count * 0 + (SIZE - 1)
        s = a
    else:
        a = 2 * count
        b = count - SIZE
        c = count * 0 + 2 * SIZE
        s = 2 * tl.maximum(count, SIZE) if ANTIALIAS else a
    return a, b, c, s


@triton.jit
def _taps(place, count, SIZE, ALIGN: tl.constexpr, ANTIALIAS: tl.constexpr):
    """First cell of a patch, number of cells, the patch's distance from the first cell, ``a``, ``s``, and the sum of the tent.

    The tent at cell ``k`` from the first is ``s - |a k - rest|``.
    """
    a, b, c, s = _axis(count, SIZE, ALIGN, ANTIALIAS)
    centre = c * place - b
    # Division rounds towards zero, so what is negative is decided before it.
    first = tl.where(centre < s, 0, (centre - s) // a + 1)
    cells = tl.minimum((centre + s - 1) // a, SIZE - 1) - first + 1
    rest = centre - a * first
    left = tl.where(rest < 0, 0, tl.minimum(rest // a + 1, cells))
    right = cells - left
    sides = left * (left - 1) // 2
    apart = left * rest - a * sides + a * (cells * (cells - 1) // 2 - sides) - right * rest
    return first, cells, rest, a, s, (cells * s - apart).to(tl.float32)


@triton.jit
def _tent(k, cells, rest, a, s, total):
    """The weight of cell ``k`` from the first; 0 outside."""
    height = tl.maximum(s - tl.abs(a * k - rest), 0)
    return tl.where((k >= 0) & (k < cells), height.to(tl.float32) / total, 0.0)


@triton.jit
def _load_grid(grids_ptr, offs_b, stride_gb, stride_gc, mask, N, FRAMES: tl.constexpr, INT: tl.constexpr):
    """Frames, rows and columns of images, 0 outside ``mask``. More than ``N`` of anything has no rows, so nothing overflows."""
    ptrs = grids_ptr + offs_b.to(tl.int64) * stride_gb
    if FRAMES:
        t = tl.load(ptrs, mask=mask, other=0).to(INT)
        ptrs += stride_gc
    else:
        t = mask.to(INT)
    h = tl.load(ptrs, mask=mask, other=0).to(INT)
    w = tl.load(ptrs + stride_gc, mask=mask, other=0).to(INT)
    t = tl.minimum(tl.maximum(t, 0), N)
    h = tl.minimum(tl.maximum(h, 0), N)
    w = tl.minimum(tl.maximum(w, 0), N)
    return t, h, w


@triton.jit
def _locate(
    grids_ptr, rows, stride_gb, stride_gc, B, N,
    FRAMES: tl.constexpr, INT: tl.constexpr, IMAGES: tl.constexpr,
):  # fmt: skip
    """The image of packed rows (``B`` behind the last one) and its first row, by counting the images that end before."""
    image = rows * 0
    start = rows * 0
    carry = tl.sum(rows, 0) * 0
    for offset in range(0, B, IMAGES):
        offs_b = offset + tl.arange(0, IMAGES)
        t, h, w = _load_grid(grids_ptr, offs_b, stride_gb, stride_gc, offs_b < B, N, FRAMES, INT)
        count = t * h * w
        ends = carry + tl.cumsum(count, 0)
        before = (ends[None, :] <= rows[:, None]) & (offs_b < B)[None, :]
        image += tl.sum(before.to(INT), 1)
        start = tl.maximum(start, tl.max(tl.where(before, ends[None, :], 0), 1))
        carry += tl.sum(count, 0)
    return image, start


@triton.jit
def _weighted(table_ptr, weight, met, row, column, offs_d, stride_th, stride_tw, stride_td, D):
    """A cell of the table for each patch, times its weight; not read where it is not ``met``."""
    cells = table_ptr + row.to(tl.int64) * stride_th + column.to(tl.int64) * stride_tw
    mask = met[:, None] & (offs_d < D)[None, :]
    value = tl.load(cells[:, None] + offs_d.to(tl.int64)[None, :] * stride_td, mask=mask, other=0.0)
    return weight[:, None] * value.to(tl.float32)


@triton.jit
def _pos_embed_fwd_kernel(
    table_ptr, grids_ptr, out_ptr, stride_th, stride_tw, stride_td, stride_gb, stride_gc,
    B, N, H, W, D, blocks,
    MERGE: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr, ALIGN: tl.constexpr, ANTIALIAS: tl.constexpr,
    FRAMES: tl.constexpr, INT: tl.constexpr, IMAGES: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """A block of rows, and of its channels every ``num_programs(1)``-th block."""
    pid = tl.program_id(0)
    rows = (pid % blocks).to(INT) * BLOCK_R + tl.arange(0, BLOCK_R)
    if PADDED:
        image = rows * 0 + (pid // blocks).to(INT)
        start = rows * 0
    else:
        image, start = _locate(grids_ptr, rows, stride_gb, stride_gc, B, N, FRAMES, INT, IMAGES)
    t, h, w = _load_grid(grids_ptr, image, stride_gb, stride_gc, image < B, N, FRAMES, INT)
    local = rows - start
    count = t * h * w
    filled = (image < B) & (local < count)
    if FIRST:
        local = tl.where(filled, local, 0)
        filled = count > 0
    h = tl.maximum(h, 1)
    w = tl.maximum(w, 1)
    local = local % (h * w)
    band = local // (MERGE * w)
    local = local % (MERGE * w)
    y = tl.minimum(band * MERGE + local % (MERGE * MERGE) // MERGE, h - 1)
    x = tl.minimum(local // (MERGE * MERGE) * MERGE + local % MERGE, w - 1)
    first_y, cells_y, rest_y, a_y, s_y, total_y = _taps(y, h, H, ALIGN, ANTIALIAS)
    first_x, cells_x, rest_x, a_x, s_x, total_x = _taps(x, w, W, ALIGN, ANTIALIAS)
    if ANTIALIAS:
        taps_y = tl.max(tl.where(filled, cells_y, 0), 0)
        taps_x = tl.max(tl.where(filled, cells_x, 0), 0)
    else:
        taps_y: tl.constexpr = 2
        taps_x: tl.constexpr = 2
    out_rows = out_ptr + ((pid // blocks).to(tl.int64) * N + rows) * D
    for block in range(tl.program_id(1), tl.cdiv(D, BLOCK_D), tl.num_programs(1)):
        offs_d = block * BLOCK_D + tl.arange(0, BLOCK_D)
        acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
        # Each row of cells is summed by itself: 600 cells in one sum were 8.8 floors off in fp32 (H100).
        if ANTIALIAS:
            for k_y in range(0, taps_y):
                w_y = tl.where(filled, _tent(k_y, cells_y, rest_y, a_y, s_y, total_y), 0.0)
                row = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
                for k_x in range(0, taps_x):
                    w_x, x_k = _tent(k_x, cells_x, rest_x, a_x, s_x, total_x), first_x + k_x
                    met = (w_y > 0) & (w_x > 0)
                    row += _weighted(table_ptr, w_x, met, first_y + k_y, x_k, offs_d, stride_th, stride_tw, stride_td, D)
                acc += w_y[:, None] * row
        else:
            for k_y in tl.static_range(taps_y):
                w_y = tl.where(filled, _tent(k_y, cells_y, rest_y, a_y, s_y, total_y), 0.0)
                row = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
                for k_x in tl.static_range(taps_x):
                    w_x, x_k = _tent(k_x, cells_x, rest_x, a_x, s_x, total_x), first_x + k_x
                    met = (w_y > 0) & (w_x > 0)
                    row += _weighted(table_ptr, w_x, met, first_y + k_y, x_k, offs_d, stride_th, stride_tw, stride_td, D)
                acc += w_y[:, None] * row
        mask = (rows < N)[:, None] & (offs_d < D)[None, :]
        tl.store(out_rows[:, None] + offs_d[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _pos_embed_fold_kernel(
    grad_ptr, grids_ptr, fold_ptr, stride_b, stride_n, stride_d, stride_gb, stride_gc, N, D,
    FRAMES: tl.constexpr, INT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """``fold[b]``: the gradient of an image's row 0 and of all the rows behind its last patch, which repeat row 0."""
    image = tl.program_id(0)
    lanes = tl.zeros([1], INT) + image
    t, h, w = _load_grid(grids_ptr, lanes, stride_gb, stride_gc, lanes >= 0, N, FRAMES, INT)
    count = tl.sum(t * h * w, 0)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    columns = grad_ptr + image.to(tl.int64) * stride_b + offs_d.to(tl.int64)[None, :] * stride_d
    lane = tl.arange(0, BLOCK_R)
    mask = (lane == 0)[:, None] & (offs_d < D)[None, :]
    acc = tl.load(columns + lane.to(tl.int64)[:, None] * stride_n, mask=mask, other=0.0).to(tl.float32)
    for first in range(count, N, BLOCK_R):
        rows = first + lane
        mask = (rows < N)[:, None] & (offs_d < D)[None, :]
        acc += tl.load(columns + rows.to(tl.int64)[:, None] * stride_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(fold_ptr + image.to(tl.int64) * D + offs_d, tl.sum(acc, 0), mask=offs_d < D)


@triton.jit
def _reach(cell, count, SIZE, ALIGN: tl.constexpr, ANTIALIAS: tl.constexpr):
    """First patch whose tent reaches a cell, and how many do, along one axis."""
    a, b, c, s = _axis(count, SIZE, ALIGN, ANTIALIAS)
    place = a * cell + b
    step = tl.maximum(c, 1)
    first = tl.where(place < s, 0, (place - s) // step + 1)
    last = tl.where(place + s < 1, -1, (place + s - 1) // step)
    # One cell with aligned corners is under every patch.
    first = tl.where(c == 0, 0, first)
    last = tl.where(c == 0, count - 1, tl.minimum(last, count - 1))
    return first, tl.maximum(last - first + 1, 0)


@triton.jit
def _pos_embed_bwd_kernel(
    grad_ptr, grids_ptr, fold_ptr, out_ptr, stride_b, stride_n, stride_d, stride_gb, stride_gc, B, N, H, W, D,
    MERGE: tl.constexpr, PADDED: tl.constexpr, FIRST: tl.constexpr, ALIGN: tl.constexpr, ANTIALIAS: tl.constexpr,
    FRAMES: tl.constexpr, INT: tl.constexpr, IMAGES: tl.constexpr, SLOTS: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """One cell of the table: ``IMAGES`` images at a time, of each ``SLOTS`` patches at a time, each in its own lane."""
    cell = tl.program_id(0)
    cell_y = (cell // W).to(INT)
    cell_x = (cell % W).to(INT)
    offs_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    lane = tl.arange(0, IMAGES * SLOTS)
    slot = (lane % SLOTS).to(INT)
    acc = tl.zeros([IMAGES * SLOTS, BLOCK_D], tl.float32)
    carry = cell_y * 0
    columns = grad_ptr + offs_d.to(tl.int64)[None, :] * stride_d
    for offset in range(0, B, IMAGES):
        image = offset + lane // SLOTS
        t, h, w = _load_grid(grids_ptr, image, stride_gb, stride_gc, image < B, N, FRAMES, INT)
        count = t * h * w
        if PADDED:
            start = count * 0
        else:
            counted = tl.where(slot == 0, count, 0)
            start = carry + tl.cumsum(counted, 0) - count
            carry += tl.sum(counted, 0)
        first_y, number_y = _reach(cell_y, h, H, ALIGN, ANTIALIAS)
        first_x, number_x = _reach(cell_x, w, W, ALIGN, ANTIALIAS)
        pairs = tl.where(image < B, t * number_y * number_x, 0)
        number = tl.maximum(number_y * number_x, 1)
        number_x = tl.maximum(number_x, 1)
        for base in range(0, tl.max(pairs, 0), SLOTS):
            pair = base + slot
            frame = pair // number
            y = first_y + pair % number // number_x
            x = first_x + pair % number % number_x
            tap_y, cells_y, rest_y, a_y, s_y, total_y = _taps(y, tl.maximum(h, 1), H, ALIGN, ANTIALIAS)
            tap_x, cells_x, rest_x, a_x, s_x, total_x = _taps(x, tl.maximum(w, 1), W, ALIGN, ANTIALIAS)
            weight = _tent(cell_y - tap_y, cells_y, rest_y, a_y, s_y, total_y)
            weight *= _tent(cell_x - tap_x, cells_x, rest_x, a_x, s_x, total_x)
            block = y // MERGE * (w // MERGE) + x // MERGE
            local = frame * (h * w) + block * (MERGE * MERGE) + y % MERGE * MERGE + x % MERGE
            row = start + local
            used = (pair < pairs) & (weight > 0) & (row >= 0) & (row < N)
            in_grad = used
            if FIRST:
                in_grad = used & (local > 0)
            rows = row.to(tl.int64) * stride_n
            if PADDED:
                rows += image.to(tl.int64) * stride_b
            value = tl.load(columns + rows[:, None], mask=in_grad[:, None] & (offs_d < D)[None, :], other=0.0).to(tl.float32)
            if FIRST:
                folded = (used & (local == 0))[:, None] & (offs_d < D)[None, :]
                value += tl.load(fold_ptr + image.to(tl.int64)[:, None] * D + offs_d[None, :], mask=folded, other=0.0)
            acc += tl.where(used, weight, 0.0)[:, None] * value
    tl.store(out_ptr + cell.to(tl.int64) * D + offs_d, tl.sum(acc, 0).to(out_ptr.dtype.element_ty), mask=offs_d < D)


def _block_d(dim: int, dtype: torch.dtype) -> int:
    """Channels of a program. Those that are not loaded 16 bytes at a time need an address each."""
    return 128 if dim % 16 == 0 and dtype != torch.float32 else 64


def _integers(rows: int, height: int, width: int) -> tl.dtype:
    """Products of a place and a side reach ``4 * rows * side``, sums of a tent ``4 * side ** 2``."""
    side = max(height, width)
    return tl.int32 if 4 * side * max(rows, side) < 2**31 else tl.int64


def why_not_pos_embed_fwd(
    table: Tensor,
    grids: Tensor,
    rows: int,
    merge_size: int,
    padded: bool,
    pad_first: bool,
    align_corners: bool,
    antialias: bool,
) -> str | None:
    return None if table.dtype in _DTYPES else f"it takes fp32, bf16 and fp16, not {table.dtype}"


def pos_embed_fwd(
    table: Tensor,
    grids: Tensor,
    rows: int,
    merge_size: int,
    padded: bool,
    pad_first: bool,
    align_corners: bool,
    antialias: bool,
) -> Tensor:
    height, width, dim = table.shape
    batch = grids.shape[0]
    out = torch.empty((batch, rows, dim) if padded else (rows, dim), dtype=table.dtype, device=table.device)
    if out.numel() == 0:
        return out
    blocks = cdiv(rows, _BLOCK_R)
    programs = blocks * batch if padded else blocks
    block_d = _block_d(dim, table.dtype)
    splits = min(cdiv(_PROGRAMS, programs), cdiv(dim, block_d))
    _pos_embed_fwd_kernel[(programs, splits)](
        table, grids, out, *table.stride(), *grids.stride(), batch, rows, height, width, dim, blocks,
        MERGE=merge_size, PADDED=padded, FIRST=pad_first, ALIGN=align_corners, ANTIALIAS=antialias,
        FRAMES=grids.shape[1] == 3, INT=_integers(rows, height, width), IMAGES=min(max(next_power_of_2(batch), 16), 64),
        BLOCK_R=_BLOCK_R, BLOCK_D=block_d, num_warps=_WARPS,
    )  # fmt: skip
    return out


def why_not_pos_embed_bwd(
    grad: Tensor,
    grids: Tensor,
    height: int,
    width: int,
    merge_size: int,
    padded: bool,
    pad_first: bool,
    align_corners: bool,
    antialias: bool,
) -> str | None:
    return None if grad.dtype in _DTYPES else f"it takes fp32, bf16 and fp16, not {grad.dtype}"


def pos_embed_bwd(
    grad: Tensor,
    grids: Tensor,
    height: int,
    width: int,
    merge_size: int,
    padded: bool,
    pad_first: bool,
    align_corners: bool,
    antialias: bool,
) -> Tensor:
    rows, dim = grad.shape[-2:]
    batch = grids.shape[0]
    out = torch.empty(height, width, dim, dtype=grad.dtype, device=grad.device)
    if out.numel() == 0 or grad.numel() == 0 or batch == 0:
        return out.zero_()
    strides_g = grad.stride() if padded else (0, *grad.stride())
    frames, integers = grids.shape[1] == 3, _integers(rows, height, width)
    block_d = _block_d(dim, grad.dtype)
    fold = None
    if pad_first:
        fold = torch.empty(batch, dim, dtype=torch.float32, device=grad.device)
        _pos_embed_fold_kernel[(batch, cdiv(dim, block_d))](
            grad, grids, fold, *strides_g, *grids.stride(), rows, dim,
            FRAMES=frames, INT=integers, BLOCK_R=_BLOCK_R, BLOCK_D=block_d, num_warps=_WARPS,
        )  # fmt: skip
    images = min(next_power_of_2(batch), _LANES)
    _pos_embed_bwd_kernel[(height * width, cdiv(dim, block_d))](
        grad, grids, fold, out, *strides_g, *grids.stride(), batch, rows, height, width, dim,
        MERGE=merge_size, PADDED=padded, FIRST=pad_first, ALIGN=align_corners, ANTIALIAS=antialias,
        FRAMES=frames, INT=integers, IMAGES=images, SLOTS=_LANES // images, BLOCK_D=block_d, num_warps=_WARPS,
    )  # fmt: skip
    return out


def aot_cases() -> list[AotCase]:
    """Qwen3-VL's and both NaFlex tables, in every dtype; the smallest; sides that need 64-bit coordinates."""

    def call(side: int, dim: int, batch: int, rows: int, dtype: torch.dtype, padded: bool, first: bool, frames: bool) -> None:
        options = (1 if padded else 2, padded, first, not padded, padded)
        grids = torch.empty(batch, 3 if frames else 2, dtype=torch.int64)
        out = pos_embed_fwd(torch.empty(side, side, dim, dtype=dtype), grids, rows, *options)
        pos_embed_bwd(out, grids, side, side, *options)

    cases = []
    for name, *arguments in (
        ("Qwen3-VL", 48, 1152, 64, 65536, torch.bfloat16, False, False, True),
        ("Qwen3-VL 64-bit", 48, 1152, 64, 2**24, torch.float16, False, False, True),
        ("SigLIP2", 16, 1152, 64, 256, torch.bfloat16, True, True, False),
        ("SigLIP2 fp32", 16, 768, 64, 256, torch.float32, True, True, False),
        ("NaFlexVit", 16, 768, 3, 1024, torch.float16, True, False, False),
        ("one of everything", 1, 1, 1, 1, torch.bfloat16, False, False, False),
        ("one of everything, padded", 1, 1, 1, 1, torch.bfloat16, True, True, True),
    ):
        cases.append(AotCase(name, functools.partial(call, *arguments)))
    return cases

# SPDX-License-Identifier: Apache-2.0
"""What the forward and backward attention kernels share: head-dim pieces, masks, tile bounds, and the mask arguments."""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from vlmkernels.backends.triton import INTERPRETED

#: Rows and keys per entry of the tile bounds (``torch.ops.vlmkernels.tile_bounds``).
TILE = tl.constexpr(64)

DENSE = tl.constexpr(0)
CAUSAL = tl.constexpr(1)
RANGES = tl.constexpr(2)

# fp32 operands as three TF32 products: the error of fp32 at the speed of the tensor cores, and far less code than fp32 FMAs.
PRECISION = tl.constexpr("tf32x3")

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)


def is_hopper(device: torch.device) -> bool:
    """Whether the GPU has wgmma, for which the larger tiles are measured. With tcgen05 (sm_100) some of them need more memory."""
    return not INTERPRETED and torch.cuda.get_device_capability(device)[0] == 9


def split_dim(dim: int) -> tuple[int, int]:
    """A head dim as two powers of two (the second may be 0), so that 72 costs 64 + 16 and not 128."""
    first = 1 << (max(dim, 16).bit_length() - 1)
    rest = dim - first
    second = 0 if rest <= 0 else max(16, 1 << (rest - 1).bit_length())
    return (2 * first, 0) if second >= first else (first, second)


def pieces(dim: int, value_dim: int) -> dict[str, int]:
    """The compile-time arguments D1, D2, V1, V2 of every kernel."""
    (d1, d2), (v1, v2) = split_dim(dim), split_dim(value_dim)
    return {"D1": d1, "D2": d2, "V1": v1, "V2": v2}


#: Offsets inside a tile are 32 bits wide.
MAX_ROW_STRIDE = 1 << 23


def aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy where its rows do not begin at multiples of 16 bytes."""
    if x.data_ptr() & 15 or not in_eights(x.stride()):
        return x.clone(memory_format=torch.contiguous_format)
    return x


def in_eights(strides: tuple[int, ...]) -> bool:
    """Whether those over batch, rows and heads are multiples of 8 elements."""
    return not (strides[0] | strides[1] | strides[2]) & 7


def strides_in_eights(*strides: tuple[int, ...]) -> list[int]:
    """Strides over batch, rows and heads in units of 8 elements; the kernels multiply.

    So the compiler knows that rows begin at multiples of 16 bytes. Of a bare stride it learns that only where 16 divides it,
    and the heads of 72 channels are 72 apart: it then loads 2 bytes at a time, and nothing ahead.
    """
    return [stride // 8 for of_tensor in strides for stride in of_tensor[:3]]


class Mask(NamedTuple):
    """The mask as the kernels take it."""

    kind: int
    start: torch.Tensor  # [B|1, Sq], any tensor where there are no ranges
    stop: torch.Tensor
    q_bounds: torch.Tensor  # [B|1, tiles, 4]
    k_bounds: torch.Tensor
    row_stride: int  # of start and stop along the batch, 0 where one mask serves all
    q_stride: int
    k_stride: int


def make_mask(q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, stop: torch.Tensor | None, causal: bool) -> Mask:
    if start is None or stop is None:
        return Mask(CAUSAL.value if causal else DENSE.value, q, q, q, q, 0, 0, 0)
    start, stop = start.contiguous(), stop.contiguous()
    q_bounds, k_bounds = torch.ops.vlmkernels.tile_bounds.default(start, stop, k.shape[1], "")
    if start.shape[0] == 1:
        return Mask(RANGES.value, start, stop, q_bounds, k_bounds, 0, 0, 0)
    strides = start.stride(0), q_bounds.stride(0), k_bounds.stride(0)
    return Mask(RANGES.value, start, stop, q_bounds, k_bounds, *strides)


@triton.jit
def scale_strides(stride_b, stride_s, stride_h):
    return tl.cast(stride_b, tl.int64) * 8, stride_s * 8, stride_h * 8


@triton.jit
def load_rows(ptr, stride, offs, keep, first: tl.constexpr, width: tl.constexpr, dim: tl.constexpr, MASKED: tl.constexpr):
    """Columns ``first .. first + width`` of the rows ``offs``; zeros past ``dim`` and, if MASKED, in rows outside ``keep``."""
    cols = first + tl.arange(0, width)
    # One 32-bit offset for the row and the column: added apart, they cost a sixth of the instructions of the forward's loop.
    ptrs = ptr + (offs[:, None] * stride + cols[None, :])
    if first + width > dim:
        if MASKED:
            return tl.load(ptrs, mask=keep[:, None] & (cols < dim)[None, :], other=0.0)
        else:
            return tl.load(ptrs, mask=(cols < dim)[None, :], other=0.0)
    else:
        if MASKED:
            return tl.load(ptrs, mask=keep[:, None], other=0.0)
        else:
            return tl.load(ptrs)


@triton.jit
def store_rows(ptr, stride, x, offs, keep, first: tl.constexpr, width: tl.constexpr, dim: tl.constexpr):
    cols = first + tl.arange(0, width)
    tl.store(ptr + offs[:, None] * stride + cols[None, :], x.to(ptr.dtype.element_ty), mask=keep[:, None] & (cols < dim)[None, :])


@triton.jit
def capped_logits2(s, qk_scale, softcap):
    """``softcap * tanh(qk_scale * s / softcap)`` in units of log2, where ``qk_scale`` holds the factor log2(e) already."""
    # tanh(x) = 1 - 2 / (exp(2x) + 1), with no overflow at either end. Its error is that of 1, which a softcap of 50 makes 84
    # floors of an fp32 result: where x is small, a polynomial within 1e-7 of tanh(x) / x.
    y = s * (qk_scale / softcap)  # x log2(e)
    square = (y / LOG2E) * (y / LOG2E)
    series = -0.33333327 + square * (0.13332833 + square * (-0.05386872 + square * (0.02110273 - 0.00627248 * square)))
    small = (y / LOG2E) * (1.0 + square * series)
    return softcap * LOG2E * tl.where(square < 0.36, small, 1.0 - 2.0 / (tl.exp2(2.0 * y) + 1.0))


@triton.jit
def tile_bounds(bounds_ptr, tile, length, BLOCK: tl.constexpr):
    """The entry of a tile of BLOCK rows (or keys) of ``length``: the entries of its tiles of TILE folded into one."""
    entry = bounds_ptr + (tile * BLOCK // TILE) * 4
    first, last = tl.load(entry), tl.load(entry + 1)
    full_first, full_last = tl.load(entry + 2), tl.load(entry + 3)
    for i in tl.static_range(1, BLOCK // TILE):
        if tile * BLOCK + i * TILE < length:
            first, last = tl.minimum(first, tl.load(entry + 4 * i)), tl.maximum(last, tl.load(entry + 4 * i + 1))
            full_first = tl.maximum(full_first, tl.load(entry + 4 * i + 2))
            full_last = tl.minimum(full_last, tl.load(entry + 4 * i + 3))
    return first, last, full_first, full_last


@triton.jit
def key_span(bounds_ptr, tile_m, queries, keys, MASK: tl.constexpr, BLOCK_M: tl.constexpr):
    """Of a query tile: the keys that any of its rows sees, ``lo .. hi``, and those that all see, ``full_lo .. full_hi``."""
    if MASK == DENSE:
        lo, hi, full_lo, full_hi = 0, keys, 0, keys
    elif MASK == CAUSAL:
        shift = keys - queries
        lo, full_lo = 0, 0
        hi = tl.maximum(tl.minimum((tile_m + 1) * BLOCK_M, queries) + shift, 0)
        full_hi = tl.maximum(tile_m * BLOCK_M + 1 + shift, 0)
    else:
        lo, hi, full_lo, full_hi = tile_bounds(bounds_ptr, tile_m, queries, BLOCK_M)
    return lo, hi, full_lo, full_hi


@triton.jit
def rows_span(start, stop, inside, keys):
    """``key_span`` of a tile from the ranges of its rows."""
    # As [keys, 0) an empty range widens no hull and empties the intersection. Rows past the end are neutral in both.
    start = tl.maximum(start, 0)
    empty = start >= stop
    start, stop = tl.where(empty, keys, start), tl.where(empty, 0, stop)
    full_lo, full_hi = tl.max(tl.where(inside, start, 0), 0), tl.min(tl.where(inside, stop, keys), 0)
    return tl.min(start, 0), tl.max(stop, 0), full_lo, full_hi


@triton.jit
def row_ranges(start_ptr, stop_ptr, first, offs_m, queries, keys, MASK: tl.constexpr):
    """The range of each row of a query tile, cut to the keys there are; empty for rows past the last query.

    ``first``: where the ranges of this batch begin.
    """
    if MASK == RANGES:
        inside = offs_m < queries
        start = tl.load(start_ptr + first + offs_m, mask=inside, other=0)
        stop = tl.minimum(tl.load(stop_ptr + first + offs_m, mask=inside, other=0), keys)
    elif MASK == CAUSAL:
        start = tl.zeros_like(offs_m)
        stop = tl.minimum(offs_m + 1 + keys - queries, keys)
    else:
        start = tl.zeros_like(offs_m)
        stop = start + keys
    return start, stop


@triton.jit
def split_loop(lo, hi, full_lo, full_hi, BLOCK: tl.constexpr):
    """Tiles of BLOCK: ``first .. last`` all that are visited, ``full_first .. full_last`` those among them that need no mask."""
    first = lo // BLOCK
    last = tl.maximum(tl.cdiv(hi, BLOCK), first)
    full_first = tl.minimum(tl.maximum(tl.cdiv(full_lo, BLOCK), first), last)
    full_last = tl.maximum(tl.minimum(full_hi // BLOCK, last), full_first)
    return first, last, full_first, full_last

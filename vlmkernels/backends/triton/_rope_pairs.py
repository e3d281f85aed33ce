# SPDX-License-Identifier: Apache-2.0
"""What the kernels of ``rope`` have in common: pairs of channels, where they lie, and how they turn."""

import torch
import triton
import triton.language as tl

from vlmkernels.backends.triton import next_power_of_2

BLOCK = 1024
WARPS = 4


@triton.jit
def locate(block, H: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr, ROWS: tl.constexpr):
    """Token (int64), head and pair of each element of a block: ``[BLOCK]``, or ``[BLOCK // WIDTH, WIDTH]`` with ``ROWS``."""
    if ROWS:
        row = block.to(tl.int64) * (BLOCK // WIDTH)
        offs_p = tl.arange(0, WIDTH)[None, :]
        head = (row % H).to(tl.int32) + tl.arange(0, BLOCK // WIDTH)[:, None]
    else:
        first = block.to(tl.int64) * BLOCK
        row = first // PAIRS
        # The compiler does not see that a remainder keeps the powers of two that PAIRS and BLOCK share.
        offs = tl.multiple_of((first % PAIRS).to(tl.int32) + tl.arange(0, BLOCK), [PAIRS & -PAIRS])
        offs_p = offs % PAIRS
        head = (row % H).to(tl.int32) + offs // PAIRS
    return row // H + head // H, head % H, offs_p


@triton.jit
def channels(offs_p, D: tl.constexpr, HALF: tl.constexpr):
    """Both channels of half-split pairs. The channels past the rotated ``2 HALF`` are paired with each other."""
    if 2 * HALF == D:
        first = offs_p
        second = offs_p + HALF
    else:
        first = offs_p + tl.where(offs_p < HALF, 0, HALF)
        second = offs_p + tl.where(offs_p < HALF, HALF, D // 2)
    return first, second


@triton.jit
def load_pairs(ptrs, offs_p, stride, mask, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    if INTERLEAVED:
        pairs = tl.expand_dims(ptrs + 2 * offs_p * stride, -1) + tl.arange(0, 2) * stride
        first, second = tl.split(tl.load(pairs, mask=tl.expand_dims(mask, -1), other=0.0))
    else:
        ch_a, ch_b = channels(offs_p, D, HALF)
        first = tl.load(ptrs + ch_a * stride, mask=mask, other=0.0)
        second = tl.load(ptrs + ch_b * stride, mask=mask, other=0.0)
    return first.to(tl.float32), second.to(tl.float32)


@triton.jit
def store_pairs(ptrs, first, second, offs_p, mask, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    dtype = ptrs.dtype.element_ty
    if INTERLEAVED:
        pairs = tl.expand_dims(ptrs + 2 * offs_p, -1) + tl.arange(0, 2)
        tl.store(pairs, tl.join(first.to(dtype), second.to(dtype)), mask=tl.expand_dims(mask, -1))
    else:
        ch_a, ch_b = channels(offs_p, D, HALF)
        tl.store(ptrs + ch_a, first.to(dtype), mask=mask)
        tl.store(ptrs + ch_b, second.to(dtype), mask=mask)


@triton.jit
def turn(
    first,
    second,
    cos_ptr,
    sin_ptr,
    offs_t,
    offs_p,
    stride_td,
    mask,
    PAIRS: tl.constexpr,
    HALF: tl.constexpr,
    INVERSE: tl.constexpr,
):
    """Rotate pairs; ``offs_t`` is the offset of the token's row in the tables. Pairs past ``HALF`` stay as they are."""
    turned = mask & (offs_p < HALF)
    cos = tl.load(cos_ptr + offs_t + offs_p * stride_td, mask=turned, other=1.0).to(tl.float32)
    sin = tl.load(sin_ptr + offs_t + offs_p * stride_td, mask=turned, other=0.0).to(tl.float32)
    if INVERSE:
        sin = -sin
    new_first = first * cos - second * sin
    new_second = first * sin + second * cos
    if PAIRS > HALF:
        # Not left to the angle 0: there 0 * inf would be NaN.
        new_first = tl.where(offs_p < HALF, new_first, first)
        new_second = tl.where(offs_p < HALF, new_second, second)
    return new_first, new_second


@triton.jit
def load_weight(w_ptr, offs_p, D: tl.constexpr, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    return load_pairs(w_ptr + tl.zeros_like(offs_p), offs_p, 1, offs_p < D // 2, D, HALF, INTERLEAVED)


def vector(dtype: torch.dtype, *strides: int) -> int:
    """The largest power of two, up to 16 bytes of elements, that divides all strides.

    Strides over batch, token and head go to the kernels in this unit, which multiply: so the compiler knows the alignment of
    a head's row also where Triton's own test (a multiple of 16) says nothing, as at 72 channels.
    """
    bits = 16 // dtype.itemsize
    for stride in strides:
        bits |= stride
    return bits & -bits


def units(vector: int, strides: tuple[int, ...]) -> tuple[int, ...]:
    """The strides with those over batch, token and head in units of ``vector``."""
    return *(stride // vector for stride in strides[:3]), *strides[3:]


def rows(strides: tuple[int, ...]) -> tuple[int, ...]:
    """Strides over batch, token, head and channel from those of ``[B, S, H, D]`` or ``[T, H, D]``."""
    return strides if len(strides) == 4 else (0, *strides)


def table_strides(shape: torch.Size, strides: tuple[int, ...]) -> tuple[int, int, int]:
    batch = 0 if len(shape) == 2 or shape[0] == 1 else strides[0]
    return batch, strides[-2], strides[-1]


def row_width(head_dim: int) -> int:
    return next_power_of_2(max(head_dim // 2, 1))


def same_layout(cos: torch.Tensor, sin: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return (cos, sin) if cos.stride() == sin.stride() else (cos.contiguous(), sin.contiguous())

# SPDX-License-Identifier: Apache-2.0
"""Matrix products: a tile of one, for kernels that do more with it before it is written, and those with GELU or nothing after."""

import functools
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.backends.triton import INTERPRETED, cdiv, next_power_of_2
from vlmkernels.backends.triton._launch import LAUNCHES, Launch


class Config(NamedTuple):
    """Tile, warps and pipeline stages of the product."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int


#: Up to how many rows there are too few for tiles of many: an image or two of a Q-Former, 32 queries each.
FEW = 64
FEW_CONFIG, MANY_CONFIG = Config(32, 32, 128, 4, 4), Config(128, 128, 64, 8, 3)


@triton.jit
def product_tile(
    a_src, w_src, M, stride_am, stride_wn, first_m, first_n, start_k, stop_k, N,
    K: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Columns ``start_k`` to ``stop_k`` of ``a [M, K]`` times those of ``w [N, K]``, in fp32.

    The sources are pointers, or TMA descriptors of tiles.
    """
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for first_k in range(start_k, stop_k, BLOCK_K):
        if USE_TMA:
            a = a_src.load([first_m, first_k])
            w = w_src.load([first_n, first_k])
        else:
            offs_k = first_k + tl.arange(0, BLOCK_K)
            a_rows = a_src + offs_m.to(tl.int64)[:, None] * stride_am
            w_rows = w_src + offs_n.to(tl.int64)[:, None] * stride_wn
            mask_k = (offs_k < K)[None, :]
            a = tl.load(a_rows + offs_k[None, :], mask=(offs_m < M)[:, None] & mask_k, other=0.0)
            w = tl.load(w_rows + offs_k[None, :], mask=(offs_n < N)[:, None] & mask_k, other=0.0)
        acc = tl.dot(a, w.T, acc, input_precision="ieee")
    return acc


@triton.jit
def _gelu(x):
    """``max(x, 0) - |x| P(-|x|)``, P of the normal distribution: Abramowitz and Stegun's 7.1.26, which is off by 1e-7."""
    size = tl.minimum(tl.abs(x), 16.0)  # there P is 0
    t = 1.0 / (1.0 + 0.23164189 * size)
    p = ((((0.5307027145 * t - 0.726576013) * t + 0.7107068705) * t - 0.142248368) * t + 0.127414796) * t
    return tl.maximum(x, 0.0, propagate_nan=tl.PropagateNan.ALL) - size * p * tl.exp2(-0.7213475204 * size * size)


@triton.jit
def _linear_kernel(
    x_src, w_src, bias_ptr, out_ptr, M, stride_xm, stride_wn,
    N: tl.constexpr, K: tl.constexpr, SHARE: tl.constexpr, GELU: tl.constexpr, USE_TMA: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``x w.T`` over SHARE of the K columns; of more than one share, the result is ``[shares, M, N]``."""
    tiles_n: tl.constexpr = (N + BLOCK_N - 1) // BLOCK_N
    first_m = tl.program_id(0) // tiles_n * BLOCK_M
    first_n = tl.program_id(0) % tiles_n * BLOCK_N
    share = tl.program_id(1)
    acc = product_tile(
        x_src, w_src, M, stride_xm, stride_wn, first_m, first_n, share * SHARE, share * SHARE + SHARE, N, K, USE_TMA,
        BLOCK_M, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    offs_m = first_m + tl.arange(0, BLOCK_M)
    offs_n = first_n + tl.arange(0, BLOCK_N)
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < N, other=0.0).to(tl.float32)[None, :]
    if GELU:
        acc = _gelu(acc)
    rows = share.to(tl.int64) * M + offs_m
    mask = (offs_m < M)[:, None] & (offs_n < N)[None, :]
    tl.store(out_ptr + rows[:, None] * N + offs_n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


def aligned_matrix(x: Tensor) -> Tensor:
    """``x``, or a copy where it is no matrix of dense rows that begin at multiples of 16 bytes."""
    step = 16 // x.element_size()
    if x.stride(1) == 1 and x.stride(0) % step == 0 and x.stride(0) >= x.shape[1] and x.data_ptr() % 16 == 0:
        return x
    return x.new_empty(x.shape[0], cdiv(x.shape[1], step) * step)[:, : x.shape[1]].copy_(x)


def config(rows: int) -> Config:
    return FEW_CONFIG if rows <= FEW else MANY_CONFIG


@functools.cache
def generation(device: torch.device) -> int:
    return 9 if INTERPRETED else torch.cuda.get_device_capability(device)[0]


def takes(x: Tensor, *rest: Tensor | None) -> str | None:
    """Why not, for a product of these."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {x.dtype}"
    if any(t is not None and t.stride(-1) != 1 for t in (x, *rest)):
        return "it takes rows of neighbouring elements"
    return None


@functools.lru_cache(maxsize=LAUNCHES)
def _product_launch(
    device: torch.device, dtype: torch.dtype, m: int, n: int, k: int, strides: tuple[int, int], use_tma: bool, has_bias: bool,
    gelu: bool, shares: int, share: int,
) -> Launch:  # fmt: skip
    c = config(m)
    c = c._replace(block_n=min(c.block_n, max(16, next_power_of_2(n))))
    descriptors: dict[int, Any] = {}
    if use_tma:
        descriptors[0] = ([m, k], [strides[0], 1], [c.block_m, c.block_k])
        descriptors[1] = ([n, k], [strides[1], 1], [c.block_n, c.block_k])
    return Launch(
        _linear_kernel, (cdiv(m, c.block_m) * cdiv(n, c.block_n), shares), (m, *strides), descriptors,
        N=n, K=k, SHARE=share, GELU=gelu, USE_TMA=use_tma, BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_K=c.block_k,
        num_warps=c.warps, num_stages=c.stages,
    )  # fmt: skip


def product_launch(x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool, shares: int, share: int) -> Launch:
    (m, k), n, strides = x.shape, weight.shape[0], (x.stride(0), weight.stride(0))
    aligned = not any(stride % 8 for stride in strides) and not (x.data_ptr() | weight.data_ptr()) % 16
    use_tma = m > FEW and aligned and generation(x.device) >= 9
    return _product_launch(x.device, x.dtype, m, n, k, strides, use_tma, bias is not None, gelu, shares, share)

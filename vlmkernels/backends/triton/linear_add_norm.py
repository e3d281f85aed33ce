# SPDX-License-Identifier: Apache-2.0
"""``linear_add_norm`` in Triton, and products with GELU behind them.

A few rows are a product that reads the weight and does little else: its columns, and where a LayerNorm follows its depth too, are
shared out among programs, whose shares the kernel of the norm adds up. A product of some thousand rows is large enough for
cuBLAS, but a GELU of its own takes half as long again.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.backends.triton import INTERPRETED, cdiv, next_power_of_2
from vlmkernels.backends.triton._aot import AotCase
from vlmkernels.backends.triton._launch import LAUNCHES, Launch
from vlmkernels.backends.triton._product import Config, product_tile


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


@triton.jit
def _add_norm_kernel(
    shares_ptr, bias_ptr, residual_ptr, norm_weight_ptr, norm_bias_ptr, out_ptr, M, stride_r, eps,
    N: tl.constexpr, SHARES: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """LayerNorm of a row of ``sum of shares + bias + residual``."""
    row = tl.program_id(0).to(tl.int64)
    offs_n = tl.arange(0, BLOCK_N)
    mask = offs_n < N
    x = tl.load(residual_ptr + row * stride_r + offs_n, mask=mask, other=0.0).to(tl.float32)
    if bias_ptr is not None:
        x += tl.load(bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    for share in tl.static_range(SHARES):
        x += tl.load(shares_ptr + (share * M + row) * N + offs_n, mask=mask, other=0.0)
    centred = tl.where(mask, x - tl.sum(x, 0) / N, 0.0)
    y = centred / tl.sqrt(tl.sum(centred * centred, 0) / N + eps)
    y *= tl.load(norm_weight_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    y += tl.load(norm_bias_ptr + offs_n, mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + row * N + offs_n, y.to(out_ptr.dtype.element_ty), mask=mask)


#: Up to how many rows there are too few for tiles of many, and from how many on GELU is faster behind a product of these: an
#: image or two of a Q-Former, and a batch of 32 on, where GELU takes half as long as its product. Between them cuBLAS has the
#: better tiles (32 queries each, H200).
FEW, MANY = 64, 1024
FEW_CONFIG, MANY_CONFIG = Config(32, 32, 128, 4, 4), Config(128, 128, 64, 8, 3)
#: The depth of a product of few rows is shared out until there are so many programs, or so little depth for each.
_PROGRAMS, _MIN_SHARE = 96, 128


def _config(rows: int) -> Config:
    return FEW_CONFIG if rows <= FEW else MANY_CONFIG


@functools.cache
def _generation(device: torch.device) -> int:
    return 9 if INTERPRETED else torch.cuda.get_device_capability(device)[0]


def is_faster_with_gelu(rows: int, device: torch.device) -> bool:
    return rows <= FEW or (rows >= MANY and _generation(device) == 9)


def takes(x: Tensor, *rest: Tensor | None) -> str | None:
    """Why not, for a product of these."""
    if x.dtype not in (torch.bfloat16, torch.float16):
        return f"it has no {x.dtype}"
    if any(t is not None and t.stride(-1) != 1 for t in (x, *rest)):
        return "it takes rows of neighbouring elements"
    return None


def why_not_linear_add_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> str | None:
    return takes(x, weight, bias, residual, norm_weight, norm_bias)


@functools.lru_cache(maxsize=LAUNCHES)
def _product_launch(
    device: torch.device, dtype: torch.dtype, m: int, n: int, k: int, strides: tuple[int, int], use_tma: bool, has_bias: bool,
    gelu: bool, shares: int, share: int,
) -> Launch:  # fmt: skip
    c = _config(m)
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
    use_tma = m > FEW and aligned and _generation(x.device) >= 9
    return _product_launch(x.device, x.dtype, m, n, k, strides, use_tma, bias is not None, gelu, shares, share)


@functools.lru_cache(maxsize=LAUNCHES)
def _norm_launch(
    device: torch.device, dtype: torch.dtype, m: int, n: int, stride_r: int, has_bias: bool, shares: int, eps: float
) -> Launch:
    block_n = next_power_of_2(n)
    return Launch(
        _add_norm_kernel, (m,), (m, stride_r, eps),
        N=n, SHARES=shares, BLOCK_N=block_n, num_warps=min(16, max(1, block_n // 256)),
    )  # fmt: skip


def linear_add_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    plan = plan_linear_add_norm_fwd(x, weight, bias, residual, norm_weight, norm_bias, eps)
    return plan(x, weight, bias, residual, norm_weight, norm_bias)


def plan_linear_add_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Callable[..., Tensor]:
    (m, k), n = x.shape, weight.shape[0]
    c = _config(m)
    wanted = max(1, _PROGRAMS // max(1, cdiv(m, c.block_m) * cdiv(n, c.block_n)))
    share = max(_MIN_SHARE, cdiv(cdiv(k, wanted), c.block_k) * c.block_k)
    shares = max(1, cdiv(k, share))
    if m and n:
        product = product_launch(x, weight, None, False, shares, share)
        norm = _norm_launch(x.device, x.dtype, m, n, residual.stride(0), bias is not None, shares, eps)

    def plan(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> Tensor:
        out = x.new_empty(m, n)
        if m and n:
            parts = x.new_empty(shares, m, n, dtype=torch.float32)
            product(x, weight, None, parts)
            norm(parts, bias, residual, norm_weight, norm_bias, out)
        return out

    return plan


def aot_cases() -> list[AotCase]:
    """The Q-Former's feed-forward for 64 images and for one, and the smallest."""

    def call(rows: int, width: int, inner: int, dtype: torch.dtype) -> None:
        x, hidden, down = (torch.empty(*shape, dtype=dtype) for shape in ((rows, width), (rows, inner), (width, inner)))
        vector = torch.empty(width, dtype=dtype)
        linear_add_norm_fwd(hidden, down, vector, x, vector, vector, 1e-12)

    shapes = (("64 images bf16", 2048, 768, 3072, torch.bfloat16), ("an image fp16", 32, 768, 3072, torch.float16),
              ("the smallest", 1, 8, 16, torch.bfloat16))  # fmt: skip
    return [AotCase(name, functools.partial(call, *arguments)) for name, *arguments in shapes]

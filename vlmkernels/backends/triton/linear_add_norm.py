# SPDX-License-Identifier: Apache-2.0
"""``linear_add_norm`` as a product and a kernel for the sum and the norm.

A few rows are a product that reads the weight and does little else: its columns and its depth are shared out among programs,
whose shares the kernel of the norm adds up.
"""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.backends.triton import cdiv, next_power_of_2
from vlmkernels.backends.triton._aot import AotCase
from vlmkernels.backends.triton._launch import LAUNCHES, Launch
from vlmkernels.backends.triton._product import config, product_launch, takes


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


#: The depth of a product of few rows is shared out until there are so many programs, or so little depth for each.
_PROGRAMS, _MIN_SHARE = 96, 128


def why_not_linear_add_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> str | None:
    return takes(x, weight, bias, residual, norm_weight, norm_bias)


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
    c = config(m)
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

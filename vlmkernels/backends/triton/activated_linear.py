# SPDX-License-Identifier: Apache-2.0
"""``activated_linear`` as cuBLAS's product and one pass over it for the activation, where torch takes three for quick GELU; and
with GELU as a product of its own, where that is faster."""

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.backends.triton._aot import AotCase
from vlmkernels.backends.triton._launch import LAUNCHES, Launch
from vlmkernels.backends.triton._product import FEW, generation, product_launch, takes

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_BLOCK, _WARPS = 2048, 4
#: From how many rows on GELU is faster behind a product of Triton's again, as up to ``FEW``: from a batch of 32 of a Q-Former on,
#: 32 queries each, a GELU of its own takes half as long as its product. Between them cuBLAS has the better tiles (H200).
MANY = 1024


@triton.jit
def _activated_linear_kernel(y_ptr, size, GELU: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    # x erfc(-x / sqrt 2) / 2 or x / (1 + exp(-1.702 x))
    y = y * (0.5 + 0.5 * tl.erf(y * 0.7071067811865476)) if GELU else y / (1.0 + tl.exp(-1.702 * y))
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < size)


@functools.lru_cache(maxsize=LAUNCHES)
def _launch(device: torch.device, dtype: torch.dtype, size: int, activation: str) -> Launch:
    options = {"GELU": activation == "gelu", "BLOCK": _BLOCK, "num_warps": _WARPS}
    return Launch(_activated_linear_kernel, (triton.cdiv(size, _BLOCK),), (size,), **options)


def _is_one_kernel(rows: int, device: torch.device) -> bool:
    return rows <= FEW or (rows >= MANY and generation(device) == 9)


def why_not_activated_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> str | None:
    if x.dtype not in _DTYPES:
        return f"it takes fp32, bf16 and fp16, not {x.dtype}"
    return "cuBLAS has GELU with tanh behind a product" if activation == "gelu_tanh" else None


def plan_activated_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Callable[..., Tensor] | None:
    rows, depth, dim = x.shape[:-1].numel(), x.shape[-1], weight.shape[0]
    if rows * dim == 0:
        return None
    if activation == "gelu" and _is_one_kernel(rows, x.device) and takes(x, weight, bias) is None:
        product, shape = product_launch(x.reshape(rows, depth), weight, bias, True, 1, max(depth, 1)), (*x.shape[:-1], dim)

        def plan_of_one(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
            y = x.new_empty(shape)
            product(x.reshape(rows, depth), weight, bias, y)
            return y

        return plan_of_one
    launch = _launch(x.device, x.dtype, rows * dim, activation)

    def plan(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        y = F.linear(x, weight, bias)
        launch(y)
        return y

    return plan


def activated_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    plan = plan_activated_linear_fwd(x, weight, bias, activation)
    return F.linear(x, weight, bias) if plan is None else plan(x, weight, bias)


def aot_cases() -> list[AotCase]:
    """Both activations in every dtype, a size of more than 32 bits, and products with GELU of a Q-Former."""

    def call(size: tuple[int, ...], dtype: torch.dtype, activation: str) -> None:
        _launch(torch.device("meta"), dtype, size[0] * size[1], activation)(torch.empty(size, dtype=dtype))

    cases = [
        AotCase(f"{activation} {dtype}", functools.partial(call, (577, 4096), dtype, activation))
        for activation in ("gelu", "quick_gelu")
        for dtype in _DTYPES
    ]

    def product(rows: int, dtype: torch.dtype) -> None:
        x, weight, bias = (torch.empty(*shape, dtype=dtype) for shape in ((rows, 768), (3072, 768), (3072,)))
        activated_linear_fwd(x, weight, bias, "gelu")

    cases += [
        AotCase("64 images bf16", functools.partial(product, 2048, torch.bfloat16)),
        AotCase("an image fp16", functools.partial(product, 32, torch.float16)),
    ]
    return [*cases, AotCase("more than 2^31", functools.partial(call, (2**20, 4096), torch.bfloat16, "quick_gelu"))]

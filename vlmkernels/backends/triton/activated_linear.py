# SPDX-License-Identifier: Apache-2.0
"""``activated_linear`` as cuBLAS's products and one pass over them, where torch takes three for quick GELU and two for a gate;
and with GELU as a product of its own, where that is faster."""

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
def _activated_linear_kernel(y_ptr, up_ptr, size, ACTIVATION: tl.constexpr, BLOCK: tl.constexpr):
    offs = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    y = tl.load(y_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    if ACTIVATION == "gelu":
        y *= 0.5 + 0.5 * tl.erf(y * 0.7071067811865476)
    elif ACTIVATION == "gelu_tanh":  # (1 + tanh(z)) / 2 = 1 / (1 + exp(-2 z))
        y /= 1.0 + tl.exp(-1.5957691216 * y * (1.0 + 0.044715 * y * y))
    elif ACTIVATION == "quick_gelu":
        y /= 1.0 + tl.exp(-1.702 * y)
    else:
        y /= 1.0 + tl.exp(-y)
    if up_ptr is not None:
        y *= tl.load(up_ptr + offs, mask=offs < size, other=0.0).to(tl.float32)
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=offs < size)


@functools.lru_cache(maxsize=LAUNCHES)
def _launch(device: torch.device, dtype: torch.dtype, size: int, activation: str, gated: bool) -> Launch:
    options = {"ACTIVATION": activation, "BLOCK": _BLOCK, "num_warps": _WARPS}
    return Launch(_activated_linear_kernel, (triton.cdiv(size, _BLOCK),), (size,), **options)


def _is_one_kernel(rows: int, device: torch.device) -> bool:
    return rows <= FEW or (rows >= MANY and generation(device) == 9)


def why_not_activated_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, activation: str
) -> str | None:
    if x.dtype not in _DTYPES:
        return f"it takes fp32, bf16 and fp16, not {x.dtype}"
    in_cublas = activation == "gelu_tanh" and bias is not None and up is None
    return "cuBLAS has GELU with tanh behind a product" if in_cublas else None


def plan_activated_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, activation: str
) -> Callable[..., Tensor] | None:
    rows, depth, dim = x.shape[:-1].numel(), x.shape[-1], weight.shape[0]
    if rows * dim == 0:
        return None
    if activation == "gelu" and up is None and _is_one_kernel(rows, x.device) and takes(x, weight, bias) is None:
        product, shape = product_launch(x.reshape(rows, depth), weight, bias, True, 1, max(depth, 1)), (*x.shape[:-1], dim)

        def plan_of_one(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None) -> Tensor:
            y = x.new_empty(shape)
            product(x.reshape(rows, depth), weight, bias, y)
            return y

        return plan_of_one
    launch = _launch(x.device, x.dtype, rows * dim, activation, up is not None)

    def plan(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None) -> Tensor:
        y = F.linear(x, weight, bias)
        launch(y, None if up is None else F.linear(x, up))
        return y

    return plan


def activated_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, activation: str) -> Tensor:
    plan = plan_activated_linear_fwd(x, weight, bias, up, activation)
    return F.linear(x, weight, bias) if plan is None else plan(x, weight, bias, up)


def aot_cases() -> list[AotCase]:
    """All activations in every dtype, alone and times a second product, a size of more than 32 bits, and products with GELU of a
    Q-Former."""

    def call(size: tuple[int, ...], dtype: torch.dtype, activation: str, gated: bool) -> None:
        y = torch.empty(size, dtype=dtype)
        _launch(torch.device("meta"), dtype, y.numel(), activation, gated)(y, y if gated else None)

    kinds = (("gelu", False), ("quick_gelu", False), ("silu", True), ("gelu_tanh", True))
    cases = [
        AotCase(f"{activation} {dtype}", functools.partial(call, (577, 4096), dtype, activation, gated))
        for activation, gated in kinds
        for dtype in _DTYPES
    ]

    def product(rows: int, dtype: torch.dtype) -> None:
        x, weight, bias = (torch.empty(*shape, dtype=dtype) for shape in ((rows, 768), (3072, 768), (3072,)))
        activated_linear_fwd(x, weight, bias, None, "gelu")

    cases += [
        AotCase("64 images bf16", functools.partial(product, 2048, torch.bfloat16)),
        AotCase("an image fp16", functools.partial(product, 32, torch.float16)),
    ]
    return [*cases, AotCase("more than 2^31", functools.partial(call, (2**20, 4096), torch.bfloat16, "quick_gelu", False))]

# SPDX-License-Identifier: Apache-2.0
"""``layer_norm`` as one program for each row, which stays in registers: it is read once. Backward is the patch embedding's."""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.backends.triton._aot import AotCase
from vlmkernels.backends.triton._launch import LAUNCHES, Launch
from vlmkernels.backends.triton._patch_embed_bwd import add_shares, row_gradients
from vlmkernels.backends.triton._patch_embed_cut import multiprocessors

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
#: Of a row. A thread holds 32 of 1,024 columns; in the backward pass of 8,192 in fp32 it would spill.
_MOST, _MOST_BWD = 8192, 4096


@triton.jit
def _layer_norm_fwd_kernel(x_ptr, weight_ptr, bias_ptr, shift_ptr, y_ptr, total_ptr, dim, eps, BLOCK_D: tl.constexpr):
    row = tl.program_id(0).to(tl.int64) * dim
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < dim
    x = tl.load(x_ptr + row + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    centred = tl.where(mask_d, x - tl.sum(x, 0) / dim, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 0) / dim + eps)
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    shift = tl.load(shift_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    y = centred * rstd * weight + bias
    tl.store(y_ptr + row + offs_d, y.to(y_ptr.dtype.element_ty), mask=mask_d)
    tl.store(total_ptr + row + offs_d, (x + shift).to(total_ptr.dtype.element_ty), mask=mask_d)


@functools.lru_cache(maxsize=LAUNCHES)
def _launch(device: torch.device, dtype: torch.dtype, rows: int, dim: int, eps: float) -> Launch:
    block = triton.next_power_of_2(dim)
    return Launch(_layer_norm_fwd_kernel, (rows,), (dim, eps), BLOCK_D=block, num_warps=max(1, block // 1024))


def why_not_layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, eps: float) -> str | None:
    if x.dtype not in _DTYPES:
        return f"it takes fp32, bf16 and fp16, not {x.dtype}"
    if x.shape[-1] > _MOST:
        return f"rows of {x.shape[-1]} columns are more than {_MOST}"
    return None if weight.stride() == bias.stride() == shift.stride() == (1,) else "weight, bias and shift must be contiguous"


def plan_layer_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, eps: float
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The plan, or None where ``x`` must be copied first."""
    if not x.is_contiguous() or x.numel() == 0:
        return None
    shape = x.shape
    launch = _launch(x.device, x.dtype, x.numel() // shape[-1], shape[-1], eps)

    def plan(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> tuple[Tensor, Tensor]:
        y, total = x.new_empty(shape), x.new_empty(shape)
        launch(x, weight, bias, shift, y, total)
        return y, total

    return plan


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    plan = plan_layer_norm_fwd(x, weight, bias, shift, eps)
    return (x.new_empty(x.shape), x.new_empty(x.shape)) if plan is None else plan(x, weight, bias, shift)


def why_not_layer_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> str | None:
    if x.shape[-1] > _MOST_BWD:
        return f"rows of {x.shape[-1]} columns are more than {_MOST_BWD}"
    return None if x.dtype in _DTYPES else f"it takes fp32, bf16 and fp16, not {x.dtype}"


def layer_norm_bwd(dy: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor | None, ...]:
    if x.numel() == 0:
        return x.new_empty(x.shape), *(weight.new_zeros(weight.shape) for _ in range(3))
    # As images of so many tokens: there are programs for each token.
    images = x.contiguous().view(-1, x.shape[-2] if x.dim() > 2 else 1, x.shape[-1])
    wanted, tokens = (True, False, True), images.shape[1]
    rows = row_gradients(dy.contiguous().view(images.shape), images, weight, eps, 0, tokens, 0, wanted, multiprocessors(x.device))
    assert rows.d_rows is not None
    sums = add_shares(rows, x.dtype, 0, 0, (False, False, True, True, True))
    return rows.d_rows.view(x.shape), *sums[2:]


def aot_cases() -> list[AotCase]:
    """The widths of the towers in every dtype, the widest row, and an odd one."""

    def call(dim: int, dtype: torch.dtype) -> None:
        vector = torch.empty(dim, dtype=dtype)
        rows = torch.empty(577, dim, dtype=dtype)
        layer_norm_fwd(rows, vector, vector, vector, 1e-6)
        if dim <= _MOST_BWD:
            layer_norm_bwd(rows, rows, vector, 1e-6)

    sizes = [(dim, torch.bfloat16) for dim in (768, 1024, 1152, 1408, 2048, 4096, _MOST, 33)]
    sizes += [(1152, torch.float16), (1152, torch.float32), (_MOST, torch.float32)]
    return [AotCase(f"D{dim} {dtype}", functools.partial(call, dim, dtype)) for dim, dtype in sizes]

# SPDX-License-Identifier: Apache-2.0
"""``layer_norm`` as one program for each row, which stays in registers: it is read once.

Backward a program takes rows in turn and adds up what it has seen of the three sums over rows; a second kernel adds those of all
programs in a fixed order.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.backends.triton import cdiv, multiprocessors, next_power_of_2
from vlmkernels.backends.triton._aot import AotCase
from vlmkernels.backends.triton._launch import LAUNCHES, Launch
from vlmkernels.backends.triton._patch_embed_bwd import norm_gradients, sums_launch

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
    block = next_power_of_2(dim)
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


@triton.jit
def _layer_norm_bwd_kernel(
    dy_ptr, dtotal_ptr, x_ptr, weight_ptr, dx_ptr, sums_ptr, rows, eps,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    pid, programs = tl.program_id(0), tl.num_programs(0)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    weight = tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)
    d_shift = tl.zeros([BLOCK_D], tl.float32)
    d_weight = tl.zeros([BLOCK_D], tl.float32)
    d_bias = tl.zeros([BLOCK_D], tl.float32)
    for first in tl.range(pid * BLOCK_R, rows, programs * BLOCK_R, num_stages=STAGES):
        offs_r = first + tl.arange(0, BLOCK_R)
        # Behind the last row it stands for others: rows of zeros would have no variance.
        offs = tl.minimum(offs_r, rows - 1).to(tl.int64)[:, None] * D + offs_d[None, :]
        mask = (offs_r < rows)[:, None] & mask_d[None, :]
        x = tl.load(x_ptr + offs, mask=mask_d[None, :], other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offs, mask=mask, other=0.0).to(tl.float32)
        dx, unit = norm_gradients(dy, x, weight, mask_d, eps, D)
        d_weight += tl.sum(dy * unit, 0)
        d_bias += tl.sum(dy, 0)
        if dtotal_ptr is None:
            d_shift += tl.sum(dx, 0)
        else:
            dtotal = tl.load(dtotal_ptr + offs, mask=mask, other=0.0).to(tl.float32)
            d_shift += tl.sum(dtotal, 0)
            dx += dtotal
        tl.store(dx_ptr + offs, dx.to(dx_ptr.dtype.element_ty), mask=mask)
    sums_ptr += pid.to(tl.int64) * (3 * D) + offs_d
    tl.store(sums_ptr, d_shift, mask=mask_d)
    tl.store(sums_ptr + D, d_weight, mask=mask_d)
    tl.store(sums_ptr + 2 * D, d_bias, mask=mask_d)


class BwdConfig(NamedTuple):
    """Rows of a tile, pipeline stages, warps, and programs for a multiprocessor."""

    rows: int
    stages: int
    warps: int
    programs: int


def _bwd_config(block_d: int, itemsize: int) -> BwdConfig:
    """Up to 2,048 columns of 16 bits each thread has 32 numbers of each tensor.

    Of all configurations tried for 768 to 1,408 columns within 6 % of the fastest (H200); 1,152 columns take 79 us, with 16
    numbers 92.
    """
    if itemsize == 2 and block_d <= 2048:
        warps = min(max(block_d // 256, 1), 4)
        return BwdConfig(4 if block_d <= 1024 else 2, 3, warps, 8 // warps)
    warps = min(max(block_d // 256, 1), 16)
    return BwdConfig(2, 3, warps, max(1, min(4096 // block_d, 12)))


class _Bwd(NamedTuple):
    """The launch, and its programs, each of which leaves a share of the three sums."""

    launch: Launch
    programs: int


@functools.lru_cache(maxsize=LAUNCHES)
def _bwd_launch(
    device: torch.device, dtype: torch.dtype, rows: int, dim: int, eps: float, streams: bool, multiprocessors: int
) -> _Bwd:
    block_d = next_power_of_2(dim)
    config = _bwd_config(block_d, dtype.itemsize)
    programs = min(multiprocessors * config.programs, cdiv(rows, config.rows))
    sizes = {"D": dim, "BLOCK_R": config.rows, "BLOCK_D": block_d, "STAGES": config.stages}
    return _Bwd(Launch(_layer_norm_bwd_kernel, (programs,), (rows, eps), **sizes, num_warps=config.warps), programs)


def why_not_layer_norm_bwd(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> str | None:
    if x.shape[-1] > _MOST_BWD:
        return f"rows of {x.shape[-1]} columns are more than {_MOST_BWD}"
    return None if x.dtype in _DTYPES else f"it takes fp32, bf16 and fp16, not {x.dtype}"


def plan_layer_norm_bwd(
    dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, eps: float
) -> Callable[..., tuple[Tensor, ...]] | None:
    """The plan, or None where something must be copied first."""
    if x.numel() == 0 or not all(each is None or each.is_contiguous() for each in (dy, dtotal, x, weight)):
        return None
    shape, dtype, dim = x.shape, x.dtype, x.shape[-1]
    streams = dtotal is not None
    launch, programs = _bwd_launch(x.device, dtype, x.numel() // dim, dim, eps, streams, multiprocessors(x.device))
    fp32 = x.new_empty(0, dtype=torch.float32)
    add_up = sums_launch(x.device, dtype, None, torch.Size((programs, 3, dim)), 0, 0, (False, False, True, True, True))

    def plan(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        dx, sums = x.new_empty(shape), fp32.new_empty(programs, 3, dim)
        launch(dy, dtotal, x, weight, dx, sums)
        vectors = x.new_empty(dim), x.new_empty(dim), x.new_empty(dim)
        add_up(None, sums, None, None, *vectors)
        return dx, *vectors

    return plan


def layer_norm_bwd(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    if x.numel() == 0:
        return x.new_empty(x.shape), *(weight.new_zeros(weight.shape) for _ in range(3))
    dtotal = None if dtotal is None else dtotal.contiguous()
    tensors = dy.contiguous(), dtotal, x.contiguous(), weight.contiguous()
    plan = plan_layer_norm_bwd(*tensors, eps)
    assert plan is not None  # all that a plan would copy is copied
    return plan(*tensors)


def aot_cases() -> list[AotCase]:
    """The widths of the towers in every dtype, the widest row, and an odd one."""

    def call(dim: int, dtype: torch.dtype) -> None:
        vector = torch.empty(dim, dtype=dtype)
        rows = torch.empty(577, dim, dtype=dtype)
        layer_norm_fwd(rows, vector, vector, vector, 1e-6)
        if dim <= _MOST_BWD:
            layer_norm_bwd(rows, None, rows, vector, 1e-6)
            layer_norm_bwd(rows, rows, rows, vector, 1e-6)

    sizes = [(dim, torch.bfloat16) for dim in (768, 1024, 1152, 1408, 2048, 4096, _MOST, 33)]
    sizes += [(1152, torch.float16), (1152, torch.float32), (_MOST, torch.float32)]
    return [AotCase(f"D{dim} {dtype}", functools.partial(call, dim, dtype)) for dim, dtype in sizes]

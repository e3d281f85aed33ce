# SPDX-License-Identifier: Apache-2.0
"""``activated_linear`` of 16-bit floats on ``csrc/activated_linear``: activations during the products of the next tile."""

import functools
import math
import struct
from collections.abc import Callable

import torch
from torch import Tensor

from vlmkernels.backends.cuda._library import TYPES, ActivatedLinearParams, EntryPoint

_linear = EntryPoint("vlmk_activated_linear")
_check = EntryPoint("vlmk_activated_linear_check")
_POINTERS = struct.Struct("4P")
_ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2}
#: Tiles of 256 x 256, two for each of the 66 clusters that an H200 runs at once. With fewer cuBLAS and a pass are faster: for one
#: image of CLIP-L@336, 577 rows, it took 20.4 us where cuBLAS takes 14.3 (H200).
MIN_TILES = 132


@functools.lru_cache(maxsize=1024)
def _prepared(shape: tuple[int, ...], dim: int, dtype: torch.dtype, activation: str) -> ActivatedLinearParams | str:
    """All but the pointers, or why the kernel doesn't take them."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, these are {dtype}"
    rows = math.prod(shape[:-1])
    if -(-rows // 256) * -(-dim // 256) < MIN_TILES:
        return f"{rows} rows of {dim} columns are fewer than {MIN_TILES} tiles of 256 x 256"
    params = ActivatedLinearParams(rows=rows, depth=shape[-1], dim=dim, activation=_ACTIVATIONS[activation], type=TYPES[dtype])
    return _check.why_not(params) or params


def why_not_activated_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> str | None:
    if not (x.is_contiguous() and weight.is_contiguous() and bias.is_contiguous()):
        return "x, weight and bias must be contiguous"
    if (x.data_ptr() | weight.data_ptr() | bias.data_ptr()) % 16:
        return "x, weight and bias must begin at multiples of 16 bytes"
    prepared = _prepared(x.shape, weight.shape[0], x.dtype, activation)
    return prepared if isinstance(prepared, str) else None


def plan_activated_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Callable[..., Tensor]:
    params = _prepared(x.shape, weight.shape[0], x.dtype, activation)
    assert not isinstance(params, str)  # why_not_activated_linear_fwd was asked
    behind, shape, device = bytes(params)[_POINTERS.size :], (*x.shape[:-1], weight.shape[0]), x.device

    def plan(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        out = x.new_empty(shape)
        _linear(_POINTERS.pack(x.data_ptr(), weight.data_ptr(), bias.data_ptr(), out.data_ptr()) + behind, device)
        return out

    return plan


def activated_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    return plan_activated_linear_fwd(x, weight, bias, activation)(x, weight, bias)

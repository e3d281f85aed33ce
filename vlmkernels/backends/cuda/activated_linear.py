# SPDX-License-Identifier: Apache-2.0
"""``activated_linear`` of 16-bit floats on ``csrc/activated_linear``: activations during the products of the next tile."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from vlmkernels.backends.cuda._library import TYPES, ActivatedLinearParams, EntryPoint

_linear = EntryPoint("vlmk_activated_linear")
_check = EntryPoint("vlmk_activated_linear_check")
ACTIVATIONS = {"gelu": 0, "gelu_tanh": 1, "quick_gelu": 2, "silu": 3}
#: Tiles of 256 x 256, two for each of the 66 clusters that an H200 runs at once. With fewer cuBLAS and a pass are faster: for one
#: image of CLIP-L@336, 577 rows, it took 20.4 us where cuBLAS takes 14.3 (H200).
MIN_TILES = 132
#: Rows of a tile, and columns of its products.
TILE = 256


def unfit(rows: int, dim: int, dtype: torch.dtype, columns: int = TILE) -> str | None:
    """Why none of these kernels takes a result of such a size; ``columns``: those of a tile's result."""
    if dtype not in (torch.bfloat16, torch.float16):
        return f"it takes bfloat16 and float16, these are {dtype}"
    if -(-rows // TILE) * -(-dim // columns) < MIN_TILES:
        return f"{rows} rows of {dim} columns are fewer than {MIN_TILES} tiles of 256 x 256"
    return None


def misplaced(names: str, *tensors: Tensor) -> str | None:
    """Why the kernels can't read these where they lie."""
    if not all(tensor.is_contiguous() for tensor in tensors):
        return f"{names} must be contiguous"
    if any(tensor.data_ptr() % 16 for tensor in tensors):
        return f"{names} must begin at multiples of 16 bytes"
    return None


@functools.lru_cache(maxsize=1024)
def _prepared(
    shape: tuple[int, ...], dim: int, dtype: torch.dtype, has_bias: bool, gated: bool, activation: str
) -> ActivatedLinearParams | str:
    """All but the pointers, or why the kernel doesn't take them."""
    rows = math.prod(shape[:-1])
    if reason := unfit(rows, dim, dtype, 128 if gated else TILE):
        return reason
    # Of the pointers the check looks at which are there.
    pointers = {"bias": 1 if has_bias else None, "up": 1 if gated else None}
    sizes = {"rows": rows, "depth": shape[-1], "dim": dim}
    params = ActivatedLinearParams(**pointers, **sizes, activation=ACTIVATIONS[activation], type=TYPES[dtype])
    return _check.why_not(params) or params


def why_not_activated_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, activation: str
) -> str | None:
    there = [tensor for tensor in (x, weight, bias, up) if tensor is not None]
    if reason := misplaced("x, weight, bias and up", *there):
        return reason
    prepared = _prepared(x.shape, weight.shape[0], x.dtype, bias is not None, up is not None, activation)
    return prepared if isinstance(prepared, str) else None


def plan_activated_linear_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, activation: str
) -> Callable[..., Tensor]:
    params = _prepared(x.shape, weight.shape[0], x.dtype, bias is not None, up is not None, activation)
    assert not isinstance(params, str)  # why_not_activated_linear_fwd was asked
    launch, shape = _linear.launcher(params, x.device), (*x.shape[:-1], weight.shape[0])

    def plan(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None) -> Tensor:
        out = x.new_empty(shape)
        launch(x, weight, bias, up, out)
        return out

    return plan


def activated_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, activation: str) -> Tensor:
    return plan_activated_linear_fwd(x, weight, bias, up, activation)(x, weight, bias, up)

# SPDX-License-Identifier: Apache-2.0
"""``feed_forward`` of 16-bit floats on ``csrc/feed_forward``: the activation, and its gradient, during the products of the next
tile."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from vlmkernels.backends.cuda._library import TYPES, EntryPoint, FeedForwardParams
from vlmkernels.backends.cuda.activated_linear import ACTIVATIONS, TILE, misplaced, unfit

_fwd = EntryPoint("vlmk_feed_forward_fwd")
_bwd = EntryPoint("vlmk_feed_forward_bwd")
_check = EntryPoint("vlmk_feed_forward_check")
#: Rows whose sums the backward pass adds up.
SUM_ROWS = 16


@functools.lru_cache(maxsize=1024)
def _prepared(shape: tuple[int, ...], dim: int, dtype: torch.dtype, activation: str) -> FeedForwardParams | str:
    """All but the pointers, or why the kernels don't take them."""
    rows = math.prod(shape[:-1])
    if reason := unfit(rows, dim, dtype):
        return reason
    sizes = {"rows": rows, "depth": shape[-1], "dim": dim}
    params = FeedForwardParams(**sizes, activation=ACTIVATIONS[activation], type=TYPES[dtype])
    return _check.why_not(params) or params


def _why_not(rows: Tensor, dim: int, activation: str, *tensors: Tensor) -> str | None:
    if reason := misplaced("all tensors", *tensors):
        return reason
    prepared = _prepared(rows.shape, dim, rows.dtype, activation)
    return prepared if isinstance(prepared, str) else None


def why_not_feed_forward_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> str | None:
    return _why_not(x, weight.shape[0], activation, x, weight, bias)


def why_not_feed_forward_bwd(dout: Tensor, weight: Tensor, before: Tensor, biased: bool, activation: str) -> str | None:
    return _why_not(dout, before.shape[-1], activation, dout, weight, before)


def _launcher(entry: EntryPoint, rows: Tensor, dim: int, activation: str) -> Callable[..., None]:
    """``entry.launcher`` for rows like these: of x, weight, bias, before, turned, out and sums."""
    params = _prepared(rows.shape, dim, rows.dtype, activation)
    assert not isinstance(params, str)  # why_not_... was asked
    return entry.launcher(params, rows.device)


def plan_feed_forward_fwd(
    x: Tensor, weight: Tensor, bias: Tensor, activation: str
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    launch, shape = _launcher(_fwd, x, weight.shape[0], activation), (*x.shape[:-1], weight.shape[0])

    def plan(x: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, Tensor]:
        out, before = x.new_empty(shape), x.new_empty(shape)
        launch(x, weight, bias, before, None, out, None)
        return out, before

    return plan


def feed_forward_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    return plan_feed_forward_fwd(x, weight, bias, activation)(x, weight, bias)


def plan_feed_forward_bwd(
    dout: Tensor, weight: Tensor, before: Tensor, biased: bool, activation: str
) -> Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
    shape, turned_shape, dim = before.shape, weight.shape[::-1], before.shape[-1]
    launch, tiles = _launcher(_bwd, dout, dim, activation), -(-(before.numel() // dim) // TILE)
    fp32 = before.new_empty(0, dtype=torch.float32)

    def plan(dout: Tensor, weight: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
        out, turned = before.new_empty(shape), weight.new_empty(turned_shape)
        sums = fp32.new_empty(tiles * (TILE // SUM_ROWS), dim) if biased else None
        launch(dout, weight, None, before, turned, out, sums)
        return out, before.new_empty(0) if sums is None else sums.sum(0).to(before.dtype)

    return plan


def feed_forward_bwd(dout: Tensor, weight: Tensor, before: Tensor, biased: bool, activation: str) -> tuple[Tensor, Tensor]:
    return plan_feed_forward_bwd(dout, weight, before, biased, activation)(dout, weight, before)

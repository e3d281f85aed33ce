# SPDX-License-Identifier: Apache-2.0
"""``feed_forward`` of 16-bit floats on ``csrc/feed_forward``: the activation, and its gradient, during the products of the next
tile."""

import functools
import math

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


def _filled(rows: Tensor, dim: int, activation: str, **tensors: Tensor | None) -> bytes:
    prepared = _prepared(rows.shape, dim, rows.dtype, activation)
    assert not isinstance(prepared, str)  # why_not_... was asked
    params = FeedForwardParams.from_buffer_copy(prepared)
    for name, tensor in tensors.items():
        setattr(params, name, None if tensor is None else tensor.data_ptr())
    return bytes(params)


def feed_forward_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    out, before = (x.new_empty(*x.shape[:-1], weight.shape[0]) for _ in range(2))
    _fwd(_filled(x, weight.shape[0], activation, x=x, weight=weight, bias=bias, before=before, out=out), x.device)
    return out, before


def feed_forward_bwd(dout: Tensor, weight: Tensor, before: Tensor, biased: bool, activation: str) -> tuple[Tensor, Tensor]:
    dim, tiles = before.shape[-1], -(-(before.numel() // before.shape[-1]) // TILE)
    out = before.new_empty(before.shape)
    sums = before.new_empty(tiles * (TILE // SUM_ROWS), dim, dtype=torch.float32) if biased else None
    tensors = {"x": dout, "weight": weight, "before": before, "turned": weight.new_empty(weight.shape[::-1]), "out": out}
    _bwd(_filled(dout, dim, activation, sums=sums, **tensors), dout.device)
    return out, before.new_empty(0) if sums is None else sums.sum(0).to(before.dtype)

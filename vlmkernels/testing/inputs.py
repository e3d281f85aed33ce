# SPDX-License-Identifier: Apache-2.0
"""Inputs as models hand them over: queries, keys and values as new tensors, and as the views that come of a fused projection."""

from collections.abc import Callable

import torch
from torch import Tensor

Sizes = tuple[int, int, int, int, int, int]  # B, Sq, Sk, H, Hk, D
QKV = tuple[Tensor, Tensor, Tensor]


def contiguous(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> QKV:
    """Three tensors of their own: ``q [B, Sq, H, D]``, ``k`` and ``v [B, Sk, Hk, D]``."""
    batch, queries, keys, heads, kv_heads, dim = sizes
    q, k, v = _normal(dtype, device, (batch, queries, heads, dim), *[(batch, keys, kv_heads, dim)] * 2)
    return q, k, v


def transposed(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> QKV:
    """Stored ``[B, H, S, D]``, as Transformers keeps them."""
    batch, queries, keys, heads, kv_heads, dim = sizes
    q, k, v = _normal(dtype, device, (batch, heads, queries, dim), *[(batch, kv_heads, keys, dim)] * 2)
    return q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)


def packed_qkv(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> QKV:
    """Slices of one ``[B, S, (H + 2 Hk) D]`` projection; keys and queries that are fewer are the first of it."""
    batch, queries, keys, heads, kv_heads, dim = sizes
    (qkv,) = _normal(dtype, device, (batch, max(queries, keys), heads + 2 * kv_heads, dim))
    q, k, v = qkv.split([heads, kv_heads, kv_heads], dim=2)
    return q[:, :queries], k[:, :keys], v[:, :keys]


def strided(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> QKV:
    """Every second token and a slice of the channels of larger tensors: no stride but the last is what its shape says."""
    batch, queries, keys, heads, kv_heads, dim = sizes
    wide = [(batch, 2 * tokens, count, dim + 8) for tokens, count in ((queries, heads), (keys, kv_heads), (keys, kv_heads))]
    q, k, v = (x[:, ::2, :, :dim] for x in _normal(dtype, device, *wide))
    return q, k, v


def offset(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> QKV:
    """Tensors that begin one element into their storage, so that no row is aligned to more than its element."""
    shapes = [tuple(x.shape) for x in contiguous(sizes, dtype, torch.device("meta"))]
    q, k, v = (_normal(dtype, device, (shape.numel() + 1,))[0][1:].view(shape) for shape in map(torch.Size, shapes))
    return q, k, v


def expanded(sizes: Sizes, dtype: torch.dtype, device: torch.device) -> QKV:
    """Queries that every batch entry shares, as learned queries are: stride 0 in the batch."""
    q, k, v = contiguous(sizes, dtype, device)
    return q[:1].expand(sizes[0], -1, -1, -1), k, v


#: Every way above, by name, to parametrise a test with.
QKV_VIEWS: dict[str, Callable[[Sizes, torch.dtype, torch.device], QKV]] = {
    make.__name__: make for make in (contiguous, transposed, packed_qkv, strided, offset, expanded)
}
#: Those that the copy engine of Hopper can't address, and the CUDA kernel refuses.
NOT_ADDRESSABLE = ("offset", "expanded")


def _normal(dtype: torch.dtype, device: torch.device, *shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape, device=device).to(dtype) for shape in shapes]

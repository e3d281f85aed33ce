# SPDX-License-Identifier: Apache-2.0
"""Attention through FlashAttention, for the masks that it takes exactly: none, and causal.

Versions differ in what they return for a query that sees no key. With a causal mask these are the first ``Sq - Sk`` queries,
which is known without a look at any value: the library never gets them, and their rows are put before what it returns.
"""

import torch

from vlmkernels.backends.flash_attn import library
from vlmkernels.backends.flash_attn._libraries import Library

DTYPES = (torch.bfloat16, torch.float16)
HEAD_DIMS = range(8, 257, 8)


def _library(q: torch.Tensor) -> Library:
    found = library(q.device)
    assert not isinstance(found, str), found  # the package's why_not says so before
    return found


def why_not_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    save_lse: bool,
) -> str | None:
    if start is not None or stop is not None:
        return "it takes no ranges, only causal=True or no mask: leave the backend free, triton takes every range"
    if q.dtype not in DTYPES:
        return f"it takes bfloat16 and float16, these are {q.dtype}"
    dim, value_dim = q.shape[3], v.shape[3]
    if dim not in HEAD_DIMS or value_dim not in HEAD_DIMS:
        return f"it takes head dims of 8 to 256 in steps of 8, these are {dim} and {value_dim}"
    if not scale > 0:
        return f"it needs a positive scale, got {scale}"
    return _library(q).why_not_fwd(q, k, v)


def why_not_attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> str | None:
    reason = why_not_attention_fwd(q, k, v, start, stop, causal, scale, softcap, True)
    return reason or _library(q).why_not_bwd(dlse, q, k, v, softcap)


def _num_blind(q: torch.Tensor, k: torch.Tensor, causal: bool) -> int:
    """How many queries, the first ones, see no key."""
    queries, keys = q.shape[1], k.shape[1]
    return max(queries - keys, 0) if causal or keys == 0 else 0


def _behind(blind: int, x: torch.Tensor, dim: int, value: float) -> torch.Tensor:
    """``x`` behind ``blind`` rows of ``value``, contiguous."""
    if not blind:
        return x.contiguous()
    shape = list(x.shape)
    shape[dim] = blind
    return torch.cat([x.new_full(shape, value), x], dim)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy where rows don't begin at multiples of 16 bytes, which is how the kernels read them."""
    odd = x.data_ptr() % 16 or any(stride % 8 for stride in x.stride()[:3])
    return x.clone(memory_format=torch.contiguous_format) if odd else x


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    save_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    blind = _num_blind(q, k, causal)
    seeing = q[:, blind:]
    if seeing.numel():
        with torch.no_grad():  # its function is differentiable; here the gradient is the operator's business
            out, lse = _library(q).fwd(_aligned(seeing), _aligned(k), _aligned(v), causal, scale, softcap)
    else:
        batch, queries, heads, _ = seeing.shape
        out = q.new_empty(batch, queries, heads, v.shape[3])
        lse = q.new_empty(batch, heads, queries, dtype=torch.float32)
    out = _behind(blind, out, 1, 0.0)
    return out, _behind(blind, lse, 2, float("-inf")) if save_lse else q.new_empty(0, dtype=torch.float32)


def attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    blind = _num_blind(q, k, causal)
    seeing = q[:, blind:]
    if not seeing.numel():
        return q.new_zeros(q.shape), k.new_zeros(k.numel() + v.numel())
    dlse = None if dlse is None else dlse[:, :, blind:].contiguous()
    dout, seeing, k, v, out = (_aligned(x) for x in (dout[:, blind:], seeing, k, v, out[:, blind:]))
    lse = lse[:, :, blind:].contiguous()
    dq, dkv = _library(q).bwd(dout, dlse, seeing, k, v, out, lse, causal, scale, softcap)
    return _behind(blind, dq, 1, 0.0), dkv

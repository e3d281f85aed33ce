# SPDX-License-Identifier: Apache-2.0
"""``rope`` in stock torch operations: full-width tables, one fused multiply-add for each tensor, ``rms_norm`` for the norm."""

import torch
import torch.nn.functional as F


def _full(table: torch.Tensor, like: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """``[..., S, R/2]`` to ``[..., S, 1, R]``: the value of each channel, in the dtype of the mathematics."""
    table = table.to(torch.promote_types(like.dtype, torch.float32))
    table = table.repeat_interleave(2, -1) if interleaved else torch.cat((table, table), -1)
    return table.unsqueeze(-2)


def _partner(x: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """For each channel the other one of its pair, with the sign that the rotation gives it."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)
    half = x.shape[-1] // 2
    return torch.cat((-x[..., half:], x[..., :half]), -1)


def _turn(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """``x`` rotated, in the dtype of ``cos``; ``cos`` and ``sin`` as ``_full`` makes them."""
    width = cos.shape[-1]
    x = x.to(cos.dtype)
    turned = torch.addcmul(x[..., :width] * cos, _partner(x[..., :width], interleaved), sin)
    return turned if width == x.shape[-1] else torch.cat((turned, x[..., width:]), -1)


def _fwd(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None, eps: float, interleaved: bool
) -> torch.Tensor:
    dtype = x.dtype
    if weight is not None:
        x = F.rms_norm(x.to(cos.dtype), x.shape[-1:], weight.to(cos.dtype), eps)
    return _turn(x, cos, sin, interleaved).to(dtype)


def _owned(y: torch.Tensor) -> torch.Tensor:
    """``y`` contiguous: elementwise operations keep the order of the dimensions in memory that their input has."""
    return y.contiguous()


def _bwd(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    turned = _turn(grad, cos, -sin, interleaved)
    if weight is None or x is None:
        return _owned(turned.to(grad.dtype)), grad.new_empty(0)
    normed = F.rms_norm(x.to(cos.dtype), x.shape[-1:], None, eps)
    grad_weight = torch.einsum("...d,...d->d", turned, normed)
    turned = turned * weight.to(cos.dtype)
    along = torch.einsum("...d,...d->...", turned, normed).unsqueeze(-1) / x.shape[-1]
    scale = torch.rsqrt(torch.linalg.vecdot(x.to(cos.dtype), x.to(cos.dtype)).unsqueeze(-1) / x.shape[-1] + eps)
    return _owned((torch.addcmul(turned, normed, along, value=-1) * scale).to(grad.dtype)), grad_weight.to(weight.dtype)


def rope_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    cos, sin = _full(cos, q, interleaved), _full(sin, q, interleaved)
    return _owned(_fwd(q, cos, sin, q_weight, eps, interleaved)), _owned(_fwd(k, cos, sin, k_weight, eps, interleaved))


def rope_bwd(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    cos, sin = _full(cos, grad_q, interleaved), _full(sin, grad_q, interleaved)
    grad_q, grad_q_weight = _bwd(grad_q, q, cos, sin, q_weight, eps, interleaved)
    grad_k, grad_k_weight = _bwd(grad_k, k, cos, sin, k_weight, eps, interleaved)
    return grad_q, grad_k, grad_q_weight, grad_k_weight


def rope_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    interleaved: bool,
) -> None:
    head_dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    cos, sin = _full(cos, qkv, interleaved), _full(sin, qkv, interleaved)
    start = 0
    for heads, weight in ((num_heads, q_weight), (num_kv_heads, k_weight)):
        part = qkv.narrow(-1, start, heads * head_dim).unflatten(-1, (heads, head_dim))
        part.copy_(_fwd(part, cos, sin, weight, eps, interleaved))
        start += heads * head_dim


def rope_qkv_bwd(
    grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_kv_heads: int, interleaved: bool
) -> torch.Tensor:
    out = grad.clone(memory_format=torch.contiguous_format)
    rope_qkv_(out, cos, -sin, None, None, num_heads, num_kv_heads, 0.0, interleaved)
    return out

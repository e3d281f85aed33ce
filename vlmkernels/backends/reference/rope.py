# SPDX-License-Identifier: Apache-2.0
"""The meaning of ``rope``: a 2 x 2 rotation for each pair of channels, after an optional RMSNorm of the head."""

import torch


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, interleaved: bool) -> torch.Tensor:
    """Rotate the pairs of ``x`` ``[..., S, H, D]``; ``cos`` and ``sin`` are ``[..., S, R/2]``."""
    half = cos.shape[-1]
    cos, sin = cos.unsqueeze(-2).to(x.dtype), sin.unsqueeze(-2).to(x.dtype)
    out = x.clone(memory_format=torch.contiguous_format)
    first, second = (slice(0, 2 * half, 2), slice(1, 2 * half, 2)) if interleaved else (slice(0, half), slice(half, 2 * half))
    a, b = x[..., first], x[..., second]
    out[..., first] = a * cos - b * sin
    out[..., second] = a * sin + b * cos
    return out


def _fwd(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None, eps: float, interleaved: bool
) -> torch.Tensor:
    y = _wide(x)
    if weight is not None:
        y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt() * weight.to(y.dtype)
    return _rotate(y, cos, sin, interleaved).to(x.dtype)


def _bwd(
    grad: torch.Tensor,
    x: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Gradients of the input and of the weight. The inverse of a rotation is the rotation by the negative angle."""
    turned = _rotate(_wide(grad), cos, -sin, interleaved)
    if weight is None or x is None:
        return turned.to(grad.dtype), grad.new_empty(0)
    x = _wide(x)
    scale = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    normed = x * scale
    grad_weight = (turned * normed).flatten(0, -2).sum(0)
    grad_normed = turned * weight.to(x.dtype)
    grad_x = scale * (grad_normed - normed * (grad_normed * normed).mean(-1, keepdim=True))
    return grad_x.to(grad.dtype), grad_weight.to(weight.dtype)


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
    return _fwd(q, cos, sin, q_weight, eps, interleaved), _fwd(k, cos, sin, k_weight, eps, interleaved)


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
    grad_q, grad_q_weight = _bwd(grad_q, q, cos, sin, q_weight, eps, interleaved)
    grad_k, grad_k_weight = _bwd(grad_k, k, cos, sin, k_weight, eps, interleaved)
    return grad_q, grad_k, grad_q_weight, grad_k_weight


def _split(qkv: torch.Tensor, num_heads: int, num_kv_heads: int) -> list[torch.Tensor]:
    """Views of q, k and v, each ``[..., heads, D]``."""
    heads = num_heads + 2 * num_kv_heads
    return list(qkv.unflatten(-1, (heads, qkv.shape[-1] // heads)).split([num_heads, num_kv_heads, num_kv_heads], -2))


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
    q, k, _ = _split(qkv, num_heads, num_kv_heads)
    q.copy_(_fwd(q, cos, sin, q_weight, eps, interleaved))
    k.copy_(_fwd(k, cos, sin, k_weight, eps, interleaved))


def rope_qkv_bwd(
    grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_kv_heads: int, interleaved: bool
) -> torch.Tensor:
    out = grad.clone(memory_format=torch.contiguous_format)
    rope_qkv_(out, cos, -sin, None, None, num_heads, num_kv_heads, 0.0, interleaved)
    return out

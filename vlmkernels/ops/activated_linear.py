# SPDX-License-Identifier: Apache-2.0
"""A linear layer and the activation behind it, without gradients: the first half of a feed-forward where nobody learns."""

from typing import Any

import torch

from vlmkernels.ops._op import Op, bad_argument, forced_backend

#: GELU with erf, GELU with tanh, and ``x sigmoid(1.702 x)``. Their order is that of ``VLMK_GELU`` and the others.
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu")


def _fake(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_fwd = Op(
    "activated_linear",
    "activated_linear_fwd(Tensor x, Tensor weight, Tensor bias, str activation, str backend) -> Tensor",
    _fake,
    complete=True,
)


def activated_linear(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str, *, backend: str | None = None
) -> torch.Tensor:
    """``activation(x weight^T + bias)``. The product may be rounded to the dtype before the activation, as by two layers.

    Args:
        x: ``[..., K]``; fp32, bf16, fp16 or fp64.
        weight: ``[N, K]`` of the dtype of ``x``.
        bias: ``[N]`` of that dtype.
        activation: one of ``ACTIVATIONS``.
        backend: the backend that must run; by default the first that can.

    Returns:
        ``[..., N]``, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, an unknown activation, or a gradient that is needed.
        BackendError: the forced backend can't run these inputs.
    """
    out: torch.Tensor = _fwd.call((activation, forced_backend(backend)), (x, weight, bias), _unplanned)
    return out


def _unplanned(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, activation: str, name: str) -> Any:
    if x.dim() < 1 or not x.is_floating_point():
        raise bad_argument("x", f"{tuple(x.shape)} {x.dtype}", "[..., K] of a floating dtype")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise bad_argument("weight", tuple(weight.shape), f"[N, {x.shape[-1]}]")
    if bias.shape != weight.shape[:1]:
        raise bad_argument("bias", tuple(bias.shape), f"[{weight.shape[0]}]")
    for what, tensor in (("weight", weight), ("bias", bias)):
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise bad_argument(what, f"{tensor.dtype} on {tensor.device}", f"{x.dtype} on {x.device}, as x has")
    if activation not in ACTIVATIONS:
        raise bad_argument("activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad or bias.requires_grad):
        raise bad_argument("x, weight, bias", "a tensor that requires grad", "none, or torch.no_grad(): there is no gradient")
    return _fwd(x, weight, bias, activation, name)

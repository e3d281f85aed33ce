# SPDX-License-Identifier: Apache-2.0
"""A linear layer and the activation behind it, without gradients: the first half of a feed-forward where nobody learns, of two
layers or gated."""

from typing import Any

import torch

from vlmkernels.ops._op import Op, bad_argument, forced_backend

#: GELU with erf, GELU with tanh, ``x sigmoid(1.702 x)``, ``x sigmoid(x)``; in the order of ``VLMK_GELU`` and the others.
ACTIVATIONS = ("gelu", "gelu_tanh", "quick_gelu", "silu")


def _fake(x: torch.Tensor, weight: torch.Tensor, *_: Any) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


_fwd = Op(
    "activated_linear",
    "activated_linear_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor? up, str activation, str backend) -> Tensor",
    _fake,
    complete=True,
)


def activated_linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    activation: str,
    *,
    up: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """``activation(x weight^T + bias)``, with ``up`` times ``x up^T``. Products may be rounded to the dtype first, as by layers.

    Args:
        x: ``[..., K]``; fp32, bf16, fp16 or fp64.
        weight: ``[N, K]`` of the dtype of ``x``.
        bias: ``[N]`` of that dtype, or None.
        activation: one of ``ACTIVATIONS``.
        up: None, or ``[N, K]`` of that dtype: ``weight`` is the gate then.
        backend: the backend that must run; by default the first that can.

    Returns:
        ``[..., N]``, contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, an unknown activation, or a gradient that is needed.
        BackendError: the forced backend can't run these inputs.
    """
    settings = (activation, forced_backend(backend))
    out: torch.Tensor = _fwd.call(settings, (x, weight, bias, up), _unplanned)
    return out


def _unplanned(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, up: torch.Tensor | None, activation: str, name: str
) -> Any:
    if x.dim() < 1 or not x.is_floating_point():
        raise bad_argument("x", f"{tuple(x.shape)} {x.dtype}", "[..., K] of a floating dtype")
    if weight.dim() != 2 or weight.shape[1] != x.shape[-1]:
        raise bad_argument("weight", tuple(weight.shape), f"[N, {x.shape[-1]}]")
    for what, tensor, shape in (("weight", weight, weight.shape), ("bias", bias, weight.shape[:1]), ("up", up, weight.shape)):
        if tensor is None:
            continue
        if tensor.shape != shape:
            raise bad_argument(what, tuple(tensor.shape), f"{list(shape)}")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise bad_argument(what, f"{tensor.dtype} on {tensor.device}", f"{x.dtype} on {x.device}, as x has")
    if activation not in ACTIVATIONS:
        raise bad_argument("activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in (x, weight, bias, up)):
        raise bad_argument("x, weight, bias, up", "a tensor that requires grad", "none, or torch.no_grad(): there is no gradient")
    return _fwd(x, weight, bias, up, activation, name)

# SPDX-License-Identifier: Apache-2.0
"""A linear layer, the sum and the LayerNorm behind it, as at the end of a block that normalises last; without gradients."""

from typing import Any

import torch
from torch import Tensor

from vlmkernels.ops._op import Op, bad_argument, forced_backend


def linear_add_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    residual: Tensor,
    norm_weight: Tensor,
    norm_bias: Tensor,
    *,
    eps: float,
    backend: str | None = None,
) -> Tensor:
    """``LayerNorm(x weight.T + bias + residual)``: ``[..., N]``.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        residual: ``[..., N]``.
        norm_weight: ``[N]``, as ``norm_bias``.
        eps: added to the variance.
        backend: the backend that must run; by default the first that can.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; an argument that needs a gradient.
        BackendError: the forced backend can't run these inputs.
    """
    if residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise bad_argument("residual", f"shape {tuple(residual.shape)}", f"{(*x.shape[:-1], weight.shape[0])}")
    settings = (float(eps), forced_backend(backend))
    tensors = (_rows(x), weight, bias, _rows(residual), norm_weight, norm_bias)
    plan = _fwd.planned(settings, tensors)
    if plan is not None:
        y: Tensor = plan(*tensors)
    else:
        _check(*tensors)
        y = _fwd(*tensors, *settings)
        _fwd.plan(settings, tensors, (*tensors, *settings))
    return y.view(residual.shape)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> None:
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise bad_argument("weight", f"shape {tuple(weight.shape)}", f"[N, {x.shape[1]}]")
    for name, vector in (("bias", bias), ("norm_weight", norm_weight), ("norm_bias", norm_bias)):
        if vector is not None and vector.shape != weight.shape[:1]:
            raise bad_argument(name, f"shape {tuple(vector.shape)}", f"[{weight.shape[0]}]")
    named = {"x": x, "weight": weight, "bias": bias, "residual": residual, "norm_weight": norm_weight, "norm_bias": norm_bias}
    for name, tensor in named.items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise bad_argument(name, f"{tensor.dtype} on {tensor.device}", f"x's {x.dtype} on {x.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise bad_argument(name, "a tensor that needs a gradient", "none, or torch.no_grad()")


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_fwd = Op(
    "linear_add_norm",
    "linear_add_norm_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor norm_weight, Tensor norm_bias, "
    "float eps, str backend) -> Tensor",
    _fake,
    complete=True,
)

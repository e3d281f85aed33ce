# SPDX-License-Identifier: Apache-2.0
"""Linear layers with what follows them in a feed-forward or behind an attention, for inference.

Layers of vlmkernels.nn call these where nothing learns; there is no backward pass.
"""

from typing import Any

import torch
from torch import Tensor

from vlmkernels.ops._op import Op, bad_argument, forced_backend


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor | None, *, backend: str | None = None) -> Tensor:
    """``gelu(x weight.T + bias)``, GELU with erf: ``[..., N]``.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        backend: the backend that must run; by default the first that can.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; an argument that needs a gradient.
        BackendError: the forced backend can't run these inputs.
    """
    rows = _rows(x)
    y: Tensor = _call(_gelu, (rows, weight, bias), (), backend)
    return y.view(*x.shape[:-1], weight.shape[0])


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
    tensors = (_rows(x), weight, bias, _rows(residual), norm_weight, norm_bias)
    y: Tensor = _call(_add_norm, tensors, (eps,), backend)
    return y.view(residual.shape)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _call(op: Op, tensors: tuple[Tensor | None, ...], options: tuple[Any, ...], backend: str | None) -> Any:
    settings = (*options, forced_backend(backend))
    plan = op.planned(settings, tensors)
    if plan is not None:
        return plan(*tensors)
    _check(*tensors)
    arguments = (*tensors, *settings)
    y = op(*arguments)
    op.plan(settings, tensors, arguments)
    return y


def _check(x: Any, weight: Any, *vectors: Tensor | None) -> None:
    if weight.dim() != 2 or weight.shape[1] != x.shape[1]:
        raise bad_argument("weight", f"shape {tuple(weight.shape)}", f"[N, {x.shape[1]}]")
    names = ("x", "weight", "bias", "residual", "norm_weight", "norm_bias")
    for name, tensor in zip(names, (x, weight, *vectors), strict=False):
        if tensor is None:
            continue
        if name not in ("x", "weight", "residual") and tensor.shape != weight.shape[:1]:
            raise bad_argument(name, f"shape {tuple(tensor.shape)}", f"[{weight.shape[0]}]")
        if tensor.dtype != x.dtype or tensor.device != x.device:
            raise bad_argument(name, f"{tensor.dtype} on {tensor.device}", f"x's {x.dtype} on {x.device}")
        if tensor.requires_grad and torch.is_grad_enabled():
            raise bad_argument(name, "a tensor that needs a gradient", "none, or torch.no_grad()")


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_gelu = Op("linear", "linear_gelu_fwd(Tensor x, Tensor weight, Tensor? bias, str backend) -> Tensor", _fake, complete=True)
_add_norm = Op(
    "linear",
    "linear_add_norm_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor norm_weight, Tensor norm_bias, "
    "float eps, str backend) -> Tensor",
    _fake,
    complete=True,
)

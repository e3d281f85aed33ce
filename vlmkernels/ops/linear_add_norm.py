# SPDX-License-Identifier: Apache-2.0
"""A linear layer, the sum and the LayerNorm behind it, as at the end of a block that normalises last."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmkernels.ops._op import Op, bad_argument, forced_backend
from vlmkernels.ops.layer_norm import layer_norm_bwd


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

    It is differentiable once. The sum is then a tensor of its own, which the backward pass reads: of it come the gradients of
    ``bias`` and of the norm, in one pass.

    Args:
        x: ``[..., K]``.
        weight: ``[N, K]``.
        bias: ``[N]`` or None.
        residual: ``[..., N]``.
        norm_weight: ``[N]``, as ``norm_bias``.
        eps: added to the variance.
        backend: the backend that must run; by default the first that can.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit.
        BackendError: the forced backend can't run these inputs.
    """
    if x.dim() < 1:
        raise bad_argument("x", "a tensor without dimensions", "[..., K]")
    if weight.dim() != 2:
        raise bad_argument("weight", f"shape {tuple(weight.shape)}", f"[N, {x.shape[-1]}]")
    if residual.shape != (*x.shape[:-1], weight.shape[0]):
        raise bad_argument("residual", f"shape {tuple(residual.shape)}", f"{(*x.shape[:-1], weight.shape[0])}")
    tensors = (_rows(x), weight, bias, _rows(residual), norm_weight, norm_bias)
    settings = (float(eps), forced_backend(backend))
    if torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors):
        _check(*tensors)
        out: Tensor = _LinearAddNorm.apply(x, weight, bias, residual, norm_weight, norm_bias, *settings)
        return out
    y: Tensor = _fwd.call(settings, tensors, _unplanned)
    return y.view(residual.shape)


def _rows(x: Tensor) -> Tensor:
    return x if x.dim() == 2 else x.reshape(-1, x.shape[-1])


def _unplanned(*arguments: Any) -> Any:
    _check(*arguments[:6])
    return _fwd(*arguments)


def _check(x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor) -> None:
    if not x.is_floating_point():
        raise bad_argument("x", x.dtype, "a floating dtype")
    if weight.shape[1] != x.shape[1]:
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


class _LinearAddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight, bias, residual, norm_weight, norm_bias, eps, backend = arguments
        total = F.linear(x, weight, bias) + residual
        ctx.save_for_backward(x, weight, total, norm_weight)
        ctx.eps, ctx.backend = eps, backend
        return F.layer_norm(total, norm_weight.shape, norm_weight, norm_bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, total, norm_weight = ctx.saved_tensors
        needs_x, needs_weight, *_ = ctx.needs_input_grad
        dtotal, dbias, *dnorm = layer_norm_bwd(dy, None, total, norm_weight, ctx.eps, ctx.backend)
        dx = dtotal @ weight if needs_x else None
        dweight = dtotal.flatten(0, -2).t() @ x.flatten(0, -2) if needs_weight else None
        return dx, dweight, dbias if ctx.needs_input_grad[2] else None, dtotal, *dnorm, None, None


def _fake(x: Tensor, weight: Tensor, *_: Any) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


_fwd = Op(
    "linear_add_norm",
    "linear_add_norm_fwd(Tensor x, Tensor weight, Tensor? bias, Tensor residual, Tensor norm_weight, Tensor norm_bias, "
    "float eps, str backend) -> Tensor",
    _fake,
    complete=True,
)

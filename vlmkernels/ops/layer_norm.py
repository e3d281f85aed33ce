# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of a residual stream, and in the same pass the stream with the bias of what will be added to it. The backward pass is
one pass too, and gives the sums over rows of all its gradients; ``vlmkernels.ops.linear_add_norm`` has the same."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlmkernels.ops._op import Op, bad_argument, forced_backend


def _fake(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_fwd = Op(
    "layer_norm",
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, Tensor shift, float eps, str backend) -> (Tensor, Tensor)",
    _fake,
    complete=True,
)


def _bwd_fake(
    dy: torch.Tensor, dtotal: torch.Tensor | None, x: torch.Tensor, weight: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, ...]:
    return x.new_empty(x.shape), *(x.new_empty(weight.shape) for _ in range(3))


#: The gradient of x, to which that of the stream is added, and the gradients of shift (of a bias in x where there is no stream:
#: sums over the rows of ``dtotal``, or of the gradient of x), weight and bias.
layer_norm_bwd = Op(
    "layer_norm",
    "layer_norm_bwd(Tensor dy, Tensor? dtotal, Tensor x, Tensor weight, float eps, str backend) "
    "-> (Tensor, Tensor, Tensor, Tensor)",
    _bwd_fake,
)


def layer_norm(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor,
    shift: torch.Tensor,
    eps: float = 1e-5,
    *,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """``(x - mean) / sqrt(var + eps) * weight + bias`` over the last dimension, and ``x + shift``.

    A product adds to the second in place: ``shift`` is its bias, which cuBLAS can't add beside what is there. Both are
    differentiable once.

    Args:
        x: ``[..., D]``; fp32, bf16, fp16 or fp64. The mathematics is in fp32 (fp64 for fp64).
        weight, bias, shift: ``[D]`` of the dtype of ``x``.
        eps: added to the variance.
        backend: the backend that must run; by default the first that can.

    Returns:
        Both like ``x``, new and contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit.
        BackendError: the forced backend can't run these inputs.
    """
    tensors = (x, weight, bias, shift)
    settings = (float(eps), forced_backend(backend))
    out: tuple[torch.Tensor, torch.Tensor]
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        out = _LayerNorm.apply(*tensors, *settings)
    else:
        out = _fwd.call(settings, tensors, _unplanned)
    return out


def _unplanned(*arguments: Any) -> Any:
    _check(*arguments[:4])
    return _fwd(*arguments)


def _check(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shift: torch.Tensor) -> None:
    if x.dim() < 1 or x.shape[-1] == 0 or not x.is_floating_point():
        raise bad_argument("x", f"{tuple(x.shape)} {x.dtype}", "[..., D] of a floating dtype")
    for what, tensor in (("weight", weight), ("bias", bias), ("shift", shift)):
        if tensor.shape != x.shape[-1:] or tensor.dtype != x.dtype or tensor.device != x.device:
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise bad_argument(what, got, f"[{x.shape[-1]}] {x.dtype} on {x.device}, as x has")


class _LayerNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        x, weight, _, _, eps, backend = arguments
        ctx.save_for_backward(x, weight)
        ctx.eps, ctx.backend = eps, backend
        return _fwd.call(arguments[4:], arguments[:4], _unplanned)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor, dtotal: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        dx, dshift, dweight, dbias = layer_norm_bwd.call((ctx.eps, ctx.backend), (dy, dtotal, x, weight), layer_norm_bwd)
        return dx, dweight, dbias, dshift, None, None

# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of a residual stream, and in the same pass the stream with the bias of what will be added to it, without gradients;
and the backward pass of a LayerNorm with the sums over rows of all its gradients, for ``vlmkernels.ops.linear_add_norm``."""

from typing import Any

import torch

from vlmkernels.ops._op import Op, bad_argument, forced_backend


def _fake(x: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape)


_fwd = Op(
    "layer_norm",
    "layer_norm_fwd(Tensor x, Tensor weight, Tensor bias, Tensor shift, float eps, str backend) -> (Tensor, Tensor)",
    _fake,
    complete=True,
)


def _bwd_fake(dy: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    return x.new_empty(x.shape), *(x.new_empty(weight.shape) for _ in range(3))


#: The gradient of x, its sum over rows (that of a bias in x), and the gradients of weight and bias.
layer_norm_bwd = Op(
    "layer_norm",
    "layer_norm_bwd(Tensor dy, Tensor x, Tensor weight, float eps, str backend) -> (Tensor, Tensor, Tensor, Tensor)",
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

    A product adds to the second in place: ``shift`` is its bias, which cuBLAS can't add beside what is there.

    Args:
        x: ``[..., D]``; fp32, bf16, fp16 or fp64. The mathematics is in fp32 (fp64 for fp64).
        weight, bias, shift: ``[D]`` of the dtype of ``x``.
        eps: added to the variance.
        backend: the backend that must run; by default the first that can.

    Returns:
        Both like ``x``, new and contiguous.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, or a gradient that is needed.
        BackendError: the forced backend can't run these inputs.
    """
    tensors = (x, weight, bias, shift)
    out: tuple[torch.Tensor, torch.Tensor] = _fwd.call((float(eps), forced_backend(backend)), tensors, _unplanned)
    return out


def _unplanned(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, shift: torch.Tensor, eps: float, name: str) -> Any:
    if x.dim() < 1 or x.shape[-1] == 0 or not x.is_floating_point():
        raise bad_argument("x", f"{tuple(x.shape)} {x.dtype}", "[..., D] of a floating dtype")
    for what, tensor in (("weight", weight), ("bias", bias), ("shift", shift)):
        if tensor.shape != x.shape[-1:] or tensor.dtype != x.dtype or tensor.device != x.device:
            got = f"{tuple(tensor.shape)} {tensor.dtype} on {tensor.device}"
            raise bad_argument(what, got, f"[{x.shape[-1]}] {x.dtype} on {x.device}, as x has")
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, weight, bias, shift)):
        raise bad_argument("x, weight, bias, shift", "a tensor that requires grad", "none, or torch.no_grad()")
    return _fwd(x, weight, bias, shift, eps, name)

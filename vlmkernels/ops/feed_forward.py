# SPDX-License-Identifier: Apache-2.0
"""A feed-forward of two layers that learns: the activation is part of the first layer's product, its gradient of a product of the
second's."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmkernels.ops._add_product import add_in_place
from vlmkernels.ops._op import Op, bad_argument, forced_backend, refuse_leaf
from vlmkernels.ops.activated_linear import ACTIVATIONS as ALL_ACTIVATIONS

#: GELU with erf, GELU with tanh, ``x sigmoid(1.702 x)``.
ACTIVATIONS = ALL_ACTIVATIONS[:3]
#: Numbers before the activation: 132 tiles of 256 x 256, below which cuBLAS and a pass are faster
#: (``vlmkernels/backends/cuda/activated_linear.py``).
MANY = 132 * 256**2


def feed_forward(
    x: Tensor,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor | None,
    activation: str,
    *,
    total: Tensor | None = None,
    backend: str | None = None,
) -> Tensor:
    """``activation(x weight1^T + bias1) weight2^T + bias2``, or added to ``total`` where it is; differentiable once.

    What stands before the activation and behind it is kept for the backward pass, as layer by layer.

    Args:
        x: ``[..., K]``; fp32, bf16, fp16 or fp64.
        weight1: ``[N, K]``, like all others of the dtype of ``x``.
        bias1: ``[N]``.
        weight2: ``[M, N]``.
        bias2: ``[M]``, or None with ``total``.
        activation: one of ``ACTIVATIONS``.
        total: None, or ``[..., M]``, contiguous, in place of the second bias; no leaf that requires grad.
        backend: the backend that must run; by default the first that can.

    Returns:
        ``[..., M]``; ``total`` where it was given.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit, neither or both of ``bias2`` and ``total``, an unknown activation.
        RuntimeError: ``total`` is a leaf that requires grad, or a view of one.
        BackendError: the forced backend can't run these inputs.
    """
    _check(x, weight1, bias1, weight2, bias2, total)
    if total is not None and torch.is_grad_enabled():
        refuse_leaf(total)
    if activation not in ACTIVATIONS:
        raise bad_argument("activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
    out: Tensor = _FeedForward.apply(x, weight1, bias1, weight2, bias2, total, activation, forced_backend(backend))
    return out if total is None or out.requires_grad else total


def pays(x: Tensor, weight1: Tensor) -> bool:
    """Whether there is a kernel for such a feed-forward; without one torch.compile fuses more of its layers than of this op."""
    sixteen = x.is_cuda and x.dtype in (torch.bfloat16, torch.float16)
    many = x.numel() // max(1, x.shape[-1]) * weight1.shape[0] >= MANY
    return sixteen and many and forced_backend(None) in ("", "cuda") and _has_kernels(x.device)


def _has_kernels(device: torch.device) -> bool:
    return _fwd.why_not("cuda", device) is None


# As torch.compiler.assume_constant_result does, which imports all of torch.compile: a graph is for one device.
_has_kernels._dynamo_marked_constant = True  # type: ignore[attr-defined]


def _check(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor | None, total: Tensor | None) -> None:
    if x.dim() < 1 or not x.is_floating_point():
        raise bad_argument("x", f"{tuple(x.shape)} {x.dtype}", "[..., K] of a floating dtype")
    if weight1.dim() != 2 or weight1.shape[1] != x.shape[-1]:
        raise bad_argument("weight1", tuple(weight1.shape), f"[N, {x.shape[-1]}]")
    if weight2.dim() != 2 or weight2.shape[1] != weight1.shape[0]:
        raise bad_argument("weight2", tuple(weight2.shape), f"[M, {weight1.shape[0]}]")
    for name, bias, weight in (("bias1", bias1, weight1), ("bias2", bias2, weight2)):
        if bias is not None and bias.shape != weight.shape[:1]:
            raise bad_argument(name, tuple(bias.shape), f"[{weight.shape[0]}]")
    if (bias2 is None) == (total is None):
        raise bad_argument("bias2, total", "neither" if total is None else "both", "one of them")
    if total is not None and (total.shape != (*x.shape[:-1], weight2.shape[0]) or not total.is_contiguous()):
        wanted = f"contiguous {[*x.shape[:-1], weight2.shape[0]]}"
        raise bad_argument("total", f"shape {tuple(total.shape)}, strides {total.stride()}", wanted)
    tensors = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2, "total": total}
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise bad_argument(name, f"{tensor.dtype} on {tensor.device}", f"{x.dtype} on {x.device}, as x has")


class _FeedForward(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Tensor:
        x, weight1, bias1, weight2, bias2, total, activation, backend = arguments
        out: Tensor
        hidden, before = _fwd.call((activation, backend), (x, weight1, bias1), _fwd)
        ctx.save_for_backward(x, weight1, weight2, hidden, before)
        ctx.activation, ctx.backend = activation, backend
        if total is None:
            out = F.linear(hidden, weight2, bias2)
        else:
            ctx.mark_dirty(total)
            add_in_place(total, hidden, weight2)
            out = total
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
        x, weight1, weight2, hidden, before = ctx.saved_tensors
        needs = ctx.needs_input_grad
        dx, dweight1, dbias1 = None, None, None
        if any(needs[:3]):
            dbefore, dbias = _bwd.call((needs[2], ctx.activation, ctx.backend), (dout, weight2, before), _bwd)
            dx = dbefore @ weight1 if needs[0] else None
            dweight1 = dbefore.flatten(0, -2).t() @ x.flatten(0, -2) if needs[1] else None
            dbias1 = dbias if needs[2] else None
        rows = dout.flatten(0, -2)
        dweight2 = rows.t() @ hidden.flatten(0, -2) if needs[3] else None
        dbias2 = rows.sum(0) if needs[4] else None
        return dx, dweight1, dbias1, dweight2, dbias2, dout if needs[5] else None, None, None


def _fwd_fake(x: Tensor, weight: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    shape = (*x.shape[:-1], weight.shape[0])
    return x.new_empty(shape), x.new_empty(shape)


def _bwd_fake(dout: Tensor, weight: Tensor, before: Tensor, biased: bool, *_: Any) -> tuple[Tensor, Tensor]:
    return before.new_empty(before.shape), before.new_empty(before.shape[-1] if biased else 0)


#: The activation of ``x weight^T + bias``, and what it is the activation of.
_fwd = Op(
    "feed_forward",
    "feed_forward_fwd(Tensor x, Tensor weight, Tensor bias, str activation, str backend) -> (Tensor, Tensor)",
    _fwd_fake,
)
#: ``(dout weight) activation'(before)``, and the sum of its rows where ``biased``.
_bwd = Op(
    "feed_forward",
    "feed_forward_bwd(Tensor dout, Tensor weight, Tensor before, bool biased, str activation, str backend) -> (Tensor, Tensor)",
    _bwd_fake,
)

# SPDX-License-Identifier: Apache-2.0
"""A linear layer whose product cuBLAS adds to a residual stream, where it is."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlmkernels.ops._op import refuse_leaf


def add_product(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``total += x weight^T``, differentiable once.

    Args:
        total: ``[..., N]``, contiguous; no leaf that requires grad.
        x: ``[..., K]``.
        weight: ``[N, K]``.

    Returns:
        ``total``.

    Raises:
        RuntimeError: ``total`` is a leaf that requires grad, or a view of one.
    """
    if torch.is_grad_enabled() and (total.requires_grad or x.requires_grad or weight.requires_grad):
        refuse_leaf(total)
        out: torch.Tensor = _AddProduct.apply(total, x, weight)
        return out
    add_in_place(total, x, weight)
    return total


def add_in_place(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> None:
    """The same without gradients."""
    total.flatten(0, -2).addmm_(x.flatten(0, -2), weight.t())


class _AddProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        ctx.mark_dirty(total)
        ctx.save_for_backward(x, weight)
        add_in_place(total, x, weight)
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dtotal: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        _, needs_x, needs_weight = ctx.needs_input_grad
        dx = dtotal @ weight if needs_x else None
        dweight = dtotal.flatten(0, -2).t() @ x.flatten(0, -2) if needs_weight else None
        return dtotal, dx, dweight

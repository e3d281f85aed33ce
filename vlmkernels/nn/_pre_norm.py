# SPDX-License-Identifier: Apache-2.0
"""A tower's layer where nobody learns: what its two halves add is added by their last products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlmkernels.ops.layer_norm import layer_norm

Tensor = torch.Tensor


class PreNorm(nn.Module):
    """``x + out_1(inner_1(norm_1(x)))``, then the same with the second half.

    cuBLAS adds its product to the stream, and the norm before has put the product's bias there. So neither a half's result nor
    its sum with the stream is a pass of its own.

    Args:
        embed_dim: width of the stream.
        eps: of both norms.
        names: of the norms.
    """

    def __init__(self, embed_dim: int, eps: tuple[float, float], names: tuple[str, ...], *, device: Any = None) -> None:
        super().__init__()
        self.names = names
        for name, each in zip(names, eps, strict=True):
            self.add_module(name, nn.LayerNorm(embed_dim, each, device=device))

    def forward(self, x: Tensor, *halves: tuple[Callable[[Tensor], Tensor], Any]) -> Tensor:
        """The stream behind both halves, each of them an ``inner`` and the linear layer ``out`` behind it."""
        for name, (inner, out) in zip(self.names, halves, strict=True):
            norm = getattr(self, name)
            normed, total = layer_norm(x, norm.weight, norm.bias, out.bias, norm.eps)
            hidden = inner(normed)
            total.flatten(0, -2).addmm_(hidden.flatten(0, -2), out.weight.t())
            x = total
        return x

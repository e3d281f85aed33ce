# SPDX-License-Identifier: Apache-2.0
"""A tower's layer: what its two halves add to the stream is added by their last products."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlmkernels.ops.layer_norm import layer_norm

Tensor = torch.Tensor


class PreNorm(nn.Module):
    """``x + out_1(inner_1(norm_1(x)))``, then the same with the second half.

    cuBLAS adds its product to the stream, and the norm before has put the product's bias there. So neither a half's result nor
    its sum with the stream is a pass of its own, nor are the sums of gradients backwards.

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

    def forward(self, x: Tensor, *halves: tuple[Callable[[Tensor, Tensor], Tensor], Tensor]) -> Tensor:
        """The stream behind both halves, each of them the bias of its last layer, and what adds its results to the stream.

        It is given what the norm made, and the stream with that bias.
        """
        for name, (half, bias) in zip(self.names, halves, strict=True):
            norm = getattr(self, name)
            x = half(*layer_norm(x, norm.weight, norm.bias, bias, norm.eps))
        return x

# SPDX-License-Identifier: Apache-2.0
"""The meaning of a feed-forward's first half, and of the gradient before its activation."""

import math

import torch
from torch import Tensor

from vlmkernels.backends.reference.activated_linear import share_of


def feed_forward_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t() + bias.to(wide)
    return (y * share_of(y, activation)).to(x.dtype).contiguous(), y.to(x.dtype).contiguous()


def feed_forward_bwd(dout: Tensor, weight: Tensor, before: Tensor, biased: bool, activation: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(before.dtype, torch.float32)
    y = before.to(wide)
    d = dout.to(wide) @ weight.to(wide) * (share_of(y, activation) + y * _rise(y, activation))
    dbias = d.flatten(0, -2).sum(0) if biased else d.new_empty(0)
    return d.to(before.dtype).contiguous(), dbias.to(before.dtype)


def _rise(y: Tensor, activation: str) -> Tensor:
    """The derivative of ``share_of``."""
    if activation == "gelu":
        return torch.exp(-y.square() / 2) / math.sqrt(2 * math.pi)
    share = share_of(y, activation)
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * y.square()) if activation == "gelu_tanh" else 1.702
    return share * (1 - share) * slope

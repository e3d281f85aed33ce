# SPDX-License-Identifier: Apache-2.0
"""The meaning of a feed-forward's first half, and of the gradient before its activation."""

import math

import torch
from torch import Tensor


def feed_forward_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t() + bias.to(wide)
    return (y * _share(y, activation)).to(x.dtype).contiguous(), y.to(x.dtype).contiguous()


def feed_forward_bwd(dout: Tensor, weight: Tensor, before: Tensor, biased: bool, activation: str) -> tuple[Tensor, Tensor]:
    wide = torch.promote_types(before.dtype, torch.float32)
    y = before.to(wide)
    d = dout.to(wide) @ weight.to(wide) * (_share(y, activation) + y * _rise(y, activation))
    dbias = d.flatten(0, -2).sum(0) if biased else d.new_empty(0)
    return d.to(before.dtype).contiguous(), dbias.to(before.dtype)


def _share(y: Tensor, activation: str) -> Tensor:
    """What y is multiplied by."""
    if activation == "gelu":
        return (1 + torch.erf(y / math.sqrt(2))) / 2
    if activation == "gelu_tanh":
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
    return 1 / (1 + torch.exp(-1.702 * y))


def _rise(y: Tensor, activation: str) -> Tensor:
    """The derivative of that."""
    if activation == "gelu":
        return torch.exp(-y.square() / 2) / math.sqrt(2 * math.pi)
    share = _share(y, activation)
    slope = 2 * math.sqrt(2 / math.pi) * (1 + 3 * 0.044715 * y.square()) if activation == "gelu_tanh" else 1.702
    return share * (1 - share) * slope

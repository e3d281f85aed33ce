# SPDX-License-Identifier: Apache-2.0
"""The meaning of ``activated_linear``: a product and an activation, and maybe a second product, rounded once."""

import math

import torch
from torch import Tensor


def activated_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor | None, up: Tensor | None, activation: str) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t()
    y = y if bias is None else y + bias.to(wide)
    factor = 1 if up is None else x.to(wide) @ up.to(wide).t()
    return (y * share_of(y, activation) * factor).to(x.dtype).contiguous()


def share_of(y: Tensor, activation: str) -> Tensor:
    """What an activation multiplies ``y`` by."""
    if activation == "gelu":
        return (1 + torch.erf(y / math.sqrt(2))) / 2
    if activation == "gelu_tanh":
        return (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
    return 1 / (1 + torch.exp(-y if activation == "silu" else -1.702 * y))

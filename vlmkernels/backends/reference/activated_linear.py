# SPDX-License-Identifier: Apache-2.0
"""The meaning of ``activated_linear``: a product and an activation, rounded once."""

import math

import torch
from torch import Tensor


def activated_linear_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t() + bias.to(wide)
    if activation == "gelu":
        share = (1 + torch.erf(y / math.sqrt(2))) / 2
    elif activation == "gelu_tanh":
        share = (1 + torch.tanh(math.sqrt(2 / math.pi) * (y + 0.044715 * y**3))) / 2
    else:
        share = 1 / (1 + torch.exp(-1.702 * y))
    return (y * share).to(x.dtype).contiguous()

# SPDX-License-Identifier: Apache-2.0
"""A feed-forward's first half, and the gradient before its activation, in stock torch operations."""

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.backends.torch.activated_linear import ACTIVATIONS

#: What torch's gradient of GELU calls them.
_GELU = {"gelu": "none", "gelu_tanh": "tanh"}


def feed_forward_fwd(x: Tensor, weight: Tensor, bias: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    before = F.linear(x, weight, bias).contiguous()
    return ACTIVATIONS[activation](before), before


def feed_forward_bwd(dout: Tensor, weight: Tensor, before: Tensor, biased: bool, activation: str) -> tuple[Tensor, Tensor]:
    dhidden = (dout @ weight).contiguous()
    if activation in _GELU:
        d = torch.ops.aten.gelu_backward(dhidden, before, approximate=_GELU[activation])
    else:  # x sigmoid(1.702 x) is silu(1.702 x) / 1.702
        d = torch.ops.aten.silu_backward(dhidden, 1.702 * before)
    return d, d.flatten(0, -2).sum(0) if biased else d.new_empty(0)

# SPDX-License-Identifier: Apache-2.0
"""A linear layer and what follows it, each by stock torch."""

import torch.nn.functional as F
from torch import Tensor


def linear_gelu_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.gelu(F.linear(x, weight, bias))


def linear_add_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    return F.layer_norm(F.linear(x, weight, bias) + residual, norm_weight.shape, norm_weight, norm_bias, eps)

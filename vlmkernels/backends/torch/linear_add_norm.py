# SPDX-License-Identifier: Apache-2.0
"""A linear layer, the sum and the LayerNorm behind it, each by stock torch."""

import torch.nn.functional as F
from torch import Tensor


def linear_add_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    return F.layer_norm(F.linear(x, weight, bias) + residual, norm_weight.shape, norm_weight, norm_bias, eps)

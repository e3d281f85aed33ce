# SPDX-License-Identifier: Apache-2.0
"""The meaning of a linear layer with what follows it."""

import math

import torch
from torch import Tensor


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t()
    return y if bias is None else y + bias.to(wide)


def linear_gelu_fwd(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    y = _linear(x, weight, bias)
    return (y * (1 + torch.erf(y / math.sqrt(2))) / 2).to(x.dtype)


def linear_add_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    y = _linear(x, weight, bias)
    y = y + residual.to(y.dtype)
    y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    return (y * norm_weight.to(y.dtype) + norm_bias.to(y.dtype)).to(x.dtype)

# SPDX-License-Identifier: Apache-2.0
"""The meaning of a linear layer, the sum and the LayerNorm behind it."""

import torch
from torch import Tensor


def linear_add_norm_fwd(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor, norm_weight: Tensor, norm_bias: Tensor, eps: float
) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t() + residual.to(wide)
    if bias is not None:
        y = y + bias.to(wide)
    y = y - y.mean(-1, keepdim=True)
    y = y / (y.square().mean(-1, keepdim=True) + eps).sqrt()
    return (y * norm_weight.to(wide) + norm_bias.to(wide)).to(x.dtype)

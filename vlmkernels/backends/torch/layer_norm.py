# SPDX-License-Identifier: Apache-2.0
"""``layer_norm`` in stock torch operations."""

import torch
import torch.nn.functional as F
from torch import Tensor


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    x = x.contiguous()
    return F.layer_norm(x, weight.shape, weight, bias, eps), x + shift


def layer_norm_bwd(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    # In fp32: on a CPU torch keeps mean and sums of 16-bit floats in their own type.
    wide = torch.promote_types(x.dtype, torch.float32)
    rows, factor, dim = x.to(wide).contiguous(), weight.to(wide), weight.shape
    _, mean, rstd = torch.native_layer_norm(rows, dim, factor, factor, eps)
    rest = (mean, rstd, factor, factor, [True, True, True])
    dx, dweight, dbias = torch.ops.aten.native_layer_norm_backward(dy.to(wide).contiguous(), rows, dim, *rest)
    dshift = (dx if dtotal is None else dtotal.to(wide)).flatten(0, -2).sum(0)
    dx = dx if dtotal is None else dx.add_(dtotal)
    return tuple(result.to(x.dtype) for result in (dx, dshift, dweight, dbias))

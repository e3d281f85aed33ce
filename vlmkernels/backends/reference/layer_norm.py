# SPDX-License-Identifier: Apache-2.0
"""The meaning of ``layer_norm``: mean and variance written out."""

import torch
from torch import Tensor


def layer_norm_fwd(x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = wide - wide.mean(-1, keepdim=True)
    y = centred / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps) * weight + bias
    return y.to(x.dtype).contiguous(), (wide + shift).to(x.dtype).contiguous()


def layer_norm_bwd(dy: Tensor, dtotal: Tensor | None, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, ...]:
    wide = torch.promote_types(x.dtype, torch.float32)
    dy, centred = dy.to(wide), x.to(wide) - x.to(wide).mean(-1, keepdim=True)
    rstd = 1 / torch.sqrt(centred.square().mean(-1, keepdim=True) + eps)
    unit, dunit = centred * rstd, dy * weight
    dx = rstd * (dunit - dunit.mean(-1, keepdim=True) - unit * (dunit * unit).mean(-1, keepdim=True))
    dtotal = None if dtotal is None else dtotal.to(wide)
    sums = (rows.reshape(-1, x.shape[-1]).sum(0) for rows in (dx if dtotal is None else dtotal, dy * unit, dy))
    dx = dx if dtotal is None else dx + dtotal
    return dx.to(x.dtype).contiguous(), *(total.to(x.dtype) for total in sums)

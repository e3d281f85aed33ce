# SPDX-License-Identifier: Apache-2.0
"""RMSNorm over the channels of a head, as Llama stores its weight and as Gemma does."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn


def rms_scale(weight: torch.Tensor, offset: float) -> torch.Tensor:
    """``weight + offset``, ``[dim]``; with an offset in fp32, because 1 + w rounded to bf16 loses most of w."""
    return weight.to(torch.promote_types(weight.dtype, torch.float32)) + offset if offset else weight


class RMSNorm(nn.Module):
    """``y = x / sqrt(mean(x^2) + eps) * (weight + offset)`` over the last dimension, computed in fp32 (fp64 for fp64 inputs).

    Args:
        dim: length of the last dimension; ``weight`` is ``[dim]``.
        eps: added to the mean square.
        offset: 0 (Llama, Qwen, mllama) or 1 (Gemma, whose stored weight is the difference from 1).
    """

    def __init__(self, dim: int, eps: float = 1e-6, *, offset: float = 0.0, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.eps = eps
        self.offset = offset
        self.weight = nn.Parameter(torch.full((dim,), 1.0 - offset, device=device, dtype=dtype))

    def scale(self) -> torch.Tensor:
        """What ``rms_scale`` makes of the weight."""
        return rms_scale(self.weight, self.offset)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if not self.offset and x.dtype == self.weight.dtype:  # one kernel, and one rounding
            return F.rms_norm(x, self.weight.shape, self.weight, self.eps)
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return (wide * self.scale()).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, eps={self.eps}, offset={self.offset}"

# SPDX-License-Identifier: Apache-2.0
"""Still images in patches of several frames: one frame meets the sum of the weight's frames, half the product for two of them."""

import torch
from torch import Tensor


def fold(
    weight: Tensor, bias: Tensor | None, mean: list[float] | None, std: list[float] | None
) -> tuple[Tensor, Tensor | None, list[float] | None, list[float] | None]:
    """Weight ``[D, C, 1, Py, Px]``, bias, mean and std for the one frame; sums in fp32, rounded once.

    uint8 pixels come out as ``(pixel - 128) / 128``, which every dtype holds: their mean and std go into the weight and the bias,
    else a pixel would be rounded like the weight, and random bytes would end 1.9 floors off in bf16 instead of 1.4.
    """
    if mean is None or std is None:
        return weight.sum(2, keepdim=True), bias, None, None
    total = weight.sum(2, keepdim=True, dtype=torch.float32)
    moved = total.new_zeros(weight.shape[0]) if bias is None else bias.float()
    for c, (m, s) in enumerate(zip(mean, std, strict=True)):
        moved = torch.add(moved, total[:, c].sum((1, 2, 3)), alpha=(128 / 255 - m) / s)
        total[:, c] *= 128 / (255 * s)
    half = [128 / 255] * len(mean)
    return total.to(weight.dtype), moved.to(weight.dtype), half, half

# SPDX-License-Identifier: Apache-2.0
"""Where the patches of packed images are, for the rotary embedding of a tower."""

import torch
from torch import nn

from vlmkernels.rope_tables import vision_positions


class PatchPositions(nn.Module):
    """Row and column of each patch, ``[T, 2]``, of all images at once and without waiting for a GPU.

    Args:
        merge_size: side of the blocks in whose order the patches come.
    """

    def __init__(self, merge_size: int) -> None:
        super().__init__()
        self.merge_size = merge_size

    def forward(self, grid_thw: torch.Tensor, total: int) -> torch.Tensor:
        """``grid_thw``: frames, rows and columns of patches of each image, ``[N, 3]``; ``total``: the patches of all.

        Raises:
            ValueError: ``total`` is another number; on a GPU, where nobody waits for it, the device asserts that it isn't.
        """
        if grid_thw.is_cuda:
            torch._assert_async(grid_thw.prod(1).sum() == total, "vlmkernels: grid_thw has another number of patches")
        return vision_positions(grid_thw, merge_size=self.merge_size, total=total).t()

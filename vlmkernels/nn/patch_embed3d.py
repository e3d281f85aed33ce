# SPDX-License-Identifier: Apache-2.0
"""The patch embedding of Qwen-VL: patches of two frames, from packed rows or from the frames themselves."""

from collections.abc import Sequence

import torch
from torch import nn

from vlmkernels.nn.patch_embed import pixel_constants
from vlmkernels.ops._op import bad_argument, check_sizes
from vlmkernels.ops.patch_embed import patch_embed


class PatchEmbed3d(nn.Module):
    """A Conv3d whose stride is its kernel, as one matrix product. The state_dict has ``proj.weight`` and ``proj.bias``.

    Args:
        embed_dim: ``D``.
        patch_size: ``P``, the side of a patch.
        temporal_patch_size: frames per patch, ``Pt``.
        in_channels: channels of a frame, ``C``.
        bias: whether the projection has one (Qwen3-VL).
        merge_size: tokens of raw frames come in blocks of ``merge_size x merge_size`` patches, the order in which Qwen-VL merges
            them; 1: row by row. Packed rows keep the order that they come in.
        mean: of ``pixel / 255``, one number per channel. With ``mean`` and ``std`` the module takes uint8 pixels.
        std: beside ``mean``.
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: int = 14,
        temporal_patch_size: int = 2,
        in_channels: int = 3,
        *,
        bias: bool = False,
        merge_size: int = 1,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(merge_size=merge_size)
        self.patch_size = (temporal_patch_size, patch_size, patch_size)
        self.merge_size = merge_size
        self.mean, self.std = pixel_constants("mean", mean, std), pixel_constants("std", std, mean)
        self.proj = nn.Conv3d(in_channels, embed_dim, self.patch_size, self.patch_size, bias=bias, device=device, dtype=dtype)

    def forward(self, pixels: torch.Tensor, pos_embed: torch.Tensor | None = None) -> torch.Tensor:
        """Embed packed rows, videos or images.

        Args:
            pixels: rows ``[N, C * Pt * P * P]`` with columns in the order channel, frame, row, column, as the Hugging Face
                processors make them; or frames ``[B, C, T, H, W]``. Of still images, which those processors repeat ``Pt`` times,
                one frame is enough and half the work: rows ``[N, C * P * P]``, ``T = 1``, or ``[B, C, H, W]``. Float and
                normalised, or uint8 where the module knows ``mean`` and ``std``.
            pos_embed: ``[N, D]``, added to packed rows (``resample_pos_embed`` makes them). Not for frames and images.

        Returns:
            ``[N, D]`` for rows, else ``[B, N, D]``, frame by frame.

        Raises:
            ValueError: a shape or dtype that doesn't fit, or a grid of patches that ``merge_size`` does not divide.
        """
        raw = pixels.dtype == torch.uint8
        if pixels.dim() == 4:
            pixels = pixels.unsqueeze(2)
        elif pixels.dim() not in (2, 5):
            raise bad_argument("pixels", f"shape {tuple(pixels.shape)}", "[N, K], [B, C, T, H, W] or [B, C, H, W]")
        if pos_embed is not None and pixels.dim() != 2:
            raise bad_argument("pos_embed", "a tensor", f"None for pixels of {pixels.dim()} dimensions")
        out = patch_embed(
            pixels,
            self.proj.weight,
            self.proj.bias,
            patch_size=self.patch_size,
            layout="rows" if pixels.dim() == 2 else "channels_first",
            mean=self.mean if raw else None,
            std=self.std if raw else None,
            pos_embed=pos_embed,
        )
        if pixels.dim() == 2 or self.merge_size == 1:
            return out
        merge, (_, p, _) = self.merge_size, self.patch_size
        rows, columns = pixels.shape[3] // p, pixels.shape[4] // p
        if rows % merge or columns % merge:
            raise bad_argument("pixels", f"a grid of {rows} x {columns} patches", f"multiples of merge_size = {merge}")
        blocks = out.view(out.shape[0], out.shape[1] // (rows * columns), rows // merge, merge, columns // merge, merge, -1)
        return blocks.transpose(3, 4).reshape(out.shape)

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, merge_size={self.merge_size}"

# SPDX-License-Identifier: Apache-2.0
"""Patch embeddings of images in their own sizes, packed or padded, with the position table resampled to every image's grid."""

import torch
from torch import nn

from vlmkernels.nn._names import get, put
from vlmkernels.nn.patch_embed3d import PatchEmbed3d
from vlmkernels.ops._op import bad_argument, check_sizes
from vlmkernels.ops.patch_embed import patch_embed
from vlmkernels.ops.pos_embed import resample_pos_embed

#: By layout: the names of projection and position table, whether the table is ``[1, S, S, D]``, and what padding rows get.
_NAFLEX = {
    "siglip2": ("patch_embedding", "position_embedding.weight", False, "first"),
    "timm": ("proj", "pos_embed", True, "zeros"),
}


class NaFlexPatchEmbed(nn.Module):
    """``Siglip2VisionEmbeddings`` of transformers, or with ``layout="timm"`` the ``embeds`` of timm's SigLIP2 NaFlexVit.

    Args:
        embed_dim: ``D``.
        patch_size: ``P``.
        grid_size: ``S``; the position table is ``S x S``.
        in_channels: ``C``.
        layout: the names of the parameters and what padding rows get: ``"siglip2"`` the position of the image's first patch,
            ``"timm"`` none.
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: int = 16,
        grid_size: int = 16,
        in_channels: int = 3,
        *,
        layout: str = "siglip2",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if layout not in _NAFLEX:
            raise bad_argument("layout", repr(layout), f"one of {', '.join(_NAFLEX)}")
        check_sizes(grid_size=grid_size)
        self.layout, self.patch_size, self.grid_size = layout, patch_size, grid_size
        projection, position, batched, _ = _NAFLEX[layout]
        put(self, projection, nn.Linear(in_channels * patch_size**2, embed_dim, device=device, dtype=dtype))
        shape = (1, grid_size, grid_size, embed_dim) if batched else (grid_size**2, embed_dim)
        table = nn.init.trunc_normal_(torch.empty(shape, device=device, dtype=dtype), std=0.02)
        put(self, position, nn.Parameter(table))

    def forward(self, pixel_values: torch.Tensor, spatial_shapes: torch.Tensor) -> torch.Tensor:
        """Embed a padded batch.

        Args:
            pixel_values: ``[B, N, P * P * C]``, float and normalised, with columns in the order row, column, channel.
            spatial_shapes: ``[B, 2]``, rows and columns of patches of every image, on the device; it is not read back.

        Returns:
            ``[B, N, D]`` in the dtype of the parameters.

        Raises:
            ValueError: a shape or dtype that doesn't fit; see ``resample_pos_embed`` for grids on the CPU.
        """
        if pixel_values.dim() != 3:
            raise bad_argument("pixel_values", f"shape {tuple(pixel_values.shape)}", "[B, N, P * P * C]")
        names = _NAFLEX[self.layout]
        projection, table = get(self, names[0]), get(self, names[1])
        positions = resample_pos_embed(
            table.view(self.grid_size, self.grid_size, -1),
            spatial_shapes,
            pixel_values.shape[1],
            layout="padded",
            padding=names[3],
            antialias=True,
        )
        return patch_embed(
            pixel_values,
            projection.weight,
            projection.bias,
            patch_size=self.patch_size,
            layout="rows",
            columns="yxc",
            pos_embed=positions,
        )

    def extra_repr(self) -> str:
        return f"patch_size={self.patch_size}, grid_size={self.grid_size}, layout={self.layout}"


class PackedPatchEmbed3d(nn.Module):
    """What the vision tower of Qwen3-VL does before its first layer: ``patch_embed.proj.*`` and ``pos_embed.weight`` of it.

    Args:
        embed_dim: ``D``.
        patch_size: ``P``.
        temporal_patch_size: frames per patch, ``Pt``.
        grid_size: ``S``; the position table is ``[S * S, D]`` (``num_position_embeddings``).
        merge_size: the rows come in blocks of ``merge_size x merge_size`` patches (``spatial_merge_size``).
        in_channels: ``C``.
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: int = 16,
        temporal_patch_size: int = 2,
        grid_size: int = 48,
        merge_size: int = 2,
        in_channels: int = 3,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(grid_size=grid_size)
        self.patch_embed = PatchEmbed3d(
            embed_dim, patch_size, temporal_patch_size, in_channels, bias=True, merge_size=merge_size, device=device, dtype=dtype
        )
        self.pos_embed = nn.Embedding(grid_size**2, embed_dim, device=device, dtype=dtype)

    def forward(self, pixel_values: torch.Tensor, grid_thw: torch.Tensor) -> torch.Tensor:
        """Embed the packed rows of images and videos.

        Args:
            pixel_values: ``[N, C * Pt * P * P]``, float and normalised, with columns in the order channel, frame, row, column; or
                ``[N, C * P * P]`` where all are still images, one frame of each.
            grid_thw: ``[B, 3]``, frames, rows and columns of patches of every image, on the device; it is not read back.

        Returns:
            ``[N, D]`` in the dtype of the parameters. Rows behind the last image get no position.

        Raises:
            ValueError: a shape or dtype that doesn't fit; see ``resample_pos_embed`` for grids on the CPU.
        """
        if pixel_values.dim() != 2:
            raise bad_argument("pixel_values", f"shape {tuple(pixel_values.shape)}", "[N, C * Pt * P * P]")
        positions = resample_pos_embed(
            self.pos_embed.weight,
            grid_thw,
            pixel_values.shape[0],
            merge_size=self.patch_embed.merge_size,
            align_corners=True,
        )
        return self.patch_embed(pixel_values, positions)  # type: ignore[no-any-return]

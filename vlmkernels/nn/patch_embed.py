# SPDX-License-Identifier: Apache-2.0
"""From images to the tokens that a vision transformer starts with: patches, class token, positions, pre-norm, in one call."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlmkernels.nn._names import get, put
from vlmkernels.ops._op import bad_argument
from vlmkernels.ops.patch_embed import patch_embed


@dataclass(frozen=True)
class PatchEmbedLayout:
    """The names and shapes that one family of models gives its embedding parameters.

    Args:
        projection: the Conv2d.
        position: the position table, as its parameter, or None where another layer adds it.
        class_token: the class token, or None where the family has none.
        register_tokens: the register tokens, or None.
        norm: the LayerNorm before the first layer.
        batched: whether tokens and positions are stored with a batch of 1 (``[1, N, D]``) or without (``[D]``, ``[N, D]``).
        bias: whether the convolution has one, where the caller does not say.
        antialias: whether positions are resized with antialiasing.
    """

    projection: str
    position: str | None
    class_token: str | None = None
    register_tokens: str | None = None
    norm: str = "norm"
    batched: bool = False
    bias: bool = True
    antialias: bool = False


#: By name: the layers that use it are listed in docs/nn.md.
PATCH_EMBED_LAYOUTS = {
    "clip": PatchEmbedLayout("patch_embedding", "position_embedding.weight", "class_embedding", norm="pre_layrnorm", bias=False),
    "siglip": PatchEmbedLayout("patch_embedding", "position_embedding.weight"),
    "vit": PatchEmbedLayout("patch_embeddings.projection", "position_embeddings", "cls_token", batched=True),
    "blip": PatchEmbedLayout("patch_embedding", "position_embedding", "class_embedding", batched=True),
    "timm": PatchEmbedLayout("patch_embed.proj", "pos_embed", "cls_token", "reg_token", "norm_pre", batched=True, antialias=True),
    "open_clip": PatchEmbedLayout("conv1", "positional_embedding", "class_embedding", norm="ln_pre", bias=False, antialias=True),
}


class PatchEmbed(nn.Module):
    """``[class and register tokens; patches of the image] + positions``, with CLIP's LayerNorm where it is asked for.

    ``PatchEmbed(1024, 14, 336, layout="clip").load_state_dict(clip.embeddings.state_dict())`` is all that a replacement takes.

    Args:
        embed_dim: ``D``.
        patch_size: ``P``, or ``(Py, Px)``.
        image_size: the side, or ``(height, width)``, for which the positions are stored.
        in_channels: channels of the image.
        layout: the names of the parameters: ``"clip"``, ``"siglip"``, ``"vit"``, ``"blip"`` (BLIP and BLIP-2), ``"timm"``,
            ``"open_clip"`` (docs/nn.md lists the layers of each), or a ``PatchEmbedLayout`` of your own.
        bias: whether the projection has one; what the layout says by default.
        class_token: whether there is one; by default where the layout has a name for it.
        register_tokens: how many (timm).
        position_prefix: whether class and register tokens have positions too (timm: ``not no_embed_class``).
        norm: end with the LayerNorm that CLIP has before its first layer (``pre_layrnorm.*`` beside the other keys).
        norm_eps: of that LayerNorm.
        mean: of ``pixel / 255``, one number per channel. With ``mean`` and ``std`` the module takes uint8 pixels.
        std: beside ``mean``.
    """

    def __init__(
        self,
        embed_dim: int,
        patch_size: int | tuple[int, int],
        image_size: int | tuple[int, int],
        in_channels: int = 3,
        *,
        layout: str | PatchEmbedLayout = "clip",
        bias: bool | None = None,
        class_token: bool | None = None,
        register_tokens: int = 0,
        position_prefix: bool = True,
        norm: bool = False,
        norm_eps: float = 1e-5,
        mean: Sequence[float] | None = None,
        std: Sequence[float] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.layout = names = patch_embed_layout(layout)
        height, width = _pair(image_size)
        self.patch_size = _pair(patch_size)
        self.grid = (height // self.patch_size[0], width // self.patch_size[1])
        if min(*self.patch_size, *self.grid) < 1:
            raise bad_argument("image_size", image_size, f"at least one patch of {self.patch_size}")
        class_token = names.class_token is not None if class_token is None else class_token
        self._tokens = _token_names(names, class_token, register_tokens)
        self.mean, self.std = pixel_constants("mean", mean, std), pixel_constants("std", std, mean)

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        bias = names.bias if bias is None else bias
        put(self, names.projection, nn.Conv2d(in_channels, embed_dim, self.patch_size, self.patch_size, bias=bias, **made))

        def parameter(rows: int, *, one_row: bool = False) -> nn.Parameter:
            shape = (1, rows, embed_dim) if names.batched else (embed_dim,) if one_row else (rows, embed_dim)
            return nn.Parameter(nn.init.trunc_normal_(torch.empty(shape, **made), std=0.02))

        for name, rows in self._tokens:
            put(self, name, parameter(rows, one_row=name == names.class_token))
        self.num_prefix_tokens = sum(rows for _, rows in self._tokens)
        self._fixed = self.num_prefix_tokens if position_prefix else 0
        if names.position is not None:
            put(self, names.position, parameter(self._fixed + self.grid[0] * self.grid[1]))
        self.norm_eps = norm_eps if norm else None
        if norm:
            put(self, names.norm, nn.LayerNorm(embed_dim, norm_eps, **made))

    def forward(self, pixels: torch.Tensor, interpolate: bool = False, channels_last: bool = False) -> torch.Tensor:
        """Embed a batch of images.

        Args:
            pixels: ``[B, C, H, W]``: float and normalised, or uint8 where the module knows ``mean`` and ``std``. Pixels that the
                patch does not divide are left out at the right and bottom edges.
            interpolate: resize the positions (bicubic) to images of another size.
            channels_last: pixels are ``[B, H, W, C]``.

        Returns:
            ``[B, prefix tokens + patches, D]`` in the dtype of the parameters.

        Raises:
            ValueError: a shape or dtype that doesn't fit, or images of another grid without ``interpolate``.
        """
        if pixels.dim() != 4:
            raise bad_argument("pixels", f"shape {tuple(pixels.shape)}", "[B, C, H, W], or with channels_last [B, H, W, C]")
        height, width = pixels.shape[1:3] if channels_last else pixels.shape[2:]
        projection = get(self, self.layout.projection)
        tokens = [get(self, name).view(rows, -1) for name, rows in self._tokens]
        pre_norm = None
        if self.norm_eps is not None:
            norm = get(self, self.layout.norm)
            pre_norm = (norm.weight, norm.bias, self.norm_eps)
        raw = pixels.dtype == torch.uint8
        return patch_embed(
            pixels,
            projection.weight,
            projection.bias,
            patch_size=self.patch_size,
            layout="channels_last" if channels_last else "channels_first",
            mean=self.mean if raw else None,
            std=self.std if raw else None,
            prefix_tokens=None if not tokens else tokens[0] if len(tokens) == 1 else torch.cat(tokens),
            pos_embed=self._positions((height // self.patch_size[0], width // self.patch_size[1]), interpolate),
            norm=pre_norm,
        )

    def _positions(self, grid: tuple[int, int], interpolate: bool) -> torch.Tensor | None:
        """The position table for that grid of patches, ``[N, D]`` or with the prefix tokens ``[n + N, D]``; None without one."""
        if self.layout.position is None:
            return None
        table: torch.Tensor = get(self, self.layout.position)
        table = table[0] if self.layout.batched else table
        if grid == self.grid:
            return table
        if not interpolate:
            raise bad_argument("pixels", f"a grid of {grid} patches", f"{self.grid}, or interpolate=True")
        fixed, patches = table[: self._fixed], table[self._fixed :]
        wide = patches.to(torch.promote_types(table.dtype, torch.float32)).view(1, *self.grid, -1).permute(0, 3, 1, 2)
        wide = F.interpolate(wide, size=grid, mode="bicubic", align_corners=False, antialias=self.layout.antialias)
        patches = wide[0].flatten(1).t().to(table.dtype)
        return torch.cat((fixed, patches)) if self._fixed else patches

    def extra_repr(self) -> str:
        size = tuple(side * patch for side, patch in zip(self.grid, self.patch_size, strict=True))
        return f"patch_size={self.patch_size}, image_size={size}, prefix_tokens={self.num_prefix_tokens}"


def patch_embed_layout(layout: str | PatchEmbedLayout) -> PatchEmbedLayout:
    """The layout of that name, or the layout itself."""
    if isinstance(layout, PatchEmbedLayout):
        return layout
    if layout not in PATCH_EMBED_LAYOUTS:
        raise bad_argument("layout", repr(layout), f"a PatchEmbedLayout or one of {', '.join(PATCH_EMBED_LAYOUTS)}")
    return PATCH_EMBED_LAYOUTS[layout]


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    return height, width


def _token_names(names: PatchEmbedLayout, class_token: bool, register_tokens: int) -> tuple[tuple[str, int], ...]:
    """The parameters that hold prefix tokens, in order, and how many tokens each holds."""
    if class_token and names.class_token is None:
        raise bad_argument("class_token", True, "False: this layout has no name for it")
    if register_tokens and names.register_tokens is None:
        raise bad_argument("register_tokens", register_tokens, "0: this layout has no name for them")
    held = ((names.class_token, int(class_token)), (names.register_tokens, register_tokens))
    return tuple((name, rows) for name, rows in held if name is not None and rows)


def pixel_constants(name: str, values: Sequence[float] | None, other: Sequence[float] | None) -> tuple[float, ...] | None:
    """Plain numbers, so that no call reads a tensor back from the device."""
    if (values is None) != (other is None):
        raise bad_argument(name, values, "mean and std both, or neither")
    return None if values is None else tuple(float(value) for value in values)

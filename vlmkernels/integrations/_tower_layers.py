# SPDX-License-Identifier: Apache-2.0
"""What stands around attention and feed-forward in towers, which are replaced by themselves: norms, residuals, positions."""

import sys
from typing import Any

import torch
from torch import nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from vlmkernels.integrations._feed_forward_layers import Plain
from vlmkernels.integrations._swap import Swapped, Unfit, autocast, unhooked
from vlmkernels.nn._feed_forward import FeedForward
from vlmkernels.nn._packed import plain
from vlmkernels.nn._patch_positions import PatchPositions
from vlmkernels.nn._pre_norm import PreNorm
from vlmkernels.ops._add_product import add_product

Tensor = torch.Tensor


#: Where LayerNorms like torch's are.
_NORMS = ("torch.nn.modules.normalization", "timm.layers.norm", "open_clip.transformer")


def _normalises(norm: Any) -> bool:
    """Whether this is a LayerNorm like torch's."""
    return type(norm).__name__ == "LayerNorm" and type(norm).__module__ in _NORMS and not getattr(norm, "_fast_norm", False)


class TowerLayer(Swapped):
    """A pre-norm layer; torch.compile makes its own passes, and gets the original's."""

    #: The two norms.
    part: tuple[str, ...] = ("layer_norm1", "layer_norm2")
    #: The name of the attention, and that of its last layer.
    attends, last = "self_attn", "out_proj"

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        first, second = (getattr(layer, name) for name in cls.part)
        if not _normalises(first) or not _normalises(second):
            raise Unfit(f"its norms are {type(first).__name__} and {type(second).__name__}")
        return PreNorm(first.normalized_shape[0], (first.eps, second.eps), cls.part, device="meta")

    def drops(self) -> bool:
        """Whether a half drops, in training, some of what it adds."""
        return any(isinstance(child, nn.Dropout) and child.p > 0 for child in self.children())

    def feed_forward(self) -> FeedForward | None:
        """The module of the second half, or None where the original's layers are called."""
        feed = self.mlp
        serves = isinstance(feed, Plain) and unhooked(feed) and feed.serves()
        return feed.fast if serves else None

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        attention, feed = getattr(self, self.attends), self.feed_forward()
        given = None if feed is None else self._given(attention, feed, hidden_states, args, kwargs)
        if feed is None or given is None:
            return super().forward(hidden_states, *args, **kwargs)
        out, second = getattr(attention, self.last), getattr(feed, feed.second)

        def attend(x: Tensor, total: Tensor) -> Tensor:
            return add_product(total, attention.fast(x, *given, projected=False), out.weight)

        return self.fast(hidden_states, (attend, out.bias), (feed, second.bias))

    def _given(
        self, attention: Any, feed: FeedForward, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        """What attention gets beside its tokens, or None where the original answers."""
        if (self.training and self.drops()) or torch.compiler.is_compiling() or autocast(x):
            return None
        swapped = isinstance(attention, Swapped) and hasattr(attention, "arguments")
        if not swapped or not unhooked(attention) or not self.untouched():
            return None
        layers = getattr(attention, self.last), getattr(feed, feed.second)
        known = plain(layers[0]) or plain(layers[0], NonDynamicallyQuantizableLinear)  # torch's name for that of its attention
        if not known or not plain(layers[1]):
            return None
        dtypes = [layer.weight.dtype for layer in (*layers, getattr(self, self.part[0]))]
        if any(layer.bias is None for layer in layers) or any(dtype != x.dtype for dtype in dtypes):
            return None
        given: tuple[Any, ...] | None = attention.arguments(x, *args, **kwargs)
        return given


class PackedTower(Swapped):
    """A tower of Qwen-VL, which reads its grids back and makes the positions of each image by themselves."""

    part = ()

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        if not hasattr(sys.modules[type(layer).__module__], "get_vision_position_ids"):
            raise Unfit("it takes no positions")
        return PatchPositions(layer.spatial_merge_size)

    def forward(self, hidden_states: Tensor, grid_thw: Tensor, **kwargs: Any) -> Any:
        if kwargs.get("position_ids") is None and grid_thw.device == hidden_states.device:
            kwargs["position_ids"] = self.fast(grid_thw, hidden_states.shape[0])
        return super().forward(hidden_states, grid_thw, **kwargs)

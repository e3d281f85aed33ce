# SPDX-License-Identifier: Apache-2.0
"""What stands around attention and feed-forward in towers, which are replaced by themselves: norms, residuals, positions."""

import sys
from typing import Any

import torch
from torch import nn

from vlmkernels.integrations._feed_forward_layers import Plain
from vlmkernels.integrations._swap import Swapped, Unfit, autocast, unhooked
from vlmkernels.nn._packed import plain
from vlmkernels.nn._patch_positions import PatchPositions
from vlmkernels.nn._pre_norm import PreNorm
from vlmkernels.ops._add_product import add_product

Tensor = torch.Tensor


class TowerLayer(Swapped):
    """A pre-norm layer; torch.compile makes its own passes, and gets the original's."""

    #: The two norms.
    part: tuple[str, ...] = ("layer_norm1", "layer_norm2")
    #: The name of the attention, and that of its last layer.
    attends, last = "self_attn", "out_proj"

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        first, second = (getattr(layer, name) for name in cls.part)
        if not cls.normalises(first) or not cls.normalises(second):
            raise Unfit(f"its norms are {type(first).__name__} and {type(second).__name__}")
        return PreNorm(first.normalized_shape[0], (first.eps, second.eps), cls.part, device="meta")

    @staticmethod
    def normalises(norm: nn.Module) -> bool:
        """Whether this is a LayerNorm like torch's."""
        return type(norm) is nn.LayerNorm

    def drops(self) -> bool:
        """Whether a half drops, in training, some of what it adds."""
        return any(isinstance(child, nn.Dropout) and child.p > 0 for child in self.children())

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        attention, feed = getattr(self, self.attends), self.mlp
        given = self._given(attention, feed, hidden_states, args, kwargs)
        if given is None:
            return super().forward(hidden_states, *args, **kwargs)
        out, second = getattr(attention, self.last), getattr(feed, feed.fast.second)

        def attend(x: Tensor, total: Tensor) -> Tensor:
            return add_product(total, attention.fast(x, *given, projected=False), out.weight)

        return self.fast(hidden_states, (attend, out.bias), (feed.fast, second.bias))

    def _given(
        self, attention: Any, feed: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[Any, ...] | None:
        """What attention gets beside its tokens, or None where the original answers."""
        if (self.training and self.drops()) or torch.compiler.is_compiling() or autocast(x):
            return None
        swapped = isinstance(attention, Swapped) and hasattr(attention, "arguments") and isinstance(feed, Plain)
        if not swapped or not unhooked(attention) or not unhooked(feed) or not self.untouched():
            return None
        layers = getattr(attention, self.last), getattr(feed, feed.fast.second)
        if not all(plain(layer) and layer.bias is not None and layer.weight.dtype == x.dtype for layer in layers):
            return None
        if not feed.serves() or getattr(self, self.part[0]).weight.dtype != x.dtype:
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

# SPDX-License-Identifier: Apache-2.0
"""Feed-forwards of transformers and timm that have a module of ours: of towers, of text decoders, half ones of BERT."""

from typing import Any

import torch
from torch import nn

from vlmkernels.integrations._swap import Swapped, Unfit, autocast, unhooked
from vlmkernels.nn._feed_forward import ActivatedLinear, DecoderFeedForward, FeedForward, GatedFeedForward

Tensor = torch.Tensor


class Gated(Swapped):
    """A gated feed-forward of a width whose rows are not aligned."""

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        if activation_of(layer.act_fn) != "silu":
            raise Unfit(f"its activation is {type(layer.act_fn).__name__}")
        gate = layer.gate_proj
        return GatedFeedForward(gate.in_features, gate.out_features, bias=gate.bias is not None, device="meta")

    def forward(self, hidden_state: Tensor) -> Any:
        return super().forward(hidden_state) if autocast(hidden_state) or not unhooked(self.act_fn) else self.fast(hidden_state)


def activation_of(layer: nn.Module) -> str:
    """What the op ``activated_linear`` calls the activation of this class."""
    kind, approximate = type(layer).__name__, getattr(layer, "approximate", "none")
    known = {"QuickGELUActivation": "quick_gelu", "QuickGELU": "quick_gelu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu"}
    known |= {"SiLU": "silu", "SiLUActivation": "silu"}
    if kind == "GELU":
        return "gelu_tanh" if approximate == "tanh" else "gelu"
    if kind not in known:
        raise Unfit(f"its activation is {kind}")
    return known[kind]


class Activated(Swapped):
    """A layer and the activation behind it: BERT's and GIT's first half of a feed-forward."""

    activation = "intermediate_act_fn"

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        dense = layer.dense
        return ActivatedLinear(dense.in_features, dense.out_features, activation_of(layer.intermediate_act_fn), device="meta")

    def serves(self) -> bool:
        """Whether nobody listens to the activation, or waits for something else between the layers."""
        return unhooked(getattr(self, self.activation))

    def forward(self, hidden_states: Tensor) -> Any:
        return self.fast(hidden_states) if self.serves() else super().forward(hidden_states)


class Plain(Activated):
    """A feed-forward of two layers, the first with its activation in one go."""

    names = ("fc1", "fc2")
    activation = "activation_fn"

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        first, activation = getattr(layer, cls.names[0]), activation_of(getattr(layer, cls.activation))
        return FeedForward(first.in_features, first.out_features, activation, names=cls.names, device="meta")


class Decoder(Activated):
    """The gated feed-forward of a text decoder."""

    activation = "act_fn"

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        gate, activation = layer.gate_proj, activation_of(layer.act_fn)
        return DecoderFeedForward(gate.in_features, gate.out_features, activation, bias=gate.bias is not None, device="meta")

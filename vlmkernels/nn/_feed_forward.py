# SPDX-License-Identifier: Apache-2.0
"""Feed-forwards whose products cuBLAS can do better than layer by layer."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlmkernels.nn._packed import SideBySide, plain, project
from vlmkernels.ops._add_product import add_product
from vlmkernels.ops.activated_linear import activated_linear
from vlmkernels.ops.feed_forward import ACTIVATIONS as LEARNING
from vlmkernels.ops.feed_forward import feed_forward, pays


class GatedFeedForward(SideBySide):
    """``down(silu(gate(x)) * up(x))``, of any width.

    cuBLAS has its kernels for Hopper only where rows begin at multiples of 16 bytes. Qwen2.5-VL's width of 3,420 has them at
    multiples of 8, and a product takes 390 to 500 us instead of 135 to 145 (11,220 patches, bf16, H200). Gate and up side by side
    have rows that fit. For down, what comes in and the weight get columns of zeros in each call, 9 MB of weight: a padded copy
    that is kept would have to follow the parameter.
    """

    def __init__(self, embed_dim: int, hidden_dim: int, *, bias: bool = True, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        made = {"bias": bias, "device": device, "dtype": dtype}
        self.gate_proj = nn.Linear(embed_dim, hidden_dim, **made)
        self.up_proj = nn.Linear(embed_dim, hidden_dim, **made)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, **made)
        self._lay()

    def _neighbours(self) -> list[nn.Module]:
        return [self.gate_proj, self.up_proj]

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = project(x, [self.gate_proj, self.up_proj])
        hidden, down = F.silu(gate) * up, self.down_proj
        missing = -hidden.shape[-1] % (16 // min(16, hidden.element_size()))
        if not missing or not plain(down):
            y: torch.Tensor = down(hidden)
            return y
        return F.linear(F.pad(hidden, (0, missing)), F.pad(down.weight, (0, missing)), down.bias)


#: By the name that ``vlmkernels.ops.activated_linear`` has for it.
_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "gelu": F.gelu,
    "gelu_tanh": partial(F.gelu, approximate="tanh"),
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "silu": F.silu,
}


class DecoderFeedForward(nn.Module):
    """``down(activation(gate(x)) * up(x))``, all before ``down`` in one kernel where nobody learns. No weight moves.

    Args:
        activation: one of ``vlmkernels.ops.activated_linear.ACTIVATIONS``.
    """

    def __init__(
        self, embed_dim: int, hidden_dim: int, activation: str, *, bias: bool = False, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        made = {"bias": bias, "device": device, "dtype": dtype}
        self.activation = activation
        self.gate_proj = nn.Linear(embed_dim, hidden_dim, **made)
        self.up_proj = nn.Linear(embed_dim, hidden_dim, **made)
        self.down_proj = nn.Linear(hidden_dim, embed_dim, **made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_proj, self.up_proj
        if unlearning(x, gate) and unlearning(x, up) and up.bias is None:
            hidden = activated_linear(x, gate.weight, gate.bias, self.activation, up=up.weight)
        else:
            hidden = _ACTIVATIONS[self.activation](gate(x)) * up(x)
        y: torch.Tensor = self.down_proj(hidden)
        return y


class ActivatedLinear(nn.Module):
    """``activation(layer(x))`` in one go where nobody learns; a backward pass needs what the activation was given.

    Args:
        activation: one of ``vlmkernels.ops.activated_linear.ACTIVATIONS``.
        name: of the layer.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        activation: str,
        *,
        name: str = "dense",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.name, self.activation = name, activation
        self.add_module(name, nn.Linear(embed_dim, hidden_dim, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        layer = getattr(self, self.name)
        if unlearning(x, layer):
            return activated_linear(x, layer.weight, layer.bias, self.activation)
        return _ACTIVATIONS[self.activation](layer(x))


class FeedForward(ActivatedLinear):
    """``second(activation(first(x)))``; with gradients in kernels of its own where those are worth it.

    Args:
        names: of the two layers.
    """

    def __init__(
        self,
        embed_dim: int,
        hidden_dim: int,
        activation: str,
        *,
        names: tuple[str, str] = ("fc1", "fc2"),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(embed_dim, hidden_dim, activation, name=names[0], device=device, dtype=dtype)
        self.second = names[1]
        self.add_module(names[1], nn.Linear(hidden_dim, embed_dim, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor, total: torch.Tensor | None = None) -> torch.Tensor:
        """``total``: what the result, less the second layer's bias, is added to, where it is."""
        first, second = getattr(self, self.name), getattr(self, self.second)
        if self._learns_in_one(x, first, second):
            bias = second.bias if total is None else None
            return feed_forward(x, first.weight, first.bias, second.weight, bias, self.activation, total=total)
        y = super().forward(x)
        return second(y) if total is None else add_product(total, y, second.weight)

    def _learns_in_one(self, x: torch.Tensor, first: Any, second: Any) -> bool:
        """Whether something learns here, and nobody watches it between the two layers."""
        if self.activation not in LEARNING or not learning(x, first, second) or not bare(x, first) or not bare(x, second):
            return False
        parameters = first.weight, first.bias, second.weight, second.bias
        return all(type(p) is nn.Parameter for p in parameters) and pays(x, first.weight)


def _parameters(layer: nn.Module) -> Iterable[nn.Parameter]:
    """Those of a layer; of one without others inside in an eighth of the time that ``parameters()`` takes."""
    return layer.parameters() if layer._modules else [p for p in layer._parameters.values() if p is not None]


def learning(x: torch.Tensor, *layers: nn.Module) -> bool:
    """Whether one of these learns."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in (x, *(p for layer in layers for p in _parameters(layer))))


def bare(x: torch.Tensor, *layers: nn.Module) -> bool:
    """Whether nobody watches this linear layer, and the LayerNorm behind it, and all is of one dtype."""
    if torch.is_autocast_enabled(x.device.type):
        return False
    kinds = zip(layers, (nn.Linear, nn.LayerNorm), strict=False)
    same = all(parameter.dtype == x.dtype for layer in layers for parameter in _parameters(layer))
    return same and all(plain(layer, kind) for layer, kind in kinds)


def unlearning(x: torch.Tensor, *layers: nn.Module) -> bool:
    """Whether nobody learns or watches this linear layer, and the LayerNorm behind it."""
    return not learning(x, *layers) and bare(x, *layers)


def inference(x: torch.Tensor, *layers: nn.Module) -> bool:
    """Whether these may be one kernel: in 16 bit on a GPU, where neither learns."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and unlearning(x, *layers)

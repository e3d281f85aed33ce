# SPDX-License-Identifier: Apache-2.0
"""Feed-forwards whose products cuBLAS can do better than layer by layer."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlmkernels.nn._packed import SideBySide, plain, project


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


class TanhFeedForward(nn.Module):
    """``second(gelu(first(x)))`` with the tanh in GELU that cuBLAS has behind a product of 16 bit.

    It takes 35 us for it where a pass of its own takes 115 (SigLIP-So400m, 32 images of 729 tokens, H200). A backward pass needs
    what GELU was given, and torch.compile has its own way: there the layers are called.

    Args:
        names: of the two layers.
    """

    def __init__(
        self, embed_dim: int, hidden_dim: int, *, names: tuple[str, str] = ("fc1", "fc2"), device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        self.names = names
        self.add_module(names[0], nn.Linear(embed_dim, hidden_dim, device=device, dtype=dtype))
        self.add_module(names[1], nn.Linear(hidden_dim, embed_dim, device=device, dtype=dtype))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first, second = (getattr(self, name) for name in self.names)
        fused = inference(x, first) and not torch.compiler.is_compiling()
        y: torch.Tensor = second(_fused(x, first) if fused else F.gelu(first(x), approximate="tanh"))
        return y


def inference(x: torch.Tensor, *layers: nn.Module) -> bool:
    """Whether this linear layer, and the LayerNorm behind it, may be one kernel: in 16 bit on a GPU, where neither learns."""
    parameters = [parameter for layer in layers for parameter in layer.parameters()]
    learns = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *parameters))
    if not x.is_cuda or x.dtype not in (torch.bfloat16, torch.float16) or torch.is_autocast_enabled(x.device.type) or learns:
        return False
    kinds = zip(layers, (nn.Linear, nn.LayerNorm), strict=False)
    return all(parameter.dtype == x.dtype for parameter in parameters) and all(plain(layer, kind) for layer, kind in kinds)


def _fused(x: torch.Tensor, first: nn.Linear) -> torch.Tensor:
    # torch's own encoder layers call it; on a GPU it is this GELU.
    flat = torch._addmm_activation(first.bias, x.flatten(0, -2), first.weight.t(), use_gelu=True)
    y: torch.Tensor = flat.unflatten(0, x.shape[:-1])
    return y

# SPDX-License-Identifier: Apache-2.0
"""The two versions of FlashAttention: how each is called, and what it can't do. Read in flash-attn-4 4.0.0b36 and flash-attn 2.8.

The forward is the public function of each. Its backward can't be reached that way, as autograd is switched off inside a
registered op, so it is the function that their own ``autograd.Function`` calls.
"""

import importlib
import inspect
from abc import ABC, abstractmethod
from types import ModuleType
from typing import Any

import torch

Tensors = tuple[torch.Tensor, torch.Tensor]


def generation(device: torch.device) -> int:
    """The major compute capability: 8 is Ampere and Ada, 9 Hopper, 10 to 12 Blackwell."""
    return torch.cuda.get_device_capability(device)[0]


class Library(ABC):
    """One version. Tensors are laid out as the operator's; of a causal mask it gets only queries that see a key."""

    name: str
    package: str
    module: str
    first_generation: int

    def load(self) -> ModuleType | str:
        """Its module, or why it can't be had."""
        try:
            return importlib.import_module(self.module)
        except ModuleNotFoundError as error:
            if error.name and f"{self.module}.".startswith(f"{error.name}."):
                return f"{self.name} is not installed (pip install {self.package})"
            return f"{self.name} doesn't import: {error}"
        except Exception as error:  # a library built for another torch can fail in any way
            return f"{self.name} doesn't import: {type(error).__name__}: {error}".splitlines()[0]

    def function(self, name: str) -> Any:
        return getattr(self.load(), name)

    def why_not_importable(self) -> str | None:
        module = self.load()
        return module if isinstance(module, str) else self._why_not_version(module)

    def why_not_on(self, device: torch.device) -> str | None:
        if generation(device) >= self.first_generation:
            return None
        return f"{self.name} needs compute capability {self.first_generation}.0 or newer"

    @abstractmethod
    def _why_not_version(self, module: ModuleType) -> str | None:
        """Why the version that is installed can't be called as below."""

    @abstractmethod
    def why_not_fwd(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
        """Why not these head dims, which are multiples of 8 up to 256."""

    @abstractmethod
    def why_not_bwd(
        self, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float
    ) -> str | None:
        """Why not the backward of what ``why_not_fwd`` lets pass."""

    @abstractmethod
    def fwd(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, softcap: float) -> Tensors:
        """Output, in strides of its own, and log-sum-exp."""

    @abstractmethod
    def bwd(
        self, dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float, softcap: float,
    ) -> Tensors:  # fmt: skip
        """The gradient of q, contiguous, and those of k and v, one behind the other, flat."""


class FlashAttention4(Library):
    name, package, module, first_generation = "FlashAttention 4", "flash-attn-4", "flash_attn.cute.interface", 9
    #: By generation: up to which head dim of both q and v its kernels have tiles, and for which two others.
    HEAD_DIMS = {9: (256, ((192, 128),)), 10: (128, ((192, 128), (256, 256))), 11: (128, ((192, 128), (256, 256)))}

    def _why_not_version(self, module: ModuleType) -> str | None:
        for name, wanted in (("flash_attn_func", {"return_lse"}), ("_flash_attn_bwd", {"dq", "dk", "dv", "dlse"})):
            function = getattr(module, name, None)
            if function is None or not wanted <= set(inspect.signature(function).parameters):
                return f"this {self.package} has no {name} that takes {', '.join(sorted(wanted))}: another version is wanted"
        return None

    def why_not_fwd(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
        dims = (q.shape[3], v.shape[3])
        widest, others = self.HEAD_DIMS.get(generation(q.device), (128, ()))
        if dims in others or dims[0] == dims[1] <= widest:
            return None
        taken = " or ".join((f"one up to {widest} for both", *(f"{dim} and {value_dim}" for dim, value_dim in others)))
        return f"the head dims of q and v must be {taken} for {self.name} on this GPU, these are {dims[0]} and {dims[1]}"

    def why_not_bwd(
        self, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float
    ) -> str | None:
        major = generation(q.device)
        if major == 9 and q.shape[2] != k.shape[2] and q.shape[3] != v.shape[3]:
            return f"the backward of {self.name} takes grouped heads of one head dim, these are {q.shape[3]} and {v.shape[3]}"
        wide = major in (10, 11) and q.shape[3] == 256
        if softcap and (wide or major == 12):
            return f"on this GPU the backward of {self.name} has no softcap{' at head dim 256' if wide else ''}, got {softcap}"
        if dlse is not None and wide:
            return f"on this GPU the backward of {self.name} takes no gradient of the log-sum-exp at head dim 256"
        return None

    def fwd(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, softcap: float) -> Tensors:
        function = self.function("flash_attn_func")
        out, lse = function(q, k, v, softmax_scale=scale, causal=causal, softcap=softcap, return_lse=True)
        return out, lse

    def bwd(
        self, dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float, softcap: float,
    ) -> Tensors:  # fmt: skip
        dq, dkv = q.new_empty(q.shape), k.new_empty(k.numel() + v.numel())
        dk, dv = dkv[: k.numel()].view(k.shape), dkv[k.numel() :].view(v.shape)
        self.function("_flash_attn_bwd")(
            q, k, v, out, dout, lse, softmax_scale=scale, causal=causal, softcap=softcap, dq=dq, dk=dk, dv=dv, dlse=dlse
        )
        return dq, dkv


class FlashAttention2(Library):
    name, package, module, first_generation = "FlashAttention 2", "flash-attn", "flash_attn.flash_attn_interface", 8

    def _why_not_version(self, module: ModuleType) -> str | None:
        version = str(getattr(importlib.import_module("flash_attn"), "__version__", "of no known version"))
        # Since 2.7 the two sides of a window are two arguments.
        known = [int(part) for part in version.split(".")[:2] if part.isdigit()]
        return None if known >= [2, 7] else f"this {self.package} is {version}, wanted 2.7 or newer"

    def why_not_fwd(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> str | None:
        if q.shape[3] == v.shape[3]:
            return None
        return f"{self.name} takes q, k and v of one head dim, these are {q.shape[3]} and {v.shape[3]}"

    def why_not_bwd(
        self, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, softcap: float
    ) -> str | None:
        if dlse is None:
            return None
        # Its delta is always that of the output: there is no argument to take dlse from it.
        return f"{self.name} takes no gradient of the log-sum-exp: leave out return_lse=True, or install flash-attn-4"

    def fwd(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, causal: bool, scale: float, softcap: float) -> Tensors:
        function = self.function("flash_attn_func")
        out, lse, _ = function(q, k, v, softmax_scale=scale, causal=causal, softcap=softcap, return_attn_probs=True)
        return out, lse

    def bwd(
        self, dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
        out: torch.Tensor, lse: torch.Tensor, causal: bool, scale: float, softcap: float,
    ) -> Tensors:  # fmt: skip
        dq, dkv = q.new_empty(q.shape), k.new_empty(k.numel() + v.numel())
        dk, dv = dkv[: k.numel()].view(k.shape), dkv[k.numel() :].view(v.shape)
        self.function("_flash_attn_backward")(
            dout, q, k, v, out, lse, dq, dk, dv,
            dropout_p=0.0, softmax_scale=scale, causal=causal, window_size_left=-1, window_size_right=-1, softcap=softcap,
            alibi_slopes=None, deterministic=False,
        )  # fmt: skip
        return dq, dkv


LIBRARIES: tuple[Library, ...] = (FlashAttention4(), FlashAttention2())

# SPDX-License-Identifier: Apache-2.0
"""What a workload is: the inputs, the peers, the exact result, how much work it is. And those of rope."""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlmkernels.bench import peers
from vlmkernels.bench.peers import Provider
from vlmkernels.ops.rope import rope, rope_qkv_
from vlmkernels.testing import Comparison, compare

OURS = "vlmkernels"


@dataclass(frozen=True)
class Case:
    """A workload with its inputs on a device.

    Args:
        also: other forms of ours, whose names begin with ours; the fastest one is compared with the peers.
        outputs: what each tensor of a provider's result is called.
        exact: the fp64 result for the part of the work that ``part`` cuts out of a provider's result.
        flops: multiplications and additions that the formula needs, a mask's hidden pairs left out.
        bytes: each input and output once.
        clock: ``"device"``; ``"replay"``: the same, of the call captured in a CUDA graph, for steps that the host can't queue as
            fast as they run; ``"queue"``: behind another such call, as in a loop; ``"graph"``: the time of a call among others in
            one CUDA graph; ``"host"``: the time that the host is busy; ``"import"``: what the call returns last, milliseconds in
            a process of its own. A CPU takes ``"device"`` for those of a GPU.
    """

    ours: Provider
    peers: tuple[Provider, ...]
    outputs: tuple[str, ...]
    exact: Callable[[], tuple[torch.Tensor, ...]]
    part: Callable[[int, Any], torch.Tensor]
    rule: str
    flops: float
    bytes: float
    dtype: torch.dtype
    clock: str = "device"
    also: tuple[Provider, ...] = ()

    @functools.cached_property
    def _exact(self) -> tuple[torch.Tensor, ...]:
        return self.exact()

    def check(self, result: Any) -> tuple[Comparison, ...]:
        """Compare a provider's result with the exact one."""
        tensors = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        return tuple(compare(self.part(i, x), y, self.rule) for i, (x, y) in enumerate(zip(tensors, self._exact, strict=True)))


@dataclass(frozen=True)
class Place:
    """Where a workload stands in a plot of several (``vlmkernels.bench.plots``): at ``x`` of one of the plot's panels."""

    chart: str
    panel: str = ""
    x: float = 0.0


@dataclass(frozen=True)
class Workload:
    """A named piece of work; ``build`` makes its inputs. ``gpu_only`` says why a CPU leaves it out, if it does."""

    suite: str
    op: str
    name: str
    direction: str
    build: Callable[[torch.device], Case]
    gpu_only: str = ""
    places: tuple[Place, ...] = ()

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.op}/{self.name}/{self.direction}"


def work_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; fp32 on a CPU, most of which compute bf16 slowly."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def num_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def rope_case(
    shape: tuple[int, int, int, int, int], norm: bool = False, in_place: bool = False
) -> Callable[[torch.device], Case]:
    """A builder for rope on normal deviates with fp32 tables; shape is ``(B, S, H, Hk, D)``. The last 64 tokens are checked.

    ``in_place``: ours is ``rope_qkv_`` on the packed projection, of which peers take q and k.
    """

    def build(device: torch.device) -> Case:
        batch, length, heads, kv_heads, dim = shape
        dtype = work_dtype(device)
        torch.manual_seed(0)
        sizes = [heads, kv_heads, kv_heads]
        packed = torch.randn(batch, length, sum(sizes), dim, device=device, dtype=dtype)
        q, k, _ = packed.split(sizes, 2)
        if not in_place:
            q, k = q.contiguous(), k.contiguous()
        frequency = 10000.0 ** -(torch.arange(0, dim, 2, device=device) / dim)
        angle = torch.arange(length, device=device)[:, None] * frequency
        cos, sin = angle.cos(), angle.sin()
        options: dict[str, Any] = {}
        if norm:
            options = {name: 1 + 0.1 * torch.randn(dim, device=device, dtype=dtype) for name in ("q_weight", "k_weight")}
        last = slice(max(0, length - 64), None)

        def exact() -> tuple[torch.Tensor, ...]:
            doubles = {name: w.double() for name, w in options.items()}
            a, b, c, s = (x.double() for x in (q[:, last], k[:, last], cos[last], sin[last]))
            return rope(a, b, c, s, **doubles, backend="reference")

        def prepare_in_place() -> Callable[[], Any]:
            # The first call is the one that is compared; the others turn what it left further, which takes as long.
            own = packed.clone()
            qkv, views = own.flatten(2), own.split(sizes, 2)[:2]

            def call() -> Any:
                rope_qkv_(qkv, cos, sin, num_heads=heads, num_kv_heads=kv_heads, **options)
                return views

            return call

        wide = [torch.cat([x, x], -1) for x in (cos, sin)]
        return Case(
            ours=Provider(OURS, prepare_in_place if in_place else lambda: lambda: rope(q, k, cos, sin, **options)),
            peers=tuple(peers.rope_peers(q, k, wide[0], wide[1], options)),
            outputs=("q", "k"),
            exact=exact,
            part=lambda i, x: x[:, last],
            rule="norm",
            flops=0.0,
            bytes=2.0 * num_bytes(q, k) + num_bytes(cos, sin),
            dtype=dtype,
        )

    return build

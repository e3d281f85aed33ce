# SPDX-License-Identifier: Apache-2.0
"""The workloads of attention and rope, and what a workload is: the inputs, the peers, the exact result, how much work it is."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from vlmkernels import KeyRanges
from vlmkernels.bench import peers, towers
from vlmkernels.bench.peers import AttentionInputs, Provider
from vlmkernels.ops.attention import attention
from vlmkernels.ops.rope import rope, rope_qkv_
from vlmkernels.testing import Comparison, compare

OURS = "vlmkernels"


@dataclass(frozen=True)
class Case:
    """A workload with its inputs on a device.

    Args:
        outputs: what each tensor of a provider's result is called.
        exact: the fp64 result for the part of the work that ``part`` cuts out of a provider's result.
        flops: multiplications and additions that the formula needs, a mask's hidden pairs left out.
        bytes: each input and output once.
        clock: ``"device"``; ``"replay"``: the same, of the call captured in a CUDA graph, for steps that the host can't queue as
            fast as they run; ``"graph"``: the time of a call among others in one CUDA graph; ``"host"``: the time that the host
            is busy. A CPU takes ``"device"`` for the two with graphs.
    """

    ours: Provider
    peers: tuple[Provider, ...]
    outputs: tuple[str, ...]
    exact: Callable[[], tuple[torch.Tensor, ...]]
    part: Callable[[int, torch.Tensor], torch.Tensor]
    rule: str
    flops: float
    bytes: float
    dtype: torch.dtype
    clock: str = "device"

    @functools.cached_property
    def _exact(self) -> tuple[torch.Tensor, ...]:
        return self.exact()

    def check(self, result: Any) -> tuple[Comparison, ...]:
        """Compare a provider's result with the exact one."""
        tensors = (result,) if isinstance(result, torch.Tensor) else tuple(result)
        return tuple(compare(self.part(i, x), y, self.rule) for i, (x, y) in enumerate(zip(tensors, self._exact, strict=True)))


@dataclass(frozen=True)
class Workload:
    """A named piece of work; ``build`` makes its inputs. ``gpu_only`` says why a CPU leaves it out, if it does."""

    suite: str
    op: str
    name: str
    direction: str
    build: Callable[[torch.device], Case]
    gpu_only: str = ""

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.op}/{self.name}/{self.direction}"


def work_dtype(device: torch.device) -> torch.dtype:
    """bf16 on a GPU; fp32 on a CPU, most of which compute bf16 slowly."""
    return torch.bfloat16 if device.type == "cuda" else torch.float32


def num_bytes(*tensors: torch.Tensor | None) -> int:
    return sum(x.numel() * x.element_size() for x in tensors if x is not None)


def attention_case(inputs: AttentionInputs, more_peers: Sequence[Provider] = (), backward: bool = False) -> Case:
    """Attention forward, or its backward pass alone. The last key head of the first and the last batch entry is checked."""
    q, k, v = inputs.q, inputs.k, inputs.v
    batch, queries, heads, _ = q.shape
    kv_heads, group = k.shape[2], heads // k.shape[2]
    mask: dict[str, Any] = {"causal": inputs.causal, "scale": inputs.scale, "softcap": inputs.softcap}
    dout = None
    if backward:
        dout = torch.randn(batch, queries, heads, v.shape[-1], device=q.device, dtype=q.dtype)
    entries = [0] if batch == 1 else [0, batch - 1]

    def part(i: int, x: torch.Tensor) -> torch.Tensor:
        """``i``: dq, dk, dv of a backward pass; a forward pass has one output, shaped like q."""
        return x[entries][:, :, -group:] if i == 0 else x[entries][:, :, kv_heads - 1 :]

    def exact() -> tuple[torch.Tensor, ...]:
        cut = [part(i, x).double().requires_grad_(backward) for i, x in enumerate((q, k, v))]
        ranges = inputs.ranges
        if ranges is not None and ranges.start.shape[0] > 1:
            ranges = KeyRanges(ranges.start[entries], ranges.stop[entries])
        with torch.set_grad_enabled(backward):
            out: Any = attention(cut[0], cut[1], cut[2], ranges, **mask, backend="reference")
        if dout is None:
            return (out,)
        return torch.autograd.grad(out, cut, part(0, dout).double())

    pairs = batch * heads * _visible_pairs(inputs)
    per_pair = q.shape[-1] + v.shape[-1]
    out_bytes = batch * queries * heads * v.shape[-1] * q.element_size()
    moved = num_bytes(q, k, v) + out_bytes

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return attention(q, k, v, inputs.ranges, **mask)

    ours = peers.provider(OURS, inputs, dout, lambda: forward)
    return Case(
        ours=ours,
        peers=(*more_peers, *peers.attention_peers(inputs, dout)),
        outputs=("dq", "dk", "dv") if backward else ("out",),
        exact=exact,
        part=part,
        rule="gemm",
        # Backward: five products instead of two (QK, dOV, dV, dQ, dK); out and dout are read too, dq, dk, dv written.
        flops=2.0 * pairs * (3 * q.shape[-1] + 2 * v.shape[-1] if backward else per_pair),
        bytes=2.0 * moved if backward else float(moved),
        dtype=q.dtype,
    )


def _visible_pairs(inputs: AttentionInputs) -> float:
    """Pairs of a query and a key it sees, for one head, averaged over the batch."""
    queries, keys = inputs.q.shape[1], inputs.k.shape[1]
    ranges = inputs.ranges
    if inputs.causal:
        ranges = KeyRanges.causal(queries, keys)
    if ranges is None:
        return float(queries * keys)
    return (ranges.stop - ranges.start).clamp(min=0).double().sum().item() / ranges.start.shape[0]


def random_attention(
    shape: tuple[int, int, int, int, int, int],
    mask: str = "",
    backward: bool = False,
    softcap: float = 0.0,
) -> Callable[[torch.device], Case]:
    """A builder for attention on normal deviates; shape is ``(B, H, Hk, Sq, Sk, D)``, mask is causal, prefix or image_blocks."""

    def build(device: torch.device) -> Case:
        batch, heads, kv_heads, queries, keys, dim = shape
        torch.manual_seed(0)
        sizes = ((queries, heads), (keys, kv_heads), (keys, kv_heads))
        q, k, v = (torch.randn(batch, *size, dim, device=device, dtype=work_dtype(device)) for size in sizes)
        ranges = None
        if mask == "prefix":
            ranges = KeyRanges.prefix_lm(queries, queries // 4, device=device)
        elif mask == "image_blocks":
            ranges = KeyRanges.image_text(image_ids=_image_ids(queries).to(device))
        inputs = AttentionInputs(q, k, v, 1 / math.sqrt(dim), mask == "causal", ranges, softcap)
        return attention_case(inputs, backward=backward)

    return build


def _image_ids(length: int) -> torch.Tensor:
    """Gemma-3's images of 256 tokens, one in every 512 tokens, text between them."""
    ids = torch.full((1, length), -1, dtype=torch.int32)
    for image, first in enumerate(range(32, length - 255, 512)):
        ids[:, first : first + 256] = image
    return ids


def tower_attention(tower: towers.Tower | None) -> Callable[[torch.device], Case]:
    """A builder for the attention of a tower on photos; None is the Q-Former's cross-attention."""

    def build(device: torch.device) -> Case:
        dtype = work_dtype(device)
        call = towers.qformer_cross_attention(device, dtype) if tower is None else towers.self_attention(tower, device, dtype)
        q, k, v = (x.transpose(1, 2) for x in (call.q, call.k, call.v))
        inputs = AttentionInputs(q, k, v, call.scale)
        return attention_case(inputs, peers.transformers_peers(call, inputs))

    return build


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

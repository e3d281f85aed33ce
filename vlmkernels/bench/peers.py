# SPDX-License-Identifier: Apache-2.0
"""What a user would run instead of attention and rope: transformers, SDPA and its kernels, FlexAttention, FlashAttention."""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from vlmkernels import KeyRanges
from vlmkernels.bench import Unavailable
from vlmkernels.bench.towers import AttentionCall


@dataclass(frozen=True)
class Provider:
    """One way to do the work.

    Args:
        prepare: sets it up and returns the call that is timed; raises where it can't run.
        compiled: it goes through torch.compile, which takes seconds.
    """

    name: str
    prepare: Callable[[], Callable[[], Any]]
    compiled: bool = False


@dataclass(frozen=True)
class AttentionInputs:
    """``[B, S, H, D]`` tensors, and the mask as ranges or as ``causal``, which is cheaper for all."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float
    causal: bool = False
    ranges: KeyRanges | None = None
    softcap: float = 0.0

    @property
    def grouped(self) -> bool:
        return self.q.shape[2] != self.k.shape[2]

    @property
    def on_gpu(self) -> bool:
        return self.q.is_cuda


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def provider(
    name: str, inputs: AttentionInputs, dout: torch.Tensor | None, make: Callable[[], Forward], compiled: bool = False
) -> Provider:
    """A provider from an attention function; with ``dout`` its backward pass alone is timed."""

    def prepare() -> Callable[[], Any]:
        forward = make()
        if dout is None:
            return lambda: forward(inputs.q, inputs.k, inputs.v)
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        with torch.enable_grad():
            out = forward(*leaves)
        return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)

    return Provider(name, prepare, compiled)


def attention_peers(inputs: AttentionInputs, dout: torch.Tensor | None = None) -> list[Provider]:
    """Every attention of torch and FlashAttention that may take these inputs; those that can't say so when prepared."""
    masked = inputs.ranges is not None

    def peer(name: str, make: Callable[[], Forward], compiled: bool = False) -> Provider:
        return provider(name, inputs, dout, make, compiled)

    suffix = " dense mask" if masked else ""
    if not inputs.on_gpu:
        return [peer(f"sdpa{suffix}", lambda: _sdpa(inputs, None))]
    peers = [
        peer(f"sdpa cudnn{suffix}", lambda: _sdpa(inputs, SDPBackend.CUDNN_ATTENTION)),
        peer(f"sdpa efficient{suffix}", lambda: _sdpa(inputs, SDPBackend.EFFICIENT_ATTENTION)),
        peer("flex compiled", lambda: _flex(inputs), compiled=True),
    ]
    if not masked:
        peers.insert(1, peer("sdpa flash", lambda: _sdpa(inputs, SDPBackend.FLASH_ATTENTION)))
        peers += [
            peer("fa4", lambda: _flash("flash_attn.cute", inputs)),
            peer("fa2", lambda: _flash("flash_attn", inputs)),
        ]
    return peers


def transformers_peers(call: AttentionCall, inputs: AttentionInputs) -> list[Provider]:
    """The attention functions that the transformers layer itself would call, on the tensors that it would pass."""

    def heads_first(function: Callable[..., Any]) -> Forward:
        return lambda q, k, v: call.run(function, q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2))

    peers = [
        provider("hf eager", inputs, None, lambda: heads_first(call.eager())),
        provider("hf sdpa", inputs, None, lambda: heads_first(call.sdpa())),
    ]
    if inputs.on_gpu:
        compiled = provider(
            "hf eager compiled", inputs, None, lambda: torch.compile(heads_first(call.eager()), dynamic=False), True
        )
        peers.append(compiled)
    return peers


def _sdpa(inputs: AttentionInputs, backend: SDPBackend | None) -> Forward:
    if inputs.softcap:
        raise Unavailable("it has no softcap")
    mask = None
    if inputs.ranges is not None:
        mask = inputs.ranges.dense(inputs.k.shape[1])[:, None]

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = F.scaled_dot_product_attention(
            q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2),
            attn_mask=mask, is_causal=inputs.causal, scale=inputs.scale, enable_gqa=inputs.grouped,
        )  # fmt: skip
        return out.transpose(1, 2)

    if backend is None:
        return forward

    def forced(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return forward(q, k, v)

    return forced


def _flex(inputs: AttentionInputs) -> Forward:
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    compiled = torch.compile(flex.flex_attention, dynamic=False)
    queries, keys = inputs.q.shape[1], inputs.k.shape[1]
    mask_mod = None
    if inputs.causal:
        offset = keys - queries
        mask_mod = lambda b, h, i, j: j <= i + offset  # noqa: E731
    elif inputs.ranges is not None:
        if inputs.ranges.start.shape[0] != 1:
            raise Unavailable("this benchmark gives FlexAttention one mask for the whole batch")
        start, stop = inputs.ranges.start[0], inputs.ranges.stop[0]
        mask_mod = lambda b, h, i, j: (j >= start[i]) & (j < stop[i])  # noqa: E731
    score_mod = None
    if inputs.softcap:
        score_mod = lambda score, b, h, i, j: inputs.softcap * torch.tanh(score / inputs.softcap)  # noqa: E731
    block_mask = None
    if mask_mod is not None:
        block_mask = flex.create_block_mask(mask_mod, None, None, queries, keys, device=inputs.q.device)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out: torch.Tensor = compiled(
            q, k, v, score_mod=score_mod, block_mask=block_mask, scale=inputs.scale, enable_gqa=inputs.grouped
        )
        return out.transpose(1, 2)

    return forward


def _flash(module: str, inputs: AttentionInputs) -> Forward:
    try:
        function = importlib.import_module(module).flash_attn_func
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{module} is not installed") from error
    if inputs.q.dtype not in (torch.bfloat16, torch.float16):
        raise Unavailable("it takes bf16 and fp16 only")
    softcap = {"softcap": inputs.softcap} if inputs.softcap else {}

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = function(q, k, v, softmax_scale=inputs.scale, causal=inputs.causal, **softcap)
        first: torch.Tensor = out[0] if isinstance(out, tuple) else out
        return first

    return forward


def rotated(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rope in fp32 as transformers' vision towers write it, on ``[B, S, H, D]`` with full-width tables ``[S, D]``."""
    x32 = x.float()
    half = x.shape[-1] // 2
    turned = torch.cat([-x32[..., half:], x32[..., :half]], -1)
    return (x32 * cos[:, None].float() + turned * sin[:, None].float()).to(x.dtype)


def rope_peers(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weights: dict[str, torch.Tensor]
) -> list[Provider]:
    """The eager formula of transformers (with an RMSNorm of each head first, if there are weights), and the same compiled."""

    def eager() -> tuple[torch.Tensor, torch.Tensor]:
        a, b = q, k
        if weights:
            a, b = (F.rms_norm(x, (x.shape[-1],), weights[w], 1e-6) for x, w in ((a, "q_weight"), (b, "k_weight")))
        return rotated(a, cos, sin), rotated(b, cos, sin)

    peers = [Provider("hf eager", lambda: eager)]
    if q.is_cuda:
        peers.append(Provider("hf eager compiled", lambda: torch.compile(eager, dynamic=False), compiled=True))
    return peers

# SPDX-License-Identifier: Apache-2.0
"""What a user would run instead of attention and rope: transformers, SDPA and its kernels, FlexAttention, FlashAttention."""

import functools
import importlib
from collections.abc import Callable, Sequence
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


@dataclass(frozen=True)
class PackedInputs:
    """``[T, H, D]`` tensors of images (or windows) of these lengths, one behind the other; each sees itself alone."""

    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    lengths: tuple[int, ...]

    @functools.cached_property
    def cu_seqlens(self) -> torch.Tensor:
        return torch.tensor([0, *self.lengths], device=self.q.device).cumsum(0).int()

    @functools.cached_property
    def document(self) -> torch.Tensor:
        """Which image a token is of, ``[T]``."""
        lengths = torch.tensor(self.lengths, device=self.q.device)
        return torch.repeat_interleave(torch.arange(len(lengths), device=lengths.device), lengths)

    def batched(self, sequences: int) -> AttentionInputs:
        """The same tensors cut into sequences of one length, ``[B, S, H, D]``."""
        q, k, v = (x.unflatten(0, (sequences, -1)) for x in (self.q, self.k, self.v))
        return AttentionInputs(q, k, v, self.q.shape[-1] ** -0.5)

    @property
    def on_gpu(self) -> bool:
        return self.q.is_cuda


Forward = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
#: Whether a query sees a key, of the indices of batch, head, query and key, as FlexAttention asks.
MaskMod = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]


def backward_alone(function: Callable[[], torch.Tensor], leaves: Sequence[torch.Tensor], dout: torch.Tensor) -> Callable[[], Any]:
    """The gradients of ``function`` by ``leaves``, whose forward pass is done beforehand."""
    with torch.enable_grad():
        out = function()
    return lambda: torch.autograd.grad(out, leaves, dout, retain_graph=True)


def provider(
    name: str,
    inputs: AttentionInputs | PackedInputs,
    dout: torch.Tensor | None,
    make: Callable[[], Forward],
    compiled: bool = False,
) -> Provider:
    """A provider from an attention function; with ``dout`` its backward pass alone is timed."""

    def prepare() -> Callable[[], Any]:
        forward = make()
        if dout is None:
            return lambda: forward(inputs.q, inputs.k, inputs.v)
        leaves = [x.detach().clone().requires_grad_() for x in (inputs.q, inputs.k, inputs.v)]
        return backward_alone(lambda: forward(*leaves), leaves, dout)

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
        peer("flex compiled", lambda: _flex(inputs, _mask_mod(inputs)), compiled=True),
    ]
    if masked:
        peers.append(peer("flex fa4 compiled", lambda: _flex(inputs, _mask_mod(inputs), fa4=True), compiled=True))
    else:
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


def _flex(inputs: AttentionInputs, mask_mod: MaskMod | None, fa4: bool = False) -> Forward:
    """FlexAttention compiled to its Triton kernels, or to those of FlashAttention 4."""
    flex = importlib.import_module("torch.nn.attention.flex_attention")
    options: dict[str, Any] = {}
    if fa4:
        _flash_function("flash_attn.cute", "flash_attn_func", inputs.q.dtype)
        options["kernel_options"] = {"BACKEND": "FLASH"}
    if inputs.softcap:
        options["score_mod"] = lambda score, b, h, i, j: inputs.softcap * torch.tanh(score / inputs.softcap)
    if mask_mod is not None:
        options["block_mask"] = block_mask(mask_mod, inputs.q.shape[1], inputs.k.shape[1], inputs.q.device)()
    compiled = torch.compile(flex.flex_attention, dynamic=False)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
        out: torch.Tensor = compiled(q, k, v, scale=inputs.scale, enable_gqa=inputs.grouped, **options)
        return out.transpose(1, 2)

    return forward


def _mask_mod(inputs: AttentionInputs) -> MaskMod | None:
    if inputs.causal:
        offset = inputs.k.shape[1] - inputs.q.shape[1]
        return lambda b, h, i, j: j <= i + offset
    return None if inputs.ranges is None else range_mask(inputs.ranges)


def range_mask(ranges: KeyRanges) -> MaskMod:
    """Ranges that serve the whole batch as FlexAttention takes a mask."""
    if ranges.start.shape[0] != 1:
        raise Unavailable("this benchmark gives FlexAttention one mask for the whole batch")
    start, stop = ranges.start[0], ranges.stop[0]
    return lambda b, h, i, j: (j >= start[i]) & (j < stop[i])


def block_mask(mask_mod: MaskMod, queries: int, keys: int, device: torch.device) -> Callable[[], Any]:
    """What makes FlexAttention's block mask. On a GPU it is compiled: else it holds all pairs in memory."""
    create = importlib.import_module("torch.nn.attention.flex_attention").create_block_mask
    if device.type == "cuda":
        create = torch.compile(create, dynamic=False)
    return lambda: create(mask_mod, None, None, queries, keys, device=device)


def _flash_function(module: str, name: str, dtype: torch.dtype) -> Callable[..., Any]:
    """A function of FlashAttention that gives the output alone."""
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise Unavailable(f"{module} is not installed") from error
    if dtype not in (torch.bfloat16, torch.float16):
        raise Unavailable("it takes bf16 and fp16 only")

    def first(*args: Any, **kwargs: Any) -> Any:
        out = function(*args, **kwargs)
        return out[0] if isinstance(out, tuple) else out

    return first


def _flash(module: str, inputs: AttentionInputs) -> Forward:
    function = _flash_function(module, "flash_attn_func", inputs.q.dtype)
    softcap = {"softcap": inputs.softcap} if inputs.softcap else {}
    return functools.partial(function, softmax_scale=inputs.scale, causal=inputs.causal, **softcap)


def packed_peers(inputs: PackedInputs, dout: torch.Tensor | None = None) -> list[Provider]:
    """What takes packed images: SDPA image by image (windows, all of one length, as a batch), FlexAttention, varlen functions."""

    def peer(name: str, make: Callable[[], Forward], compiled: bool = False) -> Provider:
        return provider(name, inputs, dout, make, compiled)

    equal = len(set(inputs.lengths)) == 1
    if not equal:
        peers = [peer("sdpa split", lambda: _split(inputs))]
    elif not inputs.on_gpu:
        peers = [peer("sdpa batched", lambda: _batched(inputs, None))]
    else:
        peers = [
            peer("sdpa cudnn batched", lambda: _batched(inputs, SDPBackend.CUDNN_ATTENTION)),
            peer("sdpa flash batched", lambda: _batched(inputs, SDPBackend.FLASH_ATTENTION)),
            peer("sdpa efficient batched", lambda: _batched(inputs, SDPBackend.EFFICIENT_ATTENTION)),
        ]
    if inputs.on_gpu:
        peers += [
            peer("flex compiled", lambda: _flex_packed(inputs), compiled=True),
            peer("flex fa4 compiled", lambda: _flex_packed(inputs, fa4=True), compiled=True),
            *varlen_peers(inputs, dout),
        ]
    return peers


def varlen_peers(inputs: PackedInputs, dout: torch.Tensor | None = None) -> list[Provider]:
    """The functions that take cumulative lengths: torch's, FlashAttention 4's and 2's."""
    return [
        provider("torch varlen", inputs, dout, lambda: _torch_varlen(inputs)),
        provider("fa4 varlen", inputs, dout, lambda: _flash_varlen("flash_attn.cute", inputs)),
        provider("fa2 varlen", inputs, dout, lambda: _flash_varlen("flash_attn", inputs)),
    ]


def _split(inputs: PackedInputs) -> Forward:
    """A call for each image, as transformers' towers make them for SDPA."""
    sdpa = _sdpa(inputs.batched(1), None)

    def forward(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        images = zip(*(x.unsqueeze(0).split(inputs.lengths, 1) for x in (q, k, v)), strict=True)
        return torch.cat([sdpa(*image) for image in images], 1).squeeze(0)

    return forward


def _batched(inputs: PackedInputs, backend: SDPBackend | None) -> Forward:
    return _through_batch(_sdpa(inputs.batched(len(inputs.lengths)), backend), len(inputs.lengths))


def _flex_packed(inputs: PackedInputs, fa4: bool = False) -> Forward:
    document = inputs.document
    return _through_batch(_flex(inputs.batched(1), lambda b, h, i, j: document[i] == document[j], fa4), 1)


def _through_batch(forward: Forward, sequences: int) -> Forward:
    """A function of ``[B, S, H, D]`` tensors as one of packed tensors. Views alone, whose gradients are views too."""

    def packed(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return forward(*(x.unflatten(0, (sequences, -1)) for x in (q, k, v))).flatten(0, 1)

    return packed


def _torch_varlen(inputs: PackedInputs) -> Forward:
    try:
        function = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError as error:
        raise Unavailable("this torch has no torch.nn.attention.varlen") from error
    cu, longest = inputs.cu_seqlens, max(inputs.lengths)
    return lambda q, k, v: function(q, k, v, cu, cu, longest, longest)


def _flash_varlen(module: str, inputs: PackedInputs) -> Forward:
    function = _flash_function(module, "flash_attn_varlen_func", inputs.q.dtype)
    cu, longest = inputs.cu_seqlens, max(inputs.lengths)
    return functools.partial(function, cu_seqlens_q=cu, cu_seqlens_k=cu, max_seqlen_q=longest, max_seqlen_k=longest)


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

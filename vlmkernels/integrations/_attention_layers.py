# SPDX-License-Identifier: Apache-2.0
"""The attention of transformers' layers that has a module of ours: of towers, of text decoders, of packed images.

Masks are those of our attention implementation. A call with any other mask, or that asks for attention weights or drops some,
goes to the original.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlmkernels.integrations._once import once
from vlmkernels.integrations._read_masks import ranges_of
from vlmkernels.integrations._swap import Swapped, Unfit, autocast
from vlmkernels.integrations.ranges_mask import RangesMask, fitting
from vlmkernels.masks import KeyRanges
from vlmkernels.nn import CrossAttention, SelfAttention
from vlmkernels.nn._attention import ATTENTION_LAYOUTS

Tensor = torch.Tensor


def asked(config: Any, arguments: dict[str, Any], *names: str) -> bool:
    """Whether attention weights or hidden states are asked for."""
    return any(arguments.get(name) or getattr(config, name, False) for name in names)


def masked(arguments: dict[str, Any]) -> bool:
    """Whether there is a mask that is not one of ranges, by whatever name a version of transformers gives it."""
    return any("mask" in name and not _known(value) for name, value in arguments.items())


def _known(mask: Any) -> bool:
    return mask is None or isinstance(mask, RangesMask)


def rate(layer: Any) -> float:
    """The dropout of attention weights."""
    found = getattr(layer, "attention_dropout", None)
    found = layer.dropout if found is None else found
    return float(found.p if isinstance(found, nn.Dropout) else found)


class Attention(Swapped):
    """Self-attention of vision towers and of their text; masks are those of our attention implementation."""

    layout: str

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        q, out = ("qkv", "projection") if cls.layout == "blip" else ("q_proj", "o_proj" if cls.layout == "llama" else "out_proj")
        heads = getattr(layer, "num_heads", None) or layer.num_attention_heads
        inputs, output = getattr(layer, q), getattr(layer, out)
        return SelfAttention(
            inputs.in_features,
            heads,
            head_dim=layer.head_dim,
            layout=cls.layout,
            bias=inputs.bias is not None,
            out_bias=output.bias is not None,
            device="meta",
        )

    def arguments(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
        """What the module gets beside the tokens, or None where the original answers."""
        other = any(value is not None for value in args) or masked({**kwargs, "mask": attention_mask})
        drops = self.training and rate(self) > 0
        if other or drops or asked(self.config, kwargs, "output_attentions"):
            return None
        tokens = hidden_states.shape[1]
        ranges = fitting(attention_mask, tokens, tokens)
        if ranges is None and kwargs.get("is_causal"):
            ranges = KeyRanges.causal(tokens, tokens, device=hidden_states.device)
        return (ranges,)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = self.arguments(hidden_states, *args, **kwargs)
        return super().forward(hidden_states, *args, **kwargs) if given is None else (self.fast(hidden_states, *given), None)


class CaptionAttention(Swapped):
    """Self-attention of GIT's decoder over image and text, with a cache."""

    adds_masks = True

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        return _of_bert(layer)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        drops = self.training and rate(self) > 0
        if drops or not _known(attention_mask) or kwargs.get("output_attentions"):
            mask = attention_mask.additive(hidden_states.dtype) if isinstance(attention_mask, RangesMask) else attention_mask
            return super().forward(hidden_states, mask, *args, **kwargs)
        return self.fast(hidden_states, _fitted(attention_mask, hidden_states), None, _cached(self, args, kwargs)), None


class EncoderAttention(Swapped):
    """Self-attention of BERT; masks are those of our attention implementation."""

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        return _of_bert(layer)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        caches = any(value is not None for value in (*args, kwargs.get("cache"), kwargs.get("past_key_values")))
        drops = self.training and rate(self) > 0
        causal = attention_mask is None and self.is_causal  # sdpa leaves out such a mask
        if caches or drops or causal or not _known(attention_mask) or asked(self.config, kwargs, "output_attentions"):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        tokens = hidden_states.shape[1]
        return self.fast(hidden_states, fitting(attention_mask, tokens, tokens)), None


def _fitted(mask: RangesMask | None, hidden_states: Tensor) -> KeyRanges | None:
    """The ranges of a mask over a cache, whose length it knows."""
    return None if mask is None else fitting(mask, hidden_states.shape[1], mask.shape[3])


def _of_bert(layer: Any) -> nn.Module:
    query = layer.query
    arguments: dict[str, Any] = {"layout": "bert", "bias": query.bias is not None, "device": "meta"}
    return SelfAttention(query.in_features, layer.num_attention_heads, head_dim=layer.attention_head_size, **arguments)


def _cached(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """What puts keys and values into the cache that a call of ``layer`` came with, in a name after the version; None without."""
    caches = [value for value in (*args, kwargs.pop("cache", None), kwargs.pop("past_key_values", None)) if value is not None]
    if not caches:
        return None
    kind: Any = type(caches[0])
    more = {"kwargs": kwargs} if _takes_kwargs(kind) else {}

    def put(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = caches[0].update(k.transpose(1, 2), v.transpose(1, 2), layer.layer_idx, **more)
        return k.transpose(1, 2), v.transpose(1, 2)

    return put


@functools.cache
def _takes_kwargs(kind: Any) -> bool:
    """Whether a class of caches asks for the other arguments of the call; asked once, and not in every layer."""
    return "kwargs" in inspect.signature(kind.update).parameters


def _read(mask: Any, queries: int) -> KeyRanges | None:
    """The ranges of a mask, also of one that the model added up by itself; None of other masks and without one."""
    if isinstance(mask, RangesMask):
        return fitting(mask, queries, mask.shape[3])
    found = ranges_of(mask, queries, mask.shape[-1]) if isinstance(mask, Tensor) else None
    return found if isinstance(found, KeyRanges) else None


def _stays(layer: Any, x: Tensor, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether such a call of a decoder's attention is the original's, whatever its mask."""
    drops = layer.training and rate(layer) > 0
    return bool(args) or autocast(x) or drops or bool(kwargs.get("output_attentions"))


class DecoderAttention(Swapped):
    """Self-attention of a text decoder with rope and a cache: one product, and norms of the heads and rope in one pass."""

    reads = ("q_norm", "k_norm")

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        q, k, out, width = layer.q_proj, layer.k_proj, layer.o_proj, layer.head_dim
        norm = getattr(layer, "q_norm", None)
        gemma = type(norm).__name__ == "Gemma3RMSNorm"
        return SelfAttention(
            q.in_features,
            q.out_features // width,
            k.out_features // width,
            width,
            layout="llama",
            bias=q.bias is not None,
            out_bias=out.bias is not None,
            qk_norm=None if norm is None else "gemma" if gemma else "rms",
            norm_eps=0.0 if norm is None else norm.eps if gemma else norm.variance_epsilon,
            scale=layer.scaling,
            softcap=getattr(layer, "attn_logit_softcapping", None) or 0.0,
            device="meta",
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask, tables = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        other = _stays(self, hidden_states, args, kwargs) or not self.untouched()
        if other or not isinstance(mask, RangesMask) or tables is None:
            return super().forward(hidden_states, *args, **kwargs)
        given = {name: value for name, value in kwargs.items() if name not in ("attention_mask", "position_embeddings")}
        ranges = _fitted(mask, hidden_states)
        rope = tuple(_half(table) for table in tables)
        return self.fast(hidden_states, ranges, rope, _cached(self, (), given)), None


class OptAttention(Swapped):
    """Self-attention of OPT's decoder, with a cache."""

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        return SelfAttention(layer.embed_dim, layer.num_heads, bias=layer.enable_bias, scale=layer.scaling, device="meta")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("attention_mask")
        if not isinstance(mask, RangesMask) or _stays(self, hidden_states, args, kwargs):
            return super().forward(hidden_states, *args, **kwargs)
        given = {name: value for name, value in kwargs.items() if name != "attention_mask"}
        return self.fast(hidden_states, _fitted(mask, hidden_states), None, _cached(self, (), given)), None


class KosmosAttention(Swapped):
    """Self-attention of Kosmos-2's decoder, with a cache and a norm before its last layer."""

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        if layer.inner_attn_ln is None:
            raise Unfit("it has no norm inside")
        q, norm = layer.q_proj, layer.inner_attn_ln
        arguments: dict[str, Any] = {"bias": q.bias is not None, "norm_eps": norm.eps, "scale": layer.scaling, "device": "meta"}
        return SelfAttention(layer.embed_dim, layer.num_heads, layout="kosmos", **arguments)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        other = _stays(self, hidden_states, args, kwargs) or kwargs.get("encoder_hidden_states") is not None
        ranges = None if other else _read(kwargs.get("attention_mask"), hidden_states.shape[1])
        if ranges is None:
            return super().forward(hidden_states, *args, **kwargs)
        given = {name: value for name, value in kwargs.items() if name not in ("attention_mask", "encoder_hidden_states")}
        return self.fast(hidden_states, ranges, None, _cached(self, (), given)), None


class ImageAttention(Swapped):
    """Attention of text to images, in mllama's layers and gated ones of IDEFICS: one product for keys and values."""

    layout = "llama"
    #: What the call has the tokens of the images in.
    context = "cross_attention_states"

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        q, k, out, width = layer.q_proj, layer.k_proj, layer.o_proj, layer.head_dim
        norm = getattr(layer, ATTENTION_LAYOUTS[cls.layout].norms[0], None)
        return CrossAttention(
            q.in_features,
            q.out_features // width,
            k.out_features // width,
            width,
            context_dim=k.in_features,
            layout=cls.layout,
            bias=q.bias is not None,
            out_bias=out.bias is not None,
            qk_norm=None if norm is None else "rms",
            norm_eps=0.0 if norm is None else norm.variance_epsilon,
            scale=layer.scaling,
            device="meta",
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        images, other = kwargs.get(self.context), _stays(self, hidden_states, args, kwargs)
        ranges = None if other or images is None else _read(kwargs.get("attention_mask"), hidden_states.shape[1])
        if ranges is None or images is None:
            return super().forward(hidden_states, *args, **kwargs)
        given = {name: value for name, value in kwargs.items() if name not in ("attention_mask", self.context)}
        images = images.reshape(len(hidden_states), -1, images.shape[-1])  # mllama has the tiles in the batch
        return self.fast(hidden_states, images, ranges, cached=_cached(self, (), given)), None


class IdeficsAttention(ImageAttention):
    """Both attentions of IDEFICS's decoder; a cache has keys before their norm there, so there are none with both."""

    layout = "idefics"
    context = "key_value_states"

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        if layer.is_cross_attention:
            return super().build(layer)
        if layer.qk_layer_norms:
            raise Unfit("it has norms behind its cache")
        bias = layer.q_proj.bias is not None
        return SelfAttention(layer.hidden_size, layer.num_heads, layout="idefics", bias=bias, scale=layer.scaling, device="meta")

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if self.is_cross_attention and kwargs.get("past_key_values") is None:
            return super().forward(hidden_states, *args, **kwargs)
        positions, mask = kwargs.get("position_ids"), kwargs.get("attention_mask")
        other = self.is_cross_attention or kwargs.get("key_value_states") is not None or positions is None
        if other or not isinstance(mask, RangesMask) or _stays(self, hidden_states, args, kwargs):
            return self.original.forward(self, hidden_states, *args, **kwargs)
        known = ("attention_mask", "key_value_states", "position_ids")
        given = {name: value for name, value in kwargs.items() if name not in known}
        rope = tuple(_half(table) for table in self.rotary_emb(hidden_states, positions))
        return self.fast(hidden_states, _fitted(mask, hidden_states), rope, _cached(self, (), given)), None


class PackedAttention(Swapped):
    """Self-attention of Qwen-VL's towers: the images, frames or windows of a pack in one call, rotated in one pass."""

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        width, heads = layer.qkv.in_features, layer.num_heads
        return SelfAttention(width, heads, layout="timm", scale=layer.scaling, device="meta")

    def arguments(self, hidden_states: Tensor, cu_seqlens: Any = None, *args: Any, **kwargs: Any) -> tuple[Any, ...] | None:
        """What the module gets beside the tokens, or None where the original answers."""
        tables = kwargs.get("position_embeddings")
        drops = self.training and rate(self) > 0
        if args or tables is None or cu_seqlens is None or drops:
            return None
        total = hidden_states.shape[0]
        ranges = once(cu_seqlens, (total, "ranges"), lambda: KeyRanges.packed(cu_seqlens, total))
        return ranges, tuple(_half(table) for table in tables)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = self.arguments(hidden_states, *args, **kwargs)
        return super().forward(hidden_states, *args, **kwargs) if given is None else self.fast(hidden_states, *given)


def _half(table: Tensor) -> Tensor:
    """A table of transformers for rope, of a batch or of a pack, without its second half, which repeats the first."""

    def make() -> Tensor:
        first = (table if table.dim() == 3 else table[None])[..., : table.shape[-1] // 2]
        return first.clone(memory_format=torch.contiguous_format)

    half: Tensor = once(table, ("half",), make)
    return half

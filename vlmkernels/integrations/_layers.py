# SPDX-License-Identifier: Apache-2.0
"""The layers of transformers that have a module of ours: by class, how it is built, and which calls it serves.

A class is known by its name, so nothing of transformers is imported here. Each forward has the original's arguments and result.
A call that the module would not answer as the original does goes to the original: attention weights that are asked for, masks,
dropout of attention weights, positions to be resized, hooks inside of what the module does in one go.
"""

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from vlmkernels.integrations import _timm
from vlmkernels.integrations._once import once
from vlmkernels.integrations._swap import Swapped, Unfit, autocast
from vlmkernels.integrations.ranges_mask import RangesMask, fitting
from vlmkernels.masks import KeyRanges
from vlmkernels.nn import (
    AttentionPool,
    KosmosResampler,
    NaFlexPatchEmbed,
    PatchEmbed,
    PatchEmbed3d,
    PerceiverResampler,
    QFormer,
    SelfAttention,
)
from vlmkernels.nn._names import get
from vlmkernels.nn._norm import RMSNorm

Tensor = torch.Tensor


def _asked(config: Any, arguments: dict[str, Any], *names: str) -> bool:
    """Whether attention weights or hidden states are asked for."""
    return any(arguments.get(name) or getattr(config, name, False) for name in names)


def _masked(arguments: dict[str, Any]) -> bool:
    """Whether there is a mask that is not one of ranges, by whatever name a version of transformers gives it."""
    return any("mask" in name and not _known(value) for name, value in arguments.items())


def _known(mask: Any) -> bool:
    return mask is None or isinstance(mask, RangesMask)


def _rate(layer: Any) -> float:
    """The dropout of attention weights."""
    rate = getattr(layer, "attention_dropout", None)
    rate = layer.dropout if rate is None else rate
    return float(rate.p if isinstance(rate, nn.Dropout) else rate)


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

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        masked = any(value is not None for value in args) or _masked({**kwargs, "mask": attention_mask})
        drops = self.training and _rate(self) > 0
        if masked or drops or _asked(self.config, kwargs, "output_attentions"):
            return super().forward(hidden_states, attention_mask, *args, **kwargs)
        tokens = hidden_states.shape[1]
        ranges = fitting(attention_mask, tokens, tokens)
        if ranges is None and kwargs.get("is_causal"):
            ranges = KeyRanges.causal(tokens, tokens, device=hidden_states.device)
        return self.fast(hidden_states, ranges), None


class CaptionAttention(Swapped):
    """Self-attention of GIT's decoder over image and text, with a cache."""

    adds_masks = True

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        query = layer.query
        arguments: dict[str, Any] = {"layout": "bert", "bias": query.bias is not None, "device": "meta"}
        return SelfAttention(query.in_features, layer.num_attention_heads, head_dim=layer.attention_head_size, **arguments)

    def forward(self, hidden_states: Tensor, attention_mask: Any = None, *args: Any, **kwargs: Any) -> Any:
        drops = self.training and _rate(self) > 0
        if drops or not _known(attention_mask) or kwargs.get("output_attentions"):
            mask = attention_mask.additive(hidden_states.dtype) if isinstance(attention_mask, RangesMask) else attention_mask
            return super().forward(hidden_states, mask, *args, **kwargs)
        tokens = hidden_states.shape[1]
        keys = tokens if attention_mask is None else attention_mask.shape[3]
        return self.fast(hidden_states, fitting(attention_mask, tokens, keys), None, _cached(self, args, kwargs)), None


def _cached(
    layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Callable[[Tensor, Tensor], tuple[Tensor, Tensor]] | None:
    """What puts keys and values into the cache that a call of ``layer`` came with, in a name after the version; None without."""
    caches = [value for value in (*args, kwargs.pop("cache", None), kwargs.pop("past_key_values", None)) if value is not None]
    if not caches:
        return None
    more = {"kwargs": kwargs} if "kwargs" in inspect.signature(caches[0].update).parameters else {}

    def put(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        k, v = caches[0].update(k.transpose(1, 2), v.transpose(1, 2), layer.layer_idx, **more)
        return k.transpose(1, 2), v.transpose(1, 2)

    return put


class DecoderAttention(Swapped):
    """Self-attention of a text decoder with rotary positions and a cache: one product, one rotation of queries and keys."""

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        q, k, out, width = layer.q_proj, layer.k_proj, layer.o_proj, layer.head_dim
        norm = getattr(layer, "q_norm", None)
        return SelfAttention(
            q.in_features,
            q.out_features // width,
            k.out_features // width,
            width,
            layout="llama",
            bias=q.bias is not None,
            out_bias=out.bias is not None,
            qk_norm=None if norm is None else "rms",
            norm_eps=0.0 if norm is None else norm.variance_epsilon,
            scale=layer.scaling,
            device="meta",
        )

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        mask, tables = kwargs.get("attention_mask"), kwargs.get("position_embeddings")
        stays = args or autocast(hidden_states) or (self.training and _rate(self) > 0) or kwargs.get("output_attentions")
        if not isinstance(mask, RangesMask) or tables is None or stays:
            return super().forward(hidden_states, *args, **kwargs)
        given = {name: value for name, value in kwargs.items() if name not in ("attention_mask", "position_embeddings")}
        ranges = fitting(mask, hidden_states.shape[1], mask.shape[3])
        rope = tuple(_half(table) for table in tables)
        return self.fast(hidden_states, ranges, rope, _cached(self, (), given)), None


class PackedAttention(Swapped):
    """Self-attention of Qwen-VL's towers: the images, frames or windows of a pack in one call, rotated in one pass."""

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        width, heads = layer.qkv.in_features, layer.num_heads
        return SelfAttention(width, heads, layout="timm", scale=layer.scaling, device="meta")

    def forward(self, hidden_states: Tensor, cu_seqlens: Any = None, *args: Any, **kwargs: Any) -> Any:
        tables = kwargs.get("position_embeddings")
        drops = self.training and _rate(self) > 0
        if args or tables is None or cu_seqlens is None or drops or autocast(hidden_states):
            return super().forward(hidden_states, cu_seqlens, *args, **kwargs)
        total = hidden_states.shape[0]
        ranges = once(cu_seqlens, (total, "ranges"), lambda: KeyRanges.packed(cu_seqlens, total))
        return self.fast(hidden_states, ranges, tuple(_half(table) for table in tables))


def _half(table: Tensor) -> Tensor:
    """A table of transformers for rope, of a batch or of a pack, without its second half, which repeats the first."""

    def make() -> Tensor:
        return (table if table.dim() == 3 else table[None])[..., : table.shape[-1] // 2].contiguous()

    half: Tensor = once(table, ("half",), make)
    return half


class Embeddings(Swapped):
    """Patches, class token and positions of images in the tower's own size."""

    layout: str
    unused = ("mask_token",)
    reads_leaves = True

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        patch = layer.patch_embeddings.projection if cls.layout == "vit" else layer.patch_embedding
        arguments: dict[str, Any] = {"layout": cls.layout, "bias": patch.bias is not None, "device": "meta"}
        return PatchEmbed(patch.out_channels, patch.kernel_size, layer.image_size, patch.in_channels, **arguments)

    def forward(self, pixel_values: Tensor, *args: Any, **kwargs: Any) -> Any:
        asks = any(value is not None and value is not False for value in (*args, *kwargs.values()))
        if asks or not self._fits(pixel_values) or autocast(pixel_values) or not self.untouched():
            return super().forward(pixel_values, *args, **kwargs)
        tokens = self.fast(pixel_values)
        return self.dropout(tokens) if self.layout == "vit" else tokens

    def _fits(self, pixels: Tensor) -> bool:
        """Whether size and dtypes are those that the module takes; of others the original resizes, casts or raises."""
        names, size = self.fast.layout, self.image_size
        size = (size, size) if isinstance(size, int) else tuple(size)
        dtype = get(self.fast, names.projection).weight.dtype
        if pixels.dim() != 4 or pixels.shape[2:] != size or get(self.fast, names.position).dtype != dtype:
            return False
        # ViT's original doesn't cast its pixels.
        return pixels.dtype == dtype if self.layout == "vit" else pixels.is_floating_point()


class PaddedEmbeddings(Swapped):
    """Patches of SigLIP2 NaFlex and the positions of each image's own grid."""

    reads_leaves = True

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        patch, size, grid = layer.patch_embedding, layer.patch_size, layer.position_embedding_size
        return NaFlexPatchEmbed(patch.out_features, size, grid, patch.in_features // size**2, device="meta")

    def forward(self, pixel_values: Tensor, spatial_shapes: Any) -> Any:
        fits = isinstance(spatial_shapes, Tensor) and pixel_values.is_floating_point() and pixel_values.dim() == 3
        if not fits or autocast(pixel_values) or not self.untouched():
            return super().forward(pixel_values, spatial_shapes)
        return self.fast(pixel_values, spatial_shapes)


class PackedPatches(Swapped):
    """The patches of Qwen-VL, already cut into rows."""

    reads_leaves = True

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        proj = layer.proj
        frames, size, _ = proj.kernel_size
        return PatchEmbed3d(proj.out_channels, size, frames, proj.in_channels, bias=proj.bias is not None, device="meta")

    def forward(self, hidden_states: Tensor) -> Any:
        weight = self.proj.weight
        rows = hidden_states.dim() == 2 and hidden_states.shape[1] == weight[0].numel() and hidden_states.is_floating_point()
        if not rows or autocast(hidden_states) or not self.untouched():
            return super().forward(hidden_states)
        return self.fast(hidden_states)


class Pool(Swapped):
    """SigLIP's pooling head; a padding mask has one run of ones in each row, as the processor of SigLIP2 makes it."""

    reads_leaves = True
    _APPROXIMATE = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        activation = layer.mlp.config.hidden_act
        if activation not in cls._APPROXIMATE:
            raise Unfit(f"its activation is {activation}")
        arguments: dict[str, Any] = {"approximate": cls._APPROXIMATE[activation], "norm_eps": layer.layernorm.eps}
        width, heads = layer.probe.shape[-1], layer.attention.num_heads
        return AttentionPool(width, heads, layer.mlp.fc1.out_features, device="meta", **arguments)

    def forward(self, hidden_state: Tensor, attention_mask: Any = None) -> Any:
        if not self.untouched() or not (attention_mask is None or attention_mask.dim() == 2):
            return super().forward(hidden_state, *(() if attention_mask is None else (attention_mask,)))
        ranges = None if attention_mask is None else KeyRanges.key_padding(1, mask=attention_mask)
        return self.fast(hidden_state, ranges)


class QFormerLayers(Swapped):
    """All layers of a Q-Former: keys and values of its cross-attentions are one product."""

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        config, first = layer.config, layer.layer[0]
        if config.hidden_act != "gelu":
            raise Unfit(f"its activation is {config.hidden_act}")
        former = QFormer(
            config.hidden_size,
            config.num_attention_heads,
            config.intermediate_size,
            config.num_hidden_layers,
            context_dim=config.encoder_hidden_size,
            cross_attention_frequency=config.cross_attention_frequency,
            text=hasattr(first, "intermediate"),
            norm_eps=config.layer_norm_eps,
            device="meta",
        )
        return former.encoder

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        if args or self._stays(kwargs) or not self.untouched():
            return super().forward(hidden_states, *args, **kwargs)
        from transformers.modeling_outputs import BaseModelOutputWithPastAndCrossAttentions

        queries, image = kwargs.get("query_length", 0), kwargs.get("encoder_hidden_states")
        ranges = fitting(kwargs.get("attention_mask"), hidden_states.shape[1], hidden_states.shape[1])
        image_ranges = None if image is None else fitting(kwargs.get("encoder_attention_mask"), queries, image.shape[1])
        tokens = self.fast(hidden_states, ranges, image, image_ranges, queries)
        return BaseModelOutputWithPastAndCrossAttentions(last_hidden_state=tokens)

    def _stays(self, arguments: dict[str, Any]) -> bool:
        """Whether a call with these arguments is the original's."""
        blind = arguments.get("query_length", 0) > 0 and arguments.get("encoder_hidden_states") is None
        first = self.layer[0]
        trains = self.training and (first.gradient_checkpointing or _rate(first.attention.attention) > 0)
        asked = _asked(self.config, arguments, "output_attentions", "output_hidden_states")
        return _masked(arguments) or blind or trains or asked or arguments.get("return_dict") is False


class Norm(Swapped):
    """RMSNorm of text decoders, in one kernel."""

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        return RMSNorm(layer.weight.shape[0], layer.variance_epsilon, device="meta")

    def forward(self, hidden_states: Tensor) -> Any:
        same = hidden_states.dtype == self.weight.dtype
        return self.fast(hidden_states) if same else super().forward(hidden_states)


class Perceiver(Swapped):
    """The resampler of IDEFICS."""

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        return PerceiverResampler(
            layer.embed_dim,
            layer.n_heads,
            layer.head_dim,
            layer.intermediate_dim,
            num_latents=layer.n_latents,
            depth=len(layer.blocks),
            qk_norm="layer" if layer.qk_layer_norms else None,
            device="meta",
        )

    def forward(self, context: Tensor) -> Any:
        return self.fast(context) if self.untouched() else super().forward(context)


class KosmosProjection(Swapped):
    """The resampler of Kosmos-2, which returns attention weights where the attention is eager.

    With sdpa some versions of transformers take its missing mask for a causal one (5.17.0).
    """

    eager_config = "x_attn.config"

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        count, width = layer.latent_query.shape
        heads, context = layer.x_attn.num_heads, layer.dense.in_features
        return KosmosResampler(width, heads, context_dim=context, num_latents=count, device="meta")

    def forward(self, features: Tensor) -> Any:
        weights = self.x_attn.config._attn_implementation == "eager"
        drops = self.training and self.x_attn.dropout > 0
        if weights or drops or not self.untouched():
            return super().forward(features)
        return self.fast(features), None


#: What swaps a layer: the class that does, and its attributes, as pairs.
Replacement = tuple[type[Swapped], tuple[tuple[str, Any], ...]]


def _rows(kind: type[Swapped], *names: str, **arguments: Any) -> dict[str, Replacement]:
    return {f"transformers.models.{name}": (kind, tuple(arguments.items())) for name in names}


#: By class, with its module: a new row for a class of the same kind is all that it takes.
REPLACEMENTS: dict[str, Replacement] = {
    **_timm.REPLACEMENTS,
    **_rows(Attention, "vit.modeling_vit.ViTAttention", layout="llama"),
    **_rows(
        Attention,
        "clip.modeling_clip.CLIPAttention",
        "siglip.modeling_siglip.SiglipAttention",
        "siglip2.modeling_siglip2.Siglip2Attention",
        "git.modeling_git.GitVisionAttention",
        "idefics.vision.IdeficsVisionAttention",
        "kosmos2.modeling_kosmos2.Kosmos2VisionAttention",
        layout="clip",
    ),
    **_rows(
        Attention,
        "blip.modeling_blip.BlipAttention",
        "blip_2.modeling_blip_2.Blip2Attention",
        "instructblip.modeling_instructblip.InstructBlipAttention",
        layout="blip",
    ),
    **_rows(
        DecoderAttention,
        "llama.modeling_llama.LlamaAttention",
        "mistral.modeling_mistral.MistralAttention",
        "qwen2.modeling_qwen2.Qwen2Attention",
        "qwen3.modeling_qwen3.Qwen3Attention",
    ),
    **_rows(CaptionAttention, "git.modeling_git.GitSelfAttention"),
    **_rows(
        PackedAttention,
        "qwen2_vl.modeling_qwen2_vl.VisionAttention",
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionAttention",
    ),
    **_rows(Embeddings, "vit.modeling_vit.ViTEmbeddings", layout="vit"),
    **_rows(
        Embeddings,
        "clip.modeling_clip.CLIPVisionEmbeddings",
        "git.modeling_git.GitVisionEmbeddings",
        "idefics.vision.IdeficsVisionEmbeddings",
        "kosmos2.modeling_kosmos2.Kosmos2VisionEmbeddings",
        layout="clip",
    ),
    **_rows(Embeddings, "siglip.modeling_siglip.SiglipVisionEmbeddings", layout="siglip"),
    **_rows(
        Embeddings,
        "blip.modeling_blip.BlipVisionEmbeddings",
        "blip_2.modeling_blip_2.Blip2VisionEmbeddings",
        "instructblip.modeling_instructblip.InstructBlipVisionEmbeddings",
        layout="blip",
    ),
    **_rows(PaddedEmbeddings, "siglip2.modeling_siglip2.Siglip2VisionEmbeddings"),
    **_rows(
        PackedPatches,
        "qwen2_vl.modeling_qwen2_vl.PatchEmbed",
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionPatchEmbed",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionPatchEmbed",
    ),
    **_rows(
        Pool,
        "siglip.modeling_siglip.SiglipMultiheadAttentionPoolingHead",
        "siglip2.modeling_siglip2.Siglip2MultiheadAttentionPoolingHead",
    ),
    **_rows(
        QFormerLayers,
        "blip_2.modeling_blip_2.Blip2QFormerEncoder",
        "instructblip.modeling_instructblip.InstructBlipQFormerEncoder",
    ),
    **_rows(
        Norm,
        "llama.modeling_llama.LlamaRMSNorm",
        "mistral.modeling_mistral.MistralRMSNorm",
        "mllama.modeling_mllama.MllamaTextRMSNorm",
        "qwen2.modeling_qwen2.Qwen2RMSNorm",
        "qwen2_vl.modeling_qwen2_vl.Qwen2VLRMSNorm",
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm",
        "qwen3.modeling_qwen3.Qwen3RMSNorm",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLTextRMSNorm",
    ),
    **_rows(Perceiver, "idefics.perceiver.IdeficsPerceiverResampler"),
    **_rows(KosmosProjection, "kosmos2.modeling_kosmos2.Kosmos2ImageToTextProjection"),
}

# SPDX-License-Identifier: Apache-2.0
"""The layers of transformers that have a module of ours: by class, how it is built, and which calls it serves.

A class is known by its name, so nothing of transformers is imported here. Each forward has the original's arguments and result.
A call that the module would not answer as the original does goes to the original: attention weights that are asked for, masks,
dropout of attention weights, positions to be resized, hooks inside of what the module does in one go.
"""

from typing import Any

import torch
from torch import nn

from vlmkernels.integrations import _open_clip, _timm
from vlmkernels.integrations._attention_layers import (
    Attention,
    CaptionAttention,
    DecoderAttention,
    EncoderAttention,
    IdeficsAttention,
    ImageAttention,
    KosmosAttention,
    OptAttention,
    PackedAttention,
    asked,
    masked,
    rate,
)
from vlmkernels.integrations._feed_forward_layers import Activated, Decoder, Gated, Plain
from vlmkernels.integrations._swap import Replacement, Swapped, Unfit, autocast
from vlmkernels.integrations._tower_layers import PackedTower, TowerLayer
from vlmkernels.integrations.ranges_mask import fitting
from vlmkernels.masks import KeyRanges
from vlmkernels.nn import (
    AttentionPool,
    KosmosResampler,
    NaFlexPatchEmbed,
    PatchEmbed,
    PatchEmbed3d,
    PerceiverResampler,
    QFormer,
)
from vlmkernels.nn._names import get
from vlmkernels.nn._norm import RMSNorm
from vlmkernels.nn.contrastive import ClipLoss, SigLipLoss

Tensor = torch.Tensor


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
        trains = self.training and (first.gradient_checkpointing or rate(first.attention.attention) > 0)
        wanted = asked(self.config, arguments, "output_attentions", "output_hidden_states")
        return masked(arguments) or blind or trains or wanted or arguments.get("return_dict") is False


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


class Contrastive(Swapped):
    """CLIP or SigLIP with both towers: the loss that is asked for takes nothing of the size of the logits in training."""

    part = ()
    losses: type[nn.Module]
    bias = False

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        return cls.losses()

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        plain = kwargs.get("return_dict") is not False and self.config.return_dict
        if not kwargs.get("return_loss") or not plain:
            return super().forward(*args, **kwargs)
        output = super().forward(*args, **{**kwargs, "return_loss": False})
        bias = {"logit_bias": self.logit_bias} if self.bias else {}
        loss = self.fast(output.image_embeds, output.text_embeds, self.logit_scale.exp(), **bias)
        return type(output)(loss=loss, **output)


def _rows(kind: type[Swapped], *names: str, **arguments: Any) -> dict[str, Replacement]:
    return {f"transformers.models.{name}": (kind, tuple(arguments.items())) for name in names}


#: By class, with its module: a new row for a class of the same kind is all that it takes.
REPLACEMENTS: dict[str, Replacement] = {
    **_timm.REPLACEMENTS,
    **_open_clip.REPLACEMENTS,
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
        "gemma.modeling_gemma.GemmaAttention",
        "gemma2.modeling_gemma2.Gemma2Attention",
        "gemma3.modeling_gemma3.Gemma3Attention",
        "llama.modeling_llama.LlamaAttention",
        "mllama.modeling_mllama.MllamaTextSelfAttention",
        "mistral.modeling_mistral.MistralAttention",
        "qwen2.modeling_qwen2.Qwen2Attention",
        "qwen2_vl.modeling_qwen2_vl.Qwen2VLAttention",
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLAttention",
        "qwen3.modeling_qwen3.Qwen3Attention",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLTextAttention",
    ),
    **_rows(OptAttention, "opt.modeling_opt.OPTAttention"),
    **_rows(KosmosAttention, "kosmos2.modeling_kosmos2.KosmosTextAttention"),
    **_rows(ImageAttention, "mllama.modeling_mllama.MllamaTextCrossAttention"),
    **_rows(IdeficsAttention, "idefics.modeling_idefics.IdeficsAttention"),
    **_rows(CaptionAttention, "git.modeling_git.GitSelfAttention"),
    **_rows(EncoderAttention, "bert.modeling_bert.BertSelfAttention"),
    **_rows(
        PackedAttention,
        "qwen2_vl.modeling_qwen2_vl.VisionAttention",
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLVisionAttention",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionAttention",
    ),
    **_rows(
        TowerLayer,
        "blip.modeling_blip.BlipEncoderLayer",
        "blip_2.modeling_blip_2.Blip2EncoderLayer",
        "instructblip.modeling_instructblip.InstructBlipEncoderLayer",
        last="projection",
    ),
    **_rows(
        TowerLayer,
        "clip.modeling_clip.CLIPEncoderLayer",
        "git.modeling_git.GitVisionEncoderLayer",
        "idefics.vision.IdeficsVisionEncoderLayer",
        "kosmos2.modeling_kosmos2.Kosmos2VisionEncoderLayer",
        "siglip.modeling_siglip.SiglipEncoderLayer",
        "siglip2.modeling_siglip2.Siglip2EncoderLayer",
    ),
    **_rows(
        TowerLayer,
        "vit.modeling_vit.ViTLayer",
        part=("layernorm_before", "layernorm_after"),
        attends="attention",
        last="o_proj",
    ),
    **_rows(
        TowerLayer,
        "qwen2_vl.modeling_qwen2_vl.Qwen2VLVisionBlock",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionBlock",
        part=("norm1", "norm2"),
        attends="attn",
        last="proj",
    ),
    **_rows(
        PackedTower,
        "qwen2_vl.modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel",
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionModel",
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
        "idefics.modeling_idefics.IdeficsRMSNorm",
        "llama.modeling_llama.LlamaRMSNorm",
        "mistral.modeling_mistral.MistralRMSNorm",
        "mllama.modeling_mllama.MllamaTextRMSNorm",
        "qwen2.modeling_qwen2.Qwen2RMSNorm",
        "qwen2_vl.modeling_qwen2_vl.Qwen2VLRMSNorm",
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLRMSNorm",
        "qwen3.modeling_qwen3.Qwen3RMSNorm",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLTextRMSNorm",
    ),
    **_rows(Gated, "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2_5_VLMLP"),
    **_rows(
        Decoder,
        "gemma.modeling_gemma.GemmaMLP",
        "gemma2.modeling_gemma2.Gemma2MLP",
        "gemma3.modeling_gemma3.Gemma3MLP",
        "idefics.modeling_idefics.IdeficsMLP",
        "llama.modeling_llama.LlamaMLP",
        "mistral.modeling_mistral.MistralMLP",
        "mllama.modeling_mllama.MllamaTextMLP",
        "qwen2.modeling_qwen2.Qwen2MLP",
        "qwen2_vl.modeling_qwen2_vl.Qwen2MLP",
        "qwen2_5_vl.modeling_qwen2_5_vl.Qwen2MLP",
        "qwen3.modeling_qwen3.Qwen3MLP",
        "qwen3_vl.modeling_qwen3_vl.Qwen3VLTextMLP",
    ),
    **_rows(
        Plain,
        "blip.modeling_blip.BlipMLP",
        "blip_2.modeling_blip_2.Blip2MLP",
        "clip.modeling_clip.CLIPMLP",
        "git.modeling_git.GitVisionMLP",
        "idefics.vision.IdeficsVisionMLP",
        "instructblip.modeling_instructblip.InstructBlipMLP",
        "kosmos2.modeling_kosmos2.Kosmos2VisionMLP",
        "siglip.modeling_siglip.SiglipMLP",
        "siglip2.modeling_siglip2.Siglip2MLP",
        "vit.modeling_vit.ViTMLP",
    ),
    **_rows(Plain, "qwen2_vl.modeling_qwen2_vl.VisionMlp", activation="act"),
    **_rows(Plain, "qwen3_vl.modeling_qwen3_vl.Qwen3VLVisionMLP", names=("linear_fc1", "linear_fc2"), activation="act_fn"),
    **_rows(Activated, "bert.modeling_bert.BertIntermediate", "git.modeling_git.GitIntermediate"),
    **_rows(Contrastive, "clip.modeling_clip.CLIPModel", losses=ClipLoss),
    **_rows(
        Contrastive, "siglip.modeling_siglip.SiglipModel", "siglip2.modeling_siglip2.Siglip2Model", losses=SigLipLoss, bias=True
    ),
    **_rows(Perceiver, "idefics.perceiver.IdeficsPerceiverResampler"),
    **_rows(KosmosProjection, "kosmos2.modeling_kosmos2.Kosmos2ImageToTextProjection"),
}

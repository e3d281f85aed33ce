# SPDX-License-Identifier: Apache-2.0
"""The layers of open_clip that have a module of ours, torch's own ``nn.MultiheadAttention`` among them, and its losses."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlmkernels.integrations._feed_forward_layers import activation_of
from vlmkernels.integrations._read_masks import ranges_of
from vlmkernels.integrations._swap import Replacement, Swapped, Unfit, autocast, images_fit, unhooked
from vlmkernels.integrations._tower_layers import TowerLayer
from vlmkernels.masks import KeyRanges
from vlmkernels.nn import PatchEmbed, SelfAttention
from vlmkernels.nn._attention import AttentionLayout
from vlmkernels.nn._feed_forward import FeedForward
from vlmkernels.nn.contrastive import ClipLoss, SigLipLoss

Tensor = torch.Tensor


class Embeddings(Swapped):
    """Patches, class token, positions and the norm before the first layer of a VisionTransformer."""

    part = ("conv1", "ln_pre")
    reads_leaves = True

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        conv, norm = layer.conv1, layer.ln_pre
        normed = not isinstance(norm, nn.Identity)
        arguments: dict[str, Any] = {"norm": normed, "norm_eps": norm.eps if normed else 0.0, "bias": conv.bias is not None}
        made: dict[str, Any] = {"layout": "open_clip", "device": "meta", **arguments}
        return PatchEmbed(conv.out_channels, conv.kernel_size, layer.image_size, conv.in_channels, **made)

    def _embeds(self, x: Tensor) -> Any:
        drops = self.training and not isinstance(self.patch_dropout, nn.Identity)
        if drops or not images_fit(x, self.image_size, self.conv1.weight) or not self.untouched():
            return super()._embeds(x)  # type: ignore[misc]
        return self.fast(x)


class InProjectedAttention(SelfAttention):
    """Self-attention whose input projections are one parameter instead of a layer."""

    def __init__(self, layer: Any) -> None:
        layout, bias = AttentionLayout(("in_proj",), "out_proj"), layer.in_proj_bias is not None
        super().__init__(layer.embed_dim, layer.num_heads, layout=layout, bias=bias, device="meta")
        del self.in_proj
        self.in_proj_weight = nn.Parameter(torch.empty(3 * layer.embed_dim, layer.embed_dim, device="meta"))
        self.in_proj_bias = nn.Parameter(torch.empty(3 * layer.embed_dim, device="meta")) if bias else None

    def _neighbours(self) -> list[nn.Module]:
        return []

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return self._heads(0, (self._project_qkv(x),))

    def _project_qkv(self, x: Tensor) -> Tensor:
        return F.linear(x, self.in_proj_weight, self.in_proj_bias)


class Attention(Swapped):
    """Self-attention without weights; a mask of all rows of the batch has one run of keys for each query."""

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        plain = layer.bias_k is None and not layer.add_zero_attn and layer.in_proj_weight is not None
        if not plain or not layer.batch_first:
            raise Unfit("its keys have other sizes or additions, or its batch comes second")
        return InProjectedAttention(layer)

    def arguments(self, x: Tensor, attn_mask: Any = None) -> tuple[KeyRanges | None] | None:
        """What the module gets beside the tokens, or None where the original answers."""
        own = "in_proj_weight" in self._parameters  # peft puts a sum with its adapter there for a call, which is no parameter
        if not own or autocast(x) or (self.training and self.dropout > 0):
            return None
        ranges = None if attn_mask is None else ranges_of(attn_mask, x.shape[1], x.shape[1], of_torch=True)
        return None if isinstance(ranges, str) else (ranges,)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Any:
        given = dict(zip(("key_padding_mask", "need_weights", "attn_mask"), args, strict=False)) | kwargs
        mask, weights, padding = given.get("attn_mask"), given.get("need_weights", True), given.get("key_padding_mask")
        alone = query is key is value and query.dim() == 3 and len(args) <= 3 and not weights and padding is None
        causal = given.get("is_causal") and mask is None  # which is refused
        ours = self.arguments(query, mask) if alone and not causal else None
        return super().forward(query, key, value, *args, **kwargs) if ours is None else (self.fast(query, *ours), None)


class Block(TowerLayer):
    """A layer of either tower, whose feed-forward has no class of its own."""

    part = ("ln_1", "ln_2")
    attends = "attn"

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        if type(layer.ls_1) is not nn.Identity or type(layer.ls_2) is not nn.Identity or hasattr(layer, "ln_1_kv"):
            raise Unfit("it scales what its halves add, or reads other tokens")
        if tuple(layer.mlp._modules) != ("c_fc", "gelu", "c_proj"):
            raise Unfit(f"its feed-forward has the layers {', '.join(layer.mlp._modules)}")
        first, found = layer.mlp.c_fc, super().build(layer)
        sizes = first.in_features, first.out_features, activation_of(layer.mlp.gelu)
        found.mlp = FeedForward(*sizes, names=("c_fc", "c_proj"), device="meta")
        return found

    def feed_forward(self) -> FeedForward | None:
        feed: FeedForward = self.fast.mlp
        if self.mlp._modules is not feed._modules:
            return None
        return feed if all(unhooked(layer) for layer in (self.mlp, self.mlp.gelu, self.ls_1, self.ls_2)) else None

    def forward(self, q_x: Tensor, k_x: Any = None, v_x: Any = None, attn_mask: Any = None) -> Any:
        if k_x is not None or v_x is not None:
            return self.original.forward(self, q_x, k_x, v_x, attn_mask)
        return super().forward(q_x, attn_mask=None if attn_mask is None else attn_mask.to(q_x.dtype))


class Loss(Swapped):
    """The loss of one rank, without the matrix of logits, in fp32."""

    losses: Any
    biased: bool

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        if layer.world_size > 1:
            raise Unfit("a rank returns its share of the loss there; vlmkernels.nn has that of the whole batch")
        return cls.losses()  # type: ignore[no-any-return]

    def forward(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Any, logit_bias: Any = None, output_dict: bool = False
    ) -> Any:
        if self.world_size > 1 or (logit_bias is not None and not self.biased):
            return super().forward(image_features, text_features, logit_scale, logit_bias, output_dict)
        return self.fast(image_features, text_features, logit_scale, logit_bias, output_dict)


REPLACEMENTS: dict[str, Replacement] = {
    "open_clip.transformer.VisionTransformer": (Embeddings, ()),
    "open_clip.transformer.ResidualAttentionBlock": (Block, ()),
    "torch.nn.modules.activation.MultiheadAttention": (Attention, ()),
    "open_clip.loss.ClipLoss": (Loss, (("losses", ClipLoss), ("biased", False))),
    "open_clip.loss.SigLipLoss": (Loss, (("losses", SigLipLoss), ("biased", True))),
}

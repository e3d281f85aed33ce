# SPDX-License-Identifier: Apache-2.0
"""The layers of timm that have a module of ours."""

from typing import Any

import torch
from torch import nn

from vlmkernels.integrations._swap import Replacement, Swapped, Unfit
from vlmkernels.masks import KeyRanges
from vlmkernels.nn import AttentionPool, SelfAttention

Tensor = torch.Tensor
#: timm's norms of a head, by the name of their class, and what they are here.
_NORMS = {"Identity": None, "LayerNorm": "layer", "RmsNorm": "rms"}


def _norm(layer: nn.Module) -> tuple[str | None, float]:
    """What normalises q and k, and its epsilon."""
    name = type(layer).__name__
    if name not in _NORMS:
        raise Unfit(f"the norm of its heads is {name}")
    return _NORMS[name], float(getattr(layer, "eps", 0.0))


class Attention(Swapped):
    """Self-attention of a VisionTransformer, without a mask or causal."""

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        norm, eps = _norm(layer.q_norm)
        return SelfAttention(
            layer.qkv.in_features,
            layer.num_heads,
            head_dim=layer.head_dim,
            layout="timm",
            bias=layer.qkv.bias is not None,
            out_bias=layer.proj.bias is not None,
            qk_norm=norm,
            norm_eps=eps,
            device="meta",
        )

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Any:
        drops = self.training and self.attn_drop.p > 0
        if attn_mask is not None or drops or x.dim() != 3:
            return super().forward(x, attn_mask, **({"is_causal": True} if is_causal else {}))
        ranges = KeyRanges.causal(x.shape[1], x.shape[1], device=x.device) if is_causal else None
        return self.proj_drop(self.fast(x, ranges))


class Pool(Swapped):
    """Pooling by learned queries, as SigLIP's towers in timm do it."""

    reads_leaves = True

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        plain = layer.pos_embed is None and layer.mlp is not None and _norm(layer.q_norm)[0] is None
        if not plain or _norm(layer.norm)[0] != "layer":
            raise Unfit("it has positions, norms of its heads, or no feed-forward behind a LayerNorm")
        approximate = {"GELU": "none", "GELUTanh": "tanh", "GELU_tanh": "tanh"}.get(type(layer.mlp.act).__name__)
        pool = {"token": "first", "avg": "mean", "": "none"}.get(layer.pool)
        if approximate is None or pool is None:
            raise Unfit(f"its activation is {type(layer.mlp.act).__name__}, its pooling {layer.pool!r}")
        return AttentionPool(
            layer.kv.in_features,
            layer.num_heads,
            layer.mlp.fc1.out_features,
            num_probes=layer.latent_len,
            layout="timm",
            pool=pool,
            approximate=approximate,
            norm_eps=layer.norm.eps,
            device="meta",
        )

    def forward(self, x: Tensor, attn_mask: Any = None) -> Any:
        drops = self.training and self.proj_drop.p > 0
        if attn_mask is not None or drops or not self.untouched():
            return super().forward(x, *(() if attn_mask is None else (attn_mask,)))
        return self.fast(x)


REPLACEMENTS: dict[str, Replacement] = {
    "timm.layers.attention.Attention": (Attention, ()),
    "timm.models.vision_transformer.Attention": (Attention, ()),  # where it was before
    "timm.layers.attention_pool.AttentionPoolLatent": (Pool, ()),
}

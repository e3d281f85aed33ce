# SPDX-License-Identifier: Apache-2.0
"""The layers of timm that have a module of ours."""

import importlib
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlmkernels.integrations._feed_forward_layers import Plain
from vlmkernels.integrations._once import once
from vlmkernels.integrations._read_masks import ranges_of
from vlmkernels.integrations._swap import Replacement, Swapped, Unfit, autocast, images_fit, unhooked
from vlmkernels.integrations._tower_layers import TowerLayer
from vlmkernels.masks import KeyRanges
from vlmkernels.nn import AttentionPool, NaFlexPatchEmbed, PatchEmbed, SelfAttention
from vlmkernels.nn._attention import QK_NORMS, AttentionLayout
from vlmkernels.nn._names import get
from vlmkernels.nn.patch_embed import PatchEmbedLayout

Tensor = torch.Tensor
_PATCHES = PatchEmbedLayout("proj", None)
#: timm's norms of a head, by the name of their class, and what they are here.
_NORMS = {"Identity": None, "LayerNorm": "layer", "RmsNorm": "rms"}


def _norm(layer: nn.Module) -> tuple[str | None, float]:
    """What normalises q and k, and its epsilon."""
    name = type(layer).__name__
    if name not in _NORMS:
        raise Unfit(f"the norm of its heads is {name}")
    return _NORMS[name], float(getattr(layer, "eps", 0.0))


class Patches(Swapped):
    """The convolution of a VisionTransformer, which adds positions itself."""

    reads_leaves = True

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        plain = layer.flatten and not layer.dynamic_img_pad and type(layer.norm).__name__ == "Identity"
        if not plain or layer.img_size is None:
            raise Unfit("its result has a norm or another form, or its images no size")
        proj = layer.proj
        arguments: dict[str, Any] = {"layout": _PATCHES, "bias": proj.bias is not None, "device": "meta"}
        return PatchEmbed(proj.out_channels, proj.kernel_size, layer.img_size, proj.in_channels, **arguments)

    def forward(self, x: Tensor) -> Any:
        fits = images_fit(x, self.img_size, self.proj.weight)
        return self.fast(x) if fits and self.untouched() else super().forward(x)


class NaFlexPatches(Swapped):
    """The embeddings of a NaFlexVit like SigLIP2's, for patches of images in their own sizes."""

    reads_leaves = True

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        grid, size, mode = layer.pos_embed_grid_size, layer.patch_size, layer.pos_embed_interp_mode
        others = (layer.norm_input, layer.cls_token, layer.reg_token)
        # What a version of timm has no name for, it does as SigLIP2 does.
        resized = getattr(layer, "pos_embed_antialias", True) and not getattr(layer, "pos_embed_align_corners", False)
        resized = resized and not layer.pos_embed_use_grid_sample
        if any(other is not None for other in others) or type(layer.norm).__name__ != "Identity" or not layer.is_linear:
            raise Unfit("it has a convolution, norms, or a class token")
        square = layer.pos_embed_type == "learned" and grid[0] == grid[1] and size[0] == size[1]
        if not square or mode != "bilinear" or not resized or layer.pos_embed_ar_preserving:
            raise Unfit(f"its positions are {layer.pos_embed_type}, {mode}, of {grid}: other than SigLIP2's")
        if not getattr(layer, "channels_last", True) or layer.proj.bias is None:
            raise Unfit("its channels come first, or its projection has no bias")
        return NaFlexPatchEmbed(layer.embed_dim, size[0], grid[0], layer.in_chans, layout="timm", device="meta")

    def forward(self, x: Tensor, patch_coord: Any = None, patch_valid: Any = None) -> Any:
        # Patches of another size are in five dimensions.
        fits = patch_coord is not None and x.dim() == 3 and x.dtype == self.proj.weight.dtype
        if not fits or autocast(x) or not self.untouched():
            return super().forward(x, patch_coord, patch_valid)
        return self.pos_drop(self.fast(x, patch_coord.amax(1) + 1)), None


def _ranges(mask: Any, causal: bool, tokens: Tensor) -> KeyRanges | str | None:
    """The ranges of a call with this mask, or why it has none."""
    count = tokens.shape[1]
    if mask is None:
        return KeyRanges.causal(count, count, device=tokens.device) if causal else None
    return "a mask and causal" if causal else ranges_of(mask, count, count)


class Attention(Swapped):
    """Self-attention of a VisionTransformer: no mask, causal, or padding."""

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

    def arguments(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> tuple[KeyRanges | None] | None:
        """What the module gets beside the tokens, or None where the original answers."""
        drops = self.training and self.attn_drop.p > 0
        ranges = "other" if drops or x.dim() != 3 else _ranges(attn_mask, is_causal, x)
        return None if isinstance(ranges, str) else (ranges,)

    def forward(self, x: Tensor, attn_mask: Any = None, is_causal: bool = False) -> Any:
        given = self.arguments(x, attn_mask, is_causal)
        if given is None:
            return super().forward(x, attn_mask, **({"is_causal": True} if is_causal else {}))
        return self.proj_drop(self.fast(x, *given))


class Mlp(Plain):
    """The feed-forward of a VisionTransformer, with its activation in one go."""

    activation = "act"

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        if type(layer.fc1) is not nn.Linear or type(layer.norm) is not nn.Identity:
            raise Unfit("it has convolutions, or a norm between its layers")
        return super().build(layer)

    def serves(self) -> bool:
        drops = self.training and (self.drop1.p > 0 or self.drop2.p > 0)
        return super().serves() and not drops and all(unhooked(layer) for layer in (self.drop1, self.norm, self.drop2))


class Block(TowerLayer):
    """A layer of a VisionTransformer."""

    part = ("norm1", "norm2")
    attends, last = "attn", "proj"
    #: Layers between those that the module calls, which do nothing.
    between: tuple[str, ...] = ("ls1", "drop_path1", "ls2", "drop_path2")

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        if cls.scales(layer):
            raise Unfit("it scales what its halves add")
        return super().build(layer)

    @staticmethod
    def scales(layer: Any) -> bool:
        return type(layer.ls1) is not nn.Identity or type(layer.ls2) is not nn.Identity

    def drops(self) -> bool:
        return self.attn.proj_drop.p > 0 or any(getattr(path, "drop_prob", 0) > 0 for path in (self.drop_path1, self.drop_path2))

    def untouched(self) -> bool:
        between = (self.attn.proj_drop, *(getattr(self, name) for name in self.between))
        return super().untouched() and all(unhooked(layer) for layer in between)


class RotarySelfAttention(SelfAttention):
    """Self-attention with what timm's EVA-02 and its like have besides: a norm before the output, biases of q and v alone."""

    def __init__(self, layer: Any) -> None:
        norm, eps = _norm(layer.q_norm)
        fused = layer.qkv is not None
        inputs = layer.qkv if fused else layer.q_proj
        super().__init__(
            inputs.in_features,
            layer.num_heads,
            getattr(layer, "num_kv_heads", None),
            layer.head_dim,
            layout="timm" if fused else AttentionLayout(("q_proj", "k_proj", "v_proj"), "proj"),
            bias=inputs.bias is not None,
            out_bias=layer.proj.bias is not None,
            qk_norm=norm,
            norm_eps=eps,
            device="meta",
        )
        self.interleaved = not getattr(layer, "rotate_half", False)
        if not fused and layer.k_proj.bias is None:
            get(self, "k_proj").bias = None
        self.apart = getattr(layer, "q_bias", None) is not None
        if self.apart:
            self.q_bias, self.v_bias = (nn.Parameter(torch.empty_like(b, device="meta")) for b in (layer.q_bias, layer.v_bias))
        kind, eps = _norm(layer.norm)
        self.norm = nn.Identity() if kind is None else QK_NORMS[kind](self.num_heads * self.head_dim, eps, device="meta")

    def _project(self, x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        return self._heads(0, (self._project_apart(x),)) if self.apart else super()._project(x, context)

    def _project_qkv(self, x: Tensor) -> Tensor | None:
        return self._project_apart(x) if self.apart else super()._project_qkv(x)

    def _project_apart(self, x: Tensor) -> Tensor:
        bias = torch.cat((self.q_bias, torch.zeros_like(self.q_bias), self.v_bias))
        return F.linear(x, get(self, "qkv.weight"), bias)

    def _project_out(self, y: Tensor) -> Tensor:
        return super()._project_out(self.norm(y))


def _tables_of_halves() -> bool:
    """Whether all of timm's embeddings have tables for layers that turn halves: 1.0.29 has not, and nobody would notice."""
    embedding = importlib.import_module("timm.layers").RotaryEmbeddingCat
    return "rotate_half" in inspect.signature(embedding).parameters


class RotaryAttention(Swapped):
    """Self-attention of EVA and of other towers with rope."""

    reads = ("qkv",)

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        if layer.gate is not None or getattr(layer, "qkv_bias_separate", False):
            raise Unfit("it has a gate, or adds a bias by itself")
        if getattr(layer, "rotate_half", False) and not _tables_of_halves():
            raise Unfit("it turns halves, and this version of timm may give it tables for neighbours (1.0.31 does not)")
        return RotarySelfAttention(layer)

    def arguments(
        self, x: Tensor, rope: Any = None, attn_mask: Any = None, is_causal: bool = False
    ) -> tuple[KeyRanges | None, Any] | None:
        """What the module gets beside the tokens, or None where the original answers."""
        drops = self.training and self.attn_drop.p > 0
        turns = rope is None or (rope.dim() == 2 and not rope.requires_grad)  # others are a head's own, or an image's
        stays = drops or not turns or x.dim() != 3 or autocast(x) or not self.untouched()
        ranges = "other" if stays else _ranges(attn_mask, is_causal, x)
        return None if isinstance(ranges, str) else (ranges, None if rope is None else self._tables(rope))

    def forward(self, x: Tensor, rope: Any = None, attn_mask: Any = None, is_causal: bool = False) -> Any:
        given = self.arguments(x, rope, attn_mask, is_causal)
        if given is None:
            return super().forward(x, rope, attn_mask, **({"is_causal": True} if is_causal else {}))
        return self.proj_drop(self.fast(x, *given))

    def _tables(self, rope: Tensor) -> Any:
        """Cosines and sines of pairs, from sines and cosines of channels; class and register tokens are not turned."""

        def make() -> tuple[Tensor, Tensor]:
            sin, cos = ((x[:, ::2] if interleaved else x[:, : x.shape[1] // 2]) for x in rope.chunk(2, -1))
            return F.pad(cos, (0, 0, prefix, 0), value=1.0)[None], F.pad(sin, (0, 0, prefix, 0))[None]

        prefix, interleaved = self.num_prefix_tokens, self.fast.interleaved
        return once(rope, (prefix, interleaved), make)


class RotaryBlock(Block):
    """A layer of EVA, or of another tower with rope."""

    between = ("drop_path1", "drop_path2")

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        if type(layer.attn.norm) is not nn.Identity or type(layer.mlp).__name__ != "Mlp":
            raise Unfit(f"its feed-forward is {type(layer.mlp).__name__}, or its attention has a norm before its last layer")
        return super().build(layer)

    @staticmethod
    def scales(layer: Any) -> bool:
        return layer.gamma_1 is not None or layer.gamma_2 is not None


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
    "timm.layers.mlp.Mlp": (Mlp, ()),
    "timm.models.vision_transformer.Block": (Block, ()),
    "timm.layers.attention.AttentionRope": (RotaryAttention, ()),
    "timm.models.eva.EvaAttention": (RotaryAttention, ()),
    "timm.models.eva.EvaBlock": (RotaryBlock, ()),
    "timm.layers.patch_embed.PatchEmbed": (Patches, ()),
    "timm.models.naflexvit.NaFlexEmbeds": (NaFlexPatches, ()),
    "timm.layers.attention_pool.AttentionPoolLatent": (Pool, ()),
}

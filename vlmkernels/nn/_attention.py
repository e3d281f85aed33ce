# SPDX-License-Identifier: Apache-2.0
"""What self- and cross-attention share: projections under the names of the layer they replace, and one call of ``attention``.

A layout is a row of ``ATTENTION_LAYOUTS``: the names of the input projections (one for a fused QKV, two for Q and a fused KV,
three for separate ones), of the output projection and of the q/k norms. Everything else follows from how many names there are.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from vlmkernels.masks import KeyRanges
from vlmkernels.nn._norm import RMSNorm, rms_scale
from vlmkernels.nn._packed import SideBySide, project
from vlmkernels.ops._op import bad_argument
from vlmkernels.ops.attention import attention
from vlmkernels.ops.rope import rope


@dataclass(frozen=True)
class AttentionLayout:
    """The names that one family of attention layers gives its parameters.

    Args:
        projections: ``(qkv,)``, ``(q, kv)`` or ``(q, k, v)``; a fused projection holds its parts in that order, whole parts
            one after another.
        out: the output projection, or None where the layer returns the heads unprojected.
        norms: the norms of q and k, where the layer has them.
        inner: the LayerNorm of all heads together before the output projection, or None where there is none.
    """

    projections: tuple[str, ...]
    out: str | None
    norms: tuple[str, str] = ("q_norm", "k_norm")
    inner: str | None = None

    def __post_init__(self) -> None:
        if len(self.projections) not in (1, 2, 3):
            raise bad_argument("projections", self.projections, "the names (qkv,), (q, kv) or (q, k, v)")


#: By name: the layers that use it are listed in docs/nn.md.
ATTENTION_LAYOUTS = {
    "clip": AttentionLayout(("q_proj", "k_proj", "v_proj"), "out_proj"),
    "llama": AttentionLayout(("q_proj", "k_proj", "v_proj"), "o_proj"),
    "bert": AttentionLayout(("query", "key", "value"), None),
    "blip": AttentionLayout(("qkv",), "projection"),
    "timm": AttentionLayout(("qkv",), "proj"),
    "timm_pool": AttentionLayout(("q", "kv"), "proj"),
    "flamingo": AttentionLayout(("to_q", "to_kv"), "to_out"),
    "idefics": AttentionLayout(("q_proj", "k_proj", "v_proj"), "o_proj", ("q_layer_norm", "k_layer_norm")),
    "kosmos": AttentionLayout(("q_proj", "k_proj", "v_proj"), "out_proj", inner="inner_attn_ln"),
}
#: By the value of ``qk_norm``: what normalises each head, from its width and an epsilon.
QK_NORMS: dict[str, Callable[..., nn.Module]] = {
    "rms": RMSNorm,
    "gemma": partial(RMSNorm, offset=1.0),
    "layer": nn.LayerNorm,
}


def attention_layout(layout: str | AttentionLayout) -> AttentionLayout:
    """The layout of that name, or the layout itself."""
    if isinstance(layout, AttentionLayout):
        return layout
    if layout not in ATTENTION_LAYOUTS:
        raise bad_argument("layout", repr(layout), f"an AttentionLayout or one of {', '.join(ATTENTION_LAYOUTS)}")
    return ATTENTION_LAYOUTS[layout]


class ProjectedAttention(SideBySide):
    """``out(attention(q(x), k(context), v(context)))``; the arguments are those of ``SelfAttention`` and ``CrossAttention``."""

    #: Whether a rotary embedding turns neighbouring channels instead of the halves of a head.
    interleaved = False

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None,
        head_dim: int | None,
        context_dim: int,
        *,
        layout: str | AttentionLayout,
        bias: bool,
        out_bias: bool | None,
        qk_norm: str | None,
        norm_eps: float,
        scale: float | None,
        softcap: float,
        causal: bool,
        attention_dropout: float,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
            raise bad_argument("num_kv_heads", num_kv_heads, f"a divisor of num_heads = {num_heads}")
        if head_dim is None and embed_dim % num_heads:
            raise bad_argument("embed_dim", embed_dim, f"a multiple of num_heads = {num_heads}, or head_dim given")
        if qk_norm is not None and qk_norm not in QK_NORMS:
            raise bad_argument("qk_norm", repr(qk_norm), f"None or one of {', '.join(QK_NORMS)}")
        self.layout = attention_layout(layout)
        self.embed_dim, self.context_dim = embed_dim, context_dim
        self.num_heads, self.num_kv_heads = num_heads, num_kv_heads
        self.head_dim = embed_dim // num_heads if head_dim is None else head_dim
        self.scale, self.softcap, self.causal = scale, softcap, causal
        self.attention_dropout = attention_dropout
        self.qk_norm, self.norm_eps = qk_norm, norm_eps

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        names = self.layout.projections
        kv = (num_kv_heads, num_kv_heads)
        splits = {1: ((num_heads, *kv),), 2: ((num_heads,), kv), 3: ((num_heads,), kv[:1], kv[1:])}[len(names)]
        # For each input projection, the first of the queries and the others of the context: its name, the heads of its parts.
        self._plan = tuple(zip(names, splits, strict=True))
        for i, (name, heads) in enumerate(self._plan):
            self.add_module(name, nn.Linear(context_dim if i else embed_dim, sum(heads) * self.head_dim, bias=bias, **made))
        if self.layout.out is not None:
            out_bias = bias if out_bias is None else out_bias
            self.add_module(self.layout.out, nn.Linear(num_heads * self.head_dim, embed_dim, bias=out_bias, **made))
        if self.layout.inner is not None:
            self.add_module(self.layout.inner, nn.LayerNorm(num_heads * self.head_dim, norm_eps, **made))
        if qk_norm is not None:
            for name in self.layout.norms:
                self.add_module(name, QK_NORMS[qk_norm](self.head_dim, norm_eps, **made))
        self._lay()

    def _neighbours(self) -> list[nn.Module]:
        return self.projections()[self.embed_dim != self.context_dim :]

    def projections(self) -> list[nn.Module]:
        """The input projections, that of the queries first."""
        return [getattr(self, name) for name, _ in self._plan]

    def _project(self, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """q ``[..., H, D]``, k and v ``[..., Hk, D]``: views of what the projections return."""
        linears = self.projections()
        if context is x:
            return self._heads(0, project(x, linears))
        return *self._heads(0, (linears[0](x),)), *self._heads(1, project(context, linears[1:]))

    def _heads(self, first: int, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """What the projections from the ``first`` on returned, in heads."""
        parts: list[torch.Tensor] = []
        for y, (_, heads) in zip(outputs, self._plan[first:], strict=False):
            y = y.unflatten(-1, (sum(heads), self.head_dim))
            parts += [y] if len(heads) == 1 else y.split(heads, -2)
        return tuple(parts)

    def _position(
        self, q: torch.Tensor, k: torch.Tensor, tables: tuple[torch.Tensor, torch.Tensor] | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """q and k after their norms and the rotary embedding; RMSNorm and rotation are one pass."""
        norms = [] if self.qk_norm is None else [getattr(self, name) for name in self.layout.norms]
        if tables is not None and self.qk_norm in ("rms", "gemma"):
            q_weight, k_weight = (rms_scale(norm.weight, float(self.qk_norm == "gemma")) for norm in norms)
            how: dict[str, Any] = {"eps": self.norm_eps, "interleaved": self.interleaved}
            return rope(q, k, *tables, q_weight=q_weight, k_weight=k_weight, **how)
        if norms:
            q, k = norms[0](q), norms[1](k)
        return (q, k) if tables is None else rope(q, k, *tables, interleaved=self.interleaved)

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: KeyRanges | None) -> torch.Tensor:
        """The output before its projection, ``[..., H * D]``."""
        y = attention(q, k, v, ranges, causal=self.causal, scale=self.scale, softcap=self.softcap)
        assert isinstance(y, torch.Tensor)
        return y.flatten(-2)

    def _project_out(self, y: torch.Tensor) -> torch.Tensor:
        """The output of heads ``[..., H * D]``."""
        y = y if self.layout.inner is None else getattr(self, self.layout.inner)(y)
        return y if self.layout.out is None else getattr(self, self.layout.out)(y)

    def _check_dropout(self) -> None:
        if self.training and self.attention_dropout > 0:
            raise bad_argument(
                "attention_dropout",
                self.attention_dropout,
                "0 in training, because no backend drops attention weights; call eval(), or build the layer with 0",
            )

    def extra_repr(self) -> str:
        kv = "" if self.num_kv_heads == self.num_heads else f", num_kv_heads={self.num_kv_heads}"
        shown = f"{self.embed_dim}, num_heads={self.num_heads}{kv}, head_dim={self.head_dim}"
        defaults = (("qk_norm", None), ("scale", None), ("softcap", 0.0), ("causal", False), ("attention_dropout", 0.0))
        return shown + "".join(f", {name}={getattr(self, name)}" for name, default in defaults if getattr(self, name) != default)

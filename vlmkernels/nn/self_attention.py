# SPDX-License-Identifier: Apache-2.0
"""Self-attention of a vision tower or a decoder, with the state_dict of the layer it replaces."""

from collections.abc import Callable
from typing import Any

import torch

from vlmkernels.masks import KeyRanges
from vlmkernels.nn._attention import AttentionLayout, ProjectedAttention
from vlmkernels.nn._packed import project_whole
from vlmkernels.ops._op import bad_argument
from vlmkernels.ops.attention import attention_qkvpacked


class SelfAttention(ProjectedAttention):
    """``out(attention(q(x), k(x), v(x)))``.

    ``SelfAttention(1152, 16, layout="clip").load_state_dict(siglip_attention.state_dict())`` is all that a replacement takes:
    parameters have the names and shapes of the original, fused or separate.

    Args:
        embed_dim: width ``C`` of the input and the output.
        num_heads: query heads ``H``.
        num_kv_heads: key and value heads, a divisor of ``H``; ``H`` by default.
        head_dim: width ``D`` of a head; ``embed_dim // num_heads`` by default.
        layout: the names of the parameters, and with them whether Q, K and V are one matrix: ``"clip"``, ``"llama"``, ``"bert"``,
            ``"blip"``, ``"timm"`` (docs/nn.md lists the layers of each), or an ``AttentionLayout`` of your own.
        bias: whether the input projections have one.
        out_bias: the same of the output projection; like ``bias`` by default.
        qk_norm: None; ``"rms"``: RMSNorm over each head of q and k (Qwen3); ``"gemma"``: the same with weight ``1 + w``;
            ``"layer"``: LayerNorm over each head.
        norm_eps: of those norms.
        scale: the factor on the logits; ``1 / sqrt(D)`` by default.
        softcap: see ``vlmkernels.ops.attention.attention``.
        causal: each token sees no later token.
        attention_dropout: kept so that a configuration can be passed on; only 0 can train.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        layout: str | AttentionLayout = "clip",
        bias: bool = True,
        out_bias: bool | None = None,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        scale: float | None = None,
        softcap: float = 0.0,
        causal: bool = False,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads,
            head_dim,
            embed_dim,
            layout=layout,
            bias=bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            scale=scale,
            softcap=softcap,
            causal=causal,
            attention_dropout=attention_dropout,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: torch.Tensor,
        ranges: KeyRanges | None = None,
        rope: tuple[torch.Tensor, torch.Tensor] | None = None,
        cached: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
        projected: bool = True,
    ) -> torch.Tensor:
        """Attend within each row of the batch, or within a packed sequence.

        Args:
            x: ``[B, S, C]``, or packed ``[T, C]``.
            ranges: the keys that each token sees, ``[B|1, S]`` (packed: ``[1, T]``); all of them by default.
            rope: the tables ``(cos, sin)`` of the rotary embedding, each ``[B|1, S, R/2]`` (packed: ``[1, T, R/2]``), half of
                what Hugging Face passes as ``position_embeddings``: ``cos[..., : R // 2]``. None: no rotary embedding.
            cached: puts k and v ``[B, S, Hk, D]`` into a cache and returns all of its keys and values, ``[B, Sk, Hk, D]``; the
                ranges are of those then.
            projected: whether the output projection is made, or left to the caller.

        Returns:
            Like ``x``; without an output projection (also layout ``"bert"``) ``[..., H * D]``.

        Raises:
            ValueError: a shape that doesn't fit, or training with ``attention_dropout > 0``.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.embed_dim:
            raise bad_argument("x", f"shape {tuple(x.shape)}", f"[B, S, {self.embed_dim}] or [T, {self.embed_dim}]")
        self._check_dropout()
        # Where nothing stands between the product and attention, the gradients of q, k and v come back as one matrix.
        direct = rope is None and cached is None and self.qk_norm is None
        learns = torch.is_grad_enabled() and not torch.compiler.is_compiling()
        qkv = self._project_qkv(x) if direct and learns else None
        if qkv is not None:
            masks: dict[str, Any] = {"causal": self.causal, "scale": self.scale, "softcap": self.softcap}
            y = attention_qkvpacked(qkv, self.num_heads, self.num_kv_heads, ranges, **masks)
        else:
            q, k, v = self._project(x, x)
            q, k = self._position(q, k, rope)
            if cached is not None:
                k, v = cached(k, v)
            y = self._attend(q, k, v, ranges)
        return self._project_out(y) if projected else y

    def _project_qkv(self, x: torch.Tensor) -> torch.Tensor | None:
        """q, k and v of each token as one row, or None where they come of several products."""
        return project_whole(x, self.projections())

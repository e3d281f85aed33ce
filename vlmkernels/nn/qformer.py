# SPDX-License-Identifier: Apache-2.0
"""The Q-Former layer of BLIP-2, InstructBLIP and MiniGPT-4."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlmkernels.masks import KeyRanges
from vlmkernels.nn.cross_attention import CrossAttention
from vlmkernels.nn.self_attention import SelfAttention
from vlmkernels.ops._op import bad_argument


class _AddNorm(nn.Module):
    """``LayerNorm(dropout(dense(x)) + residual)``, the end of every block of a post-norm transformer."""

    def __init__(self, in_features: int, out_features: int, eps: float, dropout: float, **made: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, out_features, **made)
        self.LayerNorm = nn.LayerNorm(out_features, eps=eps, **made)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.LayerNorm(self.dropout(self.dense(x)) + residual)
        return y


class _Dense(nn.Module):
    """``gelu(dense(x))``, the first half of a feed-forward."""

    def __init__(self, in_features: int, out_features: int, **made: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, out_features, **made)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.gelu(self.dense(x))


class _Block(nn.Module):
    """An attention and what follows it, under the names of the checkpoint."""

    def __init__(self, attention: nn.Module, output: _AddNorm) -> None:
        super().__init__()
        self.attention = attention
        self.output = output

    def forward(self, x: torch.Tensor, *arguments: torch.Tensor | KeyRanges | None) -> torch.Tensor:
        y: torch.Tensor = self.output(self.attention(x, *arguments), x)
        return y


class QFormerLayer(nn.Module):
    """Self-attention over queries and text, cross-attention of the queries to the image, and a feed-forward for each of the two.

    Post-norm, GELU (erf). The state_dict is that of ``Blip2QFormerLayer`` and ``InstructBlipQFormerLayer`` in transformers.

    Args:
        embed_dim: width ``C`` of queries and text.
        num_heads: heads of both attentions.
        intermediate_dim: width inside the feed-forwards; ``4 * embed_dim`` by default.
        context_dim: width of the image tokens.
        cross_attention: whether this layer has it (published models: every second one, from the first).
        text: whether it has the feed-forward for text.
        norm_eps: of the LayerNorms.
        dropout: after each dense layer, in training.
        attention_dropout: kept so that a configuration can be passed on; only 0 can train.
    """

    def __init__(
        self,
        embed_dim: int = 768,
        num_heads: int = 12,
        intermediate_dim: int | None = None,
        *,
        context_dim: int = 1408,
        cross_attention: bool = True,
        text: bool = True,
        norm_eps: float = 1e-12,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.embed_dim = embed_dim
        inner = 4 * embed_dim if intermediate_dim is None else intermediate_dim
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        heads: dict[str, Any] = {"layout": "bert", "attention_dropout": attention_dropout, **made}

        def add_norm(width: int) -> _AddNorm:
            return _AddNorm(width, embed_dim, norm_eps, dropout, **made)

        self.attention = _Block(SelfAttention(embed_dim, num_heads, **heads), add_norm(embed_dim))
        self.crossattention = None
        if cross_attention:
            reader = CrossAttention(embed_dim, num_heads, context_dim=context_dim, **heads)
            self.crossattention = _Block(reader, add_norm(embed_dim))
        self.intermediate = _Dense(embed_dim, inner, **made) if text else None
        self.output = add_norm(inner) if text else None
        self.intermediate_query = _Dense(embed_dim, inner, **made)
        self.output_query = add_norm(inner)

    def forward(
        self,
        x: torch.Tensor,
        ranges: KeyRanges | None = None,
        context: torch.Tensor | None = None,
        context_ranges: KeyRanges | None = None,
        query_length: int = 0,
    ) -> torch.Tensor:
        """Run the layer on queries, text, or queries followed by text.

        Args:
            x: ``[B, Q + T, C]``, the queries first. A batch of 1 serves the whole batch of ``context`` where there is no text.
            ranges: the tokens that each token sees, ``[B|1, Q + T]``: ``KeyRanges.qformer(...)``; all of them by default.
            context: image tokens, ``[B, Sk, context_dim]``; read by the queries where this layer has cross-attention.
            context_ranges: the image tokens that each query sees, ``[B|1, Q]``; all of them by default.
            query_length: ``Q``, 0 for text alone.

        Returns:
            ``[B, Q + T, C]``.

        Raises:
            ValueError: a shape that doesn't fit; no ``context`` for the cross-attention; text in a layer without its
                feed-forward; training with ``attention_dropout > 0``.
        """
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise bad_argument("x", f"shape {tuple(x.shape)}", f"[B, Q + T, {self.embed_dim}]")
        if not 0 <= query_length <= x.shape[1]:
            raise bad_argument("query_length", query_length, f"0 to {x.shape[1]}, the tokens of x")
        x = self.attention(x, ranges)
        queries, text = x[:, :query_length], x[:, query_length:]
        parts = []
        if query_length:
            if self.crossattention is not None:
                if context is None:
                    raise bad_argument("context", None, "the image tokens that the queries read")
                queries = self.crossattention(queries, context, context_ranges)
            parts.append(self.output_query(self.intermediate_query(queries), queries))
        if text.shape[1] or not parts:
            if self.intermediate is None or self.output is None:
                raise bad_argument("query_length", query_length, f"{x.shape[1]}: this layer has no feed-forward for text")
            parts.append(self.output(self.intermediate(text), text))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)

# SPDX-License-Identifier: Apache-2.0
"""The Q-Former of BLIP-2, InstructBLIP and MiniGPT-4, and its layer."""

from functools import partial
from typing import Any

import torch
from torch import nn

from vlmkernels.masks import KeyRanges
from vlmkernels.nn._feed_forward import ActivatedLinear, bare, inference, learning
from vlmkernels.nn._packed import SideBySide, plain, project
from vlmkernels.nn.cross_attention import CrossAttention
from vlmkernels.nn.self_attention import SelfAttention
from vlmkernels.ops._op import bad_argument, check_sizes
from vlmkernels.ops.linear_add_norm import linear_add_norm

#: Rows for which a product and the LayerNorm behind it are faster together: an image or two (32 queries each, H200).
_FEW = 64


class _AddNorm(nn.Module):
    """``LayerNorm(dropout(dense(x)) + residual)``, the end of every block of a post-norm transformer."""

    def __init__(self, in_features: int, out_features: int, eps: float, dropout: float, **made: Any) -> None:
        super().__init__()
        self.dense = nn.Linear(in_features, out_features, **made)
        self.LayerNorm = nn.LayerNorm(out_features, eps=eps, **made)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        dense, norm, drops = self.dense, self.LayerNorm, self.training and self.dropout.p > 0
        alike = not drops and plain(self.dropout, nn.Dropout) and residual.shape[:-1] == x.shape[:-1]
        few = x.shape[:-1].numel() <= _FEW and inference(x, dense, norm)
        if alike and (few or learning(x, dense, norm) and bare(x, dense, norm)):
            return linear_add_norm(x, dense.weight, dense.bias, residual, norm.weight, norm.bias, eps=norm.eps)
        y: torch.Tensor = norm(self.dropout(dense(x)) + residual)
        return y


class _Block(nn.Module):
    """An attention and what follows it, under the names of the checkpoint."""

    def __init__(self, attention: nn.Module, output: _AddNorm) -> None:
        super().__init__()
        self.attention = attention
        self.output = output

    def forward(self, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
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
        self.intermediate = ActivatedLinear(embed_dim, inner, "gelu", **made) if text else None
        self.output = add_norm(inner) if text else None
        self.intermediate_query = ActivatedLinear(embed_dim, inner, "gelu", **made)
        self.output_query = add_norm(inner)

    def forward(
        self,
        x: torch.Tensor,
        ranges: KeyRanges | None = None,
        context: torch.Tensor | None = None,
        context_ranges: KeyRanges | None = None,
        query_length: int = 0,
        keys_values: tuple[torch.Tensor, ...] | None = None,
    ) -> torch.Tensor:
        """Run the layer on queries, text, or queries followed by text.

        Args:
            x: ``[B, Q + T, C]``, the queries first. A batch of 1 serves the whole batch of ``context`` where there is no text.
            ranges: the tokens that each token sees, ``[B|1, Q + T]``: ``KeyRanges.qformer(...)``; all of them by default.
            context: image tokens, ``[B, Sk, context_dim]``; read by the queries where this layer has cross-attention.
            context_ranges: the image tokens that each query sees, ``[B|1, Q]``; all of them by default.
            query_length: ``Q``, 0 for text alone.
            keys_values: what the cross-attention reads of ``context``, where that was computed for all layers at once.

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
        # Rows that lie apart would be copied before each product; so torch.compile writes them there with the norm.
        queries, text = (part.contiguous() for part in (x[:, :query_length], x[:, query_length:]))
        parts = []
        if query_length:
            if self.crossattention is not None:
                if context is None:
                    raise bad_argument("context", None, "the image tokens that the queries read")
                queries = self.crossattention(queries, context, context_ranges, keys_values)
            parts.append(self.output_query(self.intermediate_query(queries), queries))
        if text.shape[1] or not parts:
            if self.intermediate is None or self.output is None:
                raise bad_argument("query_length", query_length, f"{x.shape[1]}: this layer has no feed-forward for text")
            parts.append(self.output(self.intermediate(text), text))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)


class _Embeddings(nn.Module):
    """``word + position`` of text, beside the LayerNorm that queries and text go through, as the checkpoint has them."""

    def __init__(self, words: int, positions: int, width: int, padding_idx: int | None, eps: float, **made: Any) -> None:
        super().__init__()
        self.word_embeddings = nn.Embedding(words, width, padding_idx=padding_idx, **made)
        self.position_embeddings = nn.Embedding(positions, width, **made)
        self.layernorm = nn.LayerNorm(width, eps=eps, **made)

    def forward(self, text: torch.Tensor) -> torch.Tensor:
        positions = self.position_embeddings.num_embeddings
        if text.dim() != 2 or text.dtype not in (torch.int32, torch.int64):
            raise bad_argument("text", f"shape {tuple(text.shape)} of {text.dtype}", "token ids [B, T], int32 or int64")
        if text.shape[1] > positions:
            raise bad_argument("text", f"{text.shape[1]} tokens", f"at most {positions}, the position embeddings")
        y: torch.Tensor = self.word_embeddings(text) + self.position_embeddings.weight[: text.shape[1]]
        return y


def _reader(layer: Any) -> Any:
    """The cross-attention of a layer, or None."""
    return layer.crossattention and layer.crossattention.attention


class _Encoder(SideBySide):
    """The layers, one after the other. Keys and values of all cross-attentions are one product: they read the same tokens."""

    def __init__(self, layers: list[QFormerLayer]) -> None:
        super().__init__()
        self.layer = nn.ModuleList(layers)
        self._lay()

    def _neighbours(self) -> list[nn.Module]:
        return [linear for reader in self._readers() for linear in reader.projections()[1:]]

    def _readers(self) -> list[CrossAttention]:
        """The cross-attentions, but those that were exchanged for something else."""
        found = [_reader(layer) for layer in self.layer]
        return [reader for reader in found if isinstance(reader, CrossAttention)]

    def forward(
        self,
        x: torch.Tensor,
        ranges: KeyRanges | None,
        context: torch.Tensor | None,
        context_ranges: KeyRanges | None,
        query_length: int,
    ) -> torch.Tensor:
        known: dict[Any, tuple[torch.Tensor, ...]] = {}
        readers = self._readers() if context is not None else []
        if context is not None and readers:
            outputs = project(context, self._neighbours())
            known = {reader: reader.keys_values(outputs[2 * i : 2 * i + 2]) for i, reader in enumerate(readers)}
        for layer in self.layer:
            x = layer(x, ranges, context, context_ranges, query_length, known.get(_reader(layer)))
        return x


class QFormer(nn.Module):
    """The Q-Former (Li et al. 2023): LayerNorm of queries and text, then a ``QFormerLayer`` for each step of the depth.

    The state_dict is that of ``Blip2QFormerModel`` in transformers; with ``vocab_size`` that of ``InstructBlipQFormerModel``. As
    there, the learned queries are a parameter of the model around.

    Args:
        embed_dim: width ``C`` of queries and text.
        num_heads: heads of all attentions.
        intermediate_dim: width inside the feed-forwards; ``4 * embed_dim`` by default.
        depth: number of layers.
        context_dim: width of the image tokens.
        cross_attention_frequency: every how many layers have cross-attention, from the first on.
        text: whether the layers have the feed-forward for text (``use_qformer_text_input`` of BLIP-2).
        vocab_size: words of the text embeddings of InstructBLIP, whose text comes as token ids; None for BLIP-2, whose text
            comes embedded.
        num_positions: the position embeddings beside them.
        padding_idx: the word that gets no gradient.
        norm_eps: of the LayerNorms.
        dropout: after the first LayerNorm and each dense layer, in training.
        attention_dropout: kept so that a configuration can be passed on; only 0 can train.

    Raises:
        ValueError: a ``depth`` or ``cross_attention_frequency`` below 1; a ``vocab_size`` with ``text=False``.
    """

    def __init__(
        self,
        embed_dim: int = 768,
        num_heads: int = 12,
        intermediate_dim: int | None = None,
        depth: int = 12,
        *,
        context_dim: int = 1408,
        cross_attention_frequency: int = 2,
        text: bool = True,
        vocab_size: int | None = None,
        num_positions: int = 512,
        padding_idx: int | None = 0,
        norm_eps: float = 1e-12,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(depth=depth, cross_attention_frequency=cross_attention_frequency)
        if vocab_size is not None and not text:
            raise bad_argument("vocab_size", vocab_size, "None with text=False")
        self.embed_dim, self.context_dim, self.text = embed_dim, context_dim, text
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        rates: dict[str, Any] = {"norm_eps": norm_eps, "dropout": dropout, "attention_dropout": attention_dropout}

        self.embeddings = None
        if vocab_size is None:
            self.layernorm = nn.LayerNorm(embed_dim, eps=norm_eps, **made)
        else:
            self.embeddings = _Embeddings(vocab_size, num_positions, embed_dim, padding_idx, norm_eps, **made)
        self.dropout = nn.Dropout(dropout)
        layer = partial(QFormerLayer, embed_dim, num_heads, intermediate_dim, context_dim=context_dim, text=text, **rates, **made)
        self.encoder = _Encoder([layer(cross_attention=i % cross_attention_frequency == 0) for i in range(depth)])

    def forward(
        self,
        queries: torch.Tensor | None,
        context: torch.Tensor | None = None,
        text: torch.Tensor | None = None,
        ranges: KeyRanges | None = None,
        context_ranges: KeyRanges | None = None,
    ) -> torch.Tensor:
        """Let queries read images, beside text or not; or run on text alone.

        Each of ``queries``, ``context`` and ``text`` has the batch ``B`` or 1. Learned queries of batch 1 go through the first
        self-attention once, unless text, dropout or ranges make them differ.

        Args:
            queries: ``[B, Q, C]``; None for text alone.
            context: image tokens, ``[B, S, context_dim]`` of the dtype of the parameters; text alone does not read them.
            text: with ``vocab_size`` token ids, ``[B, T]``. Without, the sum of word and position embeddings, ``[B, T, C]``.
            ranges: the tokens of ``[queries; text]`` that each of them sees, ``[B|1, Q + T]``: ``KeyRanges.qformer(...)``; all of
                them by default.
            context_ranges: the image tokens that each query sees, ``[B|1, Q]``: ``KeyRanges.key_padding(Q, lengths=...)``; all of
                them by default.

        Returns:
            ``[B, Q + T, C]``.

        Raises:
            ValueError: a shape that doesn't fit; neither queries nor text; queries without ``context``; text in a module with
                ``text=False``; training with ``attention_dropout > 0``.
        """
        if queries is None and text is None:
            raise bad_argument("queries, text", "None", "at least one of the two")
        if text is not None:
            if not self.text:
                raise bad_argument("text", f"shape {tuple(text.shape)}", "None: with text=False there is no feed-forward for it")
            text = text if self.embeddings is None else self.embeddings(text)
        if queries is None:
            context = None
        elif context is None:
            raise bad_argument("context", None, "the image tokens that the queries read")
        batch = self._batch(queries, context, text)

        parts = [part for part in (queries, text) if part is not None]
        # In training each image drops other channels of the same queries.
        drops = self.training and self.dropout.p > 0
        if text is not None or drops or (ranges is not None and ranges.start.shape[0] != 1):
            parts = [part.expand(batch, -1, -1) for part in parts]
        norm = self.layernorm if self.embeddings is None else self.embeddings.layernorm
        x = self.dropout(norm(parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)))
        y: torch.Tensor = self.encoder(x, ranges, context, context_ranges, 0 if queries is None else queries.shape[1])
        return y

    def _batch(self, queries: torch.Tensor | None, context: torch.Tensor | None, text: torch.Tensor | None) -> int:
        """The one batch of those that are given; 1 serves any."""
        batch, width = 1, self.embed_dim
        shapes = (("queries", queries, "Q", width), ("text", text, "T", width), ("context", context, "S", self.context_dim))
        for name, x, tokens, channels in shapes:
            if x is None:
                continue
            if x.dim() != 3 or x.shape[-1] != channels:
                raise bad_argument(name, f"shape {tuple(x.shape)}", f"[B, {tokens}, {channels}]")
            if batch != 1 and x.shape[0] not in (1, batch):
                raise bad_argument(name, f"a batch of {x.shape[0]}", f"{batch}, as of the other arguments, or 1")
            batch = x.shape[0] if batch == 1 else batch
        return batch

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, context_dim={self.context_dim}, text={self.text}"

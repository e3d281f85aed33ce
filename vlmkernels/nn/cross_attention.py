# SPDX-License-Identifier: Apache-2.0
"""Cross-attention: queries, or text, that read the tokens of images."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlmkernels.masks import KeyRanges
from vlmkernels.nn._attention import AttentionLayout, ProjectedAttention
from vlmkernels.nn._packed import plain, project
from vlmkernels.ops._op import bad_argument
from vlmkernels.ops.cross_attention import one_batch


class _ValueBias(torch.autograd.Function):
    """What attention returned, ``[..., H * D]``, as it is; but the bias of the values ``[Hk * D]`` gets its gradient here.

    The weights of a query that sees a key sum to 1, so the bias of the values is one of the result: its gradient is a sum over
    queries. A sum over the keys of 64 images reads 25 MB for 257 tokens, and took 12 of 331 us of a layer's step (H200).
    """

    @staticmethod
    def forward(ctx: Any, y: torch.Tensor, bias: torch.Tensor, kv_heads: int) -> torch.Tensor:
        ctx.kv_heads, ctx.columns = kv_heads, bias.shape[0]
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, None]:
        heads = dy.reshape(-1, ctx.kv_heads, dy.shape[-1] // ctx.columns, ctx.columns // ctx.kv_heads)
        return dy, heads.sum((0, 2)).flatten(), None


class CrossAttention(ProjectedAttention):
    """``out(attention(q(x), k(context), v(context)))``.

    Args:
        embed_dim: width ``C`` of the queries and the output.
        num_heads: query heads ``H``.
        num_kv_heads: key and value heads, a divisor of ``H``; ``H`` by default.
        head_dim: width ``D`` of a head; ``embed_dim // num_heads`` by default.
        context_dim: width of the context; ``embed_dim`` by default.
        layout: the names of the parameters: ``"bert"`` (Q-Former, without an output projection), ``"llama"`` (mllama),
            ``"clip"``, ``"flamingo"`` and ``"timm_pool"`` (K and V fused), or an ``AttentionLayout`` of your own.
        bias: whether the input projections have one.
        out_bias: the same of the output projection; like ``bias`` by default.
        qk_norm: None, or ``"rms"``: RMSNorm over each head of q and k (mllama), or ``"gemma"`` or ``"layer"``.
        norm_eps: of those norms.
        scale: the factor on the logits; ``1 / sqrt(D)`` by default.
        softcap: see ``vlmkernels.ops.attention.attention``.
        attention_dropout: kept so that a configuration can be passed on; only 0 can train.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        context_dim: int | None = None,
        layout: str | AttentionLayout = "bert",
        bias: bool = True,
        out_bias: bool | None = None,
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        scale: float | None = None,
        softcap: float = 0.0,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads,
            head_dim,
            embed_dim if context_dim is None else context_dim,
            layout=layout,
            bias=bias,
            out_bias=out_bias,
            qk_norm=qk_norm,
            norm_eps=norm_eps,
            scale=scale,
            softcap=softcap,
            causal=False,
            attention_dropout=attention_dropout,
            device=device,
            dtype=dtype,
        )
        if len(self.layout.projections) == 1:
            raise bad_argument("layout", f"a fused {self.layout.projections[0]}", "Q apart from K and V")

    def forward(
        self,
        x: torch.Tensor,
        context: torch.Tensor,
        ranges: KeyRanges | None = None,
        keys_values: tuple[torch.Tensor, ...] | None = None,
        cached: Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]] | None = None,
    ) -> torch.Tensor:
        """Let each query read its keys.

        Args:
            x: ``[B, Sq, C]``, or packed ``[Tq, C]``.
            context: ``[B, Sk, context_dim]``, or packed ``[Tk, context_dim]``. Where one of the two batches is 1, it serves the
                whole batch of the other: learned queries are projected once.
            ranges: the keys that each query sees, ``[B|1, Sq]`` (packed: ``[1, Tq]``), for example
                ``KeyRanges.key_padding(lengths, Sq)``; all of them by default.
            keys_values: k and v ``[..., Hk, D]`` of ``context``, where they were computed for several layers at once.
            cached: puts k and v ``[B, Sk, Hk, D]`` into a cache and returns all of its keys and values; the ranges are of those.

        Returns:
            ``[B, Sq, C]``, packed ``[Tq, C]``; without an output projection (layout ``"bert"``) ``[..., H * D]``.

        Raises:
            ValueError: a shape that doesn't fit, or training with ``attention_dropout > 0``.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.embed_dim:
            raise bad_argument("x", f"shape {tuple(x.shape)}", f"[B, Sq, {self.embed_dim}] or [Tq, {self.embed_dim}]")
        if context.dim() != x.dim() or context.shape[-1] != self.context_dim:
            wanted = f"[B, Sk, {self.context_dim}]" if x.dim() == 3 else f"[Tk, {self.context_dim}]"
            raise bad_argument("context", f"shape {tuple(context.shape)}", wanted)
        batches = (x.shape[0], context.shape[0]) if x.dim() == 3 else (1, 1)
        if batches[0] != batches[1] and 1 not in batches:
            raise bad_argument("context", f"a batch of {batches[1]}", f"x's {batches[0]}, or 1 in either")
        self._check_dropout()
        apart = keys_values is None and cached is None and self._value_bias_apart(context, ranges)
        if apart:
            keys_values = self.keys_values(project(context, self.projections()[1:], (False, True)))
        if keys_values is None:
            q, k, v = self._project(x, context)
        else:
            (q,), (k, v) = self._heads(0, (self.projections()[0](x),)), keys_values
        q, k = self._position(q, k, None)
        if cached is not None:
            k, v = cached(k, v)
        if x.dim() == 3:
            q, k, v, ranges = one_batch(q, k, v, ranges)
        y = self._attend(q, k, v, ranges)
        if apart:
            y = _ValueBias.apply(y, self.projections()[2].bias, self.num_kv_heads)
        y = self._project_out(y)
        return y if x.dim() == 2 else y.view(batches[1] if batches[0] == 1 else batches[0], x.shape[1], y.shape[-1])

    def _value_bias_apart(self, context: torch.Tensor, ranges: KeyRanges | None) -> bool:
        """Whether the bias of the values is a constant to their projection, and gets its gradient from the result."""
        linear: Any = self.projections()[-1]
        if ranges is not None or len(self.layout.projections) < 3 or not plain(linear) or linear.bias is None:
            return False  # nor where a query may see nothing
        return torch.is_grad_enabled() and linear.bias.requires_grad and context.shape[-2] > 0

    def keys_values(self, outputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
        """k and v for ``forward``, from what the projections of the context returned."""
        return self._heads(1, outputs)

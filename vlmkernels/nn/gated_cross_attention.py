# SPDX-License-Identifier: Apache-2.0
"""The gated layer through which the text of IDEFICS, after Flamingo, reads its images."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlmkernels.masks import KeyRanges
from vlmkernels.nn._feed_forward import DecoderFeedForward
from vlmkernels.nn._norm import RMSNorm
from vlmkernels.nn.cross_attention import CrossAttention
from vlmkernels.ops._op import bad_argument, check_sizes

_QK_NORMS = (None, "rms")


class GatedCrossAttention(nn.Module):
    """Cross-attention of text to images and a feed-forward, each behind a learned gate that starts closed (Alayrac et al. 2022).

    ``x += tanh(alpha_cross_attn) * attention(norm(x), context)``, then ``x += tanh(alpha_dense) * feed_forward(norm(x))``, with
    RMSNorm, SiLU and no biases. A token that sees no image gets nothing from the attention and passes through the feed-forward
    all the same. The state_dict is that of ``IdeficsGatedCrossAttentionLayer`` in transformers.

    Args:
        embed_dim: width ``C`` of the text.
        num_heads: heads of the attention.
        intermediate_dim: width inside the feed-forward.
        context_dim: width of the image tokens; ``embed_dim`` by default.
        gate: ``"float"``: one number, ``[1]``; ``"vector"``: one for each channel, ``[1, 1, C]`` (``alpha_type``). At first 0.
        qk_norm: None, or ``"rms"``: RMSNorm over each head of q and k (``qk_layer_norms``).
        norm_eps: of all norms.
        dropout: of what attention and feed-forward add, in training.
        attention_dropout: kept so that a configuration can be passed on, where IDEFICS has one ``dropout`` for both; only 0 can
            train.

    Raises:
        ValueError: a size below 1, ``embed_dim`` not a multiple of ``num_heads``, an unknown ``gate`` or ``qk_norm``, a
            ``dropout`` outside 0 to 1.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        intermediate_dim: int,
        *,
        context_dim: int | None = None,
        gate: str = "float",
        qk_norm: str | None = None,
        norm_eps: float = 1e-6,
        dropout: float = 0.0,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        width = embed_dim if context_dim is None else context_dim
        check_sizes(embed_dim=embed_dim, num_heads=num_heads, intermediate_dim=intermediate_dim, context_dim=width)
        gates = {"float": (1,), "vector": (1, 1, embed_dim)}
        if gate not in gates:
            raise bad_argument("gate", repr(gate), f"one of {', '.join(gates)}")
        if qk_norm not in _QK_NORMS:
            raise bad_argument("qk_norm", repr(qk_norm), f"one of {_QK_NORMS}")
        if not 0 <= dropout <= 1:
            raise bad_argument("dropout", dropout, "0 to 1")
        self.embed_dim, self.gate, self.dropout = embed_dim, gate, dropout

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        heads: dict[str, Any] = {"qk_norm": qk_norm, "norm_eps": norm_eps, "attention_dropout": attention_dropout, **made}
        self.cross_attn = CrossAttention(embed_dim, num_heads, context_dim=width, layout="idefics", bias=False, **heads)
        self.mlp = DecoderFeedForward(embed_dim, intermediate_dim, "silu", **made)
        self.input_layernorm = RMSNorm(embed_dim, norm_eps, **made)
        self.post_attention_layernorm = RMSNorm(embed_dim, norm_eps, **made)
        self.alpha_cross_attn = nn.Parameter(torch.zeros(gates[gate], **made))
        self.alpha_dense = nn.Parameter(torch.zeros(gates[gate], **made))

    def _add(self, x: torch.Tensor, alpha: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``x + tanh(alpha) * y``, with dropout of ``y``."""
        return torch.addcmul(x, alpha.flatten().tanh(), F.dropout(y, self.dropout, self.training))

    def forward(self, x: torch.Tensor, context: torch.Tensor, ranges: KeyRanges | None = None) -> torch.Tensor:
        """Let the text read its images.

        Args:
            x: ``[B, S, C]``, or packed ``[T, C]``; of the dtype of the parameters.
            context: the tokens of all images of a row, one image after the other: ``[B, Sk, context_dim]``, or packed
                ``[Tk, context_dim]``. A batch of 1 serves the whole batch of ``x``.
            ranges: the image tokens that each token of the text sees, ``[B|1, S]`` (packed: ``[1, T]``):
                ``KeyRanges.flamingo(...)``, the last image before it, or ``KeyRanges.cross(...)``, any image or run of images. An
                empty range is a token that sees no image. All of them by default.

        Returns:
            Like ``x``.

        Raises:
            ValueError: a shape that doesn't fit, or training with ``attention_dropout > 0``.
        """
        if x.dim() not in (2, 3) or x.shape[-1] != self.embed_dim:
            raise bad_argument("x", f"shape {tuple(x.shape)}", f"[B, S, {self.embed_dim}] or [T, {self.embed_dim}]")
        # The attention gives zeros for an empty range, and nothing after it has a bias: such a row needs no gate of its own.
        x = self._add(x, self.alpha_cross_attn, self.cross_attn(self.input_layernorm(x), context, ranges))
        return self._add(x, self.alpha_dense, self.mlp(self.post_attention_layernorm(x)))

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, gate={self.gate}, dropout={self.dropout}"

# SPDX-License-Identifier: Apache-2.0
"""The resampler of Kosmos-2: learned latents that read an image in one cross-attention of the text's width."""

from typing import Any

import torch
from torch import nn

from vlmkernels.nn._packed import project
from vlmkernels.nn.cross_attention import CrossAttention
from vlmkernels.ops._op import bad_argument, check_sizes


class _Attention(CrossAttention):
    """Attention of the latents ``[1, n, C]`` over ``[context; latents]``."""

    def _value_bias_apart(self, *_: Any) -> bool:
        return False  # the values are of two products

    def _project(self, x: torch.Tensor, context: torch.Tensor) -> tuple[torch.Tensor, ...]:
        # The latents are the same for every image: their rows of q, k and v are computed once and repeated.
        q, *own = super()._project(x, x)
        keys_values = []
        for image, latents in zip(self._heads(1, project(context, self.projections()[1:])), own, strict=True):
            keys_values.append(torch.cat((image, latents.expand(context.shape[0], -1, -1, -1)), dim=1))
        return q, *keys_values


class KosmosResampler(nn.Module):
    """``n`` learned latents that read the tokens of an image, and each other, once: no norm, no feed-forward (Peng et al. 2023).

    ``out_proj(attention(latents, [dense(context); latents]))``, without a mask. The state_dict is that of
    ``Kosmos2ImageToTextProjection`` in transformers, whose context is the vision tower's tokens after ``post_layernorm`` and
    ``F.normalize(..., dim=-1)``.

    Args:
        embed_dim: width ``C`` of the latents and the output, that of the text.
        num_heads: heads ``H``, a divisor of ``C``.
        context_dim: width of the image tokens.
        num_latents: ``n``.
        attention_dropout: kept so that a configuration can be passed on; only 0 can train.

    Raises:
        ValueError: a size below 1, ``embed_dim`` not a multiple of ``num_heads``.
    """

    def __init__(
        self,
        embed_dim: int = 2048,
        num_heads: int = 32,
        *,
        context_dim: int = 1024,
        num_latents: int = 64,
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(embed_dim=embed_dim, num_heads=num_heads, context_dim=context_dim, num_latents=num_latents)
        if embed_dim % num_heads:
            raise bad_argument("embed_dim", embed_dim, f"a multiple of num_heads = {num_heads}")

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.dense = nn.Linear(context_dim, embed_dim, **made)
        self.latent_query = nn.Parameter(torch.randn(num_latents, embed_dim, **made))
        self.x_attn = _Attention(embed_dim, num_heads, layout="clip", attention_dropout=attention_dropout, **made)

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """Read every image of a batch into ``n`` tokens.

        Args:
            context: ``[B, S, context_dim]`` of the dtype of the parameters, the tokens of ``B`` images.

        Returns:
            ``[B, n, C]``.

        Raises:
            ValueError: a shape that doesn't fit, or training with ``attention_dropout > 0``.
        """
        if context.dim() != 3 or context.shape[-1] != self.dense.in_features:
            raise bad_argument("context", f"shape {tuple(context.shape)}", f"[B, S, {self.dense.in_features}]")
        out: torch.Tensor = self.x_attn(self.latent_query[None], self.dense(context))
        return out

    def extra_repr(self) -> str:
        return f"num_latents={self.latent_query.shape[0]}"

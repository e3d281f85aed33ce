# SPDX-License-Identifier: Apache-2.0
"""The Perceiver resampler of Flamingo: learned latents that read an image of any length into a fixed number of tokens."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlmkernels.masks import KeyRanges
from vlmkernels.nn._attention import ATTENTION_LAYOUTS, AttentionLayout
from vlmkernels.nn.cross_attention import CrossAttention
from vlmkernels.ops._op import bad_argument, check_sizes


@dataclass(frozen=True)
class _Layout:
    """What one implementation calls its parameters, and the activation of its feed-forward.

    Args:
        blocks: the list of blocks; ``blocks.<i>.0`` is an attention, ``blocks.<i>.1`` a feed-forward.
        norm: the LayerNorm at the end.
        attention: the projections, and the norms of q and k.
        input_norms: the LayerNorms of context and latents inside an attention.
        feed_forward: LayerNorm and the two projections of a feed-forward.
        activation: between these.
        qk_norms: what ``qk_norm`` may be.
    """

    blocks: str
    norm: str
    attention: AttentionLayout
    input_norms: tuple[str, str]
    feed_forward: tuple[str, str, str]
    activation: Callable[[torch.Tensor], torch.Tensor]
    qk_norms: tuple[str | None, ...]


_LAYOUTS = {
    "idefics": _Layout(
        "blocks",
        "layer_norm",
        AttentionLayout(("q_proj", "k_proj", "v_proj"), "output_proj", ("q_layer_norm", "k_layer_norm")),
        ("context_layer_norm", "latents_layer_norm"),
        ("ln", "fc", "c_proj"),
        F.relu,
        (None, "layer"),
    ),
    "flamingo": _Layout(
        "layers", "norm", ATTENTION_LAYOUTS["flamingo"], ("norm_media", "norm_latents"), ("0", "1", "3"), F.gelu, (None,)
    ),
}


class _Attention(CrossAttention):
    """Attention of the latents over ``[context; latents]``, both normed first."""

    def __init__(self, embed_dim: int, num_heads: int, head_dim: int, names: _Layout, norm_eps: float, **arguments: Any) -> None:
        heads: dict[str, Any] = {"head_dim": head_dim, "layout": names.attention, "norm_eps": norm_eps, **arguments}
        super().__init__(embed_dim, num_heads, bias=False, **heads)
        self._input_norms = names.input_norms
        for name in names.input_norms:
            self.add_module(name, nn.LayerNorm(embed_dim, norm_eps, device=arguments["device"], dtype=arguments["dtype"]))

    def forward(  # type: ignore[override]  # what it reads is not the context alone
        self, x: torch.Tensor, context: torch.Tensor, ranges: KeyRanges | None = None
    ) -> torch.Tensor:
        context_norm, latents_norm = (getattr(self, name) for name in self._input_norms)
        x = latents_norm(x)
        keys = torch.cat((context_norm(context), x.expand(context.shape[0], -1, -1)), dim=1)
        return super().forward(x, keys, ranges)


class _FeedForward(nn.Module):
    """``down(activation(up(LayerNorm(x))))``, without biases."""

    def __init__(self, embed_dim: int, intermediate_dim: int, names: _Layout, norm_eps: float, **made: Any) -> None:
        super().__init__()
        self._names, self._activation = names.feed_forward, names.activation
        norm, up, down = names.feed_forward
        self.add_module(norm, nn.LayerNorm(embed_dim, norm_eps, **made))
        self.add_module(up, nn.Linear(embed_dim, intermediate_dim, bias=False, **made))
        self.add_module(down, nn.Linear(intermediate_dim, embed_dim, bias=False, **made))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        norm, up, down = (getattr(self, name) for name in self._names)
        y: torch.Tensor = down(self._activation(up(norm(x))))
        return y


class PerceiverResampler(nn.Module):
    """``n`` learned latents that read the tokens of an image, and each other, in every block (Alayrac et al. 2022).

    A block is ``latents += attention(latents, [context; latents])``, then ``latents += feed_forward(latents)``; both are pre-norm
    and have no biases. A LayerNorm ends the last one. The state_dict is that of ``IdeficsPerceiverResampler`` in transformers or
    of open_flamingo's ``PerceiverResampler``.

    Args:
        embed_dim: width ``C`` of the context, the latents and the output.
        num_heads: heads of the attentions.
        head_dim: width ``D`` of a head.
        intermediate_dim: width inside the feed-forwards; ``4 * embed_dim`` by default.
        num_latents: ``n``.
        depth: number of blocks.
        layout: the names of the parameters and the activation: ``"idefics"``, ReLU; ``"flamingo"``, K and V fused and GELU
            (erf), without open_flamingo's optional embeddings of frames and images.
        qk_norm: None, or with ``"idefics"`` also ``"layer"``: LayerNorm over each head of q and k (``qk_layer_norms_perceiver``).
        norm_eps: of all LayerNorms.

    Raises:
        ValueError: a size below 1, an unknown ``layout``, a ``qk_norm`` that the layout has no names for.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int = 16,
        head_dim: int = 96,
        intermediate_dim: int | None = None,
        *,
        num_latents: int = 64,
        depth: int = 6,
        layout: str = "idefics",
        qk_norm: str | None = None,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        inner = 4 * embed_dim if intermediate_dim is None else intermediate_dim
        check_sizes(embed_dim=embed_dim, num_heads=num_heads, head_dim=head_dim, intermediate_dim=inner)
        check_sizes(num_latents=num_latents, depth=depth)
        if layout not in _LAYOUTS:
            raise bad_argument("layout", repr(layout), f"one of {', '.join(_LAYOUTS)}")
        names = _LAYOUTS[layout]
        if qk_norm not in names.qk_norms:
            raise bad_argument("qk_norm", repr(qk_norm), f"one of {names.qk_norms} in layout {layout!r}")
        self.embed_dim, self.layout = embed_dim, layout

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.latents = nn.Parameter(torch.randn(num_latents, embed_dim, **made))
        blocks = nn.ModuleList(
            nn.ModuleList(
                (
                    _Attention(embed_dim, num_heads, head_dim, names, norm_eps, qk_norm=qk_norm, **made),
                    _FeedForward(embed_dim, inner, names, norm_eps, **made),
                )
            )
            for _ in range(depth)
        )
        self.add_module(names.blocks, blocks)
        self.add_module(names.norm, nn.LayerNorm(embed_dim, norm_eps, **made))

    def forward(self, context: torch.Tensor) -> torch.Tensor:
        """Read every image of a batch into ``n`` tokens.

        Args:
            context: ``[B, S, C]`` of the dtype of the parameters, the tokens of ``B`` images. Frames of one image, which
                open_flamingo keeps in a dimension of their own, follow each other in ``S``.

        Returns:
            ``[B, n, C]``.

        Raises:
            ValueError: a shape that doesn't fit.
        """
        if context.dim() != 3 or context.shape[-1] != self.embed_dim:
            raise bad_argument("context", f"shape {tuple(context.shape)}", f"[B, S, {self.embed_dim}]")
        names = _LAYOUTS[self.layout]
        # With a batch of 1 the first block norms and projects the latents once for all images.
        latents = self.latents[None]
        for attention, feed_forward in getattr(self, names.blocks):
            latents = attention(latents, context) + latents
            latents = feed_forward(latents) + latents
        out: torch.Tensor = getattr(self, names.norm)(latents)
        return out

    def extra_repr(self) -> str:
        return f"{self.embed_dim}, num_latents={self.latents.shape[0]}, layout={self.layout}"

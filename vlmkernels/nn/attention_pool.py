# SPDX-License-Identifier: Apache-2.0
"""The pooling head of SigLIP: a learned query that reads all tokens of an image, and a feed-forward."""

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from vlmkernels.masks import KeyRanges
from vlmkernels.nn._names import get, put
from vlmkernels.ops._op import bad_argument, check_sizes
from vlmkernels.ops.attention import attention
from vlmkernels.ops.cross_attention import one_batch


class _Names(NamedTuple):
    """The names that one project gives the parameters; Q, K and V are one matrix where ``projections`` is one name."""

    probe: str
    projections: tuple[str, ...]
    out: str
    norm: str


_LAYOUTS = {
    "siglip": _Names("probe", ("attention.in_proj",), "attention.out_proj", "layernorm"),
    "timm": _Names("latent", ("q", "kv"), "proj", "norm"),
}
_POOLS = ("first", "mean", "none")
_APPROXIMATE = ("none", "tanh")


class AttentionPool(nn.Module):
    """``y + mlp(norm(y))`` of ``y = out(attention(q(probe), k(x), v(x)))``, with GELU in the feed-forward.

    The state_dict is that of ``SiglipMultiheadAttentionPoolingHead`` and ``Siglip2MultiheadAttentionPoolingHead`` in
    transformers, or with ``layout="timm"`` that of timm's ``AttentionPoolLatent`` as its vision transformers build it: with a
    LayerNorm, without norms of q and k and without positions. The probe is the same for all images, so its query is projected
    once and every image of the batch reads that one. The head is that of Zhai et al., Scaling Vision Transformers (2022).

    Args:
        embed_dim: width ``C`` of the tokens and the result.
        num_heads: heads ``H``, a divisor of ``C``.
        intermediate_dim: width inside the feed-forward; ``4 * embed_dim`` by default.
        num_probes: learned queries ``Q``; 1 in SigLIP (timm: ``latent_len``).
        layout: the names of the parameters: ``"siglip"`` or ``"timm"``.
        pool: what becomes of the probes' results: ``"first"`` returns that of the first, which needs no other, ``"mean"``
            their mean, ``"none"`` all of them (timm's ``pool_type``: ``"token"``, ``"avg"``, ``""``).
        approximate: of GELU, as in torch: ``"tanh"`` (SigLIP's ``gelu_pytorch_tanh``) or ``"none"`` (erf, timm's ``nn.GELU``).
        norm_eps: of the LayerNorm.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        intermediate_dim: int | None = None,
        num_probes: int = 1,
        *,
        layout: str = "siglip",
        pool: str = "first",
        approximate: str = "tanh",
        norm_eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_sizes(num_heads=num_heads)
        if embed_dim < 1 or embed_dim % num_heads:
            raise bad_argument("embed_dim", embed_dim, f"a multiple of num_heads = {num_heads}")
        inner = 4 * embed_dim if intermediate_dim is None else intermediate_dim
        check_sizes(intermediate_dim=inner, num_probes=num_probes)
        for name, choice, known in (
            ("layout", layout, _LAYOUTS),
            ("pool", pool, _POOLS),
            ("approximate", approximate, _APPROXIMATE),
        ):
            if choice not in known:
                raise bad_argument(name, repr(choice), f"one of {', '.join(known)}")
        self.embed_dim, self.num_heads, self.num_probes = embed_dim, num_heads, num_probes
        self.layout, self.pool, self.approximate = layout, pool, approximate

        made: dict[str, Any] = {"device": device, "dtype": dtype}
        names = _LAYOUTS[layout]
        probe = nn.init.trunc_normal_(torch.empty(1, num_probes, embed_dim, **made), std=embed_dim**-0.5)
        put(self, names.probe, nn.Parameter(probe))
        if len(names.projections) == 1:
            weight = nn.init.xavier_uniform_(torch.empty(3 * embed_dim, embed_dim, **made))
            put(self, f"{names.projections[0]}_weight", nn.Parameter(weight))
            put(self, f"{names.projections[0]}_bias", nn.Parameter(torch.zeros(3 * embed_dim, **made)))
        else:
            for name, parts in zip(names.projections, (1, 2), strict=True):
                put(self, name, nn.Linear(embed_dim, parts * embed_dim, **made))
        put(self, names.out, nn.Linear(embed_dim, embed_dim, **made))
        put(self, names.norm, nn.LayerNorm(embed_dim, eps=norm_eps, **made))
        put(self, "mlp.fc1", nn.Linear(embed_dim, inner, **made))
        put(self, "mlp.fc2", nn.Linear(inner, embed_dim, **made))

    def forward(self, x: torch.Tensor, ranges: KeyRanges | None = None) -> torch.Tensor:
        """Pool the tokens of each image.

        Args:
            x: ``[B, S, C]``, in the dtype of the parameters.
            ranges: the tokens that each probe reads, ``[B|1, Q]``: ``KeyRanges.key_padding(Q, lengths=...)`` with the number of
                tokens of each image (SigLIP2 NaFlex), or ``mask=pixel_attention_mask``; all of them by default. Of an image
                without tokens the attention is 0, where the original takes the mean of the padding.

        Returns:
            ``[B, C]``; with ``pool="none"`` ``[B, Q, C]``.

        Raises:
            ValueError: a shape that doesn't fit.
        """
        if x.dim() != 3 or x.shape[-1] != self.embed_dim:
            raise bad_argument("x", f"shape {tuple(x.shape)}", f"[B, S, {self.embed_dim}]")
        batch, read = x.shape[0], self.num_probes
        if ranges is not None and (ranges.batch not in (1, batch) or ranges.num_queries != read):
            wanted = f"({batch}, {read}) or (1, {read}), one range per probe"
            raise bad_argument("ranges", f"shape {tuple(ranges.start.shape)}", wanted)
        if self.pool == "first":
            read, ranges = 1, None if ranges is None else ranges[:1]
        names = _LAYOUTS[self.layout]
        q, kv = self._project(get(self, names.probe)[:, :read], x)
        heads = (self.num_heads, self.embed_dim // self.num_heads)
        k, v = kv.unflatten(-1, (2, *heads)).unbind(-3)
        y = attention(*one_batch(q.unflatten(-1, heads), k, v, ranges))
        assert isinstance(y, torch.Tensor)
        y = get(self, names.out)(y.flatten(-2))
        inner = F.gelu(get(self, "mlp.fc1")(get(self, names.norm)(y)), approximate=self.approximate)
        pooled: torch.Tensor = y + get(self, "mlp.fc2")(inner)
        if self.pool == "none":
            return pooled
        return pooled.mean(1) if self.pool == "mean" else pooled[:, 0]

    def _project(self, probe: torch.Tensor, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The queries ``[1, Q, C]`` and, one after the other, keys and values ``[B, S, 2 * C]``."""
        names = _LAYOUTS[self.layout].projections
        if len(names) == 2:
            return get(self, names[0])(probe), get(self, names[1])(x)
        parts = (self.embed_dim, 2 * self.embed_dim)
        q_weight, kv_weight = get(self, f"{names[0]}_weight").split(parts)
        q_bias, kv_bias = get(self, f"{names[0]}_bias").split(parts)
        return F.linear(probe, q_weight, q_bias), F.linear(x, kv_weight, kv_bias)

    def extra_repr(self) -> str:
        shown = f"{self.embed_dim}, num_heads={self.num_heads}, num_probes={self.num_probes}, layout={self.layout}"
        return f"{shown}, pool={self.pool}, approximate={self.approximate}"

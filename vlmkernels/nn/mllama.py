# SPDX-License-Identifier: Apache-2.0
"""The cross-attention of Llama-3.2-Vision, with its rule for text that sees no image."""

import torch

from vlmkernels.masks import KeyRanges
from vlmkernels.nn.cross_attention import CrossAttention
from vlmkernels.ops._op import bad_argument

_NO_IMAGE = ("everything", "nothing")


class MllamaCrossAttention(CrossAttention):
    """Text reads the tokens of its images: grouped heads, RMSNorm over each head of q and k, no biases and no positions.

    The state_dict is that of ``MllamaTextCrossAttention`` in transformers. A call takes the arguments of ``CrossAttention``:
    ``x`` ``[B, Sq, C]``, the image tokens ``[B, Sk, C]``, and ``KeyRanges.mllama(...)`` or ``KeyRanges.cross(...)``, for which
    the tokens of padded tiles must come last (``compact_keys``). Without ranges all text sees all keys, as in transformers with
    eager attention; its sdpa takes a missing mask for a causal one.

    Text that sees no image (before the first one, or in a sample without any) has all its keys masked, and the two published
    implementations differ there. transformers lifts the mask of these rows: they attend to all keys, also those of padded tiles
    and later images, and the result is added to the text. Meta's own code (llama-models, ``CrossAttention``) multiplies
    the heads with 0. ``no_image`` says which. In both, the layer around this module multiplies its feed-forward with
    ``full_text_row_masked_out_mask``, which is ``(ranges.stop > ranges.start)[:, None, :, None]``.

    Args:
        embed_dim: width ``C`` of the text and of the image tokens.
        num_heads: query heads ``H``, a divisor of ``C``.
        num_kv_heads: key and value heads, a divisor of ``H``.
        norm_eps: of the norms of q and k.
        no_image: what text with an empty range gets: ``"everything"``, attention to all keys (transformers), or ``"nothing"``, 0
            (Meta). Packed text ``[Tq, C]`` with ranges needs ``"nothing"``: all keys would be those of other samples too.
        attention_dropout: kept so that a configuration can be passed on; only 0 can train.
    """

    def __init__(
        self,
        embed_dim: int = 4096,
        num_heads: int = 32,
        num_kv_heads: int = 8,
        *,
        norm_eps: float = 1e-5,
        no_image: str = "everything",
        attention_dropout: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if no_image not in _NO_IMAGE:
            raise bad_argument("no_image", repr(no_image), f"one of {', '.join(_NO_IMAGE)}")
        super().__init__(
            embed_dim,
            num_heads,
            num_kv_heads,
            layout="llama",
            bias=False,
            qk_norm="rms",
            norm_eps=norm_eps,
            attention_dropout=attention_dropout,
            device=device,
            dtype=dtype,
        )
        self.no_image = no_image

    def _attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: KeyRanges | None) -> torch.Tensor:
        if ranges is not None and self.no_image == "everything":
            if q.dim() == 3:
                raise bad_argument("x", f"packed text of {q.shape[0]} tokens", "[B, Sq, C], or no_image='nothing'")
            ranges = _everything_if_empty(ranges, k.shape[1])
        return super()._attend(q, k, v, ranges)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, no_image={self.no_image}"


def _everything_if_empty(ranges: KeyRanges, num_keys: int) -> KeyRanges:
    """All keys for the queries that see none of them."""
    empty = ranges.stop.clamp(max=num_keys) <= ranges.start.clamp(min=0)
    return KeyRanges(ranges.start.masked_fill(empty, 0), ranges.stop.masked_fill(empty, num_keys))

# SPDX-License-Identifier: Apache-2.0
"""The masks of self-attention: text decoders that see images, vision towers, packed sequences, padding."""

from typing import TYPE_CHECKING, Any

import torch

from vlmkernels.masks._ranges import Ranges, integers, spans_of
from vlmkernels.ops._op import bad_argument

if TYPE_CHECKING:
    from typing_extensions import Self

WINDOW_RULES = ("window_outside", "image_outside")


class SelfAttentionMasks(Ranges):
    """Constructors of ``KeyRanges`` for self-attention."""

    @classmethod
    def full(cls, num_queries: int, num_keys: int | None = None, *, device: Any = None) -> "Self":
        """Every query sees every key (ViT). ``num_keys`` defaults to ``num_queries``."""
        start = torch.zeros(1, num_queries, dtype=torch.int32, device=device)
        return cls(start, torch.full_like(start, num_queries if num_keys is None else num_keys))

    @classmethod
    def causal(
        cls,
        num_queries: int,
        num_keys: int | None = None,
        *,
        offset: int | torch.Tensor | None = None,
        window: int | None = None,
        device: Any = None,
    ) -> "Self":
        """Query ``i`` sees the keys up to its own position ``i + offset``.

        Args:
            num_keys: defaults to ``num_queries``.
            offset: the key position of query 0: an int, or a ``[B]`` integer tensor on the device (the lengths of KV caches).
                Defaults to ``num_keys - num_queries``, so that the last query sees the last key (bottom-right alignment, as
                in FlashAttention).
            window: of the keys seen, only the last ``window``, the query's own included (Mistral's sliding window).

        Raises:
            ValueError: ``window`` below 1, or an ``offset`` that is neither an int nor a 1-D integer tensor.
        """
        num_keys = num_queries if num_keys is None else num_keys
        position = _positions(num_queries, num_keys, offset, device)
        return cls(_window_start(position, window), (position + 1).clamp(0, num_keys))

    @classmethod
    def prefix_lm(
        cls,
        num_queries: int,
        prefix: int | torch.Tensor,
        num_keys: int | None = None,
        *,
        offset: int | torch.Tensor | None = None,
        window: int | None = None,
        window_rule: str = "image_outside",
        device: Any = None,
    ) -> "Self":
        """The first ``prefix`` keys see each other both ways and are seen by all; later queries are causal (PaliGemma, GIT).

        Args:
            prefix: an int, or a ``[B]`` integer tensor on the device.
            num_keys: as in ``causal``.
            offset: as in ``causal``.
            window: as in ``causal``; it never hides the prefix from a query of the prefix under ``"image_outside"``.
            window_rule: as in ``image_text``; PaliGemma-2's local layers use ``"image_outside"``.

        Raises:
            ValueError: as ``causal``, a ``prefix`` that is neither an int nor a 1-D integer tensor, an unknown ``window_rule``.
        """
        num_keys = num_queries if num_keys is None else num_keys
        prefix_end = _per_batch("prefix", prefix)
        device = prefix_end.device if isinstance(prefix_end, torch.Tensor) and device is None else device
        position = _positions(num_queries, num_keys, offset, device)
        outside = position >= prefix_end
        image_start = position.masked_fill(~outside, 0)
        image_stop = (torch.zeros_like(position) + prefix_end).masked_fill(outside, 0)
        return cls._causal_or_image(position, image_start, image_stop, num_keys, window, window_rule)

    @classmethod
    def image_text(
        cls,
        token_types: torch.Tensor | None = None,
        *,
        image_ids: torch.Tensor | None = None,
        image_type: int = 1,
        window: int | None = None,
        window_rule: str = "window_outside",
    ) -> "Self":
        """The tokens of one image see each other both ways; everything else is causal (Gemma-3). Give one of:

        Args:
            token_types: ``[B, S]`` integer or bool; each contiguous run of ``image_type`` is one image. PaliGemma's
                ``token_type_ids`` mark the two-way prefix with 0: pass ``image_type=0``.
            image_ids: ``[B, S]`` integer; each contiguous run of one id >= 0 is one image, negative is text. Images that
                touch stay apart.
            window: the sliding window of local layers, in keys, the query's own included.
            window_rule: ``"window_outside"``: window AND (causal OR same image), Gemma-3: a long image loses its oldest
                tokens. ``"image_outside"``: (window AND causal) OR same image, PaliGemma-2: an image stays whole.

        Raises:
            ValueError: both or none of ``token_types`` and ``image_ids``, one that is no 2-D integer tensor, ``window`` below 1,
                or an unknown ``window_rule``.
        """
        if (token_types is None) == (image_ids is None):
            raise bad_argument("token_types, image_ids", "both or none", "one of the two")
        if image_ids is not None:
            ids = integers("image_ids", image_ids, 2)
        else:
            types = integers("token_types", token_types, 2)
            ids = torch.zeros_like(types).masked_fill(types != image_type, -1)
        num_keys = ids.shape[1]
        position = torch.arange(num_keys, dtype=torch.int32, device=ids.device)[None]
        run_start, run_stop = _runs(ids, position)
        is_image = ids >= 0
        image_start = torch.where(is_image, run_start, position)
        image_stop = torch.where(is_image, run_stop, 0)
        return cls._causal_or_image(position, image_start, image_stop, num_keys, window, window_rule)

    @classmethod
    def _causal_or_image(
        cls,
        position: torch.Tensor,
        image_start: torch.Tensor,
        image_stop: torch.Tensor,
        num_keys: int,
        window: int | None,
        window_rule: str,
    ) -> "Self":
        """A text query has ``image_start = position`` and ``image_stop = 0``, which change nothing."""
        if window_rule not in WINDOW_RULES:
            raise bad_argument("window_rule", repr(window_rule), f"one of {', '.join(WINDOW_RULES)}")
        start = _window_start(position, window)
        if window_rule == "image_outside":
            start = torch.minimum(start, image_start)
        stop = torch.maximum(position + 1, image_stop).clamp(0, num_keys)
        return cls(start.expand_as(stop), stop)

    @classmethod
    def packed(
        cls,
        cu_seqlens: torch.Tensor,
        total: int,
        *,
        cu_seqlens_k: torch.Tensor | None = None,
        causal: bool = False,
    ) -> "Self":
        """Sequences packed in one row see only themselves; ``[1, total]``, for ``[T, H, D]`` tensors.

        Args:
            cu_seqlens: ``[N + 1]`` integer, the cumulative lengths from 0. Empty sequences are allowed. Tokens past the last
                entry see nothing, so a buffer of fixed size may be partly filled.
            total: the number of query tokens ``T``.
            cu_seqlens_k: the same for the keys, where they are packed otherwise.
            causal: inside each sequence; bottom-right aligned where its queries and keys differ in number.

        Raises:
            ValueError: ``cu_seqlens`` is no 1-D integer tensor or has no entry, ``cu_seqlens_k`` has another shape.
        """
        cu_q = integers("cu_seqlens", cu_seqlens, 1)
        cu_k = cu_q if cu_seqlens_k is None else integers("cu_seqlens_k", cu_seqlens_k, 1)
        if cu_q.shape[0] == 0:
            raise bad_argument("cu_seqlens", "shape (0,)", "[N + 1], the first entry 0")
        if cu_k.shape != cu_q.shape:
            raise bad_argument("cu_seqlens_k", f"shape {tuple(cu_k.shape)}", f"that of cu_seqlens, {tuple(cu_q.shape)}")
        token = torch.arange(total, dtype=torch.int32, device=cu_q.device)
        # In all of cu_q, not in a slice of it: compiled by torch 2.11 a search in a slice reads from where its storage begins.
        after = torch.searchsorted(cu_q.contiguous(), token, right=True)
        sequence, after = after - 1, after.clamp(max=cu_q.shape[0] - 1)
        start, stop = cu_k[sequence], cu_k[after]
        if causal:
            aligned = stop - cu_q[after] + token + 1
            stop = torch.minimum(stop, torch.maximum(start, aligned))
        return cls(start[None], stop[None])

    @classmethod
    def windows(cls, window: int | torch.Tensor, total: int, *, device: Any = None) -> "Self":
        """Tokens, already ordered by window, see only their own window (Qwen2.5-VL, Swin); ``[1, total]``.

        Args:
            window: the tokens per window (the last one may be shorter), or ``cu_window_seqlens`` ``[N + 1]``.

        Raises:
            ValueError: ``window`` below 1, or what ``packed`` refuses.
        """
        if isinstance(window, torch.Tensor):
            return cls.packed(window, total)
        if window < 1:
            raise bad_argument("window", window, "at least 1")
        token = torch.arange(total, dtype=torch.int32, device=device)[None]
        start = token - token % window
        return cls(start, (start + window).clamp(max=total))

    @classmethod
    def key_padding(
        cls,
        num_queries: int,
        *,
        lengths: torch.Tensor | None = None,
        mask: torch.Tensor | None = None,
        validate: bool = False,
    ) -> "Self":
        """Every query sees the keys that aren't padding. Give one of:

        Args:
            lengths: ``[B]`` integer; the keys before it are real (padding on the right).
            mask: ``[B, Sk]`` bool or integer, nonzero at real keys, which must be one contiguous run (padding on the left, on
                the right or both).
            validate: check that ``mask`` has no holes. This reads values back (a host sync). Without it a mask with holes
                gives wrong ranges.

        Raises:
            ValueError: both or none of ``lengths`` and ``mask``, one of another shape or dtype, or ``validate`` found a hole.
        """
        if (lengths is None) == (mask is None):
            raise bad_argument("lengths, mask", "both or none", "one of the two")
        if lengths is not None:
            stop = integers("lengths", lengths, 1)[:, None]
            start = torch.zeros_like(stop)
        else:
            start, stop = spans_of(integers("mask", mask, 2) != 0, "mask", validate)
        return cls(*(t.expand(-1, num_queries) for t in (start, stop)))

    @classmethod
    def mllama_vision(cls, lengths: torch.Tensor, total: int) -> "Self":
        """Llama-3.2's vision tower: real tokens see everything, padding included; padding sees the real tokens only.

        The tower masks a pair only where both are padding, which has no hole once the padding comes last: reorder the tokens
        with ``compact_keys``, whose ``key_stop`` are the lengths.

        Args:
            lengths: ``[B]`` integer, the real tokens of each image.
            total: the number of tokens ``S``, real and padding.
        """
        length = integers("lengths", lengths, 1)[:, None]
        token = torch.arange(total, dtype=torch.int32, device=length.device)[None]
        stop = torch.where(token < length, torch.full_like(length, total), length)
        return cls(torch.zeros_like(stop), stop)


def _per_batch(name: str, value: int | torch.Tensor) -> int | torch.Tensor:
    """An int as it is; a tensor ``[B]`` as ``[B, 1]`` int32."""
    if isinstance(value, torch.Tensor):
        return integers(name, value.reshape(1) if value.dim() == 0 else value, 1)[:, None]
    if isinstance(value, float):
        raise bad_argument(name, value, "an int or a 1-D integer tensor")
    return value


def _positions(num_queries: int, num_keys: int, offset: int | torch.Tensor | None, device: Any) -> torch.Tensor:
    """The key position of each query, ``[B|1, Sq]`` int32."""
    shift = num_keys - num_queries if offset is None else _per_batch("offset", offset)
    device = shift.device if isinstance(shift, torch.Tensor) and device is None else device
    return torch.arange(num_queries, dtype=torch.int32, device=device)[None] + shift


def _window_start(position: torch.Tensor, window: int | None) -> torch.Tensor:
    """The first key of a window of ``window`` keys that ends with the query's own."""
    if window is None:
        return torch.zeros_like(position)
    if window < 1:
        raise bad_argument("window", window, "at least 1")
    return (position - (window - 1)).clamp(min=0)


def _runs(ids: torch.Tensor, position: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """First and last + 1 position of the run of equal ids that each token of ``ids`` ``[B, S]`` is in."""
    size = ids.shape[1]
    if size == 0:
        return ids, ids
    differs = ids[:, 1:] != ids[:, :-1]
    edge = torch.ones_like(ids[:, :1], dtype=torch.bool)
    first = torch.where(torch.cat([edge, differs], 1), position, 0).cummax(1).values
    last = torch.where(torch.cat([differs, edge], 1), position + 1, size).flip(1).cummin(1).values.flip(1)
    return first, last

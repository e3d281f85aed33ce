# SPDX-License-Identifier: Apache-2.0
"""The masks between text and images that don't share a sequence as equals: cross-attention, and the Q-Former."""

from typing import TYPE_CHECKING, Any

import torch

from vlmkernels.masks._ranges import Ranges, integers, spans_of
from vlmkernels.ops._op import bad_argument

if TYPE_CHECKING:
    from typing_extensions import Self

QFORMER_TASKS = ("itc", "itm", "itg")
BEFORE_IMAGE = ("nothing", "everything")


def even_spans(num_images: int, keys_per_image: int, *, device: Any = None) -> tuple[torch.Tensor, torch.Tensor]:
    """``key_start`` and ``key_stop`` ``[1, N]`` of images that have equally many keys, one after the other."""
    start = torch.arange(num_images, dtype=torch.int32, device=device)[None] * keys_per_image
    return start, start + keys_per_image


def compact_keys(valid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """An order of the tokens that puts the padding last, so that each image's real tokens are one run.

    Attention doesn't mind the order of the keys once positions are added, so this is done once per context, not per layer.

    Args:
        valid: ``[B, N, K]`` bool, the real ones among the ``K`` tokens of each of ``N`` images (``N = 1`` for one sequence).

    Returns:
        ``order`` ``[B, N * K]`` int64: first the real tokens in the order they had, then the padding;
        ``tokens.gather(1, order[..., None].expand_as(tokens))`` applies it. ``key_start`` and ``key_stop`` ``[B, N]`` int32:
        the span of each image's real tokens in that order.

    Raises:
        ValueError: ``valid`` is not bool or has not three dimensions.
    """
    if valid.dtype != torch.bool or valid.dim() != 3:
        raise bad_argument("valid", f"{valid.dtype} of shape {tuple(valid.shape)}", "torch.bool of shape [B, N, K]")
    key_stop = valid.sum(-1, dtype=torch.int32).cumsum(-1, dtype=torch.int32)
    key_start = key_stop - valid.sum(-1, dtype=torch.int32)
    flat = valid.flatten(1)
    place = torch.where(flat, flat.cumsum(1), flat.sum(1, keepdim=True) + (~flat).cumsum(1)) - 1
    token = torch.arange(flat.shape[1], device=flat.device).expand_as(flat)
    return torch.zeros_like(place).scatter(1, place, token), key_start, key_stop


class CrossAttentionMasks(Ranges):
    """Constructors of ``KeyRanges`` for cross-attention and for the Q-Former."""

    @classmethod
    def cross(
        cls,
        first_image: torch.Tensor,
        key_start: torch.Tensor,
        key_stop: torch.Tensor,
        *,
        stop_image: torch.Tensor | None = None,
    ) -> "Self":
        """Each text token sees the keys of its image, or of a run of images.

        Args:
            first_image: ``[B, Sq]`` integer, the first image that a query sees; out of ``0 <= first_image < N``: nothing.
            key_start: ``[B, N]`` or ``[1, N]`` integer, the first key of each image; images come in the order of their keys.
            key_stop: the same, the last key of each image + 1.
            stop_image: ``[B, Sq]`` integer, the last image that a query sees + 1; defaults to ``first_image + 1``.

        Raises:
            ValueError: a tensor that is no 2-D integer one, or shapes that don't fit.
        """
        first = integers("first_image", first_image, 2)
        last = first + 1 if stop_image is None else integers("stop_image", stop_image, 2)
        if last.shape != first.shape:
            raise bad_argument("stop_image", f"shape {tuple(last.shape)}", f"that of first_image, {tuple(first.shape)}")
        starts, stops = integers("key_start", key_start, 2), integers("key_stop", key_stop, 2)
        if stops.shape != starts.shape:
            raise bad_argument("key_stop", f"shape {tuple(stops.shape)}", f"that of key_start, {tuple(starts.shape)}")
        if starts.shape[0] not in (1, first.shape[0]):
            raise bad_argument("key_start", f"shape {tuple(starts.shape)}", f"[{first.shape[0]}, N] or [1, N]")
        count = starts.shape[1]
        sees = (first >= 0) & (first < count) & (last > first)
        # A leading entry of 0 stands for no image, so that the look-up is in bounds even where there are no images at all.
        start, stop = (
            torch.nn.functional.pad(spans, (1, 0)).expand(first.shape[0], -1).gather(1, index.clamp(0, count).long() * sees)
            for spans, index in ((starts, first + 1), (stops, last))
        )
        return cls(start, stop)

    @classmethod
    def flamingo(cls, image_tokens: torch.Tensor, key_start: torch.Tensor, key_stop: torch.Tensor) -> "Self":
        """Text sees only the image whose token came last, and nothing before the first one (Flamingo, IDEFICS).

        Args:
            image_tokens: ``[B, Sq]`` bool, where the text has an image token; that token sees its image too.
            key_start: as in ``cross``.
            key_stop: as in ``cross``.

        Raises:
            ValueError: ``image_tokens`` is no 2-D integer or bool tensor, or what ``cross`` refuses.
        """
        seen = integers("image_tokens", image_tokens, 2).cumsum(1, dtype=torch.int32)
        return cls.cross(seen - 1, key_start, key_stop)

    @classmethod
    def mllama(
        cls,
        image_tokens: torch.Tensor,
        key_start: torch.Tensor,
        key_stop: torch.Tensor,
        *,
        before_image: str = "nothing",
    ) -> "Self":
        """Text sees the last group of images before it; image tokens that follow each other form a group (Llama-3.2).

        Inside a group, an image token sees the images of the group up to its own.

        Args:
            image_tokens: ``[B, Sq]`` bool, where the text has an image token.
            key_start: as in ``cross``; the padded tiles of each image must have gone to the end (``compact_keys``).
            key_stop: as in ``cross``.
            before_image: what text before the first image sees: ``"nothing"``, or ``"everything"`` as the Hugging Face model,
                which lets such rows attend to all keys (there also to padded tiles).

        Raises:
            ValueError: an unknown ``before_image``, or what ``cross`` refuses.
        """
        if before_image not in BEFORE_IMAGE:
            raise bad_argument("before_image", repr(before_image), f"one of {', '.join(BEFORE_IMAGE)}")
        is_image = integers("image_tokens", image_tokens, 2) != 0
        seen = is_image.cumsum(1, dtype=torch.int32)
        follows = torch.nn.functional.pad(is_image, (1, 0))[:, : is_image.shape[1]]
        # The number of images before the group grows along the text, so a running maximum carries it on.
        before = torch.where(is_image & ~follows, seen - 1, -1)
        first = before.cummax(1).values if before.shape[1] else before
        if before_image == "everything":
            first = torch.where(seen == 0, 0, first)
            seen = torch.where(seen == 0, key_start.shape[1], seen)
        return cls.cross(first, key_start, key_stop, stop_image=seen)

    @classmethod
    def qformer(
        cls,
        task: str,
        num_query_tokens: int,
        num_text: int = 0,
        *,
        text_lengths: torch.Tensor | None = None,
        text_mask: torch.Tensor | None = None,
        validate: bool = False,
        device: Any = None,
    ) -> "Self":
        """Self-attention of the Q-Former over ``[query tokens; text]``, by the task it is trained for (BLIP-2).

        Args:
            task: ``"itc"`` (contrastive): query tokens and text see only their own kind. ``"itm"`` (matching): all see all.
                ``"itg"`` (generation): query tokens see query tokens; text sees those and the text up to itself.
            num_query_tokens: ``Q``; the queries are rows ``0 <= i < Q``.
            num_text: the text tokens ``T`` that follow.
            text_lengths: ``[B]`` integer, the real text tokens, padded on the right.
            text_mask: the same as ``[B, T]`` bool or integer, nonzero at real tokens. Padding on the left would leave a hole
                between the query tokens and the text.
            validate: check that ``text_mask`` is padded on the right only, which reads values back (a host sync).

        Raises:
            ValueError: an unknown ``task``, both ``text_lengths`` and ``text_mask``, a shape or dtype that doesn't fit, or
                ``validate`` found padding elsewhere than on the right.
        """
        if task not in QFORMER_TASKS:
            raise bad_argument("task", repr(task), f"one of {', '.join(QFORMER_TASKS)}")
        if text_lengths is not None and text_mask is not None:
            raise bad_argument("text_lengths, text_mask", "both", "at most one of the two")
        if text_mask is not None:
            mask = integers("text_mask", text_mask, 2) != 0
            if mask.shape[1] != num_text:
                raise bad_argument("text_mask", f"shape {tuple(mask.shape)}", f"[B, {num_text}]")
            if validate:
                first, stop = spans_of(mask, "text_mask", validate)
                padded = ((first > 0) & (stop > first)).nonzero()
                if len(padded):
                    got = f"padding on the left of batch {int(padded[0, 0])}"
                    raise bad_argument("text_mask", got, "padding on the right only")
            text_lengths = mask.sum(1, dtype=torch.int32)
        size = num_query_tokens + num_text
        device = device if text_lengths is None else text_lengths.device
        token = torch.arange(size, dtype=torch.int32, device=device)[None]
        end = torch.full_like(token[:, :1], size) if text_lengths is None else integers("text_lengths", text_lengths, 1)[:, None]
        end = end if text_lengths is None else end + num_query_tokens
        is_query, queries = token < num_query_tokens, torch.full_like(token, num_query_tokens)
        start = torch.zeros_like(token)
        if task == "itc":
            start = torch.where(is_query, start, queries)
        text_stop = torch.minimum(token + 1, end) if task == "itg" else end
        stop = text_stop if task == "itm" else torch.where(is_query, queries, text_stop)
        return cls(*(t.expand(end.shape[0], size) for t in (start, stop)))

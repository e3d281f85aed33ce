# SPDX-License-Identifier: Apache-2.0
"""Every image-text mask as one contiguous range of keys per query.

All constructors build their tensors on the device from torch ops that read no value back, so they trace in
``torch.compile(fullgraph=True)`` and can be captured in a CUDA graph. Only ``from_dense``, ``|`` and ``validate=True`` read
values, because they refuse a mask by its contents.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

from vlmkernels.ops._op import bad_argument

_WINDOW_RULES = ("window_outside", "image_outside")


@dataclass(frozen=True, eq=False)
class KeyRanges:
    """Query ``i`` of batch ``b`` attends to the keys ``start[b, i] <= j < stop[b, i]``; an empty range attends to nothing.

    A range is empty where ``stop <= start``. Ranges need not be monotone in ``i``. A batch of 1 serves every batch element;
    packed ``[T, H, D]`` tensors use ``[1, T]``. Any strides will do.

    Args:
        start: ``[B, Sq]`` or ``[1, Sq]`` int32.
        stop: like ``start``.

    Raises:
        ValueError: an argument isn't a 2-D int32 tensor, or their shapes or devices differ.
    """

    start: torch.Tensor
    stop: torch.Tensor

    def __post_init__(self) -> None:
        for name, value in (("start", self.start), ("stop", self.stop)):
            if not isinstance(value, torch.Tensor):
                raise bad_argument(name, f"a {type(value).__name__}", "a 2-D int32 tensor")
            if value.dtype != torch.int32 or value.dim() != 2:
                raise bad_argument(name, f"{value.dtype} of shape {tuple(value.shape)}", "torch.int32 of shape [B|1, Sq]")
        if self.start.shape != self.stop.shape:
            raise bad_argument("stop", f"shape {tuple(self.stop.shape)}", f"that of start, {tuple(self.start.shape)}")
        if self.start.device != self.stop.device:
            raise bad_argument("stop", f"a tensor on {self.stop.device}", f"one on the device of start, {self.start.device}")

    @property
    def batch(self) -> int:
        """The number of batch elements, or 1 where all share the same ranges."""
        return self.start.shape[0]

    @property
    def num_queries(self) -> int:
        return self.start.shape[1]

    @property
    def device(self) -> torch.device:
        return self.start.device

    # Self-attention

    @classmethod
    def full(cls, num_queries: int, num_keys: int | None = None, *, device: Any = None) -> "KeyRanges":
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
    ) -> "KeyRanges":
        """Query ``i`` sees the keys up to its own position ``i + offset``.

        Args:
            num_keys: defaults to ``num_queries``.
            offset: the key position of query 0: an int, or a ``[B]`` integer tensor on the device (the lengths of KV caches).
                Defaults to ``num_keys - num_queries``, so that the last query sees the last key (bottom-right alignment, as
                in FlashAttention).
            window: of the keys seen, only the last ``window``, the query's own included (Mistral's sliding window).
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
    ) -> "KeyRanges":
        """The first ``prefix`` keys see each other both ways and are seen by all; later queries are causal (PaliGemma, GIT).

        Args:
            prefix: an int, or a ``[B]`` integer tensor on the device.
            num_keys: as in ``causal``.
            offset: as in ``causal``.
            window: as in ``causal``; it never hides the prefix from a query of the prefix under ``"image_outside"``.
            window_rule: as in ``image_text``; PaliGemma-2's local layers use ``"image_outside"``.
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
    ) -> "KeyRanges":
        """The tokens of one image see each other both ways; everything else is causal (Gemma-3). Give one of:

        Args:
            token_types: ``[B, S]`` integer or bool; each contiguous run of ``image_type`` is one image. PaliGemma's
                ``token_type_ids`` mark the two-way prefix with 0: pass ``image_type=0``.
            image_ids: ``[B, S]`` integer; each contiguous run of one id >= 0 is one image, negative is text. Images that
                touch stay apart.
            window: the sliding window of local layers, in keys, the query's own included.
            window_rule: ``"window_outside"``: window AND (causal OR same image), Gemma-3: a long image loses its oldest
                tokens. ``"image_outside"``: (window AND causal) OR same image, PaliGemma-2: an image stays whole.
        """
        if (token_types is None) == (image_ids is None):
            raise bad_argument("token_types, image_ids", "both or none", "one of the two")
        if image_ids is not None:
            ids = _ints("image_ids", image_ids, 2)
        else:
            types = _ints("token_types", token_types, 2)
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
    ) -> "KeyRanges":
        """A text query has ``image_start = position`` and ``image_stop = 0``, which change nothing."""
        if window_rule not in _WINDOW_RULES:
            raise bad_argument("window_rule", repr(window_rule), f"one of {', '.join(_WINDOW_RULES)}")
        start = _window_start(position, window)
        if window_rule == "image_outside":
            start = torch.minimum(start, image_start)
        stop = torch.maximum(position + 1, image_stop).clamp(0, num_keys)
        return cls(*torch.broadcast_tensors(start, stop))

    @classmethod
    def packed(
        cls,
        cu_seqlens: torch.Tensor,
        total: int,
        *,
        cu_seqlens_k: torch.Tensor | None = None,
        causal: bool = False,
    ) -> "KeyRanges":
        """Sequences packed in one row see only themselves; ``[1, total]``, for ``[T, H, D]`` tensors.

        Args:
            cu_seqlens: ``[N + 1]`` integer, the cumulative lengths from 0. Empty sequences are allowed. Tokens past the last
                entry see nothing, so a buffer of fixed size may be partly filled.
            total: the number of query tokens ``T``.
            cu_seqlens_k: the same for the keys, where they are packed otherwise.
            causal: inside each sequence; bottom-right aligned where its queries and keys differ in number.
        """
        cu_q = _ints("cu_seqlens", cu_seqlens, 1)
        cu_k = cu_q if cu_seqlens_k is None else _ints("cu_seqlens_k", cu_seqlens_k, 1)
        if cu_q.shape[0] == 0:
            raise bad_argument("cu_seqlens", "shape (0,)", "[N + 1], the first entry 0")
        if cu_k.shape != cu_q.shape:
            raise bad_argument("cu_seqlens_k", f"shape {tuple(cu_k.shape)}", f"that of cu_seqlens, {tuple(cu_q.shape)}")
        token = torch.arange(total, dtype=torch.int32, device=cu_q.device)
        sequence = torch.searchsorted(cu_q[1:].contiguous(), token, right=True)
        after = (sequence + 1).clamp(max=cu_q.shape[0] - 1)
        start, stop = cu_k[sequence], cu_k[after]
        if causal:
            aligned = stop - cu_q[after] + token + 1
            stop = torch.minimum(stop, torch.maximum(start, aligned))
        return cls(start[None], stop[None])

    @classmethod
    def windows(cls, window: int | torch.Tensor, total: int, *, device: Any = None) -> "KeyRanges":
        """Tokens, already ordered by window, see only their own window (Qwen2.5-VL, Swin); ``[1, total]``.

        Args:
            window: the tokens per window (the last one may be shorter), or ``cu_window_seqlens`` ``[N + 1]``.
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
    ) -> "KeyRanges":
        """Every query sees the keys that aren't padding. Give one of:

        Args:
            lengths: ``[B]`` integer; the keys before it are real (padding on the right).
            mask: ``[B, Sk]`` bool or integer, nonzero at real keys, which must be one contiguous run (padding on the left, on
                the right or both).
            validate: check that ``mask`` has no holes. This reads values back (a host sync). Without it a mask with holes
                gives wrong ranges.

        Raises:
            ValueError: ``validate`` found a hole.
        """
        if (lengths is None) == (mask is None):
            raise bad_argument("lengths, mask", "both or none", "one of the two")
        if lengths is not None:
            stop = _ints("lengths", lengths, 1)[:, None]
            start = torch.zeros_like(stop)
        else:
            start, stop = _span(_ints("mask", mask, 2) != 0, "mask", validate)
        return cls(*(t.expand(-1, num_queries) for t in (start, stop)))

    # From and to a dense mask

    @classmethod
    def from_dense(cls, mask: torch.Tensor, *, validate: bool = True) -> "KeyRanges":
        """The ranges of a bool mask, True where a query sees a key.

        Args:
            mask: ``[Sq, Sk]``, ``[B, Sq, Sk]`` or ``[B, 1, Sq, Sk]`` bool.
            validate: refuse holes, which reads values back (a host sync). Without it a row with holes gives wrong ranges.

        Raises:
            ValueError: a row has a hole; the message names the first one.
        """
        if mask.dtype != torch.bool or mask.dim() not in (2, 3, 4) or (mask.dim() == 4 and mask.shape[1] != 1):
            wanted = "torch.bool of shape [Sq, Sk], [B, Sq, Sk] or [B, 1, Sq, Sk]"
            raise bad_argument("mask", f"{mask.dtype} of shape {tuple(mask.shape)}", wanted)
        mask = mask[:, 0] if mask.dim() == 4 else mask[None] if mask.dim() == 2 else mask
        start, stop = (t[..., 0] for t in _span(mask, "mask", validate))
        empty = stop <= start
        return cls(start.masked_fill(empty, 0), stop.masked_fill(empty, 0))

    def dense(self, num_keys: int) -> torch.Tensor:
        """The bool mask ``[B, Sq, num_keys]``, True where a query sees a key."""
        key = torch.arange(num_keys, dtype=torch.int32, device=self.device)
        return (key >= self.start[..., None]) & (key < self.stop[..., None])

    # Composition

    def __and__(self, other: "KeyRanges") -> "KeyRanges":
        """The keys that both see: always a range."""
        if not isinstance(other, KeyRanges):
            return NotImplemented
        self._check_composes(other)
        return KeyRanges(torch.maximum(self.start, other.start), torch.minimum(self.stop, other.stop))

    def _check_composes(self, other: "KeyRanges") -> None:
        batches = {self.batch, other.batch} - {1}
        if self.num_queries != other.num_queries or len(batches) > 1:
            raise bad_argument("other", f"ranges of shape {tuple(other.start.shape)}", f"a match for {tuple(self.start.shape)}")
        if self.device != other.device:
            raise bad_argument("other", f"ranges on {other.device}", f"ranges on {self.device}")


def _ints(name: str, value: Any, dim: int) -> torch.Tensor:
    """``value`` as an int32 tensor of ``dim`` dimensions."""
    if not isinstance(value, torch.Tensor):
        raise bad_argument(name, f"a {type(value).__name__}", f"a {dim}-D integer tensor")
    if value.dim() != dim or value.is_floating_point() or value.is_complex():
        raise bad_argument(name, f"{value.dtype} of shape {tuple(value.shape)}", f"a {dim}-D integer tensor")
    return value.to(torch.int32)


def _per_batch(name: str, value: int | torch.Tensor) -> int | torch.Tensor:
    """An int as it is; a tensor ``[B]`` as ``[B, 1]`` int32."""
    return _ints(name, value.reshape(1) if value.dim() == 0 else value, 1)[:, None] if isinstance(value, torch.Tensor) else value


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


def _span(mask: torch.Tensor, name: str, validate: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """First True and first + number of True along the last dimension of a bool ``mask``, int32, kept as a dimension of 1."""
    seen = mask.cumsum(-1, dtype=torch.int32)
    start = (seen == 0).sum(-1, keepdim=True, dtype=torch.int32)
    stop = start + mask.sum(-1, keepdim=True, dtype=torch.int32)
    if validate:
        key = torch.arange(mask.shape[-1], dtype=torch.int32, device=mask.device)
        hole = (mask != ((key >= start) & (key < stop))).any(-1)
        if hole.any():
            where = hole.nonzero()[0].tolist()
            row = f"batch {where[0]}" + (f", query {where[1]}" if len(where) > 1 else "")
            keys = mask[tuple(where)].nonzero()[:, 0].tolist()
            gap = next(k + 1 for k, after in zip(keys, keys[1:], strict=False) if after != k + 1)
            raise bad_argument(name, f"a hole at key {gap} of {row}, whose keys run from {keys[0]} to {keys[-1]}", "no holes")
    return start, stop


def _flatten(ranges: KeyRanges) -> tuple[list[torch.Tensor], None]:
    return [ranges.start, ranges.stop], None


def _flatten_with_keys(ranges: KeyRanges) -> tuple[list[tuple[Any, torch.Tensor]], None]:
    return [(_pytree.GetAttrKey("start"), ranges.start), (_pytree.GetAttrKey("stop"), ranges.stop)], None


def _unflatten(leaves: Any, _: None) -> KeyRanges:
    # tree_map may put anything in place of the tensors, so this skips the checks of __post_init__.
    ranges = object.__new__(KeyRanges)
    for name, leaf in zip(("start", "stop"), leaves, strict=True):
        object.__setattr__(ranges, name, leaf)
    return ranges


_pytree.register_pytree_node(
    KeyRanges,
    _flatten,
    _unflatten,
    serialized_type_name="vlmkernels.KeyRanges",
    flatten_with_keys_fn=_flatten_with_keys,
)

# SPDX-License-Identifier: Apache-2.0
"""What a KeyRanges is and what can be done with one, whatever mask it came from."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlmkernels.ops._op import bad_argument

if TYPE_CHECKING:
    from typing_extensions import Self


@dataclass(frozen=True, eq=False)
class Ranges:
    """The fields, checks and methods of ``KeyRanges``; the constructors of masks are in its subclasses."""

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
        """``Sq``."""
        return self.start.shape[1]

    @property
    def device(self) -> torch.device:
        """Where both tensors are."""
        return self.start.device

    # From and to a dense mask

    @classmethod
    def from_dense(cls, mask: torch.Tensor, *, validate: bool = True) -> "Self":
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
        start, stop = (t[..., 0] for t in spans_of(mask, "mask", validate))
        empty = stop <= start
        return cls(start.masked_fill(empty, 0), stop.masked_fill(empty, 0))

    def dense(self, num_keys: int) -> torch.Tensor:
        """The bool mask ``[B, Sq, num_keys]``, True where a query sees a key."""
        key = torch.arange(num_keys, dtype=torch.int32, device=self.device)
        return (key >= self.start[..., None]) & (key < self.stop[..., None])

    # Composition

    def __and__(self, other: "Self") -> "Self":
        """The keys that both see: always a range."""
        if not isinstance(other, Ranges):
            return NotImplemented
        self._check_composes(other)
        return type(self)(torch.maximum(self.start, other.start), torch.minimum(self.stop, other.stop))

    def __or__(self, other: "Self") -> "Self":
        """``union`` with its check, which reads values back."""
        if not isinstance(other, Ranges):
            return NotImplemented
        return self.union(other)

    def union(self, other: "Self", *, validate: bool = True) -> "Self":
        """The keys that either sees, where that is a range: the two overlap or touch, or one is empty.

        Args:
            validate: refuse other rows, which reads values back (a host sync). Without it, such a row also sees the keys
                between the two; pass False where the two are known to meet.

        Raises:
            ValueError: the union of a row has a hole; the message names the first one.
        """
        self._check_composes(other)
        left_empty, right_empty = self.stop <= self.start, other.stop <= other.start
        start, stop = torch.minimum(self.start, other.start), torch.maximum(self.stop, other.stop)
        if validate:
            apart = torch.maximum(self.start, other.start) > torch.minimum(self.stop, other.stop)
            apart = apart & ~left_empty & ~right_empty
            if apart.any():
                b, i = apart.nonzero()[0].tolist()
                left, right = (tuple(t.expand_as(apart)[b, i].item() for t in (r.start, r.stop)) for r in (self, other))
                raise bad_argument(
                    "other", f"keys {right} for keys {left} of batch {b}, query {i}", "ranges that overlap or touch"
                )
        start = torch.where(left_empty, other.start, torch.where(right_empty, self.start, start))
        return type(self)(start, torch.where(left_empty, other.stop, torch.where(right_empty, self.stop, stop)))

    def __getitem__(self, queries: slice) -> "Self":
        """The ranges of a slice of the queries, as a view: ``ranges[a:b]`` goes with ``q[:, a:b]`` and all keys."""
        if not isinstance(queries, slice):
            raise bad_argument("queries", repr(queries), "a slice")
        return type(self)(self.start[:, queries], self.stop[:, queries])

    def key_chunk(self, begin: int, end: int) -> "Self":
        """The ranges over a chunk of the keys, ``k[:, begin:end]``, counted from its first key. ``end`` is exclusive."""
        return type(self)(*((t - begin).clamp(0, end - begin) for t in (self.start, self.stop)))

    def expand(self, batch: int) -> "Self":
        """Shared ranges ``[1, Sq]`` as ``[batch, Sq]``, without a copy.

        Raises:
            ValueError: the ranges have another batch than 1 or ``batch``.
        """
        if self.batch not in (1, batch):
            raise bad_argument("batch", batch, f"{self.batch}, the batch of these ranges")
        return type(self)(self.start.expand(batch, -1), self.stop.expand(batch, -1))

    def repeat(self, times: int) -> "Self":
        """Each batch element ``times`` times in a row (beams): ``[B * times, Sq]``."""
        return type(self)(*(t.repeat_interleave(times, dim=0) for t in (self.start, self.stop)))

    def to(self, device: Any, *, non_blocking: bool = False) -> "Self":
        """The same ranges on another device."""
        return type(self)(*(t.to(device, non_blocking=non_blocking) for t in (self.start, self.stop)))

    def _check_composes(self, other: "Self") -> None:
        batches = {self.batch, other.batch} - {1}
        if self.num_queries != other.num_queries or len(batches) > 1:
            raise bad_argument("other", f"ranges of shape {tuple(other.start.shape)}", f"a match for {tuple(self.start.shape)}")
        if self.device != other.device:
            raise bad_argument("other", f"ranges on {other.device}", f"ranges on {self.device}")


def integers(name: str, value: Any, dim: int) -> torch.Tensor:
    """``value`` as an int32 tensor of ``dim`` dimensions."""
    if not isinstance(value, torch.Tensor):
        raise bad_argument(name, f"a {type(value).__name__}", f"a {dim}-D integer tensor")
    if value.dim() != dim or value.is_floating_point() or value.is_complex():
        raise bad_argument(name, f"{value.dtype} of shape {tuple(value.shape)}", f"a {dim}-D integer tensor")
    return value.to(torch.int32)


def spans_of(mask: torch.Tensor, name: str, validate: bool) -> tuple[torch.Tensor, torch.Tensor]:
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

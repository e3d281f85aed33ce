# SPDX-License-Identifier: Apache-2.0
"""A mask of key ranges in the shape of a tensor, for code that hands masks on as tensors without looking inside.

Models of transformers take a mask for ready-made where it is a tensor of four dimensions, and some slice it or move it to
another device on the way to their layers.
"""

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.utils import _pytree

from vlmkernels.masks import KeyRanges
from vlmkernels.ops._op import bad_argument

_log = logging.getLogger(__name__)
_made_dense: set[str] = set()


class RangesMask(torch.Tensor):
    """``KeyRanges`` that pass for a bool tensor ``[B, 1, Sq, Sk]``, True where a query sees a key, and have no such storage.

    It stays one under ``detach``, ``clone``, ``to(device)`` and slices. Anything else that would read its elements, as ``==``,
    ``to(dtype)``, an index or a logical operation, gets the dense mask, which is made for that operation (and logged, once for
    each kind of operation). Adding it to something raises a RuntimeError, as a bool mask is not additive. So does writing to
    it, as what was written would be lost, and what reaches around torch's operations (``tolist``, ``numpy``).

    Args:
        start, stop: the fields of the ranges that it stands for; a batch of 1 serves all of ``batch``. What is expanded over the
            queries is laid out here, once for all layers: kernels would copy it, and have no plan for such a call.
        batch: ``B``.
        num_keys: ``Sk``.
        shared: whether all queries see the same keys; what is expanded over them is.

    Raises:
        ValueError: ``ranges`` have another batch.
    """

    start: torch.Tensor
    stop: torch.Tensor
    shared: bool
    # Operations give plain tensors, or decide for themselves below.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, start: torch.Tensor, stop: torch.Tensor, batch: int, num_keys: int, shared: bool = False) -> "RangesMask":
        if start.shape[0] not in (1, batch):
            raise bad_argument("batch", batch, f"{start.shape[0]}, the batch of the ranges")
        shape = (batch, 1, start.shape[1], num_keys)
        mask = torch.Tensor._make_wrapper_subclass(cls, shape, dtype=torch.bool, device=start.device)
        mask.shared = shared or start.stride(1) == stop.stride(1) == 0
        mask.start, mask.stop = start.contiguous(), stop.contiguous()
        return mask

    @classmethod
    def of(cls, ranges: KeyRanges, batch: int, num_keys: int, shared: bool = False) -> "RangesMask":
        """The mask of ``ranges``."""
        return cls(ranges.start, ranges.stop, batch, num_keys, shared)

    @property
    def ranges(self) -> KeyRanges:
        """The ranges, of batch ``B`` or 1."""
        return KeyRanges(self.start, self.stop)

    def dense(self) -> torch.Tensor:
        """The tensor that it stands for, bool ``[B, 1, Sq, Sk]``, contiguous."""
        return self.ranges.dense(self.shape[3])[:, None].expand(self.shape[0], -1, -1, -1).contiguous()

    def additive(self, dtype: torch.dtype) -> torch.Tensor:
        """The same as eager attention adds it: 0, or the lowest number of ``dtype``."""
        dense = self.dense()
        return torch.zeros(dense.shape, dtype=dtype, device=dense.device).masked_fill_(~dense, torch.finfo(dtype).min)

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"RangesMask(shape={tuple(self.shape)}, device={self.device})"

    def __setitem__(self, index: Any, value: Any) -> None:
        raise _not_writable("__setitem__")

    def __tensor_flatten__(self) -> tuple[list[str], bool]:
        return ["start", "stop"], self.shared

    @classmethod
    def __tensor_unflatten__(
        cls, inner: dict[str, torch.Tensor], shared: bool, size: Sequence[int], strides: Any
    ) -> "RangesMask":
        return cls(inner["start"], inner["stop"], size[0], size[3], shared)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        kwargs = kwargs or {}
        for place, argument in enumerate(func._schema.arguments):
            value = args[place] if place < len(args) else kwargs.get(argument.name)
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, RangesMask):
                raise _not_writable(str(func))
        if func in _ADDS:
            raise RuntimeError(
                f"{func} would add a bool mask to something, as layers do that expect attn_implementation='eager' and can't have "
                "another; give these their own: {'': 'eager', 'vision_config': 'vlmkernels'}"
            )
        if func in _KEEP and isinstance(args[0], RangesMask):
            kept = _KEEP[func](*args, **kwargs)
            if kept is not None:
                return kept
        if str(func) not in _made_dense:
            _made_dense.add(str(func))
            shapes = [tuple(x.shape) for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, RangesMask)]
            _log.warning("%s made a dense mask of the key ranges of %s", func, shapes[0])
        args, kwargs = _pytree.tree_map_only(RangesMask, RangesMask.dense, (args, kwargs))
        return func(*args, **kwargs)


def fitting(mask: RangesMask | None, queries: int, keys: int) -> KeyRanges | None:
    """The ranges of ``mask``, which must be for this many keys; ranges that all queries share serve any number of queries.

    Raises:
        ValueError: it is for other sizes.
    """
    if mask is None:
        return None
    ranges = KeyRanges(mask.start, mask.stop)  # not mask.ranges, which torch.compile can't follow
    if mask.shape[2] != queries and mask.shared:
        # The Q-Former of BLIP-2 makes the mask of its image for all its tokens, and only its query tokens see the image.
        ranges = KeyRanges(*(bounds[:, :1].expand(-1, queries) for bounds in (mask.start, mask.stop)))
    if ranges.num_queries != queries or mask.shape[3] != keys:
        raise bad_argument("attention_mask", f"for {mask.shape[2]} queries, {mask.shape[3]} keys", f"for {queries} and {keys}")
    return ranges


def _not_writable(operation: str) -> RuntimeError:
    return RuntimeError(f"{operation} would write to a mask of key ranges, which has no elements; mask.dense() gives a tensor")


def _same(mask: RangesMask, **_: Any) -> RangesMask:
    return RangesMask.of(mask.ranges, mask.shape[0], mask.shape[3], mask.shared)


def _to(mask: RangesMask, *, dtype: Any = None, device: Any = None, non_blocking: bool = False, **_: Any) -> RangesMask | None:
    if dtype not in (None, torch.bool):
        return None
    ranges = mask.ranges if device is None else mask.ranges.to(device, non_blocking=non_blocking)
    return RangesMask.of(ranges, mask.shape[0], mask.shape[3], mask.shared)


def _slice(mask: RangesMask, dim: int = 0, start: Any = None, end: Any = None, step: int = 1) -> RangesMask | None:
    dim = dim % 4
    begin, end, step = slice(start, end, step).indices(mask.shape[dim])
    batch, num_keys, ranges = mask.shape[0], mask.shape[3], mask.ranges
    length = max(0, end - begin)
    if step != 1 or length == 0 or dim == 1:
        return _same(mask) if dim == 1 and length == 1 else None
    if dim == 0:
        batch = length
        ranges = ranges if ranges.batch == 1 else KeyRanges(ranges.start[begin:end], ranges.stop[begin:end])
    elif dim == 2:
        ranges = ranges[begin:end]
    elif (begin, end) != (0, num_keys):
        ranges, num_keys = ranges.key_chunk(begin, end), length
    return RangesMask.of(ranges, batch, num_keys, mask.shared)


_aten = torch.ops.aten
#: RuntimeErrors, as torch takes a TypeError in an operator to mean that the other operand might know how.
_ADDS = {_aten.add.Tensor, _aten.add_.Tensor, _aten.add.Scalar, _aten.sub.Tensor, _aten.sub_.Tensor}
#: What gives a mask of key ranges again, or None where it can't.
_KEEP: dict[Any, Callable[..., RangesMask | None]] = {
    _aten.detach.default: _same,
    _aten.alias.default: _same,
    _aten.clone.default: _same,
    _aten._to_copy.default: _to,
    _aten.slice.Tensor: _slice,
}

# SPDX-License-Identifier: Apache-2.0
"""Every image-text mask as one contiguous range of keys per query.

All constructors build their tensors on the device from torch ops that read no value back, so they trace in
``torch.compile(fullgraph=True)`` and can be captured in a CUDA graph. Only ``from_dense``, ``union`` (``|``) and
``validate=True`` read values, because they refuse a mask by its contents.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch.utils import _pytree

from vlmkernels.masks._cross_attention import CrossAttentionMasks, compact_keys, even_spans
from vlmkernels.masks._self_attention import SelfAttentionMasks

__all__ = ["KeyRanges", "compact_keys", "even_spans"]


@dataclass(frozen=True, eq=False)
class KeyRanges(SelfAttentionMasks, CrossAttentionMasks):
    """Query ``i`` of batch ``b`` attends to the keys ``start[b, i] <= j < stop[b, i]``; an empty range attends to nothing.

    A range is empty where ``stop <= start``. Ranges need not be monotone in ``i``. A batch of 1 serves every batch element;
    packed ``[T, H, D]`` tensors use ``[1, T]``. Any strides will do. It is a pytree of its two tensors.

    Args:
        start: ``[B, Sq]`` or ``[1, Sq]`` int32.
        stop: like ``start``.

    Raises:
        ValueError: an argument isn't a 2-D int32 tensor, or their shapes or devices differ.
    """


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

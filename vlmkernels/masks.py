# SPDX-License-Identifier: Apache-2.0
"""Every image-text mask as one contiguous range of keys per query."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class KeyRanges:
    """Query ``i`` of batch ``b`` attends to the keys ``start[b, i] <= j < stop[b, i]``; an empty range attends to nothing.

    Args:
        start: ``[B, Sq]`` or ``[1, Sq]`` int32.
        stop: like ``start``.
    """

    start: torch.Tensor
    stop: torch.Tensor

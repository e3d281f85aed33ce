# SPDX-License-Identifier: Apache-2.0
"""Dense masks that a model made by itself, read for the run of keys that each query sees."""

import torch
from torch import Tensor

from vlmkernels.integrations._once import in_a_graph, once
from vlmkernels.masks import KeyRanges


def one_run(seen: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The first key, the last + 1, and whether there is a gap between, of bool ``seen [..., Sk]``: each ``[...]``, int32."""
    size = seen.shape[-1]
    key = torch.arange(size, dtype=torch.int32, device=seen.device)
    start, stop = torch.where(seen, key, size).amin(-1), torch.where(seen, key + 1, 0).amax(-1)
    return start, stop, stop - start > seen.sum(-1)


def ranges_of(mask: Tensor, queries: int, keys: int, *, of_torch: bool = False) -> KeyRanges | str:
    """The ranges of a bool or additive mask, or why it has none. Reads the mask once, however many layers get it.

    Args:
        of_torch: it is one as ``nn.MultiheadAttention`` takes, ``[Sq, Sk]``, where True hides.
    """
    shape = (1, 1, *mask.shape) if of_torch else tuple(mask.shape)
    if len(shape) != 4 or shape[1] != 1 or shape[2] not in (1, queries) or shape[3] != keys:
        return f"the shape of its mask is {shape}, not [B, 1, {queries}, {keys}]"
    if in_a_graph(mask):
        return "the values of its mask can't be read while a graph is traced or captured"
    found: KeyRanges | str = once(mask, (queries, of_torch), lambda: _read(mask, queries, of_torch))
    return found


def _read(mask: Tensor, queries: int, of_torch: bool) -> KeyRanges | str:
    if of_torch:
        mask = (~mask if mask.dtype == torch.bool else mask)[None, None]
    seen = mask if mask.dtype == torch.bool else mask == 0
    if mask.dtype != torch.bool and not bool((seen | (mask <= torch.finfo(mask.dtype).min / 2)).all()):
        return "its mask adds numbers other than 0 and -inf"
    start, stop, hole = one_run(seen[:, 0])
    if bool(hole.any()):
        row, query = hole.nonzero()[0].tolist()
        return f"its mask has a hole for batch {row}, query {query}"
    return KeyRanges(*(bounds.expand(-1, queries).contiguous() for bounds in (start, stop)))

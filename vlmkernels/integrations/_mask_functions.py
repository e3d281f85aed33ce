# SPDX-License-Identifier: Apache-2.0
"""transformers' own mask functions as ranges of keys, without evaluating them for every query and key.

A mask function is a closure of ``transformers.masking_utils``, known by its name; what it holds (a window, the images' ids,
other functions) says which run of keys a query sees. Whatever is not known here has to be evaluated, which took half of the time
of a tiny Gemma-3 of six layers on a CPU (transformers 5.17): the host's share of it, as on a GPU.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from vlmkernels.integrations._read_masks import one_run

Tensor = torch.Tensor
#: Behind the last key of any sequence, and still far from overflowing.
FAR = 1 << 30


class Runs(NamedTuple):
    """For each query, ``[B|1, Sq]``, the run of keys from ``start`` to before ``stop``, and whether that is all that it sees."""

    start: Tensor
    stop: Tensor
    exact: Tensor  # one bool


def runs_of(function: Callable[..., Any], positions: Tensor) -> Runs | None:
    """The runs of ``function`` for queries at ``positions [1, Sq]``, int64; None if it is not known."""
    make = _MAKERS.get(getattr(function, "__qualname__", ""))
    if make is None or function.__module__ != "transformers.masking_utils":
        return None
    return make(_held(function), positions)


def _held(function: Any) -> dict[str, Any]:
    """What a closure holds, by name."""
    cells = function.__closure__ or ()
    return {name: cell.cell_contents for name, cell in zip(function.__code__.co_freevars, cells, strict=True)}


def _runs(positions: Tensor, start: Tensor | int, stop: Tensor | int) -> Runs:
    first, last = (torch.as_tensor(x, device=positions.device).expand_as(positions) for x in (start, stop))
    return Runs(first, last, torch.ones((), dtype=torch.bool, device=positions.device))


def _all(masks: tuple[Callable[..., Any], ...], positions: Tensor) -> Runs | None:
    found = _runs(positions, 0, FAR)
    for mask in masks:
        one = runs_of(mask, positions)
        if one is None:
            return None
        found = Runs(torch.maximum(found.start, one.start), torch.minimum(found.stop, one.stop), found.exact & one.exact)
    return found


def _any(masks: tuple[Callable[..., Any], ...], positions: Tensor) -> Runs | None:
    """The union, which is a run where the runs meet."""
    found = _runs(positions, 0, 0)
    for mask in masks:
        one = runs_of(mask, positions)
        if one is None:
            return None
        has, gets = found.start < found.stop, one.start < one.stop
        meet = torch.maximum(found.start, one.start) <= torch.minimum(found.stop, one.stop)
        start = torch.where(has & gets, torch.minimum(found.start, one.start), torch.where(has, found.start, one.start))
        stop = torch.where(has & gets, torch.maximum(found.stop, one.stop), torch.where(has, found.stop, one.stop))
        found = Runs(start, stop, found.exact & one.exact & (meet | ~has | ~gets).all())
    return found


def _same_id(ids: Tensor, positions: Tensor, none: bool) -> Runs:
    """The neighbours of a query with its id, ``ids [B, S]``; with ``none`` a query with a negative id sees nobody.

    Exact where each id is one run, which increasing ids are; other ids may be, and are evaluated.
    """
    size = ids.shape[1]
    key = torch.arange(size, device=ids.device)
    first = torch.ones_like(ids, dtype=torch.bool)
    first[:, 1:] = ids[:, 1:] != ids[:, :-1]
    begins = torch.where(first, key, 0).cummax(1).values
    last = torch.ones_like(first)
    last[:, :-1] = first[:, 1:]
    ends = torch.where(last, key + 1, size).flip(1).cummin(1).values.flip(1)
    before = torch.full_like(ids, torch.iinfo(ids.dtype).min)
    before[:, 1:] = ids.cummax(1).values[:, :-1]
    counted = first & (ids >= 0) if none else first
    exact = (ids > before)[counted].all() & (positions < size).all()
    at = positions.clamp(max=size - 1).expand(len(ids), -1)
    start, stop = begins.gather(1, at), ends.gather(1, at)
    return Runs(start, torch.where(ids.gather(1, at) < 0, start, stop) if none else stop, exact)


def _padding(mask: Tensor, positions: Tensor) -> Runs:
    start, stop, gap = one_run(mask.bool()[:, None])
    return Runs(start.expand(-1, positions.shape[1]), stop.expand(-1, positions.shape[1]), ~gap.any())


_MAKERS: dict[str, Callable[[dict[str, Any], Tensor], Runs | None]] = {
    "causal_mask_function": lambda held, q: _runs(q, 0, q + 1),
    "bidirectional_mask_function": lambda held, q: _runs(q, 0, FAR),
    "and_masks.<locals>.and_mask": lambda held, q: _all(held["mask_functions"], q),
    "or_masks.<locals>.or_mask": lambda held, q: _any(held["mask_functions"], q),
    "sliding_window_overlay.<locals>.inner_mask": lambda held, q: _runs(q, q - held["sliding_window"] + 1, FAR),
    "sliding_window_bidirectional_overlay.<locals>.inner_mask": lambda held, q: _runs(
        q, q - held["sliding_window"], q + held["sliding_window"] + 1
    ),
    "blockwise_overlay.<locals>.inner_mask": lambda held, q: _same_id(held["block_sequence_ids"], q, True),
    "packed_sequence_mask_function.<locals>.inner_mask": lambda held, q: _same_id(held["packed_sequence_mask"], q, False),
    "padding_mask_function.<locals>.inner_mask": lambda held, q: _padding(held["padding_mask"], q),
}

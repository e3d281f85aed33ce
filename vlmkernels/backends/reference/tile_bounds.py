# SPDX-License-Identifier: Apache-2.0
"""Tile bounds in plain torch: reductions over rows cut into tiles, and over a table of all pairs of tiles."""

import torch
import torch.nn.functional as F

TILE = 64


def tile_bounds(start: torch.Tensor, stop: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    s, e = start.clamp(min=0), stop.clamp(max=num_keys)
    empty = s >= e
    # As [num_keys, 0) an empty range widens no hull and empties the intersection.
    s, e = s.masked_fill(empty, num_keys), e.masked_fill(empty, 0)
    lo, hi = _rows(s, num_keys).amin(-1), _rows(e, 0).amax(-1)
    full_lo, full_hi = _rows(s, 0).amax(-1), _rows(e, num_keys).amin(-1)
    nothing = full_lo >= full_hi
    full_lo, full_hi = full_lo.masked_fill(nothing, num_keys), full_hi.masked_fill(nothing, 0)
    q_bounds = torch.stack((lo, hi, full_lo, full_hi), -1)

    begin = torch.arange(0, num_keys, TILE, device=start.device)
    end = (begin + TILE).clamp(max=num_keys)
    lo, hi, full_lo, full_hi = q_bounds.unsqueeze(1).unbind(-1)  # each [B, 1, M], against [N, 1]
    spans = _span((lo < end[:, None]) & (hi > begin[:, None]))
    runs = _longest_run((full_lo <= begin[:, None]) & (full_hi >= end[:, None]))
    return q_bounds, torch.stack((*spans, *runs), -1).int()


def _rows(x: torch.Tensor, fill: int) -> torch.Tensor:
    """``[B, Sq]`` -> ``[B, M, 64]``, the rows past the end filled."""
    num_tiles = -(-x.shape[1] // TILE)
    return F.pad(x, (0, num_tiles * TILE - x.shape[1]), value=fill).unflatten(1, (num_tiles, TILE))


def _span(flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The first true place of the last dimension and the place after the last; its length and 0 where there is none."""
    m = flags.shape[-1]
    if m == 0:
        none = flags.new_zeros(flags.shape[:-1], dtype=torch.int64)
        return none, none
    place = torch.arange(m, device=flags.device)
    return torch.where(flags, place, m).amin(-1), torch.where(flags, place + 1, 0).amax(-1)


def _longest_run(flags: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The longest run of true places in the last dimension, the first on ties, as the place of its first and after its last."""
    m = flags.shape[-1]
    if m == 0:
        return _span(flags)
    place = torch.arange(m, device=flags.device)
    since = torch.where(flags, 0, place + 1).cummax(-1).values  # where the run that holds this place began
    length = place + 1 - since
    # The first place of the greatest length is the last of the first longest run.
    last = (length * m + (m - 1 - place)).argmax(-1, keepdim=True)
    longest = length.gather(-1, last).squeeze(-1)
    last = last.squeeze(-1) + 1
    return torch.where(longest > 0, last - longest, m), torch.where(longest > 0, last, 0)

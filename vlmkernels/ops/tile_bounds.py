# SPDX-License-Identifier: Apache-2.0
"""What attention must know of the key ranges before it starts: per tile of 64, what to skip, what to mask, what to take whole."""

from typing import Any, NamedTuple

import torch

from vlmkernels.masks import KeyRanges
from vlmkernels.ops._op import Op, bad_argument, forced_backend

#: Queries and keys per tile. A kernel with larger tiles combines neighbours.
TILE = 64
#: Tile ends are kept in int32.
MAX_LENGTH = 2**31 - 1 - TILE


class TileBounds(NamedTuple):
    """Bounds of ``M = ceil(Sq / 64)`` query tiles in keys, and of ``N = ceil(num_keys / 64)`` key tiles in query tiles.

    ``q_bounds``: int32 ``[B, M, 4]`` of ``(lo, hi, full_lo, full_hi)``. ``[lo, hi)`` is the hull of the non-empty ranges of the
    tile's rows (``num_keys, 0`` where all are empty); ``[full_lo, full_hi)`` is what every row sees (``num_keys, 0``: nothing).

    ``k_bounds``: int32 ``[B, N, 4]`` of ``(first, last, full_first, full_last)``. ``[first, last)`` spans the query tiles whose
    hull meets the key tile (``M, 0``: none). ``[full_first, full_last)`` is the longest run of query tiles all of whose rows see
    the whole key tile, the first such run on ties (``M, 0``: none).
    """

    q_bounds: torch.Tensor
    k_bounds: torch.Tensor


def tile_bounds(ranges: KeyRanges, num_keys: int, *, backend: str | None = None) -> TileBounds:
    """Bounds per tile of 64 queries and per tile of 64 keys, ``O(Sq + M N)`` work and ``O(M + N)`` memory.

    The ranges are first cut to ``[0, num_keys)``; a range with no key left is empty. Rows and keys past the end of the last tile
    don't count. A key tile outside ``[lo, hi)`` of a query tile is skipped, one inside ``[full_lo, full_hi)`` needs no mask; the
    other way round, the backward pass of a key tile visits the query tiles of ``[first, last)``. No gradients.

    Args:
        ranges: start and stop ``[B, Sq]`` (or ``[1, Sq]``: the result then has ``B = 1``), any strides.
        num_keys: the number of keys.
        backend: the backend that must run; by default the first that can.

    Returns:
        ``TileBounds``, contiguous int32 ``[B, M, 4]`` and ``[B, N, 4]``.

    Raises:
        ValueError: ``num_keys`` is negative, or a length is over ``2**31 - 65``.
        BackendError: the forced backend can't run these inputs.
    """
    return TileBounds(*_op.call((num_keys, forced_backend(backend)), (ranges.start, ranges.stop), _unplanned))


def _unplanned(start: torch.Tensor, stop: torch.Tensor, num_keys: int, name: str) -> Any:
    if not 0 <= num_keys <= MAX_LENGTH:
        raise bad_argument("num_keys", num_keys, f"0 <= num_keys <= {MAX_LENGTH}")
    if start.shape[1] > MAX_LENGTH:
        raise bad_argument("ranges.start", f"{start.shape[1]} queries", f"at most {MAX_LENGTH}")
    return _op(start, stop, num_keys, name)


def _fake(start: torch.Tensor, stop: torch.Tensor, num_keys: int, backend: str) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_queries = start.shape
    q_bounds = start.new_empty(batch, (num_queries + TILE - 1) // TILE, 4)
    return q_bounds, start.new_empty(batch, (num_keys + TILE - 1) // TILE, 4)


_op = Op("tile_bounds", "tile_bounds(Tensor start, Tensor stop, SymInt num_keys, str backend) -> (Tensor, Tensor)", _fake)

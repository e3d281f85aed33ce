# SPDX-License-Identifier: Apache-2.0
"""Tile bounds against what the dense mask says, tile by tile."""

import pytest
import torch

from vlmkernels import KeyRanges
from vlmkernels.ops import tile_bounds as op
from vlmkernels.ops.tile_bounds import TILE, TileBounds, tile_bounds


def ends(flags: torch.Tensor) -> tuple[int, int] | None:
    """The first true place and the place after the last one."""
    places = flags.nonzero().flatten()
    return (int(places[0]), int(places[-1]) + 1) if len(places) else None


def from_dense(ranges: KeyRanges, num_keys: int) -> TileBounds:
    """Both results by looking at each tile of the dense mask, on the CPU."""
    start, stop = ranges.start.cpu(), ranges.stop.cpu()
    key = torch.arange(num_keys)
    mask = (key >= start[..., None]) & (key < stop[..., None])  # [B, Sq, Sk]
    batch, num_queries = start.shape
    q_tiles = range(0, num_queries, TILE)
    q_bounds = torch.empty(batch, len(q_tiles), 4, dtype=torch.int32)
    k_bounds = torch.empty(batch, -(-num_keys // TILE), 4, dtype=torch.int32)
    for b in range(batch):
        hulls = []
        for t, i in enumerate(q_tiles):
            rows = mask[b, i : i + TILE]
            hulls.append(ends(rows.any(0)))
            q_bounds[b, t] = torch.tensor((hulls[-1] or (num_keys, 0)) + (ends(rows.all(0)) or (num_keys, 0)))
        for n, j in enumerate(range(0, num_keys, TILE)):
            keys = range(j, min(j + TILE, num_keys))
            meets = torch.tensor([hull is not None and hull[0] < keys.stop and hull[1] > keys.start for hull in hulls])
            full = [bool(mask[b, i : i + TILE, j : keys.stop].all()) for i in q_tiles]
            runs = [(f, l) for f in range(len(full)) for l in range(f + 1, len(full) + 1) if all(full[f:l])]
            longest = max(runs, key=lambda run: (run[1] - run[0], -run[0]), default=(len(full), 0))
            k_bounds[b, n] = torch.tensor((ends(meets) or (len(full), 0)) + longest)
    return TileBounds(q_bounds, k_bounds)


def check(ranges: KeyRanges, num_keys: int, backend: str) -> TileBounds:
    got, wanted = tile_bounds(ranges, num_keys, backend=backend), from_dense(ranges, num_keys)
    for name in TileBounds._fields:
        g, w = getattr(got, name), getattr(wanted, name)
        assert g.dtype == torch.int32 and g.shape == w.shape and g.is_contiguous(), name
        assert torch.equal(g.cpu(), w), f"{name}: {(g.cpu() != w).nonzero().tolist()[:5]}"
    return got


def make(kind: str, batch: int, num_queries: int, num_keys: int, device: torch.device) -> KeyRanges:
    i = torch.arange(num_queries).expand(batch, num_queries)
    if kind == "full":
        start, stop = torch.zeros_like(i), torch.full_like(i, num_keys)
    elif kind == "causal":
        start, stop = torch.zeros_like(i), i + 1 + (num_keys - num_queries)
    elif kind == "window":
        start, stop = i - 100, i + 101
    elif kind == "segments":  # of 1 to 150 tokens, others in each batch
        segment = (torch.rand(batch, num_queries) < 1 / 75).cumsum(1)
        start = (segment[:, None] < segment[:, :, None]).sum(-1)
        stop = (segment[:, None] <= segment[:, :, None]).sum(-1)
    elif kind == "padding":
        start, stop = torch.zeros_like(i), torch.randint(0, num_keys + 1, (batch, 1)).expand_as(i)
    elif kind == "random":
        start, stop = torch.randint(-50, num_keys + 50, (2, batch, num_queries))
    elif kind == "blocks":  # whole tiles that see nearly everything, or nothing: many runs
        tiles = torch.rand(batch, -(-num_queries // TILE)) < 0.7
        sees = tiles.repeat_interleave(TILE, 1)[:, :num_queries]
        start, stop = torch.randint(0, 70, i.shape), torch.where(sees, num_keys - torch.randint(0, 3, i.shape), 0)
    elif kind == "empty":
        start, stop = torch.full_like(i, 5), torch.full_like(i, 5)
    else:  # far outside the keys
        start, stop = torch.randint(-(2**31), 2**31 - 1, (2, batch, num_queries))
    return KeyRanges(start.int().to(device), stop.int().to(device))


KINDS = ("full", "causal", "window", "segments", "padding", "random", "blocks", "empty", "far")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("batch, num_queries, num_keys", [(1, 64, 64), (3, 200, 333), (1, 700, 65)])
@pytest.mark.backends("tile_bounds")
def test_tile_bounds(kind: str, batch: int, num_queries: int, num_keys: int, backend: str, device: torch.device) -> None:
    check(make(kind, batch, num_queries, num_keys, device), num_keys, backend)


@pytest.mark.parametrize("kind", ["blocks", "segments"])
@pytest.mark.backends("tile_bounds")
def test_tile_bounds_of_many_query_tiles(kind: str, backend: str, device: torch.device) -> None:
    """More query tiles than one iteration of a kernel takes, with runs that cross from one to the next."""
    num_queries = 64 * 131 + 7
    ranges = make(kind, 1, num_queries, 130 if kind == "blocks" else num_queries, device)
    if kind == "blocks":
        ranges.start[:, 64 * 20 : 64 * 129] = 0
        ranges.stop[:, 64 * 20 : 64 * 129] = 130
        got = check(ranges, 130, backend)
        assert got.k_bounds[0, 0, 2] <= 20 and got.k_bounds[0, 0, 3] >= 129
    else:
        ranges = KeyRanges(ranges.start // 64, ranges.stop // 64)
        check(ranges, 131, backend)


@pytest.mark.backends("tile_bounds")
def test_first_of_two_longest_runs(backend: str, device: torch.device) -> None:
    stop = torch.zeros(1, 64 * 200, dtype=torch.int32, device=device)
    for first in (3, 100, 160):
        stop[:, 64 * first : 64 * (first + 33)] = 64
    stop[:, -64:] = 64
    bounds = check(KeyRanges(torch.zeros_like(stop), stop), 64, backend)
    assert bounds.k_bounds.tolist() == [[[3, 200, 3, 36]]]


@pytest.mark.parametrize("batch, num_queries, num_keys", [(0, 70, 70), (2, 0, 70), (2, 70, 0), (1, 0, 0)])
@pytest.mark.backends("tile_bounds")
def test_nothing_to_do(batch: int, num_queries: int, num_keys: int, backend: str, device: torch.device) -> None:
    check(make("full", batch, num_queries, num_keys, device), num_keys, backend)


@pytest.mark.backends("tile_bounds")
def test_strides(backend: str, device: torch.device) -> None:
    """Transposed, every other element, and one row for all batches: read where they lie, and not changed."""
    ranges = make("random", 3, 150, 200, device)
    start, stop = ranges.start.t().contiguous().t(), torch.stack((ranges.stop, -ranges.stop), -1)[..., 0]
    check(KeyRanges(start, stop), 200, backend)
    assert torch.equal(start, ranges.start) and torch.equal(stop, ranges.stop)
    check(KeyRanges(ranges.start[:1].expand(3, -1), ranges.stop), 200, backend)


def test_refusals(device: torch.device) -> None:
    ranges = make("full", 2, 10, 10, device)
    with pytest.raises(ValueError, match=r"num_keys: got -1, wanted 0 <= num_keys <= 2147483583"):
        tile_bounds(ranges, -1)
    with pytest.raises(ValueError, match=r"num_keys: got 2147483584, wanted"):
        tile_bounds(ranges, 2**31 - 64)
    long = ranges.start[:1, :1].expand(1, 2**31)
    with pytest.raises(ValueError, match=r"ranges.start: got 2147483648 queries, wanted at most 2147483583"):
        tile_bounds(KeyRanges(long, long), 10)


def test_opcheck(device: torch.device) -> None:
    ranges = make("random", 2, 100, 130, device)
    torch.library.opcheck(torch.ops.vlmkernels.tile_bounds.default, (ranges.start, ranges.stop, 130, ""))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiles_with_any_length(device: torch.device) -> None:
    """One graph, in which the number of queries and keys may change."""

    def function(start: torch.Tensor, stop: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        bounds = op.tile_bounds(KeyRanges(start, stop), keys.shape[0], backend="reference")
        return bounds.q_bounds.sum() - bounds.k_bounds.sum()

    compiled = torch.compile(function, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_queries, num_keys in ((100, 130), (333, 90)):
        ranges = make("random", 2, num_queries, num_keys, device)
        keys = torch.empty(num_keys, 1, device=device)
        assert compiled(ranges.start, ranges.stop, keys) == function(ranges.start, ranges.stop, keys)


@pytest.mark.gpu
@pytest.mark.parametrize("batch, length", [(64, 4096), (1, 32768), (1, 131072 + 5)])
@pytest.mark.backends("tile_bounds", exclude=("reference",))
def test_long_against_reference(batch: int, length: int, backend: str, device: torch.device) -> None:
    """Lengths at which looking at the dense mask would take minutes."""
    for ranges in (make("random", batch, length, length, device), make("blocks", batch, length, length, device)):
        got, wanted = tile_bounds(ranges, length, backend=backend), tile_bounds(ranges, length, backend="reference")
        assert torch.equal(got.q_bounds, wanted.q_bounds) and torch.equal(got.k_bounds, wanted.k_bounds)


@pytest.mark.gpu
@pytest.mark.backends("tile_bounds", exclude=("reference",))
def test_cuda_graph_and_side_stream(backend: str, device: torch.device) -> None:
    """The captured launches read the inputs of the replay, on the stream of the capture."""
    ranges = make("random", 2, 500, 600, device)
    tile_bounds(ranges, 600, backend=backend)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = tile_bounds(ranges, 600, backend=backend)
    other = make("random", 2, 500, 600, device)
    ranges.start.copy_(other.start)
    ranges.stop.copy_(other.stop)
    graph.replay()
    wanted = from_dense(other, 600)
    assert torch.equal(got.q_bounds.cpu(), wanted.q_bounds) and torch.equal(got.k_bounds.cpu(), wanted.k_bounds)

# SPDX-License-Identifier: Apache-2.0
"""Tile bounds as two Triton kernels: query tiles from rows, then key tiles from query tiles."""

import functools
from collections.abc import Callable

import torch
import triton
import triton.language as tl

from vlmkernels.backends.triton import cdiv
from vlmkernels.backends.triton._aot import AotCase
from vlmkernels.backends.triton._launch import LAUNCHES, Launch

TILE = 64
_GROUP = 8  # query tiles per program of the first kernel
_CHUNK = 128  # query tiles per iteration of the second kernel


# Lengths are not worth a compilation of their own for every divisibility.
@triton.jit(do_not_specialize=["num_queries", "num_keys", "num_q_tiles"])
def _query_tile_bounds_kernel(
    start_ptr,
    stop_ptr,
    q_bounds_ptr,
    stride_start_b,
    stride_start_q,
    stride_stop_b,
    stride_stop_q,
    num_queries,
    num_keys,
    num_q_tiles,
    TILE: tl.constexpr,
    GROUP: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    tiles = tl.program_id(0).to(tl.int64) * GROUP + tl.arange(0, GROUP)
    rows = tiles[:, None] * TILE + tl.arange(0, TILE)[None, :]
    inside = rows < num_queries
    s = tl.load(start_ptr + batch * stride_start_b + rows * stride_start_q, mask=inside, other=0)
    e = tl.load(stop_ptr + batch * stride_stop_b + rows * stride_stop_q, mask=inside, other=0)
    s = tl.maximum(s, 0)
    e = tl.minimum(e, num_keys)
    # As [num_keys, 0) an empty range widens no hull and empties the intersection. Rows past the end are neutral in both.
    empty = s >= e
    s = tl.where(empty, num_keys, s)
    e = tl.where(empty, 0, e)
    lo = tl.min(s, 1)
    hi = tl.max(e, 1)
    full_lo = tl.max(tl.where(inside, s, 0), 1)
    full_hi = tl.min(tl.where(inside, e, num_keys), 1)
    nothing = full_lo >= full_hi
    out = q_bounds_ptr + (batch * num_q_tiles + tiles) * 4
    mask = tiles < num_q_tiles
    tl.store(out, lo, mask=mask)
    tl.store(out + 1, hi, mask=mask)
    tl.store(out + 2, tl.where(nothing, num_keys, full_lo), mask=mask)
    tl.store(out + 3, tl.where(nothing, 0, full_hi), mask=mask)


@triton.jit
def _maximum(a, b):
    return tl.maximum(a, b)


@triton.jit(do_not_specialize=["num_keys", "num_q_tiles", "num_k_tiles"])
def _key_tile_bounds_kernel(
    q_bounds_ptr,
    k_bounds_ptr,
    num_keys,
    num_q_tiles,
    num_k_tiles,
    TILE: tl.constexpr,
    CHUNK: tl.constexpr,
):
    batch = tl.program_id(1).to(tl.int64)
    begin = tl.program_id(0) * TILE
    end = tl.minimum(begin + TILE, num_keys)
    offs = tl.arange(0, CHUNK)
    first = num_q_tiles
    last = 0
    longest = 0
    full_first = num_q_tiles
    began = 0  # where the run of full tiles that reaches the chunk's edge began
    for base in range(0, num_q_tiles, CHUNK):
        t = base + offs
        mask = t < num_q_tiles
        q = q_bounds_ptr + (batch * num_q_tiles + t) * 4
        lo = tl.load(q, mask=mask, other=num_keys)
        hi = tl.load(q + 1, mask=mask, other=0)
        full_lo = tl.load(q + 2, mask=mask, other=num_keys)
        full_hi = tl.load(q + 3, mask=mask, other=0)
        meets = (lo < end) & (hi > begin)
        first = tl.minimum(first, tl.min(tl.where(meets, t, num_q_tiles), 0))
        last = tl.maximum(last, tl.max(tl.where(meets, t + 1, 0), 0))
        full = (full_lo <= begin) & (full_hi >= end)
        since = tl.maximum(tl.associative_scan(tl.where(full, 0, t + 1), 0, _maximum), began)
        length = t + 1 - since
        here = tl.max(length, 0)
        full_first = tl.where(here > longest, tl.min(tl.where(length == here, since, num_q_tiles), 0), full_first)
        longest = tl.maximum(longest, here)
        began = tl.max(since, 0)
    out = k_bounds_ptr + (batch * num_k_tiles + tl.program_id(0)) * 4
    tl.store(out, first)
    tl.store(out + 1, last)
    tl.store(out + 2, full_first)
    tl.store(out + 3, tl.where(longest > 0, full_first + longest, 0))


def why_not_tile_bounds(start: torch.Tensor, stop: torch.Tensor, num_keys: int) -> str | None:
    return None if start.shape[0] <= 65535 else f"it takes at most 65535 batches, these are {start.shape[0]}"


@functools.lru_cache(maxsize=LAUNCHES)
def _launches(
    device: torch.device, batch: int, num_queries: int, num_keys: int, strides: tuple[int, ...]
) -> tuple[Launch, Launch]:
    num_q_tiles, num_k_tiles = cdiv(num_queries, TILE), cdiv(num_keys, TILE)
    by_query = Launch(
        _query_tile_bounds_kernel, (cdiv(num_q_tiles, _GROUP), batch), (*strides, num_queries, num_keys, num_q_tiles),
        TILE=TILE, GROUP=_GROUP, num_warps=4,
    )  # fmt: skip
    by_key = Launch(
        _key_tile_bounds_kernel, (num_k_tiles, batch), (num_keys, num_q_tiles, num_k_tiles),
        TILE=TILE, CHUNK=_CHUNK, num_warps=1,
    )  # fmt: skip
    return by_query, by_key


def tile_bounds(start: torch.Tensor, stop: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    return plan_tile_bounds(start, stop, num_keys)(start, stop)


def plan_tile_bounds(
    start: torch.Tensor, stop: torch.Tensor, num_keys: int
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    batch, num_queries = start.shape
    q_shape, k_shape = (batch, cdiv(num_queries, TILE), 4), (batch, cdiv(num_keys, TILE), 4)
    by_query, by_key = _launches(start.device, batch, num_queries, num_keys, (*start.stride(), *stop.stride()))

    def plan(start: torch.Tensor, stop: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q_bounds, k_bounds = start.new_empty(*q_shape), start.new_empty(*k_shape)
        if 0 not in q_shape:
            by_query(start, stop, q_bounds)
        if 0 not in k_shape:
            by_key(q_bounds, k_bounds)
        return q_bounds, k_bounds

    return plan


def aot_cases() -> list[AotCase]:
    def bounds(batch: int, num_queries: int) -> None:
        start = torch.empty(batch, num_queries, dtype=torch.int32)
        tile_bounds(start, torch.empty_like(start), num_queries)

    return [AotCase("one row of tiles", lambda: bounds(1, 4096)), AotCase("odd length", lambda: bounds(3, 4097))]

# SPDX-License-Identifier: Apache-2.0
"""Tile bounds on ``csrc/tile_bounds``: one call, two small launches."""

import torch

from vlmkernels.backends.cuda._library import EntryPoint, TileBoundsParams

TILE = 64

_tile_bounds = EntryPoint("vlmk_tile_bounds")


def tile_bounds(start: torch.Tensor, stop: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    batch, num_queries = start.shape
    q_bounds = start.new_empty(batch, -(-num_queries // TILE), 4)
    k_bounds = start.new_empty(batch, -(-num_keys // TILE), 4)
    params = TileBoundsParams(
        start.data_ptr(),
        stop.data_ptr(),
        q_bounds.data_ptr(),
        k_bounds.data_ptr(),
        *start.stride(),
        *stop.stride(),
        batch,
        num_queries,
        num_keys,
    )
    _tile_bounds(params, start.device)
    return q_bounds, k_bounds

# SPDX-License-Identifier: Apache-2.0
"""Tile bounds on ``csrc/tile_bounds``: one call, two small launches."""

from collections.abc import Callable

import torch

from vlmkernels.backends.cuda._library import EntryPoint, TileBoundsParams

TILE = 64

_tile_bounds = EntryPoint("vlmk_tile_bounds")


def tile_bounds(start: torch.Tensor, stop: torch.Tensor, num_keys: int) -> tuple[torch.Tensor, torch.Tensor]:
    return plan_tile_bounds(start, stop, num_keys)(start, stop)


def plan_tile_bounds(
    start: torch.Tensor, stop: torch.Tensor, num_keys: int
) -> Callable[[torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor]]:
    batch, num_queries = start.shape
    q_shape, k_shape = (batch, -(-num_queries // TILE), 4), (batch, -(-num_keys // TILE), 4)
    params = TileBoundsParams(0, 0, 0, 0, *start.stride(), *stop.stride(), batch, num_queries, num_keys)
    launch = _tile_bounds.launcher(params, start.device)

    def plan(start: torch.Tensor, stop: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        q_bounds, k_bounds = start.new_empty(*q_shape), start.new_empty(*k_shape)
        launch(start, stop, q_bounds, k_bounds)
        return q_bounds, k_bounds

    return plan

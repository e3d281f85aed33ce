# SPDX-License-Identifier: Apache-2.0
"""The meaning of ``pos_embed``: every row as a matrix of weights over all cells of the table, in ``O(rows * cells)`` memory."""

import torch
from torch import Tensor


def _places(grids: Tensor, rows: int, merge: int, padded: bool, pad_first: bool) -> tuple[Tensor, ...]:
    """For every row of the result, ``[R]`` or ``[B, R]``: y and x of its patch, h and w of its image, and whether it has one."""
    grids = grids.long().clamp(0, rows)  # a side of more than all rows fits nowhere
    counts = grids.prod(1)
    index = torch.arange(rows, device=grids.device)
    if padded:
        sides, index = grids[:, None, -2:].expand(-1, rows, 2), index.expand(grids.shape[0], rows)
        filled = index < counts[:, None]
        if pad_first:
            index, filled = index * filled, (counts > 0)[:, None].expand_as(filled)
    else:
        ends = counts.cumsum(0)
        image = (index[:, None] >= ends).sum(1)
        filled = image < grids.shape[0]
        # A last image for the rows behind all images.
        sides = torch.cat((grids[:, -2:], grids.new_ones(1, 2)))[image]
        index = index - torch.cat((ends.new_zeros(1), ends))[image]
    h, w = sides.clamp(min=1).unbind(-1)
    index = index % (h * w)
    block, inside = index // (merge * merge), index % (merge * merge)
    per_row = (w // merge).clamp(min=1)
    return block // per_row * merge + inside // merge, block % per_row * merge + inside % merge, h, w, filled


def _axis(place: Tensor, count: Tensor, size: int, align_corners: bool, antialias: bool) -> Tensor:
    """``[..., size]``: the weights of the cells along one axis for the patch at ``place`` of ``count``, in fp64.

    Distances are in units that make them integers, so a weight that is 0 is exactly 0.
    """
    cell = torch.arange(size, device=place.device)
    place, count = place.unsqueeze(-1), count.unsqueeze(-1)
    if align_corners:
        reach = (count - 1).clamp(min=1)
        distance = cell * reach - place * (size - 1)
    else:
        reach = 2 * (count.clamp(min=size) if antialias else count)
        distance = (2 * cell + 1) * count - (2 * place + 1) * size
    tent = (reach - distance.abs()).clamp(min=0).double()
    return tent / tent.sum(-1, keepdim=True)


def _weights(
    grids: Tensor, rows: int, height: int, width: int, merge: int, padded: bool, pad_first: bool, align: bool, antialias: bool
) -> Tensor:
    """``[R or B * R, height * width]``."""
    y, x, h, w, filled = _places(grids, rows, merge, padded, pad_first)
    outer = _axis(y, h, height, align, antialias)[..., :, None] * _axis(x, w, width, align, antialias)[..., None, :]
    return outer.masked_fill(~filled[..., None, None], 0.0).flatten(-2).flatten(0, -2)


def _weighted_sum(weights: Tensor, values: Tensor) -> Tensor:
    """``weights @ values`` where a weight of 0 leaves out what it meets, be it infinite or NaN. No weight is negative."""
    dtype = torch.promote_types(values.dtype, torch.float32)
    values = values.to(dtype)
    out = weights.to(dtype) @ values.masked_fill(~values.isfinite(), 0.0)
    met = (weights > 0).to(dtype)
    for special, where in ((torch.inf, values == torch.inf), (-torch.inf, values == -torch.inf), (torch.nan, values.isnan())):
        out = out + torch.zeros_like(out).masked_fill(met @ where.to(dtype) > 0, special)
    return out


def pos_embed_fwd(
    table: Tensor,
    grids: Tensor,
    rows: int,
    merge_size: int,
    padded: bool,
    pad_first: bool,
    align_corners: bool,
    antialias: bool,
) -> Tensor:
    height, width, dim = table.shape
    weights = _weights(grids, rows, height, width, merge_size, padded, pad_first, align_corners, antialias)
    out = _weighted_sum(weights, table.reshape(-1, dim)).to(table.dtype)
    return out.view(grids.shape[0], rows, dim) if padded else out


def pos_embed_bwd(
    grad: Tensor,
    grids: Tensor,
    height: int,
    width: int,
    merge_size: int,
    padded: bool,
    pad_first: bool,
    align_corners: bool,
    antialias: bool,
) -> Tensor:
    rows, dim = grad.shape[-2:]
    weights = _weights(grids, rows, height, width, merge_size, padded, pad_first, align_corners, antialias)
    return _weighted_sum(weights.t(), grad.reshape(-1, dim)).to(grad.dtype).view(height, width, dim)

# SPDX-License-Identifier: Apache-2.0
"""``pos_embed`` in stock torch operations: gathered cells for each row, or, with antialiasing on a GPU, a matrix product.

How many cells an antialiased row takes depends on the grids. On a CPU they are looked at; elsewhere nothing waits for them, and
the product is over all cells.
"""

import torch
from torch import Tensor

#: Weights that are in memory at once.
_CHUNK = 2**25
#: Cells of a row from which the product with all of them is the shorter way.
_MANY = 64

Taps = list[tuple[Tensor, Tensor]]


def _patches(grids: Tensor, rows: int, merge: int, padded: bool, pad_first: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Place ``[2, R]`` and grid ``[2, R]`` of the patch of every row of the result, batch by batch, and whether there is one."""
    batch = grids.shape[0]
    grids = grids.to(torch.int64).clamp(0, rows)  # a side of more than all rows fits nowhere
    counts = grids.prod(1)
    if padded:
        index = torch.arange(batch * rows, device=grids.device)
        image, local = index // max(rows, 1), index % max(rows, 1)
        filled = local < counts[image]
        if pad_first:
            local = local * filled
            filled = counts[image] > 0
    else:
        local = torch.arange(rows, device=grids.device)
        ends = counts.cumsum(0)
        image = torch.searchsorted(ends, local, right=True)
        filled = image < batch
        image = image.clamp(max=batch - 1)
        local = local - (ends - counts)[image]
    sides = grids[:, -2:].clamp(min=1)[image].t()
    h, w = sides
    local = local % (h * w)
    if merge == 1:
        return torch.stack((local // w, local % w)), sides, filled
    band, local = local // (merge * w), local % (merge * w)
    block, local = local // (merge * merge), local % (merge * merge)
    return torch.stack((band * merge + local // merge, block * merge + local % merge)), sides, filled


def _neighbours(place: Tensor, count: Tensor, size: int, align_corners: bool) -> Taps:
    """The two cells around a patch along one axis and their weights in fp64. Where one cell is enough, it comes twice."""
    if align_corners:
        ahead, unit = place * (size - 1), (count - 1).clamp(min=1)
    else:
        ahead, unit = ((2 * place + 1) * size - count).clamp(min=0), 2 * count
    first = (ahead // unit).clamp(max=size - 1)
    rest = ahead - first * unit
    # Not the weights 1 and 0: 0 times an infinite cell would be NaN.
    part = (rest.double() / unit).masked_fill_(rest == 0, 0.5)
    second = torch.where(rest > 0, first + 1, first).clamp(max=size - 1)
    return [(first, 1 - part), (second, part)]


def _covered(place: Tensor, count: Tensor, size: int) -> Taps:
    """All cells that an antialiased patch covers, for grids that may be read. Cells of weight 0 repeat the first."""
    centre, reach = (2 * place + 1) * size - count, 2 * count.clamp(min=size)
    first = ((centre - reach) // (2 * count) + 1).clamp(0, size - 1)
    last = ((centre + reach - 1) // (2 * count)).clamp(0, size - 1)
    cells = [first + k for k in range(int((last - first).amax()) + 1)]
    tents = [(reach - (2 * count * cell - centre).abs()).clamp(min=0) * (cell <= last) for cell in cells]
    total = torch.stack(tents).sum(0).double()
    return [(torch.where(cell <= last, cell, first), tent / total) for cell, tent in zip(cells, tents, strict=True)]


def _taps(places: Tensor, sides: Tensor, height: int, width: int, align: bool, antialias: bool) -> tuple[Taps, Taps] | None:
    """The cells of each row along both axes, or None where they are too many or unknown."""
    if not antialias:
        return _neighbours(places[0], sides[0], height, align), _neighbours(places[1], sides[1], width, align)
    if places.device.type != "cpu" or places.numel() == 0:
        return None
    taps = _covered(places[0], sides[0], height), _covered(places[1], sides[1], width)
    return taps if len(taps[0]) * len(taps[1]) <= min(_MANY, height * width) else None


def _antialiased(place: Tensor, count: Tensor, size: int, dtype: torch.dtype) -> Tensor:
    """``[R, size]``: the weights of all cells along one axis."""
    cell = torch.arange(size, device=place.device) * 2 + 1
    apart = (cell * count[:, None] - (2 * place[:, None] + 1) * size).abs()
    tent = (2 * count[:, None].clamp(min=size) - apart).clamp(min=0).to(dtype)
    return tent / tent.sum(1, keepdim=True)


def _product(weights: Tensor, values: Tensor, odd: Tensor) -> Tensor:
    """``weights @ values``; ``odd`` marks values that are not finite (they are 0 in ``values``): NaN where one has a weight."""
    return (weights @ values).masked_fill_((weights > 0).to(weights.dtype) @ odd > 0, torch.nan)


def _split_odd(values: Tensor) -> tuple[Tensor, Tensor]:
    wide = values.to(torch.promote_types(values.dtype, torch.float32))
    odd = ~wide.isfinite()
    return wide.masked_fill(odd, 0.0), odd.to(wide.dtype)


def _dense(places: Tensor, sides: Tensor, filled: Tensor, height: int, width: int, dtype: torch.dtype) -> Tensor:
    rows = _antialiased(places[0], sides[0], height, dtype)
    columns = _antialiased(places[1], sides[1], width, dtype)
    return (rows[:, :, None] * columns[:, None, :] * filled[:, None, None]).flatten(1)


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
    shape = (grids.shape[0], rows, dim) if padded else (rows, dim)
    if grids.shape[0] == 0:
        return table.new_zeros(shape)
    places, sides, filled = _patches(grids, rows, merge_size, padded, pad_first)
    cells = table.reshape(-1, dim)
    taps = _taps(places, sides, height, width, align_corners, antialias)
    if taps is None:
        values, odd = _split_odd(cells)
        out = torch.empty(filled.shape[0], dim, dtype=table.dtype, device=table.device)
        step = max(_CHUNK // cells.shape[0], 1)
        for start in range(0, filled.shape[0], step):
            part = slice(start, start + step)
            weights = _dense(places[:, part], sides[:, part], filled[part], height, width, values.dtype)
            out[part] = _product(weights, values, odd)
        return out.view(shape)
    wide = torch.zeros(filled.shape[0], dim, dtype=torch.promote_types(table.dtype, torch.float32), device=table.device)
    for row, row_weight in taps[0]:
        for column, column_weight in taps[1]:
            weight = (row_weight * column_weight).to(wide.dtype)
            wide.addcmul_(cells[row * width + column], weight[:, None])
    return wide.masked_fill_(~filled[:, None], 0.0).to(table.dtype).view(shape)


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
    shape = (height, width, dim)
    if grad.numel() == 0 or grids.shape[0] == 0:
        return grad.new_zeros(shape)
    places, sides, filled = _patches(grids, rows, merge_size, padded, pad_first)
    grad = grad.reshape(-1, dim)
    taps = _taps(places, sides, height, width, align_corners, antialias)
    if taps is None:
        values, odd = _split_odd(grad)
        wide = values.new_zeros(height * width, dim)
        step = max(_CHUNK // (height * width), 1)
        for start in range(0, filled.shape[0], step):
            part = slice(start, start + step)
            weights = _dense(places[:, part], sides[:, part], filled[part], height, width, values.dtype)
            wide += _product(weights.t(), values[part], odd[part])
        return wide.to(grad.dtype).view(shape)
    values = grad.to(torch.promote_types(grad.dtype, torch.float32)).masked_fill(~filled[:, None], 0.0)
    wide = values.new_zeros(height * width, dim)
    for row, row_weight in taps[0]:
        for column, column_weight in taps[1]:
            weighted = values * (row_weight * column_weight).to(values.dtype)[:, None]
            # An embedding's gradient is sorted by row before it is added up; index_add_ on a GPU is not.
            wide += torch.ops.aten.embedding_dense_backward(weighted, row * width + column, height * width, -1, False)
    return wide.to(grad.dtype).view(shape)

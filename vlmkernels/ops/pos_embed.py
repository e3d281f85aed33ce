# SPDX-License-Identifier: Apache-2.0
"""Learned position tables resampled to the grid of every image of a batch, whose sizes only the device needs to know.

The rows that come out are what ``patch_embed`` adds. One rule covers the models: a row is the average of the table's cells,
weighted by a tent around the place of its patch, separately along height and width. The tent is one cell wide, or, with
antialiasing, as wide as a patch where the grid is coarser than the table.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmkernels.ops._op import Op, bad_argument, check_sizes, forced_backend

LAYOUTS = ("packed", "padded")
PADDINGS = ("zeros", "first")

_OPTIONS = "int merge_size, bool padded, bool pad_first, bool align_corners, bool antialias, str backend"


def _fake_fwd(table: Tensor, grids: Tensor, rows: int, merge_size: int, padded: bool, *_: Any) -> Tensor:
    return table.new_empty((grids.shape[0], rows, table.shape[2]) if padded else (rows, table.shape[2]))


def _fake_bwd(grad: Tensor, grids: Tensor, height: int, width: int, *_: Any) -> Tensor:
    return grad.new_empty((height, width, grad.shape[-1]))


_fwd = Op("pos_embed", f"pos_embed_fwd(Tensor table, Tensor grids, SymInt rows, {_OPTIONS}) -> Tensor", _fake_fwd)
_bwd = Op("pos_embed", f"pos_embed_bwd(Tensor grad, Tensor grids, SymInt height, SymInt width, {_OPTIONS}) -> Tensor", _fake_bwd)


class _Resample(torch.autograd.Function):
    """Linear in the table, so the backward pass keeps the grids and nothing else."""

    @staticmethod
    def forward(ctx: Any, table: Tensor, grids: Tensor, rows: int, *options: Any) -> Tensor:
        ctx.save_for_backward(grids)
        ctx.sides, ctx.options = (table.shape[0], table.shape[1]), options
        out: Tensor = _fwd(table, grids, rows, *options)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (grids,) = ctx.saved_tensors
        return _bwd(grad, grids, *ctx.sides, *ctx.options), *(None,) * (2 + len(ctx.options))


def _cells(table: Tensor) -> Tensor:
    """The table as ``[H, W, D]``."""
    if table.dim() not in (2, 3) or not table.is_floating_point():
        raise bad_argument("table", f"{tuple(table.shape)} {table.dtype}", "[H, W, D] or [S * S, D] of a floating dtype")
    if table.dim() == 2:
        side = math.isqrt(table.shape[0])
        if side * side != table.shape[0]:
            raise bad_argument("table", f"shape {tuple(table.shape)}", "a square number of rows, or [H, W, D]")
        table = table.unflatten(0, (side, side))
    if 0 in table.shape[:2]:
        raise bad_argument("table", f"shape {tuple(table.shape)}", "at least one row")
    return table


def _check_values(grids: Tensor, rows: int, merge_size: int, padded: bool) -> None:
    """Grids whose values the host knows: those on the CPU, outside of a trace."""
    total = 0
    for grid in grids.tolist():
        *_, height, width = grid
        count = math.prod(grid)
        total += count
        if min(grid) < 0 or height % merge_size or width % merge_size:
            wanted = f"no negative number, rows and columns that are multiples of merge_size = {merge_size}"
            raise bad_argument("grids", tuple(grid), wanted)
        if padded and count > rows:
            raise bad_argument("num_rows", rows, f"at least {count}, the patches of {tuple(grid)}")
    if not padded and total > rows:
        raise bad_argument("num_rows", rows, f"at least {total}, the patches of all grids")


def resample_pos_embed(
    table: Tensor,
    grids: Tensor,
    num_rows: int,
    *,
    layout: str = "packed",
    padding: str = "zeros",
    merge_size: int = 1,
    align_corners: bool = False,
    antialias: bool = False,
    backend: str | None = None,
) -> Tensor:
    """Resample a position table to the patch grid of every image, bilinearly, for images of different sizes in one call.

    The row of the patch at ``(y, x)`` of an image of ``h x w`` patches, from a table of ``H x W`` cells, is::

        out     = sum_ij  a_i b_j table[i, j]            a_i ~ max(0, 1 - |i - u| / r), sum_i a_i = 1;  b_j likewise from x and w
        u       = (y + 1/2) H / h - 1/2                  or y (H - 1) / (h - 1) with align_corners (0 for h = 1)
        r       = 1                                      or max(1, H / h) with antialias

    which is ``torch.nn.functional.interpolate(mode="bilinear")`` with the same flags. A frame of a video repeats the image.
    The coordinates are computed in integers, so the weights are exact until one division; sums are in fp32 (fp64 for fp64
    tables), and a result is rounded once. A cell with weight 0 is not read: NaN and infinities stay with the rows they belong to.

    | model | arguments |
    |---|---|
    | Qwen3-VL | ``grids=grid_thw``, ``merge_size=2``, ``align_corners=True`` |
    | SigLIP2 NaFlex (transformers) | ``grids=spatial_shapes``, ``layout="padded"``, ``padding="first"``, ``antialias=True`` |
    | NaFlexVit (timm) | the same with ``padding="zeros"`` |

    Args:
        table: ``[H, W, D]``, or ``[S * S, D]`` for a square one; fp32, bf16, fp16 or fp64; any strides.
        grids: ``[B, 3]`` of (frames, rows, columns) or ``[B, 2]`` of (rows, columns), int32 or int64, on the device of the table,
            where it is read: no host sync. An image without patches has no rows.
        num_rows: packed: rows of the result, ``N``, at least the patches of all images. Padded: rows of each image.
        layout: ``"packed"``: the images one after the other, ``[N, D]``; ``"padded"``: ``[B, N, D]``.
        padding: what the rows behind the last patch hold: ``"zeros"``, or with ``layout="padded"`` ``"first"``, a copy of the
            image's row 0, as transformers has it for SigLIP2 (its gradient too). An image without patches has zeros.
        merge_size: patches come in blocks of ``merge_size x merge_size``, the order of the Qwen towers; 1: row by row.
        align_corners: the corners of grid and table fall together.
        antialias: average over all cells that a patch covers, however many, where the grid is coarser than the table.
        backend: force a backend; the default is the best that takes these inputs.

    Returns:
        ``[N, D]`` or ``[B, N, D]`` in the dtype of the table, contiguous. It is differentiable once, in the table; the sum over
        the rows has a fixed order, so the gradient is the same bits in every run.

    Raises:
        ValueError: a shape, dtype, device or name does not fit; ``antialias`` with ``align_corners``, which have no common
            meaning; for grids on the CPU also their values: a negative number, a side that ``merge_size`` does not divide, more
            patches than rows. On a GPU nothing waits to look at them, and the rows of such an image are unspecified.
        BackendError: the forced backend can't run these inputs.
    """
    table = _cells(table)
    if grids.dim() != 2 or grids.shape[1] not in (2, 3) or grids.dtype not in (torch.int32, torch.int64):
        raise bad_argument("grids", f"{tuple(grids.shape)} {grids.dtype}", "[B, 3] or [B, 2], int32 or int64")
    if grids.device != table.device:
        raise bad_argument("grids", f"device {grids.device}", f"{table.device}, the table's")
    if layout not in LAYOUTS:
        raise bad_argument("layout", repr(layout), f"one of {', '.join(LAYOUTS)}")
    if padding not in PADDINGS or (padding == "first" and layout == "packed"):
        raise bad_argument("padding", repr(padding), f"one of {', '.join(PADDINGS)} ('first' with layout='padded' only)")
    check_sizes(merge_size=merge_size)
    if num_rows < 0:
        raise bad_argument("num_rows", num_rows, "0 or more")
    if antialias and align_corners:
        raise bad_argument("antialias", True, "False with align_corners")
    padded = layout == "padded"
    if type(grids) is Tensor and grids.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_values(grids, num_rows, merge_size, padded)
    options = merge_size, padded, padding == "first", align_corners, antialias, forced_backend(backend)
    run = _Resample.apply if table.requires_grad and torch.is_grad_enabled() else _fwd
    out: Tensor = run(table, grids, num_rows, *options)
    return out

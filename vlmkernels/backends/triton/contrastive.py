# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses in Triton and cuBLAS: tiles of logits that are reduced as they are made, and panels of their gradients.

The gradient of the logits exists in one panel at a time, in the dtype of the features. Two matrix products take it to the
gradients of ``a`` and ``b``, which are added up in the order of the panels: no sum is one of atomics, and two runs give the same
bits.
"""

import functools
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from vlmkernels.backends.triton import INTERPRETED, _contrastive_few, cdiv, multiprocessors
from vlmkernels.backends.triton._aot import AotCase
from vlmkernels.backends.triton._contrastive_tiles import (
    GROUPED,
    _add_narrow_kernel,
    _clip_bwd_kernel,
    _clip_fwd_kernel,
    _merge_lse_kernel,
    _siglip_kernel,
    _times_kernel,
)
from vlmkernels.backends.triton._launch import LAUNCHES, Launch
from vlmkernels.backends.triton._product import Config, aligned_matrix, generation

#: The most rows and columns of a panel of gradients, 128 MiB in bf16.
PANEL = 8192
#: Rows whose shares of the log-sum-exps, 4 bytes for each tile of a row or a column, are there at a time.
STRIP = 4096


# Two programs of one warpgroup share a multiprocessor, and one multiplies while the other finishes its tile: 4.67 ms for the
# first form of CLIP's forward pass, with two warpgroups 7.46, and 5.70 for 128 x 256 (N 32768, D 768, H200).
HOPPER_CONFIG = Config(128, 128, 64, 4, 3)
TMA_CONFIG = Config(128, 128, 64, 8, 3)
CP_ASYNC_CONFIG = Config(128, 128, 32, 8, 3)
# Products of fp32 without tensor cores.
FP32_CONFIG = Config(64, 64, 32, 8, 2)
INTERPRETER_CONFIG = Config(32, 32, 64, 4, 1)


@functools.cache
def _config(device: torch.device, dtype: torch.dtype) -> tuple[Config, bool]:
    """The configuration, and whether the kernels take matrices as TMA descriptors."""
    if INTERPRETED:
        return INTERPRETER_CONFIG, dtype != torch.float32
    if dtype == torch.float32:
        return FP32_CONFIG, False
    major = generation(device)
    return (HOPPER_CONFIG if major == 9 else TMA_CONFIG, True) if major >= 9 else (CP_ASYNC_CONFIG, False)


class _Tiles:
    """Two matrices as the kernels take them, and the launches that go over tiles of their products."""

    def __init__(self, a: Tensor, b: Tensor, inverse_a: Tensor | None, inverse_b: Tensor | None) -> None:
        self.a, self.b = aligned_matrix(a), aligned_matrix(b)
        self.inverse = inverse_a, inverse_b
        self.size = (len(a), len(b))
        self.config, tma = _config(a.device, a.dtype)
        c = self.config
        self.even = not len(a) % c.block_m and not len(b) % c.block_n
        self.options = {
            "D": a.shape[1], "EVEN": self.even, "USE_TMA": tma, "BLOCK_M": c.block_m, "BLOCK_N": c.block_n,
            "BLOCK_K": c.block_k, "GROUP": GROUPED, "num_warps": c.warps, "num_stages": c.stages,
        }  # fmt: skip
        self.sources: list[Any] = [self.a, self.b]
        if tma:
            sizes = (c.block_m, c.block_n)
            self.sources = [
                TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [size, c.block_k])
                for x, size in zip(self.sources, sizes, strict=True)
            ]

    def launch(
        self,
        kernel: Any,
        rows: int,
        columns: int,
        tensors: tuple[Tensor, ...],
        place: tuple[int, ...],
        rest: tuple[float, ...],
        **options: Any,
    ) -> None:
        """A program for each tile of these many rows and columns, which are at ``place``."""
        tiles = cdiv(rows, self.config.block_m) * cdiv(columns, self.config.block_n)
        numbers = (*place, *self.size, self.a.stride(0), self.b.stride(0), *rest)
        kernel[(tiles,)](*self.sources, *self.inverse, *tensors, *numbers, **self.options, **options)


def _slices(size: int, step: int) -> Iterator[slice]:
    for begin in range(0, size, step):
        yield slice(begin, min(begin + step, size))


def _panel_size(size: int, block: int, dim: int, device: torch.device) -> int:
    """Rows of a panel: as many as give every multiprocessor one 128 x 256 tile of the product with ``dim`` columns, or fewer.

    4096 rows of 768 channels are 96 tiles for 132 multiprocessors: their product runs at 494 TFLOP/s, that of 8192 at 684 (H200).
    """
    count = 132 if INTERPRETED else multiprocessors(device)
    wave = 128 * max(1, count // cdiv(dim, 256))
    panels = cdiv(size, min(PANEL, wave))
    return size if panels == 1 else cdiv(cdiv(size, panels), block) * block


def _product(out: Tensor, x: Tensor, y: Tensor, add: bool) -> None:
    """``out = x @ y``, or ``out += x @ y``, in fp32."""
    if not x.is_cuda or x.dtype == torch.float32:
        out.addmm_(x.to(out.dtype), y.to(out.dtype), beta=1 if add else 0)
    elif add:
        torch.addmm(out, x, y, out_dtype=torch.float32, out=out)
    else:
        torch.mm(x, y, out_dtype=torch.float32, out=out)


class _Gradients:
    """The gradients of ``a`` and ``b`` from panels of that of their products, a row of panels after the other.

    That of ``a`` is complete with a row of panels. That of ``b`` is only with the last, and until then the memory of a bf16
    result holds 16 bits of it and ``low`` another 8, a quarter of what fp32 would take beside it.
    """

    def __init__(self, tiles: _Tiles, dtypes: tuple[torch.dtype, torch.dtype], factor: Tensor, wanted: bool = True) -> None:
        self.tiles, self.factor = tiles, factor
        (rows, dim), columns, like = tiles.a.shape, len(tiles.b), tiles.a
        block = max(tiles.config.block_m, tiles.config.block_n)
        self.steps = tuple(_panel_size(size, block, dim, like.device) for size in (rows, columns))
        self.panels = cdiv(rows, self.steps[0]) * cdiv(columns, self.steps[1])
        self.programs = cdiv(self.steps[0], tiles.config.block_m) * cdiv(self.steps[1], tiles.config.block_n)
        self.da = like.new_empty((rows, dim) if wanted else 0, dtype=dtypes[0])
        self.db = like.new_empty((columns, dim) if wanted else 0, dtype=dtypes[1])
        # Rows of a panel begin at multiples of 16 bytes.
        self.panel = like.new_empty(self.steps[0] if wanted else 0, cdiv(self.steps[1], 8) * 8)
        if not wanted:
            return
        self.sum_a = like.new_empty((self.steps[0], dim), dtype=torch.float32)
        self.low = None
        if rows <= self.steps[0] or dtypes[1] == torch.bfloat16:
            self.sum_b = like.new_empty((self.steps[1], dim), dtype=torch.float32)
            self.low = like.new_empty(self.db.shape if rows > self.steps[0] else 0, dtype=torch.uint8)
        else:
            self.sum_b = self.db if dtypes[1] == torch.float32 else like.new_empty(self.db.shape, dtype=torch.float32)

    def __iter__(self) -> Iterator[tuple[int, int, int, int]]:
        """The first row, the rows, the first column and the columns of each panel, to be written before the next is asked for."""
        for rows in _slices(len(self.tiles.a), self.steps[0]):
            for columns in _slices(len(self.tiles.b), self.steps[1]):
                yield rows.start, rows.stop - rows.start, columns.start, columns.stop - columns.start
                if len(self.da):
                    self._add(rows, columns)

    def _add(self, rows: slice, columns: slice) -> None:
        a, b = self.tiles.a[rows], self.tiles.b[columns]
        g = self.panel[: len(a), : len(b)]
        sum_a = self.sum_a[: len(a)]
        _product(sum_a, g, b, columns.start > 0)
        if columns.stop == len(self.tiles.b):
            self._finish(self.da, sum_a, self.tiles.a, rows, 0)
        first, last = rows.start == 0, rows.stop == len(self.tiles.a)
        if self.low is None:
            sum_b = self.sum_b[columns]
            _product(sum_b, g.T, a, not first)
        else:
            sum_b = self.sum_b[: len(b)]
            _product(sum_b, g.T, a, False)
            if not (first and last):
                _add_narrow(sum_b, self.db[columns], self.low[columns], first, last)
        if last:
            self._finish(self.db, sum_b, self.tiles.b, columns, 1)

    def _finish(self, out: Tensor, grad: Tensor, x: Tensor, rows: slice, side: int) -> None:
        """``factor * grad`` without what lies along the rows of ``x``, where these were divided by their norms."""
        inverse = self.tiles.inverse[side]
        if inverse is not None:
            unit = x[rows].float() * inverse[rows, None]
            grad = torch.addcmul(grad, unit, (unit * grad).sum(1, keepdim=True), value=-1)
        torch.mul(grad, self.factor.view(1, 1), out=out[rows])


def _add_narrow(x: Tensor, high: Tensor, low: Tensor, first: bool, last: bool) -> None:
    block = 2048
    grid = (cdiv(x.numel(), block),)
    _add_narrow_kernel[grid](x, high.view(torch.int16), low, x.numel(), FIRST=first, LAST=last, BLOCK=block, num_warps=4)


def _why_not(a: Tensor, inverse_a: Tensor | None) -> str | None:
    if a.dtype == torch.float64:
        return "it has no float64"
    if a.dtype == torch.float16 and inverse_a is not None:
        return "it normalizes bf16 and fp32, not fp16, which does not hold a gradient over two norms"
    return None


def why_not_clip_loss_fwd(a: Tensor, *rest: Any) -> str | None:
    return _why_not(a, None)


def why_not_clip_loss_bwd(dloss: Tensor, a: Tensor, *rest: Any) -> str | None:
    return _why_not(a, rest[8])


def why_not_siglip_loss_fwd(a: Tensor, *rest: Any) -> str | None:
    inverse_a, grads = rest[5], rest[8]
    return _why_not(a, inverse_a if grads else None)


def why_not_siglip_loss_bwd_(da: Tensor, *rest: Any) -> str | None:
    return _why_not(da, None)


def clip_loss_fwd(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    start: Tensor,
    stop: Tensor,
    row: Tensor,
    row_positive: Tensor,
    column: Tensor,
    column_positive: Tensor,
    inverse_a: Tensor | None,
    inverse_b: Tensor | None,
    smooth_row: float,
    smooth_column: float,
) -> tuple[Tensor, ...]:
    if _contrastive_few.few(a, b):
        vectors = (start, stop, row, row_positive, column, column_positive, inverse_a, inverse_b)
        return _contrastive_few.clip_loss_fwd(a, b, scale, *vectors, smooth_row, smooth_column)
    tiles = _Tiles(a, b, inverse_a, inverse_b)
    m, n = tiles.size
    tiles_n, strip = cdiv(n, tiles.config.block_n), min(m, STRIP)
    tiles_m = cdiv(strip, tiles.config.block_m)
    lse_a, lse_b = torch.empty_like(row), torch.empty_like(column)
    share_a, share_b = row.new_empty(tiles_n * strip), row.new_empty(tiles_m * n)
    shift = row.new_empty(tiles_m * tiles_n)
    picked = _partial(row, cdiv(m, strip), tiles_m * tiles_n)
    vectors = (scale, start, stop, row, row_positive, column, column_positive)
    for i, rows in enumerate(_slices(m, strip)):
        size = rows.stop - rows.start
        place, rest = (rows.start, size), (smooth_row, smooth_column)
        tiles.launch(
            _clip_fwd_kernel, size, n, (*vectors, share_a, share_b, shift, picked[i], None), place, rest, SMOOTH=smooth_row != 0
        )
        blocks = tiles.config.block_m, tiles.config.block_n
        _merge(share_a, shift, lse_a[rows], tiles_n, (1, tiles_n, blocks[0]), False)
        _merge(share_b, shift, lse_b, cdiv(size, blocks[0]), (tiles_n, 1, blocks[1]), i > 0)
    of_rows = (row * lse_a).sum() - _total(picked)
    return lse_a, lse_b, of_rows, of_rows + (column * lse_b).sum()


def _partial(like: Tensor, launches: int, programs: int) -> Tensor:
    """A number of each program of each launch, whose row begins at a multiple of 16 bytes."""
    return like.new_zeros(launches, cdiv(programs, 4) * 4, dtype=torch.float32)


def _total(partial: Tensor) -> Tensor:
    return partial.sum(dtype=torch.float64).float()


def _merge(shares: Tensor, shifts: Tensor, lse: Tensor, tiles: int, strides: tuple[int, int, int], add: bool) -> None:
    block = 64
    grid = (cdiv(len(lse), block),)
    _merge_lse_kernel[grid](
        shares, shifts, lse, tiles, len(lse), *strides, ADD=add, BLOCK_T=32, BLOCK_S=block, num_warps=4
    )  # fmt: skip


def clip_loss_bwd(
    dloss: Tensor,
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    start: Tensor,
    stop: Tensor,
    row: Tensor,
    row_positive: Tensor,
    column: Tensor,
    column_positive: Tensor,
    inverse_a: Tensor | None,
    inverse_b: Tensor | None,
    lse_a: Tensor,
    lse_b: Tensor,
    smooth_row: float,
    smooth_column: float,
    dtype_b: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor]:
    if _contrastive_few.few(a, b):
        vectors = (start, stop, row, row_positive, column, column_positive, inverse_a, inverse_b)
        return _contrastive_few.clip_loss_bwd(dloss, a, b, scale, *vectors, lse_a, lse_b, smooth_row, smooth_column, dtype_b)
    tiles = _Tiles(a, b, inverse_a, inverse_b)
    # The gradient of a logit is at most 2 in a panel: fp16 would not hold that of a mean.
    gain = torch.maximum(row.max(), column.max()).clamp_min(1e-30).reciprocal()
    factor = dloss.float() * scale.float() / gain
    out = _Gradients(tiles, (a.dtype, dtype_b), factor)
    lse_a, lse_b = (lse - torch.log(weight * gain) for lse, weight in ((lse_a, row), (lse_b, column)))
    vectors = (scale, gain, start, stop, row, row_positive, column, column_positive, lse_a, lse_b)
    dscale = _partial(row, out.panels, out.programs)
    rest = (out.panel.stride(0), smooth_row, smooth_column)
    for i, place in enumerate(out):
        tensors = (*vectors, out.panel, dscale[i])
        tiles.launch(_clip_bwd_kernel, place[1], place[3], tensors, place, rest, SMOOTH=smooth_row != 0)
    return out.da, out.db, dloss.float() * _total(dscale) / gain


def siglip_loss_fwd(
    a: Tensor,
    b: Tensor,
    scale: Tensor,
    bias: Tensor,
    start: Tensor,
    stop: Tensor,
    inverse_a: Tensor | None,
    inverse_b: Tensor | None,
    weight: float,
    grads: bool,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if grads and _contrastive_few.few(a, b):
        rest = (start, stop, inverse_a, inverse_b, weight, grads, dtype_a, dtype_b)
        return _contrastive_few.siglip_loss_fwd(a, b, scale, bias, *rest)
    tiles = _Tiles(a, b, inverse_a, inverse_b)
    out = _Gradients(tiles, (dtype_a, dtype_b), weight * scale.float(), grads)
    # Of the loss, of the scale's gradient and of the bias's.
    sums = [_partial(scale, out.panels, out.programs) for _ in range(3)]
    for i, place in enumerate(out):
        tensors = (scale, bias, start, stop, out.panel, *(x[i] for x in sums))
        tiles.launch(_siglip_kernel, place[1], place[3], tensors, place, (out.panel.stride(0),), GRADS=grads)
    loss, dscale, dbias = (weight * _total(x) for x in sums)
    return loss, out.da, out.db, torch.stack((dscale, dbias)) if grads else loss.new_empty(0)


@functools.lru_cache(maxsize=LAUNCHES)
def _siglip_bwd(device: torch.device, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, int], times: float) -> Launch:
    block = 128 if INTERPRETED else 2048
    return Launch(_times_kernel, (cdiv(sizes[0], block) + cdiv(sizes[1], block),), (*sizes, times), BLOCK=block, num_warps=4)


def siglip_loss_bwd_(da: Tensor, db: Tensor, dnumbers: Tensor, dloss: Tensor, times: float) -> None:
    tensors = da, db, dnumbers, dloss
    _siglip_bwd(da.device, tuple(x.dtype for x in tensors), (da.numel(), db.numel()), times)(*tensors)


def aot_cases() -> list[AotCase]:
    """Both losses with their gradients: whole tiles and not, several panels, norms and label smoothing, every configuration."""

    def call(rows: int, columns: int, dim: int, dtype: torch.dtype, norms: bool, smooth: float) -> None:
        a, b = torch.empty(rows, dim, dtype=dtype), torch.empty(columns, dim, dtype=dtype)
        scale, start = torch.empty(()), torch.empty(rows, dtype=torch.int32)
        row, column = torch.empty(rows), torch.empty(columns)
        inverse = (row, column) if norms else (None, None)
        vectors = (a, b, scale, start, start, row, row, column, column, *inverse)
        clip_loss_fwd(*vectors, smooth, smooth)
        clip_loss_bwd(scale, *vectors, row, column, smooth, smooth, dtype)
        for grads in (True,) if norms else (False, True):
            siglip_loss_fwd(a, b, scale, scale, start, start, *inverse, 1.0, grads, dtype, dtype)
        siglip_loss_bwd_(a, b, row[:2], scale, 1.0)

    # With Triton 3.6 whole tiles without norms spill nothing, with 3.9 the gradients of SigLIP up to 96 bytes.
    whole = {80: 96, 90: 96}, "Triton 3.9"
    wide = {80: 320, 90: 640, 100: 128}, "masks, norms and label smoothing beside half a tile"
    small = {90: 16, 100: 16}, "8 or 16 bytes for 128 registers, thus two programs"
    few_rows = {80: 216, 90: 24, 100: 240}, "Triton 3.9, on 100 3.6 too: half a tile beside what goes to a panel in fp32"
    cases = []
    for rows, columns, dim, dtype, norms, smooth, allowed in (
        (12288, 4096, 768, torch.bfloat16, False, 0.0, whole),
        (1000, 3000, 520, torch.bfloat16, True, 0.1, wide),
        (1000, 1000, 72, torch.float32, True, 0.1, small),
        # Few pairs, in each of their tiles.
        (512, 512, 512, torch.bfloat16, False, 0.0, ()),
        (1000, 700, 520, torch.bfloat16, False, 0.0, few_rows),
        (2048, 1500, 768, torch.float16, False, 0.1, few_rows),
        (1000, 1000, 768, torch.bfloat16, True, 0.1, ()),
        (2000, 2000, 768, torch.bfloat16, True, 0.0, few_rows),
    ):
        name = f"{rows}x{columns} D{dim} {str(dtype)[6:]} norms={norms} smoothing={smooth}"
        cases.append(AotCase(name, functools.partial(call, rows, columns, dim, dtype, norms, smooth), *allowed))
    return cases

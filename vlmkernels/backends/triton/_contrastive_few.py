# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses of few pairs, whose time is that of launches: no more of them than what one writes and another reads.

The tiles of logits are those of ``_contrastive_tiles``, small enough to fill the GPU. The gradient of the logits is one panel,
and one launch takes it to the gradients of ``a`` and of ``b``, and where features were divided by their lengths a second one.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.backends.triton import INTERPRETED, cdiv, next_power_of_2
from vlmkernels.backends.triton._contrastive_tiles import (
    GROUPED,
    LN2,
    _clip_bwd_kernel,
    _clip_fwd_kernel,
    _siglip_kernel,
    merged_lse,
)
from vlmkernels.backends.triton._launch import LAUNCHES, Launch, Layout
from vlmkernels.backends.triton._product import Config, aligned_matrix, generation

#: The most rows of either side.
FEW_PAIRS = 2048
#: How many log-sum-exps a program puts together.
MERGED = 64


@triton.jit
def _weighted_lse(
    share_ptr, shift_ptr, lse_ptr, weight_ptr, block, tiles, size, stride_tiles, stride_size,
    BLOCK: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """A block of the log-sum-exps, written, and its weighted sum."""
    offs_s = block * BLOCK_S + tl.arange(0, BLOCK_S)
    mask_s = offs_s < size
    lse = merged_lse(
        share_ptr, shift_ptr, lse_ptr, offs_s, mask_s, tiles, size, stride_tiles, stride_size, BLOCK, False, BLOCK_T, BLOCK_S
    )  # fmt: skip
    tl.store(lse_ptr + offs_s, lse, mask=mask_s)
    return tl.sum(tl.where(mask_s, tl.load(weight_ptr + offs_s, mask=mask_s, other=0.0) * lse, 0.0))


@triton.jit
def _few_merge_kernel(
    share_a_ptr, share_b_ptr, shift_ptr, picked_ptr, row_ptr, column_ptr, lse_a_ptr, lse_b_ptr, partial_ptr, count_ptr,
    of_rows_ptr, loss_ptr, M, N, tiles_m, tiles_n,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_S: tl.constexpr, BLOCK_P: tl.constexpr,
):  # fmt: skip
    """The log-sum-exps, of rows first, a block by each program; the last to end adds up the loss."""
    pid = tl.program_id(0)
    blocks_m, blocks_n = tl.cdiv(M, BLOCK_S), tl.cdiv(N, BLOCK_S)
    if pid < blocks_m:
        part = _weighted_lse(
            share_a_ptr, shift_ptr, lse_a_ptr, row_ptr, pid, tiles_n, M, 1, tiles_n, BLOCK_M, BLOCK_T, BLOCK_S
        )  # fmt: skip
    else:
        part = _weighted_lse(
            share_b_ptr, shift_ptr, lse_b_ptr, column_ptr, pid - blocks_m, tiles_m, N, tiles_n, 1, BLOCK_N, BLOCK_T, BLOCK_S
        )  # fmt: skip
    tl.store(partial_ptr + pid, part)
    tl.debug_barrier()
    if tl.atomic_add(count_ptr, 1) == blocks_m + blocks_n - 1:
        of_rows = _sum(partial_ptr, blocks_m, BLOCK_P) - _sum(picked_ptr, tiles_m * tiles_n, BLOCK_P)
        tl.store(of_rows_ptr, of_rows)
        tl.store(loss_ptr, of_rows + _sum(partial_ptr + blocks_m, blocks_n, BLOCK_P))


@triton.jit
def _sum(ptr, size, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        total += tl.load(ptr + offs, mask=offs < size, other=0.0)
    return tl.sum(total)


@triton.jit
def _most(ptr, size, BLOCK: tl.constexpr):
    most = tl.zeros([BLOCK], tl.float32)
    for first in range(0, size, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        most = tl.maximum(most, tl.load(ptr + offs, mask=offs < size, other=0.0))
    return tl.max(most)


@triton.jit
def _weigh(lse_ptr, weight_ptr, out_ptr, size, gain, BLOCK: tl.constexpr):
    for first in range(0, size, BLOCK):
        offs = first + tl.arange(0, BLOCK)
        mask = offs < size
        weight = tl.load(weight_ptr + offs, mask=mask, other=1.0) * gain
        tl.store(out_ptr + offs, tl.load(lse_ptr + offs, mask=mask, other=0.0) - tl.log2(weight) * LN2, mask=mask)


@triton.jit
def _few_prepare_kernel(
    dloss_ptr, scale_ptr, row_ptr, column_ptr, lse_a_ptr, lse_b_ptr, out_a_ptr, out_b_ptr, gain_ptr, factor_ptr, times_ptr,
    M, N, BLOCK: tl.constexpr,
):  # fmt: skip
    """What the gradients of the logits are multiplied by in their panel, and by what they are then; the log-sum-exps less the
    logarithms of ``gain`` times their weights, as ``_clip_bwd_kernel`` takes them. By one program."""
    gain = 1.0 / tl.maximum(tl.maximum(_most(row_ptr, M, BLOCK), _most(column_ptr, N, BLOCK)), 1e-30)
    times = tl.load(dloss_ptr).to(tl.float32) / gain
    tl.store(gain_ptr, gain)
    tl.store(times_ptr, times)
    tl.store(factor_ptr, times * tl.load(scale_ptr).to(tl.float32))
    _weigh(lse_a_ptr, row_ptr, out_a_ptr, M, gain, BLOCK)
    _weigh(lse_b_ptr, column_ptr, out_b_ptr, N, gain, BLOCK)


@triton.jit
def _panel_product(
    g_ptr, x_ptr, offs_r, offs_d, end_r, end_k, depth, stride_r, stride_k, stride_x, EXACT: tl.constexpr,
    D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """A tile of ``g @ x``; with EXACT of ``g`` in fp32, as the sum of two numbers of the type of ``x``.

    The panel may end behind the rows and the depth, with zeros.
    """
    acc = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for first in range(0, depth, BLOCK_K):
        offs_k = first + tl.arange(0, BLOCK_K)
        places = offs_r[:, None] * stride_r + offs_k[None, :] * stride_k
        g = tl.load(g_ptr + places, mask=(offs_r < end_r)[:, None] & (offs_k < end_k)[None, :], other=0.0)
        mask = (offs_k < depth)[:, None] & (offs_d < D)[None, :]
        x = tl.load(x_ptr + offs_k.to(tl.int64)[:, None] * stride_x + offs_d[None, :], mask=mask, other=0.0)
        high = g.to(x.dtype)
        acc = tl.dot(high, x, acc)
        if EXACT:
            acc = tl.dot((g - high.to(tl.float32)).to(x.dtype), x, acc)
    return acc


@triton.jit
def _few_gradients_kernel(
    g_ptr, a_ptr, b_ptr, factor_ptr, partial_ptr, times_ptr, da_ptr, db_ptr, loss_ptr, numbers_ptr,
    M, N, programs, stride_partial, stride_g, stride_a, stride_b, weight, EXACT: tl.constexpr,
    D: tl.constexpr, KINDS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_K: tl.constexpr,
    BLOCK_P: tl.constexpr,
):  # fmt: skip
    """``factor weight`` times ``g @ b``, tiles of which come first, and ``g.T @ a``, or with EXACT these themselves; the first
    program adds up numbers."""
    blocks_d: tl.constexpr = (D + BLOCK_D - 1) // BLOCK_D
    tiles_a = tl.cdiv(M, BLOCK_R) * blocks_d
    pid = tl.program_id(0)
    offs_d = pid % blocks_d * BLOCK_D + tl.arange(0, BLOCK_D)
    factor = 1.0 if EXACT else tl.load(factor_ptr).to(tl.float32) * weight
    if pid < tiles_a:
        offs_r = pid // blocks_d * BLOCK_R + tl.arange(0, BLOCK_R)
        acc = _panel_product(
            g_ptr, b_ptr, offs_r, offs_d, M, stride_g, N, stride_g, 1, stride_b, EXACT, D, BLOCK_R, BLOCK_D, BLOCK_K
        )  # fmt: skip
        mask = (offs_r < M)[:, None] & (offs_d < D)[None, :]
        tl.store(da_ptr + offs_r[:, None] * D + offs_d[None, :], (acc * factor).to(da_ptr.dtype.element_ty), mask=mask)
    else:
        offs_r = (pid - tiles_a) // blocks_d * BLOCK_R + tl.arange(0, BLOCK_R)
        acc = _panel_product(
            g_ptr, a_ptr, offs_r, offs_d, stride_g, M, M, 1, stride_g, stride_a, EXACT, D, BLOCK_R, BLOCK_D, BLOCK_K
        )  # fmt: skip
        mask = (offs_r < N)[:, None] & (offs_d < D)[None, :]
        tl.store(db_ptr + offs_r[:, None] * D + offs_d[None, :], (acc * factor).to(db_ptr.dtype.element_ty), mask=mask)
    if pid == 0:
        times = weight
        if times_ptr is not None:
            times *= tl.load(times_ptr)
        for kind in tl.static_range(KINDS):
            number = _sum(partial_ptr + kind * stride_partial, programs, BLOCK_P) * times
            if loss_ptr is None:
                tl.store(numbers_ptr + kind, number)
            elif kind == 0:
                tl.store(loss_ptr, number)
            else:
                tl.store(numbers_ptr + kind - 1, number)


@triton.jit
def _through_norm(grad_ptr, x_ptr, inverse, factor, out_ptr, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """A row's gradient without what lies along the row, which was divided by its length."""
    offs_d = tl.arange(0, BLOCK_D)
    grad = tl.load(grad_ptr + offs_d, mask=offs_d < D, other=0.0)
    unit = tl.load(x_ptr + offs_d, mask=offs_d < D, other=0.0).to(tl.float32) * inverse
    grad = (grad - unit * tl.sum(unit * grad)) * factor
    tl.store(out_ptr + offs_d, grad.to(out_ptr.dtype.element_ty), mask=offs_d < D)


@triton.jit
def _few_norm_kernel(
    grad_a_ptr, grad_b_ptr, a_ptr, b_ptr, inverse_a_ptr, inverse_b_ptr, factor_ptr, da_ptr, db_ptr,
    M, stride_a, stride_b, weight, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The gradients of rows that were divided by their lengths, a program for each row of ``a`` and of ``b``."""
    row = tl.program_id(0).to(tl.int64)
    factor = tl.load(factor_ptr).to(tl.float32) * weight
    if row < M:
        inverse = tl.load(inverse_a_ptr + row)
        _through_norm(grad_a_ptr + row * D, a_ptr + row * stride_a, inverse, factor, da_ptr + row * D, D, BLOCK_D)
    else:
        row -= M
        inverse = tl.load(inverse_b_ptr + row)
        _through_norm(grad_b_ptr + row * D, b_ptr + row * stride_b, inverse, factor, db_ptr + row * D, D, BLOCK_D)


def few(a: Tensor, b: Tensor) -> bool:
    """Whether these kernels take features like these."""
    return a.dtype != torch.float32 and max(len(a), len(b)) <= FEW_PAIRS


def _configs(device: torch.device, pairs: int) -> tuple[Config, Config]:
    """Of tiles of logits and of tiles of gradients.

    With 128 x 128 and 128 x 64 a step of CLIP's loss of 768 pairs takes 39 us and not 32, with 64 x 64 one of 2048 pairs of 1152
    channels 131 and not 110 (H200). Where four warps have no wgmma they spill registers.
    """
    if INTERPRETED:
        return (Config(32, 32, 64, 4, 1),) * 2
    warps, stages = (4, 4) if generation(device) >= 9 else (8, 3)
    if pairs <= 1024:
        return (Config(64, 64, 64, warps, stages),) * 2
    return Config(128, 128, 64, 8, 3), Config(128, 64, 64, warps, stages)


class _Pairs:
    """What every launch for such features has in common, and the gradients of the features.

    Where features are divided by their lengths, the gradients of logits stay in fp32: that of a pair that belongs together is
    most of its row's, and of a row's gradient what lies along the row is taken away, but not of an error.
    """

    def __init__(self, device: torch.device, m: int, n: int, dim: int, stride_a: int, stride_b: int, normed: bool) -> None:
        self.m, self.n, self.dim, self.strides, self.normed = m, n, dim, (stride_a, stride_b), normed
        self.config, self.products = _configs(device, max(m, n))
        c = self.config
        self.tiles = cdiv(m, c.block_m), cdiv(n, c.block_n)
        self.programs = self.tiles[0] * self.tiles[1]
        self.room = cdiv(self.programs, 4) * 4  # numbers of one kind: the next begins at a multiple of 16 bytes
        self.panel_stride = cdiv(n, 16) * 16
        use_tma = not INTERPRETED and generation(device) >= 9
        blocks = ((m, stride_a, c.block_m), (n, stride_b, c.block_n))
        self.descriptors: dict[int, Layout] = {
            i: ([size, dim], [stride, 1], [block, c.block_k]) for i, (size, stride, block) in enumerate(blocks) if use_tma
        }
        self.options: dict[str, Any] = {
            "D": dim, "EVEN": not m % c.block_m and not n % c.block_n, "USE_TMA": use_tma, "BLOCK_M": c.block_m,
            "BLOCK_N": c.block_n, "BLOCK_K": c.block_k, "GROUP": GROUPED, "num_warps": c.warps, "num_stages": c.stages,
        }  # fmt: skip

    def panel(self, like: Tensor) -> Tensor:
        shape = self.m, self.panel_stride
        return like.new_empty(shape, dtype=torch.float32) if self.normed else like.new_empty(shape)

    def launch(self, kernel: Any, place: tuple[int, ...], rest: tuple[float, ...], **options: Any) -> Launch:
        """Of a program for each tile of logits."""
        scalars = (*place, self.m, self.n, *self.strides, *rest)
        return Launch(kernel, (self.programs,), scalars, self.descriptors, **self.options, **options)

    def gradients(self, kinds: int, weight: float, dtypes: tuple[torch.dtype, ...]) -> Callable[..., tuple[Tensor, Tensor]]:
        """Makes the gradients of ``a`` and ``b``, of these types, and adds up so many kinds of numbers."""
        c, m, n, dim = self.products, self.m, self.n, self.dim
        block_d = min(c.block_n, max(16, next_power_of_2(dim)))
        grid = (cdiv(m, c.block_m) + cdiv(n, c.block_m)) * cdiv(dim, block_d)
        products = Launch(
            _few_gradients_kernel, (grid,), (m, n, self.programs, self.room, self.panel_stride, *self.strides, weight),
            EXACT=self.normed, D=dim, KINDS=kinds, BLOCK_R=c.block_m, BLOCK_D=block_d, BLOCK_K=c.block_k, BLOCK_P=256,
            num_warps=c.warps, num_stages=c.stages,
        )  # fmt: skip
        through_norms = Launch(
            _few_norm_kernel, (m + n,), (m, *self.strides, weight), D=dim, BLOCK_D=next_power_of_2(dim), num_warps=4
        )

        def run(
            g: Tensor, a: Tensor, b: Tensor, inverse: tuple[Tensor | None, ...], factor: Tensor, *numbers: Tensor | None
        ) -> tuple[Tensor, Tensor]:
            partial, times, loss, sums = numbers
            da, db = a.new_empty(m, dim, dtype=dtypes[0]), b.new_empty(n, dim, dtype=dtypes[1])
            if not self.normed:
                products(g, a, b, factor, partial, times, da, db, loss, sums)
                return da, db
            grad_a, grad_b = g.new_empty(m, dim), g.new_empty(n, dim)
            products(g, a, b, factor, partial, times, grad_a, grad_b, loss, sums)
            through_norms(grad_a, grad_b, a, b, *inverse, factor, da, db)
            return da, db

        return run


@functools.lru_cache(maxsize=LAUNCHES)
def _clip_fwd(
    device: torch.device, dtypes: tuple[torch.dtype, ...], sizes: tuple[Any, ...], smooth: tuple[float, float]
) -> Callable[..., tuple[Tensor, ...]]:
    s = _Pairs(device, *sizes)
    c, (tiles_m, tiles_n) = s.config, s.tiles
    logits = s.launch(_clip_fwd_kernel, (0, s.m), smooth, SMOOTH=smooth[0] != 0)
    blocks = cdiv(s.m, MERGED) + cdiv(s.n, MERGED)
    merge = Launch(
        _few_merge_kernel, (blocks,), (s.m, s.n, tiles_m, tiles_n),
        BLOCK_M=c.block_m, BLOCK_N=c.block_n, BLOCK_T=16, BLOCK_S=MERGED, BLOCK_P=256, num_warps=4,
    )  # fmt: skip

    def run(a: Tensor, b: Tensor, inverse: tuple[Tensor | None, ...], *vectors: Tensor) -> tuple[Tensor, ...]:
        row, column = vectors[3], vectors[5]
        share_a, share_b, shift = row.new_empty(tiles_n * s.m), row.new_empty(tiles_m * s.n), row.new_empty(2, s.room)
        partial, count = row.new_empty(blocks), row.new_empty(1, dtype=torch.int32)
        lse_a, lse_b, of_rows, loss = row.new_empty(s.m), row.new_empty(s.n), row.new_empty(()), row.new_empty(())
        logits(a, b, *inverse, *vectors, share_a, share_b, shift[0], shift[1], count)
        merge(share_a, share_b, shift[0], shift[1], row, column, lse_a, lse_b, partial, count, of_rows, loss)
        return lse_a, lse_b, of_rows, loss

    return run


@functools.lru_cache(maxsize=LAUNCHES)
def _clip_bwd(
    device: torch.device, dtypes: tuple[torch.dtype, ...], sizes: tuple[Any, ...], smooth: tuple[float, float]
) -> Callable[..., tuple[Tensor, Tensor, Tensor]]:
    s = _Pairs(device, *sizes)
    prepare = Launch(_few_prepare_kernel, (1,), (s.m, s.n), BLOCK=64 if INTERPRETED else 1024, num_warps=8)
    panel = s.launch(_clip_bwd_kernel, (0, s.m, 0, s.n), (s.panel_stride, *smooth), SMOOTH=smooth[0] != 0)
    gradients = s.gradients(1, 1.0, dtypes[-2:])

    def run(
        dloss: Tensor, a: Tensor, b: Tensor, inverse: tuple[Tensor | None, ...], *vectors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        scale, *ranges, row, row_positive, column, column_positive, lse_a, lse_b = vectors
        g, partial, numbers, dscale = s.panel(a), row.new_empty(s.room), row.new_empty(3, 4), row.new_empty(())
        gain, factor, times = numbers.unbind()
        shifted_a, shifted_b = row.new_empty(s.m), row.new_empty(s.n)
        prepare(dloss, scale, row, column, lse_a, lse_b, shifted_a, shifted_b, gain, factor, times)
        weights = row, row_positive, column, column_positive, shifted_a, shifted_b
        panel(a, b, *inverse, scale, gain, *ranges, *weights, g, partial)
        return *gradients(g, a, b, inverse, factor, partial, times, None, dscale), dscale

    return run


@functools.lru_cache(maxsize=LAUNCHES)
def _siglip(
    device: torch.device, dtypes: tuple[torch.dtype, ...], sizes: tuple[Any, ...], weight: float
) -> Callable[..., tuple[Tensor, Tensor, Tensor, Tensor]]:
    s = _Pairs(device, *sizes)
    panel = s.launch(_siglip_kernel, (0, s.m, 0, s.n), (s.panel_stride,), GRADS=True)
    gradients = s.gradients(3, weight, dtypes[-2:])

    def run(
        a: Tensor, b: Tensor, inverse: tuple[Tensor | None, ...], scale: Tensor, *rest: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        partial = a.new_empty(3, s.room, dtype=torch.float32)
        g, loss, numbers = s.panel(a), partial.new_empty(()), partial.new_empty(2)
        panel(a, b, *inverse, scale, *rest, g, *partial.unbind())
        da, db = gradients(g, a, b, inverse, scale, partial, None, loss, numbers)
        return loss, da, db, numbers

    return run


def _sizes(a: Tensor, b: Tensor, inverse_a: Tensor | None) -> tuple[Any, ...]:
    return len(a), len(b), a.shape[1], a.stride(0), b.stride(0), inverse_a is not None


def clip_loss_fwd(a: Tensor, b: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    """As ``contrastive.clip_loss_fwd``, of few pairs."""
    *vectors, inverse_a, inverse_b, smooth_row, smooth_column = rest
    a, b = aligned_matrix(a), aligned_matrix(b)
    run = _clip_fwd(a.device, (a.dtype, scale.dtype), _sizes(a, b, inverse_a), (smooth_row, smooth_column))
    return run(a, b, (inverse_a, inverse_b), scale, *vectors)


def clip_loss_bwd(dloss: Tensor, a: Tensor, b: Tensor, scale: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    """As ``contrastive.clip_loss_bwd``, of few pairs."""
    *vectors, inverse_a, inverse_b, lse_a, lse_b, smooth_row, smooth_column, dtype_b = rest
    a, b = aligned_matrix(a), aligned_matrix(b)
    dtypes = dloss.dtype, scale.dtype, a.dtype, dtype_b
    run = _clip_bwd(a.device, dtypes, _sizes(a, b, inverse_a), (smooth_row, smooth_column))
    return run(dloss, a, b, (inverse_a, inverse_b), scale, *vectors, lse_a, lse_b)


def siglip_loss_fwd(a: Tensor, b: Tensor, scale: Tensor, bias: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As ``contrastive.siglip_loss_fwd`` with gradients, of few pairs."""
    start, stop, inverse_a, inverse_b, weight, _, *dtypes = rest
    a, b = aligned_matrix(a), aligned_matrix(b)
    run = _siglip(a.device, (a.dtype, scale.dtype, bias.dtype, *dtypes), _sizes(a, b, inverse_a), weight)
    return run(a, b, (inverse_a, inverse_b), scale, bias, start, stop)

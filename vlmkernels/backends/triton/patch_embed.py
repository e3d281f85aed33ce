# SPDX-License-Identifier: Apache-2.0
"""Patch embedding in Triton: cut the pixels into a matrix of patches, multiply with everything added in the epilogue, normalise.

Three kernels at most. The first writes the matrix of patches once, normalised, in the weight's dtype and with rows that TMA can
read; rows that are a matrix already skip it. The second is a persistent matrix product (TMA from sm_90 on) that adds bias and
position and writes each row behind its image's prefix tokens; where nothing but a bias is added, it is torch's product instead.
The third is the LayerNorm, in place. docs/patch_embed.md says why.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from vlmkernels.backends.triton import cdiv, contiguous, multiprocessors, next_power_of_2
from vlmkernels.backends.triton._launch import LAUNCHES, Launch
from vlmkernels.backends.triton._patch_embed_bwd import add_shares, leave_out_prefix, row_gradients
from vlmkernels.backends.triton._patch_embed_cut import (
    CHANNELS_FIRST,
    Cut,
    columns_of,
    cut_of,
    matrix_of,
    written,
)
from vlmkernels.backends.triton._product import generation, product_tile
from vlmkernels.backends.triton._still import fold


@triton.jit
def _store_tile(
    acc, bias_ptr, pos_ptr, out_ptr, out_row, pos_row, mask_m, first_n, D: tl.constexpr, BLOCK_N: tl.constexpr
):  # fmt: skip
    offs_n = first_n + tl.arange(0, BLOCK_N)
    mask = mask_m[:, None] & (offs_n < D)[None, :]
    if bias_ptr is not None:
        acc += tl.load(bias_ptr + offs_n, mask=offs_n < D, other=0.0).to(tl.float32)[None, :]
    if pos_ptr is not None:
        acc += tl.load(pos_ptr + pos_row[:, None] + offs_n[None, :], mask=mask, other=0.0).to(tl.float32)
    tl.store(out_ptr + (out_row * D)[:, None] + offs_n[None, :], acc.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _patch_embed_gemm_kernel(
    a_src, w_src, bias_ptr, prefix_ptr, pos_ptr, out_ptr,
    M, batch, n_tokens, n_prefix,
    stride_am, stride_wd, stride_pos_b, stride_pos_n,
    D: tl.constexpr, K: tl.constexpr,
    POS_ON_PREFIX: tl.constexpr, USE_TMA: tl.constexpr, SPLIT: tl.constexpr, ONE_SEAM: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    pid = tl.program_id(0)
    programs = tl.num_programs(0)
    if prefix_ptr is not None:
        for row in range(pid, batch * n_prefix, programs):
            b = (row // n_prefix).to(tl.int64)
            i = row % n_prefix
            for first_d in range(0, D, BLOCK_N):
                offs_d = first_d + tl.arange(0, BLOCK_N)
                token = tl.load(prefix_ptr + i * D + offs_d, mask=offs_d < D).to(tl.float32)
                if POS_ON_PREFIX:
                    token += tl.load(pos_ptr + b * stride_pos_b + i * stride_pos_n + offs_d, mask=offs_d < D).to(tl.float32)
                tl.store(out_ptr + (b * n_tokens + i) * D + offs_d, token.to(out_ptr.dtype.element_ty), mask=offs_d < D)

    # Neighbouring programs take the tiles of one row block: A is read from memory once, and the weight stays in L2.
    n_patches = n_tokens - n_prefix
    tiles_n: tl.constexpr = (D + BLOCK_N - 1) // BLOCK_N
    tiles = tl.cdiv(M, BLOCK_M) * tiles_n
    for tile in tl.range(pid, tiles, programs, flatten=True):
        first_m = tile // tiles_n * BLOCK_M
        first_n = tile % tiles_n * BLOCK_N
        offs_m = first_m + tl.arange(0, BLOCK_M)
        acc = product_tile(
            a_src, w_src, M, stride_am, stride_wd, first_m, first_n, 0, K, D, K, USE_TMA, BLOCK_M, BLOCK_N, BLOCK_K
        )  # fmt: skip

        # The image and the patch of each row. A division by row costs more than the additions that the tile's epilogue does.
        n = first_m % n_patches + tl.arange(0, BLOCK_M)
        seams = (n >= n_patches).to(tl.int32) if ONE_SEAM else n // n_patches
        n -= seams * n_patches
        b = (first_m // n_patches + seams).to(tl.int64)
        out_row = b * n_tokens + n_prefix + n
        pos_row = b * stride_pos_b + (n + n_prefix if POS_ON_PREFIX else n) * stride_pos_n
        mask_m = offs_m < M
        if SPLIT:
            left, right = tl.split(tl.permute(tl.reshape(acc, (BLOCK_M, 2, BLOCK_N // 2)), (0, 2, 1)))
            _store_tile(left, bias_ptr, pos_ptr, out_ptr, out_row, pos_row, mask_m, first_n, D, BLOCK_N // 2)
            _store_tile(right, bias_ptr, pos_ptr, out_ptr, out_row, pos_row, mask_m, first_n + BLOCK_N // 2, D, BLOCK_N // 2)
        else:
            _store_tile(acc, bias_ptr, pos_ptr, out_ptr, out_row, pos_row, mask_m, first_n, D, BLOCK_N)


@triton.jit
def _patch_embed_norm_fwd_kernel(
    x_ptr, y_ptr, weight_ptr, bias_ptr, rows, eps, D: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr
):  # fmt: skip
    """LayerNorm of rows of D; y may be x."""
    offs_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    mask = (offs_r < rows)[:, None] & mask_d[None, :]
    offs = offs_r.to(tl.int64)[:, None] * D + offs_d[None, :]
    x = tl.load(x_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    centred = tl.where(mask_d[None, :], x - (tl.sum(x, 1) / D)[:, None], 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, 1) / D + eps)
    y = centred * rstd[:, None] * tl.load(weight_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    if bias_ptr is not None:
        y += tl.load(bias_ptr + offs_d, mask=mask_d, other=0.0).to(tl.float32)[None, :]
    tl.store(y_ptr + offs, y.to(y_ptr.dtype.element_ty), mask=mask)


class GemmConfig(NamedTuple):
    """Tile, warps and pipeline stages of the matrix product, and how many of its programs share a multiprocessor."""

    block_m: int
    block_n: int
    block_k: int
    warps: int
    stages: int
    programs: int


# From large tiles to small: the first that gives every multiprocessor work is taken, so one image doesn't run on 20 of 132.
TMA_CONFIGS = (GemmConfig(128, 256, 64, 8, 3, 1), GemmConfig(128, 128, 64, 4, 3, 2), GemmConfig(64, 64, 64, 4, 4, 3))
CP_ASYNC_CONFIGS = (GemmConfig(128, 128, 64, 8, 3, 1), GemmConfig(64, 64, 64, 4, 3, 2))
# Products of fp32 without tensor cores.
FP32_CONFIGS = (GemmConfig(64, 64, 32, 8, 2, 2),)


def _gemm_config(m: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[GemmConfig, bool]:
    use_tma = dtype != torch.float32 and m > 0 and generation(device) >= 9
    configs = FP32_CONFIGS if dtype == torch.float32 else TMA_CONFIGS if use_tma else CP_ASYNC_CONFIGS
    for config in configs:
        if cdiv(m, config.block_m) * cdiv(dim, config.block_n) >= multiprocessors(device):
            break
    return config._replace(block_n=min(config.block_n, max(16, next_power_of_2(dim)))), use_tma


def _plain_product(pixels_cut: Cut, weight_cut: Cut, shape: tuple[int, ...]) -> Callable[..., tuple[Tensor, None]]:
    """The plan that leaves the product of pixels and weight to torch, with bias.

    With nothing to add behind its product, cuBLAS is faster than the kernel here: 290 us against 428 for [65536, 1176] times
    [1176, 1280] (H100, bf16). Both must have rows at multiples of 16 bytes, as the cut leaves them: with 588 columns it takes
    171 us behind the cut, and more than 500 on rows as they lie, 8 bytes off each other.
    """

    def plan(patches: Tensor, weight: Tensor, bias: Tensor | None, *_: None) -> tuple[Tensor, None]:
        matrices = []
        for x, cut in ((patches, pixels_cut), (weight, weight_cut)):
            matrices.append(written(x, cut, weight).as_strided((cut.m, cut.k), (cut.stride, 1)))
        return F.linear(*matrices, bias).view(shape), None

    return plan


@functools.lru_cache(maxsize=LAUNCHES)
def _gemm_launch(
    device: torch.device, dtype: torch.dtype, m: int, k: int, stride_a: int, stride_w: int, out_shape: tuple[int, ...],
    n_prefix: int, has_bias: bool, has_prefix: bool, pos_shape: torch.Size | None, pos_strides: tuple[int, ...],
) -> Launch:  # fmt: skip
    batch, n_tokens, dim = out_shape
    config, use_tma = _gemm_config(m, dim, dtype, device)
    tiles = cdiv(m, config.block_m) * cdiv(dim, config.block_n)
    scalars = (
        m, batch, n_tokens, n_prefix, stride_a, stride_w,
        pos_strides[0] if len(pos_strides) == 3 else 0, pos_strides[-2] if pos_strides else 0,
    )  # fmt: skip
    descriptors = {}
    if use_tma:
        descriptors[0] = ([m, k], [stride_a, 1], [config.block_m, config.block_k])
        descriptors[1] = ([dim, k], [stride_w, 1], [config.block_n, config.block_k])
    return Launch(
        _patch_embed_gemm_kernel, (max(1, min(tiles, multiprocessors(device) * config.programs)),), scalars, descriptors,
        D=dim, K=k, POS_ON_PREFIX=pos_shape is not None and pos_shape[-2] == n_tokens, USE_TMA=use_tma,
        SPLIT=config.block_n >= 128, ONE_SEAM=n_tokens - n_prefix >= config.block_m,
        BLOCK_M=config.block_m, BLOCK_N=config.block_n, BLOCK_K=config.block_k,
        num_warps=config.warps, num_stages=config.stages,
    )  # fmt: skip


def _norm_warps(block_d: int) -> int:
    return 4 if block_d <= 1024 else 8 if block_d <= 4096 else 16


@functools.lru_cache(maxsize=LAUNCHES)
def _norm_launch(device: torch.device, dtype: torch.dtype, rows: int, dim: int, has_bias: bool, eps: float) -> Launch:
    block_d = next_power_of_2(dim)
    block_r = max(1, min(4, 4096 // block_d))
    return Launch(
        _patch_embed_norm_fwd_kernel, (cdiv(rows, block_r),), (rows, eps),
        D=dim, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=_norm_warps(block_d),
    )  # fmt: skip


def _why_not(patches: Tensor, weight: Tensor) -> str | None:
    if torch.float64 in (patches.dtype, weight.dtype):
        return "it has no float64"
    if patches.shape[:4].numel() >= 2**31:
        return "it counts patches in 32 bits"
    return None


def why_not_patch_embed_fwd(patches: Tensor, weight: Tensor, *rest: object) -> str | None:
    return _why_not(patches, weight)


def why_not_patch_embed_bwd(grad: Tensor, patches: Tensor, weight: Tensor, *rest: object) -> str | None:
    return _why_not(patches, weight)


def patch_embed_fwd(
    patches: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    prefix_tokens: Tensor | None,
    pos_embed: Tensor | None,
    norm_weight: Tensor | None,
    norm_bias: Tensor | None,
    eps: float,
    mean: list[float] | None,
    std: list[float] | None,
    keep_total: bool,
) -> tuple[Tensor, Tensor]:
    if patches.shape[5] != weight.shape[2]:
        weight, bias, mean, std = fold(weight, bias, mean, std)
    bias, prefix_tokens, norm_weight, norm_bias = map(contiguous, (bias, prefix_tokens, norm_weight, norm_bias))
    if pos_embed is not None and pos_embed.stride(-1) != 1:
        pos_embed = pos_embed.contiguous()
    tensors = (patches, weight, bias, prefix_tokens, pos_embed, norm_weight, norm_bias)
    plan = plan_patch_embed_fwd(*tensors, eps, mean, std, keep_total)
    assert plan is not None  # all that a plan would copy is copied
    out, total = plan(*tensors)
    return out, weight.new_empty(0) if total is None else total


def plan_patch_embed_fwd(
    patches: Tensor, weight: Tensor, bias: Tensor | None, prefix_tokens: Tensor | None, pos_embed: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, mean: list[float] | None, std: list[float] | None,
    keep_total: bool,
) -> Callable[..., tuple[Tensor, Tensor | None]] | None:  # fmt: skip
    """The plan, or None where a parameter must be copied first. It returns no total unless that is to be kept."""
    vectors = (bias, prefix_tokens, norm_weight, norm_bias)
    if not all(x is None or x.is_contiguous() for x in vectors):
        return None
    if pos_embed is not None and pos_embed.stride(-1) != 1 and not pos_embed.is_contiguous():
        return None
    if patches.shape[5] != weight.shape[2]:
        return None
    dtype, device, columns = weight.dtype, weight.device, columns_of(patches)
    n_prefix = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    shape = patches.shape[0], n_prefix + patches.shape[1:4].numel(), weight.shape[0]
    empty = 0 in shape
    pixels_cut, weight_cut = cut_of(patches, columns, dtype, mean, std), cut_of(weight, columns, dtype)
    added = (prefix_tokens, pos_embed, norm_weight)
    if dtype.itemsize == 2 and all(x is None for x in added) and not keep_total and not empty:
        # Products of fp32 stay: torch may be set to round their operands to TF32.
        return _plain_product(pixels_cut, weight_cut, shape)
    pos = (None, ()) if pos_embed is None else (pos_embed.shape, pos_embed.stride())
    gemm = _gemm_launch(
        device, dtype, pixels_cut.m, pixels_cut.k, pixels_cut.stride, weight_cut.stride, shape, n_prefix, bias is not None,
        prefix_tokens is not None, *pos,
    )  # fmt: skip
    norm = None
    if norm_weight is not None:
        norm = _norm_launch(device, dtype, shape[0] * shape[1], shape[2], norm_bias is not None, eps)

    def plan(
        patches: Tensor, weight: Tensor, bias: Tensor | None, prefix_tokens: Tensor | None, pos_embed: Tensor | None,
        norm_weight: Tensor | None, norm_bias: Tensor | None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        out = weight.new_empty(*shape)
        total = weight.new_empty(*shape) if keep_total else out
        if empty:
            return out, total if keep_total else None
        a, w = written(patches, pixels_cut, weight), written(weight, weight_cut, weight)
        gemm(a, w, bias, prefix_tokens, pos_embed, total)
        if norm is not None:
            norm(total, out, norm_weight, norm_bias)
        return out, total if keep_total else None

    return plan


def patch_embed_bwd(
    grad: Tensor,
    patches: Tensor,
    weight: Tensor,
    norm_weight: Tensor | None,
    total: Tensor,
    eps: float,
    mean: list[float] | None,
    std: list[float] | None,
    pos_shape: list[int],
    needs: list[bool],
) -> tuple[Tensor, ...]:
    batch, n_tokens, dim = grad.shape
    n_patches, columns = patches.shape[1:4].numel(), columns_of(patches)
    n_prefix, dtype = n_tokens - n_patches, weight.dtype
    grads = [weight.new_empty(0) for _ in needs]
    first_pos = n_prefix if pos_shape and pos_shape[-2] == n_patches else 0
    own_pos = needs[4] and len(pos_shape) == 3  # every image has positions of its own
    skipped = first_pos if own_pos else n_prefix  # with a norm, d_rows leaves these rows of each image out
    # The gradient before the norm, and the rows that it has in front of the patches of each image.
    d_rows, n_front = grad.contiguous(), n_prefix if norm_weight is None else n_prefix - skipped
    gap = n_front if batch > 1 and n_patches else 0

    summed = (needs[3], needs[4] and not own_pos, needs[2], needs[5], needs[6])
    wanted = (
        norm_weight is not None and (needs[0] or needs[1] or own_pos),
        summed[0] or summed[1] or (needs[1] and gap > 0),
        any(summed[2:]),
    )
    table = None
    if any(wanted):
        positions = n_tokens if norm_weight is not None or summed[1] or summed[2] else n_prefix
        rows = row_gradients(
            d_rows, total, norm_weight, eps, n_prefix, positions, skipped, wanted, multiprocessors(weight.device)
        )
        d_rows, table = d_rows if rows.d_rows is None else rows.d_rows, rows.table
        for i, sums in zip((3, 4, 2, 5, 6), add_shares(rows, dtype, n_prefix, first_pos, summed), strict=True):
            grads[i] = grads[i] if sums is None else sums
    if own_pos:
        grads[4] = d_rows if norm_weight is not None else d_rows[:, first_pos:].clone(memory_format=torch.contiguous_format)
    if not gap:
        d_rows = d_rows[:, n_front:]
    if needs[0]:
        met = weight if patches.shape[5] == weight.shape[2] else fold(weight, None, None, None)[0]
        matrix = matrix_of(met, CHANNELS_FIRST, dtype)
        d_patches = torch.bmm(d_rows[:, gap:], matrix.expand(batch, -1, -1)) if gap else d_rows.reshape(-1, dim) @ matrix
        grads[0] = d_patches[..., : patches.shape[4:].numel()].reshape(patches.shape).to(patches.dtype)
    if needs[1]:
        a = matrix_of(patches, columns, dtype, mean, std, gap)
        product = d_rows.reshape(-1, dim).T @ a
        if gap and table is not None:
            leave_out_prefix(product, d_rows, a, table, gap)
        sizes = [patches.shape[c] for c in columns]
        d_weight = product[:, : math.prod(sizes)].unflatten(1, sizes)
        back = (0, 1, 2, 3, 4) if columns == CHANNELS_FIRST else (0, 4, 1, 2, 3)
        grads[1] = d_weight.permute(back).expand(weight.shape).contiguous()
    return tuple(grads)


def aot_cases() -> list:
    """CLIP-L/14 (cut, product and norm), SigLIP on uint8, and fp32, forward and backward."""
    from vlmkernels.backends.triton._aot import AotCase

    half, one = (0.5,) * 3, (1.0,) * 3

    def run(
        batch: int, grid: int, patch: int, dim: int, dtype: torch.dtype, pixels: torch.dtype, prefix: bool, norm: bool,
        needs: str | None = None,
    ) -> None:  # fmt: skip
        image = torch.empty((batch, 3, grid, patch, grid, patch), dtype=pixels)
        patches = image.permute(0, 2, 4, 1, 3, 5)[:, None, :, :, :, None]
        weight, vector = torch.empty((dim, 3, 1, patch, patch), dtype=dtype), torch.empty(dim, dtype=dtype)
        norms = (vector, vector) if norm else (None, None)
        affine = (half, one) if pixels == torch.uint8 else (None, None)
        n_tokens = grid * grid + prefix
        if needs is None:
            tokens, pos = torch.empty((1, dim), dtype=dtype), torch.empty((n_tokens, dim), dtype=dtype)
            patch_embed_fwd(patches, weight, vector, tokens if prefix else None, pos, *norms, 1e-5, *affine, False)
            return
        tokens = torch.empty((batch, n_tokens, dim), dtype=dtype)
        wanted = [letter in needs for letter in "xwbtpnm"]
        patch_embed_bwd(tokens, patches, weight, norms[0], tokens, 1e-5, *affine, [n_tokens, dim], wanted)

    bf16, fp16, fp32, uint8 = torch.bfloat16, torch.float16, torch.float32, torch.uint8
    # The letters are the gradients of pixels, weight, bias, prefix tokens, positions, and the norm's weight and bias.
    shapes: dict[str, tuple[Any, ...]] = {
        "CLIP-L/14@336 bf16": (128, 24, 14, 1024, bf16, bf16, True, True),
        "CLIP-L/14@336 bf16 bwd": (128, 24, 14, 1024, bf16, bf16, True, True, "xwtpnm"),
        "CLIP-L/14@336 bf16 bwd of the weight": (128, 24, 14, 1024, bf16, bf16, True, True, "w"),
        "CLIP-L/14@336 bf16 B1": (1, 24, 14, 1024, bf16, bf16, True, True),
        "CLIP-L/14@336 bf16 B8": (8, 24, 14, 1024, bf16, bf16, True, True),
        "CLIP-bigG/14 fp16 bwd": (32, 16, 14, 1664, fp16, fp16, True, True, "xwtpnm"),
        "SigLIP-So400m/14 fp16 from uint8": (64, 27, 14, 1152, fp16, uint8, False, False),
        "SigLIP-So400m/14 fp16 from uint8 bwd": (64, 27, 14, 1152, fp16, uint8, False, False, "wbp"),
        "SigLIP-So400m/14 fp16 from uint8 bwd of the bias": (64, 27, 14, 1152, fp16, uint8, False, False, "wb"),
        "ViT-B/16 bf16 from uint8": (256, 14, 16, 768, bf16, uint8, True, False),
        "ViT-B/16 bf16 from uint8 bwd": (256, 14, 16, 768, bf16, uint8, True, False, "wbtp"),
        "ViT-B/16 bf16 from uint8 bwd of the prefix": (256, 14, 16, 768, bf16, uint8, True, False, "wt"),
        "ViT-B/16 fp32": (8, 14, 16, 768, fp32, fp32, True, True),
        "ViT-B/16 fp32 bwd": (8, 14, 16, 768, fp32, fp32, True, True, "wbtpnm"),
        "ViT-B/16 fp32 bwd without norm": (8, 14, 16, 768, fp32, fp32, True, False, "wbtp"),
    }
    return [AotCase(name, functools.partial(run, *shape)) for name, shape in shapes.items()]

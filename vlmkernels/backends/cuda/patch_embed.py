# SPDX-License-Identifier: Apache-2.0
"""Patch embedding on ``csrc/patch_embed``: images in patches of 14, 16 or (of 16 bits) 32 pixels, or rows with positions, in one
kernel, and the gradients of the parameters of 16-bit images in two."""

import functools
import math
from collections.abc import Callable

import torch
from torch import Tensor

from vlmkernels.backends.cuda._library import TYPES, EntryPoint, PatchEmbedBwdParams, PatchEmbedParams

_patch_embed = EntryPoint("vlmk_patch_embed")
_check = EntryPoint("vlmk_patch_embed_check")
_patch_embed_bwd = EntryPoint("vlmk_patch_embed_bwd")
_check_bwd = EntryPoint("vlmk_patch_embed_bwd_check")


def _rows_format(patches: Tensor) -> torch.memory_format | None:
    """In which order pixels and weight lie in memory where the patches are rows; None where they are pieces of images.

    The product does not care for the order of the columns: (c, t, y, x) or (t, y, x, c), but it is the same for both.
    """
    if patches.shape[1:3] != (1, 1) or patches.shape[3] < 2 or patches.stride(3) == patches.shape[7]:
        return None
    row, formats = patches[:1, 0, 0, 0], (torch.contiguous_format, torch.channels_last_3d)
    return next((x for x in formats if row.is_contiguous(memory_format=x)), None)


def _uneven(shape: tuple[int, ...]) -> bool:
    """Whether patches, as rows, are no multiples of 16 bytes: torch's product has no fast kernel for such rows."""
    return math.prod(shape[4:]) % 8 > 0


def _folds(patches: Tensor, weight: Tensor) -> bool:
    """Whether a still image meets several frames of the weight, which the kernel doesn't add up itself."""
    own = _rows_format(patches) is not None and _uneven(patches.shape)
    return patches.shape[5] != weight.shape[2] and not own


@functools.lru_cache(maxsize=1024)
def _prepared(
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    rows: bool,
    weight_frames: int,
    pixel_dtype: torch.dtype,
    dim: int,
    dtype: torch.dtype,
    num_prefix: int,
    pos_shape: tuple[int, ...] | None,
    pos_strides: tuple[int, ...] | None,
    norm: bool,
    eps: float,
    mean: tuple[float, ...] | None,
    std: tuple[float, ...] | None,
) -> PatchEmbedParams | str:
    """All but the pointers, or why the kernel doesn't take them. A model asks for the same again and again."""
    batch, frames, grid_y, grid_x, channels, frames_of_patch, height, width = shape
    stride_b, _, stride_gy, stride_gx, stride_c, _, stride_y, stride_x = strides
    if dtype not in (torch.float16, torch.bfloat16) or pixel_dtype not in (torch.uint8, dtype):
        return f"it takes uint8 or 16-bit pixels and 16-bit weights, these are {pixel_dtype} and {dtype}"
    if rows:
        if pos_shape is None and not num_prefix and not _uneven(shape):
            return "of rows with nothing to add it is a plain product, for which torch has better"
        grid_y, stride_gy, grid_x = grid_x, stride_gx, 1
    elif frames != 1 or frames_of_patch != 1 or channels != 3 or height != width:
        return "it takes square patches of images of three channels"
    elif stride_x != 1 or (grid_x > 1 and stride_gx != width):
        return "it takes rows of pixels that are contiguous"
    if pos_strides is not None and pos_strides[-1] != 1:
        return "it takes rows of positions that are contiguous"
    params = PatchEmbedParams(
        norm_weight=1 if norm else None,  # for the check: whether there is one
        pixel_stride_b=stride_b if batch > 1 else 0,
        pixel_stride_gy=stride_gy if grid_y > 1 else 0,
        pixel_stride_c=0 if rows else stride_c,
        pixel_stride_y=0 if rows else stride_y,
        batch=batch,
        grid_y=grid_y,
        grid_x=grid_x,
        patch=0 if rows else width,
        depth=math.prod(shape[4:]) if rows else 0,
        frames=weight_frames // frames_of_patch if rows and _uneven(shape) else 1,
        frame_run=math.prod(shape[4:] if stride_c == 1 else shape[5:]) if rows else 0,
        dim=dim,
        num_prefix=num_prefix,
        pixel_type=TYPES[pixel_dtype],
        token_type=TYPES[dtype],
        eps=eps,
    )
    if pos_shape is not None and pos_strides is not None:
        params.pos_stride_b = pos_strides[0] if len(pos_shape) == 3 else 0
        params.pos_stride_n = pos_strides[-2]
        params.pos_on_prefix = num_prefix > 0 and pos_shape[-2] == num_prefix + grid_y * grid_x
    if mean is not None and std is not None:
        params.pixel_scale = tuple(1 / (255 * s) for s in std)
        params.pixel_shift = tuple(-m / s for m, s in zip(mean, std, strict=True))
    return _check.why_not(params) or params


def _prepare(
    patches: Tensor,
    weight: Tensor,
    prefix_tokens: Tensor | None,
    pos_embed: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    mean: list[float] | None,
    std: list[float] | None,
) -> PatchEmbedParams | str:
    return _prepared(
        patches.shape,
        patches.stride(),
        _rows_format(patches) is not None,
        weight.shape[2],
        patches.dtype,
        weight.shape[0],
        weight.dtype,
        0 if prefix_tokens is None else prefix_tokens.shape[0],
        None if pos_embed is None else pos_embed.shape,
        None if pos_embed is None else pos_embed.stride(),
        norm_weight is not None,
        eps,
        None if mean is None else tuple(mean),
        None if std is None else tuple(std),
    )


def why_not_patch_embed_fwd(
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
) -> str | None:
    if any(x is not None and x.data_ptr() % 16 for x in (patches, weight, prefix_tokens, pos_embed)):
        return "pixels, weight, prefix tokens and positions must begin at multiples of 16 bytes"
    prepared = _prepare(patches, weight, prefix_tokens, pos_embed, norm_weight, eps, mean, std)
    return prepared if isinstance(prepared, str) else None


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
    if _folds(patches, weight):
        # torch sums in fp32 and rounds once.
        weight = weight.sum(2, keepdim=True)
    # Kept in names until the launch: a copy's memory must not be given away before.
    weight = weight.contiguous(memory_format=_rows_format(patches) or torch.contiguous_format)
    bias, prefix_tokens = _contiguous(bias), _contiguous(prefix_tokens)
    norm_weight, norm_bias = _contiguous(norm_weight), _contiguous(norm_bias)
    tensors = (patches, weight, bias, prefix_tokens, pos_embed, norm_weight, norm_bias)
    plan = plan_patch_embed_fwd(*tensors, eps, mean, std, keep_total)
    assert plan is not None  # why_not_patch_embed_fwd was asked, and all that a plan would copy is copied
    out, total = plan(*tensors)
    if total is None:
        total = out.clone() if keep_total else weight.new_empty(0)
    return out, total


def plan_patch_embed_fwd(
    patches: Tensor, weight: Tensor, bias: Tensor | None, prefix_tokens: Tensor | None, pos_embed: Tensor | None,
    norm_weight: Tensor | None, norm_bias: Tensor | None, eps: float, mean: list[float] | None, std: list[float] | None,
    keep_total: bool,
) -> Callable[..., tuple[Tensor, Tensor | None]] | None:  # fmt: skip
    """The plan, or None where a parameter must be copied first. It returns a total where that is another than the result."""
    if not weight.is_contiguous(memory_format=_rows_format(patches) or torch.contiguous_format):
        return None
    if not all(x is None or x.is_contiguous() for x in (bias, prefix_tokens, norm_weight, norm_bias)):
        return None
    if _folds(patches, weight):
        return None
    params = _prepare(patches, weight, prefix_tokens, pos_embed, norm_weight, eps, mean, std)
    if isinstance(params, str):
        return None
    shape = params.batch, params.num_prefix + params.grid_y * params.grid_x, params.dim
    apart, empty = keep_total and norm_weight is not None, 0 in shape
    launch = _patch_embed.launcher(params, weight.device)
    # The weight in rows that the copy engine can bring, where those of the pixels are not.
    columns = -(-params.depth // 64) * 64 if params.depth % 8 else 0

    def plan(pixels: Tensor, weight: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor | None]:
        out = weight.new_empty(*shape)
        total = weight.new_empty(*shape) if apart else None
        scratch = weight.new_empty(shape[2], columns) if columns else None
        if not empty:
            launch(pixels, weight, *others, out, total, scratch)
        return out, total

    return plan


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()


@functools.lru_cache(maxsize=1024)
def _prepared_bwd(
    device: torch.device,
    shape: tuple[int, ...],
    strides: tuple[int, ...],
    weight_shape: tuple[int, ...],
    pixel_dtype: torch.dtype,
    dtype: torch.dtype,
    num_prefix: int,
    pos_prefix: int,
    norm: bool,
    eps: float,
) -> PatchEmbedBwdParams | str:
    """All but the pointers, or why the kernel doesn't take them."""
    batch, frames, grid_y, grid_x, channels, frames_of_patch, height, width = shape
    stride_b, _, stride_gy, stride_gx, stride_c, _, stride_y, stride_x = strides
    if dtype not in (torch.float16, torch.bfloat16) or pixel_dtype != dtype:
        return f"it takes pixels and weights of 16 bits, these are {pixel_dtype} and {dtype}"
    if (frames, frames_of_patch, weight_shape[2], channels) != (1, 1, 1, 3) or height != width:
        return "it takes square patches of images of three channels"
    if stride_x != 1 or (grid_x > 1 and stride_gx != width) or (grid_y > 1 and stride_gy != height * stride_y):
        return "it takes patches of images whose rows of pixels are contiguous"
    params = PatchEmbedBwdParams(
        norm_weight=1 if norm else None,  # for the check: whether there is one
        # That of one image does not matter.
        pixel_stride_b=stride_b if batch > 1 else 8,
        pixel_stride_c=stride_c,
        pixel_stride_y=stride_y,
        batch=batch,
        grid_y=grid_y,
        grid_x=grid_x,
        patch=width,
        dim=weight_shape[0],
        num_prefix=num_prefix,
        pos_prefix=pos_prefix,
        type=TYPES[dtype],
        eps=eps,
    )
    return _check_bwd.why_not(params) or params


def _prepare_bwd(
    grad: Tensor, patches: Tensor, weight: Tensor, norm: bool, eps: float, pos_shape: list[int]
) -> PatchEmbedBwdParams | str:
    n_prefix = grad.shape[1] - patches.shape[1:4].numel()
    pos_prefix = n_prefix if pos_shape and pos_shape[-2] == grad.shape[1] else 0
    layout = patches.shape, patches.stride(), weight.shape, patches.dtype, weight.dtype
    return _prepared_bwd(grad.device, *layout, n_prefix, pos_prefix, norm, eps)


def why_not_patch_embed_bwd(
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
) -> str | None:
    if needs[0] or not needs[1]:
        return "it computes the weight's gradient, with those of the other parameters, and not that of pixels"
    if patches.data_ptr() % 16:
        return "pixels must begin at multiples of 16 bytes"
    prepared = _prepare_bwd(grad, patches, weight, norm_weight is not None, eps, pos_shape)
    return prepared if isinstance(prepared, str) else None


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
    norm = norm_weight is not None
    params = _prepare_bwd(grad, patches, weight, norm, eps, pos_shape)
    assert not isinstance(params, str)  # why_not_patch_embed_bwd was asked
    dim, own_pos = weight.shape[0], needs[4] and len(pos_shape) == 3
    shapes = ((0,), weight.shape, (dim,), (params.num_prefix, dim), pos_shape, (dim,), (dim,))
    grads = [weight.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]
    if params.batch == 0:
        return tuple(x.zero_() for x in grads)
    # Kept in names until the launch: a copy's memory must not be given away before.
    grad = grad.contiguous()
    grad = grad.clone() if grad.data_ptr() % 16 else grad
    norm_weight = norm_weight.contiguous() if norm_weight is not None else None
    d_total = torch.empty_like(grad) if norm else grad
    workspace = weight.new_empty(params.workspace_bytes, dtype=torch.uint8)
    wanted = (norm and needs[5], norm and needs[6], True, needs[2], needs[3], needs[4] and not own_pos)
    outs = [x if want else None for x, want in zip((*grads[5:], *grads[1:5]), wanted, strict=True)]
    tensors = (grad, patches, total if norm else None, norm_weight, d_total if norm else None, *outs, workspace)
    _patch_embed_bwd.launcher(params, weight.device)(*tensors)
    if own_pos:  # every image has positions of its own: their gradient is that of the tokens
        grads[4].copy_(d_total[:, params.num_prefix - params.pos_prefix :])
    return tuple(grads)

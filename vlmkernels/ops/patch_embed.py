# SPDX-License-Identifier: Apache-2.0
"""Patch embedding: from pixels, or rows already cut into patches, to the token sequence that a vision transformer starts with.

Every input layout is one strided view of the pixels, ``[B, Gt, Gy, Gx, C, Pt, Py, Px]``: a grid of patches in front, one patch
behind. The registered ops take that view, so a backend knows nothing of layouts, and pixel gradients find their way back
through the view. ``Pt`` is the weight's, or 1: then the patch is a still image, whose one frame meets every frame of the weight.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlmkernels.ops._op import Op, bad_argument, forced_backend

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
LAYOUTS = ("channels_first", "channels_last", "rows")
COLUMNS = ("cyx", "yxc")
#: The tensors that a gradient can be asked for, in the order of ``needs`` and of the results of ``patch_embed_bwd``.
DIFFERENTIABLE = ("patches", "weight", "bias", "prefix_tokens", "pos_embed", "norm_weight", "norm_bias")


def _fake_fwd(
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
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, gt, gy, gx = patches.shape[:4]
    n_prefix = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    out = weight.new_empty(batch, n_prefix + gt * gy * gx, weight.shape[0])
    return out, torch.empty_like(out) if keep_total else weight.new_empty(0)


def _fake_bwd(
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
    backend: str,
) -> tuple[Tensor, ...]:
    dim, n_prefix = weight.shape[0], grad.shape[1] - math.prod(patches.shape[1:4])
    shapes = (patches.shape, weight.shape, (dim,), (n_prefix, dim), pos_shape, (dim,), (dim,))
    grads = [weight.new_empty(shape if need else (0,)) for shape, need in zip(shapes, needs, strict=True)]
    return (grads[0].to(patches.dtype) if needs[0] else grads[0], *grads[1:])


_fwd = Op(
    "patch_embed",
    "patch_embed_fwd(Tensor patches, Tensor weight, Tensor? bias, Tensor? prefix_tokens, Tensor? pos_embed, Tensor? norm_weight, "
    "Tensor? norm_bias, float eps, float[]? mean, float[]? std, bool keep_total, str backend) -> (Tensor, Tensor)",
    _fake_fwd,
)
_bwd = Op(
    "patch_embed",
    "patch_embed_bwd(Tensor grad, Tensor patches, Tensor weight, Tensor? norm_weight, Tensor total, float eps, float[]? mean, "
    "float[]? std, int[] pos_shape, bool[] needs, str backend) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
)


class _PatchEmbed(torch.autograd.Function):
    """Keeps the pixels, the weight and, with a norm, the sum that it normalises (``total``)."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        patches, weight, _, _, pos_embed, norm_weight, _, eps, mean, std, backend = args
        out: Tensor
        out, total = _fwd(*args[:-1], norm_weight is not None, backend)
        ctx.save_for_backward(patches, weight, norm_weight, total)
        ctx.constants = (eps, mean, std, [] if pos_embed is None else list(pos_embed.shape))
        ctx.backend = backend
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        patches, weight, norm_weight, total = ctx.saved_tensors
        needs = list(ctx.needs_input_grad[: len(DIFFERENTIABLE)])
        grads = _bwd(grad, patches, weight, norm_weight, total, *ctx.constants, needs, ctx.backend)
        return (*(g if need else None for g, need in zip(grads, needs, strict=True)), None, None, None, None)


class _Sizes(NamedTuple):
    """A patch: channels, frames, rows and columns of pixels."""

    channels: int
    pt: int
    py: int
    px: int

    @property
    def k(self) -> int:
        return self.channels * self.pt * self.py * self.px


def _patch_size(patch_size: int | Sequence[int]) -> tuple[int, ...]:
    if isinstance(patch_size, int) and patch_size > 0:
        return (patch_size, patch_size)
    sizes = tuple(patch_size) if isinstance(patch_size, Sequence) else (patch_size,)
    if len(sizes) not in (2, 3) or not all(isinstance(p, int) and p > 0 for p in sizes):
        raise bad_argument("patch_size", patch_size, "a positive int, (height, width), or (frames, height, width)")
    return sizes


def _weight_view(weight: Tensor, patch: tuple[int, ...], columns: str) -> Tensor:
    """The weight as ``[D, C, Pt, Py, Px]``, whatever its shape and the order of its columns."""
    pt, py, px = (1, *patch)[-3:]
    if weight.dim() == 2:
        channels, rest = divmod(weight.shape[1], pt * py * px)
        if rest or not channels:
            raise bad_argument("weight", f"shape {tuple(weight.shape)}", f"[D, K], K a multiple of {pt * py * px} (the patch)")
        if columns == "yxc":
            return weight.view(-1, pt, py, px, channels).permute(0, 4, 1, 2, 3)
        return weight.view(-1, channels, pt, py, px)
    if weight.dim() != 2 + len(patch) or weight.shape[2:] != patch:
        raise bad_argument("weight", f"shape {tuple(weight.shape)}", f"[D, K] or [D, C, {', '.join(map(str, patch))}]")
    return weight if len(patch) == 3 else weight.unsqueeze(2)


def _rows_view(rows: Tensor, sizes: _Sizes, columns: str) -> Tensor:
    still = sizes._replace(pt=1)
    if rows.dim() not in (2, 3) or rows.shape[-1] not in (sizes.k, still.k):
        wanted = f"rows [N, {sizes.k}] or [B, N, {sizes.k}] (the weight's columns)"
        if still.k != sizes.k:
            wanted += f", or {still.k} columns (one frame for all {sizes.pt})"
        raise bad_argument("pixels", f"shape {tuple(rows.shape)}", wanted)
    sizes = sizes if rows.shape[-1] == sizes.k else still
    rows = rows if rows.dim() == 3 else rows.unsqueeze(0)
    front = (rows.shape[0], 1, 1, rows.shape[1])
    if columns == "yxc":
        return rows.view(*front, *sizes[1:], sizes.channels).permute(0, 1, 2, 3, 7, 4, 5, 6)
    return rows.view(*front, *sizes)


_LETTERS = {  # of the dimensions of images, by (temporal, channels_last)
    (False, False): ("B", "C", "H", "W"),
    (False, True): ("B", "H", "W", "C"),
    (True, False): ("B", "C", "T", "H", "W"),
    (True, True): ("B", "T", "H", "W", "C"),
}


def _image_view(pixels: Tensor, sizes: _Sizes, temporal: bool, channels_last: bool) -> Tensor:
    """Images as a grid of patches; what the patch does not divide is left out at the far edges."""
    shape, (channels, pt, py, px) = pixels.shape, sizes
    letters = _LETTERS[temporal, channels_last]
    if len(shape) != len(letters):
        raise bad_argument("pixels", f"shape {tuple(shape)}", f"[{', '.join(letters)}]")
    if shape[-1 if channels_last else 1] != channels:
        raise bad_argument(
            "pixels", f"shape {tuple(shape)}", f"[{', '.join(letters)}] with C = {channels} (the weight's channels)"
        )
    first = 1 if channels_last else 2
    frames = shape[first] if temporal else 1
    height, width = shape[first + temporal], shape[first + temporal + 1]
    if frames == 1:
        pt = 1  # a still image
    gt, gy, gx = frames // pt, height // py, width // px
    if not (gt and gy and gx):
        wanted = f"at least one patch of {sizes[1:]} (frames, height, width{'; or one frame' if sizes.pt > 1 else ''})"
        raise bad_argument("pixels", f"shape {tuple(shape)}", wanted)
    # Each step costs a microsecond, which is much for a small image: slices only where there is something to leave out.
    if frames != gt * pt:
        pixels = pixels.narrow(first, 0, gt * pt)
    if height != gy * py:
        pixels = pixels.narrow(first + temporal, 0, gy * py)
    if width != gx * px:
        pixels = pixels.narrow(first + temporal + 1, 0, gx * px)
    if channels_last:
        return pixels.view(shape[0], gt, pt, gy, py, gx, px, channels).permute(0, 1, 3, 5, 7, 2, 4, 6)
    return pixels.view(shape[0], channels, gt, pt, gy, py, gx, px).permute(0, 2, 4, 6, 1, 3, 5, 7)


def _check_affine(name: str, values: Sequence[float] | None, pixels: Tensor, channels: int) -> list[float] | None:
    if (values is None) == (pixels.dtype == torch.uint8):
        wanted = (
            "one number per channel for uint8 pixels"
            if values is None
            else f"None for {pixels.dtype} pixels, taken as normalised"
        )
        raise bad_argument(name, values, wanted)
    if values is None:
        return None
    if isinstance(values, Tensor):
        raise bad_argument(name, "a tensor", "a sequence of numbers (reading a tensor would wait for the device)")
    numbers = [] if isinstance(values, (int, float)) else [float(v) for v in values]
    if len(numbers) != channels or (name == "std" and 0.0 in numbers):
        raise bad_argument(name, values, f"{channels} {'nonzero ' if name == 'std' else ''}numbers, one per channel")
    return numbers


def _check_tokens(patches: Tensor, dim: int, prefix_tokens: Tensor | None, pos_embed: Tensor | None) -> None:
    n_prefix = 0
    if prefix_tokens is not None:
        if prefix_tokens.dim() != 2 or prefix_tokens.shape[1] != dim:
            raise bad_argument("prefix_tokens", f"shape {tuple(prefix_tokens.shape)}", f"[number of prefix tokens, {dim}]")
        n_prefix = prefix_tokens.shape[0]
    if pos_embed is None:
        return
    batch, gt, gy, gx = patches.shape[:4]
    n_patches, shape = gt * gy * gx, pos_embed.shape
    fits = len(shape) == 2 or (len(shape) == 3 and shape[0] == batch)
    if not fits or shape[-1] != dim or (shape[-2] != n_patches and shape[-2] != n_patches + n_prefix):
        rows = f"{n_patches}" if not n_prefix else f"{n_patches} (patches only) or {n_patches + n_prefix} (prefix too)"
        raise bad_argument("pos_embed", f"shape {tuple(shape)}", f"[rows, {dim}] or [{batch}, rows, {dim}] with rows = {rows}")


def _check_dtypes(pixels: Tensor, weight: Tensor, others: Sequence[tuple[str, Tensor | None]]) -> None:
    dtype, device = weight.dtype, weight.device
    if dtype not in FLOATS:
        raise bad_argument("weight", dtype, "bfloat16, float16, float32 or float64")
    if pixels.dtype != dtype and pixels.dtype not in (torch.uint8, *FLOATS):
        raise bad_argument("pixels", pixels.dtype, "uint8, bfloat16, float16, float32 or float64")
    if pixels.device != device:
        raise bad_argument("pixels", f"device {pixels.device}", f"{device}, the weight's")
    for name, tensor in others:
        if tensor is not None and (tensor.dtype != dtype or tensor.device != device):
            raise bad_argument(name, f"{tensor.dtype} on {tensor.device}", f"{dtype} on {device}, as the weight")


#: The tensors of a call: pixels, weight, bias, prefix_tokens, pos_embed, norm weight and norm bias.
Tensors = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
Prepared = tuple[Tensor, Tensor, list[float] | None, list[float] | None]


def _prepare(
    tensors: Tensors,
    patch_size: int | Sequence[int],
    layout: str,
    columns: str,
    mean: Sequence[float] | None,
    std: Sequence[float] | None,
) -> Prepared:
    """Check everything, and view pixels and weight as the op takes them."""
    pixels, weight, bias, prefix_tokens, pos_embed, norm_weight, norm_bias = tensors
    patch = _patch_size(patch_size)
    if layout not in LAYOUTS:
        raise bad_argument("layout", repr(layout), f"one of {', '.join(LAYOUTS)}")
    if columns not in COLUMNS:
        raise bad_argument("columns", repr(columns), f"one of {', '.join(COLUMNS)}")
    vectors = (("bias", bias), ("norm weight", norm_weight), ("norm bias", norm_bias))
    _check_dtypes(pixels, weight, (*vectors, ("prefix_tokens", prefix_tokens), ("pos_embed", pos_embed)))
    weight = _weight_view(weight, patch, columns)
    dim, *sides = weight.shape
    sizes = _Sizes(*sides)
    for name, vector in vectors:
        if vector is not None and vector.shape != (dim,):
            raise bad_argument(name, f"shape {tuple(vector.shape)}", f"[{dim}]")
    means = stds = None
    if mean is not None or std is not None or pixels.dtype == torch.uint8:
        means, stds = _check_affine("mean", mean, pixels, sizes.channels), _check_affine("std", std, pixels, sizes.channels)
    if layout == "rows":
        patches = _rows_view(pixels, sizes, columns)
    else:
        patches = _image_view(pixels, sizes, len(patch) == 3, layout == "channels_last")
    _check_tokens(patches, dim, prefix_tokens, pos_embed)
    return patches, weight, means, stds


def patch_embed(
    pixels: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    patch_size: int | Sequence[int],
    layout: str = "channels_first",
    columns: str = "cyx",
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    prefix_tokens: Tensor | None = None,
    pos_embed: Tensor | None = None,
    norm: tuple[Tensor, Tensor | None, float] | None = None,
    backend: str | None = None,
) -> Tensor:
    """Cut images into patches, project each to ``D`` channels, and add what a vision transformer adds before its first layer.

    A convolution whose stride is its kernel is one matrix product. With ``x_n`` the ``K`` pixels of patch ``n``::

        token_n = W x_n + bias
        total   = [prefix_tokens; token_1 .. token_N] + pos_embed
        out     = (total - mean(total)) / sqrt(var(total) + eps) * norm_weight + norm_bias      with norm, else total

    The arithmetic is in fp32 (fp64 for fp64 weights); products take pixels in the weight's dtype. With 3-D patches a still image
    is given as one frame and means that frame ``Pt`` times; the backends multiply it with the weight summed over its frames.

    Args:
        pixels: ``[B, C, H, W]``, or with 3-D patches ``[B, C, T, H, W]``, of any strides; see ``layout``. uint8 pixels are
            normalised here with ``mean`` and ``std``; float pixels are taken as normalised and cast to the weight's dtype.
            Patches are numbered frame by frame, row by row; pixels beyond the last whole patch are dropped, as Conv2d does.
            ``T = 1`` is a still image, whatever ``Pt``.
        weight: ``[D, C, Py, Px]`` (Conv2d), ``[D, C, Pt, Py, Px]`` (Conv3d) or ``[D, K]`` (Linear; see ``columns``) in bf16,
            fp16, fp32 or fp64. Its dtype is that of the output and of every other parameter.
        bias: ``[D]``.
        patch_size: ``P``, ``(Py, Px)``, or ``(Pt, Py, Px)`` for 3-D patches.
        layout: ``"channels_first"``; ``"channels_last"``: pixels are ``[B, H, W, C]`` or ``[B, T, H, W, C]``; ``"rows"``: pixels
            are cut into patches already, ``[N, K]`` or ``[B, N, K]``, or ``K / Pt`` columns, the one frame of still images.
        columns: the order of the ``K`` columns of rows and of a ``[D, K]`` weight: ``"cyx"`` is (c, t, y, x), that of a flattened
            Conv weight and of Qwen-VL's rows; ``"yxc"`` is (t, y, x, c), that of SigLIP2's and timm's NaFlex rows.
        mean: ``C`` numbers, for uint8 pixels and only for them: the product takes ``(pixel / 255 - mean) / std``.
        std: ``C`` numbers, beside ``mean``.
        prefix_tokens: ``[n, D]``: class and register tokens, put before the patches of every image.
        pos_embed: ``[N, D]`` is added to the patches only, ``[n + N, D]`` to the prefix tokens too; the row count decides, and
            without prefix tokens both mean the same. ``[B, N, D]`` and ``[B, n + N, D]`` give every image its own.
        norm: ``(weight [D], bias [D] or None, eps)`` of a LayerNorm over every token (CLIP's pre-LayerNorm).
        backend: force a backend; the default is the best that takes these inputs.

    Returns:
        ``[B, n + N, D]`` in the weight's dtype, contiguous; ``[n + N, D]`` for ``[N, K]`` rows. It is differentiable once, in
        every parameter and in float pixels.

    Raises:
        ValueError: a shape, dtype, device or name does not fit; ``mean`` and ``std`` are missing for uint8 pixels or given for
            float ones; the image is smaller than a patch.
        BackendError: the forced backend can't run these inputs.
    """
    norm_weight, norm_bias, eps = (None, None, 0.0) if norm is None else norm
    tensors = (pixels, weight, bias, prefix_tokens, pos_embed, norm_weight, norm_bias)
    patch = patch_size if type(patch_size) is int else _patch_size(patch_size)
    mean, std = _numbers(mean), _numbers(std)
    settings = (patch, layout, columns, mean, std, float(eps), forced_backend(backend))
    plan = _fwd.planned(settings, tensors)
    out = _unplanned(settings, tensors) if plan is None else plan(*tensors)[0]
    return out[0] if layout == "rows" and pixels.dim() == 2 else out


def _unplanned(settings: tuple[Any, ...], tensors: Tensors) -> Tensor:
    """Check everything, run, and leave a plan for the next such call."""
    *how, eps, name = settings
    patches, weight, means, stds = _prepare(tensors, *how)
    args = (patches, weight, *tensors[2:], eps, means, stds)
    out: Tensor
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        out = _PatchEmbed.apply(*args, name)
        return out
    out = _fwd(*args, False, name)[0]
    _fwd.plan(settings, tensors, (*args, False, name))
    return out


def _numbers(values: Sequence[float] | None) -> Sequence[float] | None:
    """``values`` as plain numbers that can be compared. A tensor, or a number alone, is left to be refused."""
    return values if values is None or isinstance(values, (Tensor, int, float)) else tuple(map(float, values))

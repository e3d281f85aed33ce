# SPDX-License-Identifier: Apache-2.0
"""Patch embedding on ``csrc/patch_embed``: images in patches of 14 or 16 pixels, in one kernel."""

import torch
from torch import Tensor

from vlmkernels.backends.cuda._library import EntryPoint, PatchEmbedParams

TYPES = {torch.uint8: 0, torch.float16: 1, torch.bfloat16: 2}

_patch_embed = EntryPoint("vlmk_patch_embed")
_check = EntryPoint("vlmk_patch_embed_check")


def _params(
    patches: Tensor,
    weight: Tensor,
    prefix_tokens: Tensor | None,
    pos_embed: Tensor | None,
    norm_weight: Tensor | None,
    eps: float,
    mean: list[float] | None,
    std: list[float] | None,
) -> PatchEmbedParams:
    """All but the pointers."""
    batch, _, grid_y, grid_x, _, _, patch, _ = patches.shape
    stride_b, _, stride_gy, _, stride_c, _, stride_y, _ = patches.stride()
    num_prefix = 0 if prefix_tokens is None else prefix_tokens.shape[0]
    params = PatchEmbedParams(
        pixel_stride_b=stride_b if batch > 1 else 0,
        pixel_stride_gy=stride_gy if grid_y > 1 else 0,
        pixel_stride_c=stride_c,
        pixel_stride_y=stride_y,
        batch=batch,
        grid_y=grid_y,
        grid_x=grid_x,
        patch=patch,
        dim=weight.shape[0],
        num_prefix=num_prefix,
        pixel_type=TYPES[patches.dtype],
        token_type=TYPES[weight.dtype],
        eps=eps,
    )
    if pos_embed is not None:
        params.pos_stride_b = pos_embed.stride(0) if pos_embed.dim() == 3 else 0
        params.pos_stride_n = pos_embed.stride(-2)
        params.pos_on_prefix = num_prefix > 0 and pos_embed.shape[-2] == num_prefix + grid_y * grid_x
    if norm_weight is not None:
        params.norm_weight = norm_weight.data_ptr()
    if mean is not None and std is not None:
        params.pixel_scale = tuple(1 / (255 * s) for s in std)
        params.pixel_shift = tuple(-m / s for m, s in zip(mean, std, strict=True))
    return params


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
    _, frames, _, grid_x, channels, frames_of_patch, height, width = patches.shape
    if weight.dtype not in (torch.float16, torch.bfloat16) or patches.dtype not in (torch.uint8, weight.dtype):
        return f"it takes uint8 or 16-bit pixels and 16-bit weights, these are {patches.dtype} and {weight.dtype}"
    if frames != 1 or frames_of_patch != 1 or channels != 3 or height != width:
        return "it takes square patches of images of three channels"
    if patches.stride(7) != 1 or (grid_x > 1 and patches.stride(3) != width):
        return "it takes rows of pixels that are contiguous"
    if patches.data_ptr() % 16 or (pos_embed is not None and (pos_embed.data_ptr() % 16 or pos_embed.stride(-1) != 1)):
        return "pixels and positions must begin at multiples of 16 bytes"
    return _check.why_not(_params(patches, weight, prefix_tokens, pos_embed, norm_weight, eps, mean, std))


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
    params = _params(patches, weight, prefix_tokens, pos_embed, norm_weight, eps, mean, std)
    out = weight.new_empty(params.batch, params.num_prefix + params.grid_y * params.grid_x, params.dim)
    total = torch.empty_like(out) if keep_total else weight.new_empty(0)
    params.pixels, params.out = patches.data_ptr(), out.data_ptr()
    # Kept in a list until the launch: a copy's memory must not be given away before.
    vectors = [t if t is None or t.is_contiguous() else t.contiguous() for t in (weight, bias, prefix_tokens, norm_bias)]
    params.weight, params.bias, params.prefix, params.norm_bias = (None if t is None else t.data_ptr() for t in vectors)
    params.pos = None if pos_embed is None else pos_embed.data_ptr()
    if norm_weight is not None:
        norm_weight = norm_weight.contiguous()
        params.norm_weight = norm_weight.data_ptr()
    if keep_total and norm_weight is not None:
        params.total = total.data_ptr()
    if out.numel():
        _patch_embed(params, weight.device)
        if keep_total and norm_weight is None:
            total.copy_(out)
    return out, total

# SPDX-License-Identifier: Apache-2.0
"""Patch embedding by stock torch: one copy into a matrix of patches, then one matrix product.

A convolution whose stride is its kernel shares no pixel between patches, so there is nothing that a convolution algorithm could
save over the plain product. But on a CPU the two are of different libraries.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

CHANNELS_FIRST, CHANNELS_LAST = (4, 5, 6, 7), (5, 6, 7, 4)


def _columns(patches: Tensor) -> tuple[int, ...]:
    """The order of a patch's columns in its memory: rows that are in place stay there, other pixels are read in long runs."""
    return CHANNELS_LAST if patches.stride(4) < patches.stride(7) and patches.shape[4] > 1 else CHANNELS_FIRST


def _weight_matrix(weight: Tensor, columns: tuple[int, ...]) -> Tensor:
    return weight.permute(0, *(c - 3 for c in columns)).reshape(weight.shape[0], -1)


def _still(
    weight: Tensor, bias: Tensor | None, mean: list[float] | None, std: list[float] | None
) -> tuple[Tensor, Tensor | None, list[float] | None, list[float] | None]:
    """Weight, bias, mean and std for the one frame of a still image, which meets the sum of the weight's frames.

    uint8 pixels come out as ``(pixel - 128) / 128``, which every dtype holds: their mean and std go into the weight and the bias,
    else a pixel would be rounded like the weight.
    """
    if mean is None or std is None:
        return weight.sum(2, keepdim=True), bias, None, None
    wide = torch.promote_types(weight.dtype, torch.float32)
    total = weight.sum(2, keepdim=True, dtype=wide)
    moved = total.new_zeros(weight.shape[0]) if bias is None else bias.to(wide)
    for c, (m, s) in enumerate(zip(mean, std, strict=True)):
        moved = torch.add(moved, total[:, c].sum((1, 2, 3)), alpha=(128 / 255 - m) / s)
        total[:, c] *= 128 / (255 * s)
    half = [128 / 255] * len(mean)
    return total.to(weight.dtype), moved.to(weight.dtype), half, half


def _patch_matrix(
    patches: Tensor, dtype: torch.dtype, mean: list[float] | None, std: list[float] | None, columns: tuple[int, ...]
) -> Tensor:
    """The normalised patches as ``[B * N, K]`` in the weight's dtype."""
    if mean is not None and std is not None:
        wide = torch.float64 if dtype == torch.float64 else torch.float32

        def per_channel(values: list[float]) -> Tensor:
            # Filled on the device number by number: a copy from the host could not be captured in a CUDA graph.
            filled = [torch.full((1,), v, dtype=wide, device=patches.device) for v in values]
            return torch.cat(filled).view(-1, 1, 1, 1)

        scale = per_channel([1 / (255 * s) for s in std])
        shift = per_channel([-m / s for m, s in zip(mean, std, strict=True)])
        patches = torch.addcmul(shift, patches.to(wide), scale)
    matrix = patches.to(dtype).permute(0, 1, 2, 3, *columns)
    return matrix.reshape(patches.shape[:4].numel(), patches.shape[4:].numel())


def _product(a: Tensor, matrix: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """``a @ matrix.T + bias`` in a dtype that may be wider than theirs."""
    wide_bias = None if bias is None else bias.to(dtype)
    if a.device.type == "cuda" and dtype != a.dtype:
        total = torch.mm(a, matrix.T, out_dtype=dtype)
        return total if wide_bias is None else total.add_(wide_bias)
    a, matrix = a.to(dtype), matrix.to(dtype)
    if not _by_convolution(a):
        return F.linear(a, matrix, wide_bias)
    out = F.conv2d(_as_pixels(a), matrix[:, :, None, None], wide_bias)
    return out.permute(0, 2, 3, 1).reshape(len(a), len(matrix))


def _by_convolution(x: Tensor) -> bool:
    """In fp32 on a CPU, where oneDNN computes convolutions: for the product MKL takes twice as long (AMD EPYC)."""
    return x.device.type == "cpu" and x.dtype == torch.float32 and x.numel() > 0


def _as_pixels(rows: Tensor) -> Tensor:
    """Rows ``[M, K]`` as an image of one line, ``[1, K, 1, M]``."""
    return rows.view(1, 1, *rows.shape).permute(0, 3, 1, 2)


def _weight_gradient(d_rows: Tensor, a: Tensor) -> Tensor:
    """``d_rows.T @ a``."""
    if not _by_convolution(a):
        return d_rows.T @ a
    like = a.new_empty(d_rows.shape[1], a.shape[1], 1, 1)
    options = ([1, 1], [0, 0], [1, 1], False, [0, 0], 1)  # stride, padding, dilation, transposed, output padding, groups
    images, wanted = (_as_pixels(d_rows), _as_pixels(a)), [False, True, False]
    return torch.ops.aten.convolution_backward(*images, like, None, *options, wanted)[1].view(len(like), -1)


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
    batch, n_patches, dim = patches.shape[0], patches.shape[1:4].numel(), weight.shape[0]
    columns = _columns(patches)
    if patches.shape[5] != weight.shape[2]:
        weight, bias, mean, std = _still(weight, bias, mean, std)
    a = _patch_matrix(patches, weight.dtype, mean, std, columns)
    matrix = _weight_matrix(weight, columns)
    # The product and the sums stay in fp32 up to a norm.
    wide = weight.dtype if norm_weight is None else torch.promote_types(weight.dtype, torch.float32)
    total = _product(a, matrix, bias, wide).view(batch, n_patches, dim)
    if pos_embed is not None and pos_embed.shape[-2] == n_patches:
        total += pos_embed
        pos_embed = None
    if prefix_tokens is not None:
        total = torch.cat([prefix_tokens.to(total.dtype).expand(batch, -1, -1), total], 1)
    if pos_embed is not None:
        total += pos_embed
    if norm_weight is None:
        return total, weight.new_empty(0)
    wide_bias = None if norm_bias is None else norm_bias.to(total.dtype)
    out = F.layer_norm(total, (dim,), norm_weight.to(total.dtype), wide_bias, eps).to(weight.dtype)
    return out, total.to(weight.dtype) if keep_total else weight.new_empty(0)


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
    n_patches = patches.shape[1:4].numel()
    n_prefix = n_tokens - n_patches
    grads = [weight.new_empty(0) for _ in needs]
    wide = torch.promote_types(weight.dtype, torch.float32)
    d_total = grad
    if norm_weight is not None:
        rows, affine = total.to(wide), norm_weight.to(wide)
        _, row_mean, rstd = torch.native_layer_norm(rows, (dim,), None, None, eps)
        mask = [any(needs[:5]), needs[5], needs[6]]
        # The bias decides nothing here but must be present for its gradient to be asked for.
        d_total, d_norm_weight, d_norm_bias = torch.ops.aten.native_layer_norm_backward(
            grad.to(wide).contiguous(), rows, (dim,), row_mean, rstd, affine, torch.zeros_like(affine), mask
        )
        grads[5] = d_norm_weight.to(weight.dtype) if needs[5] else grads[5]
        grads[6] = d_norm_bias.to(weight.dtype) if needs[6] else grads[6]
    if any(needs[2:5]):
        # Sums over the batch, in fp32: position, prefix and bias all read from them.
        by_token = d_total.sum(0, dtype=wide)
        grads[2] = by_token[n_prefix:].sum(0).to(weight.dtype) if needs[2] else grads[2]
        grads[3] = by_token[:n_prefix].to(weight.dtype, copy=True) if needs[3] else grads[3]
    if needs[4]:
        rows = d_total if len(pos_shape) == 3 else by_token
        rows = rows.narrow(-2, n_tokens - pos_shape[-2], pos_shape[-2])
        grads[4] = rows.to(weight.dtype, copy=True, memory_format=torch.contiguous_format)
    if needs[0] or needs[1]:
        d_tokens = d_total[:, n_prefix:].to(weight.dtype).reshape(batch * n_patches, dim)
        columns = _columns(patches)
    if needs[0]:
        met = weight if patches.shape[5] == weight.shape[2] else _still(weight, None, None, None)[0]
        d_patches = _product(d_tokens, _weight_matrix(met, CHANNELS_FIRST).T, None, weight.dtype)
        grads[0] = d_patches.view(patches.shape).to(patches.dtype)
    if needs[1]:
        d_weight = _weight_gradient(d_tokens, _patch_matrix(patches, weight.dtype, mean, std, columns))
        shape = [patches.shape[c] for c in columns]
        back = (0, 1, 2, 3, 4) if columns == CHANNELS_FIRST else (0, 4, 1, 2, 3)
        grads[1] = d_weight.view(dim, *shape).permute(back).expand(weight.shape).contiguous()
    return tuple(grads)

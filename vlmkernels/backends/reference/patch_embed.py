# SPDX-License-Identifier: Apache-2.0
"""What patch embedding means: every product and sum in fp32 (fp64 for fp64 weights), rounded once at the end."""

import torch
from torch import Tensor


def _wide(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def _normalised(patches: Tensor, weight: Tensor, mean: list[float] | None, std: list[float] | None) -> Tensor:
    """The pixels that meet the weight, in the wide dtype: the one frame of a still image as often as the weight has frames."""
    wide = _wide(weight)
    patches = patches.expand(*patches.shape[:5], weight.shape[2], *patches.shape[6:])
    if mean is None or std is None:
        return patches.to(weight.dtype).to(wide)
    channels = [(patches.select(4, c).to(wide) / 255 - mean[c]) / std[c] for c in range(len(mean))]
    return torch.stack(channels, 4)


def _moments(total: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """The normalised rows and the reciprocal of their deviation."""
    centred = total - total.mean(-1, keepdim=True)
    rstd = 1 / (centred.square().mean(-1, keepdim=True) + eps).sqrt()
    return centred * rstd, rstd


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
    wide = _wide(weight)
    x = _normalised(patches, weight, mean, std)
    total = torch.einsum("bijkcpyx,dcpyx->bijkd", x, weight.to(wide)).flatten(1, 3)
    batch, n_patches, dim = total.shape
    if bias is not None:
        total = total + bias.to(wide)
    if prefix_tokens is not None:
        total = torch.cat([prefix_tokens.to(wide).expand(batch, -1, -1), total], 1)
    if pos_embed is not None:
        # A table of N rows belongs to the patches, the last N tokens; one of n + N rows to all of them.
        rows = pos_embed.shape[-2]
        skipped = total.shape[1] - rows
        total = torch.cat([total[:, :skipped], total[:, skipped:] + pos_embed.to(wide)], 1)
    kept = total.to(weight.dtype, copy=True, memory_format=torch.contiguous_format) if keep_total else weight.new_empty(0)
    if norm_weight is not None:
        total = _moments(total, eps)[0] * norm_weight.to(wide)
        if norm_bias is not None:
            total = total + norm_bias.to(wide)
    return total.to(weight.dtype).contiguous(), kept


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
    wide, dtype = _wide(weight), weight.dtype
    n_prefix = grad.shape[1] - patches.shape[1] * patches.shape[2] * patches.shape[3]
    d_total = grad.to(wide)
    d_norm_weight = d_norm_bias = weight.new_empty(0)
    if norm_weight is not None:
        unit, rstd = _moments(total.to(wide), eps)
        d_norm_weight, d_norm_bias = (d_total * unit).sum((0, 1)), d_total.sum((0, 1))
        d_unit = d_total * norm_weight.to(wide)
        d_total = rstd * (d_unit - d_unit.mean(-1, keepdim=True) - unit * (d_unit * unit).mean(-1, keepdim=True))
    d_pos = d_total[:, n_prefix if pos_shape and pos_shape[-2] == grad.shape[1] - n_prefix else 0 :]
    d_tokens = d_total[:, n_prefix:].unflatten(1, patches.shape[1:4])
    grads = (
        torch.einsum("bijkd,dcpyx->bijkcpyx", d_tokens, weight.to(wide)).sum_to_size(patches.shape) if needs[0] else None,
        torch.einsum("bijkd,bijkcpyx->dcpyx", d_tokens, _normalised(patches, weight, mean, std)) if needs[1] else None,
        d_tokens.sum((0, 1, 2, 3)),
        d_total[:, :n_prefix].sum(0),
        d_pos if len(pos_shape) == 3 else d_pos.sum(0),
        d_norm_weight,
        d_norm_bias,
    )
    dtypes = (patches.dtype, *(dtype,) * 6)
    return tuple(
        g.to(d, copy=True, memory_format=torch.contiguous_format) if need and g is not None else weight.new_empty(0)
        for g, d, need in zip(grads, dtypes, needs, strict=True)
    )

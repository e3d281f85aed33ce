# SPDX-License-Identifier: Apache-2.0
"""The meaning of the contrastive losses: the whole matrix of logits, its softmax along rows and columns, and its gradient."""

import torch


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)


def _unit(x: torch.Tensor, inverse: torch.Tensor | None) -> torch.Tensor:
    return _wide(x) if inverse is None else _wide(x) * inverse[:, None]


def _belong(start: torch.Tensor, stop: torch.Tensor, columns: int) -> torch.Tensor:
    """``[M, N]``, True where row and column belong together."""
    j = torch.arange(columns, device=start.device)
    return (j >= start[:, None]) & (j < stop[:, None])


def _targets(
    start: torch.Tensor,
    stop: torch.Tensor,
    row: torch.Tensor,
    row_positive: torch.Tensor,
    column: torch.Tensor,
    column_positive: torch.Tensor,
    smooth_row: float,
    smooth_column: float,
) -> torch.Tensor:
    """``[M, N]``, what the loss subtracts of each logit."""
    positive = _belong(start, stop, len(column)) * (row_positive[:, None] + column_positive)
    return positive + smooth_row * row[:, None] + smooth_column * column


def _gradients(
    g: torch.Tensor,
    factor: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    inverse_a: torch.Tensor | None,
    inverse_b: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of the features, from the gradient ``g [M, N]`` of their products; ``factor`` multiplies them."""
    unit_a, unit_b = _unit(a, inverse_a), _unit(b, inverse_b)
    results = []
    for grad, unit, inverse in ((g @ unit_b, unit_a, inverse_a), (g.T @ unit_a, unit_b, inverse_b)):
        if inverse is not None:  # what lies along the row doesn't change its direction
            grad = (grad - unit * (unit * grad).sum(1, keepdim=True)) * inverse[:, None]
        results.append(factor * grad)
    return results[0], results[1]


def clip_loss_fwd(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    row: torch.Tensor,
    row_positive: torch.Tensor,
    column: torch.Tensor,
    column_positive: torch.Tensor,
    inverse_a: torch.Tensor | None,
    inverse_b: torch.Tensor | None,
    smooth_row: float,
    smooth_column: float,
) -> tuple[torch.Tensor, ...]:
    logits = _wide(scale) * (_unit(a, inverse_a) @ _unit(b, inverse_b).T)
    targets = _targets(start, stop, row, row_positive, column, column_positive, smooth_row, smooth_column)
    lse_a, lse_b = torch.logsumexp(logits, 1), torch.logsumexp(logits, 0)
    rows = (row * lse_a).sum() - (targets * logits).sum()
    return lse_a, lse_b, rows, rows + (column * lse_b).sum()


def clip_loss_bwd(
    dloss: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    row: torch.Tensor,
    row_positive: torch.Tensor,
    column: torch.Tensor,
    column_positive: torch.Tensor,
    inverse_a: torch.Tensor | None,
    inverse_b: torch.Tensor | None,
    lse_a: torch.Tensor,
    lse_b: torch.Tensor,
    smooth_row: float,
    smooth_column: float,
    dtype_b: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    products = _unit(a, inverse_a) @ _unit(b, inverse_b).T
    logits = _wide(scale) * products
    g = row[:, None] * torch.exp(logits - lse_a[:, None]) + column * torch.exp(logits - lse_b)
    g = g - _targets(start, stop, row, row_positive, column, column_positive, smooth_row, smooth_column)
    da, db = _gradients(g, dloss * scale, a, b, inverse_a, inverse_b)
    return da.to(a.dtype), db.to(dtype_b), dloss * (g * products).sum()


def siglip_loss_fwd(
    a: torch.Tensor,
    b: torch.Tensor,
    scale: torch.Tensor,
    bias: torch.Tensor,
    start: torch.Tensor,
    stop: torch.Tensor,
    inverse_a: torch.Tensor | None,
    inverse_b: torch.Tensor | None,
    weight: float,
    grads: bool,
    dtype_a: torch.dtype,
    dtype_b: torch.dtype,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    products = _unit(a, inverse_a) @ _unit(b, inverse_b).T
    sign = torch.where(_belong(start, stop, b.shape[0]), -1.0, 1.0).to(products.dtype)
    wrong = sign * (_wide(scale) * products + _wide(bias))
    # softplus, which torch's own function takes for linear from 20 on.
    loss = weight * (wrong.clamp_min(0) + torch.log1p(torch.exp(-wrong.abs()))).sum()
    if not grads:
        return loss, a.new_empty(0, dtype=dtype_a), b.new_empty(0, dtype=dtype_b), loss.new_empty(0)
    g = weight * sign * torch.sigmoid(wrong)
    da, db = _gradients(g, _wide(scale), a, b, inverse_a, inverse_b)
    return loss, da.to(dtype_a), db.to(dtype_b), torch.stack(((g * products).sum(), g.sum()))


def siglip_loss_bwd_(da: torch.Tensor, db: torch.Tensor, dnumbers: torch.Tensor, dloss: torch.Tensor, times: float) -> None:
    for x, factor in ((da, times), (db, times), (dnumbers, 1.0)):
        x.copy_(_wide(x) * dloss * factor)

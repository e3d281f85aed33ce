# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses in stock torch operations, the logits of a chunk of rows at a time, and again in the backward pass."""

from collections.abc import Iterator
from typing import NamedTuple

import torch
import torch.nn.functional as F

#: Logits that are there at a time; what is derived from them takes three times the memory.
LOGITS = 1 << 24


class _Chunk(NamedTuple):
    """Rows of ``a``, their products with all rows of ``b`` ``[rows, N]``, and which of them belong together."""

    rows: slice
    a: torch.Tensor
    products: torch.Tensor
    belong: torch.Tensor


def _dtype(x: torch.Tensor) -> torch.dtype:
    return torch.promote_types(x.dtype, torch.float32)


def _unit(x: torch.Tensor, inverse: torch.Tensor | None) -> torch.Tensor:
    x = x.to(_dtype(x))
    return x if inverse is None else x * inverse[:, None]


def _chunks(
    a: torch.Tensor, unit_b: torch.Tensor, start: torch.Tensor, stop: torch.Tensor, inverse_a: torch.Tensor | None
) -> Iterator[_Chunk]:
    columns = torch.arange(len(unit_b), device=a.device)
    step = max(1, LOGITS // len(unit_b))
    for begin in range(0, len(a), step):
        rows = slice(begin, begin + step)
        unit_a = _unit(a[rows], None if inverse_a is None else inverse_a[rows])
        belong = (columns >= start[rows, None]) & (columns < stop[rows, None])
        yield _Chunk(rows, unit_a, unit_a @ unit_b.T, belong)


def _through_norm(grad: torch.Tensor, unit: torch.Tensor, inverse: torch.Tensor | None) -> torch.Tensor:
    if inverse is None:
        return grad
    return torch.addcmul(grad, unit, (unit * grad).sum(1, keepdim=True), value=-1).mul_(inverse[:, None])


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
    unit_b = _unit(b, inverse_b)
    lse_a, lse_b = torch.empty_like(row), torch.full_like(column, -torch.inf)
    picked = torch.zeros_like(row)
    for rows, _, logits, belong in _chunks(a, unit_b, start, stop, inverse_a):
        logits.mul_(scale)
        lse_a[rows] = torch.logsumexp(logits, 1)
        lse_b = torch.logaddexp(lse_b, torch.logsumexp(logits, 0))
        positive = torch.where(belong, logits, 0.0)
        picked[rows] = positive.sum(1) * row_positive[rows] + positive @ column_positive
        if smooth_row:
            picked[rows] += smooth_row * row[rows] * logits.sum(1) + smooth_column * (logits @ column)
    of_rows = (row * lse_a).sum() - picked.sum()
    return lse_a, lse_b, of_rows, of_rows + (column * lse_b).sum()


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
    unit_b = _unit(b, inverse_b)
    da, db, dscale = a.new_empty(a.shape), unit_b.new_zeros(b.shape), torch.zeros_like(row)
    factor = (dloss * scale).to(unit_b.dtype)
    for rows, unit_a, products, belong in _chunks(a, unit_b, start, stop, inverse_a):
        logits = products * scale
        g = torch.exp(logits - lse_a[rows, None]).mul_(row[rows, None])
        g += torch.exp(logits.sub_(lse_b)).mul_(column)
        g -= torch.where(belong, row_positive[rows, None] + column_positive, 0.0)
        if smooth_row:
            g -= smooth_row * row[rows, None] + smooth_column * column
        dscale[rows] = products.mul_(g).sum(1)
        grad = _through_norm(g @ unit_b, unit_a, None if inverse_a is None else inverse_a[rows])
        da[rows] = (factor * grad).to(a.dtype)
        db.addmm_(g.T, unit_a)
    db = _through_norm(db, unit_b, inverse_b).mul_(factor)
    return da, db.to(dtype_b), dloss * dscale.sum()


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
    unit_b = _unit(b, inverse_b)
    size = len(a) if grads else 0
    da, db = a.new_empty((size, a.shape[1]), dtype=dtype_a), unit_b.new_zeros((len(b) if grads else 0, b.shape[1]))
    losses, sums = unit_b.new_zeros(len(a)), unit_b.new_zeros((2, len(a)))
    for rows, unit_a, products, belong in _chunks(a, unit_b, start, stop, inverse_a):
        logits = torch.addcmul(bias.to(products.dtype), products, scale.to(products.dtype))
        wrong = torch.where(belong, -logits, logits)
        losses[rows] = -F.logsigmoid(-wrong).sum(1)
        if grads:
            g = torch.where(belong, -torch.sigmoid(wrong), torch.sigmoid(wrong))
            sums[0, rows], sums[1, rows] = products.mul_(g).sum(1), g.sum(1)
            grad = _through_norm(g @ unit_b, unit_a, None if inverse_a is None else inverse_a[rows])
            da[rows] = (weight * scale * grad).to(dtype_a)
            db.addmm_(g.T, unit_a)
    loss = weight * losses.sum()
    if not grads:
        return loss, da.flatten(), db.flatten().to(dtype_b), sums.new_empty(0)
    db = _through_norm(db, unit_b, inverse_b).mul_(weight * scale)
    return loss, da, db.to(dtype_b), weight * sums.sum(1)


def siglip_loss_bwd_(da: torch.Tensor, db: torch.Tensor, dnumbers: torch.Tensor, dloss: torch.Tensor, times: float) -> None:
    # A tensor without dimensions would be rounded to the dtype of the other before the product.
    factor = (dloss * times).reshape(1, 1)
    for x, by in ((da, factor), (db, factor), (dnumbers, dloss)):
        torch.mul(x, by, out=x)

# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses of bf16 features on ``csrc/contrastive``: one call for each pass, which launches all of its panels."""

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels.backends.cuda._library import ContrastiveParams, EntryPoint

#: Rows and columns of a tile of logits.
TILE = 256
#: Panels of gradients: how many tiles their rows and columns come to, and how many are kept. Each has what waits less, or adds
#: to sums less often, than the next, which takes less memory.
PANELS = (12, 12, 3), (8, 12, 3), (8, 8, 3), (7, 7, 3)
#: The same below 640 channels, where tiles of logits take little time beside those of the products that their panels wait for.
PANELS_OF_FEW_CHANNELS = (12, 12, 3), (8, 8, 4), (8, 7, 4), (7, 7, 3)
#: Up to how many rows of either side Triton's kernels, of fewer launches, are faster.
FEW_PAIRS = 2048
#: What panels and the low bits of the sums may always take together.
LEAST_ROOM = 33 << 20
#: Row tiles whose shares of the log-sum-exps are there at a time. With 66 clusters and an even number of column tiles all are
#: busy until the end of a strip.
STRIP_TILES = 33

_clip_fwd = EntryPoint("vlmk_clip_loss_fwd")
_clip_bwd = EntryPoint("vlmk_clip_loss_bwd")
_siglip = EntryPoint("vlmk_siglip_loss")
_check = EntryPoint("vlmk_contrastive_check")


@functools.lru_cache(maxsize=1024)
def _refused(rows: int, columns: int, dim: int, a_stride: int, b_stride: int) -> str | None:
    """What the library says against features of these sizes and strides."""
    sizes = {"valid_rows": rows, "valid_columns": columns, "rows": _whole(rows), "columns": _whole(columns), "dim": dim}
    return _check.why_not(ContrastiveParams(a_stride=a_stride, b_stride=b_stride, panel_rows=TILE, panel_columns=TILE, **sizes))


def _whole(count: int) -> int:
    """As many features as whole tiles have."""
    return -(-count // TILE) * TILE


def _why_not(a: Tensor, b: Tensor, inverse_a: Tensor | None) -> str | None:
    if a.dtype != torch.bfloat16:
        return f"it takes bfloat16, these are {a.dtype}"
    if inverse_a is not None:
        return "it does not normalize"
    if a.stride(1) != 1 or b.stride(1) != 1 or (a.data_ptr() | b.data_ptr()) % 16:
        return "rows of features must be dense and begin at multiples of 16 bytes"
    return _refused(*a.shape[:1], *b.shape, a.stride(0), b.stride(0))


def _why_not_clip(a: Tensor, b: Tensor, inverse_a: Tensor | None, smoothing: float) -> str | None:
    return "it does not smooth labels" if smoothing else _why_not(a, b, inverse_a)


def why_not_clip_loss_fwd(a: Tensor, b: Tensor, *rest: Any) -> str | None:
    return _why_not_clip(a, b, rest[7], rest[-2])


def why_not_clip_loss_bwd(dloss: Tensor, a: Tensor, b: Tensor, *rest: Any) -> str | None:
    return _why_not_clip(a, b, rest[7], rest[-3])


def why_not_siglip_loss_fwd(a: Tensor, b: Tensor, *rest: Any) -> str | None:
    return _why_not(a, b, rest[4])


def yields_clip_loss_fwd(a: Tensor, b: Tensor, *rest: Any) -> bool:
    return _few(a, b)


def yields_clip_loss_bwd(dloss: Tensor, a: Tensor, b: Tensor, *rest: Any) -> bool:
    return _few(a, b)


def yields_siglip_loss_fwd(a: Tensor, b: Tensor, *rest: Any) -> bool:
    return rest[-3] and _few(a, b)  # with gradients


def yields_siglip_loss_bwd_(*_: Any) -> bool:
    return True  # one launch of Triton's is faster than torch's three, which are for those who force this backend


def _few(a: Tensor, b: Tensor) -> bool:
    return max(len(a), len(b)) <= FEW_PAIRS


def panel_shape(rows: int, columns: int, dim: int, low_b: int, room: int) -> tuple[int, int, int]:
    """Rows and columns of a panel and how many to keep, beside so many bytes for all columns: the first that have room."""
    shapes = PANELS if dim >= 640 else PANELS_OF_FEW_CHANNELS
    for tiles in shapes:
        need = tiles[2] * tiles[0] * tiles[1] * TILE * TILE * 2 + tiles[0] * TILE * dim + low_b
        if need <= max(room, LEAST_ROOM):
            break
    # As even as they come: the last panel would else be small.
    size = [-(-x // (-(-x // (side * TILE)) * TILE)) * TILE for x, side in zip((rows, columns), tiles, strict=False)]
    return size[0], size[1], tiles[2]


def _multiprocessors(device: torch.device) -> int:
    count: int = torch.cuda.get_device_properties(device).multi_processor_count
    return count


def _run(
    function: EntryPoint,
    a: Tensor,
    b: Tensor,
    shape: tuple[int, int, int],
    weight: float,
    counters: int = 0,
    /,
    **tensors: Tensor,
) -> tuple[Tensor, Tensor]:
    """The loss and the totals over all launches, whose panels are of this shape."""
    slots = 2 * _multiprocessors(a.device)
    launches = -(-len(a) // shape[0]) if function is _clip_fwd else 1
    # Sums of 8 bytes, and behind them counters of 4.
    zeros = a.new_zeros(launches * 3 * slots + -(-max(counters, launches) // 2), dtype=torch.float64)
    loss, totals = a.new_empty((), dtype=torch.float32), a.new_empty(2, dtype=torch.float32)
    params = ContrastiveParams(
        a_stride=a.stride(0), b_stride=b.stride(0), rows=_whole(len(a)), columns=_whole(len(b)), dim=a.shape[1],
        valid_rows=len(a), valid_columns=len(b), panel_rows=shape[0], panel_columns=shape[1], kept_panels=shape[2],
        slots=slots, weight=weight, wide_b="db" in tensors and tensors["db"].dtype == torch.float32,
        sums=zeros.data_ptr(), counters=zeros.data_ptr() + 8 * launches * 3 * slots,
    )  # fmt: skip
    if len(b) % 8:  # eights of columns are copied
        b = F.pad(b, (0, 0, 0, -len(b) % 8))
        params.b_stride = b.stride(0)
    for name, tensor in {"a": a, "b": b, "loss": loss, "totals": totals, **tensors}.items():
        setattr(params, name, tensor.data_ptr())
    function(bytes(params), a.device)
    return loss, totals


def _gradients(
    function: EntryPoint, a: Tensor, b: Tensor, dtype_b: torch.dtype, weight: float, /, **rest: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Those of ``a`` and ``b``, the loss and the totals. Until a bf16 gradient is complete it has 20 bits, of which 4 lie beside
    it. Behind the last gradient there are more, of whole tiles."""
    dim, rows, columns = a.shape[1], _whole(len(a)), _whole(len(b))
    low_b = 0 if dtype_b == torch.float32 else columns * dim // 2
    # 1.92 % of what torch.compile of the dense form takes, which keeps the logits once for SigLIP's loss, and twice for CLIP's.
    # Of ranks, whose gradients of b are wide, what it takes for the whole batch.
    pairs = rows * columns if low_b else columns**2
    shape = panel_shape(rows, columns, dim, low_b, pairs // (13 if function is _clip_bwd else 26))
    panels = -(-rows // shape[0]) * -(-columns // shape[1])
    da, db = a.new_empty(rows, dim), b.new_empty(columns, dim, dtype=dtype_b)
    workspace = {
        "panel": a.new_empty(min(shape[2], panels), *shape[:2]),
        "low_a": a.new_empty(shape[0] * dim, dtype=torch.uint8),
        "low_b": a.new_empty(low_b, dtype=torch.uint8),
    }
    counters = 1 + 2 * panels + (2 * shape[0] + columns) // 128 * (dim // 64) * 2
    results = _run(function, a, b, shape, weight, counters, **workspace, da=da, db=db, **rest)
    return da[: len(a)], db[: len(b)], *results


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    rows, columns = _whole(len(a)), _whole(len(b))
    strip = min(rows, STRIP_TILES * TILE)
    lse_a, lse_b = row.new_empty(rows), column.new_empty(columns)
    loss, totals = _run(
        _clip_fwd, a, b, (strip, columns, 0), 1.0, scale=scale.float(), start=start, stop=stop, row=row, column=column,
        row_positive=row_positive, column_positive=column_positive, lse_a=lse_a, lse_b=lse_b,
        share_a=row.new_empty(columns // TILE * strip), share_b=row.new_empty(strip // 64 * columns),
    )  # fmt: skip
    return lse_a[: len(a)], lse_b[: len(b)], totals[0], loss


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
    da, db, _, totals = _gradients(
        _clip_bwd, a, b, dtype_b, 1.0, dloss=dloss.float(), scale=scale.float(), start=start, stop=stop, row=row, column=column,
        row_positive=row_positive, column_positive=column_positive, lse_a=lse_a, lse_b=lse_b,
        shifted=lse_a.new_empty(_whole(len(a)) + _whole(len(b))), numbers=lse_a.new_empty(4),
    )  # fmt: skip
    return da, db, totals[0]


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
    given = {"scale": scale.float(), "bias": bias.float(), "start": start, "stop": stop}
    if grads:
        da, db, loss, totals = _gradients(_siglip, a, b, dtype_b, weight, **given)
        return loss, da, db, totals
    loss, totals = _run(_siglip, a, b, (_whole(len(a)), _whole(len(b)), 0), weight, **given)
    return loss, a.new_empty(0), b.new_empty(0, dtype=dtype_b), totals.new_empty(0)


def siglip_loss_bwd_(da: Tensor, db: Tensor, dnumbers: Tensor, dloss: Tensor, times: float) -> None:
    factor = (dloss * times).reshape(1, 1)  # not rounded to bf16, as one without dimensions would be
    for x, by in ((da, factor), (db, factor), (dnumbers, dloss)):
        torch.mul(x, by, out=x)

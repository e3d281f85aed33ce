# SPDX-License-Identifier: Apache-2.0
"""Which image belongs to which text, how much each counts, and how the pairs are shared out over the ranks of a group."""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from vlmkernels.masks import KeyRanges
from vlmkernels.ops._op import bad_argument, unwatched

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
#: The smallest norm that ``normalize`` divides by, as in ``torch.nn.functional.normalize``.
EPS = 1e-12


class Pairs(NamedTuple):
    """Two sets of features, and for each row of ``a`` the rows of ``b`` that it belongs to: ``start <= j < stop``.

    ``a`` are the images and ``b`` the texts, or the reverse where each text names its image: both losses are the same either
    way. ``start`` and ``stop`` are None where row ``i`` belongs to row ``i``.
    """

    a: torch.Tensor
    b: torch.Tensor
    start: torch.Tensor | None
    stop: torch.Tensor | None
    images: int


class Weights(NamedTuple):
    """What the cross-entropies of CLIP's loss count with: vectors over the rows of ``a`` and over those of ``b``.

    The loss is ``sum(row * lse_a) + sum(column * lse_b)`` less the logits, each times ``row_positive + column_positive`` where
    its two belong together, and times ``smooth_row * row + smooth_column * column`` everywhere.
    """

    start: torch.Tensor
    stop: torch.Tensor
    row: torch.Tensor
    row_positive: torch.Tensor
    column: torch.Tensor
    column_positive: torch.Tensor
    smooth_row: float
    smooth_column: float


def compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def pairs(image: torch.Tensor, text: torch.Tensor, targets: torch.Tensor | KeyRanges | None) -> Pairs:
    """Check the features and what belongs together, and put them in order."""
    for name, x in (("image", image), ("text", text)):
        if x.dim() != 2 or 0 in x.shape:
            raise bad_argument(name, f"shape {tuple(x.shape)}", "[N, D] with at least one row and one channel")
        if x.dtype not in DTYPES:
            raise bad_argument(name, x.dtype, "bfloat16, float16, float32 or float64")
    if text.shape[1] != image.shape[1]:
        raise bad_argument("text", f"{text.shape[1]} channels", f"the {image.shape[1]} of image")
    if text.dtype != image.dtype or text.device != image.device:
        raise bad_argument("text", f"{text.dtype} on {text.device}", f"image's {image.dtype} on {image.device}")
    images, texts = image.shape[0], text.shape[0]
    if targets is None:
        if images != texts:
            wanted = "targets, which say what belongs together, or as many texts as images"
            raise bad_argument("text", f"{texts} rows for {images} images", wanted)
        return Pairs(image, text, None, None, images)
    if isinstance(targets, KeyRanges):
        if targets.start.shape != (1, images) or targets.device != image.device:
            got = f"ranges of shape {tuple(targets.start.shape)} on {targets.device}"
            raise bad_argument("targets", got, f"(1, {images}), a range of texts for each image, on {image.device}")
        return Pairs(image, text, targets.start[0], targets.stop[0], images)
    kind = torch.bool if not isinstance(targets, torch.Tensor) else targets.dtype
    integers = kind != torch.bool and not kind.is_floating_point and not kind.is_complex
    if not integers or targets.shape != (texts,) or targets.device != image.device:
        got = (
            f"{targets.dtype} {tuple(targets.shape)} on {targets.device}" if isinstance(targets, torch.Tensor) else repr(targets)
        )
        raise bad_argument("targets", got, f"integers [{texts}] on {image.device}, the image of each text, or KeyRanges")
    start = targets.to(torch.int32)
    return Pairs(text, image, start, start + 1, images)


def scalar(name: str, value: torch.Tensor | float, like: torch.Tensor) -> torch.Tensor:
    """A factor or a bias as a tensor without dimensions on the device of the features."""
    if not isinstance(value, torch.Tensor):
        return torch.full((), float(value), dtype=compute_dtype(like), device=like.device)
    if value.numel() != 1 or not value.is_floating_point() or value.device != like.device:
        raise bad_argument(name, f"{value.dtype} {tuple(value.shape)} on {value.device}", f"one floating number on {like.device}")
    return value.reshape(())


def inverse_norms(x: torch.Tensor) -> torch.Tensor:
    """One over the length of each row, in the dtype of the mathematics."""
    norms: torch.Tensor = torch.linalg.vector_norm(x, dim=1, dtype=compute_dtype(x))
    return norms.clamp_min(EPS).reciprocal()


# Their names from torch 2.13 on, where the others warn.
_all_gather: Any = getattr(dist, "all_gather_single", None) or getattr(dist, "all_gather_into_tensor", None)
_reduce_scatter: Any = getattr(dist, "reduce_scatter_single", None) or getattr(dist, "reduce_scatter_tensor", None)


class Group:
    """The ranks that share a batch. Each holds as many rows of ``a`` and of ``b`` as any other; ``b`` goes to all of them."""

    def __init__(self, group: Any) -> None:
        self.group, self.size, self.rank = group, dist.get_world_size(group), dist.get_rank(group)

    def start_gather(self, x: torch.Tensor) -> tuple[torch.Tensor, Any]:
        """The rows of all ranks, in order, once this has been waited for; the stream goes on meanwhile."""
        out = x.new_empty(self.size * x.shape[0], *x.shape[1:])
        return out, _all_gather(out, x.contiguous(), group=self.group, async_op=True)

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks, in order."""
        out, arrival = self.start_gather(x)
        arrival.wait()
        return out

    def scatter_sum(self, x: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks of this rank's rows."""
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        _reduce_scatter(out, x, group=self.group)
        return out

    def sum(self, x: torch.Tensor) -> torch.Tensor:
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def logsumexp(self, x: torch.Tensor, number: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The logarithm of the sum of ``exp(x)`` over all ranks, and the sum of a number, in the same order on every rank."""
        parts = self.gather(torch.cat((x, number.reshape(1)))[None])
        return functools.reduce(torch.logaddexp, parts[:, :-1].unbind()), parts[:, -1].sum()


def group_of(group: Any) -> Group | None:
    """The group, or None where there is nobody to share with."""
    if group is None:
        return None
    if not dist.is_available() or not dist.is_initialized():
        raise bad_argument("group", group, "a process group of an initialised torch.distributed, or None")
    shared = Group(group)
    if shared.rank < 0:
        raise bad_argument("group", group, "a group that this rank belongs to")
    return shared if shared.size > 1 else None


def positives(p: Pairs, shared: Group | None) -> tuple[torch.Tensor, torch.Tensor]:
    """``start`` and ``stop`` int32 of each row of ``a``, counted over all rows of ``b``, those of other ranks included."""
    offset = 0 if shared is None else shared.rank * p.b.shape[0]
    if p.start is None or p.stop is None:
        start, stop = _once(_diagonal, p.a.device, p.a.shape[0], offset)
        return start, stop
    start, stop = _cut(p.start, p.stop, p.b.shape[0])
    return (start + offset, stop + offset) if offset else (start, stop)


#: Vectors that each step of as many pairs needs, for whose launches few pairs have no time. None is given up, as a CUDA graph may
#: read it: up to so many of so many rows.
_kept: dict[tuple[Any, ...], tuple[torch.Tensor, ...]] = {}
_MOST_KEPT, _MOST_ROWS = 64, 4096


def _once(make: Callable[..., tuple[torch.Tensor, ...]], device: torch.device, rows: int, *rest: Any) -> tuple[torch.Tensor, ...]:
    """``make(device, rows, *rest)``, made once for each stream, as another might come before it is there. Nobody writes to it.

    Not where somebody watches, and what is made while a CUDA graph is captured is the graph's.
    """
    if not unwatched(()) or rows > _MOST_ROWS:
        return make(device, rows, *rest)
    cuda = device.type == "cuda"
    key = (make, device, torch.cuda.current_stream(device).cuda_stream if cuda else 0, rows, *rest)
    found = _kept.get(key)
    if found is None:
        with torch.inference_mode(False):  # what it makes can't be kept for a backward pass
            found = make(device, rows, *rest)
        if len(_kept) < _MOST_KEPT and not (cuda and torch.cuda.is_current_stream_capturing()):
            _kept[key] = found
    return found


def _diagonal(device: torch.device, rows: int, first: int) -> tuple[torch.Tensor, ...]:
    start = torch.arange(first, first + rows, dtype=torch.int32, device=device)
    return start, start + 1


def _constant(device: torch.device, rows: int, value: float, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    return (torch.full((rows,), value, dtype=dtype, device=device),)


def _cut(start: torch.Tensor, stop: torch.Tensor, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
    start = start.clamp(0, columns)
    return start, torch.maximum(stop.clamp(0, columns), start)


def weights(p: Pairs, smoothing: float, shared: Group | None) -> Weights:
    """Every row and column that belongs to something counts alike; one that belongs to nothing has no cross-entropy."""
    dtype, device = compute_dtype(p.a), p.a.device
    rows, columns = p.a.shape[0], p.b.shape[0]
    ranks = 1 if shared is None else shared.size
    smooth = smoothing / (columns * ranks), smoothing / (rows * ranks)
    start, stop = positives(p, shared)
    if p.start is None or p.stop is None:
        (row,) = _once(_constant, device, rows, 0.5 / (rows * ranks), dtype)
        # There are as many columns as rows, and ranks times as many of all ranks.
        column = row if ranks == 1 else row.repeat(ranks)
        row_positive, column_positive = ((1 - smoothing) * x if smoothing else x for x in (row, column))
        return Weights(start, stop, row, row_positive, column, column_positive, *smooth)
    row_count = (stop - start).to(dtype)
    # How many ranges are open at each column: they open at start and close at stop. Sums of integers have one result.
    first, last = _cut(p.start, p.stop, columns)
    ones = torch.ones_like(first)
    opened = torch.zeros(columns + 1, dtype=torch.int32, device=device).index_add(0, first, ones).index_add(0, last, -ones)
    column_count = opened.cumsum(0)[:-1].to(dtype)
    row, column = (row_count > 0).to(dtype), (column_count > 0).to(dtype)
    row_total, column_total = row.sum(), column.sum()
    if shared is not None:
        row_total, column_total = shared.sum(torch.stack((row_total, column_total))).unbind()
        column, column_count = shared.gather(column), shared.gather(column_count)
    row, column = row * (0.5 / row_total.clamp_min(1)), column * (0.5 / column_total.clamp_min(1))
    row_positive, column_positive = row / row_count.clamp_min(1), column / column_count.clamp_min(1)
    return Weights(start, stop, row, (1 - smoothing) * row_positive, column, (1 - smoothing) * column_positive, *smooth)

# SPDX-License-Identifier: Apache-2.0
"""The tensor without elements that takes key ranges through code that hands masks on: what keeps it, reads it, is refused."""

import copy
import operator
from typing import Any

import pytest
import torch

from vlmkernels import KeyRanges
from vlmkernels.integrations.ranges_mask import RangesMask, fitting


def example(batch: int = 2) -> RangesMask:
    ranges = KeyRanges.causal(4, 6) & KeyRanges.key_padding(4, lengths=torch.tensor([6, 4][:batch]))
    return RangesMask.of(ranges, 2, 6)


@pytest.mark.parametrize("batch", [1, 2])
def test_it_is_a_tensor_without_storage(batch: int) -> None:
    mask = example(batch)
    assert isinstance(mask, torch.Tensor) and mask.shape == (2, 1, 4, 6) and mask.dtype == torch.bool and mask.ndim == 4
    assert torch.equal(mask.dense(), mask.ranges.dense(6)[:, None].expand(2, -1, -1, -1))
    assert "RangesMask" in repr(mask)
    huge = RangesMask.of(KeyRanges.causal(1 << 15), 1 << 15, 1 << 15)  # 32 TiB, if it had elements
    assert huge.clone()[..., :-1].numel() == (1 << 30) * ((1 << 15) - 1)


def test_shared_ranges_are_laid_out_once_for_all_layers() -> None:
    """The kernels have a plan only for ranges that need no copy."""
    bounds = [torch.tensor([[0], [2]], dtype=torch.int32), torch.tensor([[6], [4]], dtype=torch.int32)]
    mask = RangesMask(*(x.expand(-1, 4) for x in bounds), 2, 6)
    first, again, fewer = (fitting(mask, queries, 6) for queries in (4, 4, 3))
    assert first is not None and again is not None and fewer is not None
    assert first.start is again.start and first.stop is again.stop and first.start.is_contiguous()
    assert first.start.tolist() == [[0] * 4, [2] * 4] and fewer.stop.tolist() == [[6] * 3, [4] * 3]
    bounds[0].fill_(1)  # what it was made of is nobody's mask
    assert mask.start.tolist() == [[0] * 4, [2] * 4]
    kept = fitting(mask.clone()[:, :, 1:3], 4, 6)
    assert kept is not None and kept.stop.tolist() == [[6] * 4, [4] * 4]
    own = example()
    with pytest.raises(ValueError, match="attention_mask: got for 4 queries"):
        fitting(own, 3, 6)
    kept = fitting(own, 4, 6)
    assert kept is not None and kept.start is own.start


KEPT = {
    "detach": lambda m: m.detach(),
    "clone": lambda m: m.clone(),
    "to device": lambda m: m.to("cpu", copy=True),
    "contiguous": lambda m: m.contiguous(),
    "to bool": lambda m: m.to(torch.bool),
    "all": lambda m: m[:, :, :, :],
    "keys": lambda m: m[:, :, :, :5],
    "last keys": lambda m: m[..., -3:],
    "queries": lambda m: m[:, :, 1:3],
    "rows": lambda m: m[1:],
    "all of them": lambda m: m[:1, :, 1:, 1:4],
    "deepcopy": copy.deepcopy,
}
DENSE = {
    "to dtype": lambda m: m.to(torch.float32),
    "float": lambda m: m.float(),
    "index": lambda m: m[0, 0, 2],
    "step": lambda m: m[..., ::2],
    "nothing": lambda m: m[2:],
    "no keys": lambda m: m[..., 6:],
    "==": lambda m: m == True,  # noqa: E712
    "not": lambda m: ~m,
    "and": lambda m: m & torch.tensor([True, False] * 3),
    "times": lambda m: (1.0 - m.float()) * -1e4,
    "where": lambda m: torch.where(m, 0.0, -1.0),
    "masked_fill": lambda m: torch.zeros(2, 1, 4, 6).masked_fill(m, 1.0),
    "expand": lambda m: m.expand(-1, 3, -1, -1),
    "repeat": lambda m: m.repeat(1, 3, 1, 1),
    "cat": lambda m: torch.cat([m, m], dim=0),
    "sum": lambda m: m.sum(-1),
    "all": lambda m: m.all(),
    "view": lambda m: m.view(8, 6),
    "squeeze": lambda m: m.squeeze(1),
    "index_select": lambda m: m.index_select(0, torch.tensor([1, 0])),
    "copied": lambda m: torch.zeros(2, 1, 4, 6).copy_(m),
}


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("operation", KEPT.values(), ids=list(KEPT))
def test_what_leaves_it_a_mask_of_ranges(operation: Any, batch: int) -> None:
    mask = example(batch)
    got, wanted = operation(mask), operation(mask.dense())
    assert isinstance(got, RangesMask)
    assert got.shape == wanted.shape and torch.equal(got.dense(), wanted)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("operation", DENSE.values(), ids=list(DENSE))
def test_what_reads_it_gets_the_dense_mask(operation: Any, batch: int) -> None:
    mask = example(batch)
    got, wanted = operation(mask), operation(mask.dense())
    assert type(got) is torch.Tensor and torch.equal(got, wanted)


def test_values_reach_python_or_raise() -> None:
    mask = example()
    assert bool(mask[0, 0, 0, 0]) and not bool(mask[0, 0, 0, 5])
    assert mask[0, 0].tolist() == mask.dense()[0, 0].tolist()
    for reach in (mask.tolist, mask.numpy):
        with pytest.raises(RuntimeError):
            reach()


WRITES = {
    "index": lambda m: m.__setitem__((0, 0), True),
    "slice": lambda m: m.__setitem__((slice(None), slice(None), slice(1)), True),
    "fill_": lambda m: m.fill_(True),
    "and": lambda m: m.logical_and_(torch.tensor(True)),
    "copy_": lambda m: m.copy_(m.dense()),
    "out=": lambda m: torch.logical_not(torch.ones(()).bool(), out=m),
    "&=": lambda m: operator.iand(m, m.dense()),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=list(WRITES))
def test_it_can_not_be_written_to(write: Any) -> None:
    with pytest.raises(RuntimeError, match="would write to a mask of key ranges"):
        write(example())


ADDS = {
    "logits + mask": lambda m: torch.zeros(2, 3, 4, 6) + m,
    "mask + logits": lambda m: m + torch.zeros(2, 3, 4, 6),
    "in place": lambda m: torch.zeros(2, 3, 4, 6).add_(m),
    "- mask": lambda m: torch.zeros(2, 3, 4, 6) - m,
}


@pytest.mark.parametrize("add", ADDS.values(), ids=list(ADDS))
def test_it_can_not_be_added(add: Any) -> None:
    """A bool mask added to logits changes them by 1, which nobody would notice."""
    with pytest.raises(RuntimeError, match="would add a bool mask"):
        add(example())


def test_another_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="batch: got 3, wanted 2"):
        RangesMask.of(example().ranges, 3, 6)

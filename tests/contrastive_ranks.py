# SPDX-License-Identifier: Apache-2.0
"""One of the ranks of tests/test_contrastive_group.py: its share of a batch against the whole batch in this process alone."""

import sys
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_nn
import torch.nn.functional as F
from ranks import leave

from vlmkernels import KeyRanges, clip_loss, siglip_loss
from vlmkernels.nn import ClipLoss, SigLipLoss
from vlmkernels.testing import compare

IMAGES, TEXTS, D = 4, 6, 5


def leaves(rank: int, size: int, images: torch.Tensor, texts: torch.Tensor, numbers: tuple[float, ...]) -> list[torch.Tensor]:
    """The features of one rank among ``size``, and the numbers that all share."""
    mine = [x[rank * len(x) // size : (rank + 1) * len(x) // size] for x in (images, texts)]
    return [x.clone().requires_grad_() for x in (*mine, *(torch.tensor(x, dtype=images.dtype) for x in numbers))]


def agree(whole: Any, shared: Any, everything: list[torch.Tensor], mine: list[torch.Tensor], times: int, rank: int) -> None:
    """The loss, ``times`` the gradients of this rank's features, and the gradients of scale and bias."""
    loss, value = whole(*everything), shared(*mine)
    wanted, got = torch.autograd.grad(loss, everything), torch.autograd.grad(value, mine)
    assert compare(value, loss, "gemm")
    for x, y in zip(got, wanted, strict=True):
        part = times * y[rank * len(x) : (rank + 1) * len(x)] if x.dim() else y
        result = compare(x, part, "gemm", terms=0.0 if x.dim() else 10.0)
        assert result, result


def as_in_open_clip(
    image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, rank: int, local_loss: bool, gather_with_grad: bool
) -> torch.Tensor:
    """What its ``ClipLoss`` computes on a rank, mode by mode: ``gather_features`` and then ``get_logits``."""
    if gather_with_grad:
        images, texts = (torch.cat(dist_nn.all_gather(x)) for x in (image, text))
    else:
        gathered = []
        for x in (image, text):
            parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
            dist.all_gather(parts, x.detach())
            if not local_loss:
                parts[rank] = x
            gathered.append(torch.cat(parts))
        images, texts = gathered
    if local_loss:
        logits, labels = (scale * image @ texts.T, scale * text @ images.T), torch.arange(len(image)) + rank * len(image)
    else:
        logits = (scale * images @ texts.T, scale * texts @ images.T)
        labels = torch.arange(len(images))
    return sum(F.cross_entropy(x, labels) for x in logits) / 2


def modes_of_open_clip(images: torch.Tensor, texts: torch.Tensor, rank: int, size: int) -> None:
    """The features' gradients on each rank, and the means over ranks of the loss and of the scale's gradient."""
    for local_loss, gather_with_grad in ((False, False), (False, True), (True, True)):
        theirs, mine = (leaves(rank, size, images, texts, (3.0,)) for _ in range(2))
        module = ClipLoss(local_loss, gather_with_grad, rank=rank, world_size=size)
        loss, value = as_in_open_clip(*theirs, rank, local_loss, gather_with_grad), module(*mine)
        wanted, got = torch.autograd.grad(loss, theirs), torch.autograd.grad(value, mine)
        assert all(compare(x, y, "gemm") for x, y in zip(got[:2], wanted[:2], strict=True)), (local_loss, gather_with_grad)
        for x, y in ((value.detach(), loss.detach()), (got[2], wanted[2])):
            dist.all_reduce(y)
            assert compare(x, y / size, "gemm", terms=10.0), (local_loss, gather_with_grad)


def main(rank: int, size: int, path: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{path}", rank=rank, world_size=size)
    torch.manual_seed(0)
    group = dist.group.WORLD
    for dtype in (torch.float64, torch.float32):
        images, texts = torch.randn(IMAGES * size, D, dtype=dtype), torch.randn(TEXTS * size, D, dtype=dtype)
        square = texts[: IMAGES * size]
        # Each rank's targets count its own images and texts; those of the whole batch count all.
        index = torch.randint(-1, IMAGES, (size, TEXTS))
        offset = IMAGES * torch.arange(size)[:, None]
        all_index = torch.where(index < 0, index, index + offset).flatten()
        start = torch.randint(0, TEXTS, (size, IMAGES), dtype=torch.int32)
        stop = (start + torch.randint(0, 3, (size, IMAGES), dtype=torch.int32)).clamp(max=TEXTS)
        shift = (TEXTS * torch.arange(size, dtype=torch.int32))[:, None]
        ranges = KeyRanges(start[rank : rank + 1], stop[rank : rank + 1])
        all_ranges = KeyRanges((start + shift).view(1, -1), (stop + shift).view(1, -1))
        for function, numbers in ((clip_loss, (3.0,)), (siglip_loss, (3.0, -1.0))):
            for theirs, mine, captions in (
                ({}, {}, square),
                ({"targets": all_index}, {"targets": index[rank]}, texts),
                ({"targets": all_ranges, "normalize": True}, {"targets": ranges, "normalize": True}, texts),
            ):
                if function is clip_loss:
                    theirs, mine = {**theirs, "label_smoothing": 0.1}, {**mine, "label_smoothing": 0.1}
                agree(
                    lambda *x, f=function, o=theirs: f(*x, **o), lambda *x, f=function, o=mine: f(*x, group=group, **o),
                    leaves(0, 1, images, captions, numbers), leaves(rank, size, images, captions, numbers), size, rank,
                )  # fmt: skip
        modes_of_open_clip(images, square, rank, size)
        told = {"rank": rank, "world_size": size}
        for module, function, numbers, times in (
            (ClipLoss(local_loss=True, gather_with_grad=True, **told), clip_loss, (3.0,), size),
            (ClipLoss(gather_with_grad=True, **told), clip_loss, (3.0,), size),
            (ClipLoss(**told), clip_loss, (3.0,), 1),
            (SigLipLoss(dist_impl="bidir", **told), siglip_loss, (3.0, -1.0), size),
        ):
            whole = leaves(0, 1, images, square, numbers)
            agree(function, module, whole, leaves(rank, size, images, square, numbers), times, rank)
    try:
        ClipLoss(rank=0, world_size=size + 1)(images, square, 1.0)
    except ValueError as error:
        assert f"rank {rank} of {size}, wanted rank 0 of {size + 1}" in str(error)
    else:
        raise AssertionError("a module that was told of other ranks than there are")
    leave()


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3])

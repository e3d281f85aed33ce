# SPDX-License-Identifier: Apache-2.0
"""The workloads of the contrastive losses: a step with the gradients of features and numbers, on normal deviates of length 1."""

import dataclasses
import importlib
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from vlmkernels.bench import Unavailable
from vlmkernels.bench.peers import Provider
from vlmkernels.bench.workloads import OURS, Case, num_bytes, work_dtype
from vlmkernels.ops.contrastive import clip_loss, siglip_loss

#: Pairs of a batch on a CPU, and rows of the chunked loop.
CPU_PAIRS, CHUNK = 256, 2048

Loss = Callable[..., torch.Tensor]


def _clip_dense(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """As open_clip's ``ClipLoss`` computes it in one process."""
    logits = scale * image @ text.T
    labels = torch.arange(len(image), device=image.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def _siglip_dense(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    """As open_clip's ``SigLipLoss`` computes it in one process."""
    logits = scale * image @ text.T + bias
    labels = 2 * torch.eye(len(image), device=image.device, dtype=image.dtype) - 1
    return -F.logsigmoid(labels * logits).sum() / len(image)


def _clip_chunked(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """A loop over rows, whose logits are computed again in the backward pass."""

    def part(rows: torch.Tensor, text: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = (scale * rows @ text.T).float()
        return torch.logsumexp(logits, 1), torch.logsumexp(logits, 0)

    parts = [checkpoint(part, rows, text, scale, use_reentrant=False) for rows in image.split(CHUNK)]
    rows, columns = torch.cat([x for x, _ in parts]), torch.logsumexp(torch.stack([x for _, x in parts]), 0)
    return (rows + columns).mean() / 2 - (scale * (image * text).float().sum(1)).mean()


def _siglip_chunked(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    def part(rows: torch.Tensor, text: torch.Tensor, first: int, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        logits = (scale * rows @ text.T + bias).float()
        positive = torch.arange(len(text), device=text.device) == first + torch.arange(len(rows), device=text.device)[:, None]
        return F.softplus(torch.where(positive, -logits, logits)).sum()

    firsts = range(0, len(image), CHUNK)
    parts = [
        checkpoint(part, rows, text, first, scale, bias, use_reentrant=False)
        for first, rows in zip(firsts, image.split(CHUNK), strict=True)
    ]
    return torch.stack(parts).sum() / len(image)


def _open_clip(name: str) -> Loss:
    try:
        module = importlib.import_module("open_clip.loss")
    except ImportError:
        raise Unavailable("open_clip is not installed") from None
    loss: Loss = getattr(module, name)()
    return loss


def step(loss: Loss, leaves: list[torch.Tensor]) -> Callable[[], tuple[torch.Tensor, ...]]:
    """Forward and backward, with the gradients of everything; those of the features come out."""

    def call() -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            return torch.autograd.grad(loss(*leaves), leaves)[:2]

    return call


def loss_case(kind: str, pairs: int, dim: int) -> Callable[[torch.device], Case]:
    """A builder for ``"clip"`` or ``"siglip"`` of this many pairs of ``dim`` channels; fewer pairs on a CPU.

    The exact gradients are those of the torch backend in fp64, which the tests compare with the reference: the whole matrix of
    logits in fp64 would not fit.
    """
    clip = kind == "clip"
    ours, dense, chunked = (clip_loss, _clip_dense, _clip_chunked) if clip else (siglip_loss, _siglip_dense, _siglip_chunked)
    numbers = (1 / 0.07,) if clip else (10.0, -10.0)

    def build(device: torch.device) -> Case:
        on_gpu, dtype = device.type == "cuda", work_dtype(device)
        rows = pairs if on_gpu else min(pairs, CPU_PAIRS)
        torch.manual_seed(0)
        image, text = (F.normalize(torch.randn(rows, dim, device=device), dim=-1).to(dtype) for _ in range(2))
        leaves = [image, text, *(torch.tensor(x, device=device, dtype=dtype) for x in numbers)]
        for leaf in leaves:
            leaf.requires_grad_()

        def exact() -> tuple[torch.Tensor, ...]:
            wide = [x.detach().double().requires_grad_() for x in leaves]
            return step(lambda *x: ours(*x, backend="torch"), wide)()

        def provider(name: str, make: Callable[[], Loss], compiled: bool = False) -> Provider:
            return Provider(name, lambda: step(make(), leaves), compiled)

        peers = [
            provider("eager", lambda: dense),
            provider("open_clip", lambda: _open_clip("ClipLoss" if clip else "SigLipLoss")),
            provider("chunked loop", lambda: chunked),
        ]
        if on_gpu:
            peers.insert(1, provider("eager compiled", lambda: torch.compile(dense, dynamic=False), compiled=True))
        return Case(
            ours=provider(OURS, lambda: ours),
            peers=tuple(peers),
            outputs=("dimage", "dtext"),
            exact=exact,
            part=lambda i, x: x,
            rule="gemm",
            # The logits, again for the gradients of CLIP's as the row and column sums come first, and two products with them.
            flops=8.0 * rows * rows * dim,
            bytes=2.0 * num_bytes(image, text),
            dtype=dtype,
            clock="replay",
        )

    return build


def large(case: Callable[[torch.device], Case]) -> Callable[[torch.device], Case]:
    """Without the peers that hold the matrix of logits, which would take 128 GiB; a CUDA graph would have thousands of nodes."""

    def build(device: torch.device) -> Case:
        built = case(device)
        return dataclasses.replace(
            built, peers=tuple(peer for peer in built.peers if peer.name == "chunked loop"), clock="device"
        )

    return build

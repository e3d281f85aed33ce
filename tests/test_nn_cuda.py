# SPDX-License-Identifier: Apache-2.0
"""The layers with cross-attention on a GPU, at published widths, against themselves in fp64 on the CPU."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import capture
from nn_parity import randomize
from torch import Tensor, nn

from vlmkernels import KeyRanges, use_backend
from vlmkernels.nn import AttentionPool, GatedCrossAttention, KosmosResampler, MllamaCrossAttention, PerceiverResampler, QFormer
from vlmkernels.testing import compare

pytestmark = pytest.mark.gpu
B, Q, S = 2, 32, 257
CPU = torch.device("cpu")


def lengths(device: torch.device, *counts: int) -> Tensor:
    return torch.tensor(counts, device=device)


def padded(queries: int) -> Callable[[torch.device], KeyRanges]:
    """Of two images the second has 100 tokens."""
    return lambda device: KeyRanges.key_padding(queries, lengths=lengths(device, S, 100))


def text(device: torch.device) -> KeyRanges:
    """48 tokens of text: 8 before any image, then 20 of the first image of 128 tokens, then 20 of the second."""
    start = torch.zeros(1, 48, dtype=torch.int32, device=device)
    stop = start.clone()
    stop[:, 8:28], start[:, 28:], stop[:, 28:] = 128, 128, 256
    return KeyRanges(start, stop)


#: name: the module, the shapes of its inputs, its ranges; how a call passes them.
CASES: dict[str, tuple[Callable[[], nn.Module], tuple[tuple[int, ...], ...], Callable[[torch.device], KeyRanges] | None]] = {
    "QFormer": (lambda: QFormer(depth=1, text=False), ((1, Q, 768), (B, S, 1408)), None),
    "QFormer, padded": (lambda: QFormer(depth=1, text=False), ((1, Q, 768), (B, S, 1408)), padded(Q)),
    "PerceiverResampler": (lambda: PerceiverResampler(1280, depth=1), ((B, S, 1280),), None),
    "PerceiverResampler, flamingo": (
        lambda: PerceiverResampler(1024, 8, 64, depth=1, layout="flamingo"), ((B, S, 1024),), None,
    ),
    "KosmosResampler": (lambda: KosmosResampler(), ((B, S, 1024),), None),
    "GatedCrossAttention": (lambda: GatedCrossAttention(2048, 16, 4096, context_dim=1024), ((1, 48, 2048), (1, 256, 1024)), text),
    "MllamaCrossAttention": (lambda: MllamaCrossAttention(2048, 16, 4), ((1, 48, 2048), (1, 256, 2048)), text),
    "AttentionPool": (lambda: AttentionPool(1152, 16, 4304), ((B, S, 1152),), None),
    "AttentionPool, timm": (lambda: AttentionPool(768, 12, layout="timm", num_probes=3, pool="mean"), ((B, S, 768),), None),
    "AttentionPool, padded": (lambda: AttentionPool(1152, 16, 4304), ((B, S, 1152),), padded(1)),
}  # fmt: skip


def keywords(name: str, device: torch.device) -> dict[str, Any]:
    make = CASES[name][2]
    return {} if make is None else {"context_ranges" if name.startswith("QFormer") else "ranges": make(device)}


@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("name", CASES)
def test_bf16_against_fp64(name: str, compiled: bool, device: torch.device) -> None:
    build, shapes, _ = CASES[name]
    module = randomize(build()).to(device, torch.bfloat16)
    inputs = tuple(torch.randn(shape, device=device).bfloat16() for shape in shapes)
    wide = copy.deepcopy(module).to(CPU, torch.float64)
    with torch.no_grad():
        torch._dynamo.reset()
        call: Any = torch.compile(module, fullgraph=True, dynamic=False) if compiled else module
        out = call(*inputs, **keywords(name, device))
        with use_backend("reference"):
            exact = wide(*(x.to(CPU, torch.float64) for x in inputs), **keywords(name, CPU))
    result = compare(out.cpu(), exact, "module")
    assert result, result


@pytest.mark.parametrize("name", CASES)
def test_bf16_gradients_are_there(name: str, device: torch.device) -> None:
    """Of everything, finite and not zero; how right they are is for the tests in fp32, as a bf16 layer's noise is anybody's."""
    build, shapes, _ = CASES[name]
    module = randomize(build()).to(device, torch.bfloat16)
    inputs = tuple(torch.randn(shape, device=device).bfloat16().requires_grad_() for shape in shapes)
    module(*inputs, **keywords(name, device)).square().sum().backward()
    unused = ("key.bias", "k_proj.bias")
    found = [*inputs, *(p for n, p in module.named_parameters() if not n.endswith(unused))]
    assert all(x.grad is not None and x.grad.isfinite().all() and x.grad.any() for x in found)


@pytest.mark.parametrize("name", CASES)
def test_in_a_cuda_graph(name: str, device: torch.device) -> None:
    """A replay on other inputs computes what a call computes, also after the parameters changed."""
    build, shapes, _ = CASES[name]
    module = randomize(build()).to(device, torch.bfloat16)
    inputs = tuple(torch.randn(shape, device=device).bfloat16() for shape in shapes)
    ranges = keywords(name, device)
    with torch.no_grad():
        graph, out = capture(lambda: module(*inputs, **ranges))
        for x in inputs:
            x.copy_(torch.randn_like(x))
        for parameter in module.parameters():
            parameter.mul_(0.9)
        graph.replay()
        assert torch.equal(out, module(*inputs, **ranges))

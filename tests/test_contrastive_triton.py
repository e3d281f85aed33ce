# SPDX-License-Identifier: Apache-2.0
"""What the Triton backend of the contrastive losses has of its own: panels, sums of 24 bits; on a GPU memory, bits and graphs."""

import pytest
import torch
from conftest import capture, runnable
from test_contrastive import OPS, Loss, extra_bytes, features, numbers, portable, several_captions

from vlmkernels import clip_loss, siglip_loss
from vlmkernels.testing import compare

if "triton" not in runnable(*OPS):
    pytest.skip("Triton does not run here", allow_module_level=True)

from vlmkernels.backends.triton import contrastive


def test_sums_of_24_bits(device: torch.device) -> None:
    """Rounded to nearest at each step, over nine magnitudes; NaN and infinities stay what they are."""
    parts = [torch.randn(3, 777, device=device) * torch.logspace(-5, 4, 777, device=device) for _ in range(5)]
    parts[0][0, :3] = torch.tensor([float("nan"), float("inf"), float("-inf")])
    parts[0].view(torch.int32)[1, 0] = 0x7FFFFFFF  # the NaN that a GPU computes
    parts[2][0, 3] = float("nan")
    high = torch.empty(3, 777, dtype=torch.bfloat16, device=device)
    low = torch.empty(3, 777, dtype=torch.uint8, device=device)
    exact = sum(x.double() for x in parts)
    for i, x in enumerate(parts):
        last = i == len(parts) - 1
        total = x.clone()
        contrastive._add_narrow(total, high, low, i == 0, last)
    assert torch.equal(total.isnan(), exact.isnan()) and exact.isnan().sum() == 3
    assert torch.equal(total.isinf(), exact.isinf())
    finite = exact.isfinite()
    off = (total - exact)[finite].abs() / sum(x.double().abs() for x in parts)[finite]
    assert 2**-20 < off.max() <= 4 * 2**-17 and off.mean() < 2**-18


def test_panels_fill_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """One 128 x 256 tile of a product for each of 132 multiprocessors, of even panels, and of one where that is enough."""
    monkeypatch.setattr(contrastive, "INTERPRETED", True)
    cpu = torch.device("cpu")
    sizes = {dim: contrastive._panel_size(32768, 128, dim, cpu) for dim in (512, 768, 1152)}
    assert sizes == {512: 8192, 768: 5504, 1152: 3328}
    assert contrastive._panel_size(5000, 128, 768, cpu) == 5000 and contrastive._panel_size(6000, 128, 768, cpu) == 3072


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_two_runs_give_the_same_bits(loss: Loss, device: torch.device) -> None:
    """Triton and cuBLAS, over several panels with rests."""
    leaves = [*features(1100, 1900, 512, torch.bfloat16, device), *numbers(loss, device)]
    index = several_captions(1100, 1900, device)
    results = []
    for _ in range(3):
        value = loss(*leaves, targets=index, backend="triton")
        results.append([value, *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_few_rows_past_2_31(loss: Loss, normalize: bool, device: torch.device) -> None:
    """Features of a tensor whose rows lie so far apart that offsets take 64 bits."""
    image, text = features(3, 3, 16, torch.bfloat16, device)
    apart = torch.empty((2 << 30) + 16, dtype=torch.bfloat16, device=device).as_strided((3, 16), (1 << 30, 1))
    apart.copy_(image.detach())
    results = []
    for x in (image.detach(), apart):
        leaves = [x.requires_grad_(), text, *numbers(loss, device)]
        value = loss(*leaves, normalize=normalize, backend="triton")
        results.append([value, *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@pytest.mark.gpu
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_memory(loss: Loss, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside inputs and results, less than 3 % of what the logits alone would take in bf16, at 4 GiB of those."""
    monkeypatch.setattr(contrastive, "PANEL", 4096)
    rows = 46336
    leaves = [*features(rows, rows, 256, torch.bfloat16, device), *numbers(loss, device)]
    assert extra_bytes(loss, leaves, "triton") < 0.03 * 2 * rows**2


@pytest.mark.gpu
@portable
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_graph_capture(loss: Loss, backend: str, device: torch.device) -> None:
    leaves = [*features(300, 300, 64, torch.bfloat16, device), *numbers(loss, device)]

    def step() -> list[torch.Tensor]:
        value = loss(*leaves, backend=backend)
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    graph, captured = capture(step)
    with torch.no_grad():
        for x in leaves[:3]:
            x.mul_(torch.rand_like(x) + 0.5)
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert compare(x, y, "exact")

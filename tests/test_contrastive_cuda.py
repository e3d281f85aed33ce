# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the contrastive losses: every width of their tiles, panels in every order, whatever waits for another."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import capture
from test_contrastive import Loss, check, extra_bytes, features, numbers, runs, several_captions

from vlmkernels import BackendError, clip_loss, siglip_loss
from vlmkernels.testing import compare

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_library")]

both = pytest.mark.parametrize("loss", [clip_loss, siglip_loss])

# images, texts, D, kind of targets, rows and columns of a panel and how many are kept. Rows of panels go in pairs: 1, 2 and 3 of
# them, and 5 columns. The last tile of a gradient has 256 channels or 128.
CASES = {
    "one-panel": (512, 512, 256, "", (512, 512, 3)),
    "pair": (512, 1280, 512, "ranges", (256, 256, 3)),
    "three-rows": (768, 768, 768, "", (256, 256, 3)),
    "captions": (512, 1280, 768, "index", (256, 256, 2)),
    "rest": (1280, 1792, 384, "ranges", (512, 768, 3)),
    "narrow-tiles": (1024, 1536, 1152, "index", (512, 512, 3)),
    "more-than-kept": (1024, 1024, 256, "", (256, 256, 4)),
    "1024": (2304, 2048, 1024, "ranges", None),
    # No whole tiles: of a warpgroup's rows, of the last eight columns.
    "one-warp": (17, 17, 256, "", None),
    "few": (40, 72, 256, "index", None),
    "rest-of-both": (500, 333, 384, "ranges", (256, 256, 2)),
    "one-more": (513, 1025, 256, "index", (512, 768, 3)),
    "no-warpgroup": (570, 650, 512, "ranges", (256, 256, 3)),
    "thousand": (1000, 1000, 768, "", None),
}


def panels(monkeypatch: pytest.MonkeyPatch, shape: tuple[int, int, int] | None) -> None:
    from vlmkernels.backends.cuda import contrastive

    if shape is not None:
        monkeypatch.setattr(contrastive, "panel_shape", lambda *_: shape)
        monkeypatch.setattr(contrastive, "STRIP_TILES", 2)


@both
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradients(name: str, loss: Loss, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    images, texts, dim, kind, shape = CASES[name]
    panels(monkeypatch, shape)
    targets = {"index": several_captions, "ranges": runs}.get(kind)
    leaves = [*features(images, texts, dim, torch.bfloat16, device), *numbers(loss, device)]
    check(loss, leaves, "cuda", targets and targets(images, texts, device))


@both
@pytest.mark.parametrize("size", [512, 455])
@pytest.mark.parametrize("kind", ["scale", "far", "all-alike", "negative"])
def test_extreme_logits(loss: Loss, kind: str, size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A scale of 100; rows so far apart that no exponential serves both directions; logits that all are far from 0. Behind the
    last features, where there is nothing to be seen, the logits would be 0."""
    panels(monkeypatch, (256, 256, 3))
    a, b = (F.normalize(torch.randn(size, 256, device=device)) for _ in range(2))
    # As alike as leaves something of the gradient: of a pair that nothing else comes near, only the rounding of logits is left.
    b = F.normalize(b + a / 8)
    if kind == "far":
        a = a * torch.logspace(-1, 1, size, device=device)[:, None]
    if kind == "all-alike":
        a, b = (F.normalize(x + F.normalize(torch.ones(256, device=device), dim=0)) for x in (a, b))
    leaves = [x.bfloat16().requires_grad_() for x in (a, b)]
    check(loss, [*leaves, *numbers(loss, device, {"all-alike": 250.0, "negative": -100.0}.get(kind, 100.0))], "cuda")


@both
def test_scale_of_zero(loss: Loss, device: torch.device) -> None:
    """All logits alike, but for those of features that are not there."""
    leaves = [*features(300, 300, 256, torch.bfloat16, device), *numbers(loss, device, 0.0)]
    value = loss(*leaves, backend="cuda")
    wanted = loss(*(x.double() for x in leaves), backend="reference")
    assert abs(value - wanted) < 1e-5 * wanted and not any(x.any() for x in torch.autograd.grad(value, leaves[:2]))


@both
def test_strides(loss: Loss, device: torch.device) -> None:
    table = (torch.randn(512, 3 * 256, device=device) / 16).bfloat16()
    leaves = [x.detach().requires_grad_() for x in (table[:, :256], table[:, 504:760])]
    check(loss, [*leaves, *numbers(loss, device)], "cuda")


@pytest.mark.parametrize("size", [768, 700])
def test_nan_stays_in_its_rows(size: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while a sum has 20 bits."""
    panels(monkeypatch, (256, 256, 3))
    leaves = [*features(size, size, 256, torch.bfloat16, device), *numbers(siglip_loss, device)]
    with torch.no_grad():
        leaves[0][300, 3] = float("nan")
    value = siglip_loss(*leaves, backend="cuda")
    dimage, dtext = torch.autograd.grad(value, leaves[:2])
    assert value.isnan() and dtext.isnan().all()
    assert dimage.isnan().all(1).nonzero().tolist() == [[300]] and dimage.isnan().any(1).sum() == 1
    assert clip_loss(*leaves[:3], backend="cuda").isnan()


def test_what_belongs_to_nothing(device: torch.device) -> None:
    """Its cross-entropy has no weight, so that its log-sum-exp is infinite where it stands for the gradient."""
    leaves = [*features(512, 512, 256, torch.bfloat16, device), *numbers(clip_loss, device)]
    check(clip_loss, leaves, "cuda", torch.where(torch.arange(512, device=device) < 100, torch.arange(512, device=device), -1))
    nothing = clip_loss(*leaves, targets=torch.full((512,), -1, device=device), backend="cuda")
    assert nothing == 0 and not any(x.any() for x in torch.autograd.grad(nothing, leaves))


@both
def test_without_gradients(loss: Loss, device: torch.device) -> None:
    leaves = [*features(512, 768, 256, torch.bfloat16, device), *numbers(loss, device)]
    targets = several_captions(512, 768, device)
    with torch.no_grad():
        value = loss(*leaves, targets=targets, backend="cuda")
    assert compare(value, loss(*(x.double() for x in leaves), targets=targets, backend="reference"), "gemm", terms=12.0)


@both
def test_two_runs_give_the_same_bits(loss: Loss, device: torch.device) -> None:
    """Whoever was first, sums are added up in one order."""
    leaves = [*features(8192, 6144, 512, torch.bfloat16, device), *numbers(loss, device)]
    index = several_captions(8192, 6144, device)
    results = []
    for _ in range(4):
        value = loss(*leaves, targets=index, backend="cuda")
        results.append([value, *torch.autograd.grad(value, leaves)])
    assert all(torch.equal(x, y) for other in results[1:] for x, y in zip(results[0], other, strict=True))


@both
def test_two_streams(loss: Loss, device: torch.device) -> None:
    """Blocks that wait for each other are all there, even where two launches want the whole GPU at once."""
    leaves = [*features(4096, 4096, 512, torch.bfloat16, device), *numbers(loss, device)]

    def step() -> list[torch.Tensor]:
        return list(torch.autograd.grad(loss(*leaves, backend="cuda"), leaves))

    wanted = step()
    torch.cuda.synchronize()
    results = []
    for _ in range(4):
        for stream in (torch.cuda.Stream(), torch.cuda.Stream()):
            with torch.cuda.stream(stream):
                results.append(step())
    torch.cuda.synchronize()
    assert all(torch.equal(x, y) for other in results for x, y in zip(wanted, other, strict=True))


@both
@pytest.mark.parametrize("dim", [512, 1152])
def test_memory(loss: Loss, dim: int, device: torch.device) -> None:
    """Beside inputs and results, less than 2 % of what the dense form keeps compiled: the logits in bf16, and CLIP's twice."""
    rows = 32768
    leaves = [*features(rows, rows, dim, torch.bfloat16, device), *numbers(loss, device)]
    assert extra_bytes(loss, leaves, "cuda") < 0.02 * (4 if loss is clip_loss else 2) * rows**2


@both
def test_graph_capture(loss: Loss, device: torch.device) -> None:
    leaves = [*features(512, 512, 256, torch.bfloat16, device), *numbers(loss, device)]

    def step() -> list[torch.Tensor]:
        value = loss(*leaves, backend="cuda")
        return [value.detach(), *torch.autograd.grad(value, leaves)]

    graph, captured = capture(step)
    with torch.no_grad():
        for x in leaves[:3]:
            x.mul_(torch.rand_like(x) + 0.5)
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert compare(x, y, "exact")


@both
def test_choice(loss: Loss, device: torch.device) -> None:
    """It is the first choice, and what it refuses runs elsewhere, as few pairs do."""
    refused: dict[str, tuple[tuple[int, int, int], torch.dtype, dict[str, Any]]] = {
        "it takes bfloat16, these are torch.float16": ((512, 512, 256), torch.float16, {}),
        "multiples of 128 channels from 256 on, these are 320": ((512, 512, 320), torch.bfloat16, {}),
        "multiples of 128 channels from 256 on, these are 128": ((512, 512, 128), torch.bfloat16, {}),
        "it does not normalize": ((512, 512, 256), torch.bfloat16, {"normalize": True}),
    }
    if loss is clip_loss:
        refused["it does not smooth labels"] = ((512, 512, 256), torch.bfloat16, {"label_smoothing": 0.1})
    for message, ((images, texts, dim), dtype, options) in refused.items():
        leaves = [*features(images, texts, dim, dtype, device), *numbers(loss, device)]
        options["targets"] = several_captions(images, texts, device)
        with pytest.raises(BackendError, match=message):
            loss(*leaves, backend="cuda", **options)
        loss(*leaves, **options)
    for rows, wanted in ((2304, "cuda"), (512, "triton")):
        leaves = [*features(rows, rows, 256, torch.bfloat16, device), *numbers(loss, device)]
        chosen, *both = (torch.autograd.grad(loss(*leaves, backend=name), leaves[:2]) for name in (None, "cuda", "triton"))
        same = [all(torch.equal(x, y) for x, y in zip(chosen, grads, strict=True)) for grads in both]
        assert same == [wanted == "cuda", wanted == "triton"]


def test_gradients_that_ranks_add_up_are_wide(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a rank computes for the others' texts: fp32, of more columns than rows, kept whole between panels."""
    panels(monkeypatch, (256, 256, 3))
    ops = torch.ops.vlmkernels
    for dim in (256, 384):
        a, b = (x.detach() for x in features(768, 1024, dim, torch.bfloat16, device))
        row, column = torch.rand(768, device=device), torch.rand(1024, device=device)
        start = torch.arange(768, dtype=torch.int32, device=device) + 256
        scale = torch.tensor(9.0, device=device)
        vectors = (start, start + 1, row, row, column, column, None, None)
        wide = [x.double() if x is not None and x.is_floating_point() else x for x in (a, b, scale, *vectors)]
        lse = ops.clip_loss_fwd(*wide, 0.0, 0.0, "reference")[:2]
        got = ops.clip_loss_bwd(scale, a, b, scale, *vectors, *(x.float() for x in lse), 0.0, 0.0, torch.float32, "cuda")
        wanted = ops.clip_loss_bwd(scale.double(), *wide, *lse, 0.0, 0.0, torch.float64, "reference")
        assert got[1].dtype == torch.float32
        # The gradient of the logits is bf16 on the way to it.
        assert compare(got[1].bfloat16(), wanted[1], "gemm") and compare(got[0], wanted[0], "gemm")
        dtypes = torch.bfloat16, torch.float32
        got = ops.siglip_loss_fwd(a, b, scale, scale - 12, start, start + 1, None, None, 0.1, True, *dtypes, "cuda")
        dtypes = torch.float64, torch.float64
        wanted = ops.siglip_loss_fwd(*wide[:3], wide[2] - 12, start, start + 1, None, None, 0.1, True, *dtypes, "reference")
        assert got[2].dtype == torch.float32 and compare(got[2].bfloat16(), wanted[2], "gemm")
        assert compare(got[1], wanted[1], "gemm")

# SPDX-License-Identifier: Apache-2.0
"""The contrastive losses: every backend against torch's own cross-entropy and log-sigmoid on the whole matrix in fp64."""

import importlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ON_GPU, runnable
from torch.library import opcheck

from vlmkernels import BackendError, KeyRanges, clip_loss, siglip_loss
from vlmkernels.ops import _pairs
from vlmkernels.testing import compare

OPS = ("clip_loss_fwd", "clip_loss_bwd", "siglip_loss_fwd", "siglip_loss_bwd_")
UPSTREAM = 0.7
Loss = Callable[..., torch.Tensor]

# What the CUDA kernels take has tests of its own, tests/test_contrastive_cuda.py.
portable = pytest.mark.backends(*OPS, exclude=("cuda",))
compiled = pytest.mark.backends(*OPS, exclude=("cuda",) if ON_GPU else ("cuda", "triton"))


@pytest.fixture(autouse=True)
def several_panels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small inputs shall have more than one panel, strip and chunk."""
    if "triton" in runnable(*OPS):
        triton = importlib.import_module("vlmkernels.backends.triton.contrastive")
        monkeypatch.setattr(triton, "PANEL", 256 if ON_GPU else 32)
        monkeypatch.setattr(triton, "STRIP", 256 if ON_GPU else 32)
    monkeypatch.setattr(importlib.import_module("vlmkernels.backends.torch.contrastive"), "LOGITS", 1000)
    yield


def extra_bytes(loss: Loss, leaves: list[torch.Tensor], backend: str) -> int:
    """What a loss and its gradients take on the GPU at most, beside inputs and results."""
    loss(*(x[:512] if x.dim() else x for x in leaves), backend=backend).backward()  # what cuBLAS allocates once
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    gradients = torch.autograd.grad(loss(*leaves, backend=backend), leaves)
    return torch.cuda.max_memory_allocated() - before - sum(x.numel() * x.element_size() for x in gradients)


def features(images: int, texts: int, dim: int, dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    return [(torch.randn(size, dim, device=device) / dim**0.5).to(dtype).requires_grad_() for size in (images, texts)]


def numbers(loss: Loss, device: torch.device, scale: float = 12.0) -> list[torch.Tensor]:
    """The scale, and for SigLIP the bias."""
    values = (scale,) if loss is clip_loss else (scale, -3.0)
    return [torch.tensor(x, device=device, requires_grad=True) for x in values]


def belong(images: int, texts: int, targets: torch.Tensor | KeyRanges | None, device: torch.device) -> torch.Tensor:
    """``[M, N]`` fp64, 1 where image and text belong together."""
    if targets is None:
        return torch.eye(images, dtype=torch.float64, device=device)
    if isinstance(targets, KeyRanges):
        return targets.dense(texts)[0].double()
    return (targets == torch.arange(images, device=device)[:, None]).double()


def entropy(logits: torch.Tensor, positive: torch.Tensor, smoothing: float) -> torch.Tensor:
    """The mean cross-entropy of the rows that have a target."""
    target = positive / positive.sum(1, keepdim=True).clamp_min(1)
    has = positive.sum(1) > 0
    return F.cross_entropy(logits[has], target[has], label_smoothing=smoothing) if has.any() else logits.sum() * 0


def exact(
    loss: Loss, leaves: list[torch.Tensor], targets: Any = None, label_smoothing: float = 0.0, normalize: bool = False
) -> tuple[list[torch.Tensor], list[float]]:
    """The loss and its gradients in fp64, and the magnitudes of the terms that each of them adds up (0 for the features)."""
    image, text, *rest = (x.detach().double().requires_grad_() for x in leaves)
    a, b = (F.normalize(image), F.normalize(text)) if normalize else (image, text)
    positive = belong(len(image), len(text), targets, image.device)
    products = a @ b.T
    logits = rest[0] * products
    if loss is clip_loss:
        value = (entropy(logits, positive, label_smoothing) + entropy(logits.T, positive.T, label_smoothing)) / 2
    else:
        logits = logits + rest[1]
        value = -F.logsigmoid((2 * positive - 1) * logits).sum() / len(image)
    *gradients, g = torch.autograd.grad(value, [image, text, *rest, logits], torch.tensor(UPSTREAM).to(value))
    # An fp32 logit is off by eps times itself, and so is all that is computed from it.
    off = g.abs() * (1 + logits.detach().abs())
    picked = (positive * logits.detach().abs()).sum() / positive.sum().clamp_min(1)  # what the log-sum-exps are subtracted from
    terms = [(off.sum() + picked).item(), 0.0, 0.0, (off * products.detach().abs()).sum().item(), off.sum().item()]
    return [value.detach(), *gradients], terms[: len(gradients) + 1]


def check(
    loss: Loss, leaves: list[torch.Tensor], backend: str | None, targets: Any = None, rule: str = "gemm", **options: Any
) -> None:
    """The loss and every gradient are within the bounds, and have the dtypes and layouts that they should."""
    value = loss(*leaves, targets=targets, backend=backend, **options)
    gradients = torch.autograd.grad(value, leaves, torch.full_like(value, UPSTREAM))
    wide = torch.promote_types(leaves[0].dtype, torch.float32)
    assert value.dtype == wide and value.shape == ()
    assert all(x.dtype == y.dtype and x.shape == y.shape and x.is_contiguous() for x, y in zip(gradients, leaves, strict=True))
    wanted, terms = exact(loss, leaves, targets, **options)
    names = ("loss", "image", "text", "scale", "bias")
    for name, x, y, magnitude in zip(names, (value, *gradients), wanted, terms, strict=False):
        result = compare(x, y, rule, terms=magnitude)
        assert result, f"{name}: {result}"


def several_captions(images: int, texts: int, device: torch.device) -> torch.Tensor:
    """The image of each text; some images have none, and some texts belong to none."""
    return torch.randint(-1, images + 1, (texts,), device=device)


def runs(images: int, texts: int, device: torch.device) -> KeyRanges:
    """A run of texts of each image, in any order, some overlapping and some empty or beyond the end."""
    start = torch.randint(-2, texts, (1, images), dtype=torch.int32, device=device)
    return KeyRanges(start, start + torch.randint(0, 4, (1, images), dtype=torch.int32, device=device))


# images, texts, D, kind of targets, options
CASES: dict[str, tuple[int, int, int, str, dict[str, Any]]] = {
    "square": (50, 50, 40, "", {}),
    "captions": (30, 50, 24, "index", {}),
    "runs-smoothing": (28, 31, 33, "ranges", {"label_smoothing": 0.1}),
    "smoothing": (20, 20, 64, "", {"label_smoothing": 0.2}),
    "normalize": (32, 32, 32, "", {"normalize": True}),
}
if ON_GPU:
    CASES |= {
        "768": (1000, 1000, 768, "", {}),
        "whole-tiles-normalize": (512, 1024, 512, "index", {"normalize": True, "label_smoothing": 0.1}),
        "1152": (700, 1300, 1152, "ranges", {}),
    }


def case(name: str, device: torch.device) -> tuple[int, int, int, Any, dict[str, Any]]:
    images, texts, dim, kind, options = CASES[name]
    make = {"index": several_captions, "ranges": runs}.get(kind)
    return images, texts, dim, make and make(images, texts, device), options


@portable
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, torch.float32) for name in CASES]
    + [(name, torch.bfloat16) for name in CASES if name not in ("smoothing", "runs-smoothing")]
    + [(name, torch.float16) for name in ("square", "normalize")],
    ids=str,
)
def test_loss_and_gradients(name: str, loss: Loss, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    images, texts, dim, targets, options = case(name, device)
    if loss is siglip_loss:
        options = {key: value for key, value in options.items() if key != "label_smoothing"}
    if dtype == torch.float16 and backend == "triton" and "normalize" in options:
        with pytest.raises(BackendError, match="triton: it normalizes bf16 and fp32, not fp16"):
            loss(*features(4, 4, 8, dtype, device), *numbers(loss, device), normalize=True, backend=backend).backward()
        return
    leaves = features(images, texts, dim, dtype, device)
    if options.get("normalize"):
        leaves = [(x.detach() * torch.rand(len(x), 1, device=device).add(0.1).to(dtype)).requires_grad_() for x in leaves]
    before = [x.detach().clone() for x in leaves]
    check(loss, [*leaves, *numbers(loss, device)], backend, targets, **options)
    assert all(torch.equal(x, y) for x, y in zip(leaves, before, strict=True))


@pytest.mark.backends(*OPS, exclude=("cuda", "triton"))
@pytest.mark.parametrize("targets", ["", "index", "ranges"])
@pytest.mark.parametrize("normalize", [False, True])
def test_gradcheck(normalize: bool, targets: str, backend: str, device: torch.device) -> None:
    size = (5, 7, 3) if targets else (5, 5, 3)
    chosen = {"index": several_captions, "ranges": runs}.get(targets)
    given = chosen and chosen(*size[:2], device)
    for loss in (clip_loss, siglip_loss):
        leaves = [x.detach().double().requires_grad_() for x in (*features(*size, torch.float64, device), *numbers(loss, device))]
        options: dict[str, Any] = {"targets": given, "normalize": normalize, "backend": backend}
        if loss is clip_loss:
            options["label_smoothing"] = 0.1
        assert torch.autograd.gradcheck(lambda *x, f=loss, o=options: f(*x, **o), leaves)


@portable
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_extreme_logits(loss: Loss, backend: str, device: torch.device) -> None:
    """A scale of 100, which no exponential may overflow; and rows so far apart that no exponential serves both directions."""
    a, b = (F.normalize(torch.randn(32, 24, device=device)) for _ in range(2))
    b = F.normalize(b + a / 2)
    size = torch.logspace(-1, 1, 32, device=device)[:, None]
    for image, text in ((a, b), (a * size, b)):
        leaves = [x.bfloat16().requires_grad_() for x in (image, text)]
        # Where few answers are left the gradient is what is left of their probabilities, each rounded to bf16.
        check(loss, [*leaves, *numbers(loss, device, 100.0)], backend)


@portable
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_ties_and_single_rows(loss: Loss, backend: str, device: torch.device) -> None:
    image, text = features(30, 30, 16, torch.float32, device)
    twice = text.detach()[torch.arange(30, device=device) // 2].requires_grad_()
    check(loss, [image, twice, *numbers(loss, device)], backend)
    same = torch.ones(30, 16, device=device, requires_grad=True)
    value = loss(same, text * 0, *numbers(loss, device), backend=backend)
    wanted = torch.tensor(30.0).log() if loss is clip_loss else exact(loss, [same, text * 0, *numbers(loss, device)])[0][0]
    assert compare(value, wanted.double(), "gemm")
    one = [*features(1, 1, 16, torch.float32, device), *numbers(loss, device)]
    if loss is siglip_loss:
        check(loss, one, backend)
    else:
        value = loss(*one, backend=backend)
        gradients = torch.autograd.grad(value, one)
        assert value == 0 and all(compare(x, torch.zeros_like(x), "gemm", terms=12.0) for x in gradients)


@portable
def test_strides(backend: str, device: torch.device) -> None:
    """Rows and columns with gaps, transposed and expanded features, an odd storage offset, numbers of other shapes and dtypes."""
    table = torch.randn(24 * 30 + 1, device=device) / 5
    wide = table[1:].view(30, 24)
    images = wide[:, ::2], table[: 12 * 30].view(12, 30).T, wide[:, 3:15]
    texts = images[1], images[2], wide[:1, 1:13].expand(30, 12)
    for x, text, dtype in zip(images, texts, (torch.float32, torch.bfloat16, torch.float32), strict=True):
        leaves = [y.detach() if dtype == torch.float32 else y.to(dtype) for y in (x, text)]
        leaves = [y.requires_grad_() for y in leaves]
        check(siglip_loss, [*leaves, *numbers(siglip_loss, device)], backend)
        if text.stride(0):  # equal texts, of which the gradients cancel, are for other tests
            check(clip_loss, [*leaves, torch.full((1,), 2.5, device=device).bfloat16().requires_grad_()], backend)
        assert clip_loss(*leaves, 2.5, backend=backend) == clip_loss(*leaves, torch.tensor([2.5], device=device), backend=backend)


@portable
def test_nan_stays_in_its_rows(backend: str, device: torch.device) -> None:
    """Where every pair is by itself. A softmax takes it to all."""
    leaves = [*features(40, 40, 16, torch.float32, device), *numbers(siglip_loss, device)]
    with torch.no_grad():
        leaves[0][5, 3] = float("nan")
    value = siglip_loss(*leaves, backend=backend)
    dimage, dtext = torch.autograd.grad(value, leaves[:2])
    assert value.isnan() and dtext.isnan().all()
    assert dimage.isnan().all(1).nonzero().tolist() == [[5]] and dimage.isnan().any(1).sum() == 1
    assert clip_loss(*leaves[:3], backend=backend).isnan()


@portable
def test_what_belongs_to_nothing(backend: str, device: torch.device) -> None:
    """It is among the wrong answers of the others, and has no part in the mean; where nothing belongs, there is no loss."""
    image, text = features(20, 30, 16, torch.float32, device)
    scale = numbers(clip_loss, device)
    index = torch.where(torch.arange(30, device=device) < 20, torch.arange(30, device=device), -1)
    value = clip_loss(image, text, *scale, targets=index, backend=backend)
    logits = 12.0 * (image.double() @ text.double().T)
    labels = torch.arange(20, device=device)
    wanted = (F.cross_entropy(logits, labels) + F.cross_entropy(logits[:, :20].T, labels)) / 2
    assert compare(value, wanted, "gemm", terms=12.0)
    nothing = clip_loss(image, text, *scale, targets=torch.full_like(index, -1), backend=backend)
    assert nothing == 0 and not any(x.any() for x in torch.autograd.grad(nothing, [image, text, *scale]))
    as_ranges = KeyRanges(*(x.clamp(max=20).int()[None] for x in (labels, labels + 1)))
    assert compare(clip_loss(image, text, *scale, targets=as_ranges, backend=backend), wanted, "gemm", terms=12.0)


@portable
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_reversed_ranges_are_empty(loss: Loss, backend: str, device: torch.device) -> None:
    image, text = features(4, 5, 16, torch.float32, device)
    start, *stops = (torch.tensor([x], dtype=torch.int32, device=device) for x in ([0, 4, 2, 3], [1, 1, 4, 0], [1, 4, 4, 3]))
    values = [loss(image, text, 5.0, targets=KeyRanges(start, stop), backend=backend) for stop in stops]
    assert values[0].isfinite() and torch.equal(*values)


@portable
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_a_row_of_zeros_has_no_direction(loss: Loss, backend: str, device: torch.device) -> None:
    image, text = (x.detach() for x in features(6, 6, 16, torch.float32, device))
    image[2] = 0
    wanted, terms = exact(loss, [image, text, *numbers(loss, device)], normalize=True)
    value = loss(image, text, *(x.detach() for x in numbers(loss, device)), normalize=True, backend=backend)
    assert compare(value, wanted[0], "gemm", terms=terms[0])


@portable
@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_without_gradients(loss: Loss, backend: str, device: torch.device) -> None:
    leaves = [*features(30, 30, 16, torch.float32, device), *numbers(loss, device)]
    value = loss(*leaves, backend=backend)
    with torch.no_grad():
        assert torch.equal(loss(*leaves, backend=backend), value)
    alone = loss(leaves[0].detach(), leaves[1], *(x.detach() for x in leaves[2:]), backend=backend)
    wanted = torch.autograd.grad(value, leaves[1], retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(alone, leaves[1])[0], wanted)
    times = torch.full_like(value, 3.0)
    again = [torch.autograd.grad(value, leaves[0], times, retain_graph=True)[0].clone() for _ in range(2)]
    assert torch.equal(*again)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(value.square(), leaves[0], create_graph=True)[0].sum().backward()


@portable
def test_gradients_that_ranks_add_up_are_wide(backend: str, device: torch.device) -> None:
    """What a rank computes for the others' texts: fp32 whatever the features, of more columns than rows."""
    a, b = (x.detach() for x in features(24, 48, 16, torch.bfloat16, device))
    row, column = torch.rand(24, device=device), torch.rand(48, device=device)
    start = torch.arange(24, dtype=torch.int32, device=device) + 24
    scale = torch.tensor(9.0, device=device)
    vectors = (start, start + 1, row, row, column, column, None, None)
    ops = torch.ops.vlmkernels
    wide = [x.double() if x is not None and x.is_floating_point() else x for x in (a, b, scale, *vectors)]
    lse = ops.clip_loss_fwd(*wide, 0.0, 0.0, "reference")[:2]
    got = ops.clip_loss_bwd(scale, a, b, scale, *vectors, *(x.float() for x in lse), 0.0, 0.0, torch.float32, backend)
    wanted = ops.clip_loss_bwd(scale.double(), *wide, *lse, 0.0, 0.0, torch.float64, "reference")
    assert got[1].dtype == torch.float32
    # The gradient of the logits is bf16 on the way to it where the tensor cores take it there.
    assert compare(got[1].bfloat16(), wanted[1], "gemm") and compare(got[0], wanted[0], "gemm")
    dtypes = torch.bfloat16, torch.float32
    got = ops.siglip_loss_fwd(a, b, scale, scale - 12, start, start + 1, None, None, 0.1, True, *dtypes, backend)
    dtypes = torch.float64, torch.float64
    wanted = ops.siglip_loss_fwd(*wide[:3], wide[2] - 12, start, start + 1, None, None, 0.1, True, *dtypes, "reference")
    assert got[2].dtype == torch.float32 and compare(got[2].bfloat16(), wanted[2], "gemm")
    assert compare(got[1], wanted[1], "gemm") and compare(got[0], wanted[0], "gemm", terms=wanted[0].item() * 20)


@compiled
def test_opcheck(backend: str, device: torch.device) -> None:
    a, b = (x.detach() for x in features(6, 9, 8, torch.float32, device))
    scale, row, column = torch.tensor(2.0, device=device), torch.rand(6, device=device), torch.rand(9, device=device)
    start = torch.arange(6, dtype=torch.int32, device=device)
    ops = torch.ops.vlmkernels
    vectors, dtypes = (start, start + 1, row, row, column, column), (torch.float32, torch.float32)
    opcheck(ops.clip_loss_fwd, (a, b, scale, *vectors, None, None, 0.1, 0.1, backend))
    opcheck(ops.clip_loss_bwd, (scale, a, b, scale, *vectors, row, column, row, column, 0.1, 0.1, torch.float32, backend))
    opcheck(ops.siglip_loss_fwd, (a, b, scale, scale, start, start + 1, None, None, 0.1, False, *dtypes, backend))
    opcheck(ops.siglip_loss_fwd, (a, b, scale, scale, start, start + 1, row, column, 0.1, True, *dtypes, backend))
    opcheck(ops.siglip_loss_bwd_, (a, b, row[:2], scale, 2.0, backend))


@portable
@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.bfloat16), (torch.float16, torch.float32), (torch.float32,) * 2])
def test_siglip_gradients_times_that_of_the_loss(backend: str, dtypes: tuple[torch.dtype, ...], device: torch.device) -> None:
    """In place, in fp32: a factor between two numbers of bf16 counts whole."""
    da, db = (torch.randn(rows, 40, device=device).to(dtype) for rows, dtype in zip((33, 70), dtypes, strict=True))
    dnumbers, dloss = torch.tensor([3.0, -5.0], device=device), torch.tensor(1.0039, device=device)
    wanted = [(x.double() * dloss.double() * factor).to(x.dtype) for x, factor in ((da, 3.0), (db, 3.0), (dnumbers, 1.0))]
    torch.ops.vlmkernels.siglip_loss_bwd_(da, db, dnumbers, dloss, 3.0, backend)
    for got, exact in zip((da, db, dnumbers), wanted, strict=True):
        torch.testing.assert_close(got, exact)


@compiled
def test_compile(backend: str, device: torch.device) -> None:
    """One graph, forward and backward, also with one tensor in two places."""
    leaves = [*features(20, 20, 16, torch.float32, device), *numbers(siglip_loss, device)]
    index = several_captions(20, 20, device)

    def step(image: torch.Tensor, text: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        image = image * 2
        loss = clip_loss(image, text, scale.exp() / 4e4, label_smoothing=0.1, normalize=True, backend=backend)
        loss = loss + siglip_loss(image, text, scale, bias, targets=index, backend=backend)
        return loss + clip_loss(image, image, 3.0, backend=backend).square()

    expected = torch.autograd.grad(step(*leaves), leaves)
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(*leaves), leaves), expected, strict=True):
        assert compare(x, y, "gemm")


def test_what_each_step_needs_is_made_once(device: torch.device) -> None:
    """Also where the first step was one of inference; not by what is compiled."""
    _pairs._kept.clear()
    leaves = features(9, 9, 8, torch.float32, device)
    with torch.inference_mode():
        clip_loss(*leaves, 10.0)
    kept = dict(_pairs._kept)
    assert len(kept) == 2 and not any(x.is_inference() for vectors in kept.values() for x in vectors)
    clip_loss(*leaves, 10.0).backward()
    siglip_loss(*leaves, 10.0).backward()
    assert list(_pairs._kept) == list(kept) and all(_pairs._kept[key] is vectors for key, vectors in kept.items())
    torch.compile(lambda *x: clip_loss(*x, 10.0), backend="eager")(*features(7, 7, 8, torch.float32, device))
    assert list(_pairs._kept) == list(kept)
    for n in range(10, 10 + _pairs._MOST_KEPT):
        clip_loss(*features(n, n, 8, torch.float32, device), 10.0)
    assert len(_pairs._kept) == _pairs._MOST_KEPT and kept.keys() <= _pairs._kept.keys()  # a graph may read them


def test_many_pairs_keep_nothing(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    _pairs._kept.clear()
    monkeypatch.setattr(_pairs, "_MOST_ROWS", 8)
    clip_loss(*features(9, 9, 8, torch.float32, device), 10.0)
    assert not _pairs._kept


def test_gradcache(device: torch.device) -> None:
    """Features in chunks without a graph, the loss on all of them, and each chunk again with its share of the gradient."""
    tower = torch.nn.Linear(12, 8, device=device, dtype=torch.float64)
    x, y = torch.randn(2, 9, 12, device=device, dtype=torch.float64).unbind()
    whole = torch.autograd.grad(clip_loss(tower(x), tower(y), 5.0, normalize=True), list(tower.parameters()))
    with torch.no_grad():
        image, text = (torch.cat([tower(chunk) for chunk in inputs.split(4)]) for inputs in (x, y))
    clip_loss(image.requires_grad_(), text.requires_grad_(), 5.0, normalize=True).backward()
    for inputs, cached in ((x, image), (y, text)):
        assert cached.grad is not None
        for chunk, gradient in zip(inputs.split(4), cached.grad.split(4), strict=True):
            tower(chunk).backward(gradient)
    for parameter, gradient in zip(tower.parameters(), whole, strict=True):
        assert parameter.grad is not None and compare(parameter.grad, gradient, "gemm")


def test_refusals(device: torch.device) -> None:
    image, text = features(6, 6, 8, torch.float32, device)
    index = torch.arange(6, device=device)
    long = KeyRanges(index[None].int(), index[None].int() + 1)
    short = long[:5]
    refused: dict[str, list[tuple[tuple[Any, ...], dict[str, Any]]]] = {
        "image: got shape": [
            ((image[0], text, 1.0), {}),
            ((image[:0], text[:0], 1.0), {}),
            ((image[:, :0], text[:, :0], 1.0), {}),
        ],
        "image: got torch.int64": [((image.long(), text.long(), 1.0), {})],
        "text: got 7 channels, wanted the 8 of image": [((image, text[:, :7], 1.0), {})],
        "text: got torch.float64": [((image, text.double(), 1.0), {})],
        "text: got 5 rows for 6 images, wanted targets": [((image, text[:5], 1.0), {})],
        "targets: got": [
            ((image, text, 1.0), {"targets": t})
            for t in (index[:5], index.float(), index + 0j, index[None], short, 3, index.to("meta"), long.to("meta"))
        ],
        "logit_scale: got torch.float32 \\(2,\\)": [((image, text, torch.ones(2, device=device)), {})],
        "logit_scale: got torch.int64": [((image, text, torch.tensor(1, device=device)), {})],
        "backend: got": [((image, text, 1.0), {"backend": "tritium"})],
        "group: got": [((image, text, 1.0), {"group": "all"})],
    }
    for message, calls in refused.items():
        for arguments, options in calls:
            for loss in (clip_loss, siglip_loss):
                with pytest.raises(ValueError, match=message):
                    loss(*arguments, **options)
    with pytest.raises(ValueError, match="label_smoothing: got 1.5, wanted a number from 0 to 1"):
        clip_loss(image, text, 1.0, label_smoothing=1.5)
    with pytest.raises(ValueError, match="logit_bias: got torch.float32"):
        siglip_loss(image, text, 1.0, torch.ones(2, device=device))


def test_panels_take_the_room_there_is() -> None:
    """Large ones beside CLIP's logits; those that wait less where no low bits of a gradient lie beside it, which ranks gather."""
    from vlmkernels.backends.cuda.contrastive import panel_shape

    rows, columns, dim = 16384, 32768, 768
    room = rows * columns // 26
    assert panel_shape(columns, columns, dim, columns * dim // 2, columns**2 // 13) == (3072, 3072, 3)
    assert panel_shape(rows, columns, dim, 0, columns**2 // 13) == (2816, 3072, 3)
    assert panel_shape(rows, columns, dim, 0, 2 * room) == (2048, 3072, 3)
    assert panel_shape(rows, columns, dim, 0, room) == (2048, 2048, 3)
    assert panel_shape(rows, columns, dim, columns * dim // 2, room) == (1792, 1792, 3)
    assert panel_shape(columns, columns, 512, columns * 256, columns**2 // 26) == (2048, 1792, 4)

# SPDX-License-Identifier: Apache-2.0
"""A linear layer with a sum and a LayerNorm behind it."""

import math

import pytest
import torch
import torch.nn.functional as F
from conftest import capture, runnable

from vlmkernels import BackendError
from vlmkernels.ops.linear_add_norm import linear_add_norm
from vlmkernels.testing import compare

OP = "linear_add_norm_fwd"
EPS = 1e-5
TRITON = "triton" in runnable(OP)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)

#: rows, width, columns; rows have the tiles of few up to 64.
SHAPES = ((1, 8, 16), (3, 40, 24), (32, 96, 72), (65, 72, 40), (70, 200, 136), (0, 16, 8))


def tensors(
    rows: int, width: int, columns: int, dtype: torch.dtype, device: torch.device, bias: bool = True
) -> dict[str, torch.Tensor]:
    made = {
        "x": torch.randn(rows, width),
        "weight": torch.randn(columns, width) / width**0.5,
        "bias": torch.randn(columns),
        "residual": torch.randn(rows, columns),
        "norm_weight": torch.rand(columns) + 0.5,
        "norm_bias": torch.randn(columns),
    }
    return {name: x.to(device, dtype) for name, x in made.items() if bias or name != "bias"}


def add_norm(t: dict[str, torch.Tensor], backend: str | None = None, eps: float = EPS) -> torch.Tensor:
    rest = (t["residual"], t["norm_weight"], t["norm_bias"])
    return linear_add_norm(t["x"], t["weight"], t.get("bias"), *rest, eps=eps, backend=backend)


def exact(t: dict[str, torch.Tensor], eps: float = EPS) -> torch.Tensor:
    """In fp64 by torch's own functions."""
    w = {name: x.double() for name, x in t.items()}
    y = F.linear(w["x"], w["weight"], w.get("bias")) + w["residual"]
    return F.layer_norm(y, (y.shape[-1],), w["norm_weight"], w["norm_bias"], eps)


def few_rows_are_sixteen(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles of many rows from 17 rows on, small enough for an interpreter."""
    if TRITON:
        from vlmkernels.backends.triton import _product as module

        monkeypatch.setattr(module, "FEW", 16)
        monkeypatch.setattr(module, "MANY_CONFIG", module.Config(32, 32, 32, 4, 2))


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.backends(OP)
def test_against_fp64(
    shape: tuple[int, int, int],
    dtype: torch.dtype,
    bias: bool,
    device: torch.device,
    backend: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    few_rows_are_sixteen(monkeypatch)
    t = tensors(*shape, dtype, device, bias)
    if backend == "triton" and dtype == torch.float32:  # whose products may be TF32's or not, as torch is set
        with pytest.raises(BackendError, match="triton: it has no torch.float32"):
            add_norm(t, backend)
        return
    got = add_norm(t, backend)
    assert got.dtype == dtype and got.is_contiguous()
    assert compare(got, exact(t), "module" if backend == "torch" else "gemm")


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 32, 63, 64, 65, 2048, 2049])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_widths_of_a_qformer(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    t = tensors(rows, 3072, 768, dtype, device)
    assert compare(add_norm(t, "triton"), exact(t), "gemm")


@pytest.mark.backends(OP)
def test_rows_of_any_stride(device: torch.device, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Slices of wider rows, whole tensors of more dimensions, offsets that no copy engine can take; inputs stay as they were."""
    few_rows_are_sixteen(monkeypatch)
    for rows, pad in ((3, 8), (20, 8), (20, 1)):
        t = tensors(2 * rows, 24, 40, torch.bfloat16, device)
        for name in ("x", "weight", "residual"):
            wide = torch.randn(*t[name].shape[:-1], t[name].shape[-1] + 2 * pad, device=device, dtype=torch.bfloat16)
            wide[..., pad:-pad] = t[name]
            t[name] = wide[..., pad:-pad]
        t |= {name: t[name].unflatten(0, (2, rows)) for name in ("x", "residual")}
        before = {name: x.clone() for name, x in t.items()}
        got = add_norm(t, backend)
        assert got.shape == (2, rows, 40)
        assert compare(got, exact(t), "module" if backend == "torch" else "gemm")
        assert all(torch.equal(t[name], before[name]) for name in t)


@pytest.mark.backends(OP)
def test_opcheck(device: torch.device, backend: str) -> None:
    t = tensors(5, 24, 16, torch.bfloat16, device)
    arguments = (t["x"], t["weight"], t["bias"])
    norm = (t["residual"], t["norm_weight"], t["norm_bias"], EPS)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.vlmkernels.linear_add_norm_fwd.default, (*arguments, *norm, backend), test_utils=tests)


@pytest.mark.backends(OP)
def test_a_call_that_comes_again(device: torch.device, backend: str) -> None:
    """With other values, by the plan of the first."""
    for _ in range(3):
        t = tensors(5, 24, 16, torch.bfloat16, device)
        assert compare(add_norm(t, backend), exact(t), "module" if backend == "torch" else "gemm")


@pytest.mark.gpu
def test_compiled_and_in_a_graph(device: torch.device) -> None:
    t = tensors(32, 768, 768, torch.bfloat16, device)

    wanted = exact(t)
    assert compare(torch.compile(lambda: add_norm(t), fullgraph=True)(), wanted, "gemm")
    graph, captured = capture(lambda: add_norm(t))
    captured.zero_()
    graph.replay()
    assert compare(captured, wanted, "gemm")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("x", lambda t: t["x"].long()),
        ("x", lambda t: t["x"][0, 0]),
        ("weight", lambda t: t["weight"][0, 0]),
        ("weight", lambda t: t["weight"][:, 1:]),
        ("weight", lambda t: t["weight"].double()),
        ("bias", lambda t: t["bias"][1:]),
        ("residual", lambda t: t["residual"][:1]),
        ("residual", lambda t: t["residual"].t()),
        ("residual", lambda t: t["residual"].reshape(10, 8)),
        ("residual", lambda t: t["residual"].flatten()),
        ("residual", lambda t: t["residual"].half()),
        ("norm_weight", lambda t: t["norm_weight"][1:]),
        ("norm_bias", lambda t: t["norm_bias"][1:].requires_grad_()),
    ],
)
def test_refusals(name: str, change: object, device: torch.device) -> None:
    t = tensors(5, 24, 16, torch.float32, device)
    t[name] = change(t)  # type: ignore[operator]
    with pytest.raises(ValueError, match=f"^{name}: got"):
        add_norm(t)


@pytest.mark.parametrize("lead", [(5,), (3, 4), (0,)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bias", [True, False])
def test_gradients(bias: bool, dtype: torch.dtype, lead: tuple[int, ...], device: torch.device) -> None:
    t = tensors(math.prod(lead), 40, 24, dtype, device, bias)
    t |= {name: t[name].view(*lead, t[name].shape[-1]) for name in ("x", "residual")}
    cotangent = torch.randn(*lead, 24, device=device).to(dtype)
    for name in t:  # each by itself, and below all of them
        leaf = {name: t[name].clone().requires_grad_()}
        (one,) = torch.autograd.grad(add_norm(t | leaf), [leaf[name]], cotangent)
        assert one.shape == t[name].shape
    leaves = {name: x.clone().requires_grad_() for name, x in t.items()}
    wide = {name: x.double().requires_grad_() for name, x in t.items()}
    got = torch.autograd.grad(add_norm(leaves), list(leaves.values()), cotangent)
    wanted = torch.autograd.grad(exact(wide), list(wide.values()), cotangent.double())
    for name, value, right in zip(t, got, wanted, strict=True):
        assert compare(value, right, "module"), name


def test_gradients_of_a_large_eps(device: torch.device) -> None:
    """Of rows whose variance is small beside it."""
    t = {name: (0.01 * x).requires_grad_() for name, x in tensors(5, 24, 16, torch.float32, device).items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in t.items()}
    cotangent = torch.randn(5, 16, device=device)
    got = torch.autograd.grad(add_norm(t, eps=0.1), list(t.values()), cotangent)
    wanted = torch.autograd.grad(exact(wide, 0.1), list(wide.values()), cotangent.double())
    for name, value, right in zip(t, got, wanted, strict=True):
        assert compare(value, right, "module"), name


def test_second_derivative_refused(device: torch.device) -> None:
    t = tensors(5, 24, 16, torch.float32, device)
    t["x"].requires_grad_()
    (gradient,) = torch.autograd.grad(add_norm(t).square().sum(), t["x"], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_gradients_compiled(device: torch.device) -> None:
    t = {name: x.requires_grad_() for name, x in tensors(6, 24, 16, torch.float32, device).items()}
    compiled = torch.compile(add_norm, fullgraph=True, backend="inductor" if device.type == "cuda" else "aot_eager")
    leaves = list(t.values())
    expected = torch.autograd.grad(add_norm(t).square().sum(), leaves)
    for value, right in zip(torch.autograd.grad(compiled(t).square().sum(), leaves), expected, strict=True):
        assert compare(value, right.double(), "module")

# SPDX-License-Identifier: Apache-2.0
"""A linear layer with its activation: every backend against fp64, what is refused, compiled and captured."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ON_GPU, capture, runnable
from nn_parity import randn
from torch import Tensor
from torch.library import opcheck

from vlmkernels import BackendError
from vlmkernels.ops._op import OPS
from vlmkernels.ops.activated_linear import ACTIVATIONS, activated_linear
from vlmkernels.testing import compare

every_backend = pytest.mark.backends("activated_linear_fwd", exclude=("cuda",))
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)
MATH: dict[str, Any] = {
    "gelu": F.gelu,
    "gelu_tanh": lambda y: F.gelu(y, approximate="tanh"),
    "quick_gelu": lambda y: y * torch.sigmoid(1.702 * y),
    "silu": F.silu,
}
#: What the CUDA kernel takes with a bias, and with a second weight.
PLAIN, GATED = ACTIVATIONS[:3], ("silu", "gelu_tanh")


def leaves(rows: int, depth: int, dim: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Products of the size of one, where an activation bends most."""
    found = randn(rows, depth), randn(dim, depth) * depth**-0.5, randn(dim)
    x, weight, bias = (tensor.to(device, dtype) for tensor in found)
    return x, weight, bias


def exact(x: Tensor, weight: Tensor, bias: Tensor | None, activation: str, up: Tensor | None = None) -> Tensor:
    y: Tensor = MATH[activation](F.linear(x.double(), weight.double(), None if bias is None else bias.double()))
    return y if up is None else y * F.linear(x.double(), up.double())


def rule(backend: str) -> str:
    """torch's quick GELU is three operations, each of which rounds."""
    return "module" if backend == "torch" else "gemm"


def ran(backend: str, activation: str) -> str | None:
    """None where Triton leaves it to cuBLAS."""
    return None if backend == "triton" and activation == "gelu_tanh" else backend


@every_backend
@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_forward(activation: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    tensors = leaves(33, 40, 24, dtype, device)
    for x in (tensors[0], tensors[0].view(3, 11, 40), tensors[0][::2]):
        got = activated_linear(x, *tensors[1:], activation, backend=ran(backend, activation))
        assert got.is_contiguous() and compare(got, exact(x, *tensors[1:], activation), rule(backend))
    assert activated_linear(tensors[0][:0], *tensors[1:], activation, backend=ran(backend, activation)).shape == (0, 24)


@every_backend
@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_gated(activation: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Times a second product, and without a bias; what one product is rounded to, the other multiplies."""
    x, weight, bias = leaves(33, 40, 24, dtype, device)
    up = (randn(24, 40) * 40**-0.5).to(device, dtype)
    for rows in (x, x.view(3, 11, 40), x[::2]):
        for added in (None, bias):
            got = activated_linear(rows, weight, added, activation, up=up, backend=backend)
            assert got.is_contiguous() and compare(got, exact(rows, weight, added, activation, up), "module")
    got = activated_linear(x, weight, None, activation, backend=backend)
    assert compare(got, exact(x, weight, None, activation), "module")
    assert activated_linear(x[:0], weight, None, activation, up=up, backend=backend).shape == (0, 24)


def of_infinity(count: int, activation: str, backend: str | None, device: torch.device) -> torch.Tensor:
    """Infinity, but of torch's backend on a CPU what torch has: with AVX-512 its GELU of float32 and bfloat16 is NaN there."""
    infinities = torch.full((count,), torch.inf, dtype=torch.bfloat16, device=device)
    return F.gelu(infinities) if (backend, activation, device.type) == ("torch", "gelu", "cpu") else infinities


@every_backend
@every_activation
def test_no_numbers_stay_in_their_columns(activation: str, backend: str, device: torch.device) -> None:
    x, weight, bias = leaves(8, 16, 24, torch.bfloat16, device)
    want = exact(x, weight, bias, activation)
    bias[3], bias[5] = torch.nan, torch.inf
    ran_on = ran(backend, activation)
    got = activated_linear(x, weight, bias, activation, backend=ran_on)
    assert got[:, 3].isnan().all()
    torch.testing.assert_close(got[:, 5], of_infinity(8, activation, ran_on, device), rtol=0, atol=0, equal_nan=True)
    others = [i for i in range(24) if i not in (3, 5)]
    assert compare(got[:, others], want[:, others], rule(backend))


@pytest.mark.backends("activated_linear_fwd", exclude=("cuda", "torch", "reference"))
@pytest.mark.parametrize("rows", [1, 17, 65])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_with_gelu(
    rows: int, dtype: torch.dtype, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Triton's own: tiles of few rows up to 16, of many from 17 on, small enough for an interpreter; rows of any stride."""
    from vlmkernels.backends.triton import _product
    from vlmkernels.backends.triton import activated_linear as module

    for where in (_product, module):
        monkeypatch.setattr(where, "FEW", 16)
    monkeypatch.setattr(module, "MANY", 17)
    monkeypatch.setattr(_product, "MANY_CONFIG", _product.Config(32, 32, 32, 4, 2))
    for pad in (0, 8, 1):
        x, weight, bias = leaves(rows, 40 + pad, 24, dtype, device)
        x, weight = x[:, pad:], weight[:, pad:]
        got = activated_linear(x, weight, bias, "gelu", backend=backend)
        assert got.is_contiguous() and compare(got, exact(x, weight, bias, "gelu"), "gemm")


@every_backend
def test_gelu_of_all_magnitudes(backend: str, device: torch.device) -> None:
    """From where it is x to where it is nothing, and what isn't finite stays in its place."""
    x = torch.tensor([-300.0, -20.0, -6.0, -3.0, -1.0, -1e-3, 0.0, 1e-3, 1.0, 3.0, 6.0, 20.0, 300.0], dtype=torch.bfloat16)
    one = torch.eye(16, dtype=torch.bfloat16, device=device)[:1]
    nothing = torch.zeros(1, dtype=torch.bfloat16, device=device)
    y = activated_linear(x.to(device)[:, None] * one, one, nothing, "gelu", backend=backend)
    assert compare(y[:, 0], F.gelu(x.double()), "norm")
    odd = torch.tensor([float("nan"), float("inf"), 1.0], dtype=torch.bfloat16, device=device)
    y = activated_linear(odd[:, None] * one[:, :1], one[:, :1], nothing, "gelu", backend=backend)[:, 0]
    assert y[0].isnan() and y[2].isfinite()
    torch.testing.assert_close(y[1], of_infinity(3, "gelu", backend, device)[1], rtol=0, atol=0, equal_nan=True)


@pytest.mark.gpu
@pytest.mark.parametrize("rows", [1, 32, 63, 64, 65, 1023, 2048, 2049])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_widths_of_a_qformer(rows: int, dtype: torch.dtype, device: torch.device) -> None:
    tensors = leaves(rows, 768, 3072, dtype, device)
    assert compare(activated_linear(*tensors, "gelu", backend="triton"), exact(*tensors, "gelu"), "gemm")


@pytest.mark.backends("activated_linear_fwd", exclude=("cuda",) if ON_GPU else ("cuda", "triton"))
def test_opcheck_and_compile(backend: str, device: torch.device) -> None:
    tensors = leaves(8, 16, 24, torch.float32, device)
    opcheck(torch.ops.vlmkernels.activated_linear_fwd, (*tensors, None, "gelu", backend))
    opcheck(torch.ops.vlmkernels.activated_linear_fwd, (*tensors[:2], None, tensors[1], "silu", backend))
    compiled = torch.compile(activated_linear, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    with torch.no_grad():
        got = compiled(*tensors, "quick_gelu", backend=backend)
    assert compare(got, exact(*tensors, "quick_gelu"), "gemm")


def test_refusals(device: torch.device) -> None:
    x, weight, bias = leaves(8, 16, 24, torch.float32, device)
    for arguments, name in (
        ((x.long(), weight, bias, "gelu"), "x"),
        ((x, weight[:, 1:], bias, "gelu"), "weight"),
        ((x, weight.double(), bias, "gelu"), "weight"),
        ((x, weight, bias[1:], "gelu"), "bias"),
        ((x, weight, bias, "relu"), "activation"),
        ((x.requires_grad_(), weight, bias, "gelu"), "x, weight, bias, up"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            activated_linear(*arguments)
    for up in (weight[1:], weight.double()):
        with pytest.raises(ValueError, match="^up: got"):
            activated_linear(x.detach(), weight, None, "silu", up=up)
    with torch.no_grad():
        assert activated_linear(x, weight, bias, "gelu").shape == (8, 24)


# Rows, depth, columns: all widths of tiles (256, 192 and 128 columns), and rests of rows, depth and columns.
SIZES = {
    "CLIP-L": (18464, 1024, 4096),
    "BERT": (16384, 768, 3072),
    "EVA-g": (16448, 1408, 6144),
    "SigLIP": (23328, 1152, 4304),
    "least depth": (9000, 512, 1000),
    "rests": (34001, 584, 264),
    "narrow": (33792, 640, 128),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_library")
@pytest.mark.parametrize("activation", PLAIN)
@pytest.mark.parametrize("name", SIZES)
def test_cuda(name: str, activation: str, device: torch.device) -> None:
    dtype = torch.float16 if name == "rests" else torch.bfloat16
    tensors = leaves(*SIZES[name], dtype, device)
    assert OPS["activated_linear_fwd"].why_not("cuda", device, *tensors, None, activation) is None
    got = activated_linear(*tensors, activation)
    assert compare(got, exact(*tensors, activation), "gemm")
    assert torch.equal(activated_linear(*tensors, activation), got), "with the plan, and the same bits"


# Both widths of tiles (128 columns of the result and 96), and rests of rows, depth and columns.
GATED_SIZES = {
    "LLaVA": (8192, 4096, 11008),
    "Gemma-3": (4096, 2560, 10240),
    "least depth": (9000, 512, 1000),
    "rests": (34001, 584, 264),
    "narrow": (33792, 640, 96),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_library")
@pytest.mark.parametrize("activation", GATED)
@pytest.mark.parametrize("name", GATED_SIZES)
def test_cuda_gated(name: str, activation: str, device: torch.device) -> None:
    rows, depth, dim = GATED_SIZES[name]
    x, weight, _ = leaves(rows, depth, dim, torch.float16 if name == "rests" else torch.bfloat16, device)
    up = torch.randn_like(weight) * depth**-0.5
    got = activated_linear(x, weight, None, activation, up=up, backend="cuda")
    some = torch.cat([torch.arange(300), torch.arange(rows - 300, rows), torch.randint(rows, (400,))]).to(device)
    assert compare(got[some], exact(x[some], weight, None, activation, up), "module")
    assert torch.equal(got, activated_linear(x, weight, None, activation, up=up)), "with the plan, and the same bits"
    with pytest.raises(BackendError, match="a bias or a second weight"):
        activated_linear(x, weight, weight[:, 0].contiguous(), activation, up=up, backend="cuda")


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_library")
@pytest.mark.parametrize("activation", PLAIN)
def test_cuda_far_from_zero(activation: str, device: torch.device) -> None:
    """Every bf16 number from 2^-20 to 64 and its negative comes as a bias, and what is no number stays in its column."""
    x, weight, _ = leaves(33792, 512, 6664, torch.bfloat16, device)
    sizes = torch.arange(0x3580, 0x4280, dtype=torch.int16, device=device).view(torch.bfloat16)
    special = torch.tensor([torch.nan, torch.inf, 1e30, -1e30], device=device).bfloat16()
    bias = torch.cat([sizes, -sizes, special, special])
    got = activated_linear(x, weight.zero_(), bias, activation, backend="cuda")
    want = MATH[activation](bias[: 2 * len(sizes)].double())
    error = (got[:, : 2 * len(sizes)].double() - want).abs().amax(0)
    assert (error <= want.abs() * 2**-8 * 1.02 + 1e-8).all(), "half a unit in the last place"
    assert got[:, -4].isnan().all() and got[:, -3].isposinf().all()
    assert (got[:, -2] > 9e29).all() and (got[:, -1].abs() < 1e-8).all()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_library")
def test_cuda_leaves_and_captures(device: torch.device) -> None:
    tensors = leaves(18464, 1024, 4096, torch.bfloat16, device)
    for x, reason in ((tensors[0][:577], "fewer than"), (tensors[0][:, :512].contiguous(), "")):
        weight = tensors[1][:, : x.shape[1]].contiguous()
        if reason:
            with pytest.raises(BackendError, match=reason):
                activated_linear(x, weight, tensors[2], "gelu", backend="cuda")
        assert compare(activated_linear(x, weight, tensors[2], "gelu"), exact(x, weight, tensors[2], "gelu"), "gemm")
    with pytest.raises(BackendError, match="bfloat16 and float16"):
        activated_linear(*(tensor.float() for tensor in tensors), "gelu", backend="cuda")
    graph, got = capture(lambda: activated_linear(*tensors, "quick_gelu"))
    tensors[0].copy_(tensors[0].flip(0))
    graph.replay()
    assert compare(got, exact(*tensors, "quick_gelu"), "gemm")
    assert "cuda" in runnable("activated_linear_fwd")

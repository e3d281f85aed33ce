# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of a stream, the stream with a bias, and the product added to it: every backend against fp64, refusals, graphs."""

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from conftest import ON_GPU, capture
from nn_parity import randn
from torch import Tensor
from torch.library import opcheck

from vlmkernels.ops._add_product import add_product
from vlmkernels.ops.layer_norm import layer_norm
from vlmkernels.testing import compare

every_backend = pytest.mark.backends("layer_norm_fwd")


def leaves(*shape: int, dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    dim = shape[-1]
    x, weight, bias, shift = (
        tensor.to(device, dtype) for tensor in (3 * randn(*shape) + 1, 1 + 0.1 * randn(dim), randn(dim), randn(dim))
    )
    return x, weight, bias, shift


def check(got: tuple[Tensor, Tensor], x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor) -> None:
    wide = [tensor.double() for tensor in (x, weight, bias, shift)]
    assert all(tensor.is_contiguous() for tensor in got)
    assert compare(got[0], F.layer_norm(wide[0], weight.shape, wide[1], wide[2], 1e-6), "norm")
    assert compare(got[1], wide[0] + wide[3], "norm")


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("dim", [1, 33, 96, 1408 if ON_GPU else 136])
def test_forward(dim: int, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    tensors = leaves(3, 5, dim, dtype=dtype, device=device)
    if dim == 1:
        tensors[0].zero_()  # one column has no variance: a difference from its mean is rounding
    check(layer_norm(*tensors, 1e-6, backend=backend), *tensors)
    x = tensors[0].transpose(0, 1)
    check(layer_norm(x, *tensors[1:], 1e-6, backend=backend), x, *tensors[1:])
    assert layer_norm(tensors[0][:0], *tensors[1:], backend=backend)[0].shape == (0, 5, dim)


@every_backend
def test_no_numbers_stay_in_their_rows(backend: str, device: torch.device) -> None:
    tensors = leaves(4, 40, dtype=torch.float32, device=device)
    tensors[0][1, 7] = torch.nan
    y, total = layer_norm(*tensors, 1e-6, backend=backend)
    assert y[1].isnan().all() and total[1].isnan().sum() == 1
    rows = [0, 2, 3]
    check((y[rows], total[rows]), tensors[0][rows], *tensors[1:])


@pytest.mark.backends("layer_norm_bwd")
@pytest.mark.parametrize("streams", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 96), (40, 136), (2, 3, 4, 33), (0, 16), (300 if ON_GPU else 3, 32, 768)], ids=str)
def test_backward(shape: tuple[int, ...], dtype: torch.dtype, streams: bool, backend: str, device: torch.device) -> None:
    """Of the norm alone, whose input has the shift, and of both results."""
    x, weight, bias, _ = leaves(*shape, dtype=dtype, device=device)
    dy, dtotal = (randn(*shape).to(device, dtype) for _ in range(2))
    got = torch.ops.vlmkernels.layer_norm_bwd(dy, dtotal if streams else None, x, weight, 1e-6, backend)
    wide = [tensor.double().requires_grad_() for tensor in (x, torch.zeros_like(bias), weight, bias)]
    total = wide[0] + wide[1]
    y = F.layer_norm(wide[0] if streams else total, weight.shape, *wide[2:], 1e-6)
    results, incoming = ((y, total), (dy.double(), dtotal.double())) if streams else (y, dy.double())
    for value, exact in zip(got, torch.autograd.grad(results, wide, incoming), strict=True):
        assert value.is_contiguous() and compare(value, exact, "grad")


@pytest.mark.backends("layer_norm_bwd")
def test_backward_of_a_weight_with_gaps(backend: str, device: torch.device) -> None:
    x, dy = randn(5, 40).to(device), randn(5, 40).to(device)
    weight = randn(40, 2).to(device)[:, 0]
    got = torch.ops.vlmkernels.layer_norm_bwd(dy, None, x, weight, 1e-6, backend)
    wanted = torch.ops.vlmkernels.layer_norm_bwd(dy.double(), None, x.double(), weight.double(), 1e-6, "reference")
    for value, exact in zip(got, wanted, strict=True):
        assert value.is_contiguous() and compare(value, exact, "grad")


@pytest.mark.backends("layer_norm_bwd")
def test_no_numbers_of_gradients(backend: str, device: torch.device) -> None:
    """They stay in their rows, and reach the sums of their columns; rows behind the last one add nothing."""
    x, weight, _, _ = leaves(7, 40, dtype=torch.float32, device=device)
    dy, dtotal = randn(7, 40).to(device), randn(7, 40).to(device)
    dtotal[5, 3] = torch.nan
    dx, dshift, dweight, dbias = torch.ops.vlmkernels.layer_norm_bwd(dy, dtotal, x, weight, 0.0, backend)
    assert dx.isnan().nonzero().tolist() == [[5, 3]] and dshift.isnan().nonzero().tolist() == [[3]]
    assert dweight.isfinite().all() and dbias.isfinite().all()


@pytest.mark.backends("layer_norm_fwd", exclude=("triton",))  # which has no fp64
def test_gradcheck(backend: str, device: torch.device) -> None:
    given = tuple(tensor.requires_grad_() for tensor in leaves(2, 3, 8, dtype=torch.float64, device=device))
    assert torch.autograd.gradcheck(lambda *tensors: layer_norm(*tensors, 1e-3, backend=backend), given)
    (dx,) = torch.autograd.grad(layer_norm(*given, backend=backend)[0].square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


@pytest.mark.parametrize("learn", ["total", "y", "shift", "weight"])
def test_only_what_is_needed(learn: str, device: torch.device) -> None:
    """One of the results has no gradient, or one of the tensors wants none."""
    given = leaves(4, 40, dtype=torch.float32, device=device)
    wide = tuple(tensor.double() for tensor in given)
    at = {"shift": 3, "weight": 1}.get(learn, 0)

    def gradient(tensors: tuple[Tensor, ...], results: Callable[..., tuple[Tensor, Tensor]]) -> Tensor:
        own = [tensor.detach().requires_grad_(i == at) for i, tensor in enumerate(tensors)]
        y, total = results(*own)
        return torch.autograd.grad({"total": total, "y": y}.get(learn, y + total).square().sum(), own[at])[0]

    exact = gradient(wide, lambda x, weight, bias, shift: (F.layer_norm(x, weight.shape, weight, bias), x + shift))
    assert compare(gradient(given, layer_norm), exact, "grad")


@pytest.mark.parametrize("learn", ["111", "100", "010", "001", "000"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_add_product(dtype: torch.dtype, learn: str, device: torch.device) -> None:
    given = [randn(*shape).to(device, dtype) for shape in ((2, 3, 8), (2, 3, 12), (8, 12))]
    own = [tensor.requires_grad_(flag == "1") for tensor, flag in zip(given, learn, strict=True)]
    wide = [tensor.detach().double().requires_grad_(tensor.requires_grad) for tensor in own]
    total = own[0] * 2
    got, want = add_product(total, *own[1:]), 2 * wide[0] + wide[1] @ wide[2].t()
    assert got.data_ptr() == total.data_ptr() and compare(got, want, "module")
    if learn != "000":
        learnt = [i for i, flag in enumerate(learn) if flag == "1"]
        dout = randn(2, 3, 8).to(device, dtype)
        exact = torch.autograd.grad(want, [wide[i] for i in learnt], dout.double())
        for value, right in zip(torch.autograd.grad(got, [own[i] for i in learnt], dout), exact, strict=True):
            assert compare(value, right, "grad")


@pytest.mark.backends("layer_norm_bwd", exclude=() if ON_GPU else ("triton",))
@pytest.mark.parametrize("streams", [False, True])
def test_backward_opcheck(streams: bool, backend: str, device: torch.device) -> None:
    x, weight, *_ = leaves(4, 40, dtype=torch.float32, device=device)
    arguments = (x + 1, x + 2 if streams else None, x, weight, 1e-6, backend)
    opcheck(torch.ops.vlmkernels.layer_norm_bwd, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.backends("layer_norm_fwd", exclude=() if ON_GPU else ("triton",))
def test_opcheck_and_compile(backend: str, device: torch.device) -> None:
    tensors = leaves(4, 40, dtype=torch.float32, device=device)
    opcheck(torch.ops.vlmkernels.layer_norm_fwd, (*tensors, 1e-6, backend))
    compiled = torch.compile(layer_norm, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    check(compiled(*tensors, 1e-6, backend=backend), *tensors)


def test_refusals(device: torch.device) -> None:
    x, weight, bias, shift = leaves(4, 40, dtype=torch.float32, device=device)
    for arguments, name in (
        ((x.long(), weight, bias, shift), "x"),
        ((x[:, :0], weight, bias, shift), "x"),
        ((x, weight[1:], bias, shift), "weight"),
        ((x, weight, bias.double(), shift), "bias"),
        ((x, weight, bias, shift[None]), "shift"),
    ):
        for learns in (False, True):
            with pytest.raises(ValueError, match=f"^{name}: got"), torch.set_grad_enabled(learns):
                layer_norm(arguments[0], arguments[1].requires_grad_(learns), *arguments[2:])


@pytest.mark.gpu
@pytest.mark.parametrize("dim", [768, 1024, 1152, 1280, 1408, 4096, 8192, 8200])
def test_towers(dim: int, device: torch.device) -> None:
    tensors = leaves(1031, dim, dtype=torch.bfloat16, device=device)
    graph, got = capture(lambda: layer_norm(*tensors, 1e-6))
    tensors[0].copy_(tensors[0].flip(0))
    graph.replay()
    check(got, *tensors)
    again = layer_norm(*tensors, 1e-6)
    assert all(torch.equal(a, b) for a, b in zip(again, got, strict=True)), "with the plan"

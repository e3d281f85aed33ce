# SPDX-License-Identifier: Apache-2.0
"""LayerNorm of a stream and the stream with a bias: every backend against fp64, what is refused, compiled and captured."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ON_GPU, capture
from nn_parity import randn
from torch import Tensor
from torch.library import opcheck

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
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(3, 5, 96), (40, 136), (2, 3, 4, 33), (0, 16), (300 if ON_GPU else 3, 32, 768)], ids=str)
def test_backward(shape: tuple[int, ...], dtype: torch.dtype, backend: str, device: torch.device) -> None:
    x, weight, bias, _ = leaves(*shape, dtype=dtype, device=device)
    dy = randn(*shape).to(device, dtype)
    got = torch.ops.vlmkernels.layer_norm_bwd(dy, x, weight, 1e-6, backend)
    wide = [tensor.double().requires_grad_() for tensor in (x, torch.zeros_like(bias), weight, bias)]
    y = F.layer_norm(wide[0] + wide[1], weight.shape, *wide[2:], 1e-6)
    for value, exact in zip(got, torch.autograd.grad(y, wide, dy.double()), strict=True):
        assert value.is_contiguous() and compare(value, exact, "grad")


@pytest.mark.backends("layer_norm_bwd", exclude=() if ON_GPU else ("triton",))
def test_backward_opcheck(backend: str, device: torch.device) -> None:
    x, weight, *_ = leaves(4, 40, dtype=torch.float32, device=device)
    opcheck(torch.ops.vlmkernels.layer_norm_bwd, (x + 1, x, weight, 1e-6, backend), test_utils=("test_schema", "test_faketensor"))


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
        ((x, weight.requires_grad_(), bias, shift), "x, weight, bias, shift"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got"):
            layer_norm(*arguments)
    with torch.no_grad():
        assert layer_norm(x, weight, bias, shift)[0].shape == x.shape


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

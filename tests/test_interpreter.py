# SPDX-License-Identifier: Apache-2.0
"""bfloat16 in Triton's interpreter, as the tests on a CPU use it: right with our shim, and wrong without it.

On a GPU the same kernels run for real, so the shim is held to what the hardware does.
"""

from collections.abc import Iterator

import pytest
import torch

from vlmkernels.testing import compare, interpreter

triton = pytest.importorskip("triton", reason="triton is not installed")
import triton.language as tl  # noqa: E402


@triton.jit
def _cast_kernel(x_ptr, y_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    tl.store(y_ptr + offs, tl.load(x_ptr + offs).to(y_ptr.dtype.element_ty))


@triton.jit
def _elementwise_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, x + y)
    tl.store(out_ptr + N + offs, x * y)
    tl.store(out_ptr + 2 * N + offs, x - y)
    tl.store(out_ptr + 3 * N + offs, -x)
    tl.store(out_ptr + 4 * N + offs, x * 0.3)
    tl.store(out_ptr + 5 * N + offs, tl.where(x < y, x, y))
    tl.store(out_ptr + 6 * N + offs, tl.maximum(x, y))
    tl.store(out_ptr + 7 * N + offs, (x > y).to(tl.bfloat16))


@triton.jit
def _sum_kernel(x_ptr, out_ptr, N: tl.constexpr):
    x = tl.load(x_ptr + tl.arange(0, N))
    tl.store(out_ptr, tl.sum(x.to(tl.float32), 0))
    tl.store(out_ptr + 1, tl.max(x, 0).to(tl.float32))


@triton.jit
def _dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    c = tl.dot(tl.load(a_ptr + offs), tl.load(b_ptr + offs))
    tl.store(c_ptr + offs, c.to(c_ptr.dtype.element_ty))


@triton.jit
def _masked_copy_kernel(x_ptr, y_ptr, length, other, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs, mask=offs < length, other=other)
    tl.store(y_ptr + offs, x)


@triton.jit
def _range_kernel(x_ptr, out_ptr, length):
    total = 0.0
    for i in range(0, length):
        total += tl.load(x_ptr + i)
    tl.store(out_ptr, total)


@triton.jit
def _extrema_kernel(x_ptr, y_ptr, out_ptr, N: tl.constexpr):
    offs = tl.arange(0, N)
    x = tl.load(x_ptr + offs)
    y = tl.load(y_ptr + offs)
    tl.store(out_ptr + offs, tl.maximum(x, y))
    tl.store(out_ptr + N + offs, tl.minimum(x, y))
    tl.store(out_ptr + 2 * N + offs, tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL))


def hard_values() -> torch.Tensor:
    """Float32 values on which rounding to bfloat16 can go wrong: ties, subnormals, the largest, infinities, NaN, zeros."""
    bits = torch.randint(-(2**31), 2**31 - 1, (4096 - 16,), dtype=torch.int64).to(torch.int32).view(torch.float32)
    ties = torch.tensor([0x3F808000, 0x3F818000, 0x3F808001, 0x00008000, 0x00018000, 0x7F7F8000, 0x7F7FFFFF, 0x00000001])
    special = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0, 1.0, -1.0, 65504.0])
    return torch.cat([bits, ties.to(torch.int32).view(torch.float32), special])


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bit for bit, but that every NaN is the same."""
    return torch.equal(got.isnan(), wanted.isnan()) and bool(
        ((got.view(torch.int16) == wanted.view(torch.int16)) | got.isnan()).all()
    )


def cast(x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    y = torch.zeros_like(x, dtype=dtype)
    _cast_kernel[(1,)](x, y, N=x.numel())
    return y


def test_cast_to_bf16_rounds_to_nearest_even(device: torch.device) -> None:
    x = hard_values().to(device)
    assert same(cast(x, torch.bfloat16), x.to(torch.bfloat16))


def test_cast_from_bf16_is_exact(device: torch.device) -> None:
    x = hard_values().to(device, torch.bfloat16)
    got, wanted = cast(x, torch.float32), x.float()
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())


@pytest.mark.parametrize("dtype", [torch.int32, torch.uint8, torch.float16])
def test_cast_between_bf16_and_other_types(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randint(0, 255, (256,), device=device).to(dtype)
    assert same(cast(x, torch.bfloat16), x.to(torch.bfloat16))
    y = x.to(torch.bfloat16)
    assert torch.equal(cast(y, dtype), y.to(dtype))


def test_elementwise_bf16_equals_torch(device: torch.device) -> None:
    x, y = torch.randn(2, 256, device=device).bfloat16()
    out = torch.zeros(8, 256, device=device, dtype=torch.bfloat16)
    _elementwise_kernel[(1,)](x, y, out, N=256)
    third = torch.tensor(0.3, dtype=torch.bfloat16, device=device)
    wanted = [x + y, x * y, x - y, -x, x * third, torch.minimum(x, y), torch.maximum(x, y), (x > y).bfloat16()]
    assert same(out, torch.stack(wanted))


def test_reductions_of_bf16(device: torch.device) -> None:
    x = torch.randn(256, device=device).bfloat16()
    out = torch.zeros(2, device=device)
    _sum_kernel[(1,)](x, out, N=256)
    assert compare(out, torch.stack([x.double().sum(), x.double().max()]), "gemm")


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dot_of_bf16_accumulates_in_fp32(out_dtype: torch.dtype, device: torch.device) -> None:
    a, b = torch.randn(2, 64, 64, device=device).bfloat16()
    c = torch.zeros(64, 64, device=device, dtype=out_dtype)
    _dot_kernel[(1,)](a, b, c, N=64)
    assert compare(c, a.double() @ b.double(), "gemm")


def test_masked_load_and_store_of_bf16(device: torch.device) -> None:
    x = torch.randn(64, device=device).bfloat16()
    y = torch.zeros_like(x)
    _masked_copy_kernel[(1,)](x, y, 50, 1.5, N=64)
    assert compare(y, torch.cat([x[:50], x.new_full((14,), 1.5)]), "exact")


def test_range_up_to_a_runtime_value(device: torch.device) -> None:
    x, out = torch.arange(8.0, device=device), torch.zeros(1, device=device)
    _range_kernel[(1,)](x, out, 5)
    assert out.item() == 10.0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_maximum_and_nan(dtype: torch.dtype, device: torch.device) -> None:
    nan = float("nan")
    x = torch.tensor([1.0, nan, nan, -2.0], device=device, dtype=dtype)
    y = torch.tensor([nan, 3.0, nan, -1.0], device=device, dtype=dtype)
    out = torch.zeros(3, 4, device=device, dtype=dtype)
    _extrema_kernel[(1,)](x, y, out, N=4)
    wanted = torch.stack([torch.fmax(x, y), torch.fmin(x, y), torch.maximum(x, y)])
    assert compare(out, wanted, "exact")


@pytest.fixture
def plain_interpreter() -> Iterator[None]:
    if not interpreter.installed():
        pytest.skip("kernels run on the GPU here, not in the interpreter")
    interpreter.uninstall()
    yield
    interpreter.install()


@pytest.mark.usefixtures("plain_interpreter")
def test_shim_is_needed(device: torch.device) -> None:
    """When this fails, Triton's interpreter has learnt bfloat16 and the shim can go."""
    x = hard_values().to(device)
    assert not same(cast(x, torch.bfloat16), x.to(torch.bfloat16))
    a, b = torch.randn(2, 64, 64, device=device).bfloat16()
    c = torch.zeros(64, 64, device=device)
    _dot_kernel[(1,)](a, b, c, N=64)
    assert not compare(c, a.double() @ b.double(), "gemm")


def test_shim_uninstalls_completely() -> None:
    if not interpreter.installed():
        pytest.skip("kernels run on the GPU here, not in the interpreter")
    from triton.runtime.interpreter import InterpreterBuilder

    mended = dict(vars(InterpreterBuilder))
    interpreter.uninstall()
    plain = dict(vars(InterpreterBuilder))
    interpreter.install()
    assert {name for name in mended if mended[name] is not plain.get(name)} >= {
        "cast_impl",
        "create_dot",
        "create_fadd",
        "get_bf16",
    }
    interpreter.uninstall()
    assert dict(vars(InterpreterBuilder)) == plain
    interpreter.install()

# SPDX-License-Identifier: Apache-2.0
"""The error rule passes what is right and fails what is wrong: subtle errors, single elements, and cases without a scale."""

import math

import pytest
import torch
import torch.nn.functional as F

from vlmkernels.testing import compare

LOW = [torch.bfloat16, torch.float16]
FLOATS = [*LOW, torch.float32]
ROWS, COLUMNS = 256, 1152


def layer_norm(x: torch.Tensor, *, eps: float = 1e-6, drop: int = 0, statistics: torch.dtype | None = None) -> torch.Tensor:
    """LayerNorm in the precision of ``x`` or better, with one thing wrong if asked for."""
    work = x if x.dtype == torch.float64 else x.float()
    seen = work[:, : x.shape[1] - drop]
    mean = seen.mean(1, keepdim=True)
    rstd = torch.rsqrt((seen - mean).square().mean(1, keepdim=True) + eps)
    if statistics is not None:
        mean, rstd = mean.to(statistics).to(work.dtype), rstd.to(statistics).to(work.dtype)
    return ((work - mean) * rstd).to(x.dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_right_layer_norm_passes(dtype: torch.dtype, device: torch.device) -> None:
    x = torch.randn(ROWS, COLUMNS, device=device).to(dtype)
    assert compare(layer_norm(x), layer_norm(x.double()), "norm")


@pytest.mark.parametrize("wrong", [{"drop": 8}, {"eps": 1e-2}, {"statistics": torch.bfloat16}], ids=["drop8", "eps", "bf16stats"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_wrong_layer_norm_fails(wrong: dict, dtype: torch.dtype, device: torch.device) -> None:
    # A mean away from 0 and a deviation below 1, as the activations of a vision tower have.
    x = (torch.randn(ROWS, COLUMNS, device=device) * 0.5 + 0.3).to(dtype)
    exact = layer_norm(x.double())
    assert not compare(layer_norm(x, **wrong), exact, "norm")
    atol = torch.allclose(layer_norm(x, **wrong).double(), exact, atol=2e-2, rtol=2e-2)
    assert atol or "statistics" in wrong, "an absolute tolerance of 2e-2 lets the same through"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_right_matrix_product_passes(dtype: torch.dtype, device: torch.device) -> None:
    a, b = torch.randn(2, 128, 128, device=device).to(dtype)
    assert compare(a @ b, a.double() @ b.double(), "gemm")


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_low_precision_accumulator_fails(dtype: torch.dtype) -> None:
    a, b = torch.randn(2, 128, 128).to(dtype)
    out = torch.zeros(128, 128, dtype=dtype)
    for k in range(128):
        out += a[:, k, None] * b[None, k]
    assert not compare(out, a.double() @ b.double(), "gemm")


def test_product_that_drops_columns_fails_in_fp32(device: torch.device) -> None:
    a, b = torch.randn(2, COLUMNS, COLUMNS, device=device)
    assert not compare(a[:, :-8] @ b[:-8], a.double() @ b.double(), "gemm")


BOUNDS = {"gemm": (64, 2), "grad": (64, 3), "module": (64, 3), "model": (64, 9), "norm": (8, 1.1)}


@pytest.mark.parametrize("rule", BOUNDS)
@pytest.mark.parametrize("dtype", [*FLOATS, torch.float64], ids=str)
def test_the_bounds(rule: str, dtype: torch.dtype) -> None:
    """Of the RMS error, in eighths of eps for numbers that the dtype holds, and of the largest, in eps around it."""
    exact, bound, eps = torch.ones(1 << 18, dtype=torch.float64), BOUNDS[rule][dtype in LOW], torch.finfo(dtype).eps
    for share in (0.9, 1.1):
        step = 2 ** math.ceil(math.log2(max(bound / 4, 1)))
        rms, peak = (exact.to(dtype, copy=True) for _ in range(2))
        rms[: round(len(exact) * (share * bound / 8 / step) ** 2)] += step * eps
        peak[7] += round(share * 8 * bound * 3) * eps
        results = compare(rms, exact, rule), compare(peak, exact, rule)
        assert results[0].ratio == pytest.approx(share * bound, rel=1e-2)
        assert results[1].peak == pytest.approx(share * 8 * bound, rel=3e-2)
        assert [bool(result) for result in results] == [share < 1] * 2, results


@pytest.mark.parametrize("rule", ["gemm", "grad", "module", "model", "norm", "exact"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_one_wrong_element_in_a_million_fails(rule: str, dtype: torch.dtype) -> None:
    exact = torch.randn(1024, 1024, dtype=torch.float64)
    got = exact.to(dtype)
    assert compare(got, exact, rule)
    got[700, 3] += 1.5
    result = compare(got, exact, rule)
    assert not result and "(700, 3)" in result.note


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_an_outlier_does_not_hide_an_error(dtype: torch.dtype) -> None:
    """The floor does not come from the largest value."""
    exact = torch.randn(512, 512, dtype=torch.float64)
    exact[0, 0] = 100.0
    got = (exact * (1 + 4 * torch.finfo(dtype).eps)).to(dtype)
    assert compare(exact.to(dtype), exact, "norm")
    assert not compare(got, exact, "norm")


@pytest.mark.parametrize("rule", ["gemm", "grad", "module", "model", "norm", "exact"])
@pytest.mark.parametrize("shape", [(0,), (0, 4), (3, 0), (2, 0, 5)], ids=str)
def test_empty_results_are_equal(shape: tuple[int, ...], rule: str) -> None:
    assert compare(torch.empty(shape), torch.empty(shape, dtype=torch.float64), rule)
    assert not compare(torch.empty(shape), torch.empty(7, dtype=torch.float64), rule)


@pytest.mark.parametrize("rule", ["gemm", "norm"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_values_that_the_dtype_holds_exactly(rule: str, dtype: torch.dtype) -> None:
    exact = torch.arange(-64.0, 64.0, dtype=torch.float64).reshape(4, 32)
    got = exact.to(dtype)
    assert compare(got, exact, rule)
    assert not compare(got + torch.eye(4, 32, dtype=dtype), exact, rule)


@pytest.mark.parametrize("rule", ["gemm", "norm"])
def test_zeros(rule: str) -> None:
    zeros = torch.zeros(4, 8, dtype=torch.float64)
    almost = torch.full((4, 8), 1e-9)
    assert compare(zeros.float(), zeros, rule)
    assert not compare(almost, zeros, rule)
    assert compare(almost, zeros, rule, terms=1.0), "1e-9 is a right difference of two terms near 1 in fp32"
    assert not compare(almost + 1e-2, zeros, rule, terms=1.0)


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_a_row_of_zeros_among_others(dtype: torch.dtype) -> None:
    exact = torch.randn(64, 64, dtype=torch.float64)
    exact[5] = 0.0
    got = exact.to(dtype)
    assert compare(got, exact, "gemm")
    got[5] = 1.0
    assert not compare(got, exact, "gemm")


def test_values_below_the_smallest_of_the_dtype() -> None:
    exact = torch.randn(64, 64, dtype=torch.float64) * 1e-7
    assert compare(exact.half(), exact, "norm")
    assert not compare(exact.half() * 2, exact, "norm")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_not_finite_values_must_be_in_the_same_places(value: float) -> None:
    exact = torch.randn(8, 16, dtype=torch.float64)
    exact[3] = value
    assert compare(exact.float(), exact, "norm")
    missing, moved = exact.float(), exact.float()
    missing[3, 2], moved[4, 0] = 0.0, value
    for got in (missing, moved, torch.full_like(missing, value), -exact.float() if math.isinf(value) else missing):
        assert not compare(got, exact, "norm")
        assert compare(got, exact, "norm").note
    wrong_elsewhere = exact.float()
    wrong_elsewhere[5] *= 1.01
    assert not compare(wrong_elsewhere, exact, "norm")


def test_nothing_finite() -> None:
    exact = torch.full((4, 4), math.nan, dtype=torch.float64)
    assert compare(exact.bfloat16(), exact, "gemm")
    assert not compare(torch.zeros(4, 4), exact, "gemm")


def test_overflow_of_the_dtype_is_right_where_the_exact_result_overflows() -> None:
    exact = torch.tensor([1.0, 70000.0], dtype=torch.float64)
    assert compare(torch.tensor([1.0, math.inf]).half(), exact, "norm")
    assert not compare(torch.tensor([1.0, 65504.0]).half(), exact, "norm")


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.bool], ids=str)
def test_integers_are_compared_exactly(dtype: torch.dtype) -> None:
    values = torch.tensor([0, 1, 1, 0]).to(dtype)
    other = torch.tensor([0, 1, 0, 0]).to(dtype)
    assert compare(values, values.clone(), "exact")
    result = compare(values, other, "exact")
    assert not result and "(2,)" in result.note
    with pytest.raises(ValueError, match="rule"):
        compare(values, other, "gemm")


def test_large_integers_keep_their_last_bit() -> None:
    value = torch.tensor([2**60 + 1])
    assert not compare(value, value - 1, "exact")


def test_scalars_and_shapes() -> None:
    exact = torch.tensor(math.pi, dtype=torch.float64)
    assert compare(exact.float(), exact, "gemm")
    assert not compare(exact.float() * 1.001, exact, "gemm")
    assert not compare(exact.float().reshape(1), exact, "gemm")


def test_unknown_rule() -> None:
    with pytest.raises(ValueError, match="'close'"):
        compare(torch.zeros(1), torch.zeros(1), "close")


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_attention_with_probabilities_in_low_precision_passes(dtype: torch.dtype, device: torch.device) -> None:
    q, k, v = torch.randn(3, 2, 4, 128, 64, device=device).to(dtype)
    exact = F.scaled_dot_product_attention(q.double(), k.double(), v.double())
    assert compare(F.scaled_dot_product_attention(q, k, v), exact, "gemm")

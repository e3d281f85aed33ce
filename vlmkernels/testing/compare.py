# SPDX-License-Identifier: Apache-2.0
"""The one error rule of the project: RMS error as a multiple of the error that nobody can avoid."""

from dataclasses import dataclass

import torch

# Bounds as multiples of the floor. In fp32 a right kernel stays within a few floors and a wrong formula is 1e4 floors away;
# in bf16 and fp16 the bound finds a wrong precision (statistics or accumulators kept in the low dtype).
FP32_BOUND = 8.0
BOUNDS = {"gemm": 2.0, "norm": 1.1, "exact": 0.0}


@dataclass(frozen=True)
class Comparison:
    """How far a result is from the exact one. True where it is within its bound."""

    rule: str
    ratio: float  # RMS error over floor
    bound: float
    error: float  # RMS error
    floor: float  # RMS error of rounding the exact result to the dtype of the result
    note: str = ""  # what differs before any distance can be taken: shape, or where NaN and infinities are

    def __bool__(self) -> bool:
        return not self.note and self.ratio <= self.bound


def compare(got: torch.Tensor, exact: torch.Tensor, rule: str) -> Comparison:
    """Compare ``got`` with ``exact``, the fp64 (or fp32) result on the same, already rounded, inputs.

    Args:
        got: the result, in any floating dtype.
        exact: the reference result, of the same shape, computed and kept in higher precision.
        rule: ``"gemm"`` for results of matrix products and attention, ``"norm"`` for norms, rope and activations,
            ``"exact"`` for data movement (bit-exact).

    Returns:
        A ``Comparison``, which is true where the error is within the bound: ``assert compare(out, exact, "gemm")``.
    """
    dtype = got.dtype
    bound = FP32_BOUND if dtype in (torch.float32, torch.float64) and rule != "exact" else BOUNDS[rule]
    if got.shape != exact.shape:
        return Comparison(rule, float("inf"), bound, float("inf"), 0.0, f"shape {tuple(got.shape)}, wanted {tuple(exact.shape)}")
    got, exact = got.detach().double(), exact.detach().to(got.device).double()
    rounded = exact.to(dtype).double()
    for what, test in (("NaN", torch.isnan), ("+inf", torch.isposinf), ("-inf", torch.isneginf)):
        differ = test(got) != test(rounded)
        if differ.any():
            where = tuple(differ.nonzero()[0].tolist())
            return Comparison(
                rule, float("inf"), bound, float("inf"), 0.0, f"{what} in {int(differ.sum())} other places, first {where}"
            )
    finite = torch.isfinite(rounded)
    if not finite.any():
        return Comparison(rule, 0.0, bound, 0.0, 0.0)
    got, exact, rounded = got[finite], exact[finite], rounded[finite]
    error = (got - (rounded if rule == "exact" else exact)).square().mean().sqrt().item()
    floor = (rounded - exact).square().mean().sqrt().item()
    # A result that its dtype holds exactly (zeros, small integers) has no rounding error: half a unit in the last place of its
    # largest magnitude stands in for it.
    floor = max(floor, torch.finfo(dtype).eps * exact.abs().max().item() / 64)
    ratio = error / floor if floor else (0.0 if error == 0.0 else float("inf"))
    return Comparison(rule, ratio, bound, error, floor)

# SPDX-License-Identifier: Apache-2.0
"""The one error rule of the project: RMS error as a multiple of the error that nobody can avoid."""

from dataclasses import dataclass

import torch

# Bounds as multiples of the floor. In fp32 a right kernel stays within a few floors and a wrong formula is 1e4 floors away;
# in bf16 and fp16 the bound finds a wrong precision (statistics or accumulators kept in the low dtype).
# The logits of attention are rounded before they are exponentiated, so in fp32 it sits above the rounding of its result: over
# the shapes of tests/test_attention.py the fp32 reference reaches 21 floors, scaled_dot_product_attention 37, Triton 19 (CPU,
# torch 2.13).
FP32_BOUNDS = {"gemm": 64.0, "grad": 64.0, "module": 64.0, "model": 64.0, "norm": 8.0, "exact": 0.0}
# The gradients of attention round P, dS and the output that they subtract, each to the low dtype: over the same shapes the
# gradients of scaled_dot_product_attention reach 2.6 floors and those of the Triton kernels 2.3 (CPU, bf16 and fp16). Patch
# embedding with a norm keeps the rounded sum that it normalises: the gradient of the norm's weight reaches 2.2 (H200, fp16).
# A module chains matrix products, each of which rounds its result to the low dtype: self-attention with a norm of q and k, rope
# and both projections reaches 2.1 (H200, bf16). A model rounds some six results in each of its layers and hands them on: the 12
# of a Q-Former reach 8.0 floors, ours and transformers' alike, and 21 in fp32 (CPU, bf16).
BOUNDS = {"gemm": 2.0, "grad": 3.0, "module": 3.0, "model": 9.0, "norm": 1.1, "exact": 0.0}

# One wrong element in a million moves the RMS error of a bf16 result by nothing, so the largest error has a bound of its own:
# this many times the bound on the RMS, in units of eps times the magnitude around the element. Rounding alone stays below 0.5.
PEAK = 8.0


@dataclass(frozen=True)
class Comparison:
    """How far a result is from the exact one. True where it is within its bounds."""

    rule: str
    ratio: float  # RMS error over floor
    bound: float
    error: float  # RMS error
    floor: float  # RMS error of rounding the exact result to the dtype of the result
    peak: float = 0.0  # the largest error, in eps times the magnitude around it; at most PEAK * bound
    note: str = ""  # what differs before any distance can be taken (shape, where NaN and infinities are), and where the peak is

    def __bool__(self) -> bool:
        return self.ratio <= self.bound and self.peak <= PEAK * self.bound


def compare(got: torch.Tensor, exact: torch.Tensor, rule: str, *, terms: float = 0.0) -> Comparison:
    """Compare ``got`` with ``exact``, the fp64 (or fp32) result on the same, already rounded, inputs.

    Args:
        got: the result, in any dtype; integers and booleans with ``"exact"`` only.
        exact: the reference result, of the same shape, computed and kept in higher precision.
        rule: ``"gemm"`` for results of matrix products and attention, ``"grad"`` for the gradients of attention and of a norm
            behind a matrix product, ``"module"`` for several matrix products in a row, each rounded to the dtype, ``"model"``
            for a dozen layers of those, ``"norm"`` for norms, rope and activations,
            ``"exact"`` for data movement (equal after rounding ``exact`` to the dtype of ``got``).
        terms: the magnitude of the terms where the result is a sum that cancels, as a gradient that is zero in exact arithmetic.
            Without it nothing but zero is right where ``exact`` is zero everywhere.

    Returns:
        A ``Comparison``, which is true where the error is within the bounds: ``assert compare(out, exact, "gemm")``.

    Raises:
        ValueError: an unknown rule, or a rule other than ``"exact"`` for integers.
    """
    dtype = got.dtype
    if rule not in BOUNDS or (rule != "exact" and not dtype.is_floating_point):
        raise ValueError(f"rule: got {rule!r} for {dtype}, wanted one of {', '.join(BOUNDS)} ('exact' for integers)")
    bound = (FP32_BOUNDS if dtype in (torch.float32, torch.float64) else BOUNDS)[rule]
    got, exact = got.detach(), exact.detach().to(got.device)
    if got.shape != exact.shape:
        return _different(rule, bound, f"shape {tuple(got.shape)}, wanted {tuple(exact.shape)}")
    if not dtype.is_floating_point:
        return _different(rule, bound, _where("value", got != exact))
    exact = exact.double()
    got, rounded = got.double(), exact.to(dtype).double()
    # A GPU is waited for twice, here and for the numbers at the end.
    other = torch.stack([test(got) != test(rounded) for test in (torch.isnan, torch.isposinf, torch.isneginf)])
    if other.any():
        return _different(rule, bound, next(filter(None, map(_where, ("NaN", "+inf", "-inf"), other))))
    finite = torch.isfinite(rounded)
    if rule == "exact":
        return _different(rule, bound, _where("value", (got != rounded) & finite))
    if got.numel() == 0:
        return _different(rule, bound, "")
    eps = torch.finfo(dtype).eps
    off = torch.where(finite, got - exact, 0.0)
    exact = torch.where(finite, exact, 0.0)
    count = finite.sum().clamp(min=1)
    rms = (exact.square().sum() / count).sqrt()
    # A result that its dtype holds exactly (zeros, small integers) has no rounding error, and the rounding of values of all
    # magnitudes is 0.2 eps of their RMS: a little less stands in for it.
    floor = torch.maximum((torch.where(finite, rounded - exact, 0.0).square().sum() / count).sqrt(), eps / 8 * rms)
    floor = floor.clamp(min=eps / 8 * terms)
    error = (off.square().sum() / count).sqrt()
    around = exact.abs() + rms + terms + (exact.square().mean(-1, keepdim=True).sqrt() if exact.dim() else 0.0)
    unit = (eps * around).clamp(min=eps * torch.finfo(dtype).smallest_normal)  # no dtype is finer than its subnormal numbers
    peaks = off.abs() / unit
    numbers = torch.stack([torch.where(error == 0.0, 0.0, error / floor), error, floor, peaks.max()])
    ratio, rms_error, rms_floor, peak = numbers.tolist()
    note = _where("peak", peaks == peak) if peak > PEAK * bound else ""
    return Comparison(rule, ratio, bound, rms_error, rms_floor, peak, note)


def _where(what: str, differ: torch.Tensor) -> str:
    """How many elements differ in ``what``, and the index of the first, or ``""`` where none does."""
    if not differ.any():
        return ""
    return f"another {what} in {int(differ.sum())} of {differ.numel()} places, first {tuple(differ.nonzero()[0].tolist())}"


def _different(rule: str, bound: float, note: str) -> Comparison:
    """Infinitely far where there is something to note, else equal."""
    distance = float("inf") if note else 0.0
    return Comparison(rule, distance, bound, distance, 0.0, distance, note)

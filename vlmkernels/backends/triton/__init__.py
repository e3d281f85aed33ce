# SPDX-License-Identifier: Apache-2.0
"""Triton kernels: every NVIDIA GPU from sm_80 on, and any CPU under Triton's interpreter (for tests)."""

import functools
import importlib.util
import os

import torch

#: Triton reads this when a kernel is decorated, so it must be set before the first call of an operator.
INTERPRETED = os.environ.get("TRITON_INTERPRET", "0") == "1"


@functools.cache
def why_not_importable() -> str | None:
    return None if importlib.util.find_spec("triton") else "triton is not installed (pip install triton)"


@functools.cache
def why_not(device: torch.device) -> str | None:
    if INTERPRETED:
        return None if device.type == "cpu" else "TRITON_INTERPRET=1 runs on CPU tensors only"
    if device.type != "cuda":
        return f"it needs CUDA tensors, these are on {device.type}"
    major, minor = torch.cuda.get_device_capability(device)
    return None if major >= 8 else f"it needs compute capability 8.0, this GPU has {major}.{minor}"


@functools.cache
def multiprocessors(device: torch.device) -> int:
    return 4 if INTERPRETED else torch.cuda.get_device_properties(device).multi_processor_count


# triton.cdiv and triton.next_power_of_2 serve kernels too, and cost a launcher 2 microseconds a call.
def cdiv(a: int, b: int) -> int:
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two from ``n`` up; 1 for 0."""
    return 1 << max(n - 1, 0).bit_length()


def contiguous(x: torch.Tensor | None) -> torch.Tensor | None:
    return None if x is None else x.contiguous()

# SPDX-License-Identifier: Apache-2.0
"""The two rates that nothing on this machine exceeds by much, measured in the same run as the figures they judge."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vlmkernels.bench.environment import nvidia_smi
from vlmkernels.bench.timing import device_times


@dataclass(frozen=True)
class Ceilings:
    """Rates of a large copy (read plus write) and of a large matrix product, and the clocks while that product ran."""

    copy_gbs: float
    gemm_tflops: float
    copy_bytes: int
    gemm_size: int
    dtype: str
    under_load: dict[str, str]

    def best_ms(self, flops: float, bytes_: float) -> float:
        """The time that this much work takes at both rates, when moving and computing overlap fully."""
        return max(flops / self.gemm_tflops / 1e9, bytes_ / self.copy_gbs / 1e6)

    def bound_by(self, flops: float, bytes_: float) -> str:
        """Which of the two rates sets ``best_ms``."""
        return "gemm" if flops / self.gemm_tflops / 1e9 >= bytes_ / self.copy_gbs / 1e6 else "copy"


def measure(device: torch.device, dtype: torch.dtype) -> Ceilings:
    """Time a copy of 2 GiB and an 8192-cubed product in ``dtype`` (on a CPU: 64 MiB and 1024).

    On a CPU the product is also a convolution, and the faster one counts: MKL's takes up to twice as long as oneDNN's (AMD EPYC).
    """
    cuda = device.type == "cuda"
    copied, size = (2 << 30, 8192) if cuda else (64 << 20, 1024)
    if cuda:
        copied = min(copied, int(torch.cuda.mem_get_info(device)[0] // 4))
    source = torch.ones(copied // 4, device=device)
    target = torch.empty_like(source)
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    out = torch.empty_like(a)
    functions: dict[str, Callable[[], Any]] = {
        "copy": lambda: target.copy_(source),
        "gemm": lambda: torch.mm(a, b, out=out),
    }
    if not cuda:
        image, filters = a.view(1, size, 32, size // 32), b.view(size, size, 1, 1)
        functions["convolution"] = lambda: F.conv2d(image, filters)
    with torch.no_grad():
        for function in functions.values():
            function()
        times = device_times(functions, device, budget_ms=100)
        gemm_ms = min(timing.ms for name, timing in times.items() if name != "copy")
        under_load = {}
        if cuda:
            # About half a second of work is queued, so that the clocks are those of a busy GPU.
            for _ in range(max(1, int(500 / times["gemm"].ms))):
                functions["gemm"]()
            under_load = nvidia_smi(device)
            torch.cuda.synchronize(device)
    return Ceilings(
        copy_gbs=2 * copied / times["copy"].ms / 1e6,
        gemm_tflops=2 * size**3 / gemm_ms / 1e9,
        copy_bytes=copied,
        gemm_size=size,
        dtype=str(dtype).removeprefix("torch."),
        under_load=under_load,
    )

# SPDX-License-Identifier: Apache-2.0
"""What the package costs before any kernel runs: its import, in a process of its own."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from vlmkernels.bench.peers import Provider
from vlmkernels.bench.workloads import OURS, Case

#: What ``import vlmkernels`` must not import: each takes longer than all of it.
HEAVY = ("transformers", "timm", "open_clip", "matplotlib", "rich", "skimage", "scipy")
PROGRAM = f"""
import sys, time
import torch
before = set(sys.modules)
start = time.perf_counter()
import vlmkernels
ms = (time.perf_counter() - start) * 1e3
print(sum(name in sys.modules and name not in before for name in {HEAVY}), ms)
"""


def import_case(device: torch.device) -> Case:
    """``import vlmkernels`` after ``import torch``. Right is that nothing heavy was imported with it."""
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH", "")]))}

    def prepare() -> Callable[[], torch.Tensor]:
        def call() -> torch.Tensor:
            command = [sys.executable, "-c", PROGRAM]
            printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment, timeout=300).stdout
            return torch.tensor([float(number) for number in printed.split()])

        return call

    return Case(
        ours=Provider(OURS, prepare),
        peers=(),
        outputs=("heavy modules",),
        exact=lambda: (torch.zeros(1),),
        part=lambda i, x: x[:1],
        rule="exact",
        flops=0.0,
        bytes=0.0,
        dtype=torch.float32,
        clock="import",
    )

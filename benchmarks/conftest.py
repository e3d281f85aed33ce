# SPDX-License-Identifier: Apache-2.0
"""Makes ``pytest benchmarks --benchmark-only`` run the workloads of ``vlmkernels.bench``, to follow our own times from commit
to commit (``--benchmark-autosave``, ``--benchmark-compare``). The comparison with others is ``vlmkernels bench``.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vlmkernels.bench import suites
from vlmkernels.bench.workloads import Workload

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def pytest_collect_file(file_path: Path, parent: pytest.Collector) -> pytest.Collector | None:
    return pytest.Module.from_parent(parent, path=file_path) if file_path.match("bench_*.py") else None


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """A file's ``OP`` names the operator; its test runs once for each workload of that operator."""
    if "workload" in metafunc.fixturenames:
        work = [w for w in suites.workloads("main", *metafunc.module.SUITES) if w.op == metafunc.module.OP]
        metafunc.parametrize("workload", work, ids=[w.id for w in work])


@pytest.fixture
def measure(benchmark: Any) -> Callable[[Workload], None]:
    """Build a workload, compare our result with the exact one, and only then time it."""

    def run(workload: Workload) -> None:
        if workload.gpu_only and DEVICE.type != "cuda":
            pytest.skip(workload.gpu_only)
        case = workload.build(DEVICE)
        with torch.no_grad():
            call = case.ours.prepare()
            for name, comparison in zip(case.outputs, case.check(call()), strict=True):
                assert comparison, f"{name}: {comparison}"

            def synchronized() -> None:
                call()
                if DEVICE.type == "cuda":
                    torch.cuda.synchronize(DEVICE)

            benchmark.extra_info.update(flops=case.flops, bytes=case.bytes, dtype=str(case.dtype), device=str(DEVICE))
            benchmark.pedantic(synchronized, rounds=20 if DEVICE.type == "cuda" else 3, warmup_rounds=2)

    return run

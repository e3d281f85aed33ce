# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding: the workloads of ``vlmkernels.bench`` under pytest-benchmark."""

from collections.abc import Callable

from vlmkernels.bench.workloads import Workload

OP = "rope"
SUITES = ("rope",)


def test_rope(workload: Workload, measure: Callable[[Workload], None]) -> None:
    measure(workload)

# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses: the workloads of ``vlmkernels.bench`` under pytest-benchmark."""

from collections.abc import Callable

from vlmkernels.bench.workloads import Workload

OP = "contrastive"
SUITES = ("contrastive",)


def test_contrastive(workload: Workload, measure: Callable[[Workload], None]) -> None:
    measure(workload)

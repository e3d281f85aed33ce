# SPDX-License-Identifier: Apache-2.0
"""Attention: the workloads of ``vlmkernels.bench`` under pytest-benchmark."""

from collections.abc import Callable

from vlmkernels.bench.workloads import Workload

OP = "attention"
SUITES = ("attention",)


def test_attention(workload: Workload, measure: Callable[[Workload], None]) -> None:
    measure(workload)

# SPDX-License-Identifier: Apache-2.0
"""Cross-attention with its projections and the Q-Former: the workloads of ``vlmkernels.bench`` under pytest-benchmark."""

from collections.abc import Callable

from vlmkernels.bench.workloads import Workload

OP = "cross_attention"
SUITES = ("cross_attention",)


def test_cross_attention(workload: Workload, measure: Callable[[Workload], None]) -> None:
    measure(workload)

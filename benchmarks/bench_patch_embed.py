# SPDX-License-Identifier: Apache-2.0
"""Patch embedding: the workloads of ``vlmkernels.bench`` under pytest-benchmark."""

from collections.abc import Callable

from vlmkernels.bench.workloads import Workload

OP = "patch_embed"
SUITES = ("patch_embed",)


def test_patch_embed(workload: Workload, measure: Callable[[Workload], None]) -> None:
    measure(workload)

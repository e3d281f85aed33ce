# SPDX-License-Identifier: Apache-2.0
"""Tools for testing kernels: the error rule, inputs, and the shapes of published models."""

from vlmkernels.testing.compare import Comparison, compare

__all__ = ["Comparison", "compare"]

# SPDX-License-Identifier: Apache-2.0
"""Benchmarks: workloads on real photos, what a user would run instead, timing, ceilings and the report.

The command line (``vlmkernels bench``) and the pytest files under ``benchmarks/`` both read their work from here.
"""

import importlib
from types import ModuleType


class Unavailable(Exception):
    """A provider can't run this workload here. The message says why and ends up in the report."""


class MissingExtra(ImportError):
    """A package of the ``bench`` extra is not installed."""


def need(module: str) -> ModuleType:
    """Import a package of the ``bench`` extra, or say how to install it.

    Raises:
        MissingExtra: it is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        package = (error.name or module).partition(".")[0]
        raise MissingExtra(f"this needs {package}: pip install 'vlmkernels[bench]'") from error

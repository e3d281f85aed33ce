# SPDX-License-Identifier: Apache-2.0
"""Modules and parameters under dotted names, so that a state_dict has the keys of another project's layer."""

from typing import Any

from torch import nn


def put(root: nn.Module, path: str, value: nn.Module | nn.Parameter) -> None:
    """Register ``value`` as ``root.<path>``, with an empty module for each missing step on the way."""
    *steps, name = path.split(".")
    for step in steps:
        if not hasattr(root, step):
            root.add_module(step, nn.Module())
        root = getattr(root, step)
    setattr(root, name, value)


def get(root: nn.Module, path: str) -> Any:
    """``root.<path>``."""
    value: Any = root
    for step in path.split("."):
        value = getattr(value, step)
    return value

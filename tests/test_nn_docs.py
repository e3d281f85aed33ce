# SPDX-License-Identifier: Apache-2.0
"""The page on modules: its examples run, in their order, and give the shapes that their comments say."""

import re
from pathlib import Path
from typing import Any

import pytest
from nn_parity import quick_backend
from torch import Tensor

from vlmkernels.nn import ATTENTION_LAYOUTS, PATCH_EMBED_LAYOUTS

__all__ = ["quick_backend"]
PAGE = (Path(__file__).parent.parent / "docs" / "nn.md").read_text()
SHAPE = re.compile(r"^(\w+) = .*# \[(.+)\]$", re.MULTILINE)


def test_examples() -> None:
    names: dict[str, Any] = {}
    shapes = 0
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL):
        exec(block, names)
        for name, shape in SHAPE.findall(block):
            value = names[name]
            assert isinstance(value, Tensor)
            assert list(value.shape) == eval(f"[{shape}]"), name
            shapes += 1
    assert shapes >= 6


TABLES = [("## SelfAttention", name, layout.projections) for name, layout in ATTENTION_LAYOUTS.items()]
TABLES += [("## PatchEmbed", name, (layout.projection, layout.position)) for name, layout in PATCH_EMBED_LAYOUTS.items()]


@pytest.mark.parametrize(("section", "layout", "names"), TABLES)
def test_tables_name_every_layout(section: str, layout: str, names: tuple[str, ...]) -> None:
    lines = PAGE.partition(section)[2].splitlines()
    row = next(line for line in lines if line.startswith(f'| `"{layout}"` |'))
    assert all(f"`{name}`" in row for name in names)

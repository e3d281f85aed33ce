# SPDX-License-Identifier: Apache-2.0
"""What the layers of a model share is made once, and let go with the tensor that it is made of."""

import gc

import pytest
import torch

from vlmkernels.integrations import _attention_layers, _once


def test_made_once_until_something_changes() -> None:
    calls: list[int] = []

    def make() -> list[int]:
        calls.append(1)
        return calls

    tensor = torch.zeros(3)
    assert _once.once(tensor, ("a",), make) is _once.once(tensor, ("a",), make) and len(calls) == 1
    _once.once(tensor, ("b",), make)
    tensor.add_(1)
    _once.once(tensor, ("b",), make)
    assert len(calls) == 3


def test_nothing_is_kept_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each replay has to make it of what the tensor is then; what a capture makes, nobody may read before a replay."""
    tensor = torch.zeros(3)
    before = _once.once(tensor, (), tensor.clone)
    monkeypatch.setattr(_once, "in_a_graph", lambda x: True)
    captured = _once.once(tensor, (), tensor.clone)
    monkeypatch.undo()
    assert captured is not before and _once.once(tensor, (), tensor.clone) is before


@pytest.mark.parametrize("tokens", [1, 9])
def test_tables_of_rope_are_let_go(tokens: int) -> None:
    """Those of one token, of which decoding has new ones each time, too."""
    _once._made.clear()
    for _ in range(3):
        table = torch.randn(1, tokens, 8)
        assert torch.equal(_attention_layers._half(table), table[..., :4])
    del table
    gc.collect()
    assert not len(_once._made)

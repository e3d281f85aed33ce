# SPDX-License-Identifier: Apache-2.0
"""What all layers of a model would make of the same tensor, made once."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

#: As long as the tensor lives: its version, the arguments, the result.
_made: WeakIdKeyDictionary = WeakIdKeyDictionary()


def once(tensor: torch.Tensor, arguments: tuple[Any, ...], make: Callable[[], Any]) -> Any:
    """``make()``, or what it gave for the same arguments before, as long as ``tensor`` is what it was then.

    The result has no memory of ``tensor``'s, which as its view would keep it, and so itself, for ever.
    """
    # A captured graph has to make it anew in each replay. Of inference tensors no version tells whether they have changed; what
    # is traced is not asked whether it is one: that breaks a graph.
    if in_a_graph(tensor) or tensor.is_inference():
        return make()
    state = (tensor._version, arguments)
    known = _made.get(tensor)
    if known is None or known[0] != state:
        known = _made[tensor] = (state, make())
    return known[1]


def in_a_graph(x: torch.Tensor) -> bool:
    """Whether nobody can wait for the values of ``x``, as a graph is traced or captured."""
    return torch.compiler.is_compiling() or (x.is_cuda and torch.cuda.is_current_stream_capturing())

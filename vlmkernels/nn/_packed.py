# SPDX-License-Identifier: Apache-2.0
"""Modules whose linear layers share an input: their parameters are neighbours in memory, so that one product serves them."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from vlmkernels.ops._packed_linear import forget, joined_linear, lay_side_by_side, packed_linear


def project(x: torch.Tensor, linears: Sequence[nn.Module], constant: Sequence[bool] = ()) -> tuple[torch.Tensor, ...]:
    """``linear(x)`` of each; one product where all are plain ``nn.Linear``, with neither hooks nor parametrisations.

    ``constant``: for which, plain ones, the caller has another way to the gradient of the bias.
    """
    modules: list[tuple[Any, bool]] = list(zip(linears, constant or [False] * len(linears), strict=True))
    found = _weights_and_biases(modules) if len(modules) > 1 else None
    if found is None:
        return tuple(F.linear(x, m.weight, m.bias.detach()) if fixed else m(x) for m, fixed in modules)
    return packed_linear(x, *found)


def project_whole(x: torch.Tensor, linears: Sequence[nn.Module]) -> torch.Tensor | None:
    """What ``project`` gives as one tensor, for what gives back the gradient of all as one; None where it comes in parts."""
    if len(linears) == 1:
        y: torch.Tensor = linears[0](x)
        return y
    found = _weights_and_biases([(m, False) for m in linears])
    return None if found is None else joined_linear(x, *found)


def _weights_and_biases(modules: Sequence[tuple[Any, bool]]) -> tuple[list[torch.Tensor], list[torch.Tensor]] | None:
    """Of plain layers, all of which have a bias, or none; it is detached where it is constant. Else None."""
    if not all([plain(m) for m, _ in modules]):
        return None
    biases = [m.bias.detach() if fixed else m.bias for m, fixed in modules if m.bias is not None]
    return ([m.weight for m, _ in modules], biases) if len(biases) in (0, len(modules)) else None


def plain(m: nn.Module, kind: type[nn.Module] = nn.Linear) -> bool:
    """Whether ``m`` is torch's own layer of this kind and nobody waits for a call of it."""
    hooked = m._forward_hooks or m._forward_pre_hooks or m._backward_hooks or m._backward_pre_hooks
    return type(m) is kind and not hooked


class SideBySide(nn.Module):
    """A module that keeps the parameters of some of its linear layers side by side, also after it was moved, cast or copied.

    They remain parameters of their own, under their own names. After ``load_state_dict(assign=True)``, and for layers that were
    exchanged, there is a product for each layer, until the module is moved or cast (``module.to(...)`` of any kind).
    """

    def _neighbours(self) -> Sequence[nn.Module]:
        """The layers with the same input, in the order of their parameters in memory."""
        raise NotImplementedError

    def _lay(self) -> None:
        for parameters in self._rows():
            lay_side_by_side(parameters)

    def _forget(self) -> None:
        for parameters in self._rows():
            forget(parameters)

    def _rows(self) -> Iterator[list[nn.Parameter]]:
        """The parameters that are to be neighbours, weights and then biases."""
        linears: list[Any] = [m for m in self._neighbours() if type(m) is nn.Linear]
        for parameters in ([m.weight for m in linears], [m.bias for m in linears]):
            if len(parameters) > 1 and None not in parameters:
                yield parameters

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        self._lay()
        return self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._lay()

# SPDX-License-Identifier: Apache-2.0
"""Each swapped layer beside its original, on what reaches it in one call of the model."""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree

from vlmkernels.integrations._join import apart
from vlmkernels.integrations._swap import Swapped, unswap
from vlmkernels.integrations.ranges_mask import RangesMask
from vlmkernels.nn._names import get


class Errors(NamedTuple):
    """RMS errors of a layer's first result as shares of the RMS of the exact one, which the original computes in fp32 (fp64)."""

    ours: float
    original: float


def measure(model: nn.Module, inputs: Mapping[str, Any]) -> dict[str, Errors]:
    """The errors of every swapped layer that ``model(**inputs)`` calls, by name; of several calls those of the last.

    Layers of whose work a module does a part have a call of the model of their own: what is measured inside of them is called by
    itself. A model with a loss of ours is not measured: it would be copied as a whole.
    """
    errors: dict[str, Errors] = {}

    def hook(name: str) -> Callable[..., None]:
        def check(layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            with apart(model):
                errors[name] = _errors(layer, args, kwargs, output)

        return check

    swapped = [(name, layer) for name, layer in model.named_modules() if isinstance(layer, Swapped)]
    modes = [(module, module.training) for module in model.modules()]
    hooks: list[Any] = []
    try:
        model.eval()
        for whole in (True, False):
            chosen = [(name, layer) for name, layer in swapped if (layer.part is None if whole else layer.part)]
            hooks = [layer.register_forward_hook(hook(name), with_kwargs=True) for name, layer in chosen]
            with torch.no_grad(), _without_cache(model):
                if hooks or whole:
                    model(**inputs)
            while hooks:
                hooks.pop().remove()
    finally:
        for handle in hooks:
            handle.remove()
        for module, training in modes:
            module.training = training
    return errors


@contextmanager
def _without_cache(model: nn.Module) -> Iterator[None]:
    """No cache meanwhile where the inputs don't ask for one: layers are called again, and would fill it again."""
    found = {
        id(part.config): part.config for part in model.modules() if getattr(getattr(part, "config", None), "use_cache", False)
    }
    configs: list[Any] = list(found.values())
    try:
        for config in configs:
            config.use_cache = False
        yield
    finally:
        for config in configs:
            config.use_cache = True


def _errors(layer: Swapped, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Errors:
    got = _first(output)

    def dense(x: Tensor) -> Tensor:
        if not isinstance(x, RangesMask):
            return x
        return x.additive(got.dtype) if layer.adds_masks else x.dense()

    args, kwargs = _pytree.tree_map_only(Tensor, dense, (args, kwargs))
    wide = torch.float64 if got.dtype in (torch.float32, torch.float64) else torch.float32
    original = _first(layer.original.forward(layer, *args, **kwargs))
    exact_layer = copy.deepcopy(layer)
    unswap(exact_layer)
    if layer.eager_config:
        get(exact_layer, layer.eager_config)._attn_implementation = "eager"
    exact_layer.to(wide)

    def widen(x: Tensor) -> Tensor:
        return x.to(wide) if x.is_floating_point() else x

    args, kwargs = _pytree.tree_map_only(Tensor, widen, (args, kwargs))
    exact = _first(exact_layer.forward(*args, **kwargs)).double()
    scale = exact.square().mean().sqrt().clamp(min=1e-300)
    ours, theirs = (((value.double() - exact).square().mean().sqrt() / scale).item() for value in (got, original))
    return Errors(ours, theirs)


def _first(output: Any) -> Tensor:
    """The tensor that a layer returns, alone, in a tuple or in a dataclass of transformers."""
    first: Tensor = output if isinstance(output, Tensor) else output[0]
    return first

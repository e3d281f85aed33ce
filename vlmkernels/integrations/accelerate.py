# SPDX-License-Identifier: Apache-2.0
"""``accelerate(model)``: the layers of a loaded model run on this package, in place; ``restore(model)`` takes it back."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from vlmkernels.integrations import _join
from vlmkernels.integrations._layers import REPLACEMENTS
from vlmkernels.integrations._swap import Swapped, Unfit, swap, unswap
from vlmkernels.integrations._verify import Errors, measure
from vlmkernels.ops._op import bad_argument


@dataclass(frozen=True)
class Replaced:
    """A layer that runs a module of ours.

    Args:
        name: of the layer in the model, ``""`` for the model itself.
        layer: its class.
        module: the class of ours that it runs.
        errors: with ``verify``: how far its result and the original's are from the exact one; None where it was not called, and
            of a model of whose work the module does a part.
    """

    name: str
    layer: str
    module: str
    errors: Errors | None = None


@dataclass(frozen=True)
class Left:
    """Layers of one class that stay as they are.

    Args:
        layer: the class.
        count: how many there are.
        parameters: how many numbers their own parameters have, with those of the torch layers that they consist of.
        reason: why they stay.
    """

    layer: str
    count: int
    parameters: int
    reason: str


@dataclass(frozen=True)
class Attention:
    """A model of transformers inside the model, and the attention of its layers that were not replaced.

    Args:
        name: of it in the whole model, ``""`` for the model itself.
        model: its class.
        reason: why it keeps its attention; empty where it is ours now.
    """

    name: str
    model: str
    reason: str = ""


@dataclass(frozen=True)
class Report:
    """What ``accelerate`` did, readable when printed. ``parameters`` is what the whole model has."""

    replaced: tuple[Replaced, ...]
    left: tuple[Left, ...]
    attention: tuple[Attention, ...]
    parameters: int

    def __str__(self) -> str:
        kinds: dict[tuple[str, str], list[Replaced]] = {}
        for row in self.replaced:
            kinds.setdefault((row.layer, row.module), []).append(row)
        lines = [f"replaced: {len(self.replaced)} layers"]
        for (layer, module), rows in kinds.items():
            lines.append(f"  {len(rows):4} x {layer} -> {module}{_worst([row.errors for row in rows if row.errors])}")
        for reason, models in self._attention().items():
            lines.append(f"attention of {', '.join(models)}: {reason or 'vlmkernels'}")
        lines.append(f"left: {sum(row.count for row in self.left)} layers")
        for left in self.left:
            share = 100 * left.parameters / max(self.parameters, 1)
            lines.append(f"  {left.count:4} x {left.layer} ({share:.1f}% of the parameters): {left.reason}")
        return "\n".join(lines)

    def _attention(self) -> dict[str, list[str]]:
        """By reason, ours first, the classes of models."""
        found: dict[str, list[str]] = {}
        for row in sorted(self.attention, key=lambda row: row.reason != ""):
            models = found.setdefault(row.reason, [])
            models += [] if row.model in models else [row.model]
        return found


def _worst(errors: list[Errors]) -> str:
    if not errors:
        return ""
    worst = max(errors, key=lambda error: error.ours / max(error.original, 1e-30))
    return f", error {worst.ours:.1e}, the original's {worst.original:.1e}"


def accelerate(model: nn.Module, *, verify: Mapping[str, Any] | None = None) -> Report:
    """Let the layers of ``model`` that this package knows run on it, in place.

    Parameters, state_dict, hooks and submodules stay the objects that they are; only the class of a layer changes, to a subclass
    with another ``forward``. Calls that a module of ours would not answer as the original does go to the original. What is not
    swapped keeps its code, but calls our attention where it has called sdpa or FlashAttention (``attn_implementation``). Again on
    the same model it swaps what has come since. docs/accelerate.md lists the layers and models, and which calls stay.

    Args:
        model: a model of transformers, or a part of one that makes its own masks, loaded and on its device. Any other module is
            walked through too.
        verify: inputs of the model by name. It is called once with them, without gradients and in eval mode, and each layer that
            was replaced is measured against the original in higher precision, beside the original itself.

    Returns:
        A ``Report``: each layer that runs a module of ours, whose attention is ours, and by class what was left and why.

    Raises:
        ValueError: ``model`` is no module.
    """
    if not isinstance(model, nn.Module):
        raise bad_argument("model", f"a {type(model).__name__}", "a torch.nn.Module")
    reasons: dict[nn.Module, str] = {}
    inside: set[nn.Module] = set()
    for layer in list(model.modules()):  # what is around a layer comes before it
        replacement = REPLACEMENTS.get(f"{type(layer).__module__}.{type(layer).__qualname__}")
        if replacement is not None and layer not in inside and not isinstance(layer, Swapped):
            try:
                swap(layer, *replacement)
            except Unfit as why:
                reasons[layer] = str(why)
        if isinstance(layer, Swapped):
            inside |= layer.inside()
    rows = [
        Replaced(name, layer.original.__name__, type(layer.fast).__name__)
        for name, layer in model.named_modules()
        if isinstance(layer, Swapped)
    ]
    kept = _join.join(model)
    models = [(name, layer) for name, layer in model.named_modules() if layer in kept]
    attention = tuple(Attention(name, type(layer).__name__, kept[layer]) for name, layer in models)
    if verify is not None:
        errors = measure(model, verify)
        rows = [replace(row, errors=errors.get(row.name)) for row in rows]
    return Report(tuple(rows), _left(model, reasons), attention, sum(p.numel() for p in model.parameters()))


def restore(model: nn.Module) -> int:
    """Take back what ``accelerate`` did: every layer has its original class again, every model its attention.

    Returns:
        How many layers there were.

    Raises:
        ValueError: ``model`` is no module, or the class of a layer was changed again since; nothing is restored then.
    """
    if not isinstance(model, nn.Module):
        raise bad_argument("model", f"a {type(model).__name__}", "a torch.nn.Module")
    layers = [layer for layer in model.modules() if isinstance(layer, Swapped)]
    for layer in layers:
        if "original" not in vars(type(layer)):
            raise bad_argument("model", f"a {type(layer).__name__} whose class was changed since", "what accelerate left")
    for layer in layers:
        unswap(layer)
    _join.leave(model)
    return len(layers)


def _left(model: nn.Module, reasons: dict[nn.Module, str]) -> tuple[Left, ...]:
    """What stays, by class and reason; the parameters of torch's own layers count for the layer around them."""
    found: dict[tuple[str, str], Left] = {}
    seen: set[int] = set()

    def own(layer: nn.Module) -> int:
        """Numbers in parameters that belong to ``layer`` and to no layer of another project inside it."""
        numbers = 0
        for parameter in layer.parameters(recurse=False):
            numbers += 0 if id(parameter) in seen else parameter.numel()
            seen.add(id(parameter))
        return numbers + sum(own(child) for child in layer.children() if _of_torch(child) and not isinstance(child, Swapped))

    def visit(layer: nn.Module) -> None:
        if isinstance(layer, Swapped) and layer.part is None:
            return
        parameters = 0 if isinstance(layer, Swapped) else own(layer)
        if parameters or layer in reasons:
            key = (type(layer).__name__, reasons.get(layer, "no module of this package does its work"))
            before = found.get(key, Left(key[0], 0, 0, key[1]))
            found[key] = replace(before, count=before.count + 1, parameters=before.parameters + parameters)
        for child in layer.children():
            if not _of_torch(child) or child._modules:
                visit(child)

    visit(model)
    return tuple(sorted(found.values(), key=lambda row: -row.parameters))


def _of_torch(layer: nn.Module) -> bool:
    return type(layer).__module__.startswith("torch.nn.")

# SPDX-License-Identifier: Apache-2.0
"""How a layer of another project comes to run a module of ours: it stays the object it is, and gets a class of its own.

The class of a swapped layer is a subclass of its original class with another ``forward``, which calls a module of
``vlmkernels.nn``. That module has no parameters of its own: ``adopt`` gives it the layer's, in the layer's own dictionaries. So
parameters, buffers, submodules, hooks, state_dict and ``isinstance`` are what they were, a call that the module does not serve
goes on to ``super().forward``, and the way back is to assign the original class.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from vlmkernels.nn._norm import RMSNorm
from vlmkernels.nn._packed import SideBySide

#: Layers of ours in whose place the original's are called.
_LEAVES = (nn.Linear, nn.Conv2d, nn.Conv3d, nn.LayerNorm, nn.Embedding, nn.Dropout, nn.Identity, RMSNorm)


class Unfit(Exception):
    """Why a layer of a known class is left as it is."""


class Swapped(nn.Module):
    """What stands before the original class: a subclass has ``build`` and a ``forward`` that may go on to ``super().forward``."""

    #: Parameters of the original that the module does not use: calls that need them go to the original.
    unused: tuple[str, ...] = ()
    #: Where the module does only a part of the layer's work: the layers inside that it does the work of, maybe none.
    part: tuple[str, ...] | None = None
    #: Whether the module reads parameters where the original calls the layers that hold them.
    reads_leaves = False
    #: Layers whose parameters the module reads although it calls others.
    reads: tuple[str, ...] = ()
    #: The configuration with which the original is exact only where its attention is eager.
    eager_config = ""
    #: Whether the original knows only masks that are added.
    adds_masks = False
    original: type[nn.Module]
    recipe: "Recipe"
    #: The module of ours. Its parameters are those of the layer, so it is no submodule; as an attribute of its own it costs a
    #: compiled graph fewer guards than a property does.
    fast: Any

    if TYPE_CHECKING:

        def __getattr__(self, name: str) -> Any:
            """What a layer has is the original's."""

    def __new__(cls, *args: Any, **kwargs: Any) -> Any:
        """A new one is an original, as ``type(model).from_pretrained`` wants it."""
        return cls.original(*args, **kwargs)

    @classmethod
    def build(cls, layer: Any) -> nn.Module:
        """The module that serves ``layer``, its sizes on the device ``meta``; raises ``Unfit`` where there is none."""
        raise NotImplementedError

    def inside(self) -> set[nn.Module]:
        """What the module passes over."""
        return {child for _, _, child in self.__dict__["_vlmkernels_passed"]}

    def untouched(self) -> bool:
        """Whether everything that the module passes over is still what it was and has no hooks that wait for a call."""
        for owner, name, child in self.__dict__["_vlmkernels_passed"]:
            if owner._modules.get(name) is not child or not unhooked(child):
                return False
        return True

    def _apply(self, fn: Callable[..., Any], recurse: bool = True) -> Any:
        super()._apply(fn, recurse)
        lay(self.fast)
        return self

    def _get_name(self) -> str:
        return f"{self.original.__name__} as {type(self.fast).__name__}"

    def __reduce_ex__(self, protocol: Any) -> Any:
        # The class is made, not found in a module: copies and pickles name what it is made of.
        return _again, (type(self).recipe,), self.__dict__


def _again(recipe: "Recipe") -> Swapped:
    made: Swapped = object.__new__(swapped_class(recipe))
    return made


#: What swaps a layer: the class that does, and its attributes, as pairs.
Replacement = tuple[type[Swapped], tuple[tuple[str, Any], ...]]
#: What a class is made of: the one that runs the module, the original, and the attributes of the first, as pairs.
Recipe = tuple[type[Swapped], type[nn.Module], tuple[tuple[str, Any], ...]]


@functools.cache
def swapped_class(recipe: Recipe) -> type[Swapped]:
    kind, original, arguments = recipe
    members = {"original": original, "recipe": recipe, "__module__": original.__module__, "__doc__": original.__doc__}
    return type(original.__name__, (kind, original), {**members, **dict(arguments)})


def swap(layer: nn.Module, kind: type[Swapped], arguments: tuple[tuple[str, Any], ...]) -> None:
    """Give ``layer`` the class that runs a module of ours.

    Raises:
        Unfit: the reason why not; the layer is as before.
    """
    if "forward" in vars(layer):
        raise Unfit("its forward was exchanged")
    made = swapped_class((kind, type(layer), arguments))
    fast = made.build(layer)
    _check_names(fast, layer, made)
    adopt(fast, layer)
    lay(fast)
    vars(layer)["fast"] = fast
    vars(layer)["_vlmkernels_passed"] = tuple(_passed_over(layer, made))
    layer.__class__ = made


def unswap(layer: Swapped) -> None:
    """Give ``layer`` its original class."""
    for module in layer.fast.modules():
        if isinstance(module, SideBySide):
            module._forget()
    layer.__class__ = type(layer).original  # type: ignore[assignment]
    del vars(layer)["fast"], vars(layer)["_vlmkernels_passed"]


def adopt(ours: nn.Module, theirs: nn.Module) -> None:
    """``ours`` gets the parameters and the innermost layers of ``theirs``, and follows what becomes of them."""
    ours._parameters = theirs._parameters
    inner = {name: child for name, child in ours._modules.items() if child is not None and not isinstance(child, _LEAVES)}
    if not inner:
        ours._modules = theirs._modules
        return
    for name in ours._modules:
        if name in inner:
            adopt(inner[name], theirs._modules[name])  # type: ignore[arg-type]
        else:
            ours._modules[name] = theirs._modules.get(name)


def lay(fast: nn.Module) -> None:
    """Put the parameters of layers with the same input side by side: one product serves them."""
    for module in fast.modules():
        if isinstance(module, SideBySide):
            module._lay()


def _check_names(fast: nn.Module, layer: nn.Module, kind: type[Swapped]) -> None:
    ours = {name: tuple(p.shape) for name, p in fast.named_parameters()}
    theirs = {name: tuple(p.shape) for name, p in layer.named_parameters() if name not in kind.unused}
    if kind.part is not None:
        theirs = {name: shape for name, shape in theirs.items() if name in ours}
    if not kind.reads_leaves:
        theirs = _without_adapters(theirs, fast, layer, kind)
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise Unfit(f"its {name} is {theirs.get(name, 'missing')}, the module's is {ours.get(name, 'missing')}")


def _without_adapters(
    theirs: dict[str, tuple[int, ...]], fast: nn.Module, layer: nn.Module, kind: type[Swapped]
) -> dict[str, tuple[int, ...]]:
    """The names as they were before adapters were put around layers that the module calls: what is ``base_layer`` in them."""
    found = dict(theirs)
    for path, leaf in fast.named_modules():
        child = layer._modules.get(path)
        base = getattr(child, "base_layer", None)
        if child is None or not isinstance(base, nn.Linear) or not isinstance(leaf, nn.Linear) or path in kind.reads:
            continue
        found = {name: shape for name, shape in found.items() if not name.startswith(f"{path}.")}
        found |= {f"{path}.{name}": tuple(p.shape) for name, p in base.named_parameters()}
    return found


def _passed_over(layer: nn.Module, kind: type[Swapped]) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """Owner, name and module of all inside ``layer`` that the module does not call."""
    if kind.part is not None:
        yield from ((layer, name, getattr(layer, name)) for name in kind.part)
        return
    for owner in layer.modules():
        for name, child in owner.named_children():
            if kind.reads_leaves or child._modules or (owner is layer and name in kind.reads):
                yield owner, name, child


def unhooked(module: nn.Module) -> bool:
    """Whether nobody waits for a call of ``module``, but transformers for outputs that it is asked for in an argument."""
    if module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    hooks = module._forward_hooks
    return not hooks or all(hook.__module__ == "transformers.utils.output_capturing" for hook in hooks.values())


def autocast(x: torch.Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


def images_fit(x: torch.Tensor, size: Sequence[int], weight: torch.Tensor) -> bool:
    """Whether ``x`` are images of that height and width in the dtype of ``weight``, which no autocast changes."""
    return x.dim() == 4 and tuple(x.shape[2:]) == tuple(size) and x.dtype == weight.dtype and not autocast(x)

# SPDX-License-Identifier: Apache-2.0
"""Launches a kernel again without the 20 microseconds of Python in which Triton finds out which compiled kernel it needs.

Triton compiles a kernel anew for every GPU, dtype of a tensor, alignment of a pointer to 16 bytes, class of an integer (1, a
multiple of 16, 32 or 64 bits wide), ``None``, constant and option. A ``Launch`` fixes all of these but the alignment, so one
compiled kernel serves it while every pointer is aligned; with any other pointer Triton chooses.

A launcher gets its ``Launch`` from a cached function of whatever decides about the arguments::

    @functools.lru_cache(maxsize=LAUNCHES)
    def _double_launch(device, dtype, rows, stride):
        return Launch(_double_kernel, (cdiv(rows, 64),), (rows, stride), BLOCK=64)

    _double_launch(x.device, x.dtype, x.shape[0], x.stride(0))(x, out)

So no argument can be that of another call: what the cached function does not get can't reach the kernel.

Triton's own launcher is Python around one C function, whose arguments are others in every version. They are learnt by letting
the launcher call a function that notes them. From then on the C function is called directly: 1.9 microseconds for a launch of
attention instead of 2.8, 0.8 of them Triton's (Xeon, Triton 3.9, a driver that does nothing).
"""

import copy
import functools
import inspect
import types
from collections.abc import Callable
from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

#: How many launches each of those functions remembers.
LAUNCHES = 1024
#: How many addresses of its tensors a launch remembers TMA descriptors for, as those of the weights of a model's layers: making
#: one takes 2 microseconds of Python on a Xeon.
_DESCRIPTORS = 256

# The versions of Triton whose compiled kernels take the arguments below; with any other, every launch is left to Triton.
_KNOWN = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)

#: Shape, strides and tile of a tensor that the kernel takes as a TMA descriptor.
Layout = tuple[list[int], list[int], list[int]]


class Launch:
    """A launch of ``kernel`` with all its arguments but the tensors, which come first in the kernel's signature.

    Every call must be for the same GPU, which must be current, with the same dtypes and ``None`` at the same places.

    Args:
        kernel: the function under ``@triton.jit``.
        grid: one to three sizes.
        scalars: the arguments between the tensors and the constants.
        descriptors: the layout of each tensor that the kernel takes as a TMA descriptor, by its place.
        options: the constants, which come last, and Triton's ``num_warps`` and ``num_stages``.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        scalars: tuple[float, ...],
        descriptors: dict[int, Layout] | None = None,
        **options: Any,
    ) -> None:
        self._kernel, self._grid, self._scalars, self._options = kernel, grid, scalars, options
        self._descriptors = descriptors or {}
        self._compiled: CompiledKernel | None = None

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        pointers: list[Any] = [0 if x is None else x.data_ptr() for x in tensors]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        if bits & 15:
            self._launch_by_triton(tensors)
        elif self._compiled is None or _hooked():
            self._remember(self._launch_by_triton(tensors), tensors)
        else:
            for place in self._places:
                pointers[place : place + 1] = self._describe(place, pointers[place])
            self._launch(self._stream(self._device), pointers)

    def _launch_by_triton(self, tensors: tuple[torch.Tensor | None, ...]) -> Any:
        arguments: list[Any] = list(tensors)
        for place, layout in self._descriptors.items():
            arguments[place] = TensorDescriptor(arguments[place], *layout)
        return self._kernel[self._grid](*arguments, *self._scalars, **self._options)

    def _remember(self, compiled: Any, tensors: tuple[torch.Tensor | None, ...]) -> None:
        # The interpreter gives None, a mere compilation a kernel that no GPU has loaded.
        if not (_KNOWN and isinstance(compiled, CompiledKernel) and compiled.function is not None):
            return
        if compiled.metadata.target.backend != "cuda":
            return  # others specialise on more
        # What stands for a constant is not read, but counted.
        constants = len(self._kernel.arg_names) - len(tensors) - len(self._scalars)
        rest = (*self._scalars, *[None] * constants)
        launch = _learn(compiled, (*self._grid, 1, 1)[:3], len(tensors), rest, bool(self._descriptors))
        if launch is None:
            return
        self._launch = launch
        self._places = sorted(self._descriptors, reverse=True)  # the last first: a descriptor takes several places
        if self._places:
            dtypes = [x if x is None else x.dtype for x in tensors]
            self._describe = _describer(compiled, self._descriptors, dtypes)
        self._device, self._stream = driver.active.get_current_device(), driver.active.get_current_stream
        self._compiled = compiled  # last: another thread may look


def _learn(
    compiled: Any, size: tuple[int, ...], tensors: int, rest: tuple[Any, ...], described: bool
) -> Callable[[int, list[Any]], None] | None:
    """How to launch ``compiled`` on a stream with what stands for its tensors. None where more than these would change.

    Args:
        size: of the grid.
        tensors: how many there are, in front of all other arguments.
        rest: those other arguments.
        described: whether TMA descriptors are among them.
    """
    launcher, metadata = copy.copy(compiled.run), compiled.metadata
    if metadata.global_scratch_size or metadata.profile_scratch_size or getattr(launcher, "gsan_enabled", False):
        return None  # memory that is allocated for every launch, or a sanitizer that counts launches
    function = launcher.launch
    if described:
        if not metadata.tensordesc_meta:
            return None  # compiled without TMA
        function = inspect.getclosurevars(function).nonlocals["launcher"]  # inside the loop that makes descriptors
    calls: list[tuple[Any, ...]] = []
    launcher.launch = lambda *arguments: calls.append(arguments)
    stream, arguments = object(), (*[object() for _ in range(tensors)], *rest)
    # No metadata for hooks and no hooks.
    launcher(*size, stream, compiled.function, compiled.packed_metadata, None, None, None, *arguments)
    called = calls[0]
    place = next(i for i, argument in enumerate(called) if argument is stream)
    first, last = called[:place], called[place + 1 :]
    if last[-1] == arguments:  # Triton 3.9
        last = last[:-1]
        return lambda stream, pointers: function(*first, stream, *last, (*pointers, *rest))
    if last[-len(arguments) :] == arguments:  # Triton 3.6
        last = last[: -len(arguments)]
        return lambda stream, pointers: function(*first, stream, *last, *pointers, *rest)
    return None


def _describer(compiled: Any, layouts: dict[int, Layout], dtypes: list[torch.dtype | None]) -> Callable[[int, int], list[Any]]:
    """What stands for a tensor at a place among the C function's arguments: its TMA descriptor, sizes and strides."""
    from triton.backends.nvidia.driver import make_tensordesc_arg

    metadata = dict(zip(sorted(layouts), compiled.metadata.tensordesc_meta, strict=True))
    unread = [None] * (make_tensordesc_arg.__code__.co_argcount - 2)  # one in Triton 3.9

    @functools.lru_cache(maxsize=_DESCRIPTORS)
    def describe(place: int, address: int) -> list[Any]:
        base = types.SimpleNamespace(data_ptr=lambda: address, dtype=dtypes[place])
        described: list[Any] = make_tensordesc_arg(TensorDescriptor(base, *layouts[place]), metadata[place], *unread)
        return described

    return describe


def _hooked() -> bool:
    """Whether somebody watches launches, such as Triton's profiler."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))

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
"""

from typing import Any

import torch
import triton
from triton import knobs
from triton.compiler import CompiledKernel
from triton.runtime import driver
from triton.tools.tensor_descriptor import TensorDescriptor

#: How many launches each of those functions remembers.
LAUNCHES = 1024

# The versions of Triton whose compiled kernels take the arguments below; with any other, every launch is left to Triton.
_KNOWN = (3, 6) <= tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 9)


class Launch:
    """A launch of ``kernel`` with all its arguments but the tensors, which come first in the kernel's signature.

    Every call must be for the same GPU, which must be current, with the same dtypes and ``None`` at the same places.

    Args:
        kernel: the function under ``@triton.jit``.
        grid: one to three sizes.
        scalars: the arguments between the tensors and the constants.
        descriptors: shape, strides and tile of each tensor that the kernel takes as a TMA descriptor, by its place.
        options: the constants, which come last, and Triton's ``num_warps`` and ``num_stages``.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        scalars: tuple[float, ...],
        descriptors: dict[int, tuple[list[int], list[int], list[int]]] | None = None,
        **options: Any,
    ) -> None:
        self._kernel, self._grid, self._scalars, self._options = kernel, grid, scalars, options
        self._descriptors = descriptors or {}
        self._compiled: CompiledKernel | None = None

    def __call__(self, *tensors: torch.Tensor | None) -> None:
        bits, pointers = 0, []
        for x in tensors:
            pointer = x if x is None else x.data_ptr()
            pointers.append(pointer)
            bits |= pointer or 0
        if bits & 15:
            self._launch_by_triton(tensors)
        elif self._compiled is None or _hooked():
            self._remember(self._launch_by_triton(tensors), tensors)
        else:
            for place, fields in self._fields:
                pointers[place] = descriptor = object.__new__(TensorDescriptor)  # its checks take 5 microseconds
                descriptor.__dict__.update(fields, base=tensors[place])
            stream = self._stream(self._device)
            self._run(*self._size, stream, *self._function, *pointers, *self._rest)

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
        self._device, self._stream = driver.active.get_current_device(), driver.active.get_current_stream
        self._run, self._size = compiled.run, (*self._grid, 1, 1)[:3]
        # No metadata for hooks and no hooks. What stands for a constant is not read, but counted.
        self._function = compiled.function, compiled.packed_metadata, None, None, None
        constants = len(self._kernel.arg_names) - len(tensors) - len(self._scalars)
        self._rest = (*self._scalars, *[None] * constants)
        self._fields = []
        for place, layout in self._descriptors.items():
            fields = vars(TensorDescriptor(tensors[place], *layout))
            del fields["base"]
            self._fields.append((place, fields))
        self._compiled = compiled  # last: another thread may look


def _hooked() -> bool:
    """Whether somebody watches launches, such as Triton's profiler."""
    enter, leave = knobs.runtime.launch_enter_hook, knobs.runtime.launch_exit_hook
    return bool(getattr(enter, "calls", enter) or getattr(leave, "calls", leave))

# SPDX-License-Identifier: Apache-2.0
"""The one mechanism behind every operator: its schema, its backends, and the choice between them.

A backend of the operator ``attention`` is the module ``vlmkernels/backends/<name>/attention.py``. It defines a function for
each registered op that it can run (``attention_fwd``, ``attention_bwd``) with the arguments of the schema less ``backend``,
and may define ``why_not_attention_fwd(...)`` with the same arguments, which returns None or why these inputs are not for it.
The package ``vlmkernels/backends/<name>/__init__.py`` defines ``why_not(device)``: None, or why it can't run there at all.
"""

import contextlib
import importlib
import importlib.util
import os
from collections.abc import Callable, Iterator
from types import ModuleType
from typing import Any

import torch

#: The order of choice. A backend outside it (``flash_attn``) runs only where it is forced.
ORDER = ("cuda", "triton", "torch", "reference")
BACKENDS = (*ORDER, "flash_attn")

LIBRARY = torch.library.Library("vlmkernels", "DEF")
OPS: dict[str, "Op"] = {}


class BackendError(RuntimeError):
    """A forced backend can't run these inputs, or no backend can. The message says why."""


def _known(name: str, source: str) -> str:
    if name and name not in BACKENDS:
        raise ValueError(f"{source}: got {name!r}, wanted one of {', '.join(BACKENDS)}")
    return name


# One plain variable for the whole process: autograd runs backward passes in threads of its own, which see no context variable.
_forced = _known(os.environ.get("VLMKERNELS_BACKEND", ""), "VLMKERNELS_BACKEND")


def forced_backend(backend: str | None) -> str:
    """The name of the backend that must run: the argument, else ``use_backend``, else the environment, else ``""`` for any."""
    return _forced if backend is None else _known(backend, "backend")


@contextlib.contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Force every operator called inside to run on the backend ``name`` (``""``: free choice), in the whole process.

    A backward pass runs on the backend that was forced at its forward pass.

    Raises:
        ValueError: ``name`` is not one of ``BACKENDS``.
    """
    global _forced
    before, _forced = _forced, _known(name, "name")
    try:
        yield
    finally:
        _forced = before


class Op:
    """A registered op ``vlmkernels::<name>`` that picks a backend inside, so a compiled graph holds one node.

    Args:
        stem: the operator, which names the module in every backend.
        schema: the torch schema; its last argument must be ``str backend``.
        fake: shapes, dtypes and strides of the results, from the arguments of the schema.
    """

    def __init__(self, stem: str, schema: str, fake: Callable[..., Any]) -> None:
        self.stem = stem
        self.name = schema.partition("(")[0]
        self._modules: dict[str, ModuleType | str] = {}
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, self._run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vlmkernels::{self.name}", fake, lib=LIBRARY)
        self._registered = getattr(torch.ops.vlmkernels, self.name).default
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        return self._registered(*args)

    def _module(self, backend: str) -> ModuleType | str:
        """The backend's module, or why there is none."""
        if backend not in self._modules:
            path = f"vlmkernels.backends.{backend}"
            if importlib.util.find_spec(path) is None or importlib.util.find_spec(f"{path}.{self.stem}") is None:
                self._modules[backend] = f"it has no {self.stem}"
            else:
                reason = importlib.import_module(path).why_not_importable()
                self._modules[backend] = reason or importlib.import_module(f"{path}.{self.stem}")
        return self._modules[backend]

    def why_not(self, backend: str, device: torch.device, *args: Any) -> str | None:
        """Why ``backend`` can't run this op on ``device`` with ``args`` (without ``args``: with any), or None if it can."""
        module = self._module(backend)
        if isinstance(module, str):
            return module
        if not hasattr(module, self.name):
            return f"it has no {self.name}"
        reason: str | None = importlib.import_module(f"vlmkernels.backends.{backend}").why_not(device)
        if reason is None and args:
            check = getattr(module, f"why_not_{self.name}", None)
            reason = check(*args) if check else None
        return reason

    def select(self, backend: str, *args: Any) -> Callable[..., Any]:
        """The function that runs this op on ``args``: the forced backend's, else that of the first backend that can.

        Raises:
            BackendError: the forced backend, or every backend, has a reason not to run.
        """
        device = next(a.device for a in args if isinstance(a, torch.Tensor))
        reasons = []
        for name in (backend,) if backend else ORDER:
            reason = self.why_not(name, device, *args)
            if reason is None:
                function: Callable[..., Any] = getattr(self._modules[name], self.name)
                return function
            reasons.append(f"{name}: {reason}")
        raise BackendError(f"{self.name} can't run on {'the forced backend' if backend else 'any backend'}; {'; '.join(reasons)}")

    def _run(self, *args: Any) -> Any:
        return self.select(args[-1], *args[:-1])(*args[:-1])


def bad_argument(name: str, got: object, wanted: str) -> ValueError:
    """The error that every refusal raises: which argument, what came, what was wanted."""
    return ValueError(f"{name}: got {got}, wanted {wanted}")

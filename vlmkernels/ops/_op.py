# SPDX-License-Identifier: Apache-2.0
"""The one mechanism behind every operator: its schema, its backends, and the choice between them.

A backend of the operator ``attention`` is the module ``vlmkernels/backends/<name>/attention.py``. It defines a function for
each registered op that it can run (``attention_fwd``, ``attention_bwd``) with the arguments of the schema less ``backend``,
and may define ``why_not_attention_fwd(...)`` with the same arguments, which returns None or why these inputs are not for it, and
``yields_attention_fwd(...)``, whether a backend behind it is faster for them: asked where none is forced.
The package ``vlmkernels/backends/<name>/__init__.py`` defines ``why_not(device)``: None, or why it can't run there at all.

A model makes the same call again and again. So that only the first pays for checks, views and choices, a backend may define
``plan_attention_fwd(...)`` too, which returns a plan: a function that makes the call for tensors laid out like these. ``Op.plan``
remembers it after the first call, and ``Op.planned`` gives it to the next.
"""

import contextlib
import functools
import importlib
import importlib.util
import operator
import os
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch

#: The order of choice. A backend outside it (``flash_attn``) runs only where it is forced.
ORDER = ("cuda", "triton", "torch", "reference")
BACKENDS = (*ORDER, "flash_attn")

LIBRARY = torch.library.Library("vlmkernels", "DEF")
OPS: dict[str, "Op"] = {}


def _key_bits(*names: str) -> int:
    """The bits of these dispatch keys in what torch calls the raw form of a set of them."""
    bits: int = functools.reduce(
        operator.or_, (torch._C.DispatchKeySet(getattr(torch._C.DispatchKey, name)) for name in names)
    ).raw_repr()
    return bits


# All keys but those of an ordinary dense tensor, and but those of a thread in no mode: torch's dispatcher has work for these.
_SPECIAL_TENSOR = ~_key_bits("CPU", "CUDA", "ADInplaceOrView", "AutogradCPU", "AutogradCUDA", "AutocastCPU", "AutocastCUDA")
_SPECIAL_THREAD = ~_key_bits("BackendSelect", "ADInplaceOrView")
_is_compiling, _profiler_enabled = torch.compiler.is_compiling, torch._C._autograd._profiler_enabled
_function_modes, _keys_of_thread = torch._C._len_torch_function_stack, torch._C._dispatch_tls_local_include_set
_keys_of, _grad_enabled = torch._C._dispatch_keys, torch.is_grad_enabled


def unwatched(tensors: tuple[torch.Tensor | None, ...]) -> bool:
    """Whether a call may go past torch's dispatcher, which takes 10 microseconds, with nothing and nobody noticing.

    Not while something is traced, compiled, transformed or profiled, not in a mode, and not with a tensor of a subclass or one
    that is fake, batched or lazily negated. What is not asked for by name shows in the dispatch keys.
    """
    if _is_compiling() or _function_modes() or _profiler_enabled() or _keys_of_thread().raw_repr() & _SPECIAL_THREAD:
        return False
    keys = 0
    for x in tensors:
        if x is not None:
            keys |= _keys_of(x).raw_repr()
    return not keys & _SPECIAL_TENSOR


class Candidate(NamedTuple):
    """What a backend has for an op: the function, and where there are any its check of the arguments, its maker of plans, and
    whether it yields to others."""

    function: Callable[..., Any]
    why_not: Callable[..., str | None] | None
    plan: Callable[..., Callable[..., Any] | None] | None
    yields: Callable[..., bool] | None

    def takes(self, *args: Any) -> bool:
        return self.why_not is None or self.why_not(*args) is None


def _key(settings: tuple[Any, ...], tensors: tuple[Any, ...]) -> tuple[list[torch.Tensor], tuple[Any, ...]]:
    """The tensors that are there, and what plans are kept under."""
    missing = tuple([x is None for x in tensors])
    present = [x for x in tensors if x is not None]
    return present, (settings, missing, _grad_enabled(), present[0].shape, present[1].shape)


def _aligned(tensors: list[torch.Tensor]) -> bool:
    addresses = 0
    for x in tensors:
        addresses |= x.data_ptr()
    return not addresses % 64


#: What a plan may be given: tensors of these layouts, their addresses multiples of 64 bytes (as all that torch allocates is).
Alike = Callable[..., bool]
#: How many sets of shapes an op remembers plans for, and how many layouts of each.
_SHAPES, _LAYOUTS = 1024, 8


def _alike(tensors: list[torch.Tensor]) -> Alike | None:
    """A check that others agree with ``tensors`` in all but address and values, or None if it can't be had.

    It is the one that torch.compile guards its graphs with: class, dispatch keys (so also the modes of the thread), dtype,
    device, requires_grad, sizes and strides, in 0.1 microseconds a tensor (Xeon, torch 2.13), where a key of all that takes 0.45
    and ``unwatched`` 0.3. It refuses to be given one tensor twice.
    """
    guards = getattr(torch._C._dynamo.guards, "TensorGuards", None)
    if guards is None:
        return None
    check: Alike = guards(*tensors, dynamic_dims_sizes=None, dynamic_dims_strides=None).check
    return check if check(*tensors) else None


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


def _on_its_device(function: Callable[..., Any], index: int) -> Callable[..., Any]:
    """``function`` with the GPU of its tensors current: that is where Triton launches, on its current stream."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        if torch.cuda.current_device() == index:
            return function(*args)
        with torch.cuda.device(index):
            return function(*args)

    return run


def _planned_on_its_device(make: Callable[..., Any], index: int) -> Callable[..., Any]:
    """``make`` with its plans run by ``_on_its_device``."""

    def plan(*args: Any) -> Callable[..., Any] | None:
        made = make(*args)
        return made and _on_its_device(made, index)

    return plan


class Op:
    """A registered op ``vlmkernels::<name>`` that picks a backend inside, so a compiled graph holds one node.

    Args:
        stem: the operator, which names the module in every backend.
        schema: the torch schema; its first arguments are all the tensors, its last must be ``str backend``.
        fake: shapes, dtypes and strides of the results, from the arguments of the schema.
        complete: whether its plans take the tensors of the schema and give all of its results. A compiled graph, whose calls
            come through torch's dispatcher, then has plans as well: in 12 layers of BERT the long way took the host 1.5 ms of 8
            (H200).
    """

    def __init__(self, stem: str, schema: str, fake: Callable[..., Any], complete: bool = False) -> None:
        self.stem = stem
        self.name = schema.partition("(")[0]
        self._found: dict[tuple[str, torch.device], Candidate | str] = {}
        self._choices: dict[tuple[str, torch.device], list[Candidate]] = {}
        self._plans: dict[tuple[Any, ...], list[tuple[Alike, Callable[..., Any] | None]]] = {}
        LIBRARY.define(schema)
        LIBRARY.impl(self.name, self._dispatched if complete else self.run, "CompositeExplicitAutograd")
        torch.library.register_fake(f"vlmkernels::{self.name}", fake, lib=LIBRARY)
        self._registered = getattr(torch.ops.vlmkernels, self.name).default
        self._num_tensors = schema.count("Tensor", 0, schema.index("->"))
        OPS[self.name] = self

    def __call__(self, *args: Any) -> Any:
        """Run it on ``args``, of which nothing is to have a gradient: that is for the operator's ``autograd.Function``."""
        return self.run(*args) if unwatched(args[: self._num_tensors]) else self._registered(*args)

    def _find(self, backend: str, device: torch.device) -> "Candidate | str":
        path = f"vlmkernels.backends.{backend}"
        if importlib.util.find_spec(path) is None or importlib.util.find_spec(f"{path}.{self.stem}") is None:
            return f"it has no {self.stem}"
        package = importlib.import_module(path)
        # Asked before the operator's module is imported: where a backend can't run, what it needs isn't loaded either.
        reason: str | None = package.why_not_importable() or package.why_not(device)
        if reason is not None:
            return reason
        module = importlib.import_module(f"{path}.{self.stem}")
        if not hasattr(module, self.name):
            return f"it has no {self.name}"
        function, plan = getattr(module, self.name), getattr(module, f"plan_{self.name}", None)
        if device.type == "cuda" and torch.cuda.device_count() > 1:
            function = _on_its_device(function, device.index)
            plan = plan and _planned_on_its_device(plan, device.index)
        why_not, yields = (getattr(module, f"{what}_{self.name}", None) for what in ("why_not", "yields"))
        return Candidate(function, why_not, plan, yields)

    def _candidate(self, backend: str, device: torch.device) -> "Candidate | str":
        """The backend's function and its check of arguments, or why there is none on ``device``; looked for once."""
        found = self._found.get((backend, device))
        if found is None:
            found = self._found[backend, device] = self._find(backend, device)
        return found

    def why_not(self, backend: str, device: torch.device, *args: Any) -> str | None:
        """Why ``backend`` can't run this op on ``device`` with ``args`` (without ``args``: with any), or None if it can."""
        candidate = self._candidate(backend, device)
        if isinstance(candidate, str):
            return candidate
        return candidate.why_not(*args) if candidate.why_not is not None and args else None

    def function(self, backend: str, device: torch.device, *args: Any) -> Callable[..., Any] | None:
        """That of ``backend``, or None if it can't run this op on ``device`` with ``args``."""
        candidate = self._candidate(backend, device)
        return candidate.function if isinstance(candidate, Candidate) and candidate.takes(*args) else None

    def _choose(self, backend: str, *args: Any) -> Candidate:
        """What runs this op on ``args``: the forced backend's, else that of the first backend that can."""
        for tensor in args:
            if isinstance(tensor, torch.Tensor):
                break
        device = tensor.device
        choices = self._choices.get((backend, device))
        if choices is None:
            found = [self._candidate(name, device) for name in ([backend] if backend else ORDER)]
            choices = self._choices[backend, device] = [candidate for candidate in found if not isinstance(candidate, str)]
        fit = (candidate for candidate in choices if candidate.takes(*args))
        first = next(fit, None)
        if first is not None:
            yields = not backend and first.yields is not None and first.yields(*args)
            return next(fit, first) if yields else first
        reasons = "; ".join(f"{name}: {self.why_not(name, device, *args)}" for name in ([backend] if backend else ORDER))
        raise BackendError(f"{self.name} can't run on {'the forced backend' if backend else 'any backend'}; {reasons}")

    def select(self, backend: str, *args: Any) -> Callable[..., Any]:
        """The function that runs this op on ``args``.

        Raises:
            BackendError: the forced backend, or every backend, has a reason not to run.
        """
        return self._choose(backend, *args).function

    def run(self, *args: Any) -> Any:
        """What a call comes to: the first backend that can, on ``args``."""
        arguments = args[:-1]
        return self.select(args[-1], *arguments)(*arguments)

    def _dispatched(self, *args: Any) -> Any:
        """``run`` for a call that comes through torch's dispatcher, with a plan like those of the public function.

        Whoever watches has seen it there: that costs the host a third of what it takes to find a plan.
        """
        settings, tensors = args[self._num_tensors :], args[: self._num_tensors]
        plan = self._known(settings, tensors)
        if plan is not None:
            return plan(*tensors)
        result = self.run(*args)
        self.plan(settings, tensors, args)
        return result

    def call(self, settings: tuple[Any, ...], tensors: tuple[Any, ...], unplanned: Callable[..., Any]) -> Any:
        """A call whose arguments are those of the schema: by its plan, or by ``unplanned``, which is given all of them.

        Args:
            settings: as for ``planned``.
            tensors: as for ``planned``.
            unplanned: checks the arguments and runs the op.
        """
        plan = self.planned(settings, tensors)
        if plan is not None:
            return plan(*tensors)
        args = (*tensors, *settings)
        result = unplanned(*args)
        self.plan(settings, tensors, args)
        return result

    def planned(self, settings: tuple[Any, ...], tensors: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The plan of an earlier call with these settings and with tensors like these, to be called with ``tensors``.

        None where there is none and where somebody watches: the call then goes the long way, through every check. So what is
        refused is never planned, and what a plan is given has been checked when it was made.

        Args:
            settings: all else that decides about the call, the backend's name included. Equal settings must mean the same.
            tensors: all of the call, at least two that are not None. None of them is to have a gradient.
        """
        return None if _is_compiling() or _function_modes() or _profiler_enabled() else self._known(settings, tensors)

    def _known(self, settings: tuple[Any, ...], tensors: tuple[Any, ...]) -> Callable[..., Any] | None:
        """The plan of an earlier call like this one, or None."""
        if not self._plans:
            return None
        present, key = _key(settings, tensors)
        try:
            known = self._plans.get(key, ())
        except TypeError:  # a setting of a wrong type, or a symbolic size, has no hash
            return None
        for alike, plan in known:
            if alike(*present):
                return plan if _aligned(present) else None
        return None

    def plan(self, settings: tuple[Any, ...], tensors: tuple[torch.Tensor | None, ...], args: tuple[Any, ...]) -> None:
        """Remember how such a call is made, after it was.

        Args:
            settings: as for ``planned``.
            tensors: as for ``planned``.
            args: what the op was called with, each tensor beginning where that of ``tensors`` does.
        """
        if _is_compiling():
            return
        choices = self._choices.get((args[-1], args[0].device), ())
        if not any(candidate.plan for candidate in choices) or not unwatched(tensors):
            return
        present, key = _key(settings, tensors)
        known = self._plans.get(key, [])
        if any(alike(*present) for alike, _ in known) or not _aligned(present):
            return
        make = self._choose(args[-1], *args[:-1]).plan
        alike = _alike(present) if make is not None else None
        if make is None or alike is None:
            return
        if len(self._plans) >= _SHAPES:
            self._plans.clear()
        self._plans[key] = [(alike, make(*args[:-1])), *known[: _LAYOUTS - 1]]


def bad_argument(name: str, got: object, wanted: str) -> ValueError:
    """The error that every refusal raises: which argument, what came, what was wanted."""
    return ValueError(f"{name}: got {got}, wanted {wanted}")


def refuse_leaf(x: torch.Tensor) -> None:
    """As torch does in every in-place operation that is differentiable, but before anything is written."""
    base = None if torch.compiler.is_compiling() else x._base
    for what, tensor in (("a leaf Variable", x), ("a view of a leaf Variable", base)):
        if tensor is not None and tensor.is_leaf and tensor.requires_grad:
            raise RuntimeError(f"{what} that requires grad is being used in an in-place operation.")


def check_sizes(**sizes: int) -> None:
    """Refuse the first that is below 1."""
    for name, size in sizes.items():
        if size < 1:
            raise bad_argument(name, size, "1 or more")

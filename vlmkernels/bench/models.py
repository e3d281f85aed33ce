# SPDX-License-Identifier: Apache-2.0
"""The models of ``published``, before and after ``accelerate``.

Ours is the accelerated model, as it is and compiled, of which the faster counts; its peers are the same model before, as it is
and compiled. How many floors a model of so many layers is off says little about a kernel: here ours is right where its error
against fp32 is at most 1.1 times that of the model before, both in bf16.
"""

import copy
import dataclasses
import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmkernels import accelerate
from vlmkernels.bench.peers import Provider
from vlmkernels.bench.published import MODELS, Inputs, Model
from vlmkernels.bench.workloads import OURS, Case, num_bytes, work_dtype
from vlmkernels.integrations.accelerate import Replaced, Report
from vlmkernels.ops._op import bad_argument
from vlmkernels.testing import Comparison
from vlmkernels.testing.compare import FP32_BOUNDS

#: Our error over that of the model before.
MOST = 1.1
#: The layers of a tower whose weights' gradients are compared.
LEARNT = ("patch_embedding", "q_proj")


@dataclass(frozen=True)
class ModelCase(Case):
    """A case whose bound follows from the error of its first peer, the model before; in fp32 that of the rule stays."""

    @functools.cached_property
    def _bounds(self) -> tuple[float, ...]:
        return tuple(MOST * found.ratio for found in super().check(self.peers[0].prepare()()))

    def check(self, result: Any) -> tuple[Comparison, ...]:
        if self.dtype == torch.float32:  # the exact result is its own
            return super().check(result)
        found = zip(super().check(result), self._bounds, strict=True)
        return tuple(dataclasses.replace(one, bound=bound) for one, bound in found)


def build(model: Model, batch: int = 0, clock: str = "queue", training: bool = False) -> Callable[[torch.device], Case]:
    """A builder for ``model`` before and after ``accelerate``; the first and the last entry of the batch are checked.

    With ``training`` the work is a forward pass and the gradients of all parameters. Of these the patch embedding's weight, which
    all layers have a part in, is checked, and the first layer's projection of queries, which only its scores do.
    """

    def make(device: torch.device) -> Case:
        return _case(dataclasses.replace(model, batch=batch or model.batch), device, clock, training)

    return make


def _case(model: Model, device: torch.device, clock: str, training: bool) -> Case:
    dtype = work_dtype(device)
    before: Any = model.build(device, dtype).requires_grad_(training)
    after = copy.deepcopy(before)
    accelerate(after)
    inputs = model.inputs(before.config, device, dtype, model.batch)
    library = "timm" if model.model[0] == "timm" else "hf"
    few = model.batch > 1 and not training  # entries that are checked
    ends = slice(0, model.batch, max(1, model.batch - 1))

    def call(module: torch.nn.Module, compiled: bool) -> Callable[[], Any]:
        run: Callable[..., Any] = torch.compile(module, dynamic=False) if compiled else module
        return _step(run, module, inputs) if training else lambda: run(**inputs).last_hidden_state

    def of_ends(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value[ends] if few else value
        return value.float() if value.is_floating_point() else value

    def exact() -> tuple[torch.Tensor, ...]:
        wide, wide_inputs = copy.deepcopy(before).float(), {name: of_ends(value) for name, value in inputs.items()}
        results = _step(wide, wide, wide_inputs)() if training else (wide(**wide_inputs).last_hidden_state,)
        return tuple(result.double() for result in results)

    def compiled(name: str, module: torch.nn.Module) -> tuple[Provider, ...]:
        return (Provider(name, lambda: call(module, True), compiled=True),) if device.type == "cuda" else ()

    return ModelCase(
        ours=Provider(OURS, lambda: call(after, False)),
        also=compiled(f"{OURS} compiled", after),
        peers=(Provider(library, lambda: call(before, False)), *compiled(f"{library} compiled", before)),
        outputs=LEARNT if training else ("out",),
        exact=exact,
        part=lambda i, x: x[ends] if few else x,
        rule="model",
        flops=_flops(before, inputs) * (3 if training else 1),
        bytes=float(num_bytes(*before.parameters())),
        dtype=dtype,
        clock=clock,
    )


def _step(run: Callable[..., Any], module: torch.nn.Module, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A step of training without its optimiser: the same incoming gradient for every module."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    checked = [next(i for i, name in enumerate(names) if f"{part}.weight" in name) for part in LEARNT]

    @functools.cache
    def incoming(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.sin(torch.arange(shape.numel(), device=device) % 1009).view(shape).to(dtype)

    @torch.enable_grad()
    def step() -> tuple[torch.Tensor, ...]:
        out = run(**inputs).last_hidden_state
        # Of a pooling head there is none.
        gradients = torch.autograd.grad(out, parameters, incoming(out.shape, out.dtype, out.device), allow_unused=True)
        return tuple(gradients[i] for i in checked)

    return step


def verified(name: str, device: torch.device) -> list[tuple[str, Report]]:
    """Title and report of each model of this name (``"blip2"`` is ``blip_2``), accelerated and compared layer by layer.

    Raises:
        ValueError: there is no such model.
    """
    chosen = [model for model in MODELS if _letters(model.model[0]) == _letters(name)]
    if not chosen:
        names = ", ".join(dict.fromkeys(model.model[0] for model in MODELS))
        raise bad_argument("model", repr(name), f"one of {names}")
    found = []
    for model in chosen:
        module: Any = model.build(device, work_dtype(device))
        inputs = model.inputs(module.config, device, work_dtype(device), min(model.batch, 2))
        found.append((f"{model.model[1]} ({model.name})", accelerate(module, verify=inputs)))
    return found


def over_bound(report: Report, device: torch.device) -> list[Replaced]:
    """The layers whose error is over 1.1 times the original's; in fp32, where both are rounding, also over 64 of its floors."""
    least = FP32_BOUNDS["module"] * 2**-24 if work_dtype(device) == torch.float32 else 0.0
    return [row for row in report.replaced if row.errors and not row.errors.ours <= max(MOST * row.errors.original, least)]


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """torch's own formula refuses fewer heads of keys than of queries."""
    batch, heads, queries, dim = q
    return 2 * batch * heads * queries * k[2] * (dim + v[3])


ATTENTION = ("flash", "efficient", "cudnn")


def _flops(model: torch.nn.Module, inputs: Inputs) -> float:
    """Of all products, with those of attention that a mask hides."""
    counted: dict[Any, Any] = {
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention"): _attention_flops for name in ATTENTION
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counted) as counter:
        model(**inputs)
    return float(counter.get_total_flops())

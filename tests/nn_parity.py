# SPDX-License-Identifier: Apache-2.0
"""How the tests of vlmkernels.nn compare a module with the layer that it replaces: weights, output and every gradient."""

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICE, ON_GPU
from torch import Tensor, nn

from vlmkernels.ops._op import use_backend
from vlmkernels.testing.compare import compare


@pytest.fixture(autouse=True)
def quick_backend() -> Iterator[None]:
    """On a CPU the modules run on stock torch: the operators' own tests are those that run Triton's interpreter.

    The originals' convolutions in fp32: on a GPU they were 25,000 floors off in TF32, which is cuDNN's default.
    """
    with use_backend("" if ON_GPU else "torch"), torch.backends.cudnn.flags(enabled=True, allow_tf32=False):
        yield


def randomize(module: nn.Module) -> nn.Module:
    """Every parameter different from its initial zeros and ones, at a scale that keeps activations near 1."""
    with torch.no_grad():
        for parameter in module.parameters():
            fan_in = parameter[0].numel() if parameter.dim() > 1 else 4
            parameter.copy_(torch.randn_like(parameter) * fan_in**-0.5)
    return module.to(DEVICE).eval()


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE)


def share_weights(ours: nn.Module, theirs: nn.Module) -> None:
    """``ours`` takes the weights of ``theirs``; both have the same keys and values, either way."""
    state = {name: value.clone() for name, value in theirs.state_dict().items()}
    ours.to(DEVICE).eval().load_state_dict(state)
    assert set(ours.state_dict()) == set(state)
    for name, value in ours.state_dict().items():
        assert value.shape == state[name].shape, name
        assert torch.equal(value, state[name]), name
    theirs.load_state_dict(ours.state_dict())


def run(module: nn.Module, call: Callable[..., Tensor], inputs: tuple[Tensor, ...], seed: int) -> dict[str, Tensor]:
    """The output, and the gradients of the inputs and the parameters for one random cotangent."""
    inputs = tuple(x.detach().requires_grad_(x.is_floating_point()) for x in inputs)
    module.zero_grad()
    out = call(module, *inputs)
    generator = torch.Generator(DEVICE).manual_seed(seed)
    cotangent = torch.randn(out.shape, generator=generator, device=DEVICE).to(torch.bfloat16).to(out.dtype)
    out.backward(cotangent)
    found = {"output": out.detach()}
    found.update({f"input {i}": x.grad for i, x in enumerate(inputs) if x.grad is not None})
    found.update({name: parameter.grad for name, parameter in module.named_parameters() if parameter.grad is not None})
    return found


@contextlib.contextmanager
def without_rounding() -> Iterator[None]:
    """fp64 tensors stay fp64 where a layer of transformers computes in fp32 by name (RMSNorm, rope, eager softmax)."""
    to, softmax = Tensor.to, nn.functional.softmax

    def wide_to(self: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if self.dtype == torch.float64 and torch.float32 in (*args, kwargs.get("dtype")):
            return self
        return to(self, *args, **kwargs)

    def wide_softmax(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return softmax(x, *args, **{**kwargs, "dtype": x.dtype})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "to", wide_to)
        patch.setattr(Tensor, "float", lambda self: wide_to(self, torch.float32))
        patch.setattr(nn.functional, "softmax", wide_softmax)
        yield


def check_parity(
    ours: nn.Module,
    theirs: nn.Module,
    call_ours: Callable[..., Tensor],
    call_theirs: Callable[..., Tensor],
    *inputs: Tensor,
    zero_gradients: tuple[str, ...] = (),
    prepare: Callable[[nn.Module], nn.Module] = randomize,
) -> None:
    """``ours`` in fp32 computes what ``theirs`` computes in fp64, forward and backward.

    ``zero_gradients`` names biases whose exact gradient is 0, measured against that of the weight beside them: the bias of the
    keys where nothing follows it but a softmax, which does not see a shift of all logits of a row. ``prepare`` gives the
    module its weights.
    """
    prepare(theirs)
    share_weights(ours, theirs)
    got = run(ours, call_ours, inputs, seed=1)
    wide = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    with without_rounding():
        exact = run(copy.deepcopy(theirs).double(), call_theirs, wide, seed=1)
    check(got, exact, zero_gradients)


def check(got: dict[str, Tensor], exact: dict[str, Tensor], zero_gradients: tuple[str, ...] = ()) -> None:
    assert set(got) == set(exact)
    for name, value in got.items():
        assert value.dtype == torch.float32, name
        terms = exact[name.replace("bias", "weight")].abs().max().item() if name in zero_gradients else 0.0
        result = compare(value, exact[name], "module", terms=terms)
        assert result, f"{name}: {result}"


def check_module(
    module: nn.Module,
    call: Callable[..., Tensor],
    *inputs: Tensor,
    zero_gradients: tuple[str, ...] = (),
    prepare: Callable[[nn.Module], nn.Module] = randomize,
) -> None:
    """What every module must do besides computing what another does: copy, pickle, trace with gradients, and run in bf16."""
    prepare(module)
    exact = run(copy.deepcopy(module).double(), call, tuple(x.double() for x in inputs), seed=1)
    for other in (module, pickle.loads(pickle.dumps(module))):
        check(run(other, call, inputs, seed=1), exact, zero_gradients)

    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: call(module, *x), fullgraph=True, backend="aot_eager")
    check(run(module, lambda _, *x: compiled(*x), inputs, seed=1), exact, zero_gradients)

    low = copy.deepcopy(module).to(torch.bfloat16)
    narrow = tuple(x.to(torch.bfloat16) for x in inputs)
    found = run(low, call, narrow, seed=1)
    assert all(value.dtype == torch.bfloat16 and value.isfinite().all() for value in found.values())
    exact = run(low.double(), call, tuple(x.double() for x in narrow), seed=1)
    result = compare(found["output"], exact["output"], "module")
    assert result, result

# SPDX-License-Identifier: Apache-2.0
"""The mechanism behind every operator, on a toy op whose backends live in this file: which backend runs, and what is refused."""

import contextlib
import functools
import importlib.machinery
import os
import subprocess
import sys
import threading
import timeit
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from watchers import FunctionNames, Names

from vlmkernels import BackendError, use_backend
from vlmkernels.ops import _op
from vlmkernels.ops._op import BACKENDS, OPS, ORDER, Candidate, Op, bad_argument, forced_backend

CALLS: list[tuple[str, str, int]] = []  # (op, backend, thread)


def toy_backend(name: str, why_not: Callable[..., str | None] | None = None, backward: bool = True) -> types.ModuleType:
    """A backend module of the operator ``toy``, which multiplies by a number of its own: cuda 1, triton 2, torch 3..."""
    module = types.ModuleType(f"vlmkernels.backends.{name}.toy")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)

    def toy_fwd(x: torch.Tensor, scale: float) -> torch.Tensor:
        CALLS.append(("fwd", name, threading.get_ident()))
        return x * (scale * (BACKENDS.index(name) + 1))

    def toy_bwd(dy: torch.Tensor, scale: float) -> torch.Tensor:
        CALLS.append(("bwd", name, threading.get_ident()))
        return dy * (scale * (BACKENDS.index(name) + 1))

    module.toy_fwd = toy_fwd
    if backward:
        module.toy_bwd = toy_bwd
    if why_not is not None:
        module.why_not_toy_fwd = why_not
    return module


@pytest.fixture(scope="module")
def ops() -> Iterator[dict[str, Op]]:
    """The toy's two ops; torch keeps a registered op for the life of the process, so they are made once."""
    made = {
        "fwd": Op("toy", "toy_fwd(Tensor x, float scale, str backend) -> Tensor", lambda x, scale, backend: torch.empty_like(x)),
        "bwd": Op(
            "toy", "toy_bwd(Tensor dy, float scale, str backend) -> Tensor", lambda dy, scale, backend: torch.empty_like(dy)
        ),
    }
    yield made
    for op in made.values():
        del _op.OPS[op.name]


class Toy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, scale: float, backend: str) -> torch.Tensor:
        ctx.scale, ctx.backend = scale, backend
        return torch.ops.vlmkernels.toy_fwd(x, scale, backend)

    @staticmethod
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return torch.ops.vlmkernels.toy_bwd(dy, ctx.scale, ctx.backend), None, None


def toy(x: torch.Tensor, scale: float = 1.0, backend: str | None = None) -> torch.Tensor:
    return Toy.apply(x, scale, forced_backend(backend))


@pytest.fixture
def backends(ops: dict[str, Op], monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Makes these modules all the backends that the toy has, on packages that run everywhere."""
    monkeypatch.setattr(_op, "_forced", "")

    def install(*modules: types.ModuleType, unusable: dict[str, str] | None = None) -> None:
        CALLS.clear()
        for name in BACKENDS:
            package = types.ModuleType(f"vlmkernels.backends.{name}")
            package.__path__ = []
            package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None, is_package=True)
            package.why_not_importable = lambda: None
            package.why_not = functools.partial(lambda reason, device: reason, (unusable or {}).get(name))
            monkeypatch.setitem(sys.modules, package.__name__, package)
            monkeypatch.delitem(sys.modules, f"{package.__name__}.toy", raising=False)
        for module in modules:
            monkeypatch.setitem(sys.modules, module.__name__, module)
        for op in ops.values():
            monkeypatch.setattr(op, "_found", {})
            monkeypatch.setattr(op, "_choices", {})
            monkeypatch.setattr(op, "_plans", {})

    return install


def ran() -> list[str]:
    return [backend for _, backend, _ in CALLS]


def test_first_backend_in_order_runs(backends: Callable[..., None]) -> None:
    modules = [toy_backend(name) for name in ORDER]
    for first, name in enumerate(ORDER):
        backends(*modules[first:])
        assert toy(torch.ones(3)).tolist() == [first + 1.0] * 3
        assert ran() == [name]


def test_a_reason_passes_the_call_on(backends: Callable[..., None]) -> None:
    def small_only(x: torch.Tensor, scale: float) -> str | None:
        return None if x.numel() < 5 else f"{x.numel()} elements are too many"

    backends(toy_backend("triton", small_only), toy_backend("torch"))
    toy(torch.ones(3)), toy(torch.ones(7)), toy(torch.ones(4))
    assert ran() == ["triton", "torch", "triton"]


def test_a_device_passes_the_call_on(backends: Callable[..., None]) -> None:
    backends(toy_backend("cuda"), toy_backend("reference"), unusable={"cuda": "no such GPU"})
    toy(torch.ones(3))
    assert ran() == ["reference"]


def test_flash_attn_runs_only_where_forced(backends: Callable[..., None]) -> None:
    backends(toy_backend("flash_attn"), toy_backend("reference"))
    toy(torch.ones(3)), toy(torch.ones(3), backend="flash_attn")
    assert ran() == ["reference", "flash_attn"]


def test_forced_by_argument_and_context(backends: Callable[..., None]) -> None:
    backends(*(toy_backend(name) for name in ORDER))
    x = torch.ones(3)
    toy(x, backend="torch")
    with use_backend("reference"):
        toy(x)
        toy(x, backend="triton")
        with use_backend(""):
            toy(x)
        toy(x)
    toy(x)
    assert ran() == ["torch", "reference", "triton", "cuda", "reference", "cuda"]


def test_context_ends_with_an_exception(backends: Callable[..., None]) -> None:
    backends(toy_backend("torch"), toy_backend("reference"))
    with pytest.raises(KeyError), use_backend("reference"):
        raise KeyError
    assert forced_backend(None) == ""


def test_forced_by_environment() -> None:
    script = "from vlmkernels.ops._op import forced_backend; print(forced_backend(None), forced_backend('triton'))"
    done = run_python(script, VLMKERNELS_BACKEND="reference")
    assert done.stdout.split() == ["reference", "triton"], done.stderr
    done = run_python("import vlmkernels", VLMKERNELS_BACKEND="fastest")
    assert done.returncode and "ValueError: VLMKERNELS_BACKEND: got 'fastest', wanted one of cuda, triton" in done.stderr


def run_python(script: str, **environment: str) -> subprocess.CompletedProcess[str]:
    path = os.pathsep.join(filter(None, [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, **environment}
    return subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment, timeout=120)


@pytest.mark.parametrize(
    ("name", "reason"),
    [("triton", "too many"), ("cuda", "no such GPU"), ("flash_attn", "it has no toy"), ("reference", "it has no toy_fwd")],
)
def test_forced_backend_that_cannot_run_says_why(name: str, reason: str, backends: Callable[..., None]) -> None:
    without = toy_backend("reference")
    del without.toy_fwd
    backends(
        toy_backend("cuda"), toy_backend("triton", lambda x, scale: "too many"), toy_backend("torch"), without,
        unusable={"cuda": "no such GPU"},
    )  # fmt: skip
    with pytest.raises(BackendError, match=f"toy_fwd can't run on the forced backend; {name}: {reason}"):
        toy(torch.ones(3), backend=name)
    with use_backend(name), pytest.raises(BackendError, match=reason):
        toy(torch.ones(3))
    assert not CALLS


def test_no_backend_says_why_for_each(backends: Callable[..., None]) -> None:
    backends(toy_backend("torch", lambda x, scale: "odd size"), unusable={"cuda": "no such GPU"})
    with pytest.raises(
        BackendError, match="any backend; cuda: it has no toy; triton: .*; torch: odd size; reference: it has no toy"
    ):
        toy(torch.ones(3))


def test_an_error_in_a_backend_is_not_hidden(backends: Callable[..., None]) -> None:
    broken = toy_backend("triton")

    def toy_fwd(x: torch.Tensor, scale: float) -> torch.Tensor:
        raise RuntimeError("launch failed")

    broken.toy_fwd = toy_fwd
    backends(broken, toy_backend("torch"))
    with pytest.raises(RuntimeError, match="launch failed"):
        toy(torch.ones(3))
    assert not CALLS


def test_unknown_backend_is_refused(backends: Callable[..., None]) -> None:
    backends(toy_backend("torch"))
    with pytest.raises(ValueError, match="backend: got 'fastest', wanted one of cuda, triton, torch, reference, flash_attn"):
        toy(torch.ones(3), backend="fastest")
    with pytest.raises(ValueError, match="name: got 'fastest'"), use_backend("fastest"):
        pass


def test_backend_that_cannot_run_is_not_imported(backends: Callable[..., None]) -> None:
    """A CPU call must not wait for Triton to load."""

    class Untouchable(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise AssertionError(f"{name} was read")

    triton = Untouchable("vlmkernels.backends.triton.toy")
    triton.__spec__ = importlib.machinery.ModuleSpec(triton.__name__, None)
    backends(triton, toy_backend("torch"), unusable={"triton": "no such GPU"})
    toy(torch.ones(3))
    with pytest.raises(BackendError, match="no such GPU"):
        toy(torch.ones(3), backend="triton")
    assert ran() == ["torch"]


@pytest.mark.parametrize("forced_at", ["argument", "context"])
def test_backward_runs_on_the_backend_of_the_forward(forced_at: str, backends: Callable[..., None]) -> None:
    backends(*(toy_backend(name) for name in ORDER))
    x = torch.ones(3, requires_grad=True)
    if forced_at == "argument":
        y = toy(x, backend="torch")
    else:
        with use_backend("torch"):
            y = toy(x)
    with use_backend("reference"):
        y.sum().backward()
    assert ran() == ["torch", "torch"] and x.grad.tolist() == [3.0] * 3


def test_a_forced_backend_is_seen_from_other_threads(backends: Callable[..., None]) -> None:
    """Autograd runs the backward pass of GPU tensors in threads of its own."""
    backends(*(toy_backend(name) for name in ORDER))
    with use_backend("reference"):
        thread = threading.Thread(target=lambda: toy(torch.ones(3)))
        thread.start()
        thread.join()
    assert ran() == ["reference"] and CALLS[0][2] != threading.get_ident()


@pytest.mark.gpu
def test_backward_in_autograds_thread(backends: Callable[..., None], device: torch.device) -> None:
    backends(*(toy_backend(name) for name in ORDER))
    x = torch.ones(3, requires_grad=True, device=device)
    with use_backend("reference"):
        toy(x).sum().backward()
    (_, forward, here), (_, backward, there) = CALLS
    assert forward == backward == "reference" and here != there


def test_compiled_graph_has_one_node_of_each_op(backends: Callable[..., None]) -> None:
    backends(toy_backend("torch"), toy_backend("reference"))
    torch._dynamo.reset()
    graphs = []

    def compiler(graph: torch.fx.GraphModule, inputs: list[torch.Tensor]) -> Callable[..., Any]:
        graphs.append([str(node.target) for node in graph.graph.nodes if node.op == "call_function"])
        return make_boxed_func(graph.forward)

    compiled = torch.compile(lambda x: toy(x, 2.0).sin(), backend=aot_autograd(fw_compiler=compiler), fullgraph=True)
    x = torch.ones(3, requires_grad=True)
    compiled(x).sum().backward()
    forward, backward = graphs
    assert [name for name in forward if "toy" in name] == ["vlmkernels.toy_fwd.default"]
    assert [name for name in backward if "toy" in name] == ["vlmkernels.toy_bwd.default"]
    assert ran() == ["torch", "torch"]


def test_compiled_graph_chooses_when_it_runs(backends: Callable[..., None]) -> None:
    def small_only(x: torch.Tensor, scale: float) -> str | None:
        return None if x[0] < 5 else "it starts too high"

    backends(toy_backend("torch", small_only), toy_backend("reference"))
    torch._dynamo.reset()
    compiled = torch.compile(toy, backend="eager", fullgraph=True)
    compiled(torch.ones(3)), compiled(torch.full((3,), 9.0))
    assert ran() == ["torch", "reference"]


def test_opcheck(backends: Callable[..., None]) -> None:
    backends(toy_backend("torch"))
    torch.library.opcheck(torch.ops.vlmkernels.toy_fwd.default, (torch.ones(3), 2.0, ""))


def test_unwritten_outputs_show(backends: Callable[..., None]) -> None:
    """What conftest does for every test: a backend that forgets an element is found."""
    lazy = toy_backend("torch")

    def toy_fwd(x: torch.Tensor, scale: float) -> torch.Tensor:
        outputs = [torch.empty_strided((4,), (1,)), x.new_empty_strided((4,), (1,)), torch.empty(4, dtype=torch.bfloat16)]
        for dtype in (torch.float32, torch.int32):
            outputs += [torch.empty(4, dtype=dtype), torch.empty_like(x, dtype=dtype), x.new_empty(4, dtype=dtype)]
        return torch.stack([output.float() for output in outputs])

    lazy.toy_fwd = toy_fwd
    backends(lazy)
    out = torch.ops.vlmkernels.toy_fwd(torch.ones(4), 1.0, "")
    assert (out.isnan() | (out == -1.0)).all()


def test_runs_on_the_device_of_its_tensors(backends: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    """With cuda:0 current, tensors of cuda:1 are launched on cuda:1; nothing is switched for those of cuda:0 and of the CPU."""
    current, entered, launched = [0], [], []

    @contextlib.contextmanager
    def switch(index: int) -> Iterator[None]:
        entered.append(index)
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", switch)
    module = toy_backend("torch")
    module.toy_fwd = lambda x, scale: launched.append(current[-1])
    backends(module)
    with FakeTensorMode(), monkeypatch.context() as without_gpu:
        without_gpu.setattr(
            torch.cuda, "is_available", lambda: False
        )  # fake tensors touch the GPU that they name, if there is one
        first, second = (torch.empty(3, device=f"cuda:{index}") for index in (0, 1))
    for x in (first, torch.ones(3), second, first):
        Op.select.__wrapped__(_op.OPS["toy_fwd"], "", x, 1.0)(x, 1.0)
    assert (launched, entered, current) == ([0, 0, 1, 0], [1], [0])


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is no second GPU to be on")
@pytest.mark.parametrize("backend", ORDER)
def test_second_gpu(backend: str) -> None:
    start = torch.zeros(1, 100, dtype=torch.int32, device="cuda:1")
    stop = torch.arange(1, 101, dtype=torch.int32, device="cuda:1")[None]
    if why_not := _op.OPS["tile_bounds"].why_not(backend, start.device):
        pytest.skip(why_not)
    assert torch.cuda.current_device() == 0
    q_bounds, _ = torch.ops.vlmkernels.tile_bounds(start, stop, 100, backend)
    assert q_bounds.tolist() == [[[0, 64, 0, 1], [0, 100, 0, 65]]]
    assert torch.cuda.current_device() == 0


def test_dispatch_is_cheap(backends: Callable[..., None]) -> None:
    """The choice costs less than what torch takes to call any op that is written in Python."""
    module, out = toy_backend("torch"), torch.ones(3)
    module.toy_fwd = lambda x, scale: out
    backends(module)
    library = torch.library.Library("vlmkernels_test", "DEF")
    library.define("bare(Tensor x, float scale, str backend) -> Tensor")
    library.impl("bare", lambda x, scale, backend: out, "CompositeExplicitAutograd")
    op, bare, x = _op.OPS["toy_fwd"], torch.ops.vlmkernels_test.bare.default, torch.ones(3)
    unpoisoned = Op.select.__wrapped__

    def cost(call: Callable[[], Any]) -> float:
        return min(timeit.repeat(call, number=50, repeat=400)) / 50

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Op, "select", unpoisoned)
        op(x, 1.0, "")
        assert cost(lambda: op(x, 1.0, "")) < 2.0 * cost(lambda: bare(x, 1.0, ""))


def test_a_plain_call_goes_past_the_dispatcher(backends: Callable[..., None], monkeypatch: pytest.MonkeyPatch) -> None:
    backends(toy_backend("reference"))
    op, registered = _op.OPS["toy_fwd"], []
    monkeypatch.setattr(op, "_registered", lambda *args: registered.append(args))
    x = torch.ones(3)
    for tensor in (x, torch.nn.Parameter(x), x.requires_grad_()):
        assert op(tensor, 1.0, "").tolist() == [4.0] * 3
    with torch.inference_mode(), torch.autocast("cpu"):
        assert op(torch.ones(3), 1.0, "").tolist() == [4.0] * 3
    assert not registered


def test_whoever_watches_sees_the_op(backends: Callable[..., None]) -> None:
    """Modes, tracers, transforms and the profiler get the registered op, as if every call went through the dispatcher."""
    backends(toy_backend("reference"))
    op, x = _op.OPS["toy_fwd"], torch.ones(3)
    name = "vlmkernels.toy_fwd.default"

    def call(x: torch.Tensor) -> torch.Tensor:
        return op(x, 1.0, "")

    for mode in (Names(), FunctionNames()):
        with mode:
            call(x)
        assert name in mode.seen
    with FakeTensorMode() as fake:
        assert isinstance(call(torch.empty(3)), FakeTensor)
    assert isinstance(call(fake.from_tensor(x)), FakeTensor)
    assert [str(node.target) for node in make_fx(call)(x).graph.nodes].count(name) == 1
    assert "vlmkernels::toy_fwd" in str(torch.jit.trace(call, x).graph)
    assert name in str(torch.export.export(Calls(call), (x,)).graph)
    assert torch.compile(call, backend="eager", fullgraph=True)(x).tolist() == [4.0] * 3
    with torch.profiler.profile() as profile:
        call(x)
    assert "vlmkernels::toy_fwd" in [event.name for event in profile.events()]
    CALLS.clear()
    assert torch.func.vmap(call)(torch.ones(2, 3)).tolist() == [[4.0] * 3] * 2
    assert len(CALLS) == 2  # torch took the batch apart
    assert call(torch.ones(3, device="meta")).device.type == "meta"


def test_a_negated_view_is_negated_first(backends: Callable[..., None]) -> None:
    """Past the dispatcher a backend would get the memory of a lazy negation, which has the other sign."""
    lazy = toy_backend("reference")
    lazy.toy_fwd = lambda x, scale: torch.tensor(x.is_neg())
    backends(lazy)
    negated = torch.ones(3, dtype=torch.complex64).conj().imag
    assert negated.is_neg() and not _op.OPS["toy_fwd"](negated, 1.0, "")


class Calls(torch.nn.Module):
    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.function(x)


def test_bad_argument_names_all_three() -> None:
    error = bad_argument("k", "3 heads", "a divisor of 8")
    assert isinstance(error, ValueError) and str(error) == "k: got 3 heads, wanted a divisor of 8"


def test_a_backend_yields_where_none_is_forced(monkeypatch: pytest.MonkeyPatch) -> None:
    """To the next that can take the inputs, if there is one."""
    op, x = OPS["clip_loss_fwd"], torch.zeros(3)
    yielding = Candidate(lambda *_: "first", None, None, lambda x, *_: len(x) > 2)
    unfit, next_one = Candidate(lambda *_: "unfit", lambda *_: "no", None, None), Candidate(lambda *_: "next", None, None, None)
    choices = {("", x.device): [yielding, unfit, next_one], ("cuda", x.device): [yielding]}
    monkeypatch.setattr(op, "_choices", choices)
    assert op.select("", x)() == "next" and op.select("", x[:2])() == "first" and op.select("cuda", x)() == "first"
    choices["", x.device] = [yielding, unfit]
    assert op.select("", x)() == "first"

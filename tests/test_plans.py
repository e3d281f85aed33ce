# SPDX-License-Identifier: Apache-2.0
"""Calls that are made again: the plan of the first is used where it holds, and nowhere else.

First a toy op whose backends say what ran, then every operator that has plans.
"""

import contextlib
import gc
import importlib.machinery
import sys
import types
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from watchers import FunctionNames, Names

from vlmkernels import BackendError, use_backend
from vlmkernels.bench.runner import backends_used
from vlmkernels.masks import KeyRanges
from vlmkernels.ops import _op, attention, patch_embed, rope, tile_bounds
from vlmkernels.ops._op import OPS, Op, bad_argument, forced_backend

RAN: list[str] = []  # what the toy's backends did
FACTORS = {"torch": 1.0, "reference": 10.0}  # by which they multiply too


def backend_module(name: str) -> types.ModuleType:
    """``x * weight + bias``, without plans for infinite scales; ``torch`` refuses negative ones."""
    module = types.ModuleType(f"vlmkernels.backends.{name}.affine")
    module.__spec__ = importlib.machinery.ModuleSpec(module.__name__, None)

    def result(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, scale: float) -> torch.Tensor:
        out = FACTORS[name] * scale * x * weight
        return out if bias is None else out + bias

    def affine_fwd(*args: Any) -> torch.Tensor:
        RAN.append(f"{name} long")
        return result(*args)

    def plan_affine_fwd(*args: Any) -> Callable[..., torch.Tensor] | None:
        RAN.append(f"{name} asked")
        scale = args[-1]

        def plan(*tensors: Any) -> torch.Tensor:
            RAN.append(f"{name} plan")
            return result(*tensors, scale)

        return None if scale == float("inf") else plan

    module.affine_fwd, module.plan_affine_fwd = affine_fwd, plan_affine_fwd
    if name == "torch":
        module.why_not_affine_fwd = lambda x, weight, bias, scale: "a negative scale" if scale < 0 else None
    return module


@pytest.fixture(scope="module")
def op() -> Iterator[Op]:
    yield Op(
        "affine",
        "affine_fwd(Tensor x, Tensor weight, Tensor? bias, float scale, str backend) -> Tensor",
        lambda x, *_: torch.empty_like(x),
    )
    del _op.OPS["affine_fwd"]


@pytest.fixture(autouse=True)
def toy(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    RAN.clear()
    for name in FACTORS:
        module = backend_module(name)
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for memory in ("_found", "_choices", "_plans"):
        monkeypatch.setattr(op, memory, {})


def affine(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None, scale: Any = 1.0, backend: str | None = None
) -> torch.Tensor:
    """What every operator does, on little."""
    op, settings, tensors = OPS["affine_fwd"], (scale, forced_backend(backend)), (x, weight, bias)
    plan = op.planned(settings, tensors)
    if plan is not None:
        return plan(*tensors)
    if x.shape[-1:] != weight.shape or isinstance(scale, list):
        raise bad_argument("weight", tuple(weight.shape), "the last dimension of x")
    if torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors):
        RAN.append("autograd")
        return x * weight
    out = op(*tensors, *settings)
    op.plan(settings, tensors, (*tensors, *settings))
    return out


def ran(call: Callable[[], Any]) -> str:
    RAN.clear()
    call()
    return ", ".join(RAN)


FIRST, AGAIN = "torch long, torch asked", "torch plan"


def test_the_second_call_runs_the_plan() -> None:
    x, weight = torch.rand(5, 3), torch.rand(3)
    for what in (FIRST, AGAIN, AGAIN):
        assert ran(lambda: affine(x, weight)) == what
    x.zero_()
    assert not affine(x, weight).any()
    other = torch.rand(5, 3)
    assert ran(lambda: affine(other, weight)) == AGAIN
    assert torch.equal(affine(other, weight), other * weight)


CHANGES: dict[str, tuple[Callable[..., torch.Tensor], str]] = {
    "another shape": (lambda x, w: affine(torch.rand(6, 3), w), FIRST),
    "another shape of the second": (lambda x, w: affine(torch.rand(5, 4), torch.rand(4)), FIRST),
    "other strides": (lambda x, w: affine(torch.rand(3, 5).T, w), FIRST),
    "another dtype": (lambda x, w: affine(x.double(), w), FIRST),
    "another class": (lambda x, w: affine(torch.nn.Parameter(x, requires_grad=False), w), FIRST),
    "one more tensor": (lambda x, w: affine(x, w, torch.rand(3)), FIRST),
    "another setting": (lambda x, w: affine(x, w, scale=2.0), FIRST),
    "the backend, forced": (lambda x, w: affine(x, w, backend="torch"), FIRST),
    "another backend, forced": (lambda x, w: affine(x, w, backend="reference"), "reference long, reference asked"),
    "another backend, by its reason": (lambda x, w: affine(x, w, scale=-1.0), "reference long, reference asked"),
    "a gradient": (lambda x, w: affine(x, w.clone().requires_grad_()), "autograd"),
    "a view that begins elsewhere": (lambda x, w: affine(torch.rand(25)[5:20].view(5, 3), w), "torch long"),
    "the same tensor twice": (lambda x, w: affine(w, w), "torch long"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_the_call_is_noticed(change: str) -> None:
    x, weight = torch.rand(5, 3), torch.rand(3)
    affine(x, weight)
    changed, what = CHANGES[change]
    assert ran(lambda: changed(x, weight)) == what
    assert ran(lambda: affine(x, weight)) == AGAIN
    with torch.no_grad():
        assert ran(lambda: affine(x, weight)) == FIRST
        assert ran(lambda: affine(x, weight)) == AGAIN


def test_a_gradient_that_is_not_asked_for() -> None:
    """A plan that a parameter has where gradients are off is none where they are on."""
    x, weight = torch.rand(5, 3), torch.nn.Parameter(torch.rand(3))
    for what in (FIRST, AGAIN):
        with torch.no_grad():
            assert ran(lambda: affine(x, weight)) == what
        assert ran(lambda: affine(x, weight)) == "autograd"
    with torch.inference_mode():
        assert ran(lambda: affine(x, weight)) == FIRST
        assert ran(lambda: affine(x, weight)) == AGAIN


def test_layouts_take_turns() -> None:
    """As towers of one model may, that have the same shapes."""
    weight, inputs = torch.rand(3), [torch.rand(5, 3), torch.rand(3, 5).T, torch.rand(5, 3).double(), torch.rand(5, 6)[:, ::2]]
    for what in (FIRST, AGAIN, AGAIN):
        for x in inputs:
            assert ran(lambda x=x: affine(x, weight)) == what


def test_a_call_without_a_plan_goes_the_long_way() -> None:
    x, weight = torch.rand(5, 3), torch.rand(3)
    for what in ("torch long, torch asked", "torch long", "torch long"):
        assert ran(lambda: affine(x, weight, scale=float("inf"))) == what
    shifted = torch.rand(19)[4:].view(5, 3)
    for _ in range(2):
        assert ran(lambda: affine(shifted, weight)) == "torch long"
    assert ran(lambda: affine(x, weight)) == FIRST  # a plan was not made for a view that begins elsewhere
    assert ran(lambda: affine(shifted, weight)) == "torch long"


def test_without_torchs_check_nothing_is_planned(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch._C._dynamo.guards, "TensorGuards")
    x, weight = torch.rand(5, 3), torch.rand(3)
    for _ in range(2):
        assert ran(lambda: affine(x, weight)) == "torch long"


def test_refusals_refuse_again() -> None:
    x, weight = torch.rand(5, 3), torch.rand(3)
    for _ in range(3):
        affine(x, weight)
        with pytest.raises(ValueError, match=r"weight: got \(4,\)"):
            affine(x, torch.rand(4))
        with pytest.raises(ValueError, match="weight: got"):
            affine(x, weight, scale=[1.0])
        with pytest.raises(ValueError, match="backend: got 'fastest'"):
            affine(x, weight, backend="fastest")
        with pytest.raises(BackendError, match="a negative scale"):
            affine(x, weight, scale=-1.0, backend="torch")


def test_a_forced_backend_is_forced_again() -> None:
    x, weight = torch.rand(5, 3), torch.rand(3)
    for _ in range(3):
        assert torch.equal(affine(x, weight), x * weight)
        with use_backend("reference"):
            assert torch.equal(affine(x, weight), 10.0 * x * weight)
        assert torch.equal(affine(x, weight, backend="reference"), 10.0 * x * weight)


def test_memory_is_bounded(op: Op, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_op, "_SHAPES", 4)
    monkeypatch.setattr(_op, "_LAYOUTS", 2)
    for rows in range(1, 20):
        affine(torch.rand(rows, 3), torch.rand(3))
        assert len(op._plans) <= 4
    strided = [torch.rand(5, 3 * gap)[:, ::gap] for gap in range(1, 6)]
    for x in strided:
        affine(x, torch.rand(3))
    assert max(map(len, op._plans.values())) == 2
    assert [ran(lambda x=x: affine(x, torch.rand(3))) for x in strided[:-3:-1]] == [AGAIN, AGAIN]
    assert ran(lambda: affine(strided[0], torch.rand(3))) == FIRST


def test_whoever_watches_sees_the_op() -> None:
    x, weight = torch.rand(5, 3), torch.rand(3)
    affine(x, weight)
    for mode in (Names(), FunctionNames()):
        with mode:
            assert ran(lambda: affine(x, weight)) == "torch long"
        assert "vlmkernels.affine_fwd.default" in mode.seen
    with torch.profiler.profile() as profile:
        assert ran(lambda: affine(x, weight)) == "torch long"
    assert "vlmkernels::affine_fwd" in [event.name for event in profile.events()]
    with FakeTensorMode():
        assert isinstance(affine(torch.empty(5, 3), torch.empty(3)), FakeTensor)
    torch._dynamo.reset()
    compiled = torch.compile(affine, backend="eager", fullgraph=True)
    assert ran(lambda: compiled(x, weight)) == ran(lambda: compiled(x, weight)) == "torch long"
    assert ran(lambda: torch.func.vmap(affine, (0, None))(x, weight)).startswith("torch long")
    assert affine(torch.empty(5, 3, device="meta"), torch.empty(3, device="meta")).device.type == "meta"
    assert ran(lambda: affine(x, weight)) == AGAIN


def test_torchs_dispatcher_finds_plans_too(op: Op) -> None:
    """Those of an op that is complete, for which ``_dispatched`` is registered."""
    x, weight = torch.rand(5, 3), torch.rand(3)
    for what in (FIRST, AGAIN, AGAIN):
        assert ran(lambda: op._dispatched(x, weight, None, 1.0, "")) == what
    assert torch.equal(op._dispatched(x, weight, None, 1.0, ""), x * weight)
    assert ran(lambda: op._dispatched(x, weight, weight, 1.0, "")) == "torch long"  # one tensor twice
    assert ran(lambda: op._dispatched(x, weight, None, 2.0, "reference")) == "reference long, reference asked"
    with pytest.raises(BackendError, match="a negative scale"):
        op._dispatched(x, weight, None, -1.0, "torch")


@pytest.mark.backends("attention_fwd", "rope_fwd", exclude=("torch", "reference"))
def test_a_compiled_graphs_calls_have_plans(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """They call the registered op, whose plans give all of its results, and whose calls a profiler sees at the dispatcher."""
    options = {
        "attention ranges": (False, 0.25, 0.0, False, backend),
        "rope": (None, None, 1e-6, False, backend),
    }
    for name, others in options.items():
        op, tensors, _ = calls(device)[name]
        found, registered = planned(op, monkeypatch, "_known"), getattr(torch.ops.vlmkernels, op).default
        first, second = (registered(*copies(tensors).values(), *others) for _ in range(2))
        with torch.autograd.profiler.profile(use_cpu=True) as profile:
            registered(*copies(tensors).values(), *others)
        assert found == [False, True, True] and len(first) == len(second)
        assert any(event.name == f"vlmkernels::{op}" for event in profile.function_events)
        assert all(torch.equal(one, two) and one.dtype == two.dtype for one, two in zip(first, second, strict=True))


def test_sizes_that_are_symbols() -> None:
    """They have no hash."""
    graph = make_fx(lambda x, weight: affine(x, weight), tracing_mode="symbolic")(torch.rand(5, 3), torch.rand(3))
    assert "vlmkernels.affine_fwd" in graph.code


def test_a_plan_runs_on_the_device_of_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    current, launched = [0], []

    @contextlib.contextmanager
    def switch(index: int) -> Iterator[None]:
        current.append(index)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", switch)
    for index in (0, 1):
        plan = _op._planned_on_its_device(lambda x: lambda x: launched.append((x, current[-1])), index)("made")
        plan("run")
    assert launched == [("run", 0), ("run", 1)] and current == [0]
    assert _op._planned_on_its_device(lambda x: None, 0)("made") is None


# The operators


def randn(device: torch.device, *shape: int, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.randn(shape, device=device, dtype=dtype)


def calls(device: torch.device) -> dict[str, tuple[str, dict[str, Any], Callable[..., Any]]]:
    """Registered op, tensors, and the call of the public function on them."""
    start = torch.arange(9, dtype=torch.int32, device=device)[None] // 3
    qkv = {"q": randn(device, 1, 9, 4, 16), "k": randn(device, 1, 9, 2, 16), "v": randn(device, 1, 9, 2, 16)}
    cos, sin = randn(device, 9, 8, dtype=torch.float32), randn(device, 9, 8, dtype=torch.float32)
    tables, norms = {"cos": cos, "sin": sin}, {"q_weight": randn(device, 16), "k_weight": randn(device, 16)}
    packed = {name: x[0].clone() for name, x in qkv.items()}
    pixels = {"pixels": randn(device, 2, 3, 32, 32), "weight": randn(device, 32, 3, 16, 16), "bias": randn(device, 32)}
    tokens = {"prefix_tokens": randn(device, 1, 32), "pos_embed": randn(device, 5, 32)}
    norm = {"norm_weight": randn(device, 32), "norm_bias": randn(device, 32)}
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, device=device)
    rows, flat = {"pixels": randn(device, 5, 24)}, {"weight": randn(device, 32, 24)}

    def embed(backend: str, norm_weight: Any = None, norm_bias: Any = None, **options: Any) -> torch.Tensor:
        norm = None if norm_weight is None else (norm_weight, norm_bias, 1e-5)
        return patch_embed.patch_embed(**options, norm=norm, backend=backend)

    def bytes_too(backend: str, **options: Any) -> torch.Tensor:
        return embed(backend, patch_size=16, mean=(0.5, 0.4, 0.3), std=[0.2, 0.3, 0.4], **options)

    def ranged(backend: str, start: torch.Tensor, stop: torch.Tensor, q: Any = None, **kv: Any) -> Any:
        ranges = KeyRanges(start, stop)
        if q is None:
            return tile_bounds.tile_bounds(ranges, 9, backend=backend)
        return attention.attention(q, ranges=ranges, return_lse=True, backend=backend, **kv)

    def turned(backend: str, **tensors: Any) -> torch.Tensor:
        return rope.rope_qkv_(num_heads=4, num_kv_heads=2, backend=backend, **tensors)

    spans = {"start": start, "stop": start + 3}
    attended, rotated = attention.attention, rope.rope
    return {
        "attention": ("attention_fwd", qkv, attended),
        "attention packed": ("attention_fwd", packed, lambda **t: attended(**t, causal=True, softcap=20.0)),
        "attention ranges": ("attention_fwd", qkv | spans, ranged),
        "tile_bounds": ("tile_bounds", spans, ranged),
        "rope": ("rope_fwd", {"q": qkv["q"], "k": qkv["k"]} | tables, rotated),
        "rope norm": (
            "rope_fwd",
            {"q": packed["q"], "k": packed["k"]} | tables | norms,
            lambda **t: rotated(**t, interleaved=True),
        ),
        "rope_qkv_": ("rope_qkv_", {"qkv": randn(device, 1, 9, 128)} | tables, turned),
        "rope_qkv_ norm": ("rope_qkv_", {"qkv": randn(device, 9, 128)} | tables | norms, turned),
        "patch_embed": ("patch_embed_fwd", pixels, lambda **t: embed(**t, patch_size=16)),
        "patch_embed CLIP": ("patch_embed_fwd", pixels | tokens | norm, lambda **t: embed(**t, patch_size=[16, 16])),
        "patch_embed uint8": ("patch_embed_fwd", pixels | tokens | {"pixels": images}, bytes_too),
        "patch_embed rows": ("patch_embed_fwd", rows | flat, lambda **t: embed(**t, patch_size=(2, 2, 2), layout="rows")),
    }


CALLS = list(calls(torch.device("cpu")))


def copies(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """In tensors of their own, as an operator may write to its argument."""
    return {name: x.clone() for name, x in tensors.items()}


def flat(result: Any) -> list[torch.Tensor]:
    return [result] if isinstance(result, torch.Tensor) else list(result)


def planned(op: str, monkeypatch: pytest.MonkeyPatch, method: str = "planned") -> list[bool]:
    """Whether there was a plan, for each call of the op from now on; ``_known``: for those that torch's dispatcher makes too."""
    found: list[bool] = []
    find = getattr(Op, method)

    def watch(self: Op, *args: Any) -> Any:
        plan = find(self, *args)
        if self is OPS[op]:
            found.append(plan is not None)
        return plan

    monkeypatch.setattr(Op, method, watch)  # undone, it would stay an attribute of an instance
    monkeypatch.setattr(OPS[op], "_plans", {})
    return found


@pytest.mark.backends("attention_fwd", "rope_fwd", "patch_embed_fwd", exclude=("torch", "reference"))
@pytest.mark.parametrize("name", CALLS)
def test_a_planned_call_gives_what_the_first_gave(
    name: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    op, tensors, call = calls(device)[name]
    found = planned(op, monkeypatch)
    fresh = {key: x.roll(1, 0) for key, x in tensors.items()}
    first, others = flat(call(**copies(tensors), backend=backend)), flat(call(**copies(fresh), backend=backend))
    assert found == [False, True]
    monkeypatch.setattr(OPS[op], "_plans", {})
    for want, got in ((fresh, others), (tensors, first)):
        long = flat(call(**copies(want), backend=backend))
        again = flat(call(**copies(want), backend=backend))
        for one, two, three in zip(got, long, again, strict=True):
            assert torch.equal(one, two) and torch.equal(two, three) and one.stride() == two.stride() == three.stride()
    assert found == [False, True, False, True, True, True]


@pytest.mark.backends("attention_fwd", "rope_fwd", "patch_embed_fwd", exclude=("torch", "reference"))
@pytest.mark.parametrize("name", CALLS)
def test_a_plan_keeps_no_argument(name: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    op, tensors, call = calls(device)[name]
    found = planned(op, monkeypatch)
    mine = copies(tensors)
    for _ in range(3):
        call(**mine, backend=backend)
    alive = [weakref.ref(x) for x in mine.values()]
    del mine
    gc.collect()
    assert found == [False, True, True] and not any(reference() is not None for reference in alive)


@pytest.mark.backends("attention_fwd", "rope_fwd", "patch_embed_fwd", exclude=("torch", "reference"))
@pytest.mark.parametrize("name", CALLS)
def test_what_changes_a_tensor_is_noticed(name: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each tensor in turn: other strides, an address that is no multiple of 64, and two dimensions too many."""
    op, tensors, call = calls(device)[name]
    want = flat(call(**copies(tensors), backend=backend))
    found = planned(op, monkeypatch)
    call(**copies(tensors), backend=backend)
    for key, x in tensors.items():
        heads = key in ("q", "k", "v", "qkv")  # whose last dimension must be contiguous
        spread = torch.cat([x, x], -1)[..., : x.shape[-1]] if heads else torch.stack([x, x], -1)[..., 0]
        shifted = torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)
        for changed in (spread, shifted):
            got = flat(call(**copies(tensors) | {key: changed}, backend=backend))
            assert not found.pop() and all(torch.equal(one, two) for one, two in zip(got, want, strict=True)), key
        found.clear()
        for _ in range(2):
            with pytest.raises(ValueError, match="got"):
                call(**copies(tensors) | {key: x[None, None]}, backend=backend)
        assert not any(found)
        call(**copies(tensors), backend=backend)
        assert found.pop()


@pytest.mark.backends("rope_qkv_", exclude=("torch", "reference"))
def test_a_planned_write_is_counted(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Autograd must find that what it saved has changed."""
    op, tensors, call = calls(device)["rope_qkv_"]
    found = planned(op, monkeypatch)
    for attempt in range(3):
        qkv = tensors["qkv"].clone()
        scale = torch.ones_like(qkv, requires_grad=True)
        saves_qkv = qkv * scale
        before = qkv._version
        call(**tensors | {"qkv": qkv}, backend=backend)
        assert qkv._version == before + 1 and found.pop() == (attempt > 0)
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            saves_qkv.sum().backward()
    with torch.inference_mode():
        for attempt in range(2):
            made_here = copies(tensors)
            assert call(**made_here, backend=backend) is made_here["qkv"] and found.pop() == (attempt > 0)


@pytest.mark.backends("patch_embed_fwd", exclude=("torch", "reference"))
def test_a_number_of_another_type_is_no_plans(backend: str, device: torch.device) -> None:
    """16.0 equals 16 and is refused, again and again."""
    x, weight = randn(device, 1, 3, 32, 32), randn(device, 32, 3, 16, 16)
    for _ in range(2):
        patch_embed.patch_embed(x, weight, patch_size=16, backend=backend)
        patch_embed.patch_embed(x, weight, patch_size=(16, 16), backend=backend)
        with pytest.raises(ValueError, match="patch_size: got"):
            patch_embed.patch_embed(x, weight, patch_size=(16.0, 16), backend=backend)


@pytest.mark.backends("rope_fwd", exclude=("torch", "reference"))
def test_the_benchmark_sees_planned_calls(backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # conftest's poison has a module of its own
    _, tensors, call = calls(device)["rope"]
    call(**tensors, backend=backend)
    monkeypatch.setattr(Op, "select", None)  # nobody chooses again
    with backends_used() as used:
        call(**tensors, backend=backend)
    call(**tensors, backend=backend)
    assert used == [backend]


def test_what_cuda_plans_hand_over(monkeypatch: pytest.MonkeyPatch) -> None:
    """The structures that the library gets, without the library: the addresses of this call, all else from the plan."""
    from vlmkernels.backends.cuda import patch_embed as cuda_patch_embed
    from vlmkernels.backends.cuda import tile_bounds as cuda_tile_bounds
    from vlmkernels.backends.cuda._library import EntryPoint, PatchEmbedParams, TileBoundsParams

    sent: list[bytes] = []
    monkeypatch.setattr(cuda_patch_embed, "_check", types.SimpleNamespace(why_not=lambda params: None))
    monkeypatch.setattr(EntryPoint, "__call__", lambda self, params, device: sent.append(params))
    monkeypatch.setattr(cuda_patch_embed, "_prepared", cuda_patch_embed._prepared.__wrapped__)

    def tensors() -> tuple[torch.Tensor | None, ...]:
        pixels = torch.zeros(2, 3, 4, 16, 2, 16, dtype=torch.uint8).permute(0, 2, 4, 1, 3, 5)[:, None, :, :, :, None]
        vectors = [torch.zeros(32, dtype=torch.half) for _ in range(2)]
        return pixels, torch.zeros(32, 3, 1, 16, 16).half(), None, torch.zeros(1, 32).half(), torch.zeros(9, 32).half(), *vectors

    for keep in (False, True):
        plan = cuda_patch_embed.plan_patch_embed_fwd(*tensors(), 1e-5, [0.5] * 3, [0.25] * 3, keep)
        for call in (tensors(), tensors()):
            out, total = plan(*call)
            params = PatchEmbedParams.from_buffer_copy(sent.pop())
            named = (params.pixels, params.weight, params.bias, params.prefix, params.pos, params.norm_weight, params.norm_bias)
            assert named == tuple(None if x is None else x.data_ptr() for x in call)
            assert params.out == out.data_ptr() and out.shape == (2, 9, 32)
            assert params.total == (total.data_ptr() if keep else None) and (total is not None) == keep
            numbers = (
                params.batch,
                params.grid_y,
                params.grid_x,
                params.patch,
                params.dim,
                params.num_prefix,
                params.pos_on_prefix,
            )
            assert numbers == (2, 4, 2, 16, 32, 1, 1) and (params.pixel_type, params.token_type) == (0, 1)
            strides = params.pixel_stride_b, params.pixel_stride_gy, params.pixel_stride_c, params.pixel_stride_y
            assert strides == (6144, 512, 2048, 32) and list(params.pixel_shift) == [-2.0] * 3 and params.pos_stride_n == 32
    spread = (call[0], call[1], *(x if x is None else torch.stack([x, x], -1)[..., 0] for x in call[2:]))
    assert cuda_patch_embed.plan_patch_embed_fwd(*spread, 1e-5, [0.5] * 3, [0.25] * 3, False) is None

    start, stop = torch.zeros(2, 130, dtype=torch.int32), torch.zeros(130, 2, dtype=torch.int32).T
    q_bounds, k_bounds = cuda_tile_bounds.plan_tile_bounds(start, stop, 64)(start, stop)
    params = TileBoundsParams.from_buffer_copy(sent.pop())
    pointers = params.start, params.stop, params.q_bounds, params.k_bounds
    assert pointers == tuple(x.data_ptr() for x in (start, stop, q_bounds, k_bounds))
    assert (params.start_stride_b, params.start_stride_q, params.stop_stride_b, params.stop_stride_q) == (130, 1, 1, 2)
    assert (params.batch, params.num_queries, params.num_keys) == (2, 130, 64)
    assert (q_bounds.shape, k_bounds.shape) == ((2, 3, 4), (2, 1, 4))

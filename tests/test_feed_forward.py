# SPDX-License-Identifier: Apache-2.0
"""A feed-forward that learns: every backend against fp64, what is refused, and the module that calls it."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ON_GPU, capture
from nn_parity import randn, randomize
from test_activated_linear import MATH, leaves
from torch import Tensor
from torch.library import opcheck
from torch.utils.checkpoint import checkpoint

from vlmkernels import BackendError, use_backend
from vlmkernels.nn import _feed_forward
from vlmkernels.nn._feed_forward import FeedForward
from vlmkernels.ops._op import OPS
from vlmkernels.ops.feed_forward import ACTIVATIONS, feed_forward
from vlmkernels.testing import compare

Leaves = tuple[Tensor, ...]
NAMES = ("x", "weight1", "bias1", "weight2", "bias2")
FWD, BWD = torch.ops.vlmkernels.feed_forward_fwd, torch.ops.vlmkernels.feed_forward_bwd
every_backend = pytest.mark.backends("feed_forward_fwd", "feed_forward_bwd", exclude=("cuda",))
every_activation = pytest.mark.parametrize("activation", ACTIVATIONS)


def tensors(shape: tuple[int, ...], dim: int, dtype: torch.dtype, device: torch.device, last: int = 24) -> Leaves:
    found = randn(*shape), randn(dim, shape[-1]) * shape[-1] ** -0.5, randn(dim), randn(last, dim) * dim**-0.5, randn(last)
    return tuple(tensor.to(device, dtype) for tensor in found)


def plain(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, activation: str) -> Tensor:
    hidden: Tensor = MATH[activation](x @ weight1.t() + bias1)
    return hidden @ weight2.t() + bias2


def gradients(
    run: Callable[..., Tensor], given: Leaves, activation: str, dout: Tensor, learn: str = "11111"
) -> dict[str, Tensor]:
    own = [tensor.detach().requires_grad_(wanted == "1") for tensor, wanted in zip(given, learn, strict=True)]
    found = torch.autograd.grad(run(*own, activation), [tensor for tensor in own if tensor.requires_grad], dout)
    return dict(zip([name for name, wanted in zip(NAMES, learn, strict=True) if wanted == "1"], found, strict=True))


def exact(given: Leaves, activation: str, dout: Tensor, learn: str = "11111") -> dict[str, Tensor]:
    return gradients(plain, tuple(tensor.double() for tensor in given), activation, dout.double(), learn)


def right(got: dict[str, Tensor], want: dict[str, Tensor]) -> None:
    assert list(got) == list(want)
    for name, gradient in got.items():
        assert compare(gradient, want[name], "module"), name


@every_backend
@every_activation
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lead", [(33,), (3, 11), (0,)], ids=str)
def test_against_fp64(lead: tuple[int, ...], dtype: torch.dtype, activation: str, backend: str, device: torch.device) -> None:
    given = tensors((*lead, 40), 72, dtype, device)
    dout = randn(*lead, 24).to(device, dtype)
    out = feed_forward(*given, activation, backend=backend)
    assert compare(out, plain(*(tensor.double() for tensor in given), activation), "module")
    got = gradients(lambda *a: feed_forward(*a, backend=backend), given, activation, dout)
    right(got, exact(given, activation, dout))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_added_to_a_stream(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Which is changed in place, and gets the gradient that comes."""
    given, stream, dout = tensors((3, 11, 40), 72, dtype, device), randn(3, 11, 24).to(device, dtype), randn(3, 11, 24).to(device)
    own = [tensor.detach().requires_grad_() for tensor in (*given[:4], stream)]
    start = own[4] + 1
    out = feed_forward(*own[:4], None, "quick_gelu", total=start, backend=backend)
    assert out.data_ptr() == start.data_ptr()
    wide = [tensor.detach().double().requires_grad_() for tensor in own]
    want = plain(*wide[:4], torch.zeros_like(wide[4][0, 0]), "quick_gelu") + wide[4] + 1
    assert compare(out, want, "module")
    dout = dout.to(dtype)
    for got, exact in zip(torch.autograd.grad(out, own, dout), torch.autograd.grad(want, wide, dout.double()), strict=True):
        assert compare(got, exact, "module")


def test_a_stream_that_others_read_says_so(device: torch.device) -> None:
    """Autograd knows that it was written to."""
    given = tensors((5, 16), 24, torch.float32, device)
    total = randn(5, 24).to(device).requires_grad_() * 2
    other, version = total.square(), total._version
    assert feed_forward(*given[:4], None, "gelu", total=total) is total and total._version > version
    with pytest.raises(RuntimeError, match="modified by an inplace"):
        other.sum().backward()


@every_backend
def test_any_strides(backend: str, device: torch.device) -> None:
    """Of rows and weights, and of the gradient that comes: a sum's has strides of 0."""
    given = tensors((6, 80), 72, torch.bfloat16, device)
    given = (given[0][::2, ::2], given[1][:, ::2], *given[2:])
    dout = torch.ones((), device=device, dtype=torch.bfloat16).expand(3, 24)
    got = gradients(lambda *a: feed_forward(*a, backend=backend), given, "quick_gelu", dout)
    right(got, exact(given, "quick_gelu", dout))


@pytest.mark.parametrize("learn", ["10000", "01000", "00100", "00010", "00001", "11100", "00011", "01010"])
def test_only_what_is_needed(learn: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    given, dout = tensors((5, 16), 24, torch.float32, device), randn(5, 24).to(device)
    calls, op = [], OPS["feed_forward_bwd"]
    run = op.run

    def noted(*args: Any) -> Any:
        calls.append(args[3])
        return run(*args)

    monkeypatch.setattr(op, "run", noted)
    right(gradients(feed_forward, given, "gelu", dout, learn), exact(given, "gelu", dout, learn))
    assert calls == ([learn[2] == "1"] if "1" in learn[:3] else [])


@every_backend
@every_activation
def test_gradcheck(activation: str, backend: str, device: torch.device) -> None:
    given = tuple(tensor.requires_grad_() for tensor in tensors((2, 3, 8), 12, torch.float64, device, last=5))
    assert torch.autograd.gradcheck(lambda *a: feed_forward(*a, activation, backend=backend), given)


@every_backend
def test_opcheck(backend: str, device: torch.device) -> None:
    given = tensors((8, 16), 24, torch.float32, device)
    opcheck(FWD, (*given[:3], "gelu", backend), test_utils=("test_schema", "test_faketensor"))
    for biased in (True, False):
        arguments = (randn(8, 24).to(device), given[3], randn(8, 24).to(device), biased, "quick_gelu", backend)
        opcheck(BWD, arguments, test_utils=("test_schema", "test_faketensor"))


def test_second_derivatives_are_refused(device: torch.device) -> None:
    given = tuple(tensor.requires_grad_() for tensor in tensors((3, 8), 12, torch.float32, device))
    (dx,) = torch.autograd.grad(feed_forward(*given, "gelu").square().sum(), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        dx.sum().backward()


def test_refusals(device: torch.device) -> None:
    x, weight1, bias1, weight2, bias2 = tensors((8, 16), 24, torch.float32, device)
    for arguments, name in (
        ((x.long(), weight1, bias1, weight2, bias2, "gelu"), "x"),
        ((x, weight1[:, 1:], bias1, weight2, bias2, "gelu"), "weight1"),
        ((x, weight1.double(), bias1, weight2, bias2, "gelu"), "weight1"),
        ((x, weight1, bias1[1:], weight2, bias2, "gelu"), "bias1"),
        ((x, weight1, bias1, weight2[:, 1:], bias2, "gelu"), "weight2"),
        ((x, weight1, bias1, weight2, bias2[1:], "gelu"), "bias2"),
        ((x, weight1, bias1, weight2, bias2.half(), "gelu"), "bias2"),
        ((x, weight1, bias1, weight2, bias2, "silu"), "activation"),
        ((x, weight1, bias1, weight2, None, "gelu"), "bias2, total"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got .*, wanted "):
            feed_forward(*arguments)
    total = x.new_empty(8, weight2.shape[0])
    for bias, other, name in (
        (bias2, total, "bias2, total"),
        (None, total[1:], "total"),
        (None, total.t().contiguous().t(), "total"),
        (None, total.half(), "total"),
    ):
        with pytest.raises(ValueError, match=f"^{name}: got .*, wanted "):
            feed_forward(x, weight1, bias1, weight2, bias, "gelu", total=other)
    leaf = torch.zeros_like(total, requires_grad=True)
    for other in (leaf, leaf.view(total.shape)):
        with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
            feed_forward(x, weight1, bias1, weight2, None, "gelu", total=other)
    assert not leaf.any()  # refused before it is written to
    with torch.no_grad():
        assert feed_forward(x, weight1, bias1, weight2, None, "gelu", total=leaf) is leaf


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The activations of the calls that the module makes, wherever it may."""
    made: list[str] = []

    def noted(*args: Any, total: Tensor | None) -> Tensor:
        made.append(args[-1])
        return feed_forward(*args, total=total)

    monkeypatch.setattr(_feed_forward, "pays", lambda *_: True)
    monkeypatch.setattr(_feed_forward, "feed_forward", noted)
    return made


def module_gradients(module: FeedForward, x: Tensor, run: Callable[[Tensor], Tensor]) -> list[Tensor]:
    own = x.detach().requires_grad_()
    return list(torch.autograd.grad(run(own).square().sum(), [own, *module.parameters()]))


@every_activation
def test_module(activation: str, calls: list[str], device: torch.device) -> None:
    """As it is, under checkpoints and compiled; added to a stream; without gradients as before."""
    module, x = randomize(FeedForward(16, 30, activation)).to(device), randn(3, 5, 16).to(device)
    wide = randomize(FeedForward(16, 30, activation)).to(device, torch.float64)
    wide.load_state_dict(module.state_dict())
    want = module_gradients(wide, x.double(), lambda x: wide.fc2(MATH[activation](wide.fc1(x))))
    compiled = torch.compile(module, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False), compiled):
        for got, right in zip(module_gradients(module, x, run), want, strict=True):
            assert compare(got, right, "module")
    stream = module(x, x + 1)
    assert compare(stream, wide(x.double()) - wide.fc2.bias + x + 1, "module")
    assert len(calls) >= 5 and set(calls) == {activation}
    calls.clear()
    with torch.no_grad():
        module(x)
    assert not calls


class Subclass(Tensor):
    """As those of tensor parallelism and of quantised weights."""


def test_module_leaves_it_to_its_layers(calls: list[str], device: torch.device) -> None:
    """Where somebody watches one of them, under autocast, with weights of a subclass, with an activation that has no kernel."""
    x = randn(2, 16).to(device)
    seen: list[int] = []
    for name in ("fc1", "fc2"):
        module = randomize(FeedForward(16, 30, "gelu")).to(device)
        module.get_submodule(name).register_forward_hook(lambda *_: seen.append(1))
        module(x)
    assert len(seen) == 2
    module = randomize(FeedForward(16, 30, "gelu")).to(device)
    module.fc1.weight = torch.nn.Parameter(module.fc1.weight.detach().as_subclass(Subclass))
    module(x)
    with torch.autocast(device.type, torch.bfloat16):
        randomize(FeedForward(16, 30, "gelu")).to(device)(x)
    randomize(FeedForward(16, 30, "silu")).to(device)(x)
    assert not calls
    randomize(FeedForward(16, 30, "gelu")).to(device)(x)
    assert calls == ["gelu"]


def test_small_ones_stay_layers(device: torch.device) -> None:
    """So that torch.compile can fuse them; and where another backend is forced."""
    x, weight = torch.empty(577, 1024, device=device, dtype=torch.bfloat16), torch.empty(4096, 1024, device=device)
    assert not _feed_forward.pays(x, weight)
    with use_backend("reference"):
        assert not _feed_forward.pays(x.expand(32, 577, 1024), weight)


# Rows, depth, columns, columns behind the second layer: rests of all tiles, and columns of less than one.
SIZES = {
    "CLIP-L": (18464, 1024, 4096, 1024),
    "EVA-g": (16448, 1408, 6144, 1408),
    "SigLIP": (23328, 1152, 4304, 1152),
    "least depth": (9000, 512, 1000, 512),
    "rests": (34001, 584, 264, 520),
    "narrow": (33793, 640, 192, 1000),
}


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_library")
@every_activation
@pytest.mark.parametrize("name", SIZES)
def test_cuda(name: str, activation: str, device: torch.device) -> None:
    rows, depth, dim, last = SIZES[name]
    dtype = torch.float16 if name == "rests" else torch.bfloat16
    x, weight, bias = leaves(rows, depth, dim, dtype, device)
    hidden, before = FWD(x, weight, bias, activation, "cuda")
    y = x.double() @ weight.double().t() + bias.double()
    assert compare(before, y, "gemm") and compare(hidden, MATH[activation](y), "gemm")
    del y, hidden
    dout, weight = (randn(rows, last)).to(device, dtype), (randn(last, dim) * last**-0.5).to(device, dtype)
    dbefore, dbias = BWD(dout, weight, before, True, activation, "cuda")
    at = before.double().requires_grad_()
    (want,) = torch.autograd.grad(MATH[activation](at), at, dout.double() @ weight.double())
    assert compare(dbefore, want, "gemm") and compare(dbias, want.sum(0), "gemm")
    again, nothing = BWD(dout, weight, before, False, activation, "cuda")
    assert torch.equal(again, dbefore) and nothing.numel() == 0
    assert torch.equal(BWD(dout, weight, before, True, activation, "cuda")[1], dbias), "the same bits"


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_library")
@every_activation
def test_cuda_slopes_of_all_magnitudes(activation: str, device: torch.device) -> None:
    """At every bf16 number from 2^-20 to 64 and its negative; what is no number stays in its column."""
    sizes = torch.arange(0x3580, 0x4280, dtype=torch.int16, device=device).view(torch.bfloat16)
    special = torch.tensor([1e30, -1e30, torch.nan, torch.nan], device=device).bfloat16()
    before = torch.cat([sizes, -sizes, special, special]).expand(33792, -1).contiguous()
    dout = torch.eye(512, device=device, dtype=torch.bfloat16)[:1].expand(33792, -1).contiguous()
    weight = torch.zeros(512, before.shape[1], device=device, dtype=torch.bfloat16)
    weight[0] = 1
    got, dbias = BWD(dout, weight, before, True, activation, "cuda")
    at = before[0, : 2 * len(sizes)].double().requires_grad_()
    (want,) = torch.autograd.grad(MATH[activation](at).sum(), at)
    assert compare(got[:, : 2 * len(sizes)], want.expand(33792, -1), "norm")
    assert compare(dbias[: 2 * len(sizes)], 33792 * want, "norm")
    assert (got[:, -4] == 1).all() and (got[:, -3].abs() < 1e-7).all() and got[:, -2:].isnan().all()


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_library")
@every_activation
def test_cuda_module(activation: str, device: torch.device) -> None:
    """Eager, compiled and in a graph, against fp64; and a call whose gradient the kernel doesn't take."""
    module = randomize(FeedForward(1024, 4096, activation)).to(device, torch.bfloat16)
    x, dout = (randn(13, 719, 1024).to(device, torch.bfloat16) for _ in range(2))
    assert _feed_forward.pays(x, module.fc1.weight)
    x.requires_grad_()
    given = (x, module.fc1.weight, module.fc1.bias, module.fc2.weight, module.fc2.bias)
    want = exact(given, activation, dout)

    def step(run: Callable[[Tensor], Tensor] = module, dout: Tensor = dout) -> dict[str, Tensor]:
        return dict(zip(NAMES, torch.autograd.grad(run(x), given, dout), strict=True))

    for run in (module, torch.compile(module, fullgraph=True), torch.compile(module, fullgraph=True, dynamic=True)):
        right(step(run), want)
    graph, captured = capture(step)
    for gradient in captured.values():
        gradient.zero_()
    graph.replay()
    right(captured, want)
    right(step(dout=dout[:1, :1].expand(13, 719, -1)), exact(given, activation, dout[:1, :1].expand(13, 719, -1)))


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_library")
def test_cuda_leaves(device: torch.device) -> None:
    x, weight, bias = leaves(18464, 1024, 4096, torch.bfloat16, device)
    for arguments, reason in (
        ((x[:577], weight, bias), "fewer than"),
        ((x.float(), weight.float(), bias.float()), "bfloat16 and float16"),
        ((x[:, :504].contiguous(), weight[:, :504].contiguous(), bias), "504 columns of x"),
        ((x[:, :512], weight[:, :512].contiguous(), bias), "contiguous"),
    ):
        with pytest.raises(BackendError, match=reason):
            FWD(*arguments, "gelu", "cuda")
    with pytest.raises(BackendError, match="contiguous"):
        BWD(x[:1].expand(18464, -1), weight.t(), torch.empty(18464, 4096, device=device).bfloat16(), True, "gelu", "cuda")

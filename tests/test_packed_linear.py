# SPDX-License-Identifier: Apache-2.0
"""Linear layers of one input as one product: where their weights are neighbours, and what keeps them so."""

import copy
import gc
import itertools
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE
from nn_parity import quick_backend
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from vlmkernels.nn import CrossAttention, QFormer, SelfAttention, _packed
from vlmkernels.nn._packed import project
from vlmkernels.ops import _packed_linear
from vlmkernels.ops._packed_linear import adjacent, joined_linear, lay_side_by_side, packed_linear
from vlmkernels.testing import compare

__all__ = ["quick_backend"]
K, SIZES = 24, (8, 16, 5)


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many columns each product of several layers had."""
    found: list[int] = []
    run = _packed_linear._run_fwd

    def counted(x: Tensor, weights: Any, biases: Any) -> Tensor:
        found.append(sum(len(weight) for weight in weights))
        return run(x, weights, biases)

    def counted_whole(*arguments: Any) -> Tensor | None:
        y = joined_linear(*arguments)
        found.extend([] if y is None else [y.shape[-1]])
        return y

    monkeypatch.setattr(_packed_linear, "_run_fwd", counted)
    monkeypatch.setattr(_packed, "joined_linear", counted_whole)
    yield found


def linears(bias: bool = True, sizes: tuple[int, ...] = SIZES) -> list[nn.Linear]:
    made = [nn.Linear(K, size, bias=bias, device=DEVICE) for size in sizes]
    lay_side_by_side([m.weight for m in made])
    if bias:
        lay_side_by_side([m.bias for m in made])
    return made


def leaves(made: list[nn.Linear]) -> tuple[list[Tensor], list[Tensor]]:
    return [m.weight for m in made], [m.bias for m in made if m.bias is not None]


def test_laid_side_by_side() -> None:
    parts = [nn.Parameter(torch.randn(rows, 3)) for rows in (2, 4, 1)]
    values = [part.detach().clone() for part in parts]
    assert not adjacent(parts)
    lay_side_by_side(parts)
    assert adjacent(parts) and adjacent(parts[1:]) and not adjacent(parts[::2]) and not adjacent(parts[::-1])
    assert all(torch.equal(part, value) for part, value in zip(parts, values, strict=True))
    where = parts[0].data_ptr()
    lay_side_by_side(parts)
    assert parts[0].data_ptr() == where, "nothing to do"
    with torch.no_grad():
        parts[1].fill_(7)
    assert torch.equal(_packed_linear._joined(parts), torch.cat([values[0], torch.full((4, 3), 7.0), values[2]]))


def test_what_was_found_once_is_looked_at_again() -> None:
    """Parameters whose data is another tensor, of other rows, or neighbours no more; and a storage nobody needs is let go."""
    parts = [nn.Parameter(torch.randn(rows, 3)) for rows in (4, 2)]
    lay_side_by_side(parts)

    def joined() -> Tensor:
        block = _packed_linear._joined(parts)
        assert torch.equal(block, torch.cat([part.detach() for part in parts]))
        return block

    block = joined()
    assert joined() is block and block.data_ptr() == parts[0].data_ptr()
    parts[1].data = torch.randn(2, 3)
    assert joined().data_ptr() != parts[0].data_ptr()
    lay_side_by_side(parts)
    joined()
    parts[0].data = parts[0].data[:2]
    assert joined().shape == (4, 3)
    lay_side_by_side(parts)
    held = weakref.ref(joined())
    assert held() is not None
    parts.clear()
    gc.collect()
    assert held() is None


def test_what_is_never_laid_side_by_side() -> None:
    one = nn.Parameter(torch.randn(2, 3))
    others = (torch.randn(2, 4), torch.randn(2, 3).double(), torch.randn(2, 3, device="meta"))
    for other in others:
        parts = [one, nn.Parameter(other)]
        lay_side_by_side(parts)
        assert one.untyped_storage().nbytes() == 24
    lay_side_by_side([one, one])
    assert one.untyped_storage().nbytes() == 24


NEEDS = list(itertools.product([True, False], repeat=3))
GRADIENTS = [(needs, bias, False) for needs in NEEDS for bias in (True, False)]
GRADIENTS += [((True, True, True), True, True), ((False, True, False), False, True)]


@pytest.mark.parametrize(("needs", "bias", "compiled"), GRADIENTS, ids=str)
def test_gradients(needs: tuple[bool, bool, bool], bias: bool, compiled: bool) -> None:
    """Of the input or not, of all weights or some: as of one layer after the other."""
    made, x = linears(bias), torch.randn(2, 3, K, device=DEVICE, requires_grad=needs[0])
    made[0].requires_grad_(needs[1])
    for other in made[1:]:
        other.requires_grad_(needs[2])
    cotangents = [torch.randn(2, 3, size, device=DEVICE) for size in SIZES]

    def run(function: Callable[[Tensor], Any], x: Tensor, weights: list[Tensor]) -> list[Tensor]:
        outputs = function(x)
        needed = [t for t in (x, *weights) if t.requires_grad]
        if not needed:
            return list(outputs)
        total = sum((y * c.to(x.dtype)).sum() for y, c in zip(outputs, cotangents, strict=True))
        return [*outputs, *torch.autograd.grad(total, needed)]

    weights, biases = leaves(made)
    torch._dynamo.reset()
    ours: Callable[[Tensor], Any] = lambda x: packed_linear(x, weights, biases)  # noqa: E731
    got = run(torch.compile(ours, fullgraph=True, backend="aot_eager") if compiled else ours, x, weights + biases)
    wide = [copy.deepcopy(m).double() for m in made]
    wide_x = x.detach().double().requires_grad_(needs[0])
    exact = run(lambda x: [m(x) for m in wide], wide_x, [t for group in leaves(wide) for t in group])
    assert len(got) == len(exact) == 3 + needs[0] + (1 + bias) * (needs[1] + 2 * needs[2])
    for value, wanted in zip(got, exact, strict=True):
        result = compare(value, wanted, "gemm")
        assert result, result


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("needs", NEEDS, ids=str)
def test_joined(needs: tuple[bool, bool, bool], bias: bool) -> None:
    """One tensor and its gradients: those of the parts put together."""
    made, x = linears(bias), torch.randn(2, 3, K, device=DEVICE, requires_grad=needs[0])
    made[0].requires_grad_(needs[1])
    for other in made[1:]:
        other.requires_grad_(needs[2])
    weights, biases = leaves(made)
    needed = [t for t in (x, *weights, *biases) if t.requires_grad]
    y, parts, dy = (
        joined_linear(x, weights, biases),
        packed_linear(x, weights, biases),
        torch.randn(2, 3, sum(SIZES), device=DEVICE),
    )
    assert y is not None and torch.equal(y, torch.cat(parts, -1)) and y.requires_grad == bool(needed)
    if needed:
        exact = torch.autograd.grad(parts, needed, dy.split(SIZES, -1))
        for value, wanted in zip(torch.autograd.grad(y, needed, dy), exact, strict=True):
            assert compare(value, wanted.double(), "gemm")


def test_what_is_not_joined() -> None:
    """Weights or biases that are no neighbours, fake tensors, and what autocast is to cast."""
    made, x = linears(), torch.randn(2, K, device=DEVICE)
    weights, biases = leaves(made)
    assert joined_linear(x, weights, biases) is not None and joined_linear(x, weights) is not None
    assert joined_linear(x, weights[::-1]) is None and joined_linear(x, weights, biases[::-1]) is None
    with torch.autocast(x.device.type, torch.bfloat16):
        assert joined_linear(x, weights) is None
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert joined_linear(mode.from_tensor(x), weights) is None


def test_gradients_of_weights_from_neighbours() -> None:
    """Parts that are neighbours are one batched product, others products of their own, wherever they lie."""
    rows, block = torch.randn(7, K, device=DEVICE), torch.randn(3, 7, 8, device=DEVICE)
    odd, strided = torch.randn(7, 5, device=DEVICE), torch.randn(7, 16, device=DEVICE)[:, 4:12]
    for parts, runs in (
        (block.unbind(), [3]),
        ((block[0], block[1], odd, block[1], block[2], strided), [2, 2]),
        ((block[1], block[0], strided, odd), []),
    ):
        with pytest.MonkeyPatch.context() as patch:
            found, stacked = [], _packed_linear._stacked
            patch.setattr(_packed_linear, "_stacked", lambda x, count: found.append(count) or stacked(x, count))  # noqa: B023
            got = _packed_linear._dweights(parts, rows)
        assert found == [count for count in runs for _ in "ab"]
        assert compare(got, torch.cat([part.double().t() @ rows.double() for part in parts]), "gemm")
    torch.library.opcheck(torch.ops.vlmkernels.packed_linear_dweights.default, ([*block, odd], rows))


@pytest.mark.parametrize("compiled", [False, True], ids=str)
def test_gradients_of_keys_and_values_are_neighbours(compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of tokens that need no gradient, the weights of keys and values get theirs from one product."""
    counts, stacked = [], _packed_linear._stacked
    monkeypatch.setattr(_packed_linear, "_stacked", lambda x, count: counts.append(count) or stacked(x, count))
    module, x = CrossAttention(32, 2, context_dim=40).to(DEVICE), torch.randn(2, 4, 32, device=DEVICE)
    context, cotangent = torch.randn(2, 7, 40, device=DEVICE), torch.randn(2, 4, 32, device=DEVICE)
    torch._dynamo.reset()
    call = torch.compile(module, fullgraph=True, backend="aot_eager") if compiled else module
    weights = [module.query.weight, module.key.weight, module.value.weight]
    got = torch.autograd.grad(call(x, context), weights, cotangent)
    assert counts == [2, 2]
    wide = copy.deepcopy(module).double()
    weights = [wide.query.weight, wide.key.weight, wide.value.weight]
    exact = torch.autograd.grad(wide(x.double(), context.double()), weights, cotangent.double())
    for value, wanted in zip(got, exact, strict=True):
        assert compare(value, wanted, "grad")


def test_one_product_where_they_are_neighbours(products: list[int]) -> None:
    made, x = linears(), torch.randn(3, K, device=DEVICE)
    for y, m in zip(project(x, made), made, strict=True):
        assert compare(y, F.linear(x.double(), m.weight.double(), m.bias.double()), "gemm")
    assert products == [sum(SIZES)]
    packed_linear(x, [m.weight.clone() for m in made], [m.bias for m in made])
    with torch.autocast(DEVICE.type, torch.bfloat16):
        assert {y.dtype for y in project(x, made)} == {torch.bfloat16}
    assert len(products) == 1


def test_layers_with_something_of_their_own_run_by_themselves(products: list[int]) -> None:
    x, seen = torch.randn(3, K, device=DEVICE), []
    hooked, mixed, parametrized = linears(), linears(), linears()
    hooked[1].register_forward_hook(lambda *_: seen.append(1))
    mixed[2].bias = None
    nn.utils.parametrizations.weight_norm(parametrized[0])
    for made in (hooked, mixed, parametrized):
        assert all(torch.equal(y, m(x)) for y, m in zip(project(x, made), made, strict=True))
    assert seen == [1, 1] and products == []


def modules() -> list[tuple[nn.Module, Callable[[nn.Module], Tensor], int, int]]:
    """A module, a call, how many products it makes of several layers, and of how many columns each."""
    x, context = torch.randn(2, 4, 32, device=DEVICE), torch.randn(2, 7, 40, device=DEVICE)
    former = QFormer(32, 2, 48, 4, context_dim=40, text=False)
    return [
        (SelfAttention(32, 2, layout="bert"), lambda m: m(x), 1, 96),
        (CrossAttention(32, 2, context_dim=40), lambda m: m(x, context), 1, 64),
        (CrossAttention(32, 2), lambda m: m(x, x[:, :3]), 1, 64),
        (former, lambda m: m(x[:1], context), 5, 0),
    ]


@pytest.mark.parametrize("which", range(4))
def test_they_stay_neighbours(which: int, products: list[int]) -> None:
    """Moved, cast, copied, pickled, loaded, trained: the one product is always that of the parameters."""
    module, call, count, columns = modules()[which]
    module.to(DEVICE).eval()

    def check(m: nn.Module, packed: bool = True) -> None:
        products.clear()
        got = call(m)
        assert len(products) == (count if packed else 0) and (not columns or set(products) <= {columns})
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_packed_linear, "_block", lambda parts: None)
            assert compare(got, call(m).double(), "module")

    check(module)
    check(copy.deepcopy(module))
    check(pickle.loads(pickle.dumps(module)))
    check(copy.deepcopy(module).to(torch.float64).to(torch.float32))
    other, *_ = modules()[which]
    before = call(other.to(DEVICE).eval())
    other.load_state_dict(module.state_dict())
    check(other)
    assert torch.equal(call(other), call(module)) and not torch.equal(before, call(other))
    other.load_state_dict({name: value.clone() for name, value in module.state_dict().items()}, assign=True)
    check(other, packed=False)
    check(other.to(DEVICE))

    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    before = call(module)
    before.square().sum().backward()
    optimizer.step()
    check(module)
    assert not torch.equal(before, call(module))
    for parameter in module.parameters():
        parameter.data.mul_(0.5)
    check(module)


def test_checkpoints(tmp_path: Any) -> None:
    """Files hold each tensor once, under its own name, though neighbours share a storage."""
    former = QFormer(32, 2, 48, 4, context_dim=40, text=False)
    torch.save(former.state_dict(), tmp_path / "all.pt")
    size = sum(p.numel() * p.element_size() for p in former.parameters())
    assert (tmp_path / "all.pt").stat().st_size < 1.5 * size
    loaded = torch.load(tmp_path / "all.pt", weights_only=True)
    assert all(torch.equal(loaded[name], value) for name, value in former.state_dict().items())
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    safetensors.save_file(former.state_dict(), tmp_path / "all.safetensors")
    loaded = safetensors.load_file(tmp_path / "all.safetensors")
    assert all(torch.equal(loaded[name], value) for name, value in former.state_dict().items())


def test_fake_tensors() -> None:
    """Who estimates memory or traces without torch.compile has tensors without addresses."""
    with FakeTensorMode():
        module = SelfAttention(32, 2, layout="bert")
        q, k, v = project(torch.empty(2, 3, 32), module.projections())
        assert q.shape == k.shape == v.shape == (2, 3, 32)
        (q.sum() + v.sum()).backward()
        assert module.query.weight.grad.shape == (32, 32)


def test_meta_device() -> None:
    with torch.device("meta"):
        module = SelfAttention(32, 2, layout="bert")
    module.to_empty(device=DEVICE)
    assert adjacent([m.weight for m in (module.query, module.key, module.value)])

# SPDX-License-Identifier: Apache-2.0
"""cross_attention against its formula in fp64: both ways, every batch and mask, gradients, refusals."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import DEVICE, ON_GPU
from torch import Tensor

from vlmkernels import KeyRanges, cross_attention, use_backend
from vlmkernels.ops.attention import attention
from vlmkernels.testing import compare

B, Q, S, C, E, H, D, DV, N = 3, 5, 13, 24, 40, 4, 16, 8, 20
NAMES = ("w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o")


@pytest.fixture(autouse=True)
def quick_backend() -> Iterator[None]:
    """On a CPU the attention runs on stock torch: its own tests are those that run Triton's interpreter."""
    with use_backend("" if ON_GPU else "torch"):
        yield


def randn(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(dtype)


def parameters(kv_heads: int = H, value_dim: int = DV, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Weights at a scale that keeps activations near 1; those of keys and values are neighbours."""
    rows = {"q": (H * D, C), "k": (kv_heads * D, E), "v": (kv_heads * value_dim, E), "o": (N, H * value_dim)}
    found = {f"w_{name}": randn(*shape, dtype=dtype) / shape[1] ** 0.5 for name, shape in rows.items()}
    found["w_k"], found["w_v"] = torch.cat((found["w_k"], found["w_v"])).split((rows["k"][0], rows["v"][0]))
    return found | {f"b_{name}": 0.3 * randn(shape[0], dtype=dtype) for name, shape in rows.items()}


def exact(
    x: Tensor, context: Tensor, p: dict[str, Tensor], ranges: KeyRanges | None = None, kv_heads: int = H, **more: Any
) -> Tensor:
    batch = max(x.shape[0], context.shape[0])
    q = F.linear(x, p["w_q"], p.get("b_q")).unflatten(-1, (H, -1)).expand(batch, -1, -1, -1)
    k, v = (F.linear(context, p[f"w_{n}"], p.get(f"b_{n}")).unflatten(-1, (kv_heads, -1)).expand(batch, -1, -1, -1) for n in "kv")
    y = attention(q, k, v, ranges, backend="reference", **more)
    assert isinstance(y, Tensor)
    return F.linear(y.flatten(-2), p["w_o"], p.get("b_o")) if "w_o" in p else y.flatten(-2)


def check(
    x: Tensor, context: Tensor, p: dict[str, Tensor], ranges: KeyRanges | None = None, kv_heads: int = H, **more: Any
) -> None:
    """The output and the gradients of everything; the bias of the keys has none, a softmax doesn't see it."""
    leaves = [t.detach().requires_grad_() for t in (x, context, *p.values())]
    wide = [t.detach().double().requires_grad_() for t in leaves]
    way = {"way": more.pop("way")} if "way" in more else {}
    call = dict(zip(p, leaves[2:], strict=True))
    out = cross_attention(leaves[0], leaves[1], ranges=ranges, num_heads=H, num_kv_heads=kv_heads, **call, **more, **way)
    result = exact(wide[0], wide[1], dict(zip(p, wide[2:], strict=True)), ranges, kv_heads, **more)
    assert out.dtype == x.dtype
    checked = compare(out, result, "module")
    assert checked, checked
    cotangent = torch.randn_like(out)
    grads = torch.autograd.grad(out, leaves, cotangent, allow_unused=True)
    exact_grads = torch.autograd.grad(result, wide, cotangent.double())
    for name, got, wanted in zip(("x", "context", *p), grads, exact_grads, strict=True):
        if name == "b_k":
            assert got is None or got.abs().max() < 1e-4 * exact_grads[list(p).index("w_k") + 2].abs().max()
            continue
        checked = compare(got, wanted, "module")
        assert checked, (name, checked)


@pytest.mark.parametrize("way", ["project", "absorb"])
@pytest.mark.parametrize("batches", [(B, B), (1, B), (B, 1), (1, 1)], ids=str)
def test_both_ways(batches: tuple[int, int], way: str) -> None:
    check(randn(batches[0], Q, C), randn(batches[1], S, E), parameters(), way=way)


@pytest.mark.parametrize("way", ["project", "absorb"])
@pytest.mark.parametrize("left_out", ["b_q", "b_k", "b_v", "b_o", "w_o b_o", "b_k b_v"])
def test_without(left_out: str, way: str) -> None:
    p = {name: value for name, value in parameters().items() if name not in left_out.split()}
    check(randn(B, Q, C), randn(B, S, E), p, way=way, scale=0.3)


@pytest.mark.parametrize("batches", [(B, B), (1, B), (B, 1)], ids=str)
@pytest.mark.parametrize("kv_heads", [H, 2])
def test_ranges(batches: tuple[int, int], kv_heads: int) -> None:
    """Of each image and one for all; a query that sees nothing gives the bias of the output alone."""
    for lengths in ([S, 4, 0], [7]):
        ranges = KeyRanges.key_padding(Q, lengths=torch.tensor(lengths, device=DEVICE))
        check(randn(batches[0], Q, C), randn(batches[1], S, E), parameters(kv_heads), ranges, kv_heads)
    p = parameters()
    nothing = KeyRanges.key_padding(Q, lengths=torch.tensor([0], device=DEVICE))
    out = cross_attention(randn(1, Q, C), randn(1, S, E), ranges=nothing, num_heads=H, **p)
    assert torch.equal(out, p["b_o"].expand_as(out))


def test_softcap() -> None:
    p = parameters()
    del p["b_k"]  # which a softmax behind a cap does see
    with use_backend("reference"):
        check(3 * randn(B, Q, C), randn(B, S, E), p, softcap=1.0)


def test_weights_that_are_no_neighbours() -> None:
    check(randn(B, Q, C), randn(B, S, E), {name: value.clone() for name, value in parameters().items()})


@pytest.mark.parametrize("way", ["project", "absorb"])
def test_half_precision(way: str) -> None:
    dtype = torch.bfloat16
    x, context, p = randn(B, Q, C, dtype=dtype), randn(B, S, E, dtype=dtype), parameters(dtype=dtype)
    wide = {name: value.double() for name, value in p.items()}
    result = compare(cross_attention(x, context, num_heads=H, way=way, **p), exact(x.double(), context.double(), wide), "module")
    assert result, result


def test_no_keys() -> None:
    p = parameters()
    out = cross_attention(randn(B, Q, C), randn(B, 0, E), num_heads=H, backend="reference", **p)
    assert torch.equal(out, p["b_o"].expand_as(out))


@pytest.mark.parametrize("way", ["project", "absorb"])
@pytest.mark.parametrize(("batches", "rows"), [((0, 0), Q), ((0, 1), Q), ((B, B), 0)], ids=str)
def test_nothing_to_do(batches: tuple[int, int], rows: int, way: str) -> None:
    x, context = randn(batches[0], rows, C), randn(batches[1], S, E)
    out = cross_attention(x, context, num_heads=H, way=way, backend="reference", **parameters())
    assert out.shape == (batches[0], rows, N)


@pytest.mark.parametrize("way", ["project", "absorb"])
def test_nan_stays_in_its_image(way: str) -> None:
    context = randn(B, S, E)
    context[1, 2, 3] = float("nan")
    out = cross_attention(randn(1, Q, C), context, num_heads=H, way=way, **parameters())
    assert out[1].isnan().all() and not out[[0, 2]].isnan().any()


@pytest.mark.parametrize("way", ["project", "absorb"])
def test_inputs_are_unchanged_and_it_compiles(way: str) -> None:
    x, context, p = randn(1, Q, C), randn(B, S, E), parameters()
    given = [t.clone() for t in (x, context, *p.values())]
    leaves = [t.requires_grad_() for t in (x, context, *p.values())]

    def call(x: Tensor, context: Tensor, *values: Tensor) -> Tensor:
        return cross_attention(x, context, num_heads=H, way=way, **dict(zip(NAMES, values, strict=True)))

    torch._dynamo.reset()
    outputs = [function(*leaves) for function in (call, torch.compile(call, fullgraph=True, backend="aot_eager"))]
    grads = [torch.autograd.grad(out, leaves, torch.ones_like(out), allow_unused=True) for out in outputs]
    assert compare(outputs[1], outputs[0].double(), "module")
    for name, a, b in zip(("x", "context", *NAMES), grads[1], grads[0], strict=True):
        assert name == "b_k" or compare(a, b.double(), "module"), name
    assert all(torch.equal(a, b) for a, b in zip(given, leaves, strict=True))


ABSORB = "way: got 'absorb' with ranges, a softcap, grouped heads or no keys, wanted 'project'"
REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"x": (Q, C)}, r"x: got shape \(5, 24\), wanted \[B, Sq, C\]"),
    ({"context": (2, S, E)}, r"context: got shape \(2, 13, 40\), wanted \[B, Sk, E\] with x's batch of 3, or 1 in either"),
    ({"num_heads": 3}, r"w_q: got shape \(64, 24\), wanted \[a multiple of 3, 24\]"),
    ({"num_kv_heads": 3}, "num_kv_heads: got 3, wanted a divisor of num_heads = 4"),
    ({"w_k": (H * D, E + 1)}, r"w_k: got shape \(64, 41\), wanted \[64, 40\]"),
    ({"w_k": (2 * H * D, E)}, r"w_k: got shape \(128, 40\), wanted \[64, 40\]"),
    ({"w_v": (H * DV + 1, E)}, r"w_v: got shape \(33, 40\), wanted \[a multiple of 4, 40\]"),
    ({"w_o": (N, H * DV + 1)}, r"w_o: got shape \(20, 33\), wanted \[a multiple of 1, 32\]"),
    ({"b_v": (H,)}, r"b_v: got shape \(4,\), wanted \[32\]"),
    ({"w_o": None}, r"b_o: got shape \(20,\), wanted None"),
    ({"way": "absorb", "backend": "tritium"}, "backend: got"),
    ({"way": "fold"}, "way: got 'fold', wanted one of project, absorb"),
    ({"way": "absorb", "softcap": 2.0}, ABSORB),
    ({"way": "absorb", "num_kv_heads": 2, "w_k": (2 * D, E), "w_v": (2 * DV, E), "b_k": (2 * D,), "b_v": (2 * DV,)}, ABSORB),
    ({"way": "absorb", "context": (B, 0, E)}, ABSORB),
]


@pytest.mark.parametrize(("change", "message"), REFUSED, ids=[f"{next(iter(c))} {i}" for i, (c, _) in enumerate(REFUSED)])
def test_refusals(change: dict[str, Any], message: str) -> None:
    arguments: dict[str, Any] = {"x": randn(B, Q, C), "context": randn(B, S, E), "num_heads": H, **parameters()}
    arguments |= {name: randn(*value) if isinstance(value, tuple) else value for name, value in change.items()}
    with pytest.raises(ValueError, match=f"^{message}"):
        cross_attention(**arguments)


@pytest.mark.parametrize("batches", [(B, B), (1, B), (B, 1)], ids=str)
@pytest.mark.parametrize("shape", [(B, Q + 1), (B - 1, Q), (1, Q * B)], ids=str)
def test_ranges_must_fit(batches: tuple[int, int], shape: tuple[int, int]) -> None:
    ranges = KeyRanges(*torch.zeros(2, *shape, dtype=torch.int32, device=DEVICE))
    with pytest.raises(ValueError, match=r"^ranges: got shape .*one range per query"):
        cross_attention(randn(batches[0], Q, C), randn(batches[1], S, E), ranges=ranges, num_heads=H, **parameters())


def test_dtypes_must_agree() -> None:
    for name in ("context", "w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o"):
        arguments: dict[str, Any] = {"x": randn(B, Q, C), "context": randn(B, S, E), **parameters()}
        arguments[name] = arguments[name].double()
        with pytest.raises(ValueError, match=f"^{name}: got torch.float64 on"):
            cross_attention(num_heads=H, **arguments)

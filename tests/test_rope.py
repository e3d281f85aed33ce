# SPDX-License-Identifier: Apache-2.0
"""Rope: every backend against an fp64 formulation with complex numbers, over layouts, dtypes, head dims and norms."""

import pytest
import torch
import torch.nn.functional as F
from conftest import ON_GPU, capture, runnable
from torch.library import opcheck

from vlmkernels.ops._op import BackendError
from vlmkernels.ops.rope import rope, rope_qkv_
from vlmkernels.testing import compare

OPS = ("rope_fwd", "rope_bwd", "rope_qkv_", "rope_qkv_bwd")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]

# B (0: packed), S, H, Hk, D, R, interleaved pairs, which of q and k are normed
CASES = {
    "vision-D72": (2, 5, 3, 3, 72, 72, False, ""),
    "text-gqa-D128": (1, 7, 4, 2, 128, 128, False, ""),
    "packed-D80": (0, 13, 2, 2, 80, 80, False, ""),
    "norm-D128": (2, 5, 4, 1, 128, 128, False, "qk"),
    "norm-k-D40": (2, 5, 3, 2, 40, 40, False, "k"),
    "partial-D64": (2, 6, 2, 2, 64, 24, False, ""),
    "partial-norm-D24": (0, 10, 3, 1, 24, 8, False, "qk"),
    "interleaved-D64": (1, 9, 3, 2, 64, 64, True, ""),
    "interleaved-partial-norm-D48": (2, 5, 2, 1, 48, 16, True, "q"),
    "unrotated-D8": (1, 4, 2, 1, 8, 0, False, "q"),
}
if ON_GPU:
    CASES |= {
        "qwen-vision-S1024": (0, 4096, 16, 16, 80, 80, False, ""),
        "siglip-like-D72": (2, 1000, 16, 16, 72, 72, False, ""),
        "qwen3-vl-8b": (2, 777, 32, 8, 128, 128, False, "qk"),
        "gemma3-4b": (2, 300, 8, 4, 256, 256, False, "qk"),
        "odd-D104": (2, 300, 7, 1, 104, 104, False, ""),
        "interleaved-D96": (2, 300, 12, 12, 96, 96, True, "qk"),
    }


class Inputs:
    """Random inputs of a case: q and k are slices of one packed QKV, so neither is contiguous."""

    def __init__(self, case: str, dtype: torch.dtype, device: torch.device) -> None:
        b, s, self.heads, self.kv_heads, self.dim, rotated, self.interleaved, normed = CASES[case]
        self.lead = (b, s) if b else (s,)
        self.dtype = dtype
        self.qkv = torch.randn(*self.lead, (self.heads + 2 * self.kv_heads) * self.dim, device=device).to(dtype)
        angle = torch.randn(1 if b == 1 else max(b, 1), s, rotated // 2, device=device) * 10
        self.cos, self.sin = angle.cos(), angle.sin()
        self.q_weight, self.k_weight = (
            (1 + torch.randn(self.dim, device=device) / 4).to(dtype) if n in normed else None for n in "qk"
        )

    def split(self, qkv: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        sizes = [self.heads * self.dim, self.kv_heads * self.dim, self.kv_heads * self.dim]
        q, k, v = (x.view(*self.lead, -1, self.dim) for x in qkv.split(sizes, -1))
        return q, k, v

    def gradients(self) -> list[torch.Tensor]:
        q, k, _ = self.split(self.qkv)
        return [(torch.arange(x.numel(), device=x.device) * 12.9898).sin().view(x.shape).to(self.dtype) for x in (q, k)]

    def leaves(self, dtype: torch.dtype) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
        """q, k and the weights, each requiring grad."""
        q, k, _ = self.split(self.qkv.to(dtype))
        weights = {"q_weight": self.q_weight, "k_weight": self.k_weight}
        named = {name: w.to(dtype).requires_grad_() for name, w in weights.items() if w is not None}
        return [q.detach().requires_grad_(), k.detach().requires_grad_()], named


def exact_rope(
    x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, weight: torch.Tensor | None, interleaved: bool
) -> torch.Tensor:
    """Another formulation than any backend's: the pairs as complex numbers. ``x`` is fp64."""
    if weight is not None:
        x = F.rms_norm(x, x.shape[-1:], weight, 1e-6)
    turn = torch.complex(cos.double(), sin.double())[..., None, :]
    turned, rest = x[..., : 2 * turn.shape[-1]], x[..., 2 * turn.shape[-1] :]
    pairs = turned.unflatten(-1, (-1, 2) if interleaved else (2, turn.shape[-1])) if turned.shape[-1] else turned[..., None]
    if not turned.shape[-1]:
        return x
    axis = -1 if interleaved else -2
    result = torch.complex(*pairs.unbind(axis)) * turn.view(*(turn.shape if x.dim() == 4 else turn.shape[1:]))
    return torch.cat((torch.stack((result.real, result.imag), axis).flatten(-2), rest), -1)


def exact(case: Inputs) -> list[torch.Tensor]:
    """Outputs and gradients in fp64, by autograd."""
    (q, k), weights = case.leaves(torch.float64)
    outs = [
        exact_rope(x, case.cos, case.sin, weights.get(name), case.interleaved) for x, name in ((q, "q_weight"), (k, "k_weight"))
    ]
    return [*outs, *torch.autograd.grad(outs, [q, k, *weights.values()], [g.double() for g in case.gradients()])]


def names(case: Inputs) -> list[str]:
    return ["q", "k", "dq", "dk", *(f"d{name}" for name in ("q_weight", "k_weight") if getattr(case, name) is not None)]


@pytest.mark.backends(*OPS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    case = Inputs(name, dtype, device)
    (q, k), weights = case.leaves(dtype)
    assert not q.is_contiguous() or q.shape[-2] == 0
    before = case.qkv.clone()
    outs = rope(q, k, case.cos, case.sin, **weights, interleaved=case.interleaved, backend=backend)
    got = [*outs, *torch.autograd.grad(outs, [q, k, *weights.values()], case.gradients())]
    assert all(x.is_contiguous() and x.dtype == dtype for x in got)
    assert torch.equal(case.qkv, before)
    for what, x, y in zip(names(case), got, exact(case), strict=True):
        # A weight's gradient is a sum over all tokens and heads: a few numbers, so its error is no average over many roundings.
        result = compare(x, y, "gemm" if "weight" in what else "norm")
        assert result, f"{what}: {result}"


@pytest.mark.backends(*OPS)
@pytest.mark.parametrize("name", CASES)
def test_in_place(name: str, backend: str, device: torch.device) -> None:
    """q and k as out of place, bit for bit, and v untouched; the gradient of the packed tensor likewise."""
    case = Inputs(name, torch.bfloat16, device)
    options = {"interleaved": case.interleaved, "backend": backend}
    weights = {"q_weight": case.q_weight, "k_weight": case.k_weight}
    q, k, v = case.split(case.qkv.clone())
    expected = [*rope(q, k, case.cos, case.sin, **weights, **options), v]
    got = rope_qkv_(case.qkv, case.cos, case.sin, num_heads=case.heads, num_kv_heads=case.kv_heads, **weights, **options)
    assert got is case.qkv
    for x, y in zip(case.split(got), expected, strict=True):
        assert compare(x, y, "exact")

    leaf = torch.randn_like(case.qkv).requires_grad_()
    hidden = leaf.clone()
    out = rope_qkv_(hidden, case.cos, case.sin, num_heads=case.heads, num_kv_heads=case.kv_heads, **options)
    assert out is hidden
    gradient = torch.randn_like(out)
    kept = gradient.clone()
    (got,) = torch.autograd.grad(out, leaf, gradient)
    assert torch.equal(gradient, kept)
    q, k, v = (x.detach().requires_grad_() for x in case.split(leaf))
    outs = [*rope(q, k, case.cos, case.sin, **options), v * 1]
    for x, y in zip(case.split(got), torch.autograd.grad(outs, [q, k, v], case.split(gradient)), strict=True):
        assert compare(x, y, "exact")


@pytest.mark.backends(*OPS)
def test_strides(backend: str, device: torch.device) -> None:
    """Transposed heads, a last dimension with gaps, broadcast and strided tables, expanded gradients, an odd storage offset."""
    q = torch.randn(2, 3, 5, 32, device=device).transpose(1, 2)
    k = torch.randn(2 * 5 * 2 * 64 + 1, device=device)[1:].view(2, 5, 2, 64)[..., ::2]
    angle = torch.randn(5, 1, 32, device=device).transpose(0, 1)[..., ::2]
    cos, sin = angle.cos(), torch.randn(1, 5, 32, device=device)[..., ::2]
    weight = torch.rand(64, device=device)[::2]
    for x in (q, k, weight):
        x.requires_grad_()
    outs = rope(q, k, cos, sin, q_weight=weight, backend=backend)
    got = [*outs, *torch.autograd.grad(sum(x.sum() for x in outs), [q, k, weight])]
    q64, k64, w64 = (x.detach().double().requires_grad_() for x in (q, k, weight))
    outs = exact_rope(q64, cos, sin, w64, False), exact_rope(k64, cos, sin, None, False)
    for x, y in zip(got, [*outs, *torch.autograd.grad(sum(x.sum() for x in outs), [q64, k64, w64])], strict=True):
        assert compare(x, y, "norm")


@pytest.mark.backends(*OPS)
@pytest.mark.parametrize("weight", [False, True])
def test_rows_are_alone(weight: bool, backend: str, device: torch.device) -> None:
    """NaN and infinity stay in their head, and channels that are not rotated pass bit for bit."""
    q, k = (torch.randn(2, 6, h, 24, device=device) for h in (3, 1))
    angle = torch.randn(2, 6, 4, device=device)
    w = torch.rand(24, device=device) if weight else None
    clean = rope(q, k, angle.cos(), angle.sin(), q_weight=w, backend=backend)[0]
    q[1, 2, 0, 3], q[0, 4, 1, 20] = float("nan"), float("inf")
    out = rope(q, k, angle.cos(), angle.sin(), q_weight=w, backend=backend)[0]
    changed = (out != clean).any(-1)
    assert changed.sum() == 2 and changed[1, 2, 0] and changed[0, 4, 1]
    if not weight:
        assert compare(out[..., 8:], q[..., 8:], "exact") and out[1, 2, 0].isnan().sum() == 2


@pytest.mark.backends(*OPS)
def test_nothing_to_do(backend: str, device: torch.device) -> None:
    table = torch.ones(1, 0, 8, device=device)
    weight = torch.ones(16, device=device, requires_grad=True)
    q, k = (torch.empty(2, 0, h, 16, device=device, requires_grad=True) for h in (4, 2))
    outs = rope(q, k, table, table, q_weight=weight, k_weight=weight, backend=backend)
    gradients = torch.autograd.grad(sum(x.sum() for x in outs), [q, k, weight])
    assert [x.shape for x in outs] == [q.shape, k.shape] and not gradients[2].any()
    assert rope_qkv_(torch.empty(0, 128, device=device), table, table, num_heads=4, num_kv_heads=2, backend=backend).numel() == 0

    q = torch.randn(2, 3, 4, 16, device=device)
    table = torch.rand(1, 3, 8, device=device)
    alone, none = rope(q, q[..., :0, :], table, table, backend=backend)
    assert none.shape == (2, 3, 0, 16) and torch.equal(alone, rope(q, q, table, table, backend=backend)[1])


def small(device: torch.device) -> tuple[torch.Tensor, ...]:
    q, k = (torch.randn(2, 5, h, 16, device=device) for h in (3, 1))
    return q, k, *(torch.rand(2, 5, 8, device=device) for _ in range(2)), torch.rand(16, device=device)


@pytest.mark.backends(*OPS, exclude=("triton",))
@pytest.mark.parametrize("interleaved", [False, True])
def test_gradcheck(interleaved: bool, backend: str, device: torch.device) -> None:
    q, k, cos, sin, w = (x[:1, :2].double() if x.dim() > 1 else x.double() for x in small(device))
    leaves = [x.requires_grad_() for x in (q, k, w, w.clone())]
    assert torch.autograd.gradcheck(
        lambda q, k, qw, kw: rope(q, k, cos, sin, q_weight=qw, k_weight=kw, interleaved=interleaved, backend=backend), leaves
    )


@pytest.mark.backends(*OPS, exclude=() if ON_GPU else ("triton",))
def test_opcheck(backend: str, device: torch.device) -> None:
    q, k, cos, sin, w = small(device)
    ops = torch.ops.vlmkernels
    opcheck(ops.rope_fwd, (q, k, cos, sin, w, None, 1e-6, False, backend))
    opcheck(ops.rope_bwd, (q, k, q, None, cos, sin, w, None, 1e-6, True, backend))
    qkv = torch.cat((q.flatten(2), k.flatten(2), k.flatten(2)), -1)
    opcheck(ops.rope_qkv_, (qkv, cos, sin, w, w, 3, 1, 1e-6, False, backend))
    opcheck(ops.rope_qkv_bwd, (qkv, cos, sin, 3, 1, False, backend))


@pytest.mark.backends(*OPS, exclude=() if ON_GPU else ("triton",))
def test_compile(backend: str, device: torch.device) -> None:
    """One graph, forward and backward, also with one tensor in two places."""
    q, k, cos, sin, w = small(device)
    for x in (q, k, w):
        x.requires_grad_()

    def step(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
        a, b = rope(q * 2, k, cos, sin, q_weight=w, k_weight=w, backend=backend)
        c, d = rope(a, a, cos, sin, backend=backend)
        return (a.sin() * d).sum() + (b * b).sum() + c.cos().sum()

    expected = torch.autograd.grad(step(q, k, w), [q, k, w])
    compiled = torch.compile(step, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(q, k, w), [q, k, w]), expected, strict=True):
        assert compare(x, y, "norm")


@pytest.mark.backends(*OPS, exclude=() if ON_GPU else ("triton",))
def test_compile_in_place(backend: str, device: torch.device) -> None:
    _, _, cos, sin, w = small(device)
    qkv = torch.randn(2, 5, 5 * 16, device=device, requires_grad=True)

    def step(x: torch.Tensor) -> torch.Tensor:
        x = x * 2
        view = x[..., :32]
        rope_qkv_(x, cos, sin, num_heads=3, num_kv_heads=1, backend=backend)
        return (x.sin() * x).sum() + view.cos().sum()

    compiler = "inductor" if ON_GPU else "aot_eager"
    expected = torch.autograd.grad(step(qkv), qkv)[0]
    got = torch.autograd.grad(torch.compile(step, fullgraph=True, backend=compiler)(qkv), qkv)[0]
    assert compare(got, expected, "norm")

    def infer(x: torch.Tensor) -> torch.Tensor:
        options = {"q_weight": w, "num_heads": 3, "num_kv_heads": 1, "backend": backend}
        return rope_qkv_(x, cos, sin, **options)

    with torch.no_grad():
        first, second = qkv.detach().clone(), qkv.detach().clone()
        infer(first)
        out = torch.compile(infer, fullgraph=True, backend=compiler)(second)
    assert compare(second, first, "exact") and compare(out, first, "exact")


def test_compile_in_place_of_any_length(device: torch.device) -> None:
    """Sizes and strides that the graph does not know go through the checks, too."""

    def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
        return rope_qkv_(x, cos, sin, num_heads=3, num_kv_heads=1, backend="torch")

    compiled = torch.compile(rotate, fullgraph=True, dynamic=True, backend="eager")
    for length in (5, 7):
        qkv, cos, sin = torch.randn(2, length, 80, device=device), *torch.randn(2, length, 8, device=device)
        assert compare(compiled(qkv.clone(), cos, sin), rotate(qkv, cos, sin), "exact")


def test_in_place_and_autograd(device: torch.device) -> None:
    _, _, cos, sin, w = small(device)
    options = {"cos": cos, "sin": sin, "num_heads": 3, "num_kv_heads": 1}
    leaf = torch.randn(2, 5, 80, device=device, requires_grad=True)
    before = leaf.detach().clone()
    with pytest.raises(RuntimeError, match="a leaf Variable that requires grad"):
        rope_qkv_(leaf, **options)
    with pytest.raises(RuntimeError, match="a view of a leaf Variable that requires grad"):
        rope_qkv_(leaf.view(2, 5, 80), **options)
    for name in ("q_weight", "k_weight"):
        with pytest.raises(ValueError, match=f"{name}: got a norm in place while a gradient is needed"):
            rope_qkv_(leaf * 1, **{name: w}, **options)
    assert torch.equal(leaf.detach(), before)
    squared = leaf * 1
    loss = squared.square().sum()
    rope_qkv_(squared, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    plain = before.clone()
    rope_qkv_(plain, **options)
    assert plain._version == 1
    with pytest.raises(RuntimeError, match="once_differentiable"):
        q = torch.randn(2, 5, 3, 16, device=device, requires_grad=True)
        (gradient,) = torch.autograd.grad(rope(q, q, cos, sin)[0].sin().sum(), q, create_graph=True)
        gradient.sum().backward()


def test_refusals(device: torch.device) -> None:
    q, k, cos, sin, w = small(device)
    refused = {
        "q: got": [(q[0, 0], k, cos, sin), (q.long(), k, cos, sin), (q[..., :15], k, cos, sin)],
        "k: got": [(q, k[:1], cos, sin), (q, k[..., :8], cos, sin), (q, k.double(), cos, sin), (q, k[0], cos, sin)],
        "cos: got": [
            (q, k, cos[:, :4], sin[:, :4]), (q, k, cos.repeat(2, 1, 1), sin.repeat(2, 1, 1)), (q, k, cos.long(), sin),
            (q, k, cos.repeat(1, 1, 2), sin.repeat(1, 1, 2)), (q, k, cos[None], sin[None]), (q[0], k[0], cos, sin),
        ],
        "sin: got": [(q, k, cos, sin[:1]), (q, k, cos, sin.double())],
    }  # fmt: skip
    for message, calls in refused.items():
        for call in calls:
            with pytest.raises(ValueError, match=message):
                rope(*call)
    with pytest.raises(ValueError, match="sin: got a tensor that requires grad"):
        rope(q, k, cos, sin.clone().requires_grad_())
    with pytest.raises(ValueError, match=r"q_weight: got \(8,\), wanted \[16\]"):
        rope(q, k, cos, sin, q_weight=w[:8])
    with pytest.raises(ValueError, match="k_weight: got"):
        rope(q, k, cos, sin, k_weight=w.long())
    with pytest.raises(ValueError, match="backend: got"):
        rope(q, k, cos, sin, backend="tritium")
    with pytest.raises(ValueError, match="q: got .*, wanted .B, S, H, D."):
        rope(q[0, 0, 0, 0], k, cos, sin)
    qkv = torch.randn(2, 5, 80, device=device)
    for bad, heads, message in (
        (qkv[..., :79], (3, 1), "qkv: got"),
        (qkv[0, 0], (3, 1), "qkv: got"),
        (qkv[:1].expand(2, 5, 80), (3, 1), "qkv: got strides .* its elements share memory"),
        (qkv.flatten().as_strided((2, 5, 80), (400, 70, 1)), (3, 1), "qkv: got strides .* its elements share memory"),
        (qkv, (0, 0), "num_heads, num_kv_heads: got"),
        (qkv, (-1, 3), "num_heads, num_kv_heads: got"),
    ):
        with pytest.raises(ValueError, match=message):
            rope_qkv_(bad, cos, sin, num_heads=heads[0], num_kv_heads=heads[1])


@pytest.mark.skipif("triton" not in runnable(*OPS), reason="Triton does not run here")
def test_what_triton_leaves_to_others(device: torch.device) -> None:
    q, k, cos, sin, _ = (x.double() for x in small(device))
    with pytest.raises(BackendError, match="triton: it takes fp32, bf16 and fp16, not torch.float64"):
        rope(q, k, cos, sin, backend="triton")
    assert compare(rope(q, k, cos, sin)[0], exact_rope(q, cos, sin, None, False), "norm")
    qkv = torch.randn(5, 160, device=device)[:, ::2]
    with pytest.raises(BackendError, match="last dimension is contiguous"):
        rope_qkv_(qkv, cos[:1].float(), sin[:1].float(), num_heads=3, num_kv_heads=1, backend="triton")


@pytest.mark.gpu
@pytest.mark.backends(*OPS)
def test_graph_capture(backend: str, device: torch.device) -> None:
    q, k, cos, sin, w = small(device)
    qkv, start = (torch.randn(2, 5, 80, device=device) for _ in range(2))

    def step() -> list[torch.Tensor]:
        qkv.copy_(start)
        rope_qkv_(qkv, cos, sin, q_weight=w, num_heads=3, num_kv_heads=1, backend=backend)
        leaves = [x.detach().requires_grad_() for x in (q, k, w)]
        outs = rope(*leaves[:2], cos, sin, q_weight=leaves[2], backend=backend)
        return [*outs, *torch.autograd.grad(sum(x.square().sum() for x in outs), leaves)]

    graph, captured = capture(step)
    for x in (q, k, start, cos, w):
        x.copy_(torch.rand_like(x))
    graph.replay()
    in_place = qkv.clone()
    for x, y in zip([in_place, *captured], [qkv, *step()], strict=True):
        assert compare(x, y, "exact")
    assert compare(in_place, qkv, "exact")


@pytest.mark.gpu
def test_offsets_past_two_to_the_31(device: torch.device) -> None:
    """4.3e9 elements of bf16: the last token's offset does not fit in 32 bits."""
    tokens, heads, dim = 2**20 + 3, 32, 128
    qkv = torch.empty(tokens, heads * dim, device=device, dtype=torch.bfloat16)
    tail = torch.randn(64, heads * dim, device=device).bfloat16()
    qkv[-64:] = tail
    angle = torch.arange(tokens, device=device)[:, None] * torch.rand(dim // 2, device=device)
    cos, sin = angle.cos(), angle.sin()
    out, _ = rope(qkv.view(tokens, heads, dim), qkv.view(tokens, heads, dim)[:, :0], cos, sin, backend="triton")
    wanted = exact_rope(tail.view(64, heads, dim).double(), cos[None, -64:], sin[None, -64:], None, False)
    assert compare(out[-64:], wanted, "norm")
    del out
    options = {"num_heads": 16, "num_kv_heads": 8, "backend": "triton"}
    rope_qkv_(qkv, cos, sin, **options)
    assert compare(qkv[-64:, : 24 * dim], wanted[:, :24].flatten(1), "norm")
    assert compare(qkv[-64:, 24 * dim :], tail[:, 24 * dim :], "exact")

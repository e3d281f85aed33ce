# SPDX-License-Identifier: Apache-2.0
"""Attention: every backend against the fp64 reference, forward and backward, over masks, layouts, dtypes and head dims."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import ON_GPU, capture, runnable

from vlmkernels import BackendError, KeyRanges, attention
from vlmkernels.ops.attention import attention_qkvpacked
from vlmkernels.testing import compare

#: Not on the CUDA kernels, whose backward takes few queries: they have files of their own.
OPS = ("attention_fwd", "attention_bwd")
#: On every backend but CUDA, which takes 16 bits only and has tests of its own (test_attention_cuda, test_attention_bwd_cuda).
portable = pytest.mark.backends(*OPS, exclude=("cuda",))
HALF = [torch.float16, torch.bfloat16]
DTYPES = [torch.float32, *HALF]

# B, H, Hk, Sq, Sk, D, Dv
SHAPES = {
    "self-S65-D32": (2, 2, 2, 65, 65, 32, 32),
    "gqa-S40x100-D64": (1, 4, 2, 40, 100, 64, 64),
    "mqa-S130x40-D16-Dv8": (1, 3, 1, 130, 40, 16, 8),
    "qformer-S32x77-D24-Dv40": (2, 1, 1, 32, 77, 24, 40),
}
if ON_GPU:
    SHAPES |= {
        "clip-S577-D64": (2, 4, 4, 577, 577, 64, 64),
        "siglip-S729-D72": (2, 4, 4, 729, 729, 72, 72),
        "qwen-S1000-D80": (1, 4, 4, 1000, 1000, 80, 80),
        "eva-S257-D88": (2, 4, 4, 257, 257, 88, 88),
        "giant-S577-D96": (1, 4, 4, 577, 577, 96, 96),
        "bigg-S257-D104": (1, 4, 4, 257, 257, 104, 104),
        "llama-S515x1030-D128": (1, 8, 2, 515, 1030, 128, 128),
        "gemma-S600-D256": (1, 4, 2, 600, 600, 256, 256),
        "odd-S300-D192-Dv136": (1, 2, 2, 300, 300, 192, 136),
        "probe-S1x729-D72": (3, 4, 4, 1, 729, 72, 72),
    }
MASKS = ["dense", "causal", "blocks", "random"]


def make_qkv(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> list[torch.Tensor]:
    b, h, hk, sq, sk, d, dv = shape
    sizes = ((b, sq, h, d), (b, sk, hk, d), (b, sk, hk, dv))
    return [torch.randn(size, device=device).to(dtype).requires_grad_() for size in sizes]


def make_ranges(mask: str, shape: tuple[int, ...], device: torch.device) -> KeyRanges | None:
    b, _, _, sq, sk, _, _ = shape
    if mask == "blocks":  # two images in a causal text, the second cut off by the end
        i = torch.arange(sq, device=device) + sk - sq
        stop = torch.where((i >= 5) & (i < sk // 2), max(sk // 2, 5), i + 1).clamp(0, sk)
        return KeyRanges(torch.zeros_like(stop)[None].int(), stop[None].int())
    if mask == "random":  # in no order, some rows empty, some bounds outside the keys
        start = torch.randint(-5, sk, (b, sq), device=device, dtype=torch.int32)
        length = torch.randint(-20, sk, (b, sq), device=device, dtype=torch.int32)
        return KeyRanges(start, start + length)
    return None


def replayed(
    step: Callable[[], Any], inputs: list[torch.Tensor], ranges: KeyRanges | None, mask: str, shape: tuple[int, ...]
) -> tuple[Any, Any]:
    """What ``step`` in a CUDA graph makes of other contents, ranges included, and what a call does."""
    graph, captured = capture(step)
    with torch.no_grad():
        for x in inputs:
            x.normal_()
        if ranges is not None:
            other = make_ranges(mask, shape, inputs[0].device)
            ranges.start.copy_(other.start)
            ranges.stop.copy_(other.stop)
    graph.replay()
    return captured, step()


def run(inputs: list[torch.Tensor], ranges: KeyRanges | None, backend: str, dtype: torch.dtype, **options) -> list[torch.Tensor]:
    """Output, log-sum-exp and the three gradients of both under fixed incoming gradients, which ``dtype`` rounds."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    out, lse = attention(*inputs, ranges, return_lse=True, backend=backend, **options)
    dout = (torch.arange(out.numel(), device=out.device) * 12.9898).sin().view(out.shape).to(dtype)
    dlse = (torch.arange(lse.numel(), device=out.device) * 78.233).sin().view(lse.shape)
    dlse = torch.where(torch.isfinite(lse), dlse, 0.0)
    gradients = torch.autograd.grad([out, lse], inputs, [dout.to(out.dtype), dlse.to(lse.dtype)])
    return [out, lse, *gradients]


def check(inputs: list[torch.Tensor], ranges: KeyRanges | None, backend: str, **options) -> None:
    dtype = inputs[0].dtype
    got = run(inputs, ranges, backend, dtype, **options)
    exact = run([x.double() for x in inputs], ranges, "reference", dtype, **options)
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), got, exact, strict=True):
        result = compare(x, y, "grad" if name.startswith("d") else "gemm")
        assert result, f"{name}: {result}"


# The interpreter takes 2 s for most, and has no other code for fp16 than for bf16: scale and softcap are tested in both.
@portable
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES if ON_GPU else [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_attention(backend, shape, dtype, mask, device):
    inputs = make_qkv(shape, dtype, device)
    check(inputs, make_ranges(mask, shape, device), backend, causal=mask == "causal")


@portable
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_attention_scale(backend, dtype, device):
    inputs = make_qkv((1, 2, 1, 40, 70, 16, 16), dtype, device)
    check(inputs, None, backend, scale=0.7)


@pytest.mark.backends(*OPS, exclude=("cuda", "torch"))
@pytest.mark.parametrize("mask", ["dense", "random"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("softcap", [2.0, 50.0])
def test_attention_softcap(backend, softcap, dtype, mask, device):
    shape = (1, 2, 1, 40, 70, 16, 16)
    inputs = [2 * x.detach() for x in make_qkv(shape, dtype, device)]
    check(inputs, make_ranges(mask, shape, device), backend, softcap=softcap)


@portable
def test_attention_large_logits(backend, device):
    """The running maximum must keep exp from overflowing, whichever tile holds the largest logit."""
    q, k, v = (x.detach() for x in make_qkv((1, 1, 1, 20, 150, 16, 16), torch.bfloat16, device))
    for keys, values in ((k, v), (k.flip(1), v.flip(1))):
        out = attention(q * 30, keys, values, backend=backend)
        assert compare(out, attention(*(x.double() for x in (q * 30, keys, values)), backend="reference"), "gemm")


@portable
def test_attention_takes_views(backend, device):
    """Slices of a packed QKV, transposed heads-first tensors and an expanded batch go in as they are."""
    qkv = torch.randn(2, 33, 3, 2, 16, device=device)
    check(list(qkv.unbind(2)), None, backend)
    heads_first = torch.randn(3, 2, 2, 33, 16, device=device)
    check([x.transpose(1, 2) for x in heads_first], None, backend, causal=True)
    shared = torch.randn(1, 40, 2, 16, device=device).expand(2, -1, -1, -1)
    check([qkv[:, :, 0], shared, shared[..., :8]], None, backend)
    check([torch.randn(2, 70, 2, 21, device=device).half()[..., 1:17] for _ in range(3)], None, backend)  # rows at odd addresses


@portable
def test_attention_packed(backend, device):
    """Segments packed along one axis give what each gives alone."""
    lengths = [30, 0, 70, 5]
    q, k, v = (torch.randn(sum(lengths), 2, 16, device=device, requires_grad=True) for _ in range(3))
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    out, lse = attention(q, k, v, KeyRanges.packed(cu_seqlens, sum(lengths)), return_lse=True, backend=backend)
    assert out.shape == (105, 2, 16) and lse.shape == (2, 105)
    dout = torch.randn_like(out)
    got = torch.autograd.grad(out, (q, k, v), dout)
    for begin, end in zip(cu_seqlens.tolist(), cu_seqlens.tolist()[1:], strict=False):
        parts = [x.detach()[begin:end].double().requires_grad_() for x in (q, k, v)]
        exact, exact_lse = attention(*parts, return_lse=True, backend="reference")
        assert compare(out[begin:end], exact, "gemm") and compare(lse[:, begin:end], exact_lse, "gemm")
        if begin < end:
            gradients = torch.autograd.grad(exact, parts, dout[begin:end].double())
            for x, y in zip(got, gradients, strict=True):
                assert compare(x[begin:end], y, "gemm")


@portable
def test_attention_empty(backend, device):
    """Rows that see no key give zeros, -inf and no gradient; tensors without elements work."""
    q, k, v = make_qkv((1, 2, 2, 70, 30, 16, 16), torch.float32, device)
    nothing = torch.zeros(1, 70, dtype=torch.int32, device=device)
    out, lse = attention(q, k, v, KeyRanges(nothing, nothing), return_lse=True, backend=backend)
    assert (out == 0).all() and (lse == float("-inf")).all()
    for gradient in torch.autograd.grad(out.sum(), (q, k, v)):
        assert (gradient == 0).all()
    if backend == "torch":
        return
    for b, sq, sk in ((0, 4, 4), (1, 0, 4), (1, 4, 0)):
        q, k, v = make_qkv((b, 2, 2, sq, sk, 16, 16), torch.float32, device)
        out, lse = attention(q, k, v, return_lse=True, backend=backend)
        assert (out == 0).all() and (lse == float("-inf")).all() and out.shape == (b, sq, 2, 16)
        gradients = torch.autograd.grad(out.sum(), (q, k, v))
        assert all((g == 0).all() and g.shape == x.shape for g, x in zip(gradients, (q, k, v), strict=True))


@portable
def test_attention_nan_stays(backend, device):
    """NaN in a query reaches its own row; in a key the rows that see it; in padding that nobody sees nothing."""
    q, k, v = (x.detach() for x in make_qkv((1, 2, 2, 70, 140, 16, 16), torch.float32, device))
    ranges = KeyRanges.key_padding(70, lengths=torch.tensor([100], device=device))
    k[0, 100:] = float("nan")
    v[0, 100:] = float("nan")
    for softcap in (0.0, 2.0) if backend != "torch" else (0.0,):
        leaves = [x.clone().requires_grad_() for x in (q, k, v)]
        out = attention(*leaves, ranges, softcap=softcap, backend=backend)
        dq, dk, dv = torch.autograd.grad(out.square().sum(), leaves)
        assert dq.isfinite().all() and all(x[:, :100].isfinite().all() and not x[:, 100:].any() for x in (dk, dv))
    q[0, 3, 1] = float("nan")
    out = attention(q, k, v, ranges, backend=backend)
    expected = torch.zeros(70, 2, dtype=torch.bool, device=device)
    expected[3, 1] = True
    assert torch.equal(out[0].isnan().all(-1), expected) and torch.equal(out[0].isnan().any(-1), expected)


@portable
def test_attention_inputs_unchanged(backend, device):
    shape = (1, 2, 1, 40, 70, 16, 16)
    inputs, ranges = make_qkv(shape, torch.float32, device), make_ranges("random", shape, device)
    before = [x.detach().clone() for x in (*inputs, ranges.start, ranges.stop)]
    run(inputs, ranges, backend, torch.float32)
    assert all(torch.equal(x, y) for x, y in zip((*inputs, ranges.start, ranges.stop), before, strict=True))


def test_attention_causal_and_ranges(device):
    """Both together: the intersection."""
    shape = (1, 1, 1, 50, 60, 16, 16)
    q, k, v = (x.detach() for x in make_qkv(shape, torch.float32, device))
    ranges = make_ranges("random", shape, device)
    i, j = torch.arange(50, device=device)[:, None], torch.arange(60, device=device)
    dense = (j >= ranges.start[0, :, None]) & (j < ranges.stop[0, :, None]) & (j <= i + 10)
    out = attention(q, k, v, ranges, causal=True)
    logits = (q[0, :, 0].double() @ k[0, :, 0].double().T / 4.0).masked_fill(~dense, float("-inf"))
    assert compare(out[0, :, 0], logits.softmax(-1).nan_to_num(0.0) @ v[0, :, 0].double(), "gemm")
    assert torch.equal(attention(q, k, v, ranges, causal=True), out), "a plan would forget one of the two"


def test_attention_reference_gradients(device):
    """The written-out backward is the derivative of the forward, by finite differences."""
    shape = (1, 2, 1, 5, 7, 4, 3)
    inputs = [x.detach().double().requires_grad_() for x in make_qkv(shape, torch.float32, device)]
    ranges = make_ranges("random", shape, device)

    def loss(*inputs):
        out, lse = attention(*inputs, ranges, softcap=1.5, return_lse=True, backend="reference")
        return out, torch.where(torch.isfinite(lse), lse, 0.0)

    assert torch.autograd.gradcheck(loss, inputs)


def refusals() -> dict[str, tuple[str, dict]]:
    x, gaps = torch.zeros(1, 4, 2, 8), torch.zeros(1, 4, 2, 16)[..., ::2]
    range4, range5 = (KeyRanges(torch.zeros(1, n, dtype=torch.int32), torch.ones(1, n, dtype=torch.int32)) for n in (4, 5))
    return {
        "q-2d": ("q: got", dict(q=x[0, 0], k=x, v=x)),
        "k-dim": ("k: got", dict(q=x, k=x[..., :4], v=x)),
        "k-batch": ("k: got", dict(q=x, k=x.expand(2, -1, -1, -1), v=x)),
        "v-length": ("v: got", dict(q=x, k=x, v=x[:, :3])),
        "heads": ("k: got", dict(q=x, k=x.repeat(1, 1, 2, 1)[:, :, :3], v=x.repeat(1, 1, 2, 1)[:, :, :3])),
        "no channels": ("q: got a head dimension of 0", dict(q=x[..., :0], k=x[..., :0], v=x)),
        "no values": ("v: got a head dimension of 0", dict(q=x, k=x, v=x[..., :0])),
        "dtype": ("q: got", dict(q=x.int(), k=x.int(), v=x.int())),
        "mixed": ("v: got", dict(q=x, k=x, v=x.double())),
        **{f"strides of {name}": (f"{name}: got strides", dict(q=x, k=x, v=x) | {name: gaps}) for name in "qkv"},
        **{f"softcap {cap}": ("softcap: got", dict(q=x, k=x, v=x, softcap=cap)) for cap in (-1.0, math.inf, math.nan)},
        "ranges": ("ranges: got", dict(q=x, k=x, v=x, ranges=range5)),
        "ranges elsewhere": ("ranges: got on meta, wanted on q's cpu", dict(q=x, k=x, v=x, ranges=range4.to("meta"))),
        "backend": ("backend: got", dict(q=x, k=x, v=x, ranges=range4, backend="numpy")),
    }


@pytest.mark.parametrize("case", refusals())
def test_attention_refuses(case):
    message, arguments = refusals()[case]
    with pytest.raises(ValueError, match=message):
        attention(**arguments)


def test_attention_forced_backend_says_why(device):
    x = torch.zeros(1, 4, 2, 12, device=device)
    with pytest.raises(BackendError, match="head dims of 8 to 256 in steps of 8, these are 12 and 12"):
        attention(x, x, x, backend="triton")
    with pytest.raises(BackendError, match="softcap"):
        attention(x, x, x, softcap=1.0, backend="torch")


def test_attention_negative_scale(device):
    q = torch.randn(1, 20, 2, 16, device=device)
    assert compare(attention(q, q, q, scale=-0.3), attention(*[q.double()] * 3, scale=-0.3, backend="reference"), "gemm")
    if "triton" in runnable("attention_fwd"):
        with pytest.raises(BackendError, match="positive scale"):
            attention(q, q, q, scale=-0.3, backend="triton")


def test_attention_second_derivative_refused(device):
    q, k, v = make_qkv((1, 1, 1, 4, 4, 8, 8), torch.float32, device)
    (gradient,) = torch.autograd.grad(attention(q, k, v).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@portable
@pytest.mark.parametrize("mask", ["dense", "random"])
def test_attention_opcheck(backend, mask, device):
    shape = (1, 2, 1, 20, 30, 16, 8)
    q, k, v = (x.detach() for x in make_qkv(shape, torch.float32, device))
    ranges = make_ranges(mask, shape, device)
    settings = (ranges and ranges.start, ranges and ranges.stop, False, 0.25, 0.0)
    torch.library.opcheck(torch.ops.vlmkernels.attention_fwd.default, (q, k, v, *settings, True, backend))
    out, lse = torch.ops.vlmkernels.attention_fwd(q, k, v, *settings, True, backend)
    args = (torch.randn_like(out), None, q, k, v, out, lse, *settings, backend)
    torch.library.opcheck(torch.ops.vlmkernels.attention_bwd.default, args)


def test_attention_opcheck_fp64(device):
    q, k, v = (x.detach().double() for x in make_qkv((1, 2, 1, 5, 7, 16, 8), torch.float32, device))
    torch.library.opcheck(torch.ops.vlmkernels.attention_fwd.default, (q, k, v, None, None, False, 0.25, 0.0, True, "reference"))


@portable
@pytest.mark.parametrize("tokens", [(2, 20), (33,), (0, 5), (2, 0)], ids=str)
@pytest.mark.parametrize("mask", ["dense", "causal", "random", "random causal"])
def test_attention_qkvpacked(backend, mask, tokens, device):
    """As of heads one by one, with gradients of q, k and v that are one matrix; also from rows of others' columns."""
    heads, kv_heads, dim = 4, 2, 16
    wide = torch.randn(*tokens, 8 * dim + 3, device=device, requires_grad=True)
    rows = (1, *tokens) if len(tokens) == 1 else tokens
    ranges = make_ranges("random", (rows[0], heads, kv_heads, rows[1], rows[1], dim, dim), device) if "random" in mask else None
    options = {"causal": "causal" in mask, "scale": 0.3, "backend": "" if backend == "torch" and 0 in tokens else backend}
    got = attention_qkvpacked(wide[..., :-3], heads, kv_heads, ranges, **options)
    parts = wide[..., :-3].unflatten(-1, (8, dim)).split((4, 2, 2), -2)
    wanted = attention(*parts, ranges, **options).flatten(-2)
    assert got.is_contiguous() and compare(got, wanted.double(), "gemm")
    with torch.no_grad():
        assert compare(attention_qkvpacked(wide[..., :-3], heads, kv_heads, ranges, **options), wanted.double(), "gemm")
    for dout in (torch.randn_like(got), torch.ones(1, 1, device=device).expand(got.shape)):  # the second as of a sum
        (exact,), (dqkv,) = (torch.autograd.grad(y, wide, dout, retain_graph=True) for y in (wanted, got))
        assert compare(dqkv, exact.double(), "grad")
    with pytest.raises(RuntimeError, match="once_differentiable"):
        torch.autograd.grad(got.square().sum(), wide, create_graph=True)[0].sum().backward()


def test_attention_qkvpacked_refuses(device):
    for qkv, heads in (((2, 3, 30), (4, 2)), ((3, 2, 3, 64), (4, 2)), ((2, 3, 64), (0, 2))):
        with pytest.raises(ValueError, match="qkv: got shape"):
            attention_qkvpacked(torch.zeros(qkv, device=device), *heads)
    for qkv, ranges in (((2, 3, 64), KeyRanges.causal(4, 4, device=device)), ((5, 64), KeyRanges.causal(3, 3, device=device))):
        for learns in (False, True):
            with pytest.raises(ValueError, match="ranges: got shape"):
                attention_qkvpacked(torch.zeros(qkv, device=device, requires_grad=learns), 4, 2, ranges)


@pytest.mark.backends("attention_bwd_together")
@pytest.mark.parametrize("mask", ["dense", "random"])
def test_gradients_of_one_row_opcheck(backend, mask, device):
    """As those that come one by one, beside each other."""
    shape, dtype = (2, 4, 2, 140, 140, 64, 64), torch.bfloat16 if backend == "cuda" else torch.float32
    q, k, v = (x.detach() for x in make_qkv(shape, dtype, device))
    ranges = make_ranges(mask, shape, device)
    settings = (ranges and ranges.start, ranges and ranges.stop, False, 0.25, 0.0)
    out, lse = torch.ops.vlmkernels.attention_fwd(q, k, v, *settings, True, backend)
    args = (torch.randn_like(out), None, q, k, v, out, lse, *settings, backend)
    op = torch.ops.vlmkernels.attention_bwd_together.default
    torch.library.opcheck(op, args, test_utils=("test_schema", "test_faketensor"))
    dq, dkv = torch.ops.vlmkernels.attention_bwd(*args)
    one_by_one = [dq, *(x.view(k.shape) for x in dkv.split((k.numel(), v.numel())))]
    for got, wanted in zip(op(*args).unflatten(2, (8, 64)).split((4, 2, 2), 2), one_by_one, strict=True):
        assert compare(got, wanted.double(), "grad")


@portable
def test_attention_compiles(backend, device):
    shape = (1, 2, 1, 20, 30, 16, 8)
    inputs, ranges = make_qkv(shape, torch.float32, device), make_ranges("random", shape, device)

    def loss(q, k, v):
        return attention(q, k, v, ranges, backend=backend).square().sum()

    expected = torch.autograd.grad(loss(*inputs), inputs)
    compiled = torch.compile(loss, fullgraph=True, backend="inductor" if ON_GPU else "aot_eager")
    for x, y in zip(torch.autograd.grad(compiled(*inputs), inputs), expected, strict=True):
        assert compare(x, y.double(), "gemm")


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["causal", "random"])
def test_attention_cuda_graph(mask, device):
    """Forward and backward in one graph, replayed with other contents, masks included."""
    shape = (2, 4, 2, 300, 300, 64, 64)
    inputs, ranges = make_qkv(shape, torch.bfloat16, device), make_ranges(mask, shape, device)

    def step():
        return torch.autograd.grad(attention(*inputs, ranges, causal=mask == "causal").sum(), inputs)

    captured, called = replayed(step, inputs, ranges, mask, shape)
    for x, y in zip(captured, called, strict=True):
        assert torch.equal(x, y)


@pytest.mark.gpu
@pytest.mark.parametrize("where", ["q", "k"])
def test_attention_offsets_past_2_31(where, device):
    """Rows so far apart that the last one lies past 2^31 elements."""
    s, d = 300, 64
    wide = torch.empty(s * (1 << 23), dtype=torch.bfloat16, device=device)
    far = wide.as_strided((1, s, 1, d), (0, 1 << 23, d, 1)).normal_()
    near = torch.randn(1, s, 1, d, dtype=torch.bfloat16, device=device)
    inputs = [far, near, near] if where == "q" else [near, far, far]
    check(inputs, None, "triton")


@pytest.mark.backends(*OPS, exclude=("cuda", "torch"))
def test_attention_deterministic(backend, device):
    shape = (1, 4, 2, 100, 100, 64, 64)
    inputs, ranges = make_qkv(shape, torch.bfloat16, device), make_ranges("random", shape, device)
    for x, y in zip(*(run(inputs, ranges, backend, torch.bfloat16) for _ in range(2)), strict=True):
        assert torch.equal(x, y)


def test_attention_default_scale(device):
    q, k, v = make_qkv((1, 1, 1, 9, 9, 40, 40), torch.float32, device)
    assert torch.equal(attention(q, k, v), attention(q, k, v, scale=1 / math.sqrt(40)))

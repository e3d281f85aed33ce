# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of attention's backward for few queries against the fp64 reference: every tile, masks, splits, its refusals."""

import pytest
import torch
from test_attention import MASKS, make_qkv, make_ranges, replayed

from vlmkernels import BackendError, KeyRanges, attention
from vlmkernels.ops.attention import _gradients
from vlmkernels.testing import compare
from vlmkernels.testing.inputs import QKV_VIEWS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_library")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# B, H, Hk, Sq, Sk, D, Dv
SHAPES = {
    "qformer-S32x257-D64": (3, 12, 12, 32, 257, 64, 64),
    "resampler-S64x321-D96": (2, 16, 16, 64, 321, 96, 96),
    "resampler-S64x1024-D128": (2, 4, 4, 64, 1024, 128, 128),
    "minicpm-S96x700-D128": (1, 4, 4, 96, 700, 128, 128),
    "pooling-S1x729-D72": (3, 4, 4, 1, 729, 72, 72),
    "gqa-S30x130-D64": (1, 8, 2, 30, 130, 64, 64),
    "mqa-S17x99-D40": (2, 7, 1, 17, 99, 40, 40),
    "gqa-S20x200-D88": (2, 6, 3, 20, 200, 88, 88),
    "more-queries-than-keys": (2, 2, 2, 100, 30, 128, 128),
}


def gradients(inputs, ranges=None, *, causal=False, scale=0.2, softcap=0.0, with_dlse=False, dout=None, compute=_gradients):
    """dQ, dK and dV by the kernel and exactly, both from what the exact forward pass gives, rounded."""
    q, k, v = (x.detach() for x in inputs)
    exact_inputs = [x.double().requires_grad_() for x in (q, k, v)]
    options = dict(causal=causal, scale=scale, softcap=softcap, return_lse=True, backend="reference")
    out, lse = attention(*exact_inputs, ranges, **options)
    dout = torch.randn_like(out).to(q.dtype) if dout is None else dout
    dlse = torch.randn(lse.shape, device=q.device) if with_dlse else None
    start, stop = (None, None) if ranges is None else (ranges.start, ranges.stop)
    results = out.detach().to(q.dtype), lse.detach().float()
    got = compute(dout, dlse, q, k, v, *results, start, stop, causal, scale, softcap, "cuda")
    incoming = [dout.double(), torch.zeros_like(lse) if dlse is None else dlse.double()]
    return got, torch.autograd.grad([out, lse], exact_inputs, incoming)


def check(inputs, ranges=None, terms=0.0, **options):
    got, exact = gradients(inputs, ranges, **options)
    for name, x, y in zip(("dq", "dk", "dv"), got, exact, strict=True):
        result = compare(x, y, "grad", terms=terms)
        assert result, f"{name}: {result}"


def check_unseen(inputs, ranges, unseen, softcap=0.0):
    """Keys that no query sees may hold anything: they get zeros as gradients, and nothing comes of them."""
    q, k, v = inputs
    dout = torch.randn(*q.shape[:3], v.shape[3], device=q.device).bfloat16()
    clean, _ = gradients(inputs, ranges, dout=dout, softcap=softcap)
    k[unseen], v[unseen] = float("nan"), float("inf")
    out, lse = attention(q, k, v, ranges, return_lse=True, scale=0.2, softcap=softcap, backend="reference")
    got = _gradients(dout, None, q, k, v, out, lse, ranges.start, ranges.stop, False, 0.2, softcap, "cuda")
    for x, y in zip(got, clean, strict=True):
        assert compare(x, y.double(), "grad")
    assert (got[0][1, 3] == 0).all() and (got[1][unseen] == 0).all() and (got[2][unseen] == 0).all()


def check_nan_stays_in_its_head(queries, where, device, alike):
    """What has nothing to do with the NaN is ``alike`` without it."""
    q, k, v = (x.detach() for x in make_qkv((2, 4, 2, queries, 200, 64, 64), torch.bfloat16, device))
    dout = torch.randn(2, queries, 4, 64, device=device).bfloat16()
    clean, _ = gradients((q, k, v), dout=dout)
    x = {"q": q, "k": k, "v": v, "dout": dout}[where]
    x[1, 17, 1] = float("nan")
    got, _ = gradients((q, k, v), dout=dout)
    key_head = 0 if where in ("q", "dout") else 1
    for result, before, heads in zip(got, clean, (2, 1, 1), strict=True):
        spoiled = torch.zeros(result.shape, dtype=torch.bool, device=device)
        spoiled[1, :, key_head * heads : (key_head + 1) * heads] = True
        assert alike(result[~spoiled], before[~spoiled])
    assert all(result[1].isnan().any() for result in got[:2])


def check_offsets_past_2_31(where, far_rows, near_rows, device):
    """Rows so far apart that the last one lies past 2^31 elements."""
    step = (1 << 31) // (far_rows - 1) // 8 * 8 + 8
    wide = torch.empty(far_rows * step, dtype=torch.bfloat16, device=device)
    far = wide.as_strided((1, far_rows, 1, 64), (0, step, 64, 1)).normal_()
    near = torch.randn(1, near_rows, 1, 64, dtype=torch.bfloat16, device=device)
    check([far, near, near] if where == "q" else [near, far, far])


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients(shape, dtype, mask, device):
    inputs, ranges = make_qkv(shape, DTYPES[dtype], device), make_ranges(mask, shape, device)
    check(inputs, ranges, causal=mask == "causal", with_dlse=True)


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 257, 577, 1025])
@pytest.mark.parametrize("queries", [1, 5, 31, 32, 33, 64, 65, 127, 128])
def test_lengths(queries, keys, device):
    for dim in (64, 128):
        # The weight of an only key is 1, whatever its logit: dQ and dK are zero, as dP - delta is.
        terms = 0.2 * dim**0.5 if keys == 1 else 0.0
        check(make_qkv((2, 2, 2, queries, keys, dim, dim), torch.bfloat16, device), terms=terms)


@pytest.mark.parametrize("dim", range(8, 136, 8))
def test_every_head_dim(dim, device):
    for dtype in DTYPES.values():
        for queries in (9, 30, 50, 100):
            shape = (2, 2, 2, queries, 333, dim, dim)
            check(make_qkv(shape, dtype, device), make_ranges("random", shape, device))


@pytest.mark.parametrize("queries", [1, 32, 64, 128])
@pytest.mark.parametrize("batch", [1, 20, 40, 60, 120, 300])
def test_splits(batch, queries, device):
    """Where heads are few, up to eight blocks share out the keys of one: dQ is summed over these, always in one order."""
    shape = (batch, 3, 3, queries, 600, 64, 64)
    inputs = make_qkv(shape, torch.bfloat16, device)
    dout = torch.randn(batch, queries, 3, 64, device=device).bfloat16()
    ranges = make_ranges("random", shape, device)
    got, exact = gradients(inputs, ranges, dout=dout)
    for x, y in zip(got, exact, strict=True):
        assert compare(x, y, "grad")
    for x, y in zip(gradients(inputs, ranges, dout=dout)[0], got, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("view", QKV_VIEWS)
def test_views(view, device):
    """As they come of fused projections; rows at odd addresses are refused, and go to another backend."""
    inputs = QKV_VIEWS[view]((2, 30, 130, 4, 2, 72), torch.bfloat16, device)
    if view == "offset":
        with pytest.raises(BackendError, match="multiples of 16 bytes"):
            gradients(inputs)
    else:
        check(inputs)


@pytest.mark.parametrize("dout", ["transposed", "strided", "expanded", "odd", "offset"])
def test_incoming_gradients(dout, device):
    inputs = make_qkv((2, 4, 4, 30, 130, 64, 64), torch.bfloat16, device)
    wide = torch.randn(2, 60, 4, 72, device=device).bfloat16()
    given = {
        "transposed": torch.randn(2, 4, 30, 64, device=device).bfloat16().transpose(1, 2),
        "strided": wide[:, ::2, :, 8:],
        "expanded": wide[:, :1, :, 8:].expand(-1, 30, -1, -1),
        "odd": wide[:, ::2, :, 1:65],
        "offset": wide.flatten()[1 : 1 + 2 * 30 * 4 * 64].view(2, 30, 4, 64),
    }
    check(inputs, dout=given[dout])


def padded(device, dim):
    shape = (2, 4, 2, 20, 300, dim, dim)
    inputs = [x.detach() for x in make_qkv(shape, torch.bfloat16, device)]
    start = torch.tensor([70, 0], device=device, dtype=torch.int32)[:, None].expand(2, 20).contiguous()
    stop = torch.tensor([100, 200], device=device, dtype=torch.int32)[:, None].expand(2, 20).contiguous()
    stop[1, 3] = 0  # sees nothing
    return inputs, KeyRanges(start, stop)


@pytest.mark.parametrize("dim", [64, 96, 128])
def test_padding_of_nan(dim, device):
    inputs, ranges = padded(device, dim)
    unseen = torch.ones(2, 300, dtype=torch.bool, device=device)
    unseen[0, 70:100], unseen[1, :200] = False, False
    check_unseen(inputs, ranges, unseen)


@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_nan_stays_in_its_head(where, device):
    check_nan_stays_in_its_head(30, where, device, torch.equal)


def test_nothing_to_see(device):
    inputs = make_qkv((1, 2, 2, 20, 70, 64, 64), torch.bfloat16, device)
    nothing = torch.zeros(1, 20, dtype=torch.int32, device=device)
    for ranges in (KeyRanges(nothing, nothing), KeyRanges(nothing + 80, nothing + 90), KeyRanges(nothing + 9, nothing + 3)):
        got, _ = gradients(inputs, ranges, with_dlse=True)
        assert all((x == 0).all() for x in got)
    for b, sq, sk in ((0, 4, 4), (1, 0, 4), (1, 4, 0)):
        got, _ = gradients(make_qkv((b, 2, 2, sq, sk, 16, 16), torch.bfloat16, device))
        assert all((x == 0).all() for x in got) and got[0].shape == (b, sq, 2, 16)


def test_large_logits(device):
    """Weights of nearly 1 and 0. From the rounded output, whose error dominates here, on both sides."""
    q, k, v = (x.detach() for x in make_qkv((1, 2, 2, 20, 550, 64, 64), torch.bfloat16, device))
    q, dout = q * 30, torch.randn(1, 20, 2, 64, device=device).bfloat16()
    for keys, values in ((k, v), (k.flip(1), v.flip(1))):
        out, lse = attention(q, keys, values, scale=0.2, return_lse=True, backend="reference")
        settings = (None, None, False, 0.2, 0.0)
        got = _gradients(dout, None, q, keys, values, out, lse, *settings, "cuda")
        exact = _gradients(dout.double(), None, *(x.double() for x in (q, keys, values, out, lse)), *settings, "reference")
        for x, y in zip(got, exact, strict=True):
            assert compare(x, y, "grad")


@pytest.mark.parametrize("where", ["q", "k"])
def test_offsets_past_2_31(where, device):
    check_offsets_past_2_31(where, 300 if where == "k" else 128, 128, device)


def test_inputs_unchanged(device):
    inputs, ranges = padded(device, 64)
    dout = torch.randn(2, 20, 4, 64, device=device).bfloat16()
    before = [x.clone() for x in (*inputs, dout, ranges.start, ranges.stop)]
    gradients(inputs, ranges, dout=dout)
    assert all(torch.equal(x, y) for x, y in zip((*inputs, dout, ranges.start, ranges.stop), before, strict=True))


def test_cuda_graph(device):
    """Replayed with other contents, ranges included."""
    shape = (2, 4, 2, 30, 300, 64, 64)
    inputs, ranges = make_qkv(shape, torch.bfloat16, device), make_ranges("random", shape, device)

    def step():
        return torch.autograd.grad(attention(*inputs, ranges, backend="cuda").sum(), inputs)

    captured, called = replayed(step, inputs, ranges, "random", shape)
    for x, y in zip(captured, called, strict=True):
        assert torch.equal(x, y)


def test_it_is_chosen(device):
    inputs = make_qkv(SHAPES["qformer-S32x257-D64"], torch.bfloat16, device)
    dout = torch.randn(3, 32, 12, 64, device=device).bfloat16()
    chosen, forced = (
        torch.autograd.grad(attention(*inputs, backend=backend), inputs, dout, retain_graph=True) for backend in (None, "cuda")
    )
    assert all(torch.equal(x, y) for x, y in zip(chosen, forced, strict=True))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_softcap(shape, mask, device):
    """It is the other kernel's, for any number of queries."""
    inputs, ranges = make_qkv(shape, torch.bfloat16, device), make_ranges(mask, shape, device)
    check(inputs, ranges, causal=mask == "causal", softcap=2.0, with_dlse=True)

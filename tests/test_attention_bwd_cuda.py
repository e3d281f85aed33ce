# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of attention's backward against the fp64 reference: whole heads and shared ones, masks, its refusals."""

import pytest
import torch
from test_attention import MASKS, make_qkv, make_ranges
from test_attention_bwd_few_cuda import DTYPES, check, gradients

from vlmkernels import BackendError, KeyRanges, attention
from vlmkernels.ops.attention import _bwd
from vlmkernels.testing import compare
from vlmkernels.testing.inputs import QKV_VIEWS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_library")]

# B, H, Hk, Sq, Sk, D, Dv. Heads that fill an H100 or H200 are taken whole, others shared among blocks.
WHOLE = {
    "vit-S197-D64": (44, 3, 3, 197, 197, 64, 64),
    "siglip-S300-D72": (33, 4, 4, 300, 300, 72, 72),
    "gqa-S130x290-D80": (33, 8, 4, 130, 290, 80, 80),
    "one-tile-S130x100-D40": (132, 1, 1, 130, 100, 40, 40),
}
SHARED = {
    "clip-S577-D64": (2, 4, 4, 577, 577, 64, 64),
    "siglip-S729-D72": (2, 4, 4, 729, 729, 72, 72),
    "qwen-S1000-D80": (1, 4, 4, 1000, 1000, 80, 80),
    "gqa-S515x1030-D64": (1, 8, 2, 515, 1030, 64, 64),
    "mqa-S300x70-D16-Dv8": (1, 3, 1, 300, 70, 16, 8),
    "odd-S300-D40-Dv64": (2, 2, 2, 300, 300, 40, 64),
    "more-queries-than-keys": (2, 2, 2, 500, 30, 80, 80),
}
SHAPES = WHOLE | SHARED


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients(shape, dtype, mask, device):
    inputs, ranges = make_qkv(shape, DTYPES[dtype], device), make_ranges(mask, shape, device)
    check(inputs, ranges, causal=mask == "causal", with_dlse=True)


@pytest.mark.parametrize("keys", [1, 64, 65, 127, 128, 129, 257, 400])
@pytest.mark.parametrize("queries", [129, 191, 192, 193, 257, 321])
def test_lengths(queries, keys, device):
    # The weight of an only key is 1, whatever its logit: dQ and dK are zero, as dP - delta is.
    terms = 0.2 * 64**0.5 if keys == 1 else 0.0
    for batch in (1, 66):
        check(make_qkv((batch, 2, 2, queries, keys, 64, 64), torch.bfloat16, device), terms=terms)


@pytest.mark.parametrize("dim", range(8, 88, 8))
def test_every_head_dim(dim, device):
    for dtype in DTYPES.values():
        for batch in (2, 66):
            shape = (batch, 2, 2, 140, 333, dim, dim)
            check(make_qkv(shape, dtype, device), make_ranges("random", shape, device))


@pytest.mark.parametrize("shape", WHOLE.values(), ids=WHOLE.keys())
@pytest.mark.parametrize("mask", ["dense", "random"])
def test_whole_heads_give_the_same_bits(shape, mask, device):
    inputs, ranges = make_qkv(shape, torch.bfloat16, device), make_ranges(mask, shape, device)
    dout = torch.randn(*inputs[0].shape[:3], shape[-1], device=device).bfloat16()
    first = gradients(inputs, ranges, dout=dout)[0]
    for _ in range(3):
        assert all(torch.equal(x, y) for x, y in zip(gradients(inputs, ranges, dout=dout)[0], first, strict=True))


def test_deterministic_algorithms(device):
    """Where blocks share heads, another backend takes the call that must be the same in every run."""
    q, k, v = make_qkv((1, 2, 2, 2000, 2000, 64, 64), torch.bfloat16, device)
    torch.use_deterministic_algorithms(True)
    try:
        out = attention(q, k, v)
        dout = torch.randn_like(out)
        first = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
        for _ in range(3):
            again = torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))
        with pytest.raises(BackendError, match="the same bits in every run"):
            torch.autograd.grad(attention(q, k, v, backend="cuda"), (q, k, v), dout)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("view", QKV_VIEWS)
def test_views(view, device):
    """As they come of fused projections; rows at odd addresses are refused, and go to another backend."""
    inputs = QKV_VIEWS[view]((2, 140, 230, 4, 2, 72), torch.bfloat16, device)
    if view == "offset":
        with pytest.raises(BackendError, match="multiples of 16 bytes"):
            gradients(inputs)
    else:
        check(inputs)


@pytest.mark.parametrize("batch", [2, 66])
@pytest.mark.parametrize("dim", [64, 80])
def test_padding_of_nan(batch, dim, device):
    """Keys that no query sees may hold anything: they get zeros as gradients, and nothing comes of them."""
    shape = (batch, 4, 2, 150, 300, dim, dim)
    q, k, v = (x.detach() for x in make_qkv(shape, torch.bfloat16, device))
    ranges = KeyRanges(*(torch.full((batch, 150), x, device=device, dtype=torch.int32) for x in (70, 210)))
    ranges.stop[1, 3] = 0  # sees nothing
    dout = torch.randn(batch, 150, 4, dim, device=device).bfloat16()
    clean, _ = gradients((q, k, v), ranges, dout=dout)
    unseen = torch.ones(batch, 300, dtype=torch.bool, device=device)
    unseen[:, 70:210] = False
    k[unseen], v[unseen] = float("nan"), float("inf")
    out, lse = attention(q, k, v, ranges, return_lse=True, scale=0.2, backend="reference")
    got = _bwd(dout, None, q, k, v, out, lse, ranges.start, ranges.stop, False, 0.2, 0.0, "cuda")
    for x, y in zip(got, clean, strict=True):
        assert compare(x, y.double(), "grad")
    assert (got[0][1, 3] == 0).all() and (got[1][unseen] == 0).all() and (got[2][unseen] == 0).all()


@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_nan_stays_in_its_head(where, device):
    q, k, v = (x.detach() for x in make_qkv((2, 4, 2, 150, 200, 64, 64), torch.bfloat16, device))
    dout = torch.randn(2, 150, 4, 64, device=device).bfloat16()
    clean, _ = gradients((q, k, v), dout=dout)
    x = {"q": q, "k": k, "v": v, "dout": dout}[where]
    x[1, 17, 1] = float("nan")
    got, _ = gradients((q, k, v), dout=dout)
    key_head = 0 if where in ("q", "dout") else 1
    for result, before, heads in zip(got, clean, (2, 1, 1), strict=True):
        spoiled = torch.zeros(result.shape, dtype=torch.bool, device=device)
        spoiled[1, :, key_head * heads : (key_head + 1) * heads] = True
        assert compare(result[~spoiled], before[~spoiled].double(), "grad")
    assert all(result[1].isnan().any() for result in got[:2])


@pytest.mark.parametrize("batch", [1, 66])
def test_nothing_to_see(batch, device):
    inputs = make_qkv((batch, 2, 2, 140, 170, 64, 64), torch.bfloat16, device)
    nothing = torch.zeros(1, 140, dtype=torch.int32, device=device)
    for ranges in (KeyRanges(nothing, nothing), KeyRanges(nothing + 180, nothing + 190), KeyRanges(nothing + 9, nothing + 3)):
        got, _ = gradients(inputs, ranges, with_dlse=True)
        assert all((x == 0).all() for x in got)


@pytest.mark.parametrize("where", ["q", "k"])
def test_offsets_past_2_31(where, device):
    """Rows so far apart that the last one lies past 2^31 elements."""
    s, d = 300, 64
    step = (1 << 31) // (s - 1) // 8 * 8 + 8
    wide = torch.empty(s * step, dtype=torch.bfloat16, device=device)
    far = wide.as_strided((1, s, 1, d), (0, step, d, 1)).normal_()
    near = torch.randn(1, 200, 1, d, dtype=torch.bfloat16, device=device)
    check([far, near, near] if where == "q" else [near, far, far])


@pytest.mark.parametrize("batch", [2, 66])
def test_cuda_graph(batch, device):
    """Replayed with other contents, ranges included."""
    shape = (batch, 4, 2, 150, 300, 64, 64)
    inputs, ranges = make_qkv(shape, torch.bfloat16, device), make_ranges("random", shape, device)

    def step():
        return torch.autograd.grad(attention(*inputs, ranges, backend="cuda").sum(), inputs)

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        for x in inputs:
            x.normal_()
        other = make_ranges("random", shape, device)
        ranges.start.copy_(other.start)
        ranges.stop.copy_(other.stop)
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert compare(x, y.double(), "grad")


@pytest.mark.parametrize(
    "shape, softcap, reason",
    [
        ((1, 2, 2, 200, 40, 136, 136), 0.0, "takes head dims of 8 to 80 in steps of 8, this is 136"),
        ((1, 2, 2, 200, 40, 64, 64), 5.0, "takes no softcap"),
    ],
)
def test_refusals(shape, softcap, reason, device):
    """Each goes to another backend where none is forced."""
    inputs = make_qkv(shape, torch.bfloat16, device)
    out = attention(*inputs, softcap=softcap, backend="cuda")
    with pytest.raises(BackendError, match=f"cuda: the backward {reason}"):
        torch.autograd.grad(out.sum(), inputs)
    got = torch.autograd.grad(attention(*inputs, softcap=softcap).sum(), inputs)
    assert all(x.isfinite().all() for x in got)

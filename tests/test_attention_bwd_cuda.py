# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of attention's backward against the fp64 reference: whole heads and shared ones, masks, its refusals."""

import contextlib

import pytest
import torch
from test_attention import MASKS, make_qkv, make_ranges, replayed
from test_attention_bwd_few_cuda import (
    DTYPES,
    check,
    check_nan_stays_in_its_head,
    check_offsets_past_2_31,
    check_unseen,
    gradients,
)

from vlmkernels import BackendError, KeyRanges, attention
from vlmkernels.ops._op import OPS
from vlmkernels.ops.attention import attention_qkvpacked
from vlmkernels.testing import compare
from vlmkernels.testing.inputs import QKV_VIEWS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_library")]

# B, H, Hk, Sq, Sk, D, Dv. Heads that fill an H100 or H200 are taken whole, others shared among blocks.
WHOLE = {
    "vit-S197-D64": (44, 3, 3, 197, 197, 64, 64),
    "siglip-S300-D72": (33, 4, 4, 300, 300, 72, 72),
    "gqa-S130x290-D80": (33, 8, 4, 130, 290, 80, 80),
    "one-tile-S130x100-D40": (132, 1, 1, 130, 100, 40, 40),
    "eva-S257-D88": (33, 4, 4, 257, 257, 88, 88),
    "gqa-S190x290-D128": (33, 8, 4, 190, 290, 128, 128),
    "S190x290-D192": (33, 4, 4, 190, 290, 192, 192),
    "S190x290-D256": (33, 4, 4, 190, 290, 256, 256),
}
SHARED = {
    "clip-S577-D64": (2, 4, 4, 577, 577, 64, 64),
    "siglip-S729-D72": (2, 4, 4, 729, 729, 72, 72),
    "qwen-S1000-D80": (1, 4, 4, 1000, 1000, 80, 80),
    "gqa-S515x1030-D64": (1, 8, 2, 515, 1030, 64, 64),
    "perceiver-S515x577-D96": (2, 3, 3, 515, 577, 96, 96),
    "llama-S600-D128": (1, 8, 2, 600, 600, 128, 128),
    "gemma-S600-D256": (1, 8, 4, 600, 600, 256, 256),
    "S515x577-D192-Dv136": (2, 3, 3, 515, 577, 192, 136),
    "wide-values-S300-D64-Dv128": (2, 2, 2, 300, 300, 64, 128),
    "mqa-S300x70-D16-Dv8": (1, 3, 1, 300, 70, 16, 8),
    "odd-S300-D40-Dv64": (2, 2, 2, 300, 300, 40, 64),
    "more-queries-than-keys": (2, 2, 2, 500, 30, 80, 80),
    # Of few heads of keys, whose query heads are shared out.
    "gqa-S700-D128": (1, 28, 4, 700, 700, 128, 128),
    "gqa-S300x400-D72": (1, 6, 2, 300, 400, 72, 72),
    "mqa-S300x257-D88": (1, 4, 1, 300, 257, 88, 88),
    "gqa-S300x290-D96": (2, 6, 2, 300, 290, 96, 96),
    "mqa-S300-D160": (1, 8, 1, 300, 300, 160, 160),
    "mqa-S300-D256": (1, 8, 1, 300, 300, 256, 256),
    # So many heads that some blocks clear the sums of dQ for others; and so few rounds that they are not taken whole.
    "many-S200x300-D64": (35, 4, 4, 200, 300, 64, 64),
    "many-S200x300-D72": (35, 4, 4, 200, 300, 72, 72),
    "many-S150x300-D88": (35, 4, 4, 150, 300, 88, 88),
    "many-S150x300-D96": (35, 4, 4, 150, 300, 96, 96),
    "many-gqa-S200x600-D128": (35, 8, 4, 200, 600, 128, 128),
    "many-S150x200-D192": (35, 4, 4, 150, 200, 192, 192),
    "many-gqa-S150x200-D256": (35, 8, 4, 150, 200, 256, 256),
}
SHAPES = WHOLE | SHARED


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_gradients(shape, dtype, mask, device):
    inputs, ranges = make_qkv(shape, DTYPES[dtype], device), make_ranges(mask, shape, device)
    check(inputs, ranges, causal=mask == "causal", with_dlse=True)


@pytest.mark.parametrize("keys", [1, 64, 65, 127, 128, 129, 136, 137, 257, 400])
@pytest.mark.parametrize("queries", [129, 191, 192, 193, 257, 321])
@pytest.mark.parametrize("dim", [64, 72, 80, 88, 96, 128, 256])
def test_lengths(dim, queries, keys, device):
    # The weight of an only key is 1, whatever its logit: dQ and dK are zero, as dP - delta is.
    terms = 0.2 * dim**0.5 if keys == 1 else 0.0
    for batch in (1, 66):
        check(make_qkv((batch, 2, 2, queries, keys, dim, dim), torch.bfloat16, device), terms=terms)


@pytest.mark.parametrize("dim", range(8, 264, 8))
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


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def forced(shape, device):
    """Inputs, what the kernel makes of them, what comes back to that, and the gradients."""
    inputs = make_qkv(shape, torch.bfloat16, device)
    out = attention(*inputs, backend="cuda")
    dout = torch.randn_like(out)
    return inputs, out, dout, torch.autograd.grad(out, inputs, dout, retain_graph=True)


def gradients_four_times(out, inputs, dout):
    """The same bits each time."""
    first, *others = (torch.autograd.grad(out, inputs, dout, retain_graph=True) for _ in range(4))
    assert all(torch.equal(x, y) for again in others for x, y in zip(first, again, strict=True))
    return first


def test_deterministic_algorithms(device):
    """Where blocks share heads, another backend takes the call that must be the same in every run."""
    q, k, v = make_qkv((1, 2, 2, 2000, 2000, 64, 64), torch.bfloat16, device)
    with deterministic():
        out = attention(q, k, v)
        dout = torch.randn_like(out)
        gradients_four_times(out, (q, k, v), dout)
        with pytest.raises(BackendError, match="the same bits in every run"):
            torch.autograd.grad(attention(q, k, v, backend="cuda"), (q, k, v), dout)


@pytest.mark.parametrize("dim", [72, 96])
def test_deterministic_heads_are_whole(dim, device):
    """Of these, which blocks share otherwise, a block has whole ones where the result must be the same in every run."""
    inputs, out, dout, shared = forced((33, 4, 4, 577, 577, dim, dim), device)
    with deterministic():
        whole = gradients_four_times(out, inputs, dout)
    assert all(compare(x, y.double(), "grad") for x, y in zip(whole, shared, strict=True))


SAME_TOKENS = {
    **{name: shape for name, shape in SHAPES.items() if shape[3] == shape[4]},
    "few-S77-D64": (3, 12, 12, 77, 77, 64, 64),
    "few-gqa-S30-D128": (2, 8, 2, 30, 30, 128, 128),
    "few-of-many-S50-D88": (40, 4, 4, 50, 50, 88, 88),
}


def in_one_row(dout, dlse, q, k, v, *rest):
    """dQ, dK and dV as ``attention_bwd_together`` has them."""
    rows, widths = OPS["attention_bwd_together"](dout, dlse, q, k, v, *rest), [x.shape[2] * x.shape[3] for x in (q, k, v)]
    assert rows.shape == (*q.shape[:2], sum(widths)) and rows.is_contiguous()
    return [part.unflatten(2, x.shape[2:]) for part, x in zip(rows.split(widths, 2), (q, k, v), strict=True)]


@pytest.mark.parametrize("mask", ["dense", "causal", "random"])
@pytest.mark.parametrize("shape", SAME_TOKENS.values(), ids=SAME_TOKENS.keys())
def test_gradients_of_one_row(shape, mask, device):
    """Of q, k and v beside each other, as one product gives them."""
    batch, heads, kv_heads, tokens, _, dim, value_dim = shape
    sizes = [(heads, dim), (kv_heads, dim), (kv_heads, value_dim)]
    widths = [number * width for number, width in sizes]
    rows = torch.randn(batch, tokens, sum(widths), device=device).bfloat16()
    inputs = [part.unflatten(2, size) for part, size in zip(rows.split(widths, 2), sizes, strict=True)]
    check(inputs, make_ranges(mask, shape, device), causal=mask == "causal", with_dlse=True, compute=in_one_row)


def test_packed_attention_takes_gradients_of_one_row(device, monkeypatch):
    found, op = [], OPS["attention_bwd_together"]
    function = op.function
    monkeypatch.setattr(op, "function", lambda *args: found.append(function(*args)) or found[-1])
    qkv = torch.randn(2, 200, 8 * 64, device=device).bfloat16().requires_grad_()
    attention_qkvpacked(qkv, 4, 2, backend="cuda").sum().backward()
    assert len(found) == 1 and found[0] is not None


@pytest.mark.parametrize("view", QKV_VIEWS)
def test_views(view, device):
    """As they come of fused projections; rows at odd addresses are refused, and go to another backend."""
    inputs = QKV_VIEWS[view]((2, 140, 230, 4, 2, 72), torch.bfloat16, device)
    if view == "offset":
        with pytest.raises(BackendError, match="multiples of 16 bytes"):
            gradients(inputs)
    else:
        check(inputs)


@pytest.mark.parametrize("softcap", [0.0, 5.0])
@pytest.mark.parametrize("batch", [2, 66])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_padding_of_nan(dim, batch, softcap, device):
    inputs = [x.detach() for x in make_qkv((batch, 4, 2, 150, 300, dim, dim), torch.bfloat16, device)]
    ranges = KeyRanges(*(torch.full((batch, 150), x, device=device, dtype=torch.int32) for x in (70, 210)))
    ranges.stop[1, 3] = 0  # sees nothing
    unseen = torch.ones(batch, 300, dtype=torch.bool, device=device)
    unseen[:, 70:210] = False
    check_unseen(inputs, ranges, unseen, softcap)


@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_nan_stays_in_its_head(where, device):
    check_nan_stays_in_its_head(150, where, device, lambda x, y: compare(x, y.double(), "grad"))


@pytest.mark.parametrize("dim", [64, 88])
@pytest.mark.parametrize("where", ["q", "k", "v", "dout"])
def test_nan_among_last_keys(where, dim, device):
    """Of a whole head's 257 keys the last, which another warpgroup takes, is NaN, or the last query, or what comes back of it."""
    inputs = dict(
        zip(("q", "k", "v"), (x.detach() for x in make_qkv((33, 4, 4, 257, 257, dim, dim), torch.bfloat16, device)), strict=True)
    )
    inputs["dout"] = torch.randn_like(inputs["q"])
    clean, _ = gradients([inputs[name] for name in "qkv"], dout=inputs["dout"])
    inputs[where][7, 256, 2] = float("nan")
    got, _ = gradients([inputs[name] for name in "qkv"], dout=inputs["dout"])
    for result, before in zip(got, clean, strict=True):
        spoiled = torch.zeros(result.shape, dtype=torch.bool, device=device)
        spoiled[7, :, 2] = True
        assert torch.equal(result[~spoiled], before[~spoiled])
    assert got[0][7, :, 2].isnan().any()


@pytest.mark.parametrize("batch", [1, 66])
def test_nothing_to_see(batch, device):
    inputs = make_qkv((batch, 2, 2, 140, 170, 64, 64), torch.bfloat16, device)
    nothing = torch.zeros(1, 140, dtype=torch.int32, device=device)
    for ranges in (KeyRanges(nothing, nothing), KeyRanges(nothing + 180, nothing + 190), KeyRanges(nothing + 9, nothing + 3)):
        got, _ = gradients(inputs, ranges, with_dlse=True)
        assert all((x == 0).all() for x in got)


@pytest.mark.parametrize("where", ["q", "k"])
def test_offsets_past_2_31(where, device):
    check_offsets_past_2_31(where, 300, 200, device)


@pytest.mark.parametrize("batch", [2, 66])
def test_cuda_graph(batch, device):
    """Replayed with other contents, ranges included."""
    shape = (batch, 4, 2, 150, 300, 64, 64)
    inputs, ranges = make_qkv(shape, torch.bfloat16, device), make_ranges("random", shape, device)

    def step():
        return torch.autograd.grad(attention(*inputs, ranges, backend="cuda").sum(), inputs)

    captured, called = replayed(step, inputs, ranges, "random", shape)
    for x, y in zip(captured, called, strict=True):
        assert compare(x, y.double(), "grad")


@pytest.mark.parametrize("dim", [64, 128])
def test_streams_at_once(dim, device):
    """Blocks that share heads wait for each other: those of several calls must not keep each other from the GPU."""
    inputs, _, dout, wanted = forced((20, 16, 16, 900, 900, dim, dim), device)
    streams = [torch.cuda.Stream() for _ in range(4)]
    got = []
    torch.cuda.synchronize()
    for _ in range(5):
        for stream in streams:
            with torch.cuda.stream(stream):
                got.append(torch.autograd.grad(attention(*inputs, backend="cuda"), inputs, dout))
    torch.cuda.synchronize()
    for gradients_of_call in got:
        assert all(compare(x, y.double(), "grad") for x, y in zip(gradients_of_call, wanted, strict=True))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_softcap(shape, dtype, mask, device):
    inputs, ranges = make_qkv(shape, DTYPES[dtype], device), make_ranges(mask, shape, device)
    check(inputs, ranges, causal=mask == "causal", softcap=2.0, with_dlse=True)


@pytest.mark.parametrize("dim", range(8, 264, 8))
def test_softcap_of_every_head_dim(dim, device):
    for dtype in DTYPES.values():
        for batch in (2, 66):
            shape = (batch, 2, 2, 140, 333, dim, dim)
            check(make_qkv(shape, dtype, device), make_ranges("random", shape, device), softcap=5.0)


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_softcap_of_large_logits(dim, device):
    """Of up to 100 times the softcap, where exp overflows; of most the slope is zero."""
    q, k, v = make_qkv((2, 2, 2, 150, 300, dim, dim), torch.bfloat16, device)
    check([30 * q.detach(), k, v], softcap=2.0)


@pytest.mark.parametrize("mask", ["prefix", "packed"])
@pytest.mark.parametrize("dim", [64, 72, 88, 128, 256])
def test_softcap_of_images_and_text(dim, mask, device):
    """As PaliGemma 2 has it, and packed, one segment without tokens."""
    cu_seqlens = torch.tensor([0, 130, 130, 513, 700], dtype=torch.int32, device=device)
    packed, prefix = KeyRanges.packed(cu_seqlens, 700), KeyRanges.prefix_lm(700, 256, device=device)
    inputs = make_qkv((1, 8, 4, 700, 700, dim, dim), torch.bfloat16, device)
    check(inputs, prefix if mask == "prefix" else packed, softcap=50.0)

# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of attention's forward against the fp64 reference: every tile, masks at tiles' edges, its own refusals."""

import pytest
import torch
from test_attention import MASKS, make_qkv, make_ranges

from vlmkernels import BackendError, KeyRanges, attention
from vlmkernels.ops.attention import _fwd
from vlmkernels.testing import compare
from vlmkernels.testing.inputs import NOT_ADDRESSABLE, QKV_VIEWS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_library")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
# B, H, Hk, Sq, Sk, D, Dv: each width of tile, with head dims that fill it and that don't, and lengths about its edges.
SHAPES = {
    "S65-D32": (2, 2, 2, 65, 65, 32, 32),
    "gqa-S70x130-D64": (1, 4, 2, 70, 130, 64, 64),
    "mqa-S130x40-D16-Dv8": (1, 3, 1, 130, 40, 16, 8),
    "S32x77-D24-Dv40": (2, 1, 1, 32, 77, 24, 40),
    "vit-S197-D64": (3, 12, 12, 197, 197, 64, 64),
    "clip-S577-D64": (2, 4, 4, 577, 577, 64, 64),
    "siglip-S729-D72": (2, 4, 4, 729, 729, 72, 72),
    "qwen-S1000-D80": (1, 4, 4, 1000, 1000, 80, 80),
    "eva-S257-D88": (2, 4, 4, 257, 257, 88, 88),
    "giant-S577-D96": (1, 4, 4, 577, 577, 96, 96),
    "bigg-S257-D104": (1, 4, 4, 257, 257, 104, 104),
    "llama-S515x1030-D128": (1, 8, 2, 515, 1030, 128, 128),
    "D112-Dv120": (1, 2, 1, 200, 300, 112, 120),
    "gemma-S600-D256": (1, 4, 2, 600, 600, 256, 256),
    "odd-S300-D192-Dv136": (1, 2, 2, 300, 300, 192, 136),
    "probe-S1x729-D72": (3, 4, 4, 1, 729, 72, 72),
    "one-key": (2, 2, 1, 5, 1, 64, 64),
    "more-queries-than-keys": (1, 2, 2, 500, 130, 80, 80),
    "many-tiles": (3, 50, 50, 390, 390, 64, 64),
    # Tiles depend on how many there are: small batches take smaller ones.
    "many-clip-text-S77-D64": (60, 8, 8, 77, 77, 64, 64),
    "many-S100x130-D48": (100, 4, 2, 100, 130, 48, 48),
    "many-vit-S197-D64": (22, 12, 12, 197, 197, 64, 64),
    "many-clip-S577-D64": (8, 16, 16, 577, 577, 64, 64),
    "many-siglip-S729-D72": (8, 16, 16, 729, 729, 72, 72),
    "many-S250-D72": (66, 4, 2, 250, 250, 72, 72),
    "many-S300x577-D80": (66, 4, 4, 300, 577, 80, 80),
    "many-eva-S257-D88": (16, 16, 16, 257, 257, 88, 88),
    "many-S300-D96": (66, 4, 4, 300, 300, 96, 96),
    "many-bigg-S257-D104": (16, 16, 16, 257, 257, 104, 104),
    "many-S300-D120-Dv112": (66, 4, 2, 300, 300, 120, 112),
    "many-llama-S700-D128": (2, 16, 4, 700, 700, 128, 128),
    "many-llama-S1500-D128": (2, 32, 8, 1500, 1500, 128, 128),
    "S4100-D128": (1, 2, 1, 4100, 4100, 128, 128),
}


def check(inputs: list[torch.Tensor], ranges: KeyRanges | None = None, **options) -> None:
    inputs = [x.detach() for x in inputs]
    out, lse = attention(*inputs, ranges, return_lse=True, backend="cuda", **options)
    exact, exact_lse = attention(*(x.double() for x in inputs), ranges, return_lse=True, backend="reference", **options)
    for name, x, y in (("out", out, exact), ("lse", lse, exact_lse)):
        result = compare(x, y, "gemm")
        assert result, f"{name}: {result}"
    again = attention(*inputs, ranges, backend="cuda", **options)
    assert torch.equal(again, out), "another result of the same inputs"


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward(shape, dtype, mask, device):
    check(make_qkv(shape, DTYPES[dtype], device), make_ranges(mask, shape, device), causal=mask == "causal")


@pytest.mark.parametrize("dim", [*range(8, 136, 8), 160, 192, 224, 256])
def test_every_head_dim(dim, device):
    for batch in (1, 50):
        shape = (batch, 2, 2, 150, 333, dim, dim)
        check(make_qkv(shape, torch.bfloat16, device), make_ranges("random", shape, device))


@pytest.mark.parametrize("batch", [2, 132])
@pytest.mark.parametrize("keys", [333, 577, 1700])
@pytest.mark.parametrize("dim", [64, 72, 80, 88, 96, 104, 128, 192, 256])
def test_dense_tiles(dim, keys, batch, device):
    """Without a mask the tile depends on how many heads, queries or keys there are."""
    for queries in (200, 257, 300):
        check(make_qkv((batch, 2, 1, queries, keys, dim, dim), torch.bfloat16, device))


@pytest.mark.parametrize("step", [16, 64, 192])
@pytest.mark.parametrize(("dim", "queries"), [(dim, 1500) for dim in (64, 72, 80, 88, 96, 104, 128, 192, 256)] + [(128, 4100)])
def test_stretches_of_queries(dim, queries, step, device):
    """Rows share their keys in stretches, of which a third see none: warpgroups and whole tiles with nothing to do.

    Several times, as a block takes more than one tile, and what goes wrong between two of them depends on when it happens.
    """
    for keys in (64, 333, 700) * 3:
        shape = (3, 8, 2, queries, keys, dim, dim)
        start = torch.randint(0, keys, (3, queries // step + 1), device=device, dtype=torch.int32)
        length = torch.randint(-keys // 2, keys, start.shape, device=device, dtype=torch.int32)
        bounds = (bound.repeat_interleave(step, dim=1)[:, :queries] for bound in (start, start + length))
        check(make_qkv(shape, torch.bfloat16, device), KeyRanges(*bounds))


@pytest.mark.parametrize("view", QKV_VIEWS)
def test_views(view, device):
    """As they come of fused projections; what the copy engine can't address is refused, and goes to another backend."""
    q, k, v = QKV_VIEWS[view]((2, 70, 130, 4, 2, 72), torch.bfloat16, device)
    if view in NOT_ADDRESSABLE:
        with pytest.raises(BackendError, match="multiples? of 16 bytes"):
            attention(q, k, v, backend="cuda")
        assert compare(attention(q, k, v), attention(q.double(), k.double(), v.double(), backend="reference"), "gemm")
    else:
        check([q, k, v])


@pytest.mark.parametrize("heads", [2, 40])
@pytest.mark.parametrize("dim", [64, 80, 128, 256])
def test_packed(dim, heads, device):
    """Segments of all lengths about a tile's edges, in one row; whatever lies behind a segment stays out of it."""
    lengths = [64, 0, 1, 127, 128, 129, 300, 5, 64, 64, 200]
    total = sum(lengths)
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    q, k, v = (torch.randn(total, heads, dim, device=device).bfloat16() for _ in range(3))
    ranges = KeyRanges.packed(cu_seqlens, total)
    check([q, k, v], ranges)
    bad = cu_seqlens[6].item(), cu_seqlens[7].item()
    clean = attention(q, k, v, ranges, backend="cuda")
    for x in (k, v):
        x[bad[0] : bad[1]] = float("nan")
    out = attention(q, k, v, ranges, backend="cuda")
    assert out[bad[0] : bad[1]].isnan().all()
    # Rows that share a tile of queries with the segment read its keys with a weight of 0, which times NaN is NaN.
    tile = 384  # whole tiles of every size
    assert torch.equal(out[: bad[0] // tile * tile], clean[: bad[0] // tile * tile])
    assert torch.equal(out[-(-bad[1] // tile) * tile :], clean[-(-bad[1] // tile) * tile :])


@pytest.mark.parametrize(("total", "heads"), [(30_000, 6), (110_000, 1)])
@pytest.mark.parametrize("dim", [72, 128])
def test_longest_first(dim, total, heads, device):
    """Tiles of an uneven row are sorted; of the longer row there are more than that is done for."""
    lengths, rest = [], total
    while rest:
        lengths.append(min(rest, int(torch.randint(1, 900, ()))))
        rest -= lengths[-1]
    cu_seqlens = torch.tensor([0, *lengths], device=device).cumsum(0).int()
    q, k, v = (torch.randn(total, heads, dim, device=device).bfloat16() for _ in range(3))
    out = attention(q, k, v, KeyRanges.packed(cu_seqlens, total), backend="cuda")
    parts = zip(*(x.double().split(lengths) for x in (q, k, v)), strict=True)
    exact = torch.cat([attention(*(x[None] for x in part), backend="reference")[0] for part in parts])
    assert compare(out, exact, "gemm")


@pytest.mark.parametrize("dim", [64, 128])
def test_longest_first_of_images(dim, device):
    """The last tiles of all images come first, and those behind the first two for each block are sorted."""
    shape = (40, 1, 1, 1700, 1700, dim, dim)
    first = torch.randint(0, 1700, (40, 1), device=device, dtype=torch.int32)
    causal = KeyRanges.causal(1700, device=device)
    padded = KeyRanges(first.expand(40, 1700), causal.stop.expand(40, 1700))  # on the left
    for ranges in (padded, make_ranges("random", shape, device)):
        check(make_qkv(shape, torch.bfloat16, device), ranges)


def test_streams_and_graphs(device):
    """Blocks count their tiles by a number that launches share on a stream, but not with those of a graph or of other streams."""
    q, k, v = (torch.randn(2, 800, 24, 64, device=device).bfloat16() for _ in range(3))
    expected = attention(q, k, v, causal=True, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [attention(q, k, v, causal=True, backend="cuda") for _ in range(2)]
    results = []
    torch.cuda.synchronize()
    for i in range(80):  # more streams than there are numbers for
        if i % 10 == 0:
            graph.replay()
        with torch.cuda.stream(torch.cuda.Stream(priority=-(i % 4))):
            results += [attention(q, k, v, causal=True, backend="cuda") for _ in range(2)]
    torch.cuda.synchronize()
    assert all(torch.equal(out, expected) for out in [*results, *captured])


def test_padding_of_nan(device):
    q, k, v = make_qkv((2, 4, 4, 70, 300, 64, 64), torch.bfloat16, device)
    q, k, v = q.detach(), k.detach(), v.detach()
    ranges = KeyRanges.key_padding(70, lengths=torch.tensor([100, 300], device=device))
    q[0, 3, 1] = float("nan")
    k[0, 100:], v[0, 100:] = float("nan"), float("inf")
    out = attention(q, k, v, ranges, backend="cuda")
    expected = torch.zeros(2, 70, 4, dtype=torch.bool, device=device)
    expected[0, 3, 1] = True
    assert torch.equal(out.isnan().all(-1), expected) and torch.equal(out.isnan().any(-1), expected)


@pytest.mark.parametrize("batch", [1, 60])
@pytest.mark.parametrize("mask", ["dense", "causal", "random"])
def test_softcap_and_scale(mask, batch, device):
    shape = (batch, 4, 2, 140, 270, 64, 64)
    inputs = [2 * x.detach() for x in make_qkv(shape, torch.bfloat16, device)]
    ranges = make_ranges(mask, shape, device)
    check(inputs, ranges, causal=mask == "causal", softcap=2.0)
    check(inputs, ranges, causal=mask == "causal", scale=0.7)


def test_large_logits(device):
    q, k, v = (x.detach() for x in make_qkv((1, 1, 1, 20, 550, 64, 64), torch.bfloat16, device))
    for keys, values in ((k, v), (k.flip(1), v.flip(1))):
        check([q * 30, keys, values])


@pytest.mark.parametrize("batch", [1, 132])
@pytest.mark.parametrize("mask", ["dense", "causal"])
def test_rising_logits(mask, batch, device):
    """The maximum grows from tile to tile, at first by less than what it may lag behind, then by more."""
    shape = (batch, 2, 2, 250, 900, 64, 64)
    q, k, v = (x.detach() for x in make_qkv(shape, torch.bfloat16, device))
    rise = torch.linspace(0.1, 8, 900, device=device)[None, :, None, None]
    check([2 * q, (k * rise).bfloat16(), v], causal=mask == "causal")


@pytest.mark.parametrize("batch", [1, 132])
@pytest.mark.parametrize("mask", ["dense", "causal"])
@pytest.mark.parametrize("jump", [40, 3000, -3000])
@pytest.mark.parametrize("dim", [64, 72, 80, 88, 96, 128])
def test_jumping_logits(dim, jump, mask, batch, device):
    """Later logits are so much larger that weights relative to the maximum so far overflow; or so much smaller."""
    q, k, v = (x.detach().clone() for x in make_qkv((batch, 2, 2, 150, 900, dim, dim), torch.bfloat16, device))
    q[..., 0] = dim**0.5
    k[:, :300, :, 0], k[:, 300:, :, 0] = 0, jump
    check([q, k, v], causal=mask == "causal")


@pytest.mark.parametrize("batch", [2, 66])
@pytest.mark.parametrize("tail", [1, 5, 8, 9])
@pytest.mark.parametrize("dim", [40, 64, 80])
def test_tails(dim, tail, batch, device):
    """Without a mask, up to 8 queries behind a multiple of 64 go another way than those before them, where there are many."""
    for queries, keys in ((256 + tail, 256 + tail), (576 + tail, 100), (64 + tail, 333)):
        q, k, v = (x.detach() for x in make_qkv((batch, 4, 2, queries, keys, dim, dim), torch.bfloat16, device))
        check([q, k, v])
        out, exact = attention(q, k, v, backend="cuda"), attention(q.double(), k.double(), v.double(), backend="reference")
        assert compare(out[:, -tail:], exact[:, -tail:], "gemm")
        spoiled = q.clone()
        spoiled[1, -1, 3], spoiled[0, 5, 1] = float("nan"), float("nan")
        again = attention(spoiled, k, v, backend="cuda")
        bad = again.isnan()
        assert bad[1, -1, 3].all() and bad[0, 5, 1].all() and bad.sum() == 2 * dim
        assert torch.equal(again[~bad], out[~bad])


def test_nothing_to_see(device):
    q, k, v = (x.detach() for x in make_qkv((1, 2, 2, 70, 30, 64, 64), torch.bfloat16, device))
    nothing = torch.zeros(1, 70, dtype=torch.int32, device=device)
    for ranges in (KeyRanges(nothing, nothing), KeyRanges(nothing + 40, nothing + 50), KeyRanges(nothing + 9, nothing + 3)):
        out, lse = attention(q, k, v, ranges, return_lse=True, backend="cuda")
        assert (out == 0).all() and (lse == float("-inf")).all()
    for b, sq, sk in ((0, 4, 4), (1, 0, 4), (1, 4, 0)):
        q, k, v = make_qkv((b, 2, 2, sq, sk, 16, 16), torch.bfloat16, device)
        out, lse = attention(q, k, v, return_lse=True, backend="cuda")
        assert (out == 0).all() and (lse == float("-inf")).all() and out.shape == (b, sq, 2, 16)


@pytest.mark.parametrize("where", ["q", "k"])
def test_offsets_past_2_31(where, device):
    """Rows so far apart that the last one lies past 2^31 elements."""
    s, d = 257, 64
    wide = torch.empty(s * (1 << 23), dtype=torch.bfloat16, device=device)
    far = wide.as_strided((1, s, 1, d), (0, 1 << 23, d, 1)).normal_()
    near = torch.randn(1, s, 1, d, dtype=torch.bfloat16, device=device)
    check([far, near, near] if where == "q" else [near, far, far])


def test_training(device):
    """The log-sum-exp is what the backward of another backend reads."""
    shape = (2, 4, 2, 200, 300, 80, 80)
    inputs, ranges = make_qkv(shape, torch.bfloat16, device), make_ranges("blocks", shape, device)
    dout = torch.randn(2, 200, 4, 80, device=device).bfloat16()
    got = torch.autograd.grad(attention(*inputs, ranges), inputs, dout)
    exact_inputs = [x.detach().double().requires_grad_() for x in inputs]
    exact = torch.autograd.grad(attention(*exact_inputs, ranges, backend="reference"), exact_inputs, dout.double())
    for x, y in zip(got, exact, strict=True):
        assert compare(x, y, "grad")


def test_it_is_chosen(device):
    q, k, v = (x.detach() for x in make_qkv(SHAPES["clip-S577-D64"], torch.bfloat16, device))
    assert torch.equal(attention(q, k, v), attention(q, k, v, backend="cuda"))
    assert _fwd.why_not("cuda", device, q.float(), k.float(), v.float(), None, None, False, 1.0, 0.0, False) == (
        "it takes bfloat16 and float16, these are torch.float32"
    )
    assert "head dim 12: 8 to 256 in steps of 8" in (
        _fwd.why_not("cuda", device, q[..., :12], k[..., :12], v, None, None, False, 1.0, 0.0, False) or ""
    )

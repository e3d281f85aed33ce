# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of attention for few queries against the fp64 reference: every tile, rows of all heads, splits, masks."""

import pytest
import torch
from test_attention import MASKS, make_qkv, make_ranges
from test_attention_cuda import DTYPES, check

from vlmkernels import KeyRanges, attention
from vlmkernels.testing import compare
from vlmkernels.testing.inputs import NOT_ADDRESSABLE, QKV_VIEWS

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_library")]

# B, H, Hk, Sq, Sk, D, Dv
SHAPES = {
    "qformer-S32x257-D64": (12, 12, 12, 32, 257, 64, 64),
    "resampler-S64x321-D96": (2, 16, 16, 64, 321, 96, 96),
    "resampler-S64x1024-D128": (2, 4, 4, 64, 1024, 128, 128),
    "minicpm-S96x700-D128": (1, 4, 4, 96, 700, 128, 128),
    "pooling-S1x729-D72": (3, 4, 4, 1, 729, 72, 72),
    "gqa-S30x130-D64": (1, 8, 2, 30, 130, 64, 64),
    "mqa-S17x99-D40-Dv24": (2, 7, 1, 17, 99, 40, 24),
    "gqa-S20x200-D88-Dv128": (2, 6, 3, 20, 200, 88, 128),
    "decode-S1x3000-D128": (2, 32, 8, 1, 3000, 128, 128),
    "decode-S3x1100-D64-Dv80": (2, 16, 2, 3, 1100, 64, 80),
    "more-queries-than-keys": (2, 2, 2, 100, 30, 128, 128),
    "one-key": (2, 2, 1, 5, 1, 64, 64),
}


def tensors(shape, device, dtype=torch.bfloat16) -> list[torch.Tensor]:
    return [x.detach() for x in make_qkv(shape, dtype, device)]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
def test_forward(shape, dtype, mask, device):
    check(tensors(shape, device, DTYPES[dtype]), make_ranges(mask, shape, device), causal=mask == "causal")


@pytest.mark.parametrize("mask", MASKS[1:])
@pytest.mark.parametrize("dim, value_dim", [(64, 40), (72, 80), (96, 96), (128, 112)])
@pytest.mark.parametrize("batch, heads, kv_heads", [(1, 12, 12), (3, 4, 2), (5, 8, 1)])
def test_tiles_of_queries(batch, heads, kv_heads, dim, value_dim, mask, device):
    """With a mask, more queries than a tile has are tiles of one head each."""
    for queries in (65, 128, 191, 256):
        for keys in (1, 100, 300):
            shape = (batch, heads, kv_heads, queries, keys, dim, value_dim)
            check(tensors(shape, device), make_ranges(mask, shape, device), causal=mask == "causal")


@pytest.mark.parametrize("keys", [1, 63, 64, 65, 128, 257, 577, 1100])
@pytest.mark.parametrize("queries", [1, 3, 8, 31, 32, 33, 64, 65, 100, 128])
def test_lengths(queries, keys, device):
    for dim in (64, 128):
        shape = (2, 2, 2, queries, keys, dim, dim)
        check(tensors(shape, device))
        check(tensors(shape, device), make_ranges("random", shape, device))


@pytest.mark.parametrize("dim", range(8, 136, 8))
def test_every_head_dim(dim, device):
    for dtype in DTYPES.values():
        for queries in (9, 30, 50, 100):
            shape = (2, 2, 2, queries, 333, dim, dim)
            check(tensors(shape, device, dtype), make_ranges("random", shape, device))


@pytest.mark.parametrize("dim", [64, 80, 96, 128])
@pytest.mark.parametrize("queries", [1, 16, 32, 64])
@pytest.mark.parametrize("batch", [1, 5, 10, 20, 40, 60, 120, 300])
def test_splits(batch, queries, dim, device):
    """Where heads are few, up to 16 blocks share out the keys of one; some of them may see nothing."""
    shape = (batch, 6, 3, queries, 2200 if batch <= 40 else 500, dim, dim)
    check(tensors(shape, device))
    few = torch.randint(0, 300, (batch, queries), device=device, dtype=torch.int32)
    check(tensors(shape, device), KeyRanges(few, few + torch.randint_like(few, -50, 200)))


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("queries", [1, 32, 64, 100])
def test_many_keys(queries, dim, device):
    shape = (1, 2, 2, queries, 16384, dim, dim)
    check(tensors(shape, device))
    check(tensors(shape, device), make_ranges("random", shape, device))


@pytest.mark.parametrize("view", QKV_VIEWS)
def test_views(view, device):
    for sizes in ((2, 32, 300, 4, 2, 64), (2, 7, 130, 8, 2, 72)):
        q, k, v = QKV_VIEWS[view](sizes, torch.bfloat16, device)
        if view not in NOT_ADDRESSABLE:
            check([q, k, v])


@pytest.mark.parametrize("batch", [1, 50])
@pytest.mark.parametrize("dim", [64, 96])
def test_padding_of_nan(dim, batch, device):
    """Behind the keys that an entry of the batch sees there may be anything; NaN in a query stays in its row."""
    q, k, v = tensors((batch, 4, 2, 20, 700, dim, dim), device)
    lengths = torch.randint(0, 700, (batch,), device=device)
    ranges = KeyRanges.key_padding(20, lengths=lengths)
    clean = attention(q, k, v, ranges, backend="cuda")
    unseen = torch.arange(700, device=device) >= lengths[:, None]
    k[unseen], v[unseen] = float("nan"), float("inf")
    assert torch.equal(attention(q, k, v, ranges, backend="cuda"), clean)
    q[0, 3, 1] = float("nan")
    out = attention(q, k, v, ranges, backend="cuda")
    expected = torch.zeros_like(out, dtype=torch.bool)
    expected[0, 3, 1] = bool(lengths[0] > 0)
    assert torch.equal(out.isnan(), expected)
    assert torch.equal(out[~expected], clean[~expected])


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("mask", ["dense", "causal", "random"])
@pytest.mark.parametrize("queries, dim", [(14, 64), (150, 64), (150, 128)])
def test_softcap_and_scale(queries, dim, mask, batch, device):
    shape = (batch, 4, 2, queries, 700, dim, dim)
    inputs = [2 * x for x in tensors(shape, device)]
    ranges = make_ranges(mask, shape, device)
    check(inputs, ranges, causal=mask == "causal", softcap=2.0)
    check(inputs, ranges, causal=mask == "causal", scale=0.7)


@pytest.mark.parametrize("batch", [1, 100])
@pytest.mark.parametrize("jump", [5, 40, 3000, -3000])
def test_jumping_logits(jump, batch, device):
    """Later logits are larger, or smaller, by so much: from tile to tile and from one block of a cluster to the next."""
    q, k, v = tensors((batch, 2, 2, 50, 900, 64, 64), device)
    q[..., 0] = 8
    k[:, :300, :, 0], k[:, 300:, :, 0] = 0, jump
    check([q, k, v])


@pytest.mark.parametrize("batch", [1, 300])
def test_nothing_to_see(batch, device):
    q, k, v = tensors((batch, 2, 2, 40, 530, 64, 64), device)
    nothing = torch.zeros(1, 40, dtype=torch.int32, device=device)
    for ranges in (KeyRanges(nothing, nothing), KeyRanges(nothing + 600, nothing + 700), KeyRanges(nothing + 9, nothing + 3)):
        out, lse = attention(q, k, v, ranges, return_lse=True, backend="cuda")
        assert (out == 0).all() and (lse == float("-inf")).all()
    # Where others see values that are no numbers, too.
    v[:, :9] = float("inf")
    stop = nothing.clone()
    stop[:, -1] = 9
    out, lse = attention(q, k, v, KeyRanges(nothing, stop), return_lse=True, backend="cuda")
    assert (out[:, :-1] == 0).all() and (lse[..., :-1] == float("-inf")).all() and (out[:, -1] == float("inf")).all()


def test_the_same_from_run_to_run(device):
    """In whatever order the blocks of a cluster are done, and whatever lay in shared memory before."""
    for shape in ((1, 12, 12, 31, 16384, 64, 64), (64, 12, 12, 31, 257, 64, 64), (1, 32, 8, 5, 5000, 128, 128)):
        q, k, v = tensors(shape, device)
        first = attention(q, k, v, return_lse=True, backend="cuda")
        for _ in range(20):
            attention(torch.full_like(q, 100), k, v, backend="cuda")
            again = attention(q, k, v, return_lse=True, backend="cuda")
            assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_cuda_graph(device):
    q, k, v = tensors((1, 16, 16, 64, 4096, 128, 128), device)
    attention(q, k, v, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = attention(q, k, v, backend="cuda")
    for x in (q, k, v):
        x.normal_()
    graph.replay()
    assert compare(out, attention(q.double(), k.double(), v.double(), backend="reference"), "gemm")

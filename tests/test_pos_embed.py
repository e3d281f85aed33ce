# SPDX-License-Identifier: Apache-2.0
"""Resampled position tables: every backend against torch's interpolation in fp64, image by image, and against transformers."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import ON_GPU, capture, examples, runnable
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.library import opcheck
from transformers.models.qwen3_vl import modeling_qwen3_vl
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from vlmkernels.ops._op import BackendError
from vlmkernels.ops.pos_embed import resample_pos_embed
from vlmkernels.testing import compare

OPS = ("pos_embed_fwd", "pos_embed_bwd")
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
QWEN: dict[str, Any] = {"merge_size": 2, "align_corners": True}
SIGLIP: dict[str, Any] = {"layout": "padded", "padding": "first", "antialias": True}
TIMM: dict[str, Any] = {"layout": "padded", "antialias": True}

# Table [H, W], grids, rows, options
CASES: dict[str, tuple[tuple[int, int], list[tuple[int, ...]], int, dict[str, Any]]] = {
    "qwen3-vl": ((3, 3), [(2, 4, 2), (1, 2, 6), (0, 2, 2), (1, 2, 2)], 34, QWEN),
    "siglip2": ((3, 3), [(2, 4), (1, 1), (3, 3), (5, 1)], 11, SIGLIP),
    "timm, one image, fine": ((2, 3), [(5, 4)], 21, TIMM),
    "strong downscaling": ((7, 1), [(1, 1), (2, 1)], 3, {"antialias": True}),
    "half-pixel": ((3, 2), [(5, 1), (1, 3), (0, 0), (2, 2)], 16, {}),
    "corners of one patch and of one cell": ((1, 5), [(1, 1), (3, 1), (1, 2)], 6, {"align_corners": True}),
}
if ON_GPU:
    photos = [(14, 18), (16, 16), (12, 21), (4, 60), (1, 256), (27, 9), (40, 40)]
    CASES |= {
        "qwen3-vl 48": ((48, 48), [(1, 2 * h, 2 * w) for h, w in photos] + [(5, 20, 34)], 28000, QWEN),
        "siglip2 16": ((16, 16), photos * 13, 1600, SIGLIP),
        "timm 16": ((16, 16), photos, 1600, TIMM),
        "many images": ((16, 16), [(1 + i % 7, 1 + i % 5) for i in range(700)], 10000, {"antialias": True}),
        "many videos": ((24, 24), [(i % 4, 2, 4 + 2 * (i % 3)) for i in range(300)], 6000, QWEN),
        "wide table": ((5, 300), [(3, 2), (1, 1), (30, 400)], 12007, {"antialias": True}),
    }


def axis(count: int, size: int, flags: dict[str, bool]) -> Tensor:
    """``[count, size]``: torch's own weights, from the interpolation of unit vectors, on the CPU in fp64.

    One axis at a time, two columns wide: with antialiasing, torch 2.13 repeats row 0 on a CPU where the result is one column
    wide, and refuses on a GPU what it cannot hold in shared memory.
    """
    units = torch.eye(size, dtype=torch.float64)[None, :, :, None].expand(-1, -1, -1, 2)
    return F.interpolate(units, (count, 2), mode="bilinear", **flags)[0, :, :, 0].t()


def place(table: Tensor, grids: Sequence[Sequence[int]], rows: int, options: dict[str, Any]) -> Tensor:
    """What the operator means, one image after the other, with torch's own interpolation. The table is fp64."""
    merge, padded = options.get("merge_size", 1), options.get("layout") == "padded"
    flags = {"align_corners": options.get("align_corners", False), "antialias": options.get("antialias", False)}
    images = []
    for grid in grids:
        frames, (h, w) = (1, *grid)[-3], grid[-2:]
        image = table.new_zeros(0, table.shape[2])
        if frames * h * w:
            vertical, horizontal = (axis(n, size, flags).to(table.device) for n, size in zip((h, w), table.shape, strict=False))
            image = torch.einsum("wj,hjd->hwd", horizontal, torch.einsum("hi,ijd->hjd", vertical, table))
            blocks = image.reshape(h // merge, merge, w // merge, merge, -1).transpose(1, 2)
            image = blocks.reshape(h * w, -1).repeat(frames, 1)
        if padded:
            first = options.get("padding") == "first" and len(image) > 0
            rest = image[:1].expand(rows - len(image), -1) if first else image.new_zeros(rows - len(image), table.shape[2])
            image = torch.cat((image, rest))
        images.append(image)
    if padded:
        return torch.stack(images)
    packed = torch.cat(images)
    return torch.cat((packed, packed.new_zeros(rows - len(packed), table.shape[2])))


def check(table: Tensor, grids: Tensor, rows: int, options: dict[str, Any], backend: str, rule: str = "norm") -> None:
    table = table.detach().requires_grad_()
    out = resample_pos_embed(table, grids, rows, **options, backend=backend)
    exact_table = table.detach().double().requires_grad_()
    exact = place(exact_table, grids.tolist(), rows, options) + 0 * exact_table.sum()  # a graph also where no row is filled
    grad = torch.randn(out.shape, device=out.device).to(out.dtype)
    (got,) = torch.autograd.grad(out, table, grad)
    (exact_grad,) = torch.autograd.grad(exact, exact_table, grad.double())
    assert out.dtype == table.dtype and out.is_contiguous()
    result = compare(out, exact, rule)
    assert result, result
    # A cell's gradient is a sum over all the rows that it reaches.
    result = compare(got, exact_grad.view(got.shape), "gemm")
    assert result, result


def random_table(name: str, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(*CASES[name][0], 1152 if ON_GPU else 8, device=device).to(dtype)


@pytest.mark.backends(*OPS)
@pytest.mark.parametrize("name", CASES)
def test_forward_and_backward(name: str, backend: str, device: torch.device) -> None:
    _, grids, rows, options = CASES[name]
    check(random_table(name, torch.float32, device), torch.tensor(grids, device=device), rows, options, backend)


@pytest.mark.backends(*OPS)
@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
@pytest.mark.parametrize("name", CASES if ON_GPU else ["half-pixel", "siglip2"])
def test_low_precision(name: str, dtype: torch.dtype, backend: str, device: torch.device) -> None:
    _, grids, rows, options = CASES[name]
    check(random_table(name, dtype, device), torch.tensor(grids, device=device), rows, options, backend)


sides = st.integers(0, 7)
cells = st.integers(2, 12)


@pytest.mark.backends(*OPS, exclude=() if ON_GPU else ("triton",))
@examples(25)
@given(
    table=st.tuples(cells, cells),
    grids=st.lists(st.tuples(st.integers(0, 2), sides, sides), min_size=4, max_size=4),
    options=st.sampled_from([{}, {"antialias": True}, {"align_corners": True}, SIGLIP, TIMM, QWEN]),
)
def test_any_grids(
    table: tuple[int, int], grids: list[tuple[int, int, int]], options: dict[str, Any], backend: str, device: torch.device
) -> None:
    """The number of images and of rows stays, for a GPU compiles for them. Few results differ, so their floor is left to luck."""
    merge, rows = options.get("merge_size", 1), 100 if "layout" in options else 1600
    sizes = torch.tensor([(t, h * merge, w * merge) for t, h, w in grids], device=device)
    check(torch.randn(*table, 3, device=device), sizes, rows, options, backend, "gemm")


@pytest.mark.parametrize("backend", runnable(*OPS))
def test_strides(backend: str, device: torch.device) -> None:
    """A table whose cells and channels lie apart, a slice of int32 grids, gradients that are expanded or transposed."""
    grids = torch.tensor([[1, 9, 2, 9, 3], [1, 9, 3, 9, 1]], dtype=torch.int32, device=device)[:, ::2]
    table = torch.randn(8, 3, 2 * 2, device=device).transpose(0, 2)[::2, :, 1:]
    assert table.shape == (2, 3, 7)
    for options in ({"antialias": True}, {"layout": "padded", "padding": "first"}):
        leaf = table.detach().requires_grad_()
        exact_leaf = table.double().requires_grad_()
        out = resample_pos_embed(leaf, grids, 9, **options, backend=backend)
        exact = place(exact_leaf, grids.tolist(), 9, options)
        assert compare(out, exact, "norm")
        for grad in (torch.ones_like(out[..., :1]).expand_as(out), torch.randn_like(out).mT.contiguous().mT):
            (got,) = torch.autograd.grad(out, leaf, grad, retain_graph=True)
            (wanted,) = torch.autograd.grad(exact, exact_leaf, grad.double(), retain_graph=True)
            assert compare(got, wanted, "gemm")
    square = torch.randn(9, 7, device=device)
    got = resample_pos_embed(square, grids, 9, backend=backend)
    assert compare(got, resample_pos_embed(square.view(3, 3, 7), grids, 9, backend=backend), "exact")


@pytest.mark.backends(*OPS)
@pytest.mark.parametrize("options", [{}, {"antialias": True}, {"align_corners": True}], ids=str)
def test_nan_stays(options: dict[str, Any], backend: str, device: torch.device) -> None:
    """A NaN goes where it has a weight, and nowhere else: also where the weight of a neighbour is exactly 0."""
    grids = torch.tensor([[3, 3], [5, 2], [1, 1]], device=device)
    table = torch.randn(3, 3, 4, device=device)
    table[0, 1, 2] = torch.nan
    exact = place(table.double().nan_to_num(1e9), grids.tolist(), 20, options)
    out = resample_pos_embed(table, grids, 20, **options, backend=backend)
    assert torch.equal(out.isnan(), exact > 1e6) and 0 < int(out.isnan().sum()) < 10
    table[0, 1, 2] = 0.0
    leaf, grad = table.requires_grad_(), torch.randn(20, 4, device=device)
    grad[1, 3] = torch.nan
    (got,) = torch.autograd.grad(resample_pos_embed(leaf, grids, 20, **options, backend=backend), leaf, grad)
    assert got.isnan().nonzero().tolist() == [[0, 1, 3]]


@pytest.mark.backends(*OPS)
def test_nothing_to_do(backend: str, device: torch.device) -> None:
    table = torch.randn(3, 3, 8, device=device, requires_grad=True)
    none = torch.zeros(0, 3, dtype=torch.int64, device=device)
    empty = torch.zeros(2, 3, dtype=torch.int64, device=device)
    for grids, rows, options, shape in (
        (none, 0, {}, (0, 8)),
        (none, 4, QWEN, (4, 8)),
        (none, 4, SIGLIP, (0, 4, 8)),
        (empty, 5, QWEN, (5, 8)),
        (empty, 5, SIGLIP, (2, 5, 8)),
        (empty, 0, TIMM, (2, 0, 8)),
    ):
        out = resample_pos_embed(table, grids, rows, **options, backend=backend)
        assert out.shape == shape and not out.any()
        assert not torch.autograd.grad(out.sum(), table)[0].any()


def siglip2_rows(table: Tensor, shapes: Tensor, rows: int) -> Tensor:
    return Siglip2VisionEmbeddings.resize_positional_embeddings(table, shapes, max_length=rows)


def qwen3_rows(table: Tensor, grid_thw: Tensor) -> Tensor:
    """The lines of ``Qwen3VLVisionModel.forward`` that use its indices and weights."""
    indices, weights = modeling_qwen3_vl.get_vision_interpolation_indices_and_weights(
        grid_thw, num_grid_per_side=table.shape[0], mode="bilinear", align_corners=True, spatial_merge_size=2
    )
    return (F.embedding(indices, table.flatten(0, 1)) * weights[:, :, None]).sum(1).to(table.dtype)


@pytest.mark.parametrize("backend", [b for b in runnable(*OPS) if ON_GPU or b != "triton"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_as_transformers(dtype: torch.dtype, backend: str, device: torch.device) -> None:
    """Both results lie within the bounds around the exact one, and ours is not further off."""
    shapes = torch.tensor([(14, 18), (16, 16), (1, 9), (30, 2), (25, 10)], device=device)
    table = torch.randn(16, 16, 32, device=device).to(dtype)
    exact = place(table.double(), shapes.tolist(), 256, SIGLIP)
    ours = compare(resample_pos_embed(table, shapes, 256, **SIGLIP, backend=backend), exact, "norm")
    theirs = compare(siglip2_rows(table, shapes, 256), exact, "gemm")
    assert ours and theirs and ours.error <= theirs.error * 1.1

    grid_thw = torch.tensor([(1, 14, 18), (3, 4, 6), (1, 60, 52)], device=device)
    table, rows = torch.randn(48, 48, 32, device=device).to(dtype), int(grid_thw.prod(1).sum())
    exact = place(table.double(), grid_thw.tolist(), rows, QWEN)
    ours = compare(resample_pos_embed(table.flatten(0, 1), grid_thw, rows, **QWEN, backend=backend), exact, "norm")
    # Its coordinates, up to 48, are rounded to fp32.
    theirs = compare(qwen3_rows(table, grid_thw), exact, "gemm", terms=48.0 if dtype == torch.float32 else 0.0)
    assert ours and theirs and ours.error <= theirs.error * 1.1


def small(device: torch.device) -> tuple[Tensor, Tensor]:
    return torch.randn(3, 2, 4, device=device), torch.tensor([[1, 2, 4], [2, 2, 2]], device=device)


ALL_OPTIONS = [QWEN, SIGLIP, TIMM, {"antialias": True}]


@pytest.mark.backends(*OPS, exclude=("triton",))
@pytest.mark.parametrize("options", ALL_OPTIONS, ids=["qwen", "siglip", "timm", "packed"])
def test_gradcheck(options: dict[str, Any], backend: str, device: torch.device) -> None:
    table, grids = small(device)
    leaf = table.double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: resample_pos_embed(x, grids, 17, **options, backend=backend), leaf)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        out = resample_pos_embed(leaf.sin(), grids, 17, **options, backend=backend)
        (gradient,) = torch.autograd.grad(out.sin().sum(), leaf, create_graph=True)
        gradient.sum().backward()


@pytest.mark.backends(*OPS, exclude=() if ON_GPU else ("triton",))
def test_opcheck(backend: str, device: torch.device) -> None:
    table, grids = small(device)
    for flags in ((2, False, False, True, False), (1, True, True, False, True)):
        out = torch.ops.vlmkernels.pos_embed_fwd(table, grids, 17, *flags, backend)
        opcheck(torch.ops.vlmkernels.pos_embed_fwd, (table, grids, 17, *flags, backend))
        opcheck(torch.ops.vlmkernels.pos_embed_bwd, (out, grids, 3, 2, *flags, backend))


@pytest.mark.backends(*OPS, exclude=() if ON_GPU else ("triton",))
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile(dynamic: bool, backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    table, grids = small(device)
    table.requires_grad_()

    def step(table: Tensor, pixels: Tensor, grids: Tensor) -> Tensor:
        packed = resample_pos_embed(table * 2, grids, pixels.shape[0], **QWEN, backend=backend)
        return (packed * pixels).sin().sum() + resample_pos_embed(table, grids, pixels.shape[0], **SIGLIP, backend=backend).sum()

    compiled = torch.compile(step, fullgraph=True, dynamic=dynamic, backend="inductor" if ON_GPU else "aot_eager")
    for rows in (16, 19):
        pixels = torch.randn(rows, 4, device=device)
        (expected,) = torch.autograd.grad(step(table, pixels, grids), table)
        (got,) = torch.autograd.grad(compiled(table, pixels, grids), table)
        assert compare(got, expected, "gemm")


def test_refusals(device: torch.device) -> None:
    table, grids = small(device)
    for message, arguments, options in (
        ("table: got", (table[0, 0], grids, 16), {}),
        ("table: got", (table.long(), grids, 16), {}),
        ("table: got", (table[:0], grids, 16), {}),
        (r"table: got shape \(6, 4\), wanted a square", (table.flatten(0, 1), grids, 16), {}),
        ("grids: got", (table, grids[0], 16), {}),
        ("grids: got", (table, grids[:, :1], 16), {}),
        ("grids: got", (table, grids.float(), 16), {}),
        ("grids: got device meta", (table, grids.to("meta"), 16), {}),
        ("layout: got", (table, grids, 16), {"layout": "ragged"}),
        ("padding: got", (table, grids, 16), {"padding": "last"}),
        ("padding: got", (table, grids, 16), {"padding": "first"}),
        ("merge_size: got", (table, grids, 16), {"merge_size": 0}),
        ("num_rows: got", (table, grids, -1), {}),
        ("antialias: got", (table, grids, 16), {"antialias": True, "align_corners": True}),
        ("backend: got", (table, grids, 16), {"backend": "tritium"}),
    ):
        with pytest.raises(ValueError, match=message):
            resample_pos_embed(*arguments, **options)
    table, grids = table.cpu(), grids.cpu()
    for message, values, rows, options in (
        ("num_rows: got 15, wanted at least 16, the patches of all", grids, 15, {}),
        (r"num_rows: got 7, wanted at least 8, the patches of \(1, 2, 4\)", grids, 7, TIMM),
        (r"grids: got \(1, 2, 4\), wanted", grids, 16, {"merge_size": 4}),
        ("grids: got", -grids, 16, {}),
    ):
        with pytest.raises(ValueError, match=message):
            resample_pos_embed(table, values, rows, **options)


@pytest.mark.skipif("triton" not in runnable(*OPS), reason="Triton does not run here")
def test_what_triton_leaves_to_others(device: torch.device) -> None:
    table, grids = small(device)
    with pytest.raises(BackendError, match="triton: it takes fp32, bf16 and fp16, not torch.float64"):
        resample_pos_embed(table.double(), grids, 16, backend="triton")


@pytest.mark.skipif("triton" not in runnable(*OPS), reason="Triton does not run here")
def test_the_width_of_its_integers() -> None:
    from vlmkernels.backends.triton.pos_embed import _integers, tl

    for height, width in ((48, 48), (1, 48), (48, 1)):
        assert _integers(2**29 // 48, height, width) is tl.int32 and _integers(2**29 // 48 + 1, height, width) is tl.int64
    assert _integers(1, 23170, 1) is tl.int32 and _integers(1, 1, 23171) is tl.int64


@pytest.mark.parametrize("backend", [b for b in runnable(*OPS) if b != "reference"])
def test_grids_that_do_not_fit(backend: str, device: torch.device) -> None:
    """On a GPU nobody looks at the values first: whatever they are, the other images keep their rows and memory is safe."""
    table, _ = small(device)
    grids = torch.tensor([[2, 3], [9, 7], [3, 3], [-4, 2], [2**40, 2**40], [3, 2]], device=device)
    good = torch.tensor([0, 3, 5]) if backend == "triton" else torch.tensor([0, 3])
    options = (1, True, False, False, True, backend)
    out = torch.ops.vlmkernels.pos_embed_fwd(table, grids, 6, *options)
    exact = place(table.double(), [(2, 3), (0, 0), (3, 2)], 6, TIMM)
    for i, wanted in zip(good.tolist(), exact, strict=False):
        assert compare(out[i], wanted, "norm")
    assert torch.ops.vlmkernels.pos_embed_bwd(out, grids, 3, 2, *options).shape == table.shape


@pytest.mark.gpu
@pytest.mark.backends(*OPS)
@pytest.mark.parametrize("options", [QWEN, SIGLIP], ids=["qwen", "siglip"])
def test_graph_capture_and_bits(options: dict[str, Any], backend: str, device: torch.device) -> None:
    """A graph follows the grids that it finds at each replay; two runs give the same bits."""
    merge = options.get("merge_size", 1)
    first, second = (merge * torch.tensor(sizes, device=device) for sizes in ([(5, 9), (8, 8)], [(12, 3), (1, 20)]))
    table, grids = torch.randn(16, 16, 256, device=device), first.clone()

    def step() -> list[Tensor]:
        leaf = table.detach().requires_grad_()
        out = resample_pos_embed(leaf, grids, 500, **options, backend=backend)
        return [out, *torch.autograd.grad(out.square().sum(), leaf)]

    graph, captured = capture(step)
    grids.copy_(second)
    graph.replay()
    for x, y in zip(captured, step(), strict=True):
        assert compare(x, y, "exact")


@pytest.mark.gpu
def test_offsets_past_two_to_the_31(device: torch.device) -> None:
    table = torch.randn(48, 48, 1152, device=device).bfloat16()
    rows = 2**21
    grids = torch.tensor([(1023, 32, 64), (1, 32, 64)], device=device)
    out = resample_pos_embed(table, grids, rows, **QWEN, backend="triton")
    assert compare(out[-2048:], place(table.double(), [(1, 32, 64)], 2048, QWEN), "norm")

# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of patch embedding, at sizes that they take: against torch's convolution in fp64, and at their own edges."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_patch_embed import CLIP_MEAN, CLIP_STD, Flavour, double, embed, gradients, stock
from torch import Tensor

from vlmkernels import BackendError
from vlmkernels.ops.patch_embed import _fwd
from vlmkernels.testing.compare import compare

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_library")]

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
CLIP = Flavour((3, 3, 112, 112), (14, 14), 64, dim=1024, bias=False, prefix=1, norm=True)
FLAVOURS = {
    "clip-l": CLIP,
    "clip-b": Flavour((3, 3, 64, 96), (16, 16), 24, dim=768, bias=False, prefix=1, norm=True),
    "clip norm in one block": replace(CLIP, dim=96, prefix=0),
    "vit-b": Flavour((5, 3, 224, 224), (16, 16), 196, dim=768, prefix=1),
    "vit-l": Flavour((2, 3, 224, 224), (16, 16), 196, dim=1024, prefix=1),
    "siglip, 27 patches in 384 pixels": Flavour((3, 3, 384, 384), (14, 14), 729, dim=1152),
    "eva": Flavour((2, 3, 224, 224), (14, 14), 256, dim=1408, prefix=1),
    "dinov2-reg": Flavour((2, 3, 448, 448), (14, 14), 1024, dim=200, prefix=5, pos="patches"),
    "a table for each image": Flavour((3, 3, 224, 224), (14, 14), 256, dim=128, prefix=1, pos="batch"),
    "one row of 9": Flavour((7, 3, 20, 128), (14, 14), 9, dim=8, pos="none"),
    "one patch": Flavour((1, 3, 16, 16), (16, 16), 1, dim=32, bias=False, pos="none"),
    "4 side by side": Flavour((9, 3, 64, 64), (16, 16), 16, dim=264, prefix=2),
    "vit-l, rows of 21": Flavour((2, 3, 336, 336), (16, 16), 441, dim=1024, prefix=1),
    "siglip2 of 16 pixels": Flavour((1, 3, 384, 384), (16, 16), 576, dim=1152),
    "a column of 4": Flavour((5, 3, 64, 16), (16, 16), 4, dim=392, bias=False, prefix=1, pos="batch"),
    # So many tiles that warpgroups take turns.
    "clip-l, 128 images": replace(CLIP, pixels=(128, 3, 112, 112)),
    "vit-b, 96 images": Flavour((96, 3, 224, 224), (16, 16), 196, dim=768, prefix=1),
}

#: Grids of odd sizes for tests at few images, with every way to have prefix tokens and positions.
ODD = {
    "14, 9 x 7": Flavour((1, 3, 101, 128), (14, 14), 63, dim=136, pos="patches"),
    "14, 25 x 3, prefix": Flavour((1, 3, 42, 352), (14, 14), 75, dim=40, bias=False, prefix=3, pos="patches"),
    "14, 17 x 11, a table for each image": Flavour((1, 3, 154, 240), (14, 14), 187, dim=200, prefix=1, pos="batch"),
    "14, 9 x 9, norm": Flavour((1, 3, 126, 128), (14, 14), 81, dim=288, prefix=1, norm=True),
    "14, 9 x 5, norm of positions": Flavour((1, 3, 70, 128), (14, 14), 45, dim=128, bias=False, pos="patches", norm=True),
    "16, 5 x 3, prefix": Flavour((1, 3, 48, 80), (16, 16), 15, dim=48, prefix=4),
    "16, 11 x 13, no positions": Flavour((1, 3, 208, 176), (16, 16), 143, dim=392, prefix=2, pos="none"),
    "16, 7 x 7, norm": Flavour((1, 3, 112, 112), (16, 16), 49, dim=672, prefix=3, pos="batch", norm=True),
}
MODELS = {
    "vit-b": FLAVOURS["vit-b"],
    "eva-g": FLAVOURS["eva"],
    "siglip": FLAVOURS["siglip, 27 patches in 384 pixels"],
    "clip-l": replace(CLIP, pixels=(1, 3, 336, 336), grid=576),
}
#: Of a model and whether its pixels are uint8: so many images go to the kernel for few patches on 132 multiprocessors, and so
#: many to the other one. Room for how many clusters of 8 there is, and so whether 3 images of CLIP-L are few, is up to the GPU.
TAKEN = {
    ("vit-b", True): (14, 15),
    ("vit-b", False): (14, 15),
    ("eva-g", True): (5, 6),
    ("eva-g", False): (6, 7),
    ("siglip", True): (2, 3),
    ("siglip", False): (2, 3),
    ("clip-l", True): (2, 4),
    ("clip-l", False): (2, 4),
}


SMALL, LARGE, GEMM = "patch_embed_small_kernel", "patch_embed_kernel", "patch_embed_gemm_kernel"


def capacity(flavour: Flavour, device: torch.device) -> int:
    """At most so many images are taken by the kernel for few patches: it makes a tile on each multiprocessor at once."""
    tiles = torch.cuda.get_device_properties(device).multi_processor_count // -(-flavour.dim // 128)
    return tiles * 128 // flavour.grid


def of_images(flavour: Flavour, images: int) -> Flavour:
    return replace(flavour, pixels=(images, *flavour.pixels[1:]))


def kernels(function: Callable[[], object]) -> list[str]:
    """Those of the CUDA library that a function launches."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        function()
        torch.cuda.synchronize()
    return [name for event in profile.events() for name in (SMALL, LARGE, GEMM) if name in event.name]


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FLAVOURS)
def test_forward(name: str, dtype: str, uint8: bool, many: bool, device: torch.device) -> None:
    flavour = FLAVOURS[name]
    if many:
        flavour = of_images(flavour, capacity(flavour, device) + 2)
    tensors = flavour.inputs(DTYPES[dtype], device, uint8)
    before = {key: t.clone() for key, t in tensors.items()}
    out = embed(flavour, tensors, backend="cuda")
    assert out.is_contiguous() and out.dtype == DTYPES[dtype]
    assert compare(out, stock(flavour, double(tensors)), "gemm")
    assert torch.equal(out, embed(flavour, tensors, backend="cuda"))
    assert all(torch.equal(t, before[key]) for key, t in tensors.items())


@pytest.mark.parametrize("images", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ODD)
def test_odd_grids_of_few_images(name: str, dtype: str, uint8: bool, images: int, device: torch.device) -> None:
    """Tiles end in the middle of rows and of images, wherever the next one begins."""
    flavour = of_images(ODD[name], images)
    tensors = flavour.inputs(DTYPES[dtype], device, uint8)
    assert compare(embed(flavour, tensors, backend="cuda"), stock(flavour, double(tensors)), "gemm")


LARGE_PATCHES = {
    "clip-b/32": Flavour((48, 3, 224, 224), (32, 32), 49, dim=768, bias=False, prefix=1, norm=True),
    "vit-b/32, 70 images": Flavour((70, 3, 224, 224), (32, 32), 49, dim=768, prefix=1),
    "5 x 8": Flavour((60, 3, 160, 256), (32, 32), 40, dim=200, pos="batch"),
    "one row, crooked": Flavour((1200, 3, 32, 64), (32, 32), 2, dim=264, prefix=2, pos="patches"),
    "norm of 4 blocks": Flavour((40, 3, 256, 256), (32, 32), 64, dim=1024, prefix=1, norm=True),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", LARGE_PATCHES)
def test_large_patches(name: str, dtype: str, device: torch.device) -> None:
    """Of 32 x 32, whose rows of 16 bits the engine copies 64 bytes at a time."""
    flavour = LARGE_PATCHES[name]
    tensors = flavour.inputs(DTYPES[dtype], device)
    out = embed(flavour, tensors, backend="cuda")
    assert compare(out, stock(flavour, double(tensors)), "gemm")
    assert kernels(lambda: embed(flavour, tensors, backend="cuda")) == [GEMM]
    few = of_images(flavour, 1)
    with pytest.raises(BackendError, match="patches of 32: at least 2304"):
        embed(few, few.inputs(DTYPES[dtype], device), backend="cuda")


@pytest.mark.parametrize(("name", "uint8"), TAKEN)
def test_who_takes_a_model(name: str, uint8: bool, device: torch.device) -> None:
    """Up to how many images are few on an H100, as docs/patch_embed.md says."""
    if torch.cuda.get_device_properties(device).multi_processor_count != 132:
        pytest.skip("how many are few depends on the multiprocessors: told for 132")
    few, many = TAKEN[name, uint8]
    flavour = of_images(MODELS[name], many)
    tensors = flavour.inputs(torch.bfloat16, device, uint8)
    exact = stock(flavour, double(tensors))
    for images, kernel in ((1, SMALL), (few, SMALL), (many, GEMM if (name, uint8) == ("vit-b", False) else LARGE)):
        batch = tensors | {"pixels": tensors["pixels"][:images]}
        assert compare(embed(flavour, batch, backend="cuda"), exact[:images], "gemm")
        assert kernels(lambda t=batch: embed(flavour, t, backend="cuda")) == [kernel]  # type: ignore[misc]


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
def test_few_patches_become_many(uint8: bool, device: torch.device) -> None:
    """The last number of images that the kernel for few patches takes, and the next: both are right, and the kernel changes."""
    flavour = Flavour((1, 3, 64, 64), (16, 16), 16, dim=96, prefix=1)
    patches = 128 - 2 * uint8  # of a tile: constants have the place of two
    few = torch.cuda.get_device_properties(device).multi_processor_count * patches // flavour.grid
    tensors = of_images(flavour, few + 1).inputs(torch.bfloat16, device, uint8)
    exact = stock(flavour, double(tensors))
    for images, kernel in ((few, SMALL), (few + 1, LARGE if uint8 else GEMM)):
        pixels = tensors["pixels"][:images]
        assert compare(embed(flavour, tensors | {"pixels": pixels}, backend="cuda"), exact[:images], "gemm")
        assert kernels(lambda p=pixels: embed(flavour, tensors | {"pixels": p}, backend="cuda")) == [kernel]  # type: ignore[misc]


@pytest.mark.parametrize("name", ["clip-l", "vit-b", "eva"])
def test_waits_for_what_was_launched_before(name: str, device: torch.device) -> None:
    """The kernel for few patches starts before the ones before it are done."""
    flavour = FLAVOURS[name]
    inputs = [flavour.inputs(torch.bfloat16, device, uint8=True) for _ in range(3)]
    exact = [embed(flavour, tensors, backend="cuda") for tensors in inputs]
    tensors = {key: t.clone() for key, t in inputs[0].items()}
    graph, outs = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph):
        for fresh in inputs * 5:
            for key, t in fresh.items():
                tensors[key].copy_(t)
            outs += [embed(flavour, tensors, backend="cuda").clone(), embed(flavour, tensors, backend="cuda")]
    for _ in range(3):
        graph.replay()
    assert all(torch.equal(out, exact[i // 2 % 3]) for i, out in enumerate(outs))


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("name", ["clip-l", "clip-b", "siglip, 27 patches in 384 pixels"])
def test_training(name: str, uint8: bool, many: bool, device: torch.device) -> None:
    """The forward keeps what the backward of another backend needs."""
    flavour = of_images(FLAVOURS[name], 3 + many * capacity(FLAVOURS[name], device))
    tensors = flavour.inputs(torch.bfloat16, device, uint8)
    grad = torch.randn(stock(flavour, double(tensors)).shape, device=device, dtype=torch.bfloat16)
    exact = gradients(lambda t: stock(flavour, t), double(tensors), grad.double())
    for what, got in gradients(lambda t: embed(flavour, t), tensors, grad).items():
        assert compare(got, exact[what], "grad" if flavour.norm else "gemm"), what


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("patch", [14, 16])
def test_still_image_in_patches_of_two_frames(patch: int, uint8: bool, device: torch.device) -> None:
    flavour = Flavour((3, 3, 1, 8 * patch, 112), (2, patch, patch), 8 * (112 // patch), dim=1152)
    tensors = flavour.inputs(torch.bfloat16, device, uint8)
    exact = stock(flavour, double(tensors | {"pixels": tensors["pixels"].expand(-1, -1, 2, -1, -1)}))
    assert compare(embed(flavour, tensors, backend="cuda"), exact, "gemm")
    with pytest.raises(BackendError, match="square patches"):
        embed(flavour, tensors | {"pixels": tensors["pixels"].expand(-1, -1, 2, -1, -1)}, backend="cuda")


def test_total_is_the_sum_before_the_norm(device: torch.device) -> None:
    tensors = CLIP.inputs(torch.bfloat16, device)
    patches = tensors["pixels"].view(3, 3, 8, 14, 8, 14).permute(0, 2, 4, 1, 3, 5)[:, None, :, :, :, None]
    weight = tensors["weight"][:, :, None]
    vectors = (None, tensors["prefix_tokens"], tensors["pos_embed"], tensors["norm_weight"], tensors["norm_bias"])
    out, total = _fwd(patches, weight, *vectors, 1e-5, None, None, True, "cuda")
    assert compare(out, stock(CLIP, double(tensors)), "gemm")
    plain = replace(CLIP, norm=False)
    unnormed = {key: t for key, t in tensors.items() if not key.startswith("norm")}
    assert compare(total, stock(plain, double(unnormed)), "gemm")
    _, total = _fwd(patches, weight, *vectors[:3], None, None, 0.0, None, None, True, "cuda")
    assert compare(total, stock(plain, double(unnormed)), "gemm")


def aligned_layouts(pixels: Tensor) -> dict[str, Tensor]:
    batch, channels, height, width = pixels.shape
    cropped = pixels.new_zeros(batch, channels, height + 3, width + 32)
    cropped[:, :, 2 : height + 2, 16 : width + 16] = pixels
    every_second = pixels.new_zeros(2 * batch, channels, height, width)
    every_second[::2] = pixels
    return {
        "crop": cropped[:, :, 2 : height + 2, 16 : width + 16],
        "every second image": every_second[::2],
        "planes first": pixels.transpose(0, 1).contiguous().transpose(0, 1),
    }


@pytest.mark.parametrize("images", [3, 503], ids=["few", "many"])
@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("patch", [14, 16])
def test_layouts(patch: int, uint8: bool, images: int, device: torch.device) -> None:
    flavour = Flavour((images, 3, 5 * patch + 1, 112), (patch, patch), 5 * (112 // patch), dim=64, prefix=1)
    tensors = flavour.inputs(torch.float16, device, uint8)
    exact = stock(flavour, double(tensors))
    for name, pixels in aligned_layouts(tensors["pixels"]).items():
        assert compare(embed(flavour, tensors | {"pixels": pixels}, backend="cuda"), exact, "gemm"), name
    expanded = tensors["pixels"][:1].expand(images, -1, -1, -1)
    assert compare(embed(flavour, tensors | {"pixels": expanded}, backend="cuda"), exact[:1].expand(images, -1, -1), "gemm")


def test_parameters_of_any_stride(device: torch.device) -> None:
    tensors = CLIP.inputs(torch.bfloat16, device)
    exact = stock(CLIP, double(tensors))
    strided = {name: torch.stack([t, t + 1], -1)[..., 0] for name, t in tensors.items() if name not in ("pixels", "pos_embed")}
    assert not any(t.is_contiguous() for t in strided.values())
    assert compare(embed(CLIP, tensors | strided, backend="cuda"), exact, "gemm")


@pytest.mark.parametrize("many", [False, True], ids=["few", "many"])
@pytest.mark.parametrize("name", ["clip-l", "clip-b", "eva", "siglip, 27 patches in 384 pixels"])
def test_nan_stays_in_its_token(name: str, many: bool, device: torch.device) -> None:
    flavour = of_images(FLAVOURS[name], 3 + many * capacity(FLAVOURS[name], device))
    tensors = flavour.inputs(torch.bfloat16, device)
    exact = stock(flavour, double(tensors))
    p, width = flavour.patch[0], flavour.pixels[3] // flavour.patch[0]
    spoilt = [(0, 0, 0), (1, 1, 2), (2, flavour.pixels[2] // p - 1, width - 1)]
    for b, y, x in spoilt:
        tensors["pixels"][b, 2, y * p + p - 1, x * p + p - 1] = float("nan")
        exact[b, flavour.prefix + y * width + x] = float("nan")
    assert compare(embed(flavour, tensors, backend="cuda"), exact, "gemm")


@pytest.mark.parametrize("images", [2, 300], ids=["few", "many"])
@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e4, 1e30])
def test_weights_of_any_size(scale: float, images: int, device: torch.device) -> None:
    """uint8 pixels are normalised on the way, whatever the range of the weights."""
    flavour = Flavour((images, 3, 112, 112), (14, 14), 64, dim=128, pos="none", bias=False)
    tensors = flavour.inputs(torch.bfloat16, device, uint8=True)
    tensors["weight"] = (tensors["weight"] * torch.linspace(0.1, 10, 128, device=device)[:, None, None, None] * scale).bfloat16()
    tensors["weight"][5] = 0
    exact = stock(flavour, double(tensors)) / scale
    assert compare((embed(flavour, tensors, backend="cuda").double() / scale).bfloat16(), exact, "gemm")


@pytest.mark.parametrize("dtype", DTYPES)
def test_one_weight_outgrows_the_others(dtype: str, device: torch.device) -> None:
    """It takes the upper bits of the whole numbers; what is left for the others is enough beside what it adds to the sum."""
    flavour = Flavour((4, 3, 112, 112), (14, 14), 64, dim=128, pos="none")
    tensors = flavour.inputs(DTYPES[dtype], device, uint8=True)
    tensors["weight"][:, 1, 3, 5] *= 100
    assert compare(embed(flavour, tensors, backend="cuda"), stock(flavour, double(tensors)), "gemm")


def test_fold_follows_the_weight(device: torch.device) -> None:
    flavour = FLAVOURS["vit-b"]
    tensors = flavour.inputs(torch.bfloat16, device, uint8=True)
    embed(flavour, tensors, backend="cuda")
    tensors["weight"].mul_(-1.5)
    assert compare(embed(flavour, tensors, backend="cuda"), stock(flavour, double(tensors)), "gemm")


@pytest.mark.parametrize("name", ["eva", "siglip, 27 patches in 384 pixels"])
def test_fold_is_no_less_exact_than_normalising_first(name: str, device: torch.device) -> None:
    flavour = FLAVOURS[name]
    tensors = flavour.inputs(torch.bfloat16, device, uint8=True)
    exact = stock(flavour, double(tensors))
    mean, std = (torch.tensor(v, device=device)[:, None, None] for v in (CLIP_MEAN, CLIP_STD))
    normalised = ((tensors["pixels"].float() / 255 - mean) / std).bfloat16()
    first = embed(flavour, tensors | {"pixels": normalised}, backend="cuda")
    assert compare(embed(flavour, tensors, backend="cuda"), exact, "gemm").ratio <= compare(first, exact, "gemm").ratio


def test_every_token_is_written(device: torch.device) -> None:
    flavour = FLAVOURS["dinov2-reg"]
    tensors = flavour.inputs(torch.bfloat16, device, uint8=True)
    size = 2 * (flavour.grid + flavour.prefix) * flavour.dim
    poison = [torch.full((size,), float("nan"), device=device, dtype=torch.bfloat16) for _ in range(4)]
    del poison
    assert embed(flavour, tensors, backend="cuda").isfinite().all()


def test_graph_follows_its_inputs(device: torch.device) -> None:
    tensors = CLIP.inputs(torch.bfloat16, device, uint8=True)
    embed(CLIP, tensors, backend="cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = embed(CLIP, tensors, backend="cuda")
    for _ in range(2):
        for key, fresh in CLIP.inputs(torch.bfloat16, device, uint8=True).items():
            tensors[key].copy_(fresh)
        graph.replay()
        assert compare(out, stock(CLIP, double(tensors)), "gemm")


@pytest.mark.parametrize(("side", "dim"), [(112, 64), (448, 1024)], ids=["few", "many"])
def test_offsets_past_32_bits(side: int, dim: int, device: torch.device) -> None:
    flavour = Flavour((2, 3, side, side), (14, 14), (side // 14) ** 2, dim=dim)
    tensors = flavour.inputs(torch.bfloat16, device, uint8=True)
    far = torch.zeros(2**32 + 2**20, dtype=torch.uint8, device=device)
    pixels = far.as_strided(flavour.pixels, (2**32, side * side, side, 1))
    pixels.copy_(tensors["pixels"])
    assert compare(embed(flavour, tensors | {"pixels": pixels}, backend="cuda"), stock(flavour, double(tensors)), "gemm")


def test_offsets_past_32_bits_in_pixels_of_16(device: torch.device) -> None:
    flavour = Flavour((2, 3, 1024, 1024), (16, 16), 4096, dim=392)
    tensors = flavour.inputs(torch.bfloat16, device)
    far = torch.zeros(2**31 + 2**22, dtype=torch.bfloat16, device=device)
    pixels = far.as_strided(flavour.pixels, (2**31, 2**20, 1024, 1))
    pixels.copy_(tensors["pixels"])
    assert kernels(lambda: embed(flavour, tensors | {"pixels": pixels}, backend="cuda")) == [GEMM]
    assert compare(embed(flavour, tensors | {"pixels": pixels}, backend="cuda"), stock(flavour, double(tensors)), "gemm")


def rows_of(shape: tuple[int, ...], patch: tuple[int, ...], columns: str = "cyx", **changes: Any) -> Flavour:
    options = {"layout": "rows", "columns": columns}
    return replace(Flavour(shape, patch, shape[-2], weight="linear", options=options), **changes)


#: Rows of both orders, in one image or several.
ROWS = {
    "qwen3-vl": rows_of((4000, 1536), (2, 16, 16), dim=1152),
    "rows of 1152, no bias": rows_of((1601, 1152), (2, 12, 16), dim=1280, bias=False),
    "naflex": rows_of((4, 401, 768), (16, 16), "yxc", dim=1152, pos="batch"),
    "naflex with a class token": rows_of((16, 99, 768), (16, 16), "yxc", dim=392, prefix=1, pos="batch"),
    "tokens of one image": rows_of((1, 1601, 768), (16, 16), dim=200, prefix=3, pos="patches"),
    "two rows of each image": rows_of((800, 2, 768), (16, 16), "yxc", dim=8, prefix=1, pos="none"),
    "70,000 rows, as short as they may be": rows_of((70_000, 576), (1, 24, 24), dim=40, channels=1),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", ROWS)
def test_rows(name: str, dtype: str, device: torch.device) -> None:
    flavour = ROWS[name]
    tensors = flavour.inputs(DTYPES[dtype], device)
    exact = stock(flavour, double(tensors))
    out = embed(flavour, tensors, backend="cuda")
    assert compare(out, exact, "gemm")
    assert torch.equal(out, embed(flavour, tensors, backend="cuda"))
    assert kernels(lambda: embed(flavour, tensors, backend="cuda")) == [GEMM]


def test_views_of_rows(device: torch.device) -> None:
    flavour = ROWS["naflex"]
    tensors = flavour.inputs(torch.bfloat16, device)
    exact = stock(flavour, double(tensors))
    pixels, weight = tensors["pixels"], tensors["weight"]
    wider = torch.full((8, 450, 776), float("nan"), device=device, dtype=torch.bfloat16)[1::2, 3:404, :768]
    wider.copy_(pixels)
    transposed = pixels.transpose(0, 1).contiguous().transpose(0, 1)
    for view in (wider, transposed):
        assert compare(embed(flavour, tensors | {"pixels": view}, backend="cuda"), exact, "gemm")
    conv = weight.view(-1, 16, 16, 3).permute(0, 3, 1, 2).contiguous()
    assert compare(embed(flavour, tensors | {"weight": conv}, backend="cuda"), exact, "gemm")
    odd = torch.zeros(4, 401, 772, device=device, dtype=torch.bfloat16)[..., :768]
    odd.copy_(pixels)
    with pytest.raises(BackendError, match="a stride of pixels of .* elements: multiples of 16 bytes"):
        embed(flavour, tensors | {"pixels": odd}, backend="cuda")


def test_rows_of_still_images(device: torch.device) -> None:
    flavour = ROWS["qwen3-vl"]
    tensors = flavour.inputs(torch.bfloat16, device)
    once = torch.randn(4000, 768, device=device, dtype=torch.bfloat16)
    repeated = once.view(4000, 3, 1, 256).expand(-1, -1, 2, -1).reshape(4000, 1536)
    exact = stock(flavour, double(tensors | {"pixels": repeated}))
    assert compare(embed(flavour, tensors | {"pixels": once}, backend="cuda"), exact, "gemm")


def test_nan_stays_in_its_row(device: torch.device) -> None:
    flavour = ROWS["qwen3-vl"]
    tensors = flavour.inputs(torch.bfloat16, device)
    exact = stock(flavour, double(tensors))
    for row in (0, 127, 128, 3999):
        tensors["pixels"][row, 1535] = float("nan")
        exact[row] = float("nan")
    assert compare(embed(flavour, tensors, backend="cuda"), exact, "gemm")


def repeated(once: Tensor, columns: str) -> Tensor:
    """Rows of 14 x 14 pixels of three channels as rows of two equal frames."""
    frames = once.view(len(once), 3, 1, 196) if columns == "cyx" else once.view(len(once), 1, 1, 588)
    return frames.expand(-1, -1, 2, -1).reshape(len(once), 1176)


@pytest.mark.parametrize("pos", ["none", "patches"])
@pytest.mark.parametrize("columns", ["cyx", "yxc"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_of_no_whole_16_bytes(dtype: str, columns: str, pos: str, device: torch.device) -> None:
    """Qwen2-VL's still images: the weight's frames are added up on the way, and a row's NaN stays in it."""
    flavour = rows_of((4001, 1176), (2, 14, 14), columns, dim=1280 if pos == "none" else 392, bias=pos != "none", pos=pos)
    tensors = flavour.inputs(DTYPES[dtype], device)
    for once in (torch.empty(4001, 588, device=device, dtype=DTYPES[dtype]), torch.empty_like(tensors["pixels"])[:, 8:596]):
        once.copy_(torch.randn(4001, 588, device=device))
        exact = stock(flavour, double(tensors | {"pixels": repeated(once, columns)}))
        for row in (0, 63, 64, 2000, 4000):
            once[row, 587] = float("nan")
            exact[row] = float("nan")
        assert compare(embed(flavour, tensors | {"pixels": once}, backend="cuda"), exact, "gemm")
        assert kernels(lambda x=once: embed(flavour, tensors | {"pixels": x}, backend="cuda")) == [GEMM]  # type: ignore[misc]


def test_rows_that_it_leaves_to_others(device: torch.device) -> None:
    flavour = ROWS["qwen3-vl"]
    tensors = flavour.inputs(torch.bfloat16, device)
    with pytest.raises(BackendError, match="rows with nothing to add"):
        embed(replace(flavour, pos="none"), {key: t for key, t in tensors.items() if key != "pos_embed"}, backend="cuda")
    for others, reason in (
        (rows_of((1600, 1176), (2, 14, 14), dim=64), "rows of 1176 pixels: multiples of 64, or 4 or 12 more, at least 576"),
        (rows_of((1600, 192), (8, 8), dim=64), "rows of 192 pixels: multiples of 64, or 4 or 12 more, at least 576"),
        (rows_of((3, 511, 768), (16, 16), dim=64), "1533 rows: at least 1536"),
    ):
        with pytest.raises(BackendError, match=reason):
            embed(others, others.inputs(torch.bfloat16, device), backend="cuda")
    still = rows_of((1600, 700), (2, 10, 35), dim=64, channels=1, pos="none")
    once = torch.randn(1600, 350, device=device, dtype=torch.bfloat16)
    with pytest.raises(BackendError, match="rows of 350 pixels: multiples of 64"):
        embed(still, still.inputs(torch.bfloat16, device) | {"pixels": once}, backend="cuda")
    normed = replace(flavour, norm=True)
    with pytest.raises(BackendError, match="rows: of 16 bits, without a norm"):
        embed(normed, normed.inputs(torch.bfloat16, device), backend="cuda")


def test_no_images(device: torch.device) -> None:
    tensors = FLAVOURS["vit-b"].inputs(torch.bfloat16, device)
    assert embed(FLAVOURS["vit-b"], tensors | {"pixels": tensors["pixels"][:0]}, backend="cuda").shape == (0, 197, 768)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pixels": (2, 3, 28, 120)}, "a stride of pixels of 120 elements: multiples of 16 bytes"),
        ({"pixels": (2, 3, 28, 32)}, "2 patches side by side: too few"),
        ({"dtype": torch.float32}, "it takes uint8 or 16-bit pixels and 16-bit weights"),
        ({"dim": 12}, "dim 12: a multiple of 8"),
        ({"patch": (7, 7)}, "patch 7: 14, 16 or 32"),
        ({"pixels": (2, 3, 64, 64), "patch": (32, 32), "grid": 4}, "patches of 32: 16-bit pixels"),
        ({"channels": 1}, "square patches of images of three channels"),
        ({"dim": 1280, "norm": True}, "dim 1280 with a norm: at most 8 times 96 or 128"),
    ],
)
def test_refusals(change: dict, reason: str, device: torch.device) -> None:
    change = dict(change)
    dtype = change.pop("dtype", torch.bfloat16)
    channels = change.get("channels", 3)
    flavour = replace(Flavour((2, channels, 28, 112), (14, 14), 16, dim=64, pos="none"), **change)
    tensors = flavour.inputs(dtype, device, uint8=channels == 3)
    with pytest.raises(BackendError, match=reason):
        embed(flavour, tensors, backend="cuda")
    embed(flavour, tensors)  # another backend takes it

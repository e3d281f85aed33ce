# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of patch embedding, at sizes that it takes: against torch's convolution in fp64, and at its own edges."""

from dataclasses import replace

import pytest
import torch
from test_patch_embed import CLIP_MEAN, CLIP_STD, Flavour, double, embed, gradients, stock
from torch import Tensor

from vlmkernels import BackendError
from vlmkernels.backends.cuda._library import path
from vlmkernels.ops.patch_embed import _fwd
from vlmkernels.testing.compare import compare

pytestmark = pytest.mark.gpu

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
    # So many tiles that warpgroups take turns.
    "clip-l, 128 images": replace(CLIP, pixels=(128, 3, 112, 112)),
    "vit-b, 96 images": Flavour((96, 3, 224, 224), (16, 16), 196, dim=768, prefix=1),
}


@pytest.fixture(autouse=True)
def _library(device: torch.device) -> None:
    """Skips where the kernel has no place to be; a library that is there and does not load fails."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the kernel is for compute capability 9.0")
    if path() is None:
        pytest.skip("the CUDA library was not built")
    assert _fwd.why_not("cuda", device) is None


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FLAVOURS)
def test_forward(name: str, dtype: str, uint8: bool, device: torch.device) -> None:
    flavour = FLAVOURS[name]
    tensors = flavour.inputs(DTYPES[dtype], device, uint8)
    before = {key: t.clone() for key, t in tensors.items()}
    out = embed(flavour, tensors, backend="cuda")
    assert out.is_contiguous() and out.dtype == DTYPES[dtype]
    assert compare(out, stock(flavour, double(tensors)), "gemm")
    assert torch.equal(out, embed(flavour, tensors, backend="cuda"))
    assert all(torch.equal(t, before[key]) for key, t in tensors.items())


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("name", ["clip-l", "clip-b", "siglip, 27 patches in 384 pixels"])
def test_training(name: str, uint8: bool, device: torch.device) -> None:
    """The forward keeps what the backward of another backend needs."""
    flavour = FLAVOURS[name]
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


@pytest.mark.parametrize("uint8", [True, False], ids=["uint8", "float"])
@pytest.mark.parametrize("patch", [14, 16])
def test_layouts(patch: int, uint8: bool, device: torch.device) -> None:
    flavour = Flavour((3, 3, 5 * patch + 1, 112), (patch, patch), 5 * (112 // patch), dim=64, prefix=1)
    tensors = flavour.inputs(torch.float16, device, uint8)
    exact = stock(flavour, double(tensors))
    for name, pixels in aligned_layouts(tensors["pixels"]).items():
        assert compare(embed(flavour, tensors | {"pixels": pixels}, backend="cuda"), exact, "gemm"), name
    expanded = tensors["pixels"][:1].expand(3, -1, -1, -1)
    assert compare(embed(flavour, tensors | {"pixels": expanded}, backend="cuda"), exact[:1].expand(3, -1, -1), "gemm")


def test_parameters_of_any_stride(device: torch.device) -> None:
    tensors = CLIP.inputs(torch.bfloat16, device)
    exact = stock(CLIP, double(tensors))
    strided = {name: torch.stack([t, t + 1], -1)[..., 0] for name, t in tensors.items() if name not in ("pixels", "pos_embed")}
    assert not any(t.is_contiguous() for t in strided.values())
    assert compare(embed(CLIP, tensors | strided, backend="cuda"), exact, "gemm")


@pytest.mark.parametrize("name", ["clip-l", "clip-b", "siglip, 27 patches in 384 pixels"])
def test_nan_stays_in_its_token(name: str, device: torch.device) -> None:
    flavour = FLAVOURS[name]
    tensors = flavour.inputs(torch.bfloat16, device)
    exact = stock(flavour, double(tensors))
    p, width = flavour.patch[0], flavour.pixels[3] // flavour.patch[0]
    spoilt = [(0, 0, 0), (1, 1, 2), (2, flavour.pixels[2] // p - 1, width - 1)]
    for b, y, x in spoilt:
        tensors["pixels"][b, 2, y * p + p - 1, x * p + p - 1] = float("nan")
        exact[b, flavour.prefix + y * width + x] = float("nan")
    assert compare(embed(flavour, tensors, backend="cuda"), exact, "gemm")


@pytest.mark.parametrize("scale", [1e-30, 1e-4, 1e4, 1e30])
def test_weights_of_any_size(scale: float, device: torch.device) -> None:
    """uint8 pixels are multiplied with whole numbers of 16 bits, whatever the range of the weights."""
    flavour = Flavour((2, 3, 112, 112), (14, 14), 64, dim=128, pos="none", bias=False)
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


def test_fold_is_no_less_exact_than_normalising_first(device: torch.device) -> None:
    flavour = FLAVOURS["siglip, 27 patches in 384 pixels"]
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


def test_offsets_past_32_bits(device: torch.device) -> None:
    flavour = Flavour((2, 3, 28, 112), (14, 14), 16, dim=64)
    tensors = flavour.inputs(torch.bfloat16, device, uint8=True)
    far = torch.zeros(2**32 + 2**16, dtype=torch.uint8, device=device)
    pixels = far.as_strided(flavour.pixels, (2**32, 28 * 112, 112, 1))
    pixels.copy_(tensors["pixels"])
    assert compare(embed(flavour, tensors | {"pixels": pixels}, backend="cuda"), stock(flavour, double(tensors)), "gemm")


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
        ({"patch": (7, 7)}, "patch 7: 14 or 16"),
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

# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of the gradients of patch embedding, at sizes that they take: against torch's convolution in fp64."""

from collections.abc import Callable, Iterable
from dataclasses import replace

import pytest
import torch
from conftest import capture
from test_patch_embed import Flavour, double, embed, stock
from test_patch_embed_cuda import DTYPES, aligned_layouts, of_images
from torch import Tensor

from vlmkernels import BackendError
from vlmkernels.ops.patch_embed import _bwd
from vlmkernels.testing.compare import compare

pytestmark = [pytest.mark.gpu, pytest.mark.usefixtures("cuda_library")]

VIT = Flavour((32, 3, 224, 224), (16, 16), 196, dim=768, prefix=1)
EVA = Flavour((15, 3, 224, 224), (14, 14), 256, dim=1408, prefix=1)
CLIP = Flavour((16, 3, 336, 336), (14, 14), 576, dim=1024, bias=False, prefix=1, norm=True)
FLAVOURS = {
    "clip-l": CLIP,
    "clip-b": Flavour((61, 3, 64, 96), (16, 16), 24, dim=768, bias=False, prefix=1, norm=True),
    "14, norm, a table for each image": Flavour((16, 3, 70, 128), (14, 14), 45, dim=128, pos="batch", norm=True),
    "16, norm, positions of patches": Flavour((32, 3, 64, 80), (16, 16), 20, dim=672, prefix=2, pos="patches", norm=True),
    "vit-b": VIT,
    "vit-b, several steps of images": replace(VIT, pixels=(156, 3, 64, 96), grid=24),
    "vit-l, rows of 21": Flavour((30, 3, 336, 336), (16, 16), 441, dim=1024, prefix=1),
    "siglip2 of 16 pixels": Flavour((32, 3, 384, 384), (16, 16), 576, dim=1152),
    "eva": EVA,
    "siglip, 27 patches in 384 pixels": Flavour((16, 3, 384, 384), (14, 14), 729, dim=1152),
    "dinov2-reg": Flavour((31, 3, 112, 112), (14, 14), 64, dim=200, prefix=5, pos="patches"),
    "16, a table for each image": Flavour((32, 3, 64, 96), (16, 16), 24, dim=392, prefix=2, pos="batch"),
    "14, a table for each image": Flavour((16, 3, 42, 128), (14, 14), 27, dim=64, pos="batch"),
    "16, 5 x 3, no positions": Flavour((26, 3, 48, 80), (16, 16), 15, dim=8, pos="none"),
    "16, one patch": Flavour((64, 3, 16, 16), (16, 16), 1, dim=264, bias=False, prefix=3, pos="none"),
    "14, 25 x 3": Flavour((13, 3, 42, 352), (14, 14), 75, dim=1000, bias=False, prefix=3),
    "14, 9 x 7": Flavour((160, 3, 101, 128), (14, 14), 63, dim=136, pos="patches"),
}


def gradients(
    function: Callable[..., Tensor], tensors: dict[str, Tensor], grad: Tensor, names: Iterable[str] = ()
) -> dict[str, Tensor]:
    """Those of ``names``, else of all parameters: the kernels have none of pixels."""
    names = list(names) or [name for name in tensors if name != "pixels"]
    leaves = {name: t.detach().requires_grad_(name in names) for name, t in tensors.items()}
    return dict(zip(names, torch.autograd.grad(function(leaves), [leaves[n] for n in names], grad), strict=True))


def tokens_like(flavour: Flavour, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.randn(flavour.pixels[0], flavour.prefix + flavour.grid, flavour.dim, device="cpu").to(device, dtype)


def exact_gradients(flavour: Flavour, tensors: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    return gradients(lambda t: stock(flavour, t), double(tensors), grad.double())


def cuda_gradients(flavour: Flavour, tensors: dict[str, Tensor], grad: Tensor, names: Iterable[str] = ()) -> dict[str, Tensor]:
    return gradients(lambda t: embed(flavour, t, backend="cuda"), tensors, grad, names)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FLAVOURS)
def test_gradients(name: str, dtype: str, device: torch.device) -> None:
    flavour = FLAVOURS[name]
    tensors, grad = flavour.inputs(DTYPES[dtype], device), tokens_like(flavour, DTYPES[dtype], device)
    before = {key: t.clone() for key, t in tensors.items()}
    exact, got = exact_gradients(flavour, tensors, grad), cuda_gradients(flavour, tensors, grad)
    for what in exact:
        assert got[what].dtype == DTYPES[dtype] and got[what].is_contiguous(), what
        assert compare(got[what], exact[what], "grad" if flavour.norm else "gemm"), what
    again = cuda_gradients(flavour, tensors, grad)
    assert all(torch.equal(got[what], again[what]) for what in got)
    assert all(torch.equal(t, before[key]) for key, t in tensors.items())


@pytest.mark.parametrize("name", ["eva", "clip-b", "16, a table for each image"])
def test_what_is_not_asked_for_is_left_out(name: str, device: torch.device) -> None:
    """The gradient of the weight alone, and each other one beside it; without the weight it is for another backend."""
    flavour = FLAVOURS[name]
    tensors, grad = flavour.inputs(torch.bfloat16, device), tokens_like(flavour, torch.bfloat16, device)
    everything = cuda_gradients(flavour, tensors, grad)
    for other in everything:
        got = cuda_gradients(flavour, tensors, grad, {"weight", other})
        assert all(torch.equal(x, everything[what]) for what, x in got.items())
    with pytest.raises(BackendError, match="it computes the weight's gradient"):
        cuda_gradients(flavour, tensors, grad, {"pos_embed"})
    with pytest.raises(BackendError, match="it computes the weight's gradient"):
        cuda_gradients(flavour, tensors, grad, {"pixels", "weight"})


def test_a_step_of_training_takes_it(device: torch.device) -> None:
    tensors, grad = VIT.inputs(torch.bfloat16, device), tokens_like(VIT, torch.bfloat16, device)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        gradients(lambda t: embed(VIT, t), tensors, grad)
        torch.cuda.synchronize()
    assert any("patch_embed_bwd_kernel" in event.name for event in profile.events())


@pytest.mark.parametrize("patch", [14, 16])
def test_layouts(patch: int, device: torch.device) -> None:
    """Crops, strided images and planes; what lies beside the patches is NaN and must not matter."""
    flavour = Flavour((32, 3, 5 * patch + 1, 120), (patch, patch), 5 * (120 // patch), dim=64, prefix=1)
    tensors, grad = flavour.inputs(torch.float16, device), tokens_like(flavour, torch.float16, device)
    exact = exact_gradients(flavour, tensors, grad)
    tensors["pixels"][:, :, 5 * patch :] = float("nan")
    tensors["pixels"][:, :, :, 120 // patch * patch :] = float("nan")
    for name, pixels in aligned_layouts(tensors["pixels"]).items():
        got = cuda_gradients(flavour, tensors | {"pixels": pixels}, grad)
        assert all(compare(got[what], exact[what], "gemm") for what in exact), name


def test_gradients_of_any_stride(device: torch.device) -> None:
    flavour = FLAVOURS["dinov2-reg"]
    tensors = flavour.inputs(torch.bfloat16, device)
    grad = tokens_like(replace(flavour, pixels=(1, *flavour.pixels[1:])), torch.bfloat16, device).expand(31, -1, -1)
    exact, contiguous = exact_gradients(flavour, tensors, grad), grad.contiguous()
    shifted = torch.zeros(grad.numel() + 1, device=device, dtype=grad.dtype)[1:].view(grad.shape)
    for view in (grad, contiguous.transpose(0, 1).contiguous().transpose(0, 1), shifted.copy_(contiguous)):
        got = cuda_gradients(flavour, tensors, view)
        assert all(compare(got[what], exact[what], "gemm") for what in exact)


@pytest.mark.parametrize("name", ["clip-l", "clip-b"])
def test_nan_of_a_prefix_token_stays_out_of_the_weight(name: str, device: torch.device) -> None:
    flavour = FLAVOURS[name]
    tensors, grad = flavour.inputs(torch.bfloat16, device), tokens_like(flavour, torch.bfloat16, device)
    grad[5, 0, 11] = float("nan")
    exact, got = exact_gradients(flavour, tensors, grad), cuda_gradients(flavour, tensors, grad)
    for what in exact:
        assert torch.equal(got[what].isfinite(), exact[what].isfinite()), what
    assert compare(got["weight"], exact["weight"], "grad")


@pytest.mark.parametrize("name", ["vit-b", "eva"])
def test_nan_stays_in_its_row_or_column(name: str, device: torch.device) -> None:
    """Of a pixel in a column of the weight's gradient, of a token's gradient in a row, of a prefix token in itself alone."""
    flavour = FLAVOURS[name]
    tensors, grad = flavour.inputs(torch.bfloat16, device), tokens_like(flavour, torch.bfloat16, device)
    tensors["pixels"][3, 2, 5, 200] = float("nan")
    grad[4, 7, 300] = float("inf")
    grad[5, 0, 11], grad[6, 0, 12] = float("nan"), float("-inf")
    exact, got = exact_gradients(flavour, tensors, grad), cuda_gradients(flavour, tensors, grad)
    for what in exact:
        assert torch.equal(got[what].isfinite(), exact[what].isfinite()), what
        assert compare(got[what].nan_to_num(0, 0, 0), exact[what].nan_to_num(0, 0, 0), "gemm"), what
    assert got["weight"].isfinite().sum() == (flavour.dim - 1) * (got["weight"][0].numel() - 1)


def test_offsets_past_32_bits(device: torch.device) -> None:
    flavour = Flavour((32, 3, 64, 64), (16, 16), 16, dim=64)
    tensors, grad = flavour.inputs(torch.bfloat16, device), tokens_like(flavour, torch.bfloat16, device)
    far = torch.zeros(2**31 + 2**28, dtype=torch.bfloat16, device=device)
    pixels = far.as_strided(flavour.pixels, (2**26 + 2**22, 2**20, 64, 1))
    pixels.copy_(tensors["pixels"])
    exact, got = exact_gradients(flavour, tensors, grad), cuda_gradients(flavour, tensors | {"pixels": pixels}, grad)
    assert all(compare(got[what], exact[what], "gemm") for what in exact)


@pytest.mark.parametrize("norm", [False, True])
def test_gradients_of_tokens_past_31_bits(norm: bool, device: torch.device) -> None:
    """Those of the first and the last images, 2^31 elements apart; all others are zero, and so what a wrong place would give."""
    dim = 768 if norm else 1024
    few = Flavour((16, 3, 256, 256), (16, 16), 256, dim=dim, prefix=1, norm=norm)
    images = 2**31 // (257 * dim) + 32
    tensors, grad = few.inputs(torch.bfloat16, device), tokens_like(few, torch.bfloat16, device)
    # Images that begin 8 pixels after each other take no memory of their own.
    memory = torch.randn(3 * 2**16 + 8 * images, device=device).bfloat16()
    pixels = memory.as_strided((images, 3, 256, 256), (8, 2**16, 256, 1))
    exact = exact_gradients(few, tensors | {"pixels": torch.cat((pixels[:8], pixels[-8:]))}, grad)
    far = torch.zeros(images, *grad.shape[1:], device=device, dtype=grad.dtype)
    far[:8], far[-8:] = grad[:8], grad[8:]
    assert far.numel() > 2**31
    got = cuda_gradients(replace(few, pixels=tuple(pixels.shape)), tensors | {"pixels": pixels}, far)
    for what in exact:
        assert compare(got[what], exact[what], "grad" if norm else "gemm"), what


def test_no_images(device: torch.device) -> None:
    tensors = {name: t[:0] if name == "pixels" else t for name, t in VIT.inputs(torch.bfloat16, device).items()}
    grad = torch.empty(0, 197, 768, device=device, dtype=torch.bfloat16)
    for what, got in cuda_gradients(VIT, tensors, grad).items():
        assert got.shape == tensors[what].shape and not got.any(), what


def test_graph_follows_its_inputs(device: torch.device) -> None:
    tensors, grad = EVA.inputs(torch.bfloat16, device), tokens_like(EVA, torch.bfloat16, device)
    graph, captured = capture(lambda: cuda_gradients(EVA, tensors, grad))
    for _ in range(2):
        for key, fresh in EVA.inputs(torch.bfloat16, device).items():
            tensors[key].copy_(fresh)
        grad.copy_(tokens_like(EVA, torch.bfloat16, device))
        graph.replay()
        exact = exact_gradients(EVA, tensors, grad)
        assert all(compare(captured[what], exact[what], "gemm") for what in exact)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"pixels": (3, 3, 64, 128)}, "3 images: multiples of 32, or few less"),
        ({"pixels": (12, 3, 56, 128), "patch": (14, 14), "grid": 36}, "12 images: multiples of 16, or few less"),
    ],
)
def test_refusals(change: dict, reason: str, device: torch.device) -> None:
    flavour = replace(Flavour((32, 3, 64, 128), (16, 16), 32, dim=96, prefix=1), **change)
    tensors, grad = flavour.inputs(torch.bfloat16, device), tokens_like(flavour, torch.bfloat16, device)
    with pytest.raises(BackendError, match=reason):
        cuda_gradients(flavour, tensors, grad)
    gradients(lambda t: embed(flavour, t), tensors, grad)  # another backend takes it


def test_a_norm_of_more_channels_goes_to_others(device: torch.device) -> None:
    patches = torch.zeros(32, 3, 4, 16, 8, 16, device=device, dtype=torch.bfloat16).permute(0, 2, 4, 1, 3, 5)[
        :, None, :, :, :, None
    ]
    tokens, weight = (torch.zeros(shape, device=device, dtype=torch.bfloat16) for shape in ((32, 32, 1152), (1152, 3, 1, 16, 16)))
    needs = [False, True, *[False] * 5]
    arguments = (tokens, patches, weight, weight.new_zeros(1152), tokens, 1e-5, None, None, [32, 1152], needs)
    assert _bwd.why_not("cuda", device, *arguments) == "dim 1152 with a norm: at most 1024"
    assert _bwd.why_not("triton", device, *arguments) is None


def test_pixels_of_bytes_go_to_others(device: torch.device) -> None:
    flavour = of_images(FLAVOURS["dinov2-reg"], 16)
    tensors, grad = flavour.inputs(torch.bfloat16, device, uint8=True), tokens_like(flavour, torch.bfloat16, device)
    with pytest.raises(BackendError, match="it takes pixels and weights of 16 bits"):
        cuda_gradients(flavour, tensors, grad)

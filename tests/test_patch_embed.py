# SPDX-License-Identifier: Apache-2.0
"""Patch embedding against torch's own convolutions in fp64, for the embeddings of the published models, at small sizes."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from vlmkernels import BackendError
from vlmkernels.ops.patch_embed import patch_embed
from vlmkernels.testing.compare import compare

DTYPES = {  # of the weight, and whether the pixels are uint8
    "fp32": (torch.float32, False),
    "fp16-uint8": (torch.float16, True),
    "bf16": (torch.bfloat16, False),
    "bf16-uint8": (torch.bfloat16, True),
}
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
FWD, BWD = "patch_embed_fwd", "patch_embed_bwd"
every_backend = pytest.mark.backends(FWD, BWD, exclude=("cuda",))


@dataclass(frozen=True)
class Flavour:
    """An embedding: sizes of its input, and which of the options its model uses."""

    pixels: tuple[int, ...]
    patch: tuple[int, ...]
    grid: int  # patches of an image
    dim: int = 24
    channels: int = 3
    bias: bool = True
    prefix: int = 0
    pos: str = "all"  # "none", "all": every token, "patches", "batch": every token, one table for each image
    norm: bool = False
    weight: str = "conv"  # "linear": [D, K]
    options: dict[str, str] = field(default_factory=dict)

    def inputs(self, dtype: torch.dtype, device: torch.device, uint8: bool = False) -> dict[str, Tensor]:
        """Random tensors by name, of the size that trained ones have."""

        # Drawn on the CPU: the same numbers, and with them the same ratios of error to floor, on every device.
        def randn(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, device="cpu") * scale).to(device, dtype)

        k = self.channels * torch.Size(self.patch).numel()
        shape = (self.dim, k) if self.weight == "linear" else (self.dim, self.channels, *self.patch)
        if uint8:
            tensors = {"pixels": torch.randint(0, 256, self.pixels, dtype=torch.uint8).to(device)}
        else:
            tensors = {"pixels": randn(*self.pixels)}
        tensors["weight"] = randn(*shape, scale=k**-0.5)
        if self.bias:
            tensors["bias"] = randn(self.dim, scale=0.5)
        if self.prefix:
            tensors["prefix_tokens"] = randn(self.prefix, self.dim)
        rows = self.grid + (0 if self.pos == "patches" else self.prefix)
        if self.pos != "none":
            tensors["pos_embed"] = randn(*([self.pixels[0]] if self.pos == "batch" else []), rows, self.dim)
        if self.norm:
            tensors["norm_weight"], tensors["norm_bias"] = randn(self.dim), randn(self.dim)
        return tensors


QWEN = Flavour((6, 3 * 2 * 14 * 14), (2, 14, 14), 6, bias=False, pos="none", options={"layout": "rows"})
NAFLEX = Flavour((2, 5, 8 * 8 * 3), (8, 8), 5, pos="batch", weight="linear", options={"layout": "rows", "columns": "yxc"})
CLIP = Flavour((2, 3, 14, 42), (14, 14), 3, dim=64, bias=False, prefix=1, norm=True)
#: Everything at once, and the smallest: for what doesn't depend on sizes. The last row of pixels is dropped.
SMALL = Flavour((2, 3, 9, 12), (4, 4), 6, prefix=1, norm=True)
FLAVOURS = {
    "vit": Flavour((2, 3, 16, 16), (8, 8), 4, prefix=1),
    "clip": CLIP,
    "siglip": Flavour((2, 3, 15, 23), (7, 7), 6),
    "dinov2-reg": Flavour((2, 3, 12, 12), (6, 6), 4, prefix=5, pos="patches"),
    "qwen2-frames": Flavour((1, 3, 4, 12, 12), (2, 6, 6), 8, bias=False, pos="none"),
    "qwen2-rows": QWEN,
    "qwen3-rows": replace(QWEN, pixels=(5, 3 * 2 * 8 * 8), patch=(2, 8, 8), grid=5, bias=True, pos="all", weight="linear"),
    "naflex": NAFLEX,
    "naflex-cls-norm": replace(NAFLEX, dim=128, prefix=2, norm=True),
    "rectangles": Flavour((3, 1, 9, 25), (4, 8), 6, channels=1, dim=40, prefix=2),
    "norm-only": Flavour((2, 3, 16, 24), (8, 8), 6, dim=128, pos="none", norm=True),
}
EPS = 1e-5


def stock(flavour: Flavour, tensors: dict[str, Tensor]) -> Tensor:
    """The embedding as a model writes it with torch's own layers, in the dtype of the tensors."""
    pixels, weight, bias = tensors["pixels"], tensors["weight"], tensors.get("bias")
    dims = len(flavour.patch)
    if flavour.options.get("columns") == "yxc":
        tokens = F.linear(normalise(flavour, pixels), weight, bias)
        tokens = tokens[None] if pixels.dim() == 2 else tokens
    else:
        rows = flavour.options.get("layout") == "rows"
        images = pixels.view(-1, flavour.channels, *flavour.patch) if rows else pixels
        convolve = F.conv2d if dims == 2 else F.conv3d
        kernel = weight.view(flavour.dim, flavour.channels, *flavour.patch)
        tokens = convolve(normalise(flavour, images), kernel, bias, stride=flavour.patch).flatten(2).transpose(1, 2)
        tokens = tokens.flatten(0, 1)[None] if rows else tokens
    prefix, pos = tensors.get("prefix_tokens"), tensors.get("pos_embed")
    if flavour.pos == "patches":
        tokens = tokens + pos
    if prefix is not None:
        tokens = torch.cat([prefix.expand(len(tokens), -1, -1), tokens], 1)
    if flavour.pos in ("all", "batch"):
        tokens = tokens + pos
    if flavour.norm:
        tokens = F.layer_norm(tokens, (flavour.dim,), tensors["norm_weight"], tensors["norm_bias"], EPS)
    return tokens[0] if pixels.dim() == 2 else tokens


def normalise(flavour: Flavour, pixels: Tensor) -> Tensor:
    """uint8 pixels in fp64; float ones as they are."""
    if pixels.dtype != torch.uint8:
        return pixels
    shape = (-1,) if flavour.options.get("columns") == "yxc" else (1, -1, *[1] * len(flavour.patch))
    mean, std = (torch.tensor(v, dtype=torch.float64, device=pixels.device) for v in (CLIP_MEAN, CLIP_STD))
    if flavour.options.get("columns") == "yxc":
        mean, std = (v.repeat(pixels.shape[-1] // 3) for v in (mean, std))
    return (pixels.double() / 255 - mean.view(shape)) / std.view(shape)


def embed(flavour: Flavour, tensors: dict[str, Tensor], **options: Any) -> Tensor:
    tensors = dict(tensors)
    if flavour.norm:
        options["norm"] = (tensors.pop("norm_weight"), tensors.pop("norm_bias"), EPS)
    if tensors["pixels"].dtype == torch.uint8:
        options |= {"mean": CLIP_MEAN, "std": CLIP_STD}
    patch_size: Any = flavour.patch[0] if len(flavour.patch) == 2 and flavour.patch[0] == flavour.patch[1] else flavour.patch
    return patch_embed(**tensors, patch_size=patch_size, **(flavour.options | options))


def double(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: t if t.dtype == torch.uint8 else t.detach().double() for name, t in tensors.items()}


def gradients(function: Callable[..., Tensor], tensors: dict[str, Tensor], grad: Tensor) -> dict[str, Tensor]:
    leaves = {name: t.detach().requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    wanted = [name for name, t in leaves.items() if t.requires_grad]
    return dict(zip(wanted, torch.autograd.grad(function(leaves), [leaves[n] for n in wanted], grad), strict=True))


@every_backend
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", FLAVOURS)
def test_models(name: str, dtypes: str, backend: str, device: torch.device) -> None:
    flavour = FLAVOURS[name]
    dtype, uint8 = DTYPES[dtypes]
    if uint8 and flavour.channels != 3:
        flavour = replace(flavour, pixels=(flavour.pixels[0], 3, *flavour.pixels[2:]), channels=3)
    tensors = flavour.inputs(dtype, device, uint8)
    exact = stock(flavour, double(tensors))
    out = embed(flavour, tensors, backend=backend)
    assert out.dtype == dtype and out.is_contiguous()
    assert compare(out, exact, "gemm")
    grad = torch.randn(exact.shape).to(device, dtype)
    exact_grads = gradients(lambda t: stock(flavour, t), double(tensors), grad.double())
    grads = gradients(lambda t: embed(flavour, t, backend=backend), tensors, grad)
    assert grads.keys() == exact_grads.keys()
    for what, got in grads.items():
        assert got.dtype == tensors[what].dtype, what
        result = compare(got, exact_grads[what], "grad" if flavour.norm else "gemm")
        assert result, (what, result)


@pytest.mark.backends(FWD, BWD, exclude=("triton", "cuda"))
@pytest.mark.parametrize("name", FLAVOURS)
def test_float64(name: str, backend: str, device: torch.device) -> None:
    flavour = FLAVOURS[name]
    tensors = flavour.inputs(torch.float64, device)
    assert compare(embed(flavour, tensors, backend=backend), stock(flavour, tensors), "gemm")
    grad = torch.randn_like(stock(flavour, tensors))
    exact = gradients(lambda t: stock(flavour, t), tensors, grad)
    for what, got in gradients(lambda t: embed(flavour, t, backend=backend), tensors, grad).items():
        assert compare(got, exact[what], "gemm"), what


def layouts(pixels: Tensor) -> dict[str, tuple[Tensor, dict[str, str]]]:
    """The same images ``[B, C, H, W]`` in other places of memory."""
    batch, channels, height, width = pixels.shape
    cropped = pixels.new_zeros(batch, channels, height + 3, width + 5)
    cropped[:, :, 2 : height + 2, 3 : width + 3] = pixels
    every_second = pixels.new_zeros(2 * batch, channels, height, width)
    every_second[::2] = pixels
    planes_first = pixels.transpose(0, 1).contiguous().transpose(0, 1)
    last = pixels.permute(0, 2, 3, 1)
    return {
        "channels_last": (last.contiguous(), {"layout": "channels_last"}),
        "channels_last view": (last, {"layout": "channels_last"}),
        "memory format": (pixels.contiguous(memory_format=torch.channels_last), {}),
        "crop": (cropped[:, :, 2 : height + 2, 3 : width + 3], {}),
        "every second image": (every_second[::2], {}),
        "planes first": (planes_first, {}),
        "transposed": (pixels.transpose(2, 3).contiguous().transpose(2, 3), {}),
    }


@every_backend
@pytest.mark.parametrize(("patch", "uint8"), [(6, True), (8, False)], ids=["P6-uint8", "P8-float"])
def test_layouts(patch: int, uint8: bool, backend: str, device: torch.device) -> None:
    flavour = Flavour((2, 3, 2 * patch, 2 * patch + 4), (patch, patch), 4, prefix=1)
    tensors = flavour.inputs(torch.float16, device, uint8)
    exact = stock(flavour, double(tensors))
    for name, (pixels, options) in layouts(tensors["pixels"]).items():
        before = pixels.clone()
        out = embed(flavour, tensors | {"pixels": pixels}, backend=backend, **options)
        assert compare(out, exact, "gemm"), name
        assert torch.equal(pixels, before), name
    expanded = tensors["pixels"][:1].expand(3, -1, -1, -1)
    out = embed(flavour, tensors | {"pixels": expanded}, backend=backend)
    assert compare(out, exact[:1].expand(3, -1, -1), "gemm")


@every_backend
def test_frames_with_channels_last(backend: str, device: torch.device) -> None:
    flavour = replace(FLAVOURS["qwen2-frames"], pixels=(2, 3, 5, 14, 6), grid=4)
    tensors = flavour.inputs(torch.float32, device)
    exact = stock(flavour, double(tensors))
    frames = tensors["pixels"].permute(0, 2, 3, 4, 1).contiguous()
    assert compare(embed(flavour, tensors | {"pixels": frames}, backend=backend, layout="channels_last"), exact, "gemm")


@every_backend
def test_gradients_reach_pixels_through_any_layout(backend: str, device: torch.device) -> None:
    flavour = FLAVOURS["siglip"]
    tensors = flavour.inputs(torch.float32, device)
    grad = torch.randn(2, 6, flavour.dim, device=device)
    exact = gradients(lambda t: stock(flavour, t), double(tensors), grad.double())["pixels"]
    assert not exact[:, :, 14:].any() and not exact[..., 21:].any()
    for name, (pixels, options) in layouts(tensors["pixels"]).items():
        leaf = pixels.detach().requires_grad_()
        out = embed(flavour, tensors | {"pixels": leaf}, backend=backend, **options)
        got = torch.autograd.grad(out, leaf, grad)[0]
        assert compare(got.permute(0, 3, 1, 2) if options else got, exact, "gemm"), name


@every_backend
@pytest.mark.parametrize("columns", ["cyx", "yxc"])
def test_weight_and_rows_in_any_order(columns: str, backend: str, device: torch.device) -> None:
    """A Conv weight meets rows of either order, and a Linear weight of either order meets images."""
    flavour = Flavour((2, 3, 16, 24), (8, 8), 6)
    tensors = flavour.inputs(torch.float32, device)
    exact = stock(flavour, double(tensors))
    cut = tensors["pixels"].view(2, 3, 2, 8, 3, 8).permute(0, 2, 4, 1, 3, 5)
    rows = (cut if columns == "cyx" else cut.permute(0, 1, 2, 4, 5, 3)).reshape(2, 6, 192)
    kernel = tensors["weight"] if columns == "cyx" else tensors["weight"].permute(0, 2, 3, 1)
    linear = kernel.reshape(flavour.dim, 192)
    for changed, layout in (
        ({"pixels": rows}, "rows"),
        ({"pixels": rows, "weight": linear}, "rows"),
        ({"weight": linear}, "channels_first"),
        ({"weight": linear.T.contiguous().T}, "channels_first"),
    ):
        out = embed(flavour, tensors | changed, backend=backend, layout=layout, columns=columns)
        assert compare(out, exact, "gemm"), (layout, list(changed))


@every_backend
@pytest.mark.parametrize("pixel_dtype", [torch.float32, torch.float16, torch.bfloat16, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_float_pixels_take_the_dtype_of_the_weight(
    pixel_dtype: torch.dtype, dtype: torch.dtype, backend: str, device: torch.device
) -> None:
    flavour = SMALL
    tensors = flavour.inputs(dtype, device) | {"pixels": torch.randn(flavour.pixels, device=device).to(pixel_dtype)}
    if pixel_dtype == torch.float64 and backend == "triton":
        with pytest.raises(BackendError, match="float64"):
            embed(flavour, tensors, backend=backend)
        return
    exact = stock(flavour, double(tensors | {"pixels": tensors["pixels"].to(dtype)}))
    assert compare(embed(flavour, tensors, backend=backend), exact, "gemm")
    leaf = tensors["pixels"].requires_grad_()
    embed(flavour, tensors | {"pixels": leaf}, backend=backend).sum().backward()
    assert leaf.grad is not None and leaf.grad.dtype == pixel_dtype


@every_backend
def test_parameters_of_any_stride(backend: str, device: torch.device) -> None:
    flavour = SMALL
    tensors = flavour.inputs(torch.float32, device)
    exact = stock(flavour, double(tensors))
    strided = {name: torch.stack([t, t + 1], -1)[..., 0] for name, t in tensors.items()}
    assert not any(t.is_contiguous() for t in strided.values())
    assert compare(embed(flavour, strided, backend=backend), exact, "gemm")


@every_backend
def test_only_what_needs_a_gradient_gets_one(backend: str, device: torch.device) -> None:
    tensors = SMALL.inputs(torch.float32, device)
    grad = torch.randn(2, 7, SMALL.dim, device=device)
    exact = gradients(lambda t: stock(SMALL, t), double(tensors), grad.double())
    for name in tensors:
        leaf = tensors[name].detach().requires_grad_()
        out = embed(SMALL, tensors | {name: leaf}, backend=backend)
        assert compare(torch.autograd.grad(out, leaf, grad)[0], exact[name], "gemm"), name


@every_backend
def test_gradient_that_is_not_contiguous(backend: str, device: torch.device) -> None:
    for flavour in (SMALL, replace(SMALL, norm=False)):
        tensors = flavour.inputs(torch.float32, device)
        exact = gradients(lambda t: stock(flavour, t).sum(), double(tensors), torch.ones((), dtype=torch.float64, device=device))  # noqa: B023
        got = gradients(lambda t: embed(flavour, t, backend=backend).sum(), tensors, torch.ones((), device=device))  # noqa: B023
        for name in ("pixels", "weight", "pos_embed", "prefix_tokens"):
            if not flavour.norm:  # the sum of a normalised row doesn't depend on the row
                assert compare(got[name], exact[name], "gemm"), name
        transposed = torch.randn(flavour.dim, 1 + flavour.grid, 2, device=device).permute(2, 1, 0)
        exact = gradients(lambda t: stock(flavour, t), double(tensors), transposed.double())  # noqa: B023
        got = gradients(lambda t: embed(flavour, t, backend=backend), tensors, transposed)  # noqa: B023
        for name, value in got.items():
            assert compare(value, exact[name], "gemm"), name


@every_backend
def test_norm_without_bias(backend: str, device: torch.device) -> None:
    tensors = SMALL.inputs(torch.float32, device)
    exact = stock(SMALL, double(tensors) | {"norm_bias": torch.zeros(SMALL.dim, dtype=torch.float64, device=device)})
    norm_weight = tensors.pop("norm_weight").requires_grad_()
    del tensors["norm_bias"]
    out = patch_embed(**tensors, patch_size=4, norm=(norm_weight, None, EPS), backend=backend)
    assert compare(out, exact, "gemm")
    out.sum().backward()
    assert norm_weight.grad is not None


@every_backend
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_empty(uint8: bool, backend: str, device: torch.device) -> None:
    for flavour in (replace(SMALL, pixels=(0, 3, 9, 12)), replace(QWEN, pixels=(0, 1176), grid=0, prefix=2, norm=True)):
        tensors = flavour.inputs(torch.float32, device, uint8)
        out = embed(flavour, tensors, backend=backend)
        assert out.shape == ((0, 7, 24) if flavour.pixels[1] == 3 else (2, 24))
        if out.numel():
            prefix = F.layer_norm(tensors["prefix_tokens"], (24,), tensors["norm_weight"], tensors["norm_bias"], EPS)
            assert compare(out, prefix, "norm")
        grads = gradients(lambda t: embed(flavour, t, backend=backend), tensors, torch.ones_like(out))  # noqa: B023
        assert grads["weight"].shape == tensors["weight"].shape and not grads["weight"].any()


@every_backend
def test_nan_stays_in_its_patch(backend: str, device: torch.device) -> None:
    for flavour in (SMALL, FLAVOURS["siglip"]):
        tensors = flavour.inputs(torch.float16, device)
        patch = flavour.patch[0]
        tensors["pixels"][1, 2, patch + 1, patch + 2] = float("nan")  # second row of patches, second of three
        out = embed(flavour, tensors, backend=backend)
        assert out[1, flavour.prefix + 4].isnan().all()
        assert out.isnan().sum() == flavour.dim


@every_backend
def test_dropped_pixels_are_not_read(backend: str, device: torch.device) -> None:
    flavour = FLAVOURS["siglip"]
    tensors = flavour.inputs(torch.float16, device)
    tensors["pixels"][:, :, 14:] = float("nan")
    tensors["pixels"][..., 21:] = float("nan")
    assert not embed(flavour, tensors, backend=backend).isnan().any()


REFUSED: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]]]] = {
    "patch_size 0": ("patch_size", lambda t: {"patch_size": 0}),
    "patch_size of four": ("patch_size", lambda t: {"patch_size": (1, 2, 14, 14)}),
    "patch_size of another weight": ("weight", lambda t: {"patch_size": 16}),
    "layout": ("layout", lambda t: {"layout": "nhwc"}),
    "columns": ("columns", lambda t: {"columns": "xyc"}),
    "integer weight": ("weight", lambda t: {"weight": t["weight"].int()}),
    "weight columns": ("weight", lambda t: {"weight": t["weight"].flatten(1)[:, :-1]}),
    "int32 pixels": ("pixels", lambda t: {"pixels": t["pixels"].int()}),
    "3-D pixels": ("pixels", lambda t: {"pixels": t["pixels"][0]}),
    "pixels elsewhere": ("pixels", lambda t: {"pixels": t["pixels"].to("meta")}),
    "four channels": ("pixels", lambda t: {"pixels": t["pixels"][:, :1].expand(-1, 4, -1, -1)}),
    "channels elsewhere": ("pixels", lambda t: {"layout": "channels_last"}),
    "image below a patch": ("pixels", lambda t: {"pixels": t["pixels"][:, :, :13]}),
    "rows of another length": ("pixels", lambda t: {"pixels": torch.zeros(4, 587), "layout": "rows"}),
    "bias": ("bias", lambda t: {"bias": torch.zeros(25)}),
    "bias of another dtype": ("bias", lambda t: {"bias": torch.zeros(24, dtype=torch.float16)}),
    "prefix of three dimensions": ("prefix_tokens", lambda t: {"prefix_tokens": torch.zeros(1, 1, 24)}),
    "positions too many": ("pos_embed", lambda t: {"pos_embed": torch.zeros(8, 24)}),
    "positions of another batch": ("pos_embed", lambda t: {"pos_embed": torch.zeros(3, 7, 24)}),
    "norm": ("norm weight", lambda t: {"norm": (torch.zeros(23), None, 1e-5)}),
    "norm of another bias": ("norm bias", lambda t: {"norm": (torch.ones(64), torch.zeros(63), 1e-5)}),
    "uint8 without mean": ("mean", lambda t: {"pixels": t["pixels"].to(torch.uint8)}),
    "uint8 without std": ("std", lambda t: {"pixels": t["pixels"].to(torch.uint8), "mean": CLIP_MEAN}),
    "mean for floats": ("mean", lambda t: {"mean": CLIP_MEAN, "std": CLIP_STD}),
    "mean of two": ("mean", lambda t: {"pixels": t["pixels"].to(torch.uint8), "mean": (0.5, 0.5), "std": CLIP_STD}),
    "std of zero": ("std", lambda t: {"pixels": t["pixels"].to(torch.uint8), "mean": CLIP_MEAN, "std": (0, 1, 1)}),
    "mean a tensor": ("mean", lambda t: {"pixels": t["pixels"].to(torch.uint8), "mean": torch.zeros(3), "std": CLIP_STD}),
    "backend": ("backend", lambda t: {"backend": "cudnn"}),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str) -> None:
    name, change = REFUSED[case]
    tensors = replace(CLIP, norm=False).inputs(torch.float32, torch.device("cpu"))
    with pytest.raises(ValueError, match=f"^{name}: got .*, wanted "):
        patch_embed(**({"patch_size": 14} | tensors | change(tensors)))


def test_differentiable_once(device: torch.device) -> None:
    tensors = SMALL.inputs(torch.float32, device)
    leaf = tensors["weight"].requires_grad_()
    grad = torch.autograd.grad(embed(SMALL, tensors).square().sum(), leaf, create_graph=True)[0]
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


@every_backend
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_opcheck(uint8: bool, norm: bool, backend: str, device: torch.device) -> None:
    t = SMALL.inputs(torch.float32, device, uint8)
    patches = t["pixels"][:, :, :8].view(2, 3, 1, 1, 2, 4, 3, 4).permute(0, 2, 4, 6, 1, 3, 5, 7)
    weight = t["weight"].unsqueeze(2)
    affine = (list(CLIP_MEAN), list(CLIP_STD)) if uint8 else (None, None)
    norms = (t["norm_weight"], t["norm_bias"]) if norm else (None, None)
    args = (patches, weight, t["bias"], t["prefix_tokens"], t["pos_embed"], *norms, EPS, *affine, norm, backend)
    torch.library.opcheck(torch.ops.vlmkernels.patch_embed_fwd.default, args)
    out, total = torch.ops.vlmkernels.patch_embed_fwd(*args)
    for needs in ([not uint8, True, False, True, True, norm, norm], [False, False, True, False, False, norm, False]):
        args = (torch.randn_like(out), patches, weight, norms[0], total, EPS, *affine, [7, SMALL.dim], needs, backend)
        torch.library.opcheck(torch.ops.vlmkernels.patch_embed_bwd.default, args)


@pytest.mark.backends(FWD, BWD, exclude=("reference", "cuda"))
@pytest.mark.parametrize("name", ["small", "naflex"])
def test_compile(name: str, backend: str, device: torch.device) -> None:
    torch._dynamo.reset()
    flavour = SMALL if name == "small" else NAFLEX
    tensors = flavour.inputs(torch.float32, device)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def compiled(tensors: dict[str, Tensor]) -> Tensor:
        return embed(flavour, tensors, backend=backend)

    exact = stock(flavour, double(tensors))
    assert compare(compiled(tensors), exact, "gemm")
    grad = torch.randn_like(exact, dtype=torch.float32)
    wanted = gradients(lambda t: stock(flavour, t), double(tensors), grad.double())
    for what, got in gradients(compiled, tensors, grad).items():
        assert compare(got, wanted[what], "gemm"), what


def test_backends_agree_on_one_meaning_of_total(device: torch.device) -> None:
    """The forward of one backend may meet the backward of another: both take ``total`` as the sum that is normalised."""
    t = SMALL.inputs(torch.float32, device)
    patches = t["pixels"][:, :, :8].view(2, 3, 1, 1, 2, 4, 3, 4).permute(0, 2, 4, 6, 1, 3, 5, 7)
    args = (patches, t["weight"].unsqueeze(2), t["bias"], t["prefix_tokens"], t["pos_embed"], t["norm_weight"], t["norm_bias"])
    exact = stock(replace(SMALL, norm=False), double(t))
    for backend in ("reference", "torch", "triton"):
        total = torch.ops.vlmkernels.patch_embed_fwd(*args, EPS, None, None, True, backend)[1]
        assert compare(total, exact, "gemm"), backend


def test_triton_reads_rows_in_place(device: torch.device) -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    from vlmkernels.backends.triton import patch_embed as triton

    rows = torch.randn(2, 5, 1200, dtype=torch.float16, device=device)
    for x, in_place in (
        (rows[..., :1176], True),
        (rows[..., 1:1177], False),
        (rows[:, :3, :1176], False),
        (rows[:1, ::2, :1176], True),
    ):
        view = x.view(len(x), 1, 1, x.shape[1], 3, 2, 14, 14)
        matrix = triton.matrix_of(view, triton.CHANNELS_FIRST, torch.float16)
        assert (matrix.data_ptr() == x.data_ptr()) == in_place
        assert compare(matrix, x.flatten(0, 1), "exact")


def test_triton_pads_with_zeros(device: torch.device) -> None:
    """K = 588 is no multiple of 8: TMA reads four columns more, and a NaN there would be one everywhere."""
    pytest.importorskip("triton", reason="triton is not installed")
    from vlmkernels.backends.triton import patch_embed as triton

    pixels = torch.randint(0, 256, (1, 3, 28, 28), dtype=torch.uint8, device=device)
    view = pixels.view(1, 3, 1, 1, 2, 14, 2, 14).permute(0, 2, 4, 6, 1, 3, 5, 7)
    matrix = triton.matrix_of(view, triton.CHANNELS_FIRST, torch.float32, [0.5] * 3, [0.5] * 3)
    assert matrix.shape == (4, 592) and not matrix[:, 588:].any()
    assert compare(matrix[:, :588], view.reshape(4, 588).double() / 127.5 - 1, "gemm")


@pytest.mark.backends(FWD, exclude=("reference", "torch", "cuda"))
@pytest.mark.parametrize("name", ["clip", "siglip"])
def test_triton_without_tma(name: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    from vlmkernels.backends.triton import patch_embed as triton

    monkeypatch.setattr(triton, "generation", lambda device: 8)
    monkeypatch.setattr(triton, "_gemm_launch", triton._gemm_launch.__wrapped__)
    flavour = FLAVOURS[name]
    tensors = flavour.inputs(torch.float16, device)
    assert compare(embed(flavour, tensors, backend=backend), stock(flavour, double(tensors)), "gemm")


@pytest.mark.backends(FWD, exclude=("reference", "torch", "cuda"))
@pytest.mark.parametrize("config", ["TMA_CONFIGS", "CP_ASYNC_CONFIGS"])
def test_triton_tiles(config: str, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tile that the launcher can pick, with a width and rows that it doesn't divide, and several tiles for one program."""
    from vlmkernels.backends.triton import patch_embed as triton

    flavour = Flavour((3, 3, 56, 64), (8, 8), 56, dim=264, prefix=1)
    tensors = flavour.inputs(torch.float16, device)
    exact = stock(flavour, double(tensors))
    monkeypatch.setattr(triton, "generation", lambda device: 9 if config == "TMA_CONFIGS" else 8)
    monkeypatch.setattr(triton, "_gemm_launch", triton._gemm_launch.__wrapped__)
    for tile in getattr(triton, config):
        monkeypatch.setattr(triton, config, (tile,))
        monkeypatch.setattr(triton, "multiprocessors", lambda device: 3)
        assert compare(embed(flavour, tensors, backend=backend), exact, "gemm"), tile


@pytest.mark.gpu
@every_backend
@pytest.mark.parametrize("uint8", [False, True], ids=["float", "uint8"])
def test_cuda_graph(uint8: bool, backend: str, device: torch.device) -> None:
    tensors = CLIP.inputs(torch.bfloat16, device, uint8)
    leaves = {name: t.requires_grad_(t.is_floating_point()) for name, t in tensors.items()}
    wanted = [t for t in leaves.values() if t.requires_grad]
    grad = torch.randn(2, 1 + CLIP.grid, CLIP.dim).to(device, torch.bfloat16)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # compile the kernels
        torch.autograd.grad(embed(CLIP, leaves, backend=backend), wanted, grad)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = embed(CLIP, leaves, backend=backend)
        grads = torch.autograd.grad(out, wanted, grad)
    with torch.no_grad():
        for name, fresh in CLIP.inputs(torch.bfloat16, device, uint8).items():
            tensors[name].copy_(fresh)
    graph.replay()
    exact = gradients(lambda t: stock(CLIP, t), double(tensors), grad.double())
    assert compare(out, stock(CLIP, double(tensors)), "gemm")
    for (name, wanted_grad), got in zip(exact.items(), grads, strict=True):
        assert compare(got, wanted_grad, "grad"), name


@pytest.mark.gpu
@pytest.mark.backends(FWD, exclude=("reference", "cuda"))
@pytest.mark.parametrize("where", ["images", "channels", "lines", "rows"])
def test_offsets_beyond_31_bits(where: str, backend: str, device: torch.device) -> None:
    """Pixels that lie more than 2^31 elements after the first: 4 GiB of memory, most of it never read."""
    memory = torch.empty(2**32 + 2**16, dtype=torch.uint8, device=device)
    stride = 2**31 + 2**12
    if where == "rows":
        flavour = Flavour((1, 2, 192), (8, 8), 2, options={"layout": "rows"}, weight="linear", pos="none")
        pixels = memory.as_strided((1, 2, 192), (192, stride, 1))
    else:
        flavour = Flavour((2, 3, 16, 16), (16, 16) if where == "images" else (8, 8), 1 if where == "images" else 4, pos="none")
        shape, strides = (2, 3, 16, 16), [768, 256, 16, 1]
        if where == "lines":
            shape, strides[2] = (1, 3, 16, 16), stride // 8
        elif where == "channels":
            shape, strides[1] = (1, 3, 16, 16), stride // 2
        else:
            strides[0] = stride
        flavour = replace(flavour, pixels=shape)
        pixels = memory.as_strided(shape, strides)
    tensors = flavour.inputs(torch.bfloat16, device, uint8=True)
    pixels.copy_(tensors["pixels"])
    if where == "rows":
        plain = replace(flavour, pixels=(2, 3, 8, 8), options={}, grid=1)
        exact = stock(plain, double(tensors | {"pixels": tensors["pixels"].view(2, 3, 8, 8)})).view(1, 2, -1)
    else:
        exact = stock(flavour, double(tensors))
    assert compare(embed(flavour, tensors | {"pixels": pixels}, backend=backend), exact, "gemm")


@pytest.mark.gpu
def test_output_beyond_31_bits(device: torch.device) -> None:
    """More than 2^31 elements of output, from one image given many times."""
    batch = 1100
    flavour = Flavour((1, 3, 360, 720), (8, 8), 4050, dim=1024, bias=False, pos="none")
    tensors = flavour.inputs(torch.bfloat16, device)
    exact = stock(flavour, double(tensors))
    out = embed(flavour, tensors | {"pixels": tensors["pixels"].expand(batch, -1, -1, -1)})
    assert out.numel() > 2**31
    for image in (0, 517, batch - 1):
        assert compare(out[image : image + 1], exact, "gemm"), image

# SPDX-License-Identifier: Apache-2.0
"""Still images in patches of several frames: one frame is given, and means the same as that frame repeated."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from test_patch_embed import BWD, DTYPES, FWD, QWEN, Flavour, double, embed, every_backend, gradients, stock
from torch import Tensor

from vlmkernels.ops.patch_embed import patch_embed
from vlmkernels.testing.compare import compare


@dataclass(frozen=True)
class Still:
    """An embedding as its model has it, with repeated frames, and how many frames of the pixels are one."""

    flavour: Flavour
    frames: int = 2

    @property
    def dim(self) -> int:
        """Where the frames are once the columns of rows are dimensions of their own."""
        return -4 if self.flavour.options.get("columns") == "yxc" else -3

    def once(self, pixels: Tensor) -> Tensor:
        """The first of the repeated frames."""
        if self.flavour.options.get("layout") == "rows":
            return self._columns(pixels).narrow(self.dim, 0, 1).flatten(len(self.flavour.pixels) - 1).contiguous()
        return pixels.narrow(-3, 0, 1).contiguous()

    def repeated(self, pixels: Tensor) -> Tensor:
        """The pixels as the model takes them, from those with one frame."""
        if self.flavour.options.get("layout") == "rows":
            frames = self._columns(pixels, 1).repeat_interleave(self.frames, self.dim)
            return frames.flatten(len(self.flavour.pixels) - 1)
        return pixels.repeat_interleave(self.frames, -3)

    def _columns(self, rows: Tensor, frames: int = 0) -> Tensor:
        frames = frames or self.frames
        channels, (_, py, px) = self.flavour.channels, self.flavour.patch
        return rows.unflatten(-1, (channels, frames, py, px) if self.dim == -3 else (frames, py, px, channels))


YXC = {"layout": "rows", "columns": "yxc"}
STILLS = {
    "qwen2-rows": Still(QWEN),
    "qwen3-rows": Still(replace(QWEN, pixels=(5, 384), patch=(2, 8, 8), grid=5, bias=True, pos="all", weight="linear")),
    "images": Still(Flavour((2, 3, 2, 13, 12), (2, 6, 6), 4, bias=False, pos="none")),
    "images, all options": Still(Flavour((2, 3, 2, 12, 12), (2, 6, 6), 4, prefix=2, norm=True, dim=64)),
    "three frames, rows yxc": Still(Flavour((2, 5, 576), (3, 8, 8), 5, pos="batch", weight="linear", options=YXC), 3),
}


@every_backend
@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize("name", STILLS)
def test_one_frame_is_that_frame_repeated(name: str, dtypes: str, backend: str, device: torch.device) -> None:
    still, (dtype, uint8) = STILLS[name], DTYPES[dtypes]
    flavour = still.flavour
    tensors = flavour.inputs(dtype, device, uint8)
    tensors["pixels"] = still.once(tensors["pixels"])

    def repeated(t: dict[str, Tensor]) -> Tensor:
        return stock(flavour, t | {"pixels": still.repeated(t["pixels"])})

    exact = repeated(double(tensors))
    out = embed(flavour, tensors, backend=backend)
    assert out.dtype == dtype and out.is_contiguous()
    assert compare(out, exact, "gemm")
    grad = torch.randn(exact.shape).to(device, dtype)
    wanted = gradients(repeated, double(tensors), grad.double())
    grads = gradients(lambda t: embed(flavour, t, backend=backend), tensors, grad)
    assert grads.keys() == wanted.keys()
    for what, got in grads.items():
        assert got.shape == tensors[what].shape and got.dtype == tensors[what].dtype, what
        result = compare(got, wanted[what], "grad" if flavour.norm else "gemm")
        assert result, (what, result)


@pytest.mark.parametrize("name", STILLS)
def test_reference_repeats_the_frame(name: str, device: torch.device) -> None:
    """To the bit: the meaning of one frame is not a sum of weights."""
    still = STILLS[name]
    tensors = still.flavour.inputs(torch.bfloat16, device)
    tensors["pixels"] = still.once(tensors["pixels"])
    full = tensors | {"pixels": still.repeated(tensors["pixels"])}
    assert torch.equal(embed(still.flavour, tensors, backend="reference"), embed(still.flavour, full, backend="reference"))


@pytest.mark.backends(FWD, BWD, exclude=("reference", "cuda"))
@pytest.mark.parametrize("name", ["qwen2-rows", "images, all options"])
def test_half_the_product(name: str, backend: str, device: torch.device) -> None:
    """The other backends do the work of two-dimensional patches, with the sum of the weight's frames: the same bits."""
    still = STILLS[name]
    flavour = replace(still.flavour, patch=still.flavour.patch[1:])
    tensors = still.flavour.inputs(torch.bfloat16, device)
    tensors["pixels"] = still.once(tensors["pixels"])
    flat = tensors | {"weight": tensors["weight"].float().sum(2).bfloat16()}
    flat["pixels"] = tensors["pixels"] if flavour.options else tensors["pixels"].squeeze(2)
    assert torch.equal(embed(still.flavour, tensors, backend=backend), embed(flavour, flat, backend=backend))


@every_backend
def test_channels_last_and_views(backend: str, device: torch.device) -> None:
    still = STILLS["images"]
    tensors = still.flavour.inputs(torch.float16, device)
    once = still.once(tensors["pixels"])
    exact = stock(still.flavour, double(tensors | {"pixels": still.repeated(once)}))
    last = once.permute(0, 2, 3, 4, 1).contiguous()
    assert compare(embed(still.flavour, tensors | {"pixels": last}, backend=backend, layout="channels_last"), exact, "gemm")
    video = torch.randn(2, 3, 7, 13, 12, device=device).half()
    video[:, :, 4:5] = once
    assert compare(embed(still.flavour, tensors | {"pixels": video[:, :, 4:5]}, backend=backend), exact, "gemm")


@every_backend
def test_opcheck(backend: str, device: torch.device) -> None:
    patches = torch.randn(1, 1, 1, 3, 3, 1, 4, 4, device=device)
    weight = torch.randn(24, 3, 2, 4, 4, device=device)
    args = (patches, weight, None, None, None, None, None, 0.0, None, None, False, backend)
    torch.library.opcheck(torch.ops.vlmkernels.patch_embed_fwd.default, args)
    out, total = torch.ops.vlmkernels.patch_embed_fwd(*args)
    needs = [True, True, False, False, False, False, False]
    args = (torch.randn_like(out), patches, weight, None, total, 0.0, None, None, [], needs, backend)
    torch.library.opcheck(torch.ops.vlmkernels.patch_embed_bwd.default, args)


@pytest.mark.parametrize(
    ("change", "wanted"),
    [
        (lambda t: {"pixels": t["pixels"][:, :-1]}, r"rows \[N, 1176\] or \[B, N, 1176\] .*, or 588 columns"),
        (lambda t: {"pixels": t["pixels"][:, :587]}, r"or 588 columns \(one frame for all 2\)"),
        (lambda t: {"pixels": torch.zeros(1, 3, 0, 14, 14), "layout": "channels_first"}, "or one frame"),
        (lambda t: {"pixels": t["pixels"][:, :588], "patch_size": (1, 14, 28)}, r"\(the weight's columns\)$"),
    ],
    ids=["a column less", "less than a frame", "no frame", "patches of one frame"],
)
def test_refused(change: Callable[[dict[str, Tensor]], dict[str, Any]], wanted: str) -> None:
    tensors = QWEN.inputs(torch.float32, torch.device("cpu"))
    tensors["weight"] = tensors["weight"].flatten(1)
    with pytest.raises(ValueError, match=f"^pixels: got .*, wanted .*{wanted}"):
        patch_embed(**({"patch_size": (2, 14, 14), "layout": "rows"} | tensors | change(tensors)))


def test_triton_leaves_plain_products_to_torch(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 16 bits with nothing to add but a bias it is torch's product, of rows in place or cut; all else is the kernel's."""
    pytest.importorskip("triton", reason="triton is not installed")
    from vlmkernels.backends.triton import patch_embed as triton

    launched: list[str] = []
    launch = triton._gemm_launch
    monkeypatch.setattr(triton, "_gemm_launch", lambda *args: launched.append("product") or launch(*args))
    bf16 = QWEN.inputs(torch.bfloat16, device)
    pos = torch.randn(6, QWEN.dim, device=device).bfloat16()
    shifted = torch.randn(6, 1180, device=device).bfloat16()[:, 1:1177]
    cases: list[tuple[dict[str, Tensor], bool]] = [
        ({}, True),
        ({"bias": pos[0].contiguous()}, True),
        ({"pixels": bf16["pixels"][:, :588].contiguous()}, True),
        ({"pixels": bf16["pixels"][::2]}, True),
        ({"pixels": bf16["pixels"][:1]}, True),
        ({"pixels": bf16["pixels"].float()}, True),
        ({"pixels": shifted}, True),
        ({"pos_embed": pos}, False),
        ({"prefix_tokens": pos}, False),
    ]
    for change, plain in cases:
        del launched[:]
        out = patch_embed(**(bf16 | change), patch_size=(2, 14, 14), layout="rows", backend="triton")
        assert bool(launched) != plain, list(change)
        wide = double(bf16 | change | {"pixels": change.get("pixels", bf16["pixels"]).bfloat16()})
        exact = patch_embed(**wide, patch_size=(2, 14, 14), layout="rows", backend="reference")
        assert compare(out, exact, "gemm"), list(change)
    patch_embed(**QWEN.inputs(torch.float32, device), patch_size=(2, 14, 14), layout="rows", backend="triton")
    assert launched, "fp32 products are IEEE whatever torch is set to"

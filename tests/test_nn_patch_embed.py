# SPDX-License-Identifier: Apache-2.0
"""PatchEmbed and PatchEmbed3d against the embeddings of transformers and timm that they replace."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from nn_parity import check_module, check_parity, quick_backend, randn, randomize, share_weights
from torch import Tensor, nn
from transformers.models.blip.modeling_blip import BlipVisionEmbeddings
from transformers.models.blip_2.modeling_blip_2 import Blip2VisionEmbeddings
from transformers.models.clip.modeling_clip import CLIPVisionEmbeddings
from transformers.models.git.modeling_git import GitVisionEmbeddings
from transformers.models.qwen2_vl import modeling_qwen2_vl
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionPatchEmbed
from transformers.models.siglip.modeling_siglip import SiglipVisionEmbeddings
from transformers.models.vit.modeling_vit import ViTEmbeddings

from vlmkernels.nn import PatchEmbed, PatchEmbed3d
from vlmkernels.testing.compare import compare

__all__ = ["quick_backend"]
D, P, SIDE = 32, 8, 32
MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def config(kind: str) -> Any:
    return getattr(transformers, kind)(hidden_size=D, num_attention_heads=2, patch_size=P, image_size=SIDE)


class ClipWithNorm(CLIPVisionEmbeddings):
    """CLIP's embeddings and the norm that follows them, which lies one module up in transformers."""

    def __init__(self) -> None:
        super().__init__(config("CLIPVisionConfig"))
        self.pre_layrnorm = nn.LayerNorm(D)

    def forward(self, *arguments: Any, **options: Any) -> Tensor:
        return self.pre_layrnorm(super().forward(*arguments, **options))


CASES: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "clip": (lambda: CLIPVisionEmbeddings(config("CLIPVisionConfig")), {"layout": "clip"}),
    "clip with its norm": (ClipWithNorm, {"layout": "clip", "norm": True}),
    "git": (lambda: GitVisionEmbeddings(config("GitVisionConfig")), {"layout": "clip"}),
    "siglip": (lambda: SiglipVisionEmbeddings(config("SiglipVisionConfig")), {"layout": "siglip"}),
    "vit": (lambda: ViTEmbeddings(config("ViTConfig")), {"layout": "vit"}),
    "blip": (lambda: BlipVisionEmbeddings(config("BlipVisionConfig")), {"layout": "blip"}),
    "blip-2": (lambda: Blip2VisionEmbeddings(config("Blip2VisionConfig")), {"layout": "blip"}),
}


def embed(module: nn.Module, pixels: Tensor) -> Tensor:
    return module(pixels)


@pytest.mark.parametrize("case", CASES)
def test_image_embeddings(case: str) -> None:
    build, arguments = CASES[case]
    check_parity(PatchEmbed(D, P, SIDE, **arguments), build(), embed, embed, randn(2, 3, SIDE, SIDE))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", [(48, 24), (16, 64)], ids=["another size", "as many patches"])
def test_other_image_sizes(case: str, size: tuple[int, int]) -> None:
    build, arguments = CASES[case]

    def resized(module: nn.Module, pixels: Tensor) -> Tensor:
        return module(pixels, interpolate_pos_encoding=True)

    ours = PatchEmbed(D, P, SIDE, **arguments)
    check_parity(ours, build(), lambda m, x: m(x, interpolate=True), resized, randn(2, 3, *size))


def test_images_that_the_patch_does_not_divide() -> None:
    theirs = SiglipVisionEmbeddings(
        transformers.SiglipVisionConfig(hidden_size=D, num_attention_heads=2, patch_size=P, image_size=SIDE + 5)
    )
    check_parity(PatchEmbed(D, P, SIDE + 5, layout="siglip"), theirs, embed, embed, randn(2, 3, SIDE + 5, SIDE + 5))


TIMM: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "class token": ({}, {}),
    "registers without positions": (
        {"reg_tokens": 4, "no_embed_class": True},
        {"register_tokens": 4, "position_prefix": False},
    ),
    "registers with positions": ({"reg_tokens": 2}, {"register_tokens": 2}),
    "no class token": ({"class_token": False, "global_pool": "avg"}, {"class_token": False}),
    "clip": ({"pre_norm": True, "norm_layer": nn.LayerNorm}, {"norm": True, "bias": False}),
}


@pytest.mark.parametrize("case", TIMM)
@pytest.mark.parametrize("size", [(SIDE, SIDE), (48, 24)], ids=["own size", "another size"])
def test_timm_embeddings(case: str, size: tuple[int, int]) -> None:
    timm = pytest.importorskip("timm", reason="timm imports only beside a torchvision for this torch")
    theirs_has, ours_has = TIMM[case]
    # A transformer without layers is its embedding.
    sizes = {"img_size": SIDE, "patch_size": P, "embed_dim": D, "num_heads": 2, "depth": 0, "num_classes": 0}
    theirs = timm.models.VisionTransformer(**sizes, final_norm=False, dynamic_img_size=size != (SIDE, SIDE), **theirs_has)
    ours = PatchEmbed(D, P, SIDE, layout="timm", **ours_has)
    interpolate = size != (SIDE, SIDE)
    check_parity(ours, theirs, lambda m, x: m(x, interpolate), lambda m, x: m.forward_features(x), randn(2, 3, *size))


@pytest.mark.parametrize("channels_last", [False, True])
def test_uint8_photos(channels_last: bool, device: torch.device) -> None:
    theirs, ours = ClipWithNorm(), PatchEmbed(D, P, SIDE, norm=True, mean=MEAN, std=STD)
    randomize(theirs)
    share_weights(ours, theirs)
    photo = torch.randint(256, (2, 3, SIDE, SIDE), dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(v, dtype=torch.float64, device=device).view(3, 1, 1) for v in (MEAN, STD))
    exact = theirs.double()((photo.double() / 255 - mean) / std)
    given = photo.permute(0, 2, 3, 1).contiguous() if channels_last else photo
    assert compare(ours(given, channels_last=channels_last), exact, "gemm")
    normalised = ((photo.double() / 255 - mean) / std).float()
    assert compare(ours(normalised), theirs(normalised.double()), "gemm")


@pytest.mark.parametrize("patch", [P, 16], ids=["small", "for the CUDA kernel"])
def test_uint8_follows_the_parameters(patch: int, device: torch.device) -> None:
    """What is folded into the weight is never that of an earlier weight: not after a step, other parameters, another dtype."""
    ours = randomize(PatchEmbed(96, patch, 4 * patch, norm=True, mean=MEAN, std=STD))
    photo = torch.randint(256, (2, 3, 4 * patch, 4 * patch), dtype=torch.uint8, device=device)
    mean, std = (torch.tensor(v, dtype=torch.float64, device=device).view(3, 1, 1) for v in (MEAN, STD))

    def check() -> None:
        exact = copy.deepcopy(ours).double()((photo.double() / 255 - mean) / std)
        with torch.no_grad():
            for _ in range(2):  # the second time by a plan
                assert compare(ours(photo), exact, "gemm")

    check()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.5)
    before = ours.patch_embedding.weight.clone()
    ours(photo).square().mean().backward()
    optimizer.step()
    assert not torch.equal(ours.patch_embedding.weight, before)
    check()
    ours.load_state_dict({name: torch.randn_like(value) * 0.1 for name, value in ours.state_dict().items()})
    check()
    ours.to(torch.bfloat16)
    check()
    ours.patch_embedding.weight.data = ours.patch_embedding.weight.data * -2
    check()


def test_open_clip_names() -> None:
    """open_clip's tower is CLIP's under other names."""
    clip = randomize(PatchEmbed(D, P, SIDE, norm=True))
    ours = PatchEmbed(D, P, SIDE, layout="open_clip", norm=True).to(next(clip.parameters()).device)
    names = {"patch_embedding": "conv1", "position_embedding.weight": "positional_embedding", "pre_layrnorm": "ln_pre"}
    state = clip.state_dict()
    for theirs, its in names.items():
        state = {name.replace(theirs, its): value for name, value in state.items()}
    assert set(state) == {"class_embedding", "positional_embedding", "conv1.weight", "ln_pre.weight", "ln_pre.bias"}
    ours.load_state_dict(state)
    pixels = randn(2, 3, SIDE, SIDE)
    assert torch.equal(ours(pixels), clip(pixels))


def test_module_behaviour() -> None:
    ours = PatchEmbed(D, P, SIDE, layout="timm", register_tokens=2, norm=True)
    check_module(ours, lambda m, x: m(x, interpolate=True), randn(2, 3, 48, 24))


def qwen2() -> nn.Module:
    return modeling_qwen2_vl.PatchEmbed(P, 2, 3, D)


def qwen3() -> nn.Module:
    return Qwen3VLVisionPatchEmbed(Qwen3VLVisionConfig(hidden_size=D, patch_size=P))


@pytest.mark.parametrize(("build", "bias"), [(qwen2, False), (qwen3, True)], ids=["qwen2-vl", "qwen3-vl"])
def test_packed_rows(build: Callable[[], nn.Module], bias: bool) -> None:
    check_parity(PatchEmbed3d(D, P, bias=bias), build(), embed, embed, randn(11, 3 * 2 * P * P))


@pytest.mark.parametrize(("build", "bias"), [(qwen2, False), (qwen3, True)], ids=["qwen2-vl", "qwen3-vl"])
def test_packed_rows_of_still_images(build: Callable[[], nn.Module], bias: bool) -> None:
    """Ours gets the one frame that the processors repeat for theirs; the gradients reach it through the repetition."""

    def repeated(module: nn.Module, rows: Tensor) -> Tensor:
        return module(rows.view(11, 3, 1, P * P).expand(-1, -1, 2, -1).reshape(11, -1))

    check_parity(PatchEmbed3d(D, P, bias=bias), build(), embed, repeated, randn(11, 3 * P * P))


@pytest.mark.parametrize("temporal", [True, False], ids=["video", "image"])
def test_frames_come_in_the_order_of_the_processor(temporal: bool, device: torch.device) -> None:
    """Raw uint8 frames give the tokens of the rows that Qwen-VL's processors cut them into (blocks of 2 x 2 patches)."""
    frames = torch.randint(256, (4 if temporal else 1, 3, 32, 48), dtype=torch.uint8, device=device)
    ours = randomize(PatchEmbed3d(D, P, merge_size=2, mean=MEAN, std=STD))
    mean, std = (torch.tensor(v, dtype=torch.float64, device=device).view(3, 1, 1) for v in (MEAN, STD))
    pixels = (frames.double() / 255 - mean) / std
    twice = pixels if temporal else pixels.expand(2, -1, -1, -1)
    # The processors' own reshape: frames, then blocks of the grid, then patches of a block, then the pixels of a patch.
    grid_t, grid_h, grid_w = len(twice) // 2, 32 // P, 48 // P
    cut = twice.reshape(grid_t, 2, 3, grid_h // 2, 2, P, grid_w // 2, 2, P)
    rows = cut.permute(0, 3, 6, 4, 7, 2, 1, 5, 8).reshape(grid_t * grid_h * grid_w, 3 * 2 * P * P)
    exact = qwen2().to(device).double()
    exact.load_state_dict(ours.state_dict())
    given = [frames.transpose(0, 1).unsqueeze(0)] if temporal else [frames, frames.unsqueeze(2)]
    for pixels in given:
        assert compare(ours(pixels)[0], exact(rows), "gemm")


def test_3d_module_behaviour() -> None:
    check_module(PatchEmbed3d(D, P, bias=True, merge_size=2), embed, randn(1, 3, 2, 32, 16))
    check_module(PatchEmbed3d(D, P, bias=True), embed, randn(9, 3 * P * P))


def test_no_images() -> None:
    assert PatchEmbed(D, P, SIDE)(torch.zeros(0, 3, SIDE, SIDE)).shape == (0, 17, D)
    assert PatchEmbed3d(D, P)(torch.zeros(0, 3 * 2 * P * P)).shape == (0, D)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: PatchEmbed(D, P, 4), "image_size"),
        (lambda: PatchEmbed(D, P, SIDE, layout="no such"), "layout"),
        (lambda: PatchEmbed(D, P, SIDE, layout="siglip", class_token=True), "class_token"),
        (lambda: PatchEmbed(D, P, SIDE, register_tokens=1), "register_tokens"),
        (lambda: PatchEmbed(D, P, SIDE, std=STD), "mean"),
        (lambda: PatchEmbed(D, P, SIDE)(torch.zeros(1, 3, SIDE, 2 * SIDE)), "pixels"),
        (lambda: PatchEmbed(D, P, SIDE)(torch.zeros(3, SIDE, SIDE)), "pixels"),
        (lambda: PatchEmbed(D, P, SIDE)(torch.zeros(1, 3, SIDE, SIDE, dtype=torch.uint8)), "mean"),
        (lambda: PatchEmbed3d(D, P, merge_size=0), "merge_size"),
        (lambda: PatchEmbed3d(D, P, merge_size=2)(torch.zeros(1, 3, 2, 24, 16)), "pixels"),
        (lambda: PatchEmbed3d(D, P)(torch.zeros(1, 2, 3)), "pixels"),
        (lambda: PatchEmbed3d(D, P)(torch.zeros(4, P * P)), "pixels"),
    ],
)
def test_refusals(build: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*, wanted "):
        build()

# SPDX-License-Identifier: Apache-2.0
"""NaFlexPatchEmbed and PackedPatchEmbed3d against the embeddings of transformers and timm that they replace."""

import contextlib
from collections.abc import Callable
from unittest import mock

import pytest
import torch
from conftest import DEVICE
from nn_parity import check_module, check_parity, quick_backend, randn, randomize, run, share_weights
from torch import Tensor, nn
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.siglip2.configuration_siglip2 import Siglip2VisionConfig
from transformers.models.siglip2.modeling_siglip2 import Siglip2VisionEmbeddings

from vlmkernels.nn import NaFlexPatchEmbed, PackedPatchEmbed3d
from vlmkernels.testing.compare import compare

__all__ = ["quick_backend"]
D, P, S = 32, 4, 6
SHAPES = torch.tensor([(5, 8), (6, 6), (2, 12), (1, 1)], device=DEVICE)
GRIDS = torch.tensor([(1, 4, 8), (3, 2, 2), (1, 10, 14)], device=DEVICE)
ROWS = 32 + 12 + 140


class WideSiglip2(Siglip2VisionEmbeddings):
    """In fp64 all the way: from transformers 5.24 on, positions are resized in fp32, and meet a table of fp64 there."""

    def forward(self, *args: Tensor) -> Tensor:
        wide = self.position_embedding.weight.dtype == torch.float64
        with mock.patch.object(Tensor, "float", Tensor.double) if wide else contextlib.nullcontext():
            return super().forward(*args)


def siglip2() -> Siglip2VisionEmbeddings:
    return WideSiglip2(Siglip2VisionConfig(hidden_size=D, num_attention_heads=2, patch_size=P, num_patches=S * S, num_channels=3))


class Qwen3VLEmbedding(nn.Module):
    """The whole vision tower, without layers: what it calls its last hidden state is then its embedding."""

    def __init__(self) -> None:
        super().__init__()
        config = Qwen3VLVisionConfig(
            hidden_size=D, num_heads=2, patch_size=P, depth=0, deepstack_visual_indexes=[], num_position_embeddings=S * S
        )
        tower = Qwen3VLVisionModel(config)
        self.patch_embed, self.pos_embed = tower.patch_embed, tower.pos_embed
        self.rest = [tower]  # not a submodule: its merger is no part of the embedding

    def forward(self, rows: Tensor, grid_thw: Tensor) -> Tensor:
        tower = self.rest[0].to(rows)
        tower.patch_embed, tower.pos_embed = self.patch_embed, self.pos_embed
        return tower(rows, grid_thw).last_hidden_state


def padded(module: nn.Module, pixels: Tensor) -> Tensor:
    return module(pixels, SHAPES)


def packed(module: nn.Module, rows: Tensor) -> Tensor:
    return module(rows, GRIDS)


def test_siglip2() -> None:
    """All rows, those of the padding too."""
    check_parity(NaFlexPatchEmbed(D, P, S), siglip2(), padded, padded, randn(4, 45, 3 * P * P))


def test_qwen3_vl() -> None:
    check_parity(PackedPatchEmbed3d(D, P, grid_size=S), Qwen3VLEmbedding(), packed, packed, randn(ROWS, 3 * 2 * P * P))


def test_qwen3_vl_still_images() -> None:
    """Ours gets the one frame that the processor repeats for theirs."""

    def repeated(module: nn.Module, rows: Tensor) -> Tensor:
        return packed(module, rows.view(ROWS, 3, 1, P * P).expand(-1, -1, 2, -1).reshape(ROWS, -1))

    check_parity(PackedPatchEmbed3d(D, P, grid_size=S), Qwen3VLEmbedding(), packed, repeated, randn(ROWS, 3 * P * P))


def test_timm() -> None:
    timm = pytest.importorskip("timm", reason="timm imports only beside a torchvision for this torch")
    theirs = timm.models.naflexvit.NaFlexEmbeds(
        P, 3, D, "linear", class_token=False, pos_embed_grid_size=(S, S), pos_embed_interp_mode="bilinear"
    )
    # A width of 1 is left out: torch's own antialiasing is wrong there on a CPU.
    shapes = SHAPES[:3]
    coordinates = torch.zeros(3, 45, 2, dtype=torch.int64, device=DEVICE)
    for place, (h, w) in zip(coordinates, shapes.tolist(), strict=True):
        place[: h * w] = torch.cartesian_prod(torch.arange(h), torch.arange(w))

    def embed(module: nn.Module, pixels: Tensor) -> Tensor:
        out = module(pixels, patch_coord=coordinates)
        return out[0] if isinstance(out, tuple) else out

    ours = NaFlexPatchEmbed(D, P, S, layout="timm")
    check_parity(ours, theirs, lambda m, x: m(x, shapes), embed, randn(3, 45, 3 * P * P))


@pytest.mark.parametrize("layout", ["siglip2", "timm"])
def test_naflex_behaviour(layout: str) -> None:
    check_module(NaFlexPatchEmbed(D, P, S, layout=layout), padded, randn(4, 45, 3 * P * P))


def test_packed_behaviour() -> None:
    check_module(PackedPatchEmbed3d(D, P, grid_size=S), packed, randn(ROWS, 3 * 2 * P * P))


def test_bf16_is_no_further_off_than_transformers() -> None:
    for ours, theirs, call, pixels in (
        (NaFlexPatchEmbed(D, P, S), siglip2(), padded, randn(4, 45, 3 * P * P)),
        (PackedPatchEmbed3d(D, P, grid_size=S), Qwen3VLEmbedding(), packed, randn(ROWS, 3 * 2 * P * P)),
    ):
        randomize(theirs)
        share_weights(ours, theirs)
        low, pixels = ours.bfloat16(), pixels.bfloat16()
        got, peer = run(low, call, (pixels,), 1)["output"], run(theirs.bfloat16(), call, (pixels,), 1)["output"]
        exact = run(theirs.double(), call, (pixels.double(),), 1)["output"]
        assert compare(got, exact, "gemm") and compare(got, exact, "gemm").error <= 1.05 * compare(peer, exact, "gemm").error


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: NaFlexPatchEmbed(D, P, S, layout="clip"), "layout"),
        (lambda: NaFlexPatchEmbed(D, P, 0), "grid_size"),
        (lambda: PackedPatchEmbed3d(D, P, grid_size=0), "grid_size"),
        (lambda: NaFlexPatchEmbed(D, P, S)(torch.zeros(9, 48), torch.ones(1, 2, dtype=torch.int64)), "pixel_values"),
        (lambda: PackedPatchEmbed3d(D, P)(torch.zeros(1, 9, 96), torch.ones(1, 3, dtype=torch.int64)), "pixel_values"),
        (lambda: PackedPatchEmbed3d(D, P)(torch.zeros(4, 96), torch.ones(1, 3, dtype=torch.int64)), "grids"),
        (lambda: PackedPatchEmbed3d(D, P).patch_embed(torch.zeros(1, 3, 8, 8), torch.zeros(4, D)), "pos_embed"),
    ],
)
def test_refusals(build: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*, wanted "):
        build()

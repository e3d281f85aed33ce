# SPDX-License-Identifier: Apache-2.0
"""A whole BLIP-2 on photos, tower to projection, against transformers: each layer on the same input, and all of them in a row."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICE, ON_GPU
from nn_parity import without_rounding
from torch import Tensor, nn
from transformers import Blip2QFormerConfig, Blip2VisionConfig
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel, Blip2VisionModel

from vlmkernels import use_backend
from vlmkernels.bench import photos
from vlmkernels.nn import PatchEmbed, QFormer, SelfAttention
from vlmkernels.testing import compare

QUERIES = 32
#: The published sizes: EVA-g as the tower, the Q-Former, the width of OPT-2.7B; and small ones of the same kind.
PUBLISHED = {"vision": (1408, 16, 6144, 39, 224), "former": (768, 12, 3072, 12), "text": 2560}
SMALL = {"vision": (96, 4, 160, 3, 56), "former": (64, 4, 96, 4), "text": 48}
#: A step of the model: its name, ours, and theirs.
Step = tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor]]


@pytest.fixture(autouse=True)
def quick_backend() -> Iterator[None]:
    with use_backend("" if ON_GPU else "torch"):
        yield


class Theirs(nn.Module):
    """The parts of ``Blip2ForConditionalGeneration`` before its language model, with random weights."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        names = ("hidden_size", "num_attention_heads", "intermediate_size", "num_hidden_layers", "image_size")
        vision = dict(zip(names, sizes["vision"], strict=True))
        former = dict(zip(names, sizes["former"], strict=False))
        eager = {"attn_implementation": "eager"}
        self.vision = Blip2VisionModel(Blip2VisionConfig(**vision, patch_size=14, **eager))
        self.former = Blip2QFormerModel(
            Blip2QFormerConfig(**former, encoder_hidden_size=vision["hidden_size"], use_qformer_text_input=False, **eager)
        )
        self.queries = nn.Parameter(torch.randn(1, QUERIES, former["hidden_size"]))
        self.projection = nn.Linear(former["hidden_size"], sizes["text"])
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                # What is initialised to 0 or 1, and would hide that it is left out.
                if parameter.dim() == 1:
                    parameter.copy_(0.1 * torch.randn_like(parameter) + ("norm" in name.lower() and name.endswith("weight")))
                elif "embedding" in name:
                    parameter.normal_(std=0.05)

    def forward(self, pixels: Tensor) -> Tensor:
        image = self.vision(pixels).last_hidden_state
        y: Tensor = self.former(self.queries.expand(len(image), -1, -1), encoder_hidden_states=image).last_hidden_state
        return self.projection(y)  # type: ignore[no-any-return]


class Ours(nn.Module):
    """The same of this package's modules; norms, feed-forwards of the tower and the projection are theirs."""

    def __init__(self, theirs: Theirs, sizes: dict[str, Any]) -> None:
        super().__init__()
        width, heads, _, _, resolution = sizes["vision"]
        made: dict[str, Any] = {"device": theirs.queries.device, "dtype": theirs.queries.dtype}
        self.theirs = theirs
        self.embed = PatchEmbed(width, 14, resolution, layout="blip", **made)
        self.embed.load_state_dict(theirs.vision.embeddings.state_dict())
        self.attentions = nn.ModuleList()
        for layer in theirs.vision.encoder.layers:
            attention = SelfAttention(width, heads, layout="blip", **made)
            attention.load_state_dict(layer.self_attn.state_dict())
            self.attentions.append(attention)
        width, heads, inner, depth = sizes["former"]
        self.former = QFormer(width, heads, inner, depth, context_dim=sizes["vision"][0], text=False, **made)
        self.former.load_state_dict(theirs.former.state_dict())

    def vision_layer(self, i: int, x: Tensor) -> Tensor:
        layer: Any = self.theirs.vision.encoder.layers[i]
        x = x + self.attentions[i](layer.layer_norm1(x))
        return x + layer.mlp(layer.layer_norm2(x))  # type: ignore[no-any-return]

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.embed(pixels)
        for i in range(len(self.attentions)):
            x = self.vision_layer(i, x)
        y = self.former(self.theirs.queries, self.theirs.vision.post_layernorm(x))
        return self.theirs.projection(y)  # type: ignore[no-any-return]


def first(output: Any) -> Tensor:
    """transformers' layers return a tensor, or a tuple that begins with it, by version."""
    return output[0] if isinstance(output, tuple) else output


def steps(ours: Ours, wide: Theirs, dtype: torch.dtype) -> tuple[list[Step], list[Step]]:
    """Those of the tower, which begin with pixels, and those of the Q-Former, which begin with the image."""
    vision: list[Step] = [("embeddings", ours.embed, lambda x: wide.vision.embeddings(x))]
    for i, layer in enumerate(wide.vision.encoder.layers):
        vision.append((f"tower {i}", lambda x, i=i: ours.vision_layer(i, x), lambda x, m=layer: first(m(x))))  # type: ignore[misc]
    vision.append(("post_layernorm", ours.theirs.vision.post_layernorm, wide.vision.post_layernorm))
    image: list[Tensor] = []

    def begin(model: Any) -> Callable[[Tensor], Tensor]:
        def call(context: Tensor) -> Tensor:
            image[:] = [context.to(dtype)]
            return model.layernorm(wide.queries.to(dtype).to(context.dtype).expand(len(context), -1, -1))  # type: ignore[no-any-return]

        return call

    former: list[Step] = [("queries", begin(ours.former), begin(wide.former))]
    for i, (mine, layer) in enumerate(zip(ours.former.encoder.layer, wide.former.encoder.layer, strict=True)):
        former.append((
            f"Q-Former {i}",
            lambda x, m=mine: m(x, None, image[0], None, QUERIES),  # type: ignore[misc]
            lambda x, m=layer: first(m(x, None, image[0].double(), None, QUERIES)),  # type: ignore[misc]
        ))  # fmt: skip
    former.append(("projection", ours.theirs.projection, wide.projection))
    return vision, former


def check(sizes: dict[str, Any], dtype: torch.dtype, images: int) -> None:
    with torch.device(DEVICE):
        theirs = Theirs(sizes).eval().to(dtype)
        wide = Theirs(sizes).eval().double()
    wide.load_state_dict(theirs.state_dict())
    ours = Ours(theirs, sizes)
    pixels = photos.normalized(photos.batch(images, sizes["vision"][-1]).to(DEVICE), photos.CLIP, dtype)
    worst = (0.0, "")
    with torch.no_grad():
        x = pixels
        for part in steps(ours, wide, dtype):
            for name, mine, reference in part:
                with without_rounding():
                    exact = reference(x.double())
                result = compare(mine(x), exact, "module")
                assert result, f"{name}: {result}"
                worst = max(worst, (result.ratio, name))
                x = exact.to(dtype)
        # In a row errors grow, theirs too: ours are no larger.
        with without_rounding():
            exact = wide(pixels.double())
        scale = exact.square().mean().sqrt()
        of_ours, of_theirs = (((model(pixels) - exact).square().mean().sqrt() / scale).item() for model in (ours, theirs))
    print(f"{dtype}: worst {worst}, in a row {of_ours:.2e}, transformers {of_theirs:.2e}")
    assert of_ours <= 1.25 * of_theirs
    assert of_ours <= (0.1 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_small(dtype: torch.dtype) -> None:
    check(SMALL, dtype, 2)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_published_sizes(dtype: torch.dtype) -> None:
    check(PUBLISHED, dtype, 4)

# SPDX-License-Identifier: Apache-2.0
"""The operators on the shapes of published models, with inputs laid out as models hand them over.

On a CPU every model keeps its head dim, mask and ratio of heads, and loses heads and tokens.
"""

import dataclasses
from collections.abc import Iterator

import pytest
import torch

from vlmkernels import BackendError, KeyRanges, attention
from vlmkernels.ops.patch_embed import patch_embed
from vlmkernels.testing import compare
from vlmkernels.testing.inputs import NOT_ADDRESSABLE, QKV_VIEWS
from vlmkernels.testing.shapes import ATTENTION, PATCH_EMBED, AttentionShape, PatchEmbedShape

HALF = torch.bfloat16


def sized(shape: AttentionShape, device: torch.device) -> AttentionShape:
    if device.type == "cuda":
        return shape
    group = shape.H // shape.Hk
    small = {"H": group, "Hk": 1, "Sq": min(shape.Sq, 37), "Sk": min(shape.Sk, 50), "image": min(shape.image, 20)}
    if shape.Sq == shape.Sk:
        small["Sk"] = small["Sq"]
    return dataclasses.replace(shape, **small)


def ranges(shape: AttentionShape, device: torch.device) -> KeyRanges | None:
    if shape.mask == "prefix":
        return KeyRanges.prefix_lm(shape.Sq, torch.tensor([shape.image], device=device))
    if shape.mask == "image":
        types = torch.zeros(1, shape.Sq, dtype=torch.int32, device=device)
        types[:, 4 : 4 + shape.image] = 1
        return KeyRanges.image_text(types)
    return None


def names(shapes: tuple[AttentionShape, ...] | tuple[PatchEmbedShape, ...]) -> Iterator[str]:
    return (shape.name.replace(" ", "-") for shape in shapes)


@pytest.mark.backends("attention_fwd", exclude=("reference",))
@pytest.mark.parametrize("shape", ATTENTION, ids=names(ATTENTION))
def test_attention_of_published_models(backend: str, shape: AttentionShape, device: torch.device) -> None:
    shape = sized(shape, device)
    # The views take turns over the models, so that each model meets one and each view several. That the CUDA kernel refuses
    # some is tested with the kernel.
    views = [make for name, make in QKV_VIEWS.items() if backend != "cuda" or name not in NOT_ADDRESSABLE]
    make = views[next(i for i, s in enumerate(ATTENTION) if s.name == shape.name) % len(views)]
    q, k, v = make((2, shape.Sq, shape.Sk, shape.H, shape.Hk, shape.D), HALF, device)
    settings = {"ranges": ranges(shape, device), "causal": shape.mask == "causal", "softcap": shape.softcap}
    if backend == "torch" and shape.softcap:
        with pytest.raises(BackendError, match="softcap"):
            attention(q, k, v, **settings, backend=backend)
        return
    out = attention(q, k, v, **settings, backend=backend)
    exact = attention(q.double(), k.double(), v.double(), **settings, backend="reference")
    assert compare(out, exact, "gemm")


#: Models that the CUDA kernel leaves to others, and the reason that it gives.
NOT_IN_CUDA = {
    "DINOv2-L/14 reg4@518": "a stride of pixels of 804972 elements: multiples of 16 bytes",
    "SigLIP2-B/16 NaFlex": "it takes rows of pixels that are contiguous",
    "Qwen2-VL@448": "it takes square patches of images of three channels",
    "Qwen3-VL@448": "it takes square patches of images of three channels",
}


@pytest.mark.backends("patch_embed_fwd", exclude=("reference",))
@pytest.mark.parametrize("shape", PATCH_EMBED, ids=names(PATCH_EMBED))
def test_patch_embedding_of_published_models(backend: str, shape: PatchEmbedShape, device: torch.device) -> None:
    width, size = (shape.D, shape.size) if device.type == "cuda" else (48, 2 * shape.patch[-1] + shape.size % shape.patch[-1])
    patches, columns = (size // shape.patch[-1]) ** 2, 3 * torch.Size(shape.patch).numel()
    pixels = torch.randn(2, patches, columns) if shape.rows else torch.randn(2, 3, size, size)
    weight = torch.randn(width, columns) if shape.rows else torch.randn(width, 3, *shape.patch)
    tensors = {
        "pixels": pixels,
        "weight": weight / columns**0.5,
        "bias": torch.randn(width) if shape.bias else None,
        "prefix_tokens": torch.randn(shape.prefix, width) if shape.prefix else None,
        "pos_embed": torch.randn(shape.prefix + patches, width),
    }
    norm = torch.randn(2, width) if shape.norm else None
    layout = {"layout": "rows", "columns": shape.rows} if shape.rows else {}

    def run(dtype: torch.dtype, name: str) -> torch.Tensor:
        given = {key: x if x is None else x.to(device, HALF).to(dtype) for key, x in tensors.items()}
        pair = None if norm is None else (*norm.to(device, HALF).to(dtype), 1e-5)
        return patch_embed(**given, patch_size=shape.patch, norm=pair, **layout, backend=name)

    if backend == "cuda" and shape.name in NOT_IN_CUDA:
        with pytest.raises(BackendError, match=NOT_IN_CUDA[shape.name]):
            run(HALF, backend)
        return
    assert compare(run(HALF, backend), run(torch.float64, "reference"), "gemm")

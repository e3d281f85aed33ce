# SPDX-License-Identifier: Apache-2.0
"""The vision towers that are measured: transformers' own modules, of the published sizes, with random weights.

Nothing is downloaded. A tower has one layer: its patch embedding and its first attention are what is measured, and every
layer does the same work. Queries, keys and values are those that the module hands to its attention function.
"""

import importlib
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from vlmkernels.bench import Unavailable, need, photos

#: Of the weights. With the seed of the inputs, 0, a GPU drew both from one stream of numbers: 768 image tokens were 50 times the
#: rows of a weight, and the gradient of the queries' weight was 4.4 floors off in every implementation instead of 2.6 (H200).
SEED = 1


@dataclass(frozen=True)
class Tower:
    """A published vision tower.

    Args:
        model: the module in ``transformers.models`` and the name of the model class.
        config: the name of the configuration class and what differs from its defaults.
        batch: images in a batch on a GPU, and on a CPU; rows for the towers that take rows.
        statistics: mean and standard deviation of its preprocessor.
    """

    name: str
    model: tuple[str, str]
    config: tuple[str, dict[str, Any]]
    batch: tuple[int, int]
    statistics: photos.Statistics

    def settings(self, key: str) -> int:
        """A number of the configuration."""
        return int(self.config[1][key])

    def images(self, device: torch.device) -> torch.Tensor:
        """uint8 photos ``[B, 3, R, R]``."""
        return photos.batch(self.count(device), self.settings("image_size")).to(device)

    def count(self, device: torch.device) -> int:
        """The size of a batch there."""
        return self.batch[device.type != "cuda"]

    def build(self, device: torch.device, dtype: torch.dtype) -> torch.nn.Module:
        """The transformers module with one layer, seeded random weights, in evaluation mode."""
        return build(self.model, self.config, device, dtype)


def vit_config(hidden: int, heads: int, mlp: int, resolution: int, patch: int, **more: Any) -> dict[str, Any]:
    """The sizes of a vision tower of one layer, under transformers' names."""
    sizes = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": mlp}
    return {**sizes, "image_size": resolution, "patch_size": patch, "num_hidden_layers": 1, **more}


VIT_B = Tower("ViT-B/16@224", ("vit", "ViTModel"), ("ViTConfig", vit_config(768, 12, 3072, 224, 16)), (256, 2), photos.HALF)
CLIP_L = Tower(
    "CLIP-L/14@336", ("clip", "CLIPVisionModel"), ("CLIPVisionConfig", vit_config(1024, 16, 4096, 336, 14)), (128, 1), photos.CLIP
)
CLIP_B = Tower(
    "CLIP-B/16@224", ("clip", "CLIPVisionModel"), ("CLIPVisionConfig", vit_config(768, 12, 3072, 224, 16)), (256, 2), photos.CLIP
)
CLIP_B_32 = Tower(
    "CLIP-B/32@224", ("clip", "CLIPVisionModel"), ("CLIPVisionConfig", vit_config(768, 12, 3072, 224, 32)), (256, 2), photos.CLIP
)
SIGLIP = Tower(
    "SigLIP-So400m/14@384",
    ("siglip", "SiglipVisionModel"),
    ("SiglipVisionConfig", vit_config(1152, 16, 4304, 384, 14, vision_use_head=False)),
    (64, 1),
    photos.HALF,
)
EVA_G = Tower(
    "EVA-g/14@224",
    ("blip_2", "Blip2VisionModel"),
    ("Blip2VisionConfig", vit_config(1408, 16, 6144, 224, 14)),
    (128, 2),
    photos.CLIP,
)
#: Towers that take rows, without a layer: of the vision towers of Qwen2-VL-7B and Qwen3-VL-8B the embedding alone is measured.
QWEN2 = Tower(
    "Qwen2-VL",
    ("qwen2_vl", "Qwen2VisionTransformerPretrainedModel"),
    ("Qwen2VLVisionConfig", {"depth": 0, "embed_dim": 1280, "patch_size": 14}),
    (65536, 512),
    photos.CLIP,
)
QWEN3 = Tower(
    "Qwen3-VL",
    ("qwen3_vl", "Qwen3VLVisionModel"),
    ("Qwen3VLVisionConfig", {"depth": 0, "deepstack_visual_indexes": [], "hidden_size": 1152, "patch_size": 16}),
    (65536, 512),
    photos.HALF,
)
#: The embedding alone; a batch counts images here.
NAFLEX = Tower(
    "SigLIP2-NaFlex",
    ("siglip2", "Siglip2VisionEmbeddings"),
    ("Siglip2VisionConfig", {"hidden_size": 1152, "num_attention_heads": 16, "patch_size": 16, "num_patches": 256}),
    (64, 4),
    photos.HALF,
)
#: BLIP-2's Q-Former on the 257 tokens of EVA-g: 32 queries, cross-attention in every second of its layers.
QFORMER_CONFIG = {"encoder_hidden_size": 1408, "use_qformer_text_input": False}
QFORMER_LAYERS, QUERIES = 12, 32


def qformer(device: torch.device, dtype: torch.dtype, **config: Any) -> torch.nn.Module:
    """transformers' Q-Former with seeded random weights, in evaluation mode; ``config``: what differs from the published one."""
    return build(("blip_2", "Blip2QFormerModel"), ("Blip2QFormerConfig", {**QFORMER_CONFIG, **config}), device, dtype)


def build(
    model: tuple[str, str],
    config: tuple[str, dict[str, Any]],
    device: torch.device,
    dtype: torch.dtype,
    attention: str | None = "eager",
) -> torch.nn.Module:
    """A model of transformers with seeded random weights, in evaluation mode; ``attention`` None is transformers' default.

    With ``("timm", class)`` it is one of timm's VisionTransformers, whose features are returned as transformers returns them.
    """
    _hide_broken_torchvision()
    need("transformers")
    make = _of_timm(model[1], config[1]) if model[0] == "timm" else _of_transformers(model, config, attention)
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.device(device):
        torch.manual_seed(SEED)
        module = make()
    return module.to(device=device, dtype=dtype).eval()


def _of_transformers(
    model: tuple[str, str], config: tuple[str, dict[str, Any]], attention: str | None
) -> Callable[[], torch.nn.Module]:
    modeling = importlib.import_module(f"transformers.models.{model[0]}.modeling_{model[0]}")
    configuration = importlib.import_module(f"transformers.models.{model[0]}.configuration_{model[0]}")
    return lambda: getattr(modeling, model[1])(getattr(configuration, config[0])(**config[1], attn_implementation=attention))


def _of_timm(name: str, sizes: dict[str, Any]) -> Callable[[], torch.nn.Module]:
    from transformers.modeling_outputs import BaseModelOutput

    try:
        vision_transformer = importlib.import_module("timm.models.vision_transformer")
    except (ImportError, RuntimeError) as error:  # not installed, or beside a torchvision for another torch
        raise Unavailable(f"timm does not import: {error}") from error

    class Features(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = SimpleNamespace(image_size=sizes["img_size"])
            self.tower = getattr(vision_transformer, name)(num_classes=0, **sizes)

        def forward(self, pixel_values: torch.Tensor) -> Any:
            return BaseModelOutput(last_hidden_state=self.tower.forward_features(pixel_values))

    return Features


def _hide_broken_torchvision() -> None:
    """Make transformers do without a torchvision that was built for another torch: no model here uses it."""
    try:
        importlib.import_module("torchvision")
    except ModuleNotFoundError:
        pass
    except (ImportError, OSError, RuntimeError):
        for name in [name for name in sys.modules if name.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        sys.modules["torchvision"] = None  # type: ignore[assignment]  # find_spec then finds none


@dataclass(frozen=True)
class AttentionCall:
    """One call of a transformers attention function: its module and what it got, q, k, v being ``[B, H, S, D]`` views."""

    module: torch.nn.Module
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    scale: float

    def run(self, function: Callable[..., Any], q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        """Call a transformers attention function on other tensors; ``[B, S, H, D]``."""
        out: torch.Tensor = function(self.module, q, k, v, None, scaling=self.scale, dropout=0.0)[0]
        return out

    def eager(self) -> Callable[..., Any]:
        """The attention function of the model's own file."""
        function: Callable[..., Any] = importlib.import_module(type(self.module).__module__).eager_attention_forward
        return function

    def sdpa(self) -> Callable[..., Any]:
        """The attention function of ``attn_implementation="sdpa"``, the default."""
        function: Callable[..., Any] = importlib.import_module("transformers.modeling_utils").ALL_ATTENTION_FUNCTIONS["sdpa"]
        return function


@contextmanager
def _recorded(*modules: Any) -> Iterator[list[AttentionCall]]:
    """Record the attention calls of transformers modules through the interface for attention functions."""
    interface = importlib.import_module("transformers").AttentionInterface
    calls: list[AttentionCall] = []

    def record(
        module: Any, q: Any, k: Any, v: Any, attention_mask: Any = None, scaling: float | None = None, **_: Any
    ) -> tuple[Any, None]:
        calls.append(AttentionCall(module, q, k, v, q.shape[-1] ** -0.5 if scaling is None else scaling))
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=attention_mask, scale=scaling)
        return out.transpose(1, 2).contiguous(), None

    interface.register("vlmkernels_record", record)
    for module in modules:
        module.config._attn_implementation = "vlmkernels_record"
    try:
        yield calls
    finally:
        for module in modules:
            module.config._attn_implementation = "eager"
    if not calls:
        raise Unavailable("this version of transformers does not call its attention through AttentionInterface")


@torch.no_grad()
def self_attention(tower: Tower, device: torch.device, dtype: torch.dtype) -> AttentionCall:
    """The first attention of a tower on a batch of photos."""
    module = tower.build(device, dtype)
    with _recorded(module) as calls:
        module(photos.normalized(tower.images(device), tower.statistics, dtype))
    return calls[0]


@torch.no_grad()
def qformer_cross_attention(device: torch.device, dtype: torch.dtype) -> AttentionCall:
    """The first cross-attention of the Q-Former, on what EVA-g makes of a batch of photos."""
    vision = EVA_G.build(device, dtype)
    former = qformer(device, dtype, num_hidden_layers=1)
    image_tokens = vision(photos.normalized(EVA_G.images(device), EVA_G.statistics, dtype)).last_hidden_state
    generator = torch.Generator().manual_seed(SEED)
    queries = (torch.randn(1, QUERIES, 768, generator=generator) * 0.02).to(device, dtype)
    with _recorded(former) as calls:
        former(query_embeds=queries.expand(len(image_tokens), -1, -1), encoder_hidden_states=image_tokens)
    for call in calls:
        if call.k.shape[2] == image_tokens.shape[1]:
            return call
    raise Unavailable("this version of transformers has no Q-Former cross-attention that goes through AttentionInterface")

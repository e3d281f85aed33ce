# SPDX-License-Identifier: Apache-2.0
"""The patch embeddings of the towers, and what a user would run instead of ours: transformers, timm, unfold and linear."""

import copy
import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from vlmkernels.bench import Unavailable, photos
from vlmkernels.bench.peers import Provider
from vlmkernels.bench.towers import Tower

#: From the pixels, or rows, to the tokens.
Form = Callable[[torch.Tensor], torch.Tensor]
#: A peer: its name, what sets it up, and whether it is worth compiling too.
Peer = tuple[str, Callable[[], Form], bool]


@dataclass(frozen=True)
class Embedding:
    """The patch embedding of a tower: transformers' own module, and its parameters for those who write it differently.

    Args:
        model: the tower.
        forward: its embedding, up to its first layer.
        parameters: as the tower has them, those that there are of weight, bias, class_token, positions, norm_weight, norm_bias.
        eps: of the norm.
    """

    model: torch.nn.Module
    forward: Form
    patch: int
    parameters: dict[str, torch.Tensor]
    eps: float


def _parts(model: torch.nn.Module) -> tuple[torch.nn.Module, Any, Form]:
    """The module of a tower that embeds, the norm behind it or None, and both in a row."""
    inner = next(m for m in model.modules() if type(m).__name__.endswith(("VisionEmbeddings", "ViTEmbeddings")))
    norm = next((m for name, m in model.named_modules() if name.endswith("pre_layrnorm")), None)
    return inner, norm, inner if norm is None else lambda x: norm(inner(x))


def embedding(tower: Tower, device: torch.device, dtype: torch.dtype) -> Embedding:
    """A tower's patch embedding up to the first layer: class token, positions and CLIP's norm included."""
    model = tower.build(device, dtype).requires_grad_(False)
    inner, norm, forward = _parts(model)
    conv = next(m for m in inner.modules() if isinstance(m, torch.nn.Conv2d))
    named = dict(inner.named_parameters())
    parameters = {
        "weight": conv.weight,
        "bias": conv.bias,
        "class_token": named.get("cls_token", named.get("class_embedding")),
        "positions": next(value for name, value in named.items() if name.startswith("position_embedding")),
        "norm_weight": None if norm is None else norm.weight,
        "norm_bias": None if norm is None else norm.bias,
    }
    return Embedding(
        model,
        forward,
        patch=tower.settings("patch_size"),
        parameters={name: value for name, value in parameters.items() if value is not None},
        eps=0.0 if norm is None else norm.eps,
    )


def finished(e: Embedding, tokens: torch.Tensor) -> torch.Tensor:
    """What follows the projection, as models write it: class token, positions, norm."""
    p, (batch, _, width) = e.parameters, tokens.shape
    if "class_token" in p:
        tokens = torch.cat([p["class_token"].reshape(1, 1, width).expand(batch, -1, -1), tokens], 1)
    tokens = tokens + p["positions"].reshape(1, -1, width)
    if "norm_weight" not in p:
        return tokens
    return F.layer_norm(tokens, (width,), p["norm_weight"], p["norm_bias"], e.eps)


def unfold_linear(e: Embedding, pixels: torch.Tensor) -> torch.Tensor:
    """A permutation and a linear layer: what those who avoid the convolution write."""
    size = e.patch
    batch, channels, height, width = pixels.shape
    rows, columns = height // size, width // size
    patches = pixels[:, :, : rows * size, : columns * size].reshape(batch, channels, rows, size, columns, size)
    patches = patches.permute(0, 2, 4, 1, 3, 5).reshape(batch, rows * columns, channels * size * size)
    return finished(e, F.linear(patches, e.parameters["weight"].flatten(1), e.parameters.get("bias")))


def timm_embedding(e: Embedding) -> Form:
    """timm's ``PatchEmbed`` with the parameters of the tower, and what follows it in timm's ``VisionTransformer``."""
    try:
        layers = importlib.import_module("timm.layers")
    except Exception as error:  # beside a torchvision that is missing or was built for another torch it fails in many ways
        raise Unavailable(f"timm does not import: {error}") from error
    weight, bias = e.parameters["weight"], e.parameters.get("bias")
    width, channels = weight.shape[:2]
    module = layers.PatchEmbed(None, e.patch, channels, width, bias=bias is not None, device=weight.device, dtype=weight.dtype)
    module.proj.weight, module.proj.bias = weight, bias
    return lambda x: finished(e, module(x))


def fused_model(model: Any) -> Any:
    """A tower as transformers loads it with ``fusion_config={"patch_embeddings": True}``: the same weights.

    Raises:
        Unavailable: this transformers has no such option, or it changes nothing in this tower.
    """
    try:
        fusion = importlib.import_module("transformers.fusion_mapping")
        patching = importlib.import_module("transformers.monkey_patching")
    except ModuleNotFoundError as error:
        raise Unavailable(f"this version of transformers has no fusion_config: {error}") from error
    importlib.import_module("transformers.utils.logging").disable_progress_bar()
    settings, config = {"patch_embeddings": True}, copy.deepcopy(model.config)
    try:
        # A tower without anything to fuse is not worth loading.
        if hasattr(model, "from_pretrained"):
            fusion.register_fusion_patches(type(model), config, settings)
        if not patching.get_patch_mapping():
            raise Unavailable("fusion_config changes nothing here: it is for a Conv3d in patch_embed")
        state = {name: value.cpu() for name, value in model.state_dict().items()}
        fused = type(model).from_pretrained(None, config=config, state_dict=state, fusion_config=settings)
    except ValueError as error:  # 5.17 refuses towers whose weights it renames, some only when they are loaded
        raise Unavailable(f"fusion_config is refused: {error}") from error
    finally:
        patching.clear_patch_mapping()  # else it is applied to whatever is loaded next, by a part of the class name
    parameter = next(model.parameters())
    return fused.to(device=parameter.device, dtype=parameter.dtype).eval()


def patch_embed_peers(e: Embedding, pixels: torch.Tensor, statistics: photos.Statistics) -> list[Peer]:
    """transformers' own module, the same after its load-time fusion, timm's, and unfold + linear; uint8 is normalised first."""
    normalize = photos.normalizer(statistics, pixels.device, e.parameters["weight"].dtype)

    def prepared(form: Form) -> Form:
        return (lambda x: form(normalize(x))) if pixels.dtype == torch.uint8 else form

    return [
        ("hf conv", lambda: prepared(e.forward), True),
        ("hf fused", lambda: prepared(_parts(fused_model(e.model))[2]), False),
        ("timm conv", lambda: prepared(timm_embedding(e)), True),
        ("unfold+linear", lambda: prepared(lambda x: unfold_linear(e, x)), True),
    ]


def providers(peers: Sequence[Peer], timed: Callable[[Form], Callable[[], Any]], on_gpu: bool) -> tuple[Provider, ...]:
    """Each peer eager and, on a GPU, compiled. ``timed`` makes the call that is timed from a peer's function."""
    eager = [Provider(name, lambda make=make: timed(make())) for name, make, _ in peers]  # type: ignore[misc]
    if not on_gpu:
        return tuple(eager)

    def compiled(make: Callable[[], Form]) -> Callable[[], Any]:
        return timed(torch.compile(make(), dynamic=False))

    return (
        *eager,
        *(
            Provider(f"{name} compiled", lambda make=make: compiled(make), compiled=True)  # type: ignore[misc]
            for name, make, worthwhile in peers
            if worthwhile
        ),
    )

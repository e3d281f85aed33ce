# SPDX-License-Identifier: Apache-2.0
"""The attention of a model's other layers: its attention implementation is changed where it is one that works like ours."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from vlmkernels.integrations import register_attention
from vlmkernels.integrations._swap import Swapped

#: Families of transformers, by the folder of their code, with which ``attn_implementation="vlmkernels"`` is tested.
FAMILIES = {
    *("clip", "siglip", "siglip2", "vit"),
    *("blip_2", "git", "idefics", "instructblip", "kosmos2", "llava", "llava_next", "mllama"),
    *("gemma3", "paligemma", "qwen2_5_vl", "qwen2_vl", "qwen3_vl"),
    *("bert", "gemma", "gemma2", "llama", "mistral", "opt", "qwen2", "qwen3"),
}
#: Towers that call attention for each image or window by itself unless the name of the implementation has "flash" in it; then
#: they read the length of the longest back. Where all layers are swapped neither is needed.
_PACKED = ("Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel", "Qwen3VLVisionModel")
#: What computes what ours does, without attention weights. Eager is asked for by name, or all that a model knows.
_ALIKE = ("vlmkernels", "vlmkernels_flash", "sdpa", "flex_attention", *(f"flash_attention_{i}" for i in (2, 3, 4)))
_BEFORE = "_vlmkernels_implementation"


def join(model: nn.Module) -> dict[nn.Module, str]:
    """Give the models of transformers inside ``model`` our attention; of each why it keeps its own, empty where it doesn't.

    A model and those inside it hand each other their masks, and all of them are given ours or none; but for vision towers, which
    make their own.
    """
    found: dict[nn.Module, str] = {}
    missing = _why_not_registered()
    for group in _groups(model):
        reasons = {part: missing or _why_not(part) or "" for part in group}
        if any(reasons.values()):
            handed = "a model that gets its masks, or gives it them, keeps its own"
            reasons = {part: reason or handed for part, reason in reasons.items()}
        found |= reasons
    ours: list[Any] = [part for part, reason in found.items() if not reason]
    for part in ours:  # before any is changed, as they share configurations
        vars(part).setdefault(_BEFORE, part.config._attn_implementation)
    for part in ours:
        packed = type(part).__name__ in _PACKED and not all(isinstance(block.attn, Swapped) for block in part.blocks)
        part.config._attn_implementation_internal = "vlmkernels_flash" if packed else "vlmkernels"
    return found


def leave(model: nn.Module) -> None:
    """Give back what ``join`` changed."""
    for layer in _joined(model):
        layer.config._attn_implementation_internal = vars(layer).pop(_BEFORE)


@contextmanager
def apart(model: nn.Module) -> Iterator[None]:
    """Everything in ``model`` has the attention that it had before, meanwhile."""
    configs = [(layer.config, layer.config._attn_implementation, vars(layer)[_BEFORE]) for layer in _joined(model)]
    try:
        for config, _, before in configs:
            config._attn_implementation_internal = before
        yield
    finally:
        for config, ours, _ in configs:
            config._attn_implementation_internal = ours


def _joined(model: nn.Module) -> list[Any]:
    return [layer for layer in model.modules() if _BEFORE in vars(layer)]


def _groups(model: nn.Module) -> list[list[Any]]:
    """The models of transformers inside ``model``, those together that may hand on masks, in the order of ``modules()``."""
    groups: list[list[Any]] = []

    def visit(layer: nn.Module, group: list[Any] | None) -> None:
        if hasattr(type(layer), "_can_set_attn_implementation"):  # of the class: peft's models hand on what they are asked for
            if group is None or layer.main_input_name == "pixel_values":
                group = []
                groups.append(group)
            group.append(layer)
        for child in layer.children():
            visit(child, group)

    visit(model, None)
    return groups


def _why_not(model: Any) -> str | None:
    kind = type(model)
    if kind.__module__.startswith("torch.distributed"):  # fully_shard gives what it shards a subclass of its own
        kind = kind.__bases__[-1]
    package = kind.__module__.split(".")
    if package[:2] != ["transformers", "models"] or package[2] not in FAMILIES:
        return "its family is not tested with ours"
    if not model._can_set_attn_implementation():
        return "it has no other attention than its own"
    present = model.config._attn_implementation
    if present in _ALIKE or (present == "eager" and _only_eager(model, package[2])):
        return None
    return f"its attention is {present}"


def _only_eager(model: nn.Module, family: str) -> bool:
    """Whether eager was nobody's wish: Gemma 2's softcap is not in sdpa; GIT's layers know nothing else, and ours are there."""
    if family == "gemma2":
        return True
    layers = [layer for layer in model.modules() if any(base.__name__ == "GitSelfAttention" for base in type(layer).__mro__)]
    return family == "git" and bool(layers) and all(isinstance(layer, Swapped) for layer in layers)


def _why_not_registered() -> str | None:
    try:
        register_attention()
    except ImportError as error:
        return str(error)
    return None

# SPDX-License-Identifier: Apache-2.0
"""Models of transformers, and one of timm, of the published widths with random weights and fewer layers, before and after
``accelerate``.

Ours is the accelerated model, as it is and compiled, of which the faster counts; its peers are the same model before, as it is
and compiled. How many floors a model of so many layers is off says little about a kernel: here ours is right where its error
against fp32 is at most 1.1 times that of the model before, both in bf16.
"""

import copy
import dataclasses
import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.flop_counter import FlopCounterMode

from vlmkernels import accelerate
from vlmkernels.bench import photos, towers
from vlmkernels.bench.peers import Provider
from vlmkernels.bench.workloads import OURS, Case, num_bytes, work_dtype
from vlmkernels.integrations.accelerate import Replaced, Report
from vlmkernels.ops._op import bad_argument
from vlmkernels.testing import Comparison
from vlmkernels.testing.compare import FP32_BOUNDS

#: Our error over that of the model before.
MOST = 1.1
#: The layers of a tower whose weights' gradients are compared.
LEARNT = ("patch_embedding", "q_proj")
#: What a model is called with.
Inputs = dict[str, Any]
Maker = Callable[[Any, torch.device, torch.dtype, int], Inputs]


@dataclass(frozen=True)
class Model:
    """A published model, or a part of one.

    Args:
        model: the module in ``transformers.models`` (or ``"timm"``) and the name of the model class.
        config: the name of the configuration class and what differs from its defaults; of timm what the class is called with.
        inputs: makes what it is called with of its configuration, the device, the dtype and the batch.
        batch: entries of the batch; 1 for what is packed.
    """

    name: str
    model: tuple[str, str]
    config: tuple[str, dict[str, Any]]
    inputs: Maker
    batch: int = 1


@dataclass(frozen=True)
class ModelCase(Case):
    """A case whose bound follows from the error of its first peer, the model before; in fp32 that of the rule stays."""

    @functools.cached_property
    def _bounds(self) -> tuple[float, ...]:
        return tuple(MOST * found.ratio for found in super().check(self.peers[0].prepare()()))

    def check(self, result: Any) -> tuple[Comparison, ...]:
        if self.dtype == torch.float32:  # the exact result is its own
            return super().check(result)
        found = zip(super().check(result), self._bounds, strict=True)
        return tuple(dataclasses.replace(one, bound=bound) for one, bound in found)


def build(model: Model, batch: int = 0, clock: str = "queue", training: bool = False) -> Callable[[torch.device], Case]:
    """A builder for ``model`` before and after ``accelerate``; the first and the last entry of the batch are checked.

    With ``training`` the work is a forward pass and the gradients of all parameters. Of these the patch embedding's weight, which
    all layers have a part in, is checked, and the first layer's projection of queries, which only its scores do.
    """

    def make(device: torch.device) -> Case:
        return _case(dataclasses.replace(model, batch=batch or model.batch), device, clock, training)

    return make


def _case(model: Model, device: torch.device, clock: str, training: bool) -> Case:
    dtype = work_dtype(device)
    before: Any = towers.build(model.model, model.config, device, dtype, attention=None).requires_grad_(training)
    after = copy.deepcopy(before)
    accelerate(after)
    inputs = model.inputs(before.config, device, dtype, model.batch)
    library = "timm" if model.model[0] == "timm" else "hf"
    few = model.batch > 1 and not training  # entries that are checked
    ends = slice(0, model.batch, max(1, model.batch - 1))

    def call(module: torch.nn.Module, compiled: bool) -> Callable[[], Any]:
        run: Callable[..., Any] = torch.compile(module, dynamic=False) if compiled else module
        return _step(run, module, inputs) if training else lambda: run(**inputs).last_hidden_state

    def of_ends(value: Any) -> Any:
        if not isinstance(value, torch.Tensor):
            return value
        value = value[ends] if few else value
        return value.float() if value.is_floating_point() else value

    def exact() -> tuple[torch.Tensor, ...]:
        wide, wide_inputs = copy.deepcopy(before).float(), {name: of_ends(value) for name, value in inputs.items()}
        results = _step(wide, wide, wide_inputs)() if training else (wide(**wide_inputs).last_hidden_state,)
        return tuple(result.double() for result in results)

    def compiled(name: str, module: torch.nn.Module) -> tuple[Provider, ...]:
        return (Provider(name, lambda: call(module, True), compiled=True),) if device.type == "cuda" else ()

    return ModelCase(
        ours=Provider(OURS, lambda: call(after, False)),
        also=compiled(f"{OURS} compiled", after),
        peers=(Provider(library, lambda: call(before, False)), *compiled(f"{library} compiled", before)),
        outputs=LEARNT if training else ("out",),
        exact=exact,
        part=lambda i, x: x[ends] if few else x,
        rule="model",
        flops=_flops(before, inputs) * (3 if training else 1),
        bytes=float(num_bytes(*before.parameters())),
        dtype=dtype,
        clock=clock,
    )


def _step(run: Callable[..., Any], module: torch.nn.Module, inputs: Inputs) -> Callable[[], tuple[torch.Tensor, ...]]:
    """A step of training without its optimiser: the same incoming gradient for every module."""
    names, parameters = zip(*module.named_parameters(), strict=True)
    checked = [next(i for i, name in enumerate(names) if f"{part}.weight" in name) for part in LEARNT]

    @functools.cache
    def incoming(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        return torch.sin(torch.arange(shape.numel(), device=device) % 1009).view(shape).to(dtype)

    @torch.enable_grad()
    def step() -> tuple[torch.Tensor, ...]:
        out = run(**inputs).last_hidden_state
        # Of a pooling head there is none.
        gradients = torch.autograd.grad(out, parameters, incoming(out.shape, out.dtype, out.device), allow_unused=True)
        return tuple(gradients[i] for i in checked)

    return step


def verified(name: str, device: torch.device) -> list[tuple[str, Report]]:
    """Title and report of each model of this name (``"blip2"`` is ``blip_2``), accelerated and compared layer by layer.

    Raises:
        ValueError: there is no such model.
    """
    chosen = [model for model in MODELS if _letters(model.model[0]) == _letters(name)]
    if not chosen:
        names = ", ".join(dict.fromkeys(model.model[0] for model in MODELS))
        raise bad_argument("model", repr(name), f"one of {names}")
    found = []
    for model in chosen:
        module: Any = towers.build(model.model, model.config, device, work_dtype(device), attention=None)
        inputs = model.inputs(module.config, device, work_dtype(device), min(model.batch, 2))
        found.append((f"{model.model[1]} ({model.name})", accelerate(module, verify=inputs)))
    return found


def over_bound(report: Report, device: torch.device) -> list[Replaced]:
    """The layers whose error is over 1.1 times the original's; in fp32, where both are rounding, also over 64 of its floors."""
    least = FP32_BOUNDS["module"] * 2**-24 if work_dtype(device) == torch.float32 else 0.0
    return [row for row in report.replaced if row.errors and not row.errors.ours <= max(MOST * row.errors.original, least)]


def _letters(name: str) -> str:
    return "".join(filter(str.isalnum, name.lower()))


def _attention_flops(q: torch.Size, k: torch.Size, v: torch.Size, *_: Any, **__: Any) -> int:
    """torch's own formula refuses fewer heads of keys than of queries."""
    batch, heads, queries, dim = q
    return 2 * batch * heads * queries * k[2] * (dim + v[3])


ATTENTION = ("flash", "efficient", "cudnn")


def _flops(model: torch.nn.Module, inputs: Inputs) -> float:
    """Of all products, with those of attention that a mask hides."""
    counted: dict[Any, Any] = {
        getattr(torch.ops.aten, f"_scaled_dot_product_{name}_attention"): _attention_flops for name in ATTENTION
    }
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=counted) as counter:
        model(**inputs)
    return float(counter.get_total_flops())


def _images(statistics: photos.Statistics) -> Maker:
    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        return {"pixel_values": photos.normalized(photos.batch(batch, config.image_size).to(device), statistics, dtype)}

    return make


def _patches(*grids: tuple[int, int, int]) -> Maker:
    """Rows of images (or frames) of so many rows and columns of patches."""

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        columns = config.in_channels * config.temporal_patch_size * config.patch_size**2
        rows = sum(frames * height * width for frames, height, width in grids)
        hidden = torch.randn(rows, columns, device=device, dtype=dtype)
        return {"hidden_states": hidden, "grid_thw": torch.tensor(grids, device=device)}

    return make


def _ids(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    return torch.randint(5, 50, (batch, tokens), device=device)


def _text(tokens: int) -> Maker:
    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        return {"input_ids": _ids(batch, tokens, device), "use_cache": False}

    return make


def _padded_text(tokens: int) -> Maker:
    """Each entry has between half of the tokens and all."""

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        lengths = [tokens, *(random.Random(i).randint(tokens // 2, tokens) for i in range(batch - 1))]
        real = torch.arange(tokens, device=device) < torch.tensor(lengths, device=device)[:, None]
        return {"input_ids": _ids(batch, tokens, device), "attention_mask": real.long()}

    return make


def _images_in_text(tokens: int, images: int, size: int) -> Maker:
    """Tokens of images that see each other both ways, between causal text. Their embeddings are those of text."""

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        types = torch.zeros(batch, tokens, dtype=torch.long, device=device)
        for first in range(32, tokens - size, tokens // images):
            types[:, first : first + size] = 1
        return {"input_ids": _ids(batch, tokens, device), "token_type_ids": types, "use_cache": False}

    return make


def _text_and_tiles(tokens: int, image_tokens: int) -> Maker:
    """Text, and the features of an image's tiles that its cross-attention reads."""

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        features = torch.randn(batch, image_tokens, config.hidden_size, device=device, dtype=dtype)
        # As MllamaModel makes them; without a mask sdpa takes the cross-attention for a causal one.
        mask = torch.zeros(batch, 1, tokens, image_tokens, device=device, dtype=dtype)
        rows = torch.ones(batch, 1, tokens, 1, device=device, dtype=dtype)
        masks = {"cross_attention_mask": mask, "full_text_row_masked_out_mask": rows}
        return {**_text(tokens)(config, device, dtype, batch), "cross_attention_states": features, **masks}

    return make


def _captions(tokens: int) -> Maker:
    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        pixels = _images(photos.CLIP)(config.vision_config, device, dtype, batch)
        return {**pixels, "input_ids": _ids(batch, tokens, device), "use_cache": False}

    return make


def _vision(hidden: int, mlp: int, resolution: int, patch: int, layers: int = 8) -> dict[str, Any]:
    return {**towers.vit_config(hidden, 16, mlp, resolution, patch), "num_hidden_layers": layers}


#: Four photos of different sizes, 11,220 patches.
PHOTOS = _patches((1, 64, 44), (1, 52, 52), (1, 60, 50), (1, 54, 50))
LLAMA = {"hidden_size": 4096, "num_attention_heads": 32, "vocab_size": 32064, "pad_token_id": 0}
GEMMA3 = {"hidden_size": 2560, "intermediate_size": 10240, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256}
GEMMA3 |= {"num_hidden_layers": 6, "sliding_window": 1024, "vocab_size": 32064, "query_pre_attn_scalar": 256}
MLLAMA = {
    **LLAMA,
    "intermediate_size": 14336,
    "num_key_value_heads": 8,
    "num_hidden_layers": 5,
    "cross_attention_layers": [3],
}
HALF, CLIP = _images(photos.HALF), _images(photos.CLIP)
VIT_L, SO400M = _vision(1024, 4096, 224, 16), _vision(1152, 4304, 384, 14)
QWEN2_5_CONFIG = {"depth": 8, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
QWEN3 = {"depth": 8, "deepstack_visual_indexes": [2, 4, 6]}
QWEN2, QWEN2_5 = "Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel"
TOWERS = (
    Model("ViT-L/16@224, 8 layers, B128", ("vit", "ViTModel"), ("ViTConfig", VIT_L), HALF, 128),
    Model(
        "CLIP-L/14@336, 8 layers, B32", ("clip", "CLIPVisionModel"), ("CLIPVisionConfig", _vision(1024, 4096, 336, 14)),
        CLIP, 32,
    ),
    Model("SigLIP-So400m/14@384, 8 layers, B32", ("siglip", "SiglipVisionModel"), ("SiglipVisionConfig", SO400M), HALF, 32),
    Model(
        "EVA-g/14@224, 8 layers, B64", ("blip_2", "Blip2VisionModel"), ("Blip2VisionConfig", _vision(1408, 6144, 224, 14)),
        CLIP, 64,
    ),
)  # fmt: skip
TRAINED = TOWERS[1:3]
TIMM_VIT_L = {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 8, "num_heads": 16}
MODELS = (
    *TOWERS,
    Model("ViT-L/16@224 of timm, 8 layers, B128", ("timm", "VisionTransformer"), ("", TIMM_VIT_L), HALF, 128),
    Model("Qwen2-VL tower, 8 layers", ("qwen2_vl", QWEN2), ("Qwen2VLVisionConfig", {"depth": 8}), PHOTOS),
    Model("Qwen2.5-VL tower, 8 layers", ("qwen2_5_vl", QWEN2_5), ("Qwen2_5_VLVisionConfig", QWEN2_5_CONFIG), PHOTOS),
    Model("Qwen3-VL tower, 8 layers", ("qwen3_vl", "Qwen3VLVisionModel"), ("Qwen3VLVisionConfig", QWEN3), PHOTOS),
    Model(
        "Gemma-3 4B, 6 layers, 4096 tokens, 8 images", ("gemma3", "Gemma3Model"),
        ("Gemma3Config", {"text_config": GEMMA3, "vision_config": _vision(1152, 4304, 896, 14, 1)}),
        _images_in_text(4096, 8, 256),
    ),
    Model(
        "LLaVA-1.5 text, 4 layers, 8x1024", ("llama", "LlamaModel"),
        ("LlamaConfig", {**LLAMA, "intermediate_size": 11008, "num_hidden_layers": 4}), _text(1024), 8,
    ),
    Model(
        "Llama-3.2-Vision text, 5 layers, 2x2048x6404", ("mllama", "MllamaTextModel"), ("MllamaTextConfig", MLLAMA),
        _text_and_tiles(2048, 6404), 2,
    ),
    Model("GIT-base B64", ("git", "GitModel"), ("GitConfig", {}), _captions(16), 64),
    Model("BERT-base B64 S256 padded", ("bert", "BertModel"), ("BertConfig", {}), _padded_text(256), 64),
)  # fmt: skip

# SPDX-License-Identifier: Apache-2.0
"""The models that are measured whole: transformers' own, and one of timm's, of the published widths with random weights and fewer
layers, and what they are called with."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from vlmkernels.bench import photos, towers

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
        mend: puts right what some version of transformers gets wrong in it.
    """

    name: str
    model: tuple[str, str]
    config: tuple[str, dict[str, Any]]
    inputs: Maker
    batch: int = 1
    mend: Callable[[Any], None] | None = None

    def build(self, device: torch.device, dtype: torch.dtype) -> Any:
        """The module with seeded random weights, in evaluation mode, with its library's own choice of attention."""
        module = towers.build(self.model, self.config, device, dtype, attention=None)
        if self.mend is not None:
            self.mend(module)
        return module


def images(statistics: photos.Statistics) -> Maker:
    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        return {"pixel_values": photos.normalized(photos.batch(batch, config.image_size).to(device), statistics, dtype)}

    return make


def patches(*grids: tuple[int, int, int]) -> Maker:
    """Rows of images (or frames) of so many rows and columns of patches."""

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        columns = config.in_channels * config.temporal_patch_size * config.patch_size**2
        rows = sum(frames * height * width for frames, height, width in grids)
        hidden = torch.randn(rows, columns, device=device, dtype=dtype)
        return {"hidden_states": hidden, "grid_thw": torch.tensor(grids, device=device)}

    return make


def ids(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    return torch.randint(5, 50, (batch, tokens), device=device)


def text(tokens: int) -> Maker:
    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        return {"input_ids": ids(batch, tokens, device), "use_cache": False}

    return make


def padded_text(tokens: int) -> Maker:
    """Each entry has between half of the tokens and all."""

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        lengths = [tokens, *(random.Random(i).randint(tokens // 2, tokens) for i in range(batch - 1))]
        real = torch.arange(tokens, device=device) < torch.tensor(lengths, device=device)[:, None]
        return {"input_ids": ids(batch, tokens, device), "attention_mask": real.long()}

    return make


def images_in_text(tokens: int, count: int, size: int) -> Maker:
    """Tokens of images that see each other both ways, between causal text. Their embeddings are those of text."""

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        types = torch.zeros(batch, tokens, dtype=torch.long, device=device)
        for first in range(32, tokens - size, tokens // count):
            types[:, first : first + size] = 1
        return {**text(tokens)(config, device, dtype, batch), "token_type_ids": types}

    return make


def text_and_tiles(tokens: int, image_tokens: int) -> Maker:
    """Text, and the features of an image's tiles that its cross-attention reads."""

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        features = torch.randn(batch, image_tokens, config.hidden_size, device=device, dtype=dtype)
        # As MllamaModel makes them; without a mask sdpa takes the cross-attention for a causal one.
        mask = torch.zeros(batch, 1, tokens, image_tokens, device=device, dtype=dtype)
        rows = torch.ones(batch, 1, tokens, 1, device=device, dtype=dtype)
        masks = {"cross_attention_mask": mask, "full_text_row_masked_out_mask": rows}
        return {**text(tokens)(config, device, dtype, batch), "cross_attention_states": features, **masks}

    return make


def captions(tokens: int) -> Maker:
    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        pixels = images(photos.CLIP)(config.vision_config, device, dtype, batch)
        return {**pixels, **text(tokens)(config, device, dtype, batch)}

    return make


def naflex(*grids: tuple[int, int]) -> Maker:
    """Images of so many rows and columns of patches in turn, padded to the longest."""

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        shapes = torch.tensor([grids[i % len(grids)] for i in range(batch)], device=device)
        longest = max(height * width for height, width in grids)
        rows = torch.randn(batch, longest, config.num_channels * config.patch_size**2, device=device, dtype=dtype)
        real = (torch.arange(longest, device=device) < shapes.prod(1, keepdim=True)).int()
        return {"pixel_values": rows, "pixel_attention_mask": real, "spatial_shapes": shapes}

    return make


#: What stands for a token of an image.
IMAGE_TOKEN = 60


def prompts(image_tokens: int, text_tokens: int, statistics: photos.Statistics, suffix: int = 0) -> Maker:
    """An image and then text, of which so many tokens are the causal suffix of PaliGemma's training.

    Without one sdpa gets no mask there, which transformers 5.24 then takes for a causal one, where eager attention sees all.
    """

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        image = torch.full((batch, image_tokens), IMAGE_TOKEN, device=device)
        tokens = torch.cat((image, ids(batch, text_tokens, device)), dim=1)
        pixels = images(statistics)(config.vision_config, device, dtype, batch)
        inputs = {**pixels, "input_ids": tokens, "attention_mask": torch.ones_like(tokens), "use_cache": False}
        if suffix:
            behind = torch.arange(tokens.shape[1], device=device) >= tokens.shape[1] - suffix
            inputs["token_type_ids"] = behind.long().expand(batch, -1)
        return inputs

    return make


def image_in_front(latents: int, tokens: int) -> Maker:
    """Kosmos-2's: so many tokens behind the first take what its resampler makes of the image."""

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        where = torch.zeros(batch, tokens, dtype=torch.long, device=device)
        where[:, 1 : 1 + latents] = 1
        inputs = images(photos.CLIP)(config.vision_config, device, dtype, batch)
        return {**inputs, **text(tokens)(config, device, dtype, batch), "image_embeds_position_mask": where}

    return make


def see_whole_image(model: Any) -> None:
    """Kosmos-2's resampler, whose missing mask transformers 5.17 takes for a causal one with sdpa."""
    model.image_to_text_projection.x_attn.is_causal = False


def images_beside_text(tokens: int) -> Maker:
    """IDEFICS': text that reads an image from its tenth token on."""

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        seen = torch.ones(batch, tokens, 1, dtype=torch.long, device=device)
        seen[:, :10] = 0
        pixels = images(photos.CLIP)(config.vision_config, device, dtype, batch)["pixel_values"][:, None]
        inputs = text(tokens)(config, device, dtype, batch)
        real = torch.ones_like(inputs["input_ids"])
        return {**inputs, "attention_mask": real, "pixel_values": pixels, "image_attention_mask": seen}

    return make


def queries_and_text(queries: int, tokens: int, image_tokens: int) -> Maker:
    """InstructBLIP's Q-Former: learned queries with the text of an instruction, and an image's tokens."""

    def make(config: Any, device: torch.device, dtype: torch.dtype, batch: int) -> Inputs:
        embeds = torch.randn(batch, queries, config.hidden_size, device=device, dtype=dtype) * 0.02
        seen = torch.randn(batch, image_tokens, config.encoder_hidden_size, device=device, dtype=dtype)
        real = torch.ones(batch, queries + tokens, dtype=torch.long, device=device)
        return {
            "input_ids": ids(batch, tokens, device),
            "attention_mask": real,
            "query_embeds": embeds,
            "encoder_hidden_states": seen,
        }

    return make


def vision(hidden: int, mlp: int, resolution: int, patch: int, layers: int = 8) -> dict[str, Any]:
    return {**towers.vit_config(hidden, 16, mlp, resolution, patch), "num_hidden_layers": layers}


#: Four photos of different sizes, 11,220 patches.
PHOTOS = patches((1, 64, 44), (1, 52, 52), (1, 60, 50), (1, 54, 50))
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
HALF, CLIP = images(photos.HALF), images(photos.CLIP)
VIT_L, SO400M = vision(1024, 4096, 224, 16), vision(1152, 4304, 384, 14)
QWEN2_5_CONFIG = {"depth": 8, "hidden_size": 1280, "intermediate_size": 3420, "out_hidden_size": 3584}
QWEN3 = {"depth": 8, "deepstack_visual_indexes": [2, 4, 6]}
QWEN2, QWEN2_5 = "Qwen2VisionTransformerPretrainedModel", "Qwen2_5_VisionTransformerPretrainedModel"
TOWERS = (
    Model("ViT-L/16@224, 8 layers, B128", ("vit", "ViTModel"), ("ViTConfig", VIT_L), HALF, 128),
    Model(
        "CLIP-L/14@336, 8 layers, B32", ("clip", "CLIPVisionModel"), ("CLIPVisionConfig", vision(1024, 4096, 336, 14)),
        CLIP, 32,
    ),
    Model("SigLIP-So400m/14@384, 8 layers, B32", ("siglip", "SiglipVisionModel"), ("SiglipVisionConfig", SO400M), HALF, 32),
    Model(
        "EVA-g/14@224, 8 layers, B64", ("blip_2", "Blip2VisionModel"), ("Blip2VisionConfig", vision(1408, 6144, 224, 14)),
        CLIP, 64,
    ),
)  # fmt: skip
TRAINED = TOWERS[1:3]
GEMMA: dict[str, Any] = {
    "hidden_size": 2048,
    "intermediate_size": 16384,
    "num_attention_heads": 8,
    "num_key_value_heads": 1,
    "head_dim": 256,
}
GEMMA |= {"num_hidden_layers": 4, "vocab_size": 32064, "model_type": "gemma"}
GEMMA2 = {**GEMMA, "hidden_size": 2304, "intermediate_size": 9216, "num_key_value_heads": 4, "model_type": "gemma2"}
SO400M_224: dict[str, Any] = {**vision(1152, 4304, 224, 14, 4), "projection_dim": 2048, "model_type": "siglip_vision_model"}
OPT = {"hidden_size": 2560, "ffn_dim": 10240, "num_attention_heads": 32, "word_embed_proj_dim": 2560, "num_hidden_layers": 4}
QWEN2_TEXT = {"hidden_size": 3584, "intermediate_size": 18944, "num_attention_heads": 28, "num_key_value_heads": 4}
QWEN2_TEXT |= {"num_hidden_layers": 4, "vocab_size": 32064}
MROPE = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
KOSMOS_TEXT = {"embed_dim": 2048, "ffn_dim": 8192, "attention_heads": 32, "layers": 4, "vocab_size": 32064}
IDEFICS_VISION = {"embed_dim": 1280, "image_size": 224, "patch_size": 14, "intermediate_size": 5120, "num_attention_heads": 16}
IDEFICS_RESAMPLER: dict[str, Any] = {
    "use_resampler": True,
    "resampler_n_latents": 64,
    "resampler_depth": 6,
    "resampler_n_heads": 16,
}
IDEFICS_RESAMPLER |= {"resampler_head_dim": 96, "qk_layer_norms_perceiver": True}
IDEFICS: dict[str, Any] = {
    **LLAMA,
    "intermediate_size": 11008,
    "num_hidden_layers": 4,
    "vocab_size": 32000,
    "additional_vocab_size": 2,
}
IDEFICS |= {"use_resampler": True, "alpha_type": "vector", "vision_config": {**IDEFICS_VISION, "num_hidden_layers": 4}}
QFORMER = Model(
    "InstructBLIP Q-Former, 64 images, 32+32 x 257",
    ("instructblip", "InstructBlipQFormerModel"),
    ("InstructBlipQFormerConfig", {"encoder_hidden_size": 1408}),
    queries_and_text(32, 32, 257),
    64,
)
TIMM_VIT_L = {"img_size": 224, "patch_size": 16, "embed_dim": 1024, "depth": 8, "num_heads": 16}
MODELS = (
    *TOWERS,
    Model("ViT-L/16@224 of timm, 8 layers, B128", ("timm", "VisionTransformer"), ("", TIMM_VIT_L), HALF, 128),
    Model("Qwen2-VL tower, 8 layers", ("qwen2_vl", QWEN2), ("Qwen2VLVisionConfig", {"depth": 8}), PHOTOS),
    Model("Qwen2.5-VL tower, 8 layers", ("qwen2_5_vl", QWEN2_5), ("Qwen2_5_VLVisionConfig", QWEN2_5_CONFIG), PHOTOS),
    Model("Qwen3-VL tower, 8 layers", ("qwen3_vl", "Qwen3VLVisionModel"), ("Qwen3VLVisionConfig", QWEN3), PHOTOS),
    Model(
        "Gemma-3 4B, 6 layers, 4096 tokens, 8 images", ("gemma3", "Gemma3Model"),
        ("Gemma3Config", {"text_config": GEMMA3, "vision_config": vision(1152, 4304, 896, 14, 1)}),
        images_in_text(4096, 8, 256),
    ),
    Model(
        "LLaVA-1.5 text, 4 layers, 8x1024", ("llama", "LlamaModel"),
        ("LlamaConfig", {**LLAMA, "intermediate_size": 11008, "num_hidden_layers": 4}), text(1024), 8,
    ),
    Model(
        "Llama-3.2-Vision text, 5 layers, 2x2048x6404", ("mllama", "MllamaTextModel"), ("MllamaTextConfig", MLLAMA),
        text_and_tiles(2048, 6404), 2,
    ),
    Model("GIT-base B64", ("git", "GitModel"), ("GitConfig", {}), captions(16), 64),
    Model("BERT-base B64 S256 padded", ("bert", "BertModel"), ("BertConfig", {}), padded_text(256), 64),
    Model(
        "SigLIP2-So400m/16 NaFlex, 8 layers, B64 of up to 1024 patches", ("siglip2", "Siglip2VisionModel"),
        ("Siglip2VisionConfig", {**vision(1152, 4304, 256, 16), "num_patches": 256}),
        naflex((32, 32), (24, 40), (28, 36), (18, 50)), 64,
    ),
    Model(
        "BLIP-L/16@384, 8 layers, B32", ("blip", "BlipVisionModel"),
        ("BlipVisionConfig", {**vision(1024, 4096, 384, 16), "initializer_range": 0.02}), CLIP, 32,
    ),
    Model(
        "LLaVA-1.5, 4 and 4 layers, 8 images, 576+448", ("llava", "LlavaModel"),
        ("LlavaConfig", {
            "vision_config": {**vision(1024, 4096, 336, 14, 4), "model_type": "clip_vision_model"},
            "text_config": {**LLAMA, "intermediate_size": 11008, "num_hidden_layers": 4, "model_type": "llama"},
            "image_token_index": IMAGE_TOKEN,
        }),
        prompts(576, 448, photos.CLIP), 8,
    ),
    Model(
        "PaliGemma, 4 and 4 layers, 16 images, 256+256", ("paligemma", "PaliGemmaModel"),
        ("PaliGemmaConfig", {"vision_config": SO400M_224, "text_config": GEMMA, "image_token_index": IMAGE_TOKEN}),
        prompts(256, 256, photos.HALF, 64), 16,
    ),
    Model(
        "PaliGemma 2, 4 and 4 layers, 16 images, 256+256", ("paligemma", "PaliGemmaModel"),
        ("PaliGemmaConfig", {
            "vision_config": {**SO400M_224, "projection_dim": 2304}, "text_config": GEMMA2, "projection_dim": 2304,
            "image_token_index": IMAGE_TOKEN,
        }),
        prompts(256, 256, photos.HALF, 64), 16,
    ),
    Model(
        "Qwen2-VL 7B text, 4 layers, 4x2048", ("qwen2_vl", "Qwen2VLTextModel"),
        ("Qwen2VLTextConfig", {**QWEN2_TEXT, "rope_parameters": MROPE}), text(2048), 4,
    ),
    Model("OPT-2.7B of BLIP-2, 4 layers, 16x512", ("opt", "OPTModel"), ("OPTConfig", OPT), text(512), 16),
    QFORMER,
    Model(
        "Kosmos-2, 4 and 4 layers, 16 images, 512", ("kosmos2", "Kosmos2Model"),
        ("Kosmos2Config", {"text_config": KOSMOS_TEXT, "vision_config": vision(1024, 4096, 224, 14, 4)}),
        image_in_front(64, 512), 16, see_whole_image,
    ),
    Model(
        "IDEFICS-9B, 4 and 4 layers, 8 images, 1024", ("idefics", "IdeficsModel"),
        ("IdeficsConfig", {**IDEFICS, "perceiver_config": IDEFICS_RESAMPLER}), images_beside_text(1024), 8,
    ),
)  # fmt: skip

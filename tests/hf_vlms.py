# SPDX-License-Identifier: Apache-2.0
"""Small random vision-language models of transformers, whole, with a prompt around an image in each row of a batch."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from hf_models import IMAGE, NO_DROPOUT, TEXT, TOWER, ids, pixels
from torch import nn

S = 10
REAL = torch.tensor([[0] * 3 + [1] * (S - 3), [1] * S])
GQA: dict[str, Any] = {**TEXT, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0, "max_position_embeddings": 128}
QWEN_VISION: dict[str, Any] = {"num_heads": 4, "depth": 1, "patch_size": 4}
MROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]}
Inputs = dict[str, torch.Tensor]
Whole = tuple[nn.Module, Inputs]


def images(count: int, tokens: int) -> Inputs:
    """Prompts with an image of so many tokens in each row; the first is padded on the left."""
    text = ids(2, S + tokens)
    text[:, 4 : 4 + tokens] = 59
    real = torch.cat([REAL[:, :3], torch.ones(2, tokens, dtype=torch.long), REAL[:, 3:]], dim=1)
    return {"input_ids": text, "attention_mask": real, "pixel_values": pixels(count), "token_type_ids": (text == 59).long()}


def without(inputs: Inputs, *names: str) -> Inputs:
    return {name: value for name, value in inputs.items() if name not in names}


def llava() -> Whole:
    vision = {"model_type": "clip_vision_model", **TOWER, **IMAGE}
    config = hf.LlavaConfig(vision_config=vision, text_config={"model_type": "llama", **GQA}, image_token_index=59)
    return hf.LlavaForConditionalGeneration(config), without(images(2, 16), "token_type_ids")


def llava_next() -> Whole:
    """One tile beside the small image: 16 patches each, and a token at the end of each row of the tile."""
    vision = {"model_type": "clip_vision_model", **TOWER, **IMAGE}
    text = {"model_type": "llama", **GQA}
    config = hf.LlavaNextConfig(vision_config=vision, text_config=text, image_token_index=59, image_grid_pinpoints=[[32, 32]])
    inputs = without(images(2, 36), "token_type_ids")
    inputs |= {"pixel_values": pixels(2, 2), "image_sizes": torch.tensor([[32, 32], [32, 32]])}
    return hf.LlavaNextForConditionalGeneration(config), inputs


def paligemma() -> Whole:
    text = {"model_type": "gemma", **GQA}
    config = hf.PaliGemmaConfig(vision_config={**TOWER, **IMAGE}, text_config=text, image_token_index=59, projection_dim=64)
    inputs = images(2, 16)
    inputs["token_type_ids"] = (torch.arange(S + 16) >= S + 13).long().expand(2, -1)  # the text behind the prefix
    return hf.PaliGemmaForConditionalGeneration(config), inputs


def gemma3() -> Whole:
    text = {**GQA, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
    settings = {"vision_config": {**TOWER, **IMAGE}, "mm_tokens_per_image": 4, "image_token_index": 59}
    return hf.Gemma3ForConditionalGeneration(hf.Gemma3Config(text_config=text, **settings)), images(2, 4)


def _qwen(model: nn.Module) -> Whole:
    """Two images of 4 x 4 patches, of which 2 x 2 are one token."""
    inputs = images(2, 4)
    inputs |= {"pixel_values": torch.randn(32, 96), "image_grid_thw": torch.tensor([[1, 4, 4]] * 2)}
    return model, {**without(inputs, "token_type_ids"), "mm_token_type_ids": inputs["token_type_ids"]}


def qwen2_vl() -> Whole:
    vision = {**QWEN_VISION, "embed_dim": 64, "hidden_size": 64}
    config = hf.Qwen2VLConfig(vision_config=vision, text_config={**GQA, "rope_parameters": MROPE}, image_token_id=59)
    return _qwen(hf.Qwen2VLForConditionalGeneration(config))


def qwen2_5_vl() -> Whole:
    vision = {**QWEN_VISION, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 94, "window_size": 16}
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config={**GQA, "rope_parameters": MROPE}, image_token_id=59)
    return _qwen(hf.Qwen2_5_VLForConditionalGeneration(config))


def qwen3_vl() -> Whole:
    vision = {**QWEN_VISION, "hidden_size": 64, "out_hidden_size": 64, "intermediate_size": 96}
    vision |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    config = hf.Qwen3VLConfig(vision_config=vision, text_config={**GQA, "rope_parameters": MROPE}, image_token_id=59)
    return _qwen(hf.Qwen3VLForConditionalGeneration(config))


def _queries(kind: str) -> Whole:
    """BLIP-2 or InstructBLIP: 6 queries of a Q-Former before the text of OPT."""
    former = {**TOWER, **NO_DROPOUT, "encoder_hidden_size": 64, "vocab_size": 60, "use_qformer_text_input": False}
    text = {"model_type": "opt", **TEXT, "ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0, "pad_token_id": 0}
    settings: dict[str, Any] = {"vision_config": {**TOWER, **IMAGE}, "qformer_config": former, "num_query_tokens": 6}
    config = getattr(hf, f"{kind}Config")(**settings, text_config=text, image_token_index=59)
    return getattr(hf, f"{kind}ForConditionalGeneration")(config), without(images(2, 6), "token_type_ids")


def blip2() -> Whole:
    return _queries("Blip2")


def instructblip() -> Whole:
    model, inputs = _queries("InstructBlip")
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    return model, {**inputs, "qformer_input_ids": ids(2, 4), "qformer_attention_mask": mask}


def git() -> Whole:
    settings = {**TEXT, **NO_DROPOUT, "max_position_embeddings": 128, "vision_config": {**TOWER, **IMAGE}}
    return hf.GitForCausalLM(hf.GitConfig(**settings)), {"input_ids": ids(2, S), "pixel_values": pixels()}


def kosmos2() -> Whole:
    text = {"vocab_size": 60, "embed_dim": 64, "layers": 2, "ffn_dim": 96, "attention_heads": 4, "max_position_embeddings": 64}
    text |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    config = hf.Kosmos2Config(text_config=text, vision_config={**TOWER, **IMAGE}, latent_query_num=6)
    where = torch.zeros(2, S, dtype=torch.long)
    where[:, 1:7] = 1
    inputs = {"pixel_values": pixels(), "input_ids": ids(2, S), "image_embeds_position_mask": where}
    return hf.Kosmos2ForConditionalGeneration(config), {**inputs, "attention_mask": torch.ones(2, S, dtype=torch.long)}


def idefics() -> Whole:
    vision = {"embed_dim": 64, **IMAGE, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    perceiver = {"use_resampler": True, "resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 4}
    perceiver |= {"resampler_head_dim": 24, "qk_layer_norms_perceiver": True}
    parts: dict[str, Any] = {"vision_config": vision, "perceiver_config": perceiver}
    settings = {**TEXT, "pad_token_id": 0, "additional_vocab_size": 0, "use_resampler": True, "alpha_type": "vector"}
    config = hf.IdeficsConfig(**settings, **parts)
    inputs = {"input_ids": ids(2, S), "attention_mask": REAL, "pixel_values": pixels(2, 2)}
    seen = torch.ones(2, S, 2, dtype=torch.long)
    seen[0, :6, 1] = 0  # the second image comes later
    return hf.IdeficsForVisionText2Text(config), {**inputs, "image_attention_mask": seen}


def mllama() -> Whole:
    """Two tiles, of which the second row of the batch has one."""
    vision = {**TOWER, **IMAGE, "attention_heads": 4, "num_global_layers": 1, "vision_output_dim": 128, "max_num_tiles": 2}
    vision |= {"intermediate_layers_indices": [0], "supported_aspect_ratios": [[1, 1], [1, 2]]}
    text = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "num_hidden_layers": 3, "cross_attention_layers": [1]}
    config = hf.MllamaConfig(vision_config=vision, text_config={**text, "max_position_embeddings": 128}, image_token_index=58)
    tiles = torch.tensor([[[1, 1]], [[1, 0]]])
    inputs = {"input_ids": ids(2, S), "attention_mask": torch.ones(2, S, dtype=torch.long), "aspect_ratio_mask": tiles}
    inputs |= {"pixel_values": torch.randn(2, 1, 2, 3, 32, 32), "aspect_ratio_ids": torch.tensor([[2], [1]])}
    inputs["cross_attention_mask"] = tiles[:, None].expand(-1, S, -1, -1).clone()
    return hf.MllamaForConditionalGeneration(config), inputs


class MiniGpt4(nn.Module):
    """Its layout: EVA's ViT-g, a Q-Former without text, one linear layer, Llama; the image comes before the text."""

    def __init__(self) -> None:
        super().__init__()
        former = {**TOWER, **NO_DROPOUT, "encoder_hidden_size": 64}
        self.visual_encoder = hf.Blip2VisionModel(hf.Blip2VisionConfig(**TOWER, **IMAGE))
        self.query_tokens = nn.Parameter(torch.zeros(1, 6, 64))
        self.Qformer = hf.Blip2QFormerModel(hf.Blip2QFormerConfig(**former))
        self.llama_proj = nn.Linear(64, 64)
        self.llama_model = hf.LlamaForCausalLM(hf.LlamaConfig(**GQA))

    def set_attn_implementation(self, name: str) -> None:
        for part in (self.visual_encoder, self.Qformer, self.llama_model):
            part.set_attn_implementation(name)

    def embed(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> torch.Tensor:
        seen = self.visual_encoder(pixel_values).last_hidden_state
        queries = self.query_tokens.expand(len(seen), -1, -1)
        image = self.llama_proj(self.Qformer(queries, encoder_hidden_states=seen).last_hidden_state)
        return torch.cat([image, self.llama_model.get_input_embeddings()(input_ids)], dim=1)

    def forward(self, pixel_values: torch.Tensor, input_ids: torch.Tensor) -> Any:
        return self.llama_model(inputs_embeds=self.embed(pixel_values, input_ids))

    def generate(self, pixel_values: torch.Tensor, input_ids: torch.Tensor, **settings: Any) -> Any:
        return self.llama_model.generate(inputs_embeds=self.embed(pixel_values, input_ids), **settings)


def minigpt4() -> Whole:
    return MiniGpt4(), {"pixel_values": pixels(), "input_ids": ids(2, S)}


#: By name, and how many layers of each class are replaced.
WHOLE: dict[str, tuple[Callable[[], Whole], dict[str, int]]] = {
    "llava": (llava, {"CLIPAttention": 2, "LlamaAttention": 2, "LlamaRMSNorm": 5, "LlamaMLP": 2}),
    "llava_next": (llava_next, {"CLIPAttention": 2, "LlamaAttention": 2, "LlamaRMSNorm": 5}),
    "paligemma": (paligemma, {"SiglipAttention": 2, "SiglipMLP": 2, "GemmaAttention": 2, "GemmaMLP": 2}),
    "gemma3": (gemma3, {"SiglipAttention": 2, "SiglipMLP": 2, "Gemma3Attention": 2, "Gemma3MLP": 2}),
    "qwen2_vl": (qwen2_vl, {"PatchEmbed": 1, "VisionAttention": 1, "Qwen2VLAttention": 2, "Qwen2VLRMSNorm": 5}),
    "qwen2_5_vl": (qwen2_5_vl, {"Qwen2_5_VLVisionAttention": 1, "Qwen2_5_VLAttention": 2, "Qwen2_5_VLRMSNorm": 8}),
    "qwen3_vl": (
        qwen3_vl,
        {"Qwen3VLVisionAttention": 1, "Qwen3VLTextAttention": 2, "Qwen3VLTextRMSNorm": 5, "Qwen3VLTextMLP": 2},
    ),
    "blip2": (blip2, {"Blip2Attention": 2, "Blip2QFormerEncoder": 1, "OPTAttention": 2}),
    "instructblip": (instructblip, {"InstructBlipAttention": 2, "InstructBlipQFormerEncoder": 1, "OPTAttention": 2}),
    "git": (git, {"GitVisionAttention": 2, "GitSelfAttention": 2}),
    "kosmos2": (kosmos2, {"Kosmos2VisionAttention": 2, "Kosmos2ImageToTextProjection": 1, "KosmosTextAttention": 2}),
    "idefics": (idefics, {"IdeficsVisionAttention": 2, "IdeficsPerceiverResampler": 1, "IdeficsAttention": 4}),
    "mllama": (mllama, {"MllamaTextSelfAttention": 2, "MllamaTextCrossAttention": 1, "MllamaTextMLP": 3}),
    "minigpt4": (minigpt4, {"Blip2Attention": 2, "Blip2QFormerEncoder": 1, "LlamaAttention": 2, "LlamaRMSNorm": 5}),
}

# SPDX-License-Identifier: Apache-2.0
"""Small random models of transformers with inputs: whole ones where they are cheap to configure, else towers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VisionTransformerPretrainedModel
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel


@dataclass
class Case:
    """A model in eval mode, its inputs, the outputs to compare, and how many layers of each class are replaced."""

    model: nn.Module
    inputs: dict[str, Any]
    outputs: tuple[str, ...]
    replaced: dict[str, int]


TOWER: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
TEXT: dict[str, Any] = {**TOWER, "vocab_size": 60, "max_position_embeddings": 40, "bos_token_id": 1, "eos_token_id": 2}
IMAGE: dict[str, Any] = {"image_size": 32, "patch_size": 8}
NO_DROPOUT: dict[str, Any] = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}


def pixels(*batch: int) -> torch.Tensor:
    return torch.randn(*(batch or (2,)), 3, 32, 32)


def ids(*shape: int) -> torch.Tensor:
    return torch.randint(5, 50, shape)


def layers(prefix: str, layer: str, count: int) -> dict[str, int]:
    """A tower's: around attention and feed-forward, and those."""
    return dict.fromkeys((f"{prefix}{layer}", f"{prefix}Attention", f"{prefix}MLP"), count)


def vit() -> Case:
    model = hf.ViTModel(hf.ViTConfig(**TOWER, **IMAGE))
    return Case(model, {"pixel_values": pixels()}, ("last_hidden_state",), {"ViTEmbeddings": 1, **layers("ViT", "Layer", 2)})


def clip() -> Case:
    model = hf.CLIPModel(hf.CLIPConfig(text_config=TEXT, vision_config={**TOWER, **IMAGE}, projection_dim=32))
    inputs = {"input_ids": ids(3, 7), "pixel_values": pixels()}
    return Case(
        model,
        inputs,
        ("image_embeds", "text_embeds"),
        {"CLIPVisionEmbeddings": 1, **layers("CLIP", "EncoderLayer", 4), "CLIPModel": 1},
    )


def siglip() -> Case:
    model = hf.SiglipModel(hf.SiglipConfig(text_config=TEXT, vision_config={**TOWER, **IMAGE}))
    inputs = {"input_ids": ids(3, 7), "pixel_values": pixels()}
    replaced = {"SiglipVisionEmbeddings": 1, **layers("Siglip", "EncoderLayer", 4), "SiglipModel": 1}
    replaced["SiglipMultiheadAttentionPoolingHead"] = 1
    return Case(model, inputs, ("image_embeds", "text_embeds"), replaced)


def siglip2() -> Case:
    model = hf.Siglip2VisionModel(hf.Siglip2VisionConfig(**TOWER, num_patches=16, patch_size=4))
    mask = torch.ones(2, 12, dtype=torch.int32)
    inputs = {"pixel_values": torch.randn(2, 12, 48), "pixel_attention_mask": mask}
    inputs["spatial_shapes"] = torch.tensor([[3, 4], [2, 6]])
    replaced = {"Siglip2VisionEmbeddings": 1, **layers("Siglip2", "EncoderLayer", 2)}
    replaced["Siglip2MultiheadAttentionPoolingHead"] = 1
    return Case(model, inputs, ("last_hidden_state", "pooler_output"), replaced)


def blip2() -> Case:
    former = {**TOWER, **NO_DROPOUT, "num_hidden_layers": 4, "encoder_hidden_size": 64, "use_qformer_text_input": False}
    text = {"model_type": "opt", **TEXT, "ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0, "pad_token_id": 0}
    config = hf.Blip2Config(
        vision_config={**TOWER, **IMAGE}, qformer_config=former, text_config=text, num_query_tokens=6, image_token_index=55
    )
    tokens = torch.cat((torch.full((2, 6), 55), ids(2, 5)), dim=1)
    replaced = {"Blip2VisionEmbeddings": 1, **layers("Blip2", "EncoderLayer", 2), "Blip2QFormerEncoder": 1, "OPTAttention": 2}
    model = hf.Blip2ForConditionalGeneration(config)
    return Case(model, {"pixel_values": pixels(), "input_ids": tokens}, ("logits",), replaced)


def instructblip() -> Case:
    former = {**TOWER, **NO_DROPOUT, "num_hidden_layers": 4, "encoder_hidden_size": 64, "vocab_size": 60}
    text = {"model_type": "opt", **TEXT, "ffn_dim": 96, "word_embed_proj_dim": 64, "dropout": 0.0, "pad_token_id": 0}
    config = hf.InstructBlipConfig(
        vision_config={**TOWER, **IMAGE}, qformer_config=former, text_config=text, num_query_tokens=6, image_token_index=55
    )
    tokens = torch.cat((torch.full((2, 6), 55), ids(2, 5)), dim=1)
    replaced = {"InstructBlipVisionEmbeddings": 1, **layers("InstructBlip", "EncoderLayer", 2), "InstructBlipQFormerEncoder": 1}
    replaced["OPTAttention"] = 2
    inputs = {"pixel_values": pixels(), "input_ids": tokens, "qformer_input_ids": ids(2, 4)}
    return Case(hf.InstructBlipForConditionalGeneration(config), inputs, ("logits",), replaced)


def blip() -> Case:
    model = hf.BlipVisionModel(hf.BlipVisionConfig(**TOWER, **IMAGE))
    return Case(
        model,
        {"pixel_values": pixels()},
        ("last_hidden_state",),
        {"BlipVisionEmbeddings": 1, **layers("Blip", "EncoderLayer", 2)},
    )


def git() -> Case:
    model = hf.GitModel(hf.GitConfig(**TEXT, **NO_DROPOUT, vision_config={**TOWER, **IMAGE}))
    inputs = {"input_ids": ids(2, 7), "pixel_values": pixels()}
    replaced = {"GitVisionEmbeddings": 1, **layers("GitVision", "EncoderLayer", 2), "GitSelfAttention": 2, "GitIntermediate": 2}
    return Case(model, inputs, ("last_hidden_state",), replaced)


def kosmos2() -> Case:
    text = {"vocab_size": 60, "embed_dim": 64, "layers": 2, "ffn_dim": 96, "attention_heads": 4, "max_position_embeddings": 40}
    text |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model = hf.Kosmos2Model(hf.Kosmos2Config(text_config=text, vision_config={**TOWER, **IMAGE}, latent_query_num=6))
    where = torch.zeros(2, 10, dtype=torch.long)
    where[:, 1:7] = 1
    inputs = {"pixel_values": pixels(), "input_ids": ids(2, 10), "image_embeds_position_mask": where}
    replaced = {"Kosmos2VisionEmbeddings": 1, **layers("Kosmos2Vision", "EncoderLayer", 2), "Kosmos2ImageToTextProjection": 1}
    replaced["KosmosTextAttention"] = 2
    return Case(model, inputs, ("last_hidden_state",), replaced)


def idefics() -> Case:
    vision = {"embed_dim": 64, **IMAGE, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 2}
    perceiver = {"use_resampler": True, "resampler_n_latents": 6, "resampler_depth": 2, "resampler_n_heads": 4}
    perceiver |= {"resampler_head_dim": 24, "qk_layer_norms_perceiver": True}
    config = hf.IdeficsConfig(
        **TEXT, additional_vocab_size=0, vision_config=vision, perceiver_config=perceiver, use_resampler=True
    )
    inputs = {
        "input_ids": ids(2, 7),
        "attention_mask": torch.ones(2, 7, dtype=torch.long),
        "pixel_values": pixels(2, 2),
        "image_attention_mask": torch.ones(2, 7, 2, dtype=torch.long),
    }
    replaced = {"IdeficsVisionEmbeddings": 1, **layers("IdeficsVision", "EncoderLayer", 2), "IdeficsPerceiverResampler": 1}
    replaced |= {"IdeficsAttention": 4, "IdeficsMLP": 4, "IdeficsRMSNorm": 9}
    return Case(hf.IdeficsModel(config), inputs, ("last_hidden_state",), replaced)


def _qwen(model: nn.Module, width: int, layer: str, attention: str) -> Case:
    inputs = {"hidden_states": torch.randn(24, width), "grid_thw": torch.tensor([[1, 4, 4], [2, 2, 2]])}
    return Case(model, inputs, ("last_hidden_state",), {type(model).__name__: 1, layer: 1, attention: 2})


def qwen2_vl() -> Case:
    config = hf.Qwen2VLConfig(vision_config={"embed_dim": 64, "hidden_size": 48, "num_heads": 4, "depth": 2, "patch_size": 4})
    case = _qwen(Qwen2VisionTransformerPretrainedModel(config.vision_config), 3 * 2 * 16, "PatchEmbed", "VisionAttention")
    case.replaced |= {"Qwen2VLVisionBlock": 2, "VisionMlp": 2}
    return case


def qwen2_5_vl() -> Case:
    vision = {"hidden_size": 64, "out_hidden_size": 48, "num_heads": 4, "depth": 2, "patch_size": 4, "intermediate_size": 94}
    config = hf.Qwen2_5_VLConfig(vision_config={**vision, "window_size": 16})
    tower = Qwen2_5_VisionTransformerPretrainedModel(config.vision_config)
    case = _qwen(tower, 3 * 2 * 16, "Qwen2_5_VisionPatchEmbed", "Qwen2_5_VLVisionAttention")
    case.replaced |= {"Qwen2_5_VLRMSNorm": 5, "Qwen2_5_VLMLP": 2}
    return case


def qwen3_vl() -> Case:
    vision = {"hidden_size": 64, "out_hidden_size": 48, "num_heads": 4, "depth": 2, "patch_size": 4, "intermediate_size": 96}
    config = hf.Qwen3VLConfig(vision_config={**vision, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]})
    tower = Qwen3VLVisionModel(config.vision_config)
    case = _qwen(tower, 3 * 2 * 16, "Qwen3VLVisionPatchEmbed", "Qwen3VLVisionAttention")
    case.replaced |= {"Qwen3VLVisionBlock": 2, "Qwen3VLVisionMLP": 2}
    return case


def bert() -> Case:
    """With padding in the middle of a batch."""
    model = hf.BertModel(hf.BertConfig(**TEXT, **NO_DROPOUT))
    mask = torch.arange(7) < torch.tensor([[7], [4]])
    replaced = {"BertSelfAttention": 2, "BertIntermediate": 2}
    return Case(model, {"input_ids": ids(2, 7), "attention_mask": mask.long()}, ("last_hidden_state",), replaced)


CASES: dict[str, Callable[[], Case]] = {
    f.__name__: f
    for f in (vit, clip, siglip, siglip2, blip2, instructblip, blip, git, kosmos2, idefics, qwen2_vl, qwen2_5_vl, qwen3_vl, bert)
}

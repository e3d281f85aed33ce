# SPDX-License-Identifier: Apache-2.0
"""Tiny models of Hugging Face transformers, and a probe that shows which keys each of their attention calls lets a query see.

The probe is an attention function registered with transformers. It runs sdpa once more with equal scores and one-hot values:
the output of a query is then its row of attention weights, whatever the mask was said in (bool, additive, None with is_causal).
"""

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = {"vocab_size": 64, "num_key_value_heads": 1, "head_dim": 8, "pad_token_id": 0, **VISION}


@dataclass
class Call:
    """One call of the attention interface: the layer, and what it lets through, ``[B, Sq, Sk]`` bool."""

    module: torch.nn.Module
    seen: torch.Tensor


_calls: list[Call] = []


def _probe(module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any) -> Any:
    kwargs.pop("softcap", None)  # sdpa refuses it, and it changes no mask
    size = key.shape[2]
    one_hot = torch.eye(size).expand(*key.shape[:2], size, size)
    weights, _ = sdpa_attention_forward(module, 0 * query, 0 * key, one_hot, attention_mask, **kwargs)
    seen = weights.transpose(1, 2) > 0
    assert (seen == seen[:, :1]).all(), "the heads of one layer have different masks"
    _calls.append(Call(module, seen[:, 0]))
    return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)


AttentionInterface.register("vlmkernels_probe", _probe)
AttentionMaskInterface.register("vlmkernels_probe", sdpa_mask)


@contextlib.contextmanager
def probing(model: Any) -> Iterator[list[Call]]:
    """The calls that the attention layers of ``model`` make inside."""
    model.eval().set_attn_implementation("vlmkernels_probe")
    _calls.clear()
    with torch.no_grad():
        yield _calls


def tiny(name: str, config: str, **settings: Any) -> Any:
    """A randomly initialised model of transformers by the names of its class and its configuration."""
    return getattr(transformers, name)(getattr(transformers, config)(**settings))


def mask_argument(layer: torch.nn.Module, calls: list[torch.Tensor]) -> Any:
    """Append the additive or bool ``attention_mask`` that ``layer`` receives to ``calls``, as ``[B, Sq, Sk]`` bool."""

    def hook(module: Any, args: Any, kwargs: Any) -> None:
        mask = inspect.signature(module.forward).bind(*args, **kwargs).arguments["attention_mask"]
        calls.append((mask if mask.dtype == torch.bool else mask > torch.finfo(mask.dtype).min / 2)[:, 0])

    return layer.register_forward_pre_hook(hook, with_kwargs=True)


def paligemma(generation: int) -> Any:
    """PaliGemma, or PaliGemma 2 with a local and a global layer."""
    text = {"model_type": "gemma"} if generation == 1 else {"model_type": "gemma2", "sliding_window": 3}
    text = {**TEXT, **text, "num_hidden_layers": generation}
    vision = {"model_type": "siglip_vision_model", "image_size": 28, "patch_size": 14, **VISION}
    settings = {"text_config": text, "vision_config": vision, "projection_dim": 16, "image_token_index": 63}
    return tiny("PaliGemmaForConditionalGeneration", "PaliGemmaConfig", **settings)


def gemma3() -> Any:
    """Gemma-3 with a local layer, of a window shorter than the images of the tests, and a global one."""
    text = {**TEXT, "num_hidden_layers": 2, "sliding_window": 3, "layer_types": ["sliding_attention", "full_attention"]}
    vision = {"image_size": 28, "patch_size": 14, **VISION}
    settings = {"text_config": text, "vision_config": vision, "mm_tokens_per_image": 4, "image_token_index": 63}
    return tiny("Gemma3ForConditionalGeneration", "Gemma3Config", **settings)


def git() -> Any:
    """GIT: 5 image tokens before the text. Its decoder was eager only up to transformers 5.17 at least, so no probe."""
    vision = {"image_size": 28, "patch_size": 14, **VISION}
    text = {k: v for k, v in TEXT.items() if k not in ("num_key_value_heads", "head_dim")}
    return tiny("GitModel", "GitConfig", vision_config=vision, attn_implementation="eager", **text)


def mllama() -> Any:
    """Llama-3.2-Vision: 4 tiles of 5 tokens, which the tower pads to 8; a self-attention layer and a cross-attention layer."""
    vision = {"image_size": 28, "patch_size": 14, "num_global_layers": 1, "intermediate_layers_indices": [0], **VISION}
    vision |= {"attention_heads": vision.pop("num_attention_heads"), "vision_output_dim": 32, "max_num_tiles": 4}
    text = {**TEXT, "num_hidden_layers": 2, "cross_attention_layers": [1]}
    text.pop("head_dim")
    return tiny("MllamaForConditionalGeneration", "MllamaConfig", vision_config=vision, text_config=text, image_token_index=63)


def qwen2_5_vision() -> Any:
    """The Qwen2.5-VL vision tower: a windowed layer, then a full one."""
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel as Tower

    settings = {"depth": 2, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 16}
    config = transformers.Qwen2_5_VLConfig(vision_config={**settings, "fullatt_block_indexes": [1]}).vision_config
    return Tower(config)


def blip2_retrieval() -> Any:
    """BLIP-2 with its Q-Former for images and text: 3 query tokens."""
    vision = {"image_size": 28, "patch_size": 14, **VISION}
    qformer = {"vocab_size": 64, "cross_attention_frequency": 2, "use_qformer_text_input": True, **VISION}
    qformer |= {"num_hidden_layers": 2, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    text = {"model_type": "opt", "vocab_size": 64, "ffn_dim": 16, "word_embed_proj_dim": 16, **VISION}
    settings = {"vision_config": vision, "qformer_config": qformer, "text_config": text, "image_text_hidden_size": 8}
    return tiny("Blip2ForImageTextRetrieval", "Blip2Config", num_query_tokens=3, **settings)

# SPDX-License-Identifier: Apache-2.0
"""The benchmark of whole models: each builder at a small size, before and after accelerate, and what counts as right."""

import dataclasses
import importlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from test_bench import CEILINGS, CPU, FAST
from torch import nn

from vlmkernels import use_backend
from vlmkernels.bench import models, photos, published, runner
from vlmkernels.bench.workloads import OURS, Workload
from vlmkernels.cli import main
from vlmkernels.nn import SelfAttention

HEAD: dict[str, Any] = {"hidden_size": 64, "num_attention_heads": 4, "num_hidden_layers": 2, "intermediate_size": 96}
TEXT: dict[str, Any] = {**HEAD, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64, "pad_token_id": 0}
IMAGE: dict[str, Any] = {**HEAD, "image_size": 32, "patch_size": 8}
QWEN = {"num_heads": 4, "depth": 2, "patch_size": 4}
IDEFICS_VISION = {"embed_dim": 64, "image_size": 32, "patch_size": 8, "intermediate_size": 96, "num_attention_heads": 4}


def paligemma(text: str) -> dict[str, Any]:
    sizes = {"vision_config": IMAGE, "text_config": {**TEXT, "model_type": text}, "projection_dim": 64}
    return {**sizes, "image_token_index": published.IMAGE_TOKEN}


#: By the class of the model, or where two have one class by name: settings of its size, and what it is called with.
SMALL: dict[str, tuple[dict[str, Any], published.Maker | None]] = {
    "ViTModel": (IMAGE, None),
    "CLIPVisionModel": (IMAGE, None),
    "SiglipVisionModel": (IMAGE, None),
    "Blip2VisionModel": (IMAGE, None),
    "Qwen2VisionTransformerPretrainedModel": (
        {**QWEN, "embed_dim": 64, "hidden_size": 48},
        published.patches((1, 4, 4), (1, 2, 2)),
    ),
    "Qwen2_5_VisionTransformerPretrainedModel": (
        {**QWEN, "hidden_size": 64, "out_hidden_size": 48, "intermediate_size": 96, "window_size": 16},
        published.patches((1, 4, 4), (1, 2, 2)),
    ),
    "Qwen3VLVisionModel": (
        {**QWEN, "hidden_size": 64, "out_hidden_size": 48, "intermediate_size": 96, "num_position_embeddings": 16}
        | {"deepstack_visual_indexes": [0]},
        published.patches((1, 4, 4), (1, 2, 2)),
    ),
    "Gemma3Model": ({"text_config": {**TEXT, "sliding_window": 8}, "vision_config": IMAGE}, published.images_in_text(64, 2, 8)),
    "LlamaModel": (TEXT, published.text(12)),
    "MllamaTextModel": (
        {key: value for key, value in TEXT.items() if key != "head_dim"} | {"cross_attention_layers": [1]},
        published.text_and_tiles(10, 20),
    ),
    "GitModel": ({**HEAD, "vocab_size": 64, "vision_config": IMAGE}, published.captions(6)),
    "BertModel": ({**HEAD, "vocab_size": 64}, published.padded_text(12)),
    "Siglip2VisionModel": ({**HEAD, "num_patches": 16, "patch_size": 4}, published.naflex((3, 4), (2, 6))),
    "BlipVisionModel": (IMAGE, None),
    "LlavaModel": (
        {"vision_config": {**IMAGE, "model_type": "clip_vision_model"}, "text_config": {**TEXT, "model_type": "llama"}}
        | {"image_token_index": published.IMAGE_TOKEN},
        published.prompts(16, 8, photos.CLIP),
    ),
    "PaliGemmaModel": (paligemma("gemma"), published.prompts(16, 8, photos.HALF, 4)),
    "PaliGemma 2": (paligemma("gemma2"), published.prompts(16, 8, photos.HALF, 4)),
    "Qwen2VLTextModel": (
        {**TEXT, "rope_parameters": {**published.MROPE, "mrope_section": [4, 2, 2]}},
        published.text(12),
    ),
    "OPTModel": (
        {"hidden_size": 64, "ffn_dim": 96, "num_attention_heads": 4, "word_embed_proj_dim": 64, "num_hidden_layers": 2}
        | {"vocab_size": 64},
        published.text(12),
    ),
    "InstructBlipQFormerModel": ({**HEAD, "encoder_hidden_size": 64, "vocab_size": 64}, published.queries_and_text(6, 4, 17)),
    "Kosmos2Model": (
        {"text_config": {"embed_dim": 64, "ffn_dim": 96, "attention_heads": 4, "layers": 2, "vocab_size": 64}}
        | {"vision_config": IMAGE, "latent_query_num": 6},
        published.image_in_front(6, 10),
    ),
    "IdeficsModel": (
        {**HEAD, "vocab_size": 64, "additional_vocab_size": 0, "pad_token_id": 0, "use_resampler": True, "alpha_type": "vector"}
        | {"vision_config": IDEFICS_VISION}
        | {"perceiver_config": {**published.IDEFICS_RESAMPLER, "resampler_n_latents": 6, "resampler_depth": 2}},
        published.images_beside_text(12),
    ),
    "VisionTransformer": ({"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4}, None),
}


@pytest.fixture(autouse=True)
def quick_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


def small(model: published.Model) -> published.Model:
    settings, inputs = SMALL.get(model.name.partition(",")[0], SMALL[model.model[1]])
    return dataclasses.replace(
        model, config=(model.config[0], settings), inputs=inputs or model.inputs, batch=min(model.batch, 2)
    )


def timm_imports() -> bool:
    """Not where it is missing, or beside a torchvision for another torch."""
    try:
        importlib.import_module("timm.models.vision_transformer")
    except (ImportError, RuntimeError):
        return False
    return True


def rows(model: published.Model) -> list[runner.Row]:
    work = Workload("models", "accelerate", model.name, "fwd", models.build(model))
    return runner.run_workload(work, CPU, CEILINGS, FAST)


@pytest.mark.parametrize("model", models.MODELS, ids=lambda model: model.model[1])
def test_before_and_after_agree(model: published.Model) -> None:
    capped = model.name.startswith("PaliGemma 2")  # torch's attention has no softcap
    with use_backend("reference" if capped else "torch"):
        found = rows(small(model))
    if model.model[0] == "timm" and not timm_imports():
        assert [(row.provider, row.status) for row in found] == [(OURS, "unavailable")]
        assert found[0].reason.startswith("timm does not import: ")
        return
    library = "timm" if model.model[0] == "timm" else "hf"
    assert [(row.provider, row.status) for row in found] == [(OURS, "ok"), (library, "ok")], [row.reason for row in found]
    assert found[0].backends and not found[1].backends
    assert found[0].flops > 0


@pytest.mark.parametrize("model", published.TRAINED, ids=lambda model: model.model[1])
def test_training_before_and_after_agrees(model: published.Model) -> None:
    work = Workload("models", "accelerate", model.name, "fwd+bwd", models.build(small(model), training=True))
    found = runner.run_workload(work, CPU, CEILINGS, FAST)
    assert [(row.provider, row.status) for row in found] == [(OURS, "ok"), ("hf", "ok")], [row.reason for row in found]
    assert found[0].flops == 3 * rows(small(model))[0].flops


def test_the_bound_is_the_error_of_the_model_before(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "work_dtype", lambda device: torch.bfloat16)
    clip = small(next(model for model in models.MODELS if model.model[1] == "CLIPVisionModel"))
    case = models.build(clip)(CPU)
    own = case.check(case.peers[0].prepare()())[0]
    assert 0.5 < own.ratio < 9 and own.bound == pytest.approx(1.1 * own.ratio) and own
    assert not case.check(case.peers[0].prepare()() * 1.02)[0]


def test_a_wrong_layer_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    accelerate = models.accelerate

    def broken(model: nn.Module) -> Any:
        report = accelerate(model)
        model.encoder.layers[1].self_attn.fast.register_forward_hook(lambda module, args, out: 1.001 * out)  # type: ignore[union-attr]
        return report

    monkeypatch.setattr(models, "accelerate", broken)
    clip = next(model for model in models.MODELS if model.model[1] == "CLIPVisionModel")
    assert [row.status for row in rows(small(clip))] == ["wrong", "ok"]


def test_flops_by_hand() -> None:
    """A tower of 2 images of 17 tokens: patches, projections, feed-forwards. On a CPU torch's counter leaves out attention."""
    clip = small(next(model for model in models.MODELS if model.model[1] == "CLIPVisionModel"))
    tokens, width, layers = 2 * 17, 64, 2
    layer = tokens * width * (4 * width + 2 * 96)
    assert models.build(clip)(CPU).flops == 2 * (2 * 16 * 3 * 64 * width + layers * layer)
    assert models.build(clip, batch=1)(CPU).flops == 2 * (16 * 3 * 64 * width + layers * layer // 2)


def test_verify_from_the_command_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(models, "MODELS", tuple(small(model) for model in models.MODELS))
    assert main(["verify", "--model", "clip", "--model", "Blip2", "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "2 x CLIPAttention -> SelfAttention, error" in printed and "2 x Blip2Attention" in printed and "0 bad" in printed
    with pytest.raises(ValueError, match="model: got 'resnet', wanted one of vit, clip"):
        models.verified("resnet", CPU)

    project = SelfAttention._attend
    monkeypatch.setattr(SelfAttention, "_attend", lambda self, *args: 1.001 * project(self, *args))
    assert main(["verify", "--model", "clip", "--device", "cpu"]) == 1
    assert "OVER THE BOUND: encoder.layers.0.self_attn, CLIPAttention" in capsys.readouterr().out

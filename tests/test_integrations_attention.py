# SPDX-License-Identifier: Apache-2.0
"""attn_implementation="vlmkernels" on tiny random models of transformers: what eager computes, from ranges and no dense mask."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import DEVICE, ON_GPU
from nn_parity import randomize

from vlmkernels import use_backend
from vlmkernels.testing.compare import compare

transformers = pytest.importorskip("transformers", "5.17", reason="register_attention needs transformers 5.17")
import hf_masks  # noqa: E402
from hf_masks import TEXT, VISION, tiny  # noqa: E402

from vlmkernels.integrations import register_attention  # noqa: E402
from vlmkernels.integrations import transformers_attention as ours  # noqa: E402
from vlmkernels.integrations.ranges_mask import RangesMask  # noqa: E402

register_attention()

S = 12
IDS = torch.arange(2 * S).reshape(2, S) % 50 + 5
LEFT = torch.tensor([[0] * 3 + [1] * (S - 3), [1] * S])
RIGHT = torch.tensor([[1] * S, [1] * (S - 4) + [0] * 4])
NONE = torch.ones_like(LEFT)
padding = pytest.mark.parametrize("real", [NONE, LEFT, RIGHT], ids=["full", "left", "right"])
PIXELS = torch.randn(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
IMAGE = {"image_size": 28, "patch_size": 14, **VISION}


@pytest.fixture(autouse=True)
def quick_backend() -> Iterator[None]:
    """On a CPU: not Triton's interpreter, and a backend that has a softcap."""
    with use_backend("" if ON_GPU else "reference"):
        yield


@pytest.fixture(autouse=True)
def masks_stay_sparse(monkeypatch: pytest.MonkeyPatch) -> None:
    """No model makes a mask of ranges dense on its way to the layers; SigLIP2's pooling, not one of them, has one query."""
    make = RangesMask.dense

    def dense(mask: RangesMask) -> torch.Tensor:
        assert mask.shape[2] == 1, "a mask became dense"
        return make(mask)

    monkeypatch.setattr(RangesMask, "dense", dense)


@pytest.fixture
def sdpa_calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The layers whose attention went to transformers' sdpa."""
    calls, run = [], ours.sdpa_attention_forward

    def noted(module: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(type(module).__name__)
        return run(module, *args, **kwargs)

    monkeypatch.setattr(ours, "sdpa_attention_forward", noted)
    return calls


def on_device(inputs: dict[str, Any]) -> dict[str, Any]:
    """As ``randomize`` leaves the model."""
    return {name: x.to(DEVICE) if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}


def outputs(model: Any, implementation: Any, inputs: dict[str, Any], fields: tuple[str, ...]) -> list[torch.Tensor]:
    model.eval().set_attn_implementation(implementation)
    with torch.no_grad():
        out = model(**on_device(inputs))
    return [getattr(out, field).cpu() for field in fields]


def check(
    model: Any, inputs: dict[str, Any], *fields: str, rows: torch.Tensor | None = None, implementation: Any = "vlmkernels"
) -> None:
    """What eager computes, both in fp32, in the ``rows`` that aren't padding. (Not all of these models run in fp64.)"""
    randomize(model)
    got = outputs(model, implementation, inputs, fields)
    exact = outputs(model, "eager", inputs, fields)
    for field, ours_, theirs in zip(fields, got, exact, strict=True):
        if rows is not None and ours_.shape[:2] == rows.shape:
            ours_, theirs = ours_[rows.bool()], theirs[rows.bool()]
        result = compare(ours_, theirs, "model")
        assert result, f"{field}: {result}"


def marked(places: list[list[int]]) -> torch.Tensor:
    ids = IDS.clone()
    for row, tokens in enumerate(places):
        ids[row, tokens] = 63
    return ids


def llama() -> Any:
    text = {**TEXT, "num_attention_heads": 4, "num_hidden_layers": 2, "num_key_value_heads": 2}
    return tiny("LlamaForCausalLM", "LlamaConfig", **text)


def test_vit() -> None:
    check(tiny("ViTModel", "ViTConfig", **IMAGE), {"pixel_values": PIXELS}, "last_hidden_state")


TEXT_TOWER = {"vocab_size": 64, "max_position_embeddings": 16, "eos_token_id": 63, **VISION}


@padding
@pytest.mark.parametrize("family", ["CLIP", "Siglip"])
def test_contrastive(family: str, real: torch.Tensor) -> None:
    settings = {"text_config": TEXT_TOWER, "vision_config": IMAGE}
    model = tiny(f"{family}Model", f"{family}Config", **settings)
    text = {"input_ids": marked([[7], [7]]), "attention_mask": real}  # CLIP takes its feature where the text ends
    check(model, {**text, "pixel_values": PIXELS}, "image_embeds", "text_embeds")
    check(model.text_model, text, "last_hidden_state", rows=real)


def test_siglip2_naflex_with_padding() -> None:
    vision = {"num_patches": 16, "patch_size": 2, **VISION}
    shapes = torch.tensor([[2, 4], [3, 3]])
    mask = (torch.arange(10) < shapes.prod(1)[:, None]).int()
    inputs = {"pixel_values": torch.randn(2, 10, 12), "pixel_attention_mask": mask, "spatial_shapes": shapes}
    model = tiny("Siglip2VisionModel", "Siglip2VisionConfig", **vision)
    check(model, inputs, "last_hidden_state", "pooler_output", rows=mask)


@padding
def test_bert(real: torch.Tensor) -> None:
    model = tiny("BertModel", "BertConfig", vocab_size=64, **VISION)
    check(model, {"input_ids": IDS, "attention_mask": real}, "last_hidden_state", rows=real)


@pytest.mark.parametrize("matching", [True, False], ids=["itm", "itc"])
def test_blip2_qformer(matching: bool) -> None:
    text_mask = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]])
    inputs = {"pixel_values": PIXELS, "input_ids": IDS[:, :4], "attention_mask": text_mask}
    check(hf_masks.blip2_retrieval(), {**inputs, "use_image_text_matching_head": matching}, "logits_per_image")


@padding
def test_llama(real: torch.Tensor) -> None:
    check(llama(), {"input_ids": IDS, "attention_mask": real}, "logits", rows=real)


def test_llama_with_packed_rows() -> None:
    positions = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 0, 1, 2, 3]]).expand(2, -1)
    check(llama(), {"input_ids": IDS, "position_ids": positions, "use_cache": False}, "logits")


@padding
@pytest.mark.parametrize("types", [True, False], ids=["types", "no types"])
@pytest.mark.parametrize("generation", [1, 2])
def test_paligemma(generation: int, types: bool, real: torch.Tensor) -> None:
    ids = marked([[3, 4, 5, 6], [0, 1, 2, 3]])
    inputs = {"input_ids": ids, "attention_mask": real, "pixel_values": PIXELS, "use_cache": False}
    if types:  # the processor gives padding the type of the prefix
        inputs["token_type_ids"] = ((torch.arange(S) >= torch.tensor([[8], [6]])) & (real == 1)).long()
    check(hf_masks.paligemma(generation), inputs, "logits", rows=real)


@padding
def test_gemma3_with_two_images(real: torch.Tensor) -> None:
    ids = marked([[3, 4, 5, 6, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7]])
    inputs = {"input_ids": ids, "attention_mask": real, "pixel_values": torch.randn(4, 3, 28, 28)}
    check(hf_masks.gemma3(), {**inputs, "token_type_ids": (ids == 63).long(), "use_cache": False}, "logits", rows=real)


QWEN_VISION = {"depth": 2, "num_heads": 2, "patch_size": 14, "spatial_merge_size": 2, "temporal_patch_size": 2}
QWEN_TOWERS = {
    "Qwen2VL": {"embed_dim": 16, "hidden_size": 16, "mlp_ratio": 1},
    "Qwen2_5_VL": {"hidden_size": 16, "intermediate_size": 16, "out_hidden_size": 16, "fullatt_block_indexes": [1]},
    "Qwen3VL": {
        "hidden_size": 16,
        "intermediate_size": 16,
        "out_hidden_size": 16,
        "num_position_embeddings": 16,
        "deepstack_visual_indexes": [0],
    },
}


@pytest.mark.parametrize("name", ["vlmkernels", "vlmkernels_flash"])
@pytest.mark.parametrize("family", list(QWEN_TOWERS))
def test_qwen(family: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two images of different sizes, one in several windows; in one call of each layer where the name says flash."""
    merged, grid = 35 + 2, torch.tensor([[1, 14, 10], [1, 4, 2]])
    ids = torch.full((1, merged + 6), 7)
    ids[0, 2 : 2 + 35], ids[0, 38:40] = 63, 63
    ids[0, [1, 37]] = 62
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "rope_theta": 10000.0}
    text = {**TEXT, "rope_parameters": rope, "max_position_embeddings": 128, "num_key_value_heads": 1, "head_dim": 8}
    settings = {"text_config": text, "vision_config": {**QWEN_VISION, **QWEN_TOWERS[family]}, "image_token_id": 63}
    settings |= {"video_token_id": 61, "vision_start_token_id": 62, "vision_end_token_id": 60}
    model = tiny(f"{family}ForConditionalGeneration", "Qwen3VLConfig" if family == "Qwen3VL" else f"{family}Config", **settings)
    patch = 3 * 2 * 14 * 14
    inputs = {"input_ids": ids, "pixel_values": torch.randn(148, patch), "image_grid_thw": grid, "use_cache": False}
    inputs |= {"mm_token_type_ids": (ids == 63).long(), "attention_mask": torch.ones_like(ids)}
    calls = []
    run = ours.attention

    def noted(q: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(q.shape[1])
        return run(q, *args, **kwargs)

    monkeypatch.setattr(ours, "attention", noted)
    implementation = {"": "vlmkernels", "vision_config": name, "text_config": "vlmkernels"}
    check(model, inputs, "logits", implementation=implementation)
    assert calls.count(148) == (2 if name == "vlmkernels_flash" else 0)


def test_mllama(sdpa_calls: list[str]) -> None:
    from test_masks_transformers import mllama_inputs

    inputs = mllama_inputs([[4, 4, 4], [4, 4, 4]], [[0, 4, 5], [2, 3, 9]])
    check(hf_masks.mllama(), inputs, "logits")
    # The tower masks a pair only where both are padding, which has holes; the rest are ranges.
    assert set(sdpa_calls) == {"MllamaVisionAttention"}


def test_mllama_without_its_mask_sees_every_key() -> None:
    from test_masks_transformers import mllama_inputs

    inputs = mllama_inputs([[4, 4, 4], [4, 4, 4]], [[0, 4, 5], [2, 3, 9]])
    inputs.pop("cross_attention_mask")
    check(hf_masks.mllama(), inputs, "logits")


def test_kosmos2_text_and_resampler(sdpa_calls: list[str]) -> None:
    text = {"vocab_size": 64, "embed_dim": 16, "layers": 2, "attention_heads": 2, "ffn_dim": 16, "max_position_embeddings": 64}
    text |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    model = tiny("Kosmos2Model", "Kosmos2Config", text_config=text, vision_config=IMAGE, latent_query_num=4)
    where = torch.zeros_like(IDS)
    where[:, 1:5] = 1
    inputs = {"pixel_values": PIXELS, "input_ids": IDS, "image_embeds_position_mask": where, "attention_mask": RIGHT}
    check(model, inputs, "last_hidden_state", rows=RIGHT)
    assert not sdpa_calls


def test_idefics(sdpa_calls: list[str]) -> None:
    vision = {"embed_dim": 16, "image_size": 28, "patch_size": 14, "intermediate_size": 16, **VISION}
    settings = {
        "vocab_size": 64,
        "additional_vocab_size": 0,
        "cross_layer_interval": 1,
        "pad_token_id": 0,
        "alpha_initializer": "ones",
    }
    settings |= {"vision_config": vision, **VISION, "num_hidden_layers": 2, "use_resampler": False}
    model = tiny("IdeficsForVisionText2Text", "IdeficsConfig", **settings)
    seen = torch.zeros(2, S, 3)  # the image of each token
    seen[0, :, 0], seen[1, 2:6, 1], seen[1, 6:, 2] = 1, 1, 1
    inputs = {"input_ids": IDS, "attention_mask": LEFT, "pixel_values": torch.randn(2, 3, 3, 28, 28), "use_cache": False}
    check(model, {**inputs, "image_attention_mask": seen.long()}, "logits", rows=LEFT)
    assert not sdpa_calls


# Generation


def assert_generates_as_eager(model: Any, inputs: dict[str, Any], **settings: Any) -> None:
    """The same tokens, and the logits that they were chosen by."""
    settings |= {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False, "disable_compile": True}
    settings |= {"output_logits": True, "return_dict_in_generate": True}
    randomize(model)
    found = []
    for name in ("vlmkernels", "eager"):
        model.set_attn_implementation(name)
        found.append(model.generate(**on_device(inputs), **settings))
    got, wanted = found
    assert torch.equal(got.sequences, wanted.sequences)
    for logits, exact in zip(got.logits, wanted.logits, strict=True):
        result = compare(logits, exact, "model")
        assert result, result


FAMILIES = [(family, cache) for family in ("llama", "paligemma", "gemma3") for cache in ("dynamic", "static")]


# PaliGemma 2 in transformers does not run with a static cache, whatever the attention.
@pytest.mark.parametrize("family, cache", [*FAMILIES, ("paligemma 2", "dynamic")])
def test_greedy_generation(family: str, cache: str) -> None:
    """A batch padded on the left, prefill and decode, past the window of the local layers."""
    ids, inputs = IDS, {}
    if family == "gemma3":
        ids = marked([[3, 4, 5, 6, 8, 9, 10, 11], [0, 1, 2, 3, 4, 5, 6, 7]])
        inputs = {"pixel_values": torch.randn(4, 3, 28, 28), "token_type_ids": (ids == 63).long()}
    elif family != "llama":
        ids = marked([[3, 4, 5, 6], [0, 1, 2, 3]])
        inputs = {"pixel_values": PIXELS, "token_type_ids": torch.zeros_like(ids)}
    inputs |= {"input_ids": ids, "attention_mask": LEFT}
    model = {"llama": llama, "gemma3": hf_masks.gemma3}.get(family, lambda: hf_masks.paligemma(1 + family.endswith("2")))()
    assert_generates_as_eager(model, inputs, **({"cache_implementation": "static"} if cache == "static" else {}))


@pytest.mark.parametrize("settings", [{"num_beams": 3}, {"prefill_chunk_size": 5}], ids=["beams", "chunks"])
def test_other_generation(settings: dict[str, Any]) -> None:
    assert_generates_as_eager(llama(), {"input_ids": IDS, "attention_mask": LEFT}, **settings)

# SPDX-License-Identifier: Apache-2.0
"""The tables and positions of rope against the rotary code of Hugging Face's models, run inside those models."""

from typing import Any

import pytest
import torch

from vlmkernels.ops.rope import rope
from vlmkernels.rope_tables import (
    frequencies,
    mrope_interleaved,
    mrope_sectioned,
    rope_tables,
    text_1d,
    vision_2d,
    vision_positions,
)
from vlmkernels.testing import compare

GRIDS = [(1, 4, 6), (2, 2, 8), (3, 6, 2)]
POSITIONS = torch.stack([torch.arange(24) % n + torch.arange(24) // 7 for n in (24, 5, 7)])[:, None].repeat(1, 2, 1)
POSITIONS[:, 1] += 1000


def text_config(name: str) -> Any:
    import transformers

    common: dict[str, Any] = {
        "hidden_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 16,
        "vocab_size": 8, "head_dim": 128, "max_position_embeddings": 4096, "pad_token_id": 0,
    }  # fmt: skip
    if name == "llama":
        return transformers.LlamaConfig(**common, rope_parameters={"rope_type": "default", "rope_theta": 5e5})
    if name.startswith("gemma3"):
        kind = "sliding_attention" if name == "gemma3-local" else "full_attention"
        parameters = {
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
            "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        }
        return transformers.Gemma3TextConfig(**common, layer_types=[kind], rope_parameters=parameters)
    if name == "qwen3-vl":
        parameters = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": [24, 20, 20], "mrope_interleaved": True}
        return transformers.Qwen3VLTextConfig(**common, rope_parameters=parameters)
    common |= {"hidden_size": 512}
    common.pop("head_dim")
    parameters = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
    from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLTextConfig

    return (Qwen2VLTextConfig if name == "qwen2-vl" else Qwen2_5_VLTextConfig)(**common, rope_parameters=parameters)


def text_model(config: Any) -> Any:
    from transformers import Gemma3TextModel, LlamaModel, Qwen3VLTextModel
    from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel
    from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLTextModel

    models = (Gemma3TextModel, LlamaModel, Qwen3VLTextModel, Qwen2_5_VLTextModel, Qwen2VLTextModel)
    return next(model for model in models if model.config_class is type(config))(config).double().eval()


def our_tables(name: str, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    if name == "qwen3-vl":
        return mrope_interleaved(positions, frequencies(128, 5e6), [24, 20, 20])
    if name in ("qwen2-vl", "qwen2.5-vl"):
        return mrope_sectioned(positions, frequencies(128, 1e6), [16, 24, 24])
    if name == "gemma3-global":
        return text_1d(positions[0], frequencies(128, 1e6) / 8.0)
    return text_1d(positions[0], frequencies(128, {"llama": 5e5, "gemma3-local": 1e4}[name]))


@pytest.mark.parametrize("name", ["llama", "gemma3-local", "gemma3-global", "qwen2-vl", "qwen2.5-vl", "qwen3-vl"])
def test_language_models(name: str) -> None:
    """q and k as the model hands them to its attention function, from its projections, norms and rotary embedding, in fp64."""
    transformers = pytest.importorskip("transformers", reason="transformers is not installed")
    seen: dict[str, torch.Tensor] = {}

    def capture(module: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        seen["q"], seen["k"] = q.transpose(1, 2), k.transpose(1, 2)
        return torch.zeros_like(q).transpose(1, 2), None

    transformers.AttentionInterface.register("capture", capture)
    config = text_config(name)
    config._attn_implementation = "capture"
    model = text_model(config)
    attention = model.layers[0].self_attn
    for part in ("q", "k"):
        getattr(attention, f"{part}_proj").register_forward_hook(lambda _, __, out, part=part: seen.update({f"{part}_in": out}))
    weights = {}
    for part in ("q", "k"):
        norm = getattr(attention, f"{part}_norm", None)
        if norm is not None:
            torch.nn.init.uniform_(norm.weight, -0.5, 1.5)
            weights[f"{part}_weight"] = norm.weight.detach() + (1.0 if name.startswith("gemma") else 0.0)
    positions = POSITIONS if "qwen" in name else POSITIONS[0]
    with torch.no_grad():
        model(inputs_embeds=torch.randn(2, 24, config.hidden_size, dtype=torch.float64), position_ids=positions, use_cache=False)
    q, k = (seen[f"{part}_in"].unflatten(-1, (-1, 128)) for part in ("q", "k"))
    assert bool(weights) == (name not in ("llama", "qwen2-vl", "qwen2.5-vl"))
    got = rope(q, k, *our_tables(name, POSITIONS), **weights, eps=config.rms_norm_eps)
    for part, ours in zip(("q", "k"), got, strict=True):
        # The model computes its norm in fp32: an fp32 result is compared.
        assert compare(ours.float(), seen[part], "norm"), part


def rotary_class_tables(name: str) -> torch.Tensor:
    """cos and sin from the class, where it gives out one table for all axes."""
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextRotaryEmbedding

    x = torch.empty(1)
    if name == "qwen3-vl":
        return Qwen3VLTextRotaryEmbedding(text_config(name))(x, POSITIONS)
    if name == "llama":
        return LlamaRotaryEmbedding(text_config(name))(x, POSITIONS[0])
    kind = "sliding_attention" if name == "gemma3-local" else "full_attention"
    return Gemma3RotaryEmbedding(text_config(name))(x, POSITIONS[0], kind)


@pytest.mark.parametrize("name", ["llama", "gemma3-local", "gemma3-global", "qwen3-vl"])
def test_tables_are_bit_equal(name: str) -> None:
    pytest.importorskip("transformers", reason="transformers is not installed")
    for ours, theirs in zip(our_tables(name, POSITIONS), rotary_class_tables(name), strict=True):
        assert ours.is_contiguous()
        assert compare(torch.cat((ours, ours), -1), theirs, "exact")


def vision_model(name: str) -> Any:
    from transformers.models.qwen2_5_vl import configuration_qwen2_5_vl, modeling_qwen2_5_vl
    from transformers.models.qwen2_vl import configuration_qwen2_vl, modeling_qwen2_vl
    from transformers.models.qwen3_vl import configuration_qwen3_vl, modeling_qwen3_vl

    common = {"depth": 1, "num_heads": 2, "patch_size": 4, "spatial_merge_size": 2, "temporal_patch_size": 1, "in_channels": 3}
    if name == "qwen2-vl":
        config = configuration_qwen2_vl.Qwen2VLVisionConfig(**common, embed_dim=160, hidden_size=16)
        return modeling_qwen2_vl.Qwen2VisionTransformerPretrainedModel(config)
    common |= {"out_hidden_size": 16, "intermediate_size": 16}
    if name == "qwen2.5-vl":
        # One window holds every grid, so that the permutation into windows is the identity.
        config = configuration_qwen2_5_vl.Qwen2_5_VLVisionConfig(
            **common, hidden_size=160, window_size=1024, fullatt_block_indexes=[0]
        )
        return modeling_qwen2_5_vl.Qwen2_5_VisionTransformerPretrainedModel(config)
    config = configuration_qwen3_vl.Qwen3VLVisionConfig(**common, hidden_size=144, deepstack_visual_indexes=[])
    return modeling_qwen3_vl.Qwen3VLVisionModel(config)


@pytest.mark.parametrize("name, head_dim", [("qwen2-vl", 80), ("qwen2.5-vl", 80), ("qwen3-vl", 72)])
def test_vision_towers(name: str, head_dim: int) -> None:
    """The tables that the whole tower hands to its first block: frequencies, and positions in merge-block order."""
    pytest.importorskip("transformers", reason="transformers is not installed")
    model = vision_model(name)
    seen: dict[str, Any] = {}
    model.blocks[0].register_forward_pre_hook(lambda _, args, kwargs: seen.update(kwargs), with_kwargs=True)
    patches = sum(t * h * w for t, h, w in GRIDS)
    with torch.no_grad():
        model(torch.randn(patches, 3 * 4 * 4), grid_thw=torch.tensor(GRIDS))
    ours = vision_2d(vision_positions(GRIDS), frequencies(head_dim // 2))
    for our, their in zip(ours, seen["position_embeddings"], strict=True):
        assert our.shape == (1, patches, head_dim // 2)
        assert compare(torch.cat((our[0], our[0]), -1), their, "exact")


@pytest.mark.parametrize("merge", [1, 2])
def test_positions_from_a_list_a_tensor_and_the_device_agree(device: torch.device, merge: int) -> None:
    from vlmkernels.rope_tables import _device_positions

    expected = vision_positions(GRIDS, merge_size=merge)
    total = expected.shape[1]
    assert torch.equal(vision_positions(torch.tensor(GRIDS), merge_size=merge, total=total), expected)
    got = _device_positions(torch.tensor(GRIDS, device=device), merge, total + 3)
    assert torch.equal(got[:, :total].cpu(), expected) and not got[:, total:].any()
    assert torch.equal(vision_positions(GRIDS, merge_size=merge, device=device).cpu(), expected)


def test_positions_without_images(device: torch.device) -> None:
    from vlmkernels.rope_tables import _device_positions

    assert vision_positions([]).shape == (2, 0)
    assert not _device_positions(torch.empty(0, 3, dtype=torch.int64, device=device), 2, 5).any()
    grids = torch.tensor([(1, 2, 2), (0, 2, 2), (1, 2, 4)], device=device)
    assert torch.equal(_device_positions(grids, 2, 12), vision_positions([(1, 2, 2), (1, 2, 4)], device=device))


def test_general_form_takes_any_axes() -> None:
    positions, inv_freq, axes = torch.randint(0, 50, (4, 2, 5)), frequencies(16), torch.tensor([3, 0, 2, 1, 1, 3, 0, 2])
    cos, sin = rope_tables(positions, inv_freq, axes, scale=0.5)
    angle = torch.stack([positions[a].double() * f.double() for a, f in zip(axes, inv_freq, strict=True)], -1)
    assert compare(cos, angle.float().double().cos() / 2, "norm") and compare(sin, angle.float().double().sin() / 2, "norm")
    assert rope_tables(positions[0], inv_freq, dtype=torch.bfloat16)[0].dtype == torch.bfloat16
    assert text_1d(torch.arange(5), inv_freq)[0].shape == (1, 5, 8)


def test_refusals() -> None:
    inv_freq, positions = frequencies(16), torch.zeros(3, 1, 4, dtype=torch.int64)
    with pytest.raises(ValueError, match="rotary_dim: got 7"):
        frequencies(7)
    with pytest.raises(ValueError, match="axes: got None"):
        rope_tables(positions, inv_freq)
    with pytest.raises(ValueError, match="axes: got"):
        rope_tables(positions, inv_freq, torch.zeros(7, dtype=torch.int64))
    with pytest.raises(ValueError, match="inv_freq: got"):
        rope_tables(positions[0], inv_freq[None])
    with pytest.raises(ValueError, match="positions: got"):
        rope_tables(positions[None], inv_freq)
    for kind in (mrope_sectioned, mrope_interleaved):
        with pytest.raises(ValueError, match="sections: got"):
            kind(positions, inv_freq, [4, 4, 4])
        with pytest.raises(ValueError, match="positions: got"):
            kind(positions[0], inv_freq, [4, 2, 2])
    with pytest.raises(ValueError, match="positions: got"):
        vision_2d(positions, inv_freq)
    with pytest.raises(ValueError, match="grid_thw: got"):
        vision_positions([(1, 3, 4)])
    with pytest.raises(ValueError, match="grid_thw: got"):
        vision_positions(torch.zeros(3, dtype=torch.int64))
    with pytest.raises(ValueError, match="total: got 5"):
        vision_positions([(1, 2, 2)], total=5)
    with pytest.raises(ValueError, match="total: got None"):
        vision_positions(torch.zeros(1, 3, dtype=torch.int64, device="meta"))


@pytest.mark.gpu
def test_tables_in_a_graph(device: torch.device) -> None:
    """No host sync: positions from a grid on the GPU, and the tables, are captured and follow the grid on replay."""
    grid = torch.tensor(GRIDS, device=device)
    total = sum(t * h * w for t, h, w in GRIDS)
    inv_freq = frequencies(40, device=device)

    def tables() -> tuple[torch.Tensor, torch.Tensor]:
        return vision_2d(vision_positions(grid, total=total), inv_freq)

    tables()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = tables()
        vision_2d(vision_positions(GRIDS, device=device), inv_freq)
        mrope_sectioned(grid.t()[:, None], inv_freq, [8, 6, 6])
        mrope_interleaved(grid.t()[:, None], inv_freq, [8, 6, 6])
    grid.copy_(torch.tensor([GRIDS[1], GRIDS[2], GRIDS[0]]))
    graph.replay()
    for got, exact in zip(captured, tables(), strict=True):
        assert compare(got, exact, "exact")

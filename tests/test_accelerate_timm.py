# SPDX-License-Identifier: Apache-2.0
"""accelerate on vision transformers of timm: outputs, gradients, the calls and the layers that stay."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate_parity import Results, check, count_calls
from conftest import DEVICE
from nn_parity import quick_backend, randomize
from torch import Tensor
from torch.utils import _pytree as pytree

from vlmkernels import accelerate, restore
from vlmkernels.bench.towers import _hide_broken_torchvision
from vlmkernels.integrations._timm import _tables_of_halves
from vlmkernels.testing import compare

__all__ = ["quick_backend"]
_hide_broken_torchvision()
try:
    import timm
    from timm.layers import Attention, AttentionPoolLatent, GluMlp, Mlp, PatchEmbed
    from timm.models.eva import EvaAttention, EvaBlock
    from timm.models.naflexvit import NaFlexEmbeds, NaFlexVit, NaFlexVitCfg
    from timm.models.vision_transformer import Block
except (ImportError, RuntimeError) as error:  # not installed, or beside a torchvision for another torch
    pytest.skip(f"timm does not import: {error}", allow_module_level=True)

SMALL = {"img_size": 32, "patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "num_classes": 10}
MODELS: dict[str, dict[str, Any]] = {
    "plain": {},
    "norms of q and k": {"qk_norm": True},
    "registers, no bias": {"reg_tokens": 2, "qkv_bias": False},
    "attention pool": {"global_pool": "map", "class_token": False},
}


def make(**settings: Any) -> Any:
    return randomize(timm.models.VisionTransformer(**{**SMALL, **settings})).to(DEVICE).eval()


def results(module: Any, dtype: torch.dtype, x: Tensor | dict[str, Tensor], cotangent: Tensor) -> Results:
    """Outputs and gradients of all parameters."""
    given = pytree.tree_map(lambda value: value.to(dtype) if value.is_floating_point() else value, x)
    module.zero_grad()
    out = module(given)
    out.backward(cotangent.to(dtype))
    return {"out": out.detach(), **{key: p.grad.clone() for key, p in module.named_parameters()}}


def both(model: Any, *given: Any) -> tuple[Results, Results]:
    """What the model computes in fp64 and in fp32."""
    return results(copy.deepcopy(model).double(), torch.float64, *given), results(model, torch.float32, *given)


def photos() -> tuple[Tensor, Tensor]:
    """With cotangents."""
    return torch.randn(3, 3, 32, 32, device=DEVICE), torch.randn(3, 10, device=DEVICE)


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str) -> None:
    model, given = make(**MODELS[name]), photos()
    wanted = both(model, *given)
    report = accelerate(model)
    pooled = {"AttentionPoolLatent": 1} if name == "attention pool" else {}
    assert Counter(row.layer for row in report.replaced) == {"Attention": 2, "Mlp": 2, "Block": 2, "PatchEmbed": 1, **pooled}
    calls = count_calls(model)
    check(results(model, torch.float32, *given), wanted)
    assert len(calls) == len(report.replaced) == restore(model)
    check(results(model, torch.float32, *given), wanted)


EVAS: dict[str, dict[str, Any]] = {
    "EVA-02": {"use_rot_pos_emb": True, "swiglu_mlp": True},
    "EVA-02 L": {"use_rot_pos_emb": True, "qkv_fused": False, "scale_attn_inner": True, "num_reg_tokens": 2},
    "EVA": {"qkv_bias": False},
    "PE": {"use_rot_pos_emb": True, "attn_type": "rope", "rope_rotate_half": True, "num_heads": 2},
    "DINOv3": {"use_rot_pos_emb": True, "rope_type": "dinov3", "attn_type": "rope", "rope_rotate_half": True, "qkv_fused": False},
}


@pytest.mark.parametrize("name", EVAS)
def test_eva(name: str) -> None:
    """Rope of neighbouring channels or of halves, class tokens that are not turned, biases of q and v alone."""
    model = randomize(timm.models.Eva(**{**SMALL, **EVAS[name]})).to(DEVICE).eval()
    given = photos()
    wanted = both(model, *given)
    report = accelerate(model)
    if EVAS[name].get("rope_rotate_half") and not _tables_of_halves():
        assert "it turns halves" in str(report) and {row.layer for row in report.replaced} == {"PatchEmbed", "Mlp", "EvaBlock"}
        return
    layer = "AttentionRope" if "attn_type" in EVAS[name] else "EvaAttention"
    feeds = {} if EVAS[name].get("swiglu_mlp") else {"Mlp": 2}
    if feeds and not EVAS[name].get("scale_attn_inner"):
        feeds["EvaBlock"] = 2
    assert Counter(row.layer for row in report.replaced) == {layer: 2, "PatchEmbed": 1, **feeds}
    calls = count_calls(model)
    check(results(model, torch.float32, *given), wanted)
    assert len(calls) == len(report.replaced)
    restore(model)
    check(results(model, torch.float32, *given), wanted)


def naflex(**settings: Any) -> Any:
    """SigLIP2's."""
    defaults = {"patch_size": 8, "embed_dim": 64, "depth": 2, "num_heads": 4, "embed_proj_type": "linear", "global_pool": "map"}
    defaults |= {"pos_embed_grid_size": (4, 4), "pos_embed_interp_mode": "bilinear", "class_token": False, "reg_tokens": 0}
    cfg = NaFlexVitCfg(**{**defaults, **settings})
    return randomize(NaFlexVit(cfg, num_classes=10)).to(DEVICE).eval()


def patches(*grids: tuple[int, int]) -> dict[str, Tensor]:
    """Images of so many rows and columns of patches, padded to those of the largest."""
    size = max(height * width for height, width in grids)
    found = {"patches": torch.randn(len(grids), size, 192), "patch_coord": torch.zeros(len(grids), size, 2, dtype=torch.long)}
    found["patch_valid"] = torch.arange(size) < torch.tensor([[height * width] for height, width in grids])
    for i, (height, width) in enumerate(grids):
        found["patch_coord"][i, : height * width] = torch.cartesian_prod(torch.arange(height), torch.arange(width))
    return {key: value.to(DEVICE) for key, value in found.items()}


@pytest.mark.parametrize("keys_alone", [False, True])
def test_naflex(keys_alone: bool) -> None:
    """Images in their own sizes: positions resampled to each grid, padding as ranges of keys."""
    model = naflex(use_key_only_attn_mask=keys_alone)
    given = patches((3, 4), (2, 5), (4, 3)), torch.randn(3, 10, device=DEVICE)
    wanted = both(model, *given)
    report = accelerate(model)
    layers = {"Attention": 2, "Mlp": 2, "Block": 2}
    assert Counter(row.layer for row in report.replaced) == {"NaFlexEmbeds": 1, "AttentionPoolLatent": 1, **layers}
    calls = count_calls(model)
    check(results(model, torch.float32, *given), wanted)
    ours = {f"blocks.{i}{part}" for i in range(2) for part in ("", ".attn", ".mlp")}
    assert set(calls) == {"embeds", *ours}, "the pooling head has a mask, which is the original's"
    x = torch.randn(2, 3, 32, 32, device=DEVICE)
    with torch.no_grad():
        got = model(x)
        assert calls["embeds"] == 1 and calls["attn_pool"] == 1, "images of one size are cut by the original"
        restore(model)
        assert compare(got, model(x).double(), "model")


def test_the_calls_that_stay() -> None:
    layer = randomize(Attention(64, 4, qkv_bias=True, attn_drop=0.5)).to(DEVICE).eval()
    x, mask = torch.randn(2, 6, 64, device=DEVICE), torch.rand(2, 1, 6, 6, device=DEVICE) < 0.8
    mask |= torch.eye(6, device=DEVICE).bool()
    with torch.no_grad():
        wanted = [layer(x), layer(x, mask), layer(x, is_causal=True)]
        accelerate(layer)
        calls = count_calls(layer)
        got = [layer(x), layer(x, mask), layer(x, is_causal=True)]
    assert sum(calls.values()) == 2
    assert all(compare(a, b.double(), "module") for a, b in zip(got, wanted, strict=True))
    layer.train()(x)
    assert sum(calls.values()) == 2, "dropout of attention weights is the original's"


def test_what_is_left() -> None:
    def reasons(layer: Any) -> list[str]:
        return [row.reason for row in accelerate(layer).left if row.layer == type(layer).__name__]

    (reason,) = reasons(Attention(64, 4, scale_norm=True, norm_layer=torch.nn.LayerNorm))
    assert reason.startswith("its norm.")
    (reason,) = reasons(AttentionPoolLatent(64, num_heads=4, pos_embed="abs", feat_size=16, norm_layer=torch.nn.LayerNorm))
    assert "it has positions" in reason
    (reason,) = reasons(AttentionPoolLatent(64, num_heads=4, norm_layer=torch.nn.LayerNorm, act_layer=torch.nn.SiLU))
    assert reason == "its activation is SiLU, its pooling 'token'"
    (reason,) = reasons(PatchEmbed(32, 8, embed_dim=64, norm_layer=torch.nn.LayerNorm))
    assert reason == "its result has a norm or another form, or its images no size"
    (reason,) = reasons(EvaAttention(64, 4, gated=True, scale_norm=False))
    assert reason == "it has a gate, or adds a bias by itself"
    (reason,) = reasons(EvaBlock(64, 4, init_values=0.1))
    assert reason == "it scales what its halves add"
    for settings, feed in (
        ({"swiglu_mlp": True}, "GluMlp"),
        ({"scale_attn_inner": True, "norm_layer": torch.nn.LayerNorm}, "Mlp"),
    ):
        (reason,) = reasons(EvaBlock(64, 4, **settings))
        assert reason == f"its feed-forward is {feed}, or its attention has a norm before its last layer"
    (reason,) = reasons(NaFlexEmbeds(8, proj_type="linear"))
    assert reason == "it has a convolution, norms, or a class token"
    (reason,) = reasons(NaFlexEmbeds(8, proj_type="linear", class_token=False))
    assert reason == "its positions are learned, bicubic, of (14, 14): other than SigLIP2's"
    (reason,) = reasons(Block(64, 4, init_values=0.1))
    assert reason == "it scales what its halves add"
    for settings in ({"norm_layer": torch.nn.LayerNorm}, {"use_conv": True}):
        (reason,) = reasons(Mlp(8, 16, **settings))
        assert reason == "it has convolutions, or a norm between its layers"
    (reason,) = reasons(Mlp(8, 16, act_layer=torch.nn.Tanh))
    assert reason == "its activation is Tanh"
    assert not accelerate(GluMlp(8, 16)).replaced


class Fused(torch.nn.LayerNorm):
    """A norm of which nothing is known."""


def test_a_block_with_another_norm() -> None:
    report = accelerate(Block(64, 4, norm_layer=Fused))
    assert "its norms are Fused and Fused" in str(report) and {row.layer for row in report.replaced} == {"Attention", "Mlp"}


@pytest.mark.parametrize("drop", [{"drop_path": 0.9}, {"proj_drop": 0.9}, {"attn_drop": 0.9}])
def test_dropout_of_a_block_is_the_original(drop: dict[str, float]) -> None:
    """In training, and by itself: the other parts stay ours."""
    block, x = randomize(Block(64, 4, **drop)).to(DEVICE), torch.randn(4, 6, 64, device=DEVICE)
    torch.manual_seed(3)
    wanted = block.train()(x)
    accelerate(block)
    calls = count_calls(block)
    torch.manual_seed(3)
    assert compare(block(x), wanted.double(), "module") and "" not in calls
    assert set(calls) == ({"mlp"} if "attn_drop" in drop else {"attn"} if "proj_drop" in drop else {"attn", "mlp"})
    block.eval()(x)
    assert calls[""] == 1


@pytest.mark.parametrize(
    "where", ["ls1", "drop_path2", "norm1", "attn.proj_drop", "attn.proj", "mlp.act", "mlp.drop1", "mlp.fc2"]
)
def test_hooks_inside_a_block(where: str) -> None:
    """Whoever waits for a call of a layer gets it, and may change what it returns."""
    block, x = randomize(Block(64, 4)).to(DEVICE).eval(), torch.randn(2, 6, 64, device=DEVICE)
    accelerate(block)
    calls = count_calls(block)
    with torch.no_grad():
        plain = block(x)
        block.get_submodule(where).register_forward_hook(lambda module, args, output: 3 * output)
        got = block(x)
        assert calls[""] == 1 and not compare(got, plain.double(), "module")
        restore(block)
        assert compare(got, block(x).double(), "module")

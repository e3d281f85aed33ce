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

from vlmkernels import accelerate, restore
from vlmkernels.bench.towers import _hide_broken_torchvision
from vlmkernels.testing import compare

__all__ = ["quick_backend"]
_hide_broken_torchvision()
try:
    import timm
    from timm.layers import Attention, AttentionPoolLatent, Mlp
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


@pytest.mark.parametrize("name", MODELS)
def test_outputs_and_gradients(name: str) -> None:
    model = make(**MODELS[name])
    x, cotangent = torch.randn(3, 3, 32, 32, device=DEVICE), torch.randn(3, 10, device=DEVICE)

    def results(module: Any, dtype: torch.dtype) -> Results:
        module.zero_grad()
        out = module(x.to(dtype))
        out.backward(cotangent.to(dtype))
        return {"out": out.detach(), **{key: p.grad.clone() for key, p in module.named_parameters()}}

    wanted = results(copy.deepcopy(model).double(), torch.float64), results(model, torch.float32)
    report = accelerate(model)
    pooled = {"AttentionPoolLatent": 1} if name == "attention pool" else {}
    assert Counter(row.layer for row in report.replaced) == {"Attention": 2, **pooled}
    calls = count_calls(model)
    check(results(model, torch.float32), wanted)
    assert len(calls) == len(report.replaced) == restore(model)
    check(results(model, torch.float32), wanted)


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
    assert not accelerate(Mlp(8, 16)).replaced

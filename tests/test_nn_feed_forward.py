# SPDX-License-Identifier: Apache-2.0
"""The feed-forwards of accelerate: aligned rows, the fused GELU, and the calls that go layer by layer."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nn_parity import quick_backend, randn, randomize

from vlmkernels.nn import _feed_forward
from vlmkernels.nn._feed_forward import ActivatedLinear, DecoderFeedForward, FeedForward, GatedFeedForward
from vlmkernels.ops.activated_linear import ACTIVATIONS
from vlmkernels.testing import compare

__all__ = ["quick_backend"]


def gated(m: Any, x: torch.Tensor) -> torch.Tensor:
    y: torch.Tensor = m.down_proj(F.silu(m.gate_proj(x)) * m.up_proj(x))
    return y


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("hidden", [30, 32, 35])
def test_gated(hidden: int, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every product has rows of a multiple of 16 bytes, whatever the width, but of those side by side where it is odd."""
    module = randomize(GatedFeedForward(16, hidden)).to(device, dtype)
    x = randn(2, 5, 16).to(device, dtype)
    linear, depths = F.linear, []

    def noted(x: torch.Tensor, weight: torch.Tensor, bias: Any = None) -> torch.Tensor:
        depths.append(weight.shape[1])
        return linear(x, weight, bias)

    exact = gated(module.double(), x.double())
    module.to(dtype)
    monkeypatch.setattr(F, "linear", noted)
    assert compare(module(x), exact, "module")
    assert len(depths) == 2 and all(depth * x.element_size() % 16 == 0 for depth in depths)


def test_gradients_of_gated(device: torch.device) -> None:
    module = randomize(GatedFeedForward(16, 30)).to(device)
    x = randn(2, 5, 16).to(device).requires_grad_()
    cotangent = randn(2, 5, 16).to(device)
    got = torch.autograd.grad((module(x) * cotangent).sum(), [x, *module.parameters()])
    wide = GatedFeedForward(16, 30).to(device, torch.float64)
    wide.load_state_dict(module.state_dict())
    exact = torch.autograd.grad(
        (gated(wide, y := x.detach().double().requires_grad_()) * cotangent).sum(), [y, *wide.parameters()]
    )
    assert all(compare(a, b, "module") for a, b in zip(got, exact, strict=True))


def test_layers_that_are_watched_are_called(device: torch.device) -> None:
    x, calls = randn(2, 16).to(device), []
    modules = GatedFeedForward(16, 30), DecoderFeedForward(16, 30, "silu"), FeedForward(16, 30, "quick_gelu")
    for module in (*modules, ActivatedLinear(16, 30, "gelu")):
        randomize(module).to(device)
        want = module(x)
        for layer in module.children():
            layer.register_forward_hook(lambda *_: calls.append(1))
        with torch.no_grad():
            assert compare(module(x), want.double(), "module")
    assert len(calls) == 9


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_plain(activation: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One operation without gradients; with them, under autocast and in another dtype the layers are called."""
    module = randomize(FeedForward(16, 30, activation, names=("linear_fc1", "linear_fc2"))).to(device, dtype)
    x = randn(3, 5, 16).to(device, dtype)
    assert set(module.state_dict()) == {f"linear_fc{i}.{name}" for i in (1, 2) for name in ("weight", "bias")}
    calls, fused = [], _feed_forward.activated_linear

    def noted(*args: Any) -> torch.Tensor:
        calls.append(args[-1])
        return fused(*args)

    monkeypatch.setattr(_feed_forward, "activated_linear", noted)
    with torch.no_grad():
        got, added = module(x), module(x, torch.ones_like(x))
    assert calls == [activation] * 2
    learnt = module(x)
    learnt.sum().backward()
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        module(x.float())
    assert calls == [activation] * 2
    wide = FeedForward(16, 30, activation, names=("linear_fc1", "linear_fc2")).to(device, torch.float64)
    wide.load_state_dict(module.state_dict())
    assert compare(got, wide(x.double()), "module") and compare(learnt, wide(x.double()), "module")
    assert compare(added, wide(x.double()) - wide.linear_fc2.bias + 1, "module")


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_decoder(activation: str, dtype: torch.dtype, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """One operation before the last layer without gradients; with them, under autocast and with a bias the layers are called."""
    module = randomize(DecoderFeedForward(16, 30, activation)).to(device, dtype)
    x = randn(30, 5, 16).to(device, dtype)
    calls, fused = [], _feed_forward.activated_linear

    def noted(*args: Any, up: torch.Tensor) -> torch.Tensor:
        calls.append(up)
        return fused(*args, up=up)

    monkeypatch.setattr(_feed_forward, "activated_linear", noted)
    with torch.no_grad():
        got = module(x)
    assert len(calls) == 1 and calls[0] is module.up_proj.weight
    learnt = module(x)
    learnt.sum().backward()
    assert all(parameter.grad is not None for parameter in module.parameters())
    biased = randomize(DecoderFeedForward(16, 30, activation, bias=True)).to(device, dtype)
    with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
        module(x.float())
    with torch.no_grad():
        biased(x)
    assert len(calls) == 1
    wide = DecoderFeedForward(16, 30, activation).to(device, torch.float64)
    wide.load_state_dict(module.state_dict())
    exact = wide.down_proj(_feed_forward._ACTIVATIONS[activation](wide.gate_proj(x.double())) * wide.up_proj(x.double()))
    assert compare(got, exact, "module") and compare(learnt, exact, "module")

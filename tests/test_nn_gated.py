# SPDX-License-Identifier: Apache-2.0
"""GatedCrossAttention against the gated layer of IDEFICS in transformers, with the images that each token of the text sees."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from nn_parity import check_module, check_parity, quick_backend, randn, randomize, run, share_weights, without_rounding
from torch import Tensor, nn
from transformers.models.idefics.modeling_idefics import IdeficsGatedCrossAttentionLayer

from vlmkernels import KeyRanges
from vlmkernels.masks import even_spans
from vlmkernels.nn import GatedCrossAttention
from vlmkernels.ops._op import use_backend
from vlmkernels.testing.compare import compare

__all__ = ["quick_backend"]
B, S, C, H, INNER, WIDTH, IMAGES, TOKENS = 2, 7, 48, 3, 80, 40, 3, 5
KEYS = IMAGES * TOKENS


def theirs(implementation: str = "sdpa", **more: Any) -> nn.Module:
    config = transformers.IdeficsConfig(
        hidden_size=C, num_attention_heads=H, intermediate_size=INNER, vision_config={"embed_dim": WIDTH}, **more
    )
    config._attn_implementation = implementation
    return IdeficsGatedCrossAttentionLayer(config, 0)


def ours(**arguments: Any) -> GatedCrossAttention:
    return GatedCrossAttention(C, H, INNER, context_dim=WIDTH, **arguments)


def without_scalars(layer: nn.Module) -> nn.Module:
    """The layer with gates of one number frozen: their gradients are sums that cancel, and have a test of their own."""
    for alpha in (layer.alpha_cross_attn, layer.alpha_dense):
        alpha.requires_grad_(alpha.numel() > 1)
    return layer


def call_theirs(ranges: KeyRanges) -> Callable[..., Tensor]:
    """The call that IdeficsModel makes: an additive mask, and a gate that is 0 where a token sees no image."""
    seen = ranges.dense(KEYS)

    def call(module: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        mask = x.new_zeros(seen.shape).masked_fill(~seen, torch.finfo(x.dtype).min)[:, None]
        gate = seen.any(-1).to(x.dtype)
        return module(x, None, context, image_attention_mask=mask, cross_attention_gate=gate)

    return call


def last_image(device: torch.device) -> KeyRanges:
    """The first row sees nothing before its second token, the other row only its first image."""
    tokens = torch.tensor([[0, 1, 0, 1, 1, 0, 0], [1, 0, 0, 0, 0, 0, 0]], dtype=torch.bool, device=device)
    return KeyRanges.flamingo(tokens, *even_spans(IMAGES, TOKENS, device=device))


def runs_of_images(device: torch.device) -> KeyRanges:
    """Tokens see none, one, or several images, and from the fourth token on nobody sees any, as after an end of document."""
    first = torch.tensor([[0, -1, 1, 0, -1, -1, -1], [2, 1, 0, 0, -1, -1, -1]], device=device)
    stop = torch.tensor([[1, 0, 3, 3, 0, 0, 0], [3, 3, 3, 1, 0, 0, 0]], device=device)
    return KeyRanges.cross(first, *even_spans(IMAGES, TOKENS, device=device), stop_image=stop)


def no_image(device: torch.device) -> KeyRanges:
    return KeyRanges.flamingo(torch.zeros(B, S, dtype=torch.bool, device=device), *even_spans(IMAGES, TOKENS, device=device))


@pytest.mark.parametrize("visible", [last_image, runs_of_images, no_image])
@pytest.mark.parametrize(
    ("gate", "qk_norm", "implementation"), [("float", None, "eager"), ("vector", "rms", "sdpa"), ("float", "rms", "eager")]
)
def test_idefics(
    gate: str, qk_norm: str | None, implementation: str, visible: Callable[..., KeyRanges], device: torch.device
) -> None:
    ranges = visible(device)
    check_parity(
        without_scalars(ours(gate=gate, qk_norm=qk_norm)),
        without_scalars(theirs(implementation, alpha_type=gate, qk_layer_norms=qk_norm is not None)),
        lambda m, x, context: m(x, context, ranges),
        call_theirs(ranges),
        randn(B, S, C),
        randn(B, KEYS, WIDTH),
    )


def test_every_token_sees_every_image(device: torch.device) -> None:
    everything = KeyRanges.full(S, KEYS, device=device).expand(B)
    check_parity(
        without_scalars(ours()),
        without_scalars(theirs()),
        lambda m, x, context: m(x, context),
        call_theirs(everything),
        randn(B, S, C),
        randn(B, KEYS, WIDTH),
    )


def test_gradients_of_gates_of_one_number(device: torch.device) -> None:
    """Each is the sum of those of a gate for each channel, whose norm is the magnitude that the sum cancels from."""
    mine, reference, ranges = ours(), randomize(theirs()), runs_of_images(device)
    share_weights(mine, reference)
    wide = ours(gate="vector", dtype=torch.float64).to(device)
    wide.load_state_dict({n: w.expand(1, 1, C) if "alpha" in n else w for n, w in reference.state_dict().items()})
    x, context = randn(B, S, C), randn(B, KEYS, WIDTH)

    def call(module: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        return module(x, context, ranges)

    got = run(mine, call, (x, context), seed=1)
    channels = run(wide, call, (x.double(), context.double()), seed=1)
    with without_rounding():
        exact = run(reference.double(), call_theirs(ranges), (x.double(), context.double()), seed=1)
    for name in ("alpha_cross_attn", "alpha_dense"):
        result = compare(got[name], exact[name], "module", terms=channels[name].norm().item())
        assert result, f"{name}: {result}"


def test_text_without_an_image_only_passes_the_feed_forward(device: torch.device) -> None:
    layer = randomize(ours())
    x = randn(B, S, C)
    fed = x + layer.alpha_dense.tanh() * layer.mlp(layer.post_attention_layernorm(x))
    assert compare(layer(x, randn(B, KEYS, WIDTH), no_image(device)), fed.double(), "module")
    with use_backend("reference"):
        assert compare(layer(x, randn(B, 0, WIDTH)), fed.double(), "module")


def test_a_new_layer_is_the_identity() -> None:
    layer = ours(gate="vector").to(randn().device)
    x = randn(B, S, C)
    assert torch.equal(layer(x, randn(B, KEYS, WIDTH)), x)


def test_packed_text_reads_as_a_batch_does(device: torch.device) -> None:
    layer, ranges = randomize(ours(gate="vector", qk_norm="rms")), last_image(device)
    x, context = randn(B, S, C), randn(B, KEYS, WIDTH)
    exact = layer.double()(x.double(), context.double(), ranges).flatten(0, 1)
    offset = torch.arange(B, dtype=torch.int32, device=device)[:, None] * KEYS
    packed = KeyRanges((ranges.start + offset).view(1, -1), (ranges.stop + offset).view(1, -1))
    assert compare(layer.float()(x.flatten(0, 1), context.flatten(0, 1), packed), exact, "module")


def test_one_context_for_a_batch_of_texts(device: torch.device) -> None:
    layer, ranges = randomize(ours()), last_image(device)
    x, context = randn(B, S, C), randn(1, KEYS, WIDTH)
    exact = layer.double()(x.double(), context.double().expand(B, -1, -1), ranges)
    assert compare(layer.float()(x, context, ranges), exact, "module")


def test_dropout_falls_where_theirs_does() -> None:
    """Dropping everything is the one dropout without chance: what attention and feed-forward add goes, the text stays."""
    mine, reference = ours(dropout=1.0), theirs("eager", dropout=1.0)
    randomize(reference)
    share_weights(mine, reference)
    x, context = randn(B, S, C), randn(B, KEYS, WIDTH)
    everything = KeyRanges.full(S, KEYS, device=x.device).expand(B)
    assert torch.equal(mine.train()(x, context), x)
    assert torch.equal(call_theirs(everything)(reference.train(), x, context), x)
    assert not torch.equal(mine.eval()(x, context), x)


def test_attention_dropout_cannot_train() -> None:
    layer = randomize(ours(attention_dropout=0.1))
    x, context = randn(B, S, C), randn(B, KEYS, WIDTH)
    assert layer(x, context).shape == (B, S, C)
    layer.train()
    with pytest.raises(ValueError, match=r"attention_dropout: got 0\.1"):
        layer(x, context)


@pytest.mark.parametrize("gate", ["float", "vector"])
def test_module_behaviour(gate: str, device: torch.device) -> None:
    ranges, layer = runs_of_images(device), without_scalars(ours(gate=gate, qk_norm="rms"))
    check_module(layer, lambda m, x, context: m(x, context, ranges), randn(B, S, C), randn(B, KEYS, WIDTH))


def test_width_of_the_context_and_dtype_are_as_asked() -> None:
    layer = GatedCrossAttention(C, H, INNER, norm_eps=1e-3, qk_norm="rms", dtype=torch.float64)
    assert layer.cross_attn.k_proj.in_features == C
    assert all(parameter.dtype == torch.float64 for parameter in layer.parameters())
    assert [part.eps for part in layer.modules() if hasattr(part, "eps")] == [1e-3] * 4


def test_no_texts() -> None:
    with use_backend("reference"):
        assert ours()(torch.zeros(0, S, C), torch.zeros(0, KEYS, WIDTH)).shape == (0, S, C)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: GatedCrossAttention(0, H, INNER), "embed_dim"),
        (lambda: GatedCrossAttention(C, 0, INNER), "num_heads"),
        (lambda: GatedCrossAttention(C, 5, INNER), "embed_dim"),
        (lambda: GatedCrossAttention(C, H, 0), "intermediate_dim"),
        (lambda: GatedCrossAttention(C, H, INNER, context_dim=0), "context_dim"),
        (lambda: ours(gate="scalar"), "gate"),
        (lambda: ours(qk_norm="layer"), "qk_norm"),
        (lambda: ours(dropout=1.5), "dropout"),
        (lambda: ours()(torch.zeros(1, S, C + 1), torch.zeros(1, KEYS, WIDTH)), "x"),
        (lambda: ours()(torch.zeros(S, 1, 1, C), torch.zeros(1, KEYS, WIDTH)), "x"),
        (lambda: ours()(torch.zeros(1, S, C), torch.zeros(1, KEYS, C)), "context"),
        (lambda: ours()(torch.zeros(2, S, C), torch.zeros(3, KEYS, WIDTH)), "context"),
    ],
)
def test_refusals(build: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*, wanted "):
        build()

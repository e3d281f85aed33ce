# SPDX-License-Identifier: Apache-2.0
"""PerceiverResampler against that of IDEFICS in transformers, and against one with open_flamingo's parameters."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from nn_parity import check_module, check_parity, quick_backend, randn
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers.models.idefics.perceiver import IdeficsPerceiverResampler

from vlmkernels.nn import PerceiverResampler
from vlmkernels.ops._op import use_backend

__all__ = ["quick_backend"]
# Heads as wide as the published ones: the gradient of a LayerNorm over a dozen channels loses digits in anybody's fp32.
B, S, C, H, D, LATENTS, DEPTH = 2, 13, 72, 2, 96, 3, 2
ZERO = ("blocks.0.0.k_layer_norm.bias", "blocks.1.0.k_layer_norm.bias")


def theirs(qk_norm: bool = False) -> nn.Module:
    config = transformers.IdeficsConfig(
        vision_config={"embed_dim": C}, perceiver_config={"qk_layer_norms_perceiver": qk_norm, "use_resampler": True}
    )
    return IdeficsPerceiverResampler(config, C, DEPTH, H, D, LATENTS)


def ours(**arguments: Any) -> PerceiverResampler:
    return PerceiverResampler(C, H, D, num_latents=LATENTS, depth=DEPTH, **arguments)


@pytest.mark.parametrize("shape", [(B, S), (1, 1)], ids=str)
@pytest.mark.parametrize("qk_norm", [None, "layer"])
def test_idefics(qk_norm: str | None, shape: tuple[int, int]) -> None:
    check_parity(
        ours(qk_norm=qk_norm),
        theirs(qk_norm is not None),
        lambda m, x: m(x),
        lambda m, x: m(x),
        randn(*shape, C),
        zero_gradients=ZERO,
    )


def test_defaults_are_those_of_the_configuration() -> None:
    config = transformers.IdeficsConfig(vision_config={"embed_dim": C}, perceiver_config={"use_resampler": True})
    sizes = config.perceiver_config
    with torch.device("meta"):
        reference = IdeficsPerceiverResampler(
            config, C, sizes.resampler_depth, sizes.resampler_n_heads, sizes.resampler_head_dim, sizes.resampler_n_latents
        )
        found = PerceiverResampler(C)
    wanted = {name: value.shape for name, value in reference.state_dict().items()}
    assert {name: value.shape for name, value in found.state_dict().items()} == wanted


class FlamingoAttention(nn.Module):
    """The parameters of open_flamingo's PerceiverAttention around torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.norm_media, self.norm_latents = nn.LayerNorm(C), nn.LayerNorm(C)
        self.to_q = nn.Linear(C, H * D, bias=False)
        self.to_kv = nn.Linear(C, 2 * H * D, bias=False)
        self.to_out = nn.Linear(H * D, C, bias=False)

    def forward(self, media: Tensor, latents: Tensor) -> Tensor:
        media, latents = self.norm_media(media), self.norm_latents(latents)
        k, v = self.to_kv(torch.cat((media, latents), dim=1)).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (H, D)).transpose(1, 2) for t in (self.to_q(latents), k, v))
        return self.to_out(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


class FlamingoResampler(nn.Module):
    """The parameters of open_flamingo's PerceiverResampler; its feed-forward is a Sequential, with the GELU at index 2."""

    def __init__(self) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.randn(LATENTS, C))
        self.layers = nn.ModuleList()
        for _ in range(DEPTH):
            up, down = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)
            block = [FlamingoAttention(), nn.Sequential(nn.LayerNorm(C), up, nn.GELU(), down)]
            self.layers.append(nn.ModuleList(block))
        self.norm = nn.LayerNorm(C)

    def forward(self, media: Tensor) -> Tensor:
        latents = self.latents.expand(media.shape[0], -1, -1)
        for attention, feed_forward in self.layers:
            latents = attention(media, latents) + latents
            latents = feed_forward(latents) + latents
        return self.norm(latents)


def test_flamingo() -> None:
    check_parity(ours(layout="flamingo"), FlamingoResampler(), lambda m, x: m(x), lambda m, x: m(x), randn(B, S, C))


@pytest.mark.parametrize("arguments", [{"qk_norm": "layer"}, {"layout": "flamingo"}], ids=str)
def test_module_behaviour(arguments: dict[str, str]) -> None:
    check_module(ours(**arguments), lambda m, x: m(x), randn(B, S, C), zero_gradients=ZERO)


def test_every_size_and_the_dtype_are_its_own() -> None:
    module = PerceiverResampler(C, H, D, 24, num_latents=LATENTS, depth=3, norm_eps=1e-3, dtype=torch.float64)
    assert all(parameter.dtype == torch.float64 for parameter in module.parameters())
    assert [tuple(block[1].fc.weight.shape) for block in module.blocks] == [(24, C)] * 3
    norms = [part.eps for part in module.modules() if isinstance(part, nn.LayerNorm)]
    assert norms == [1e-3] * 10


def test_no_images_and_images_without_tokens() -> None:
    with use_backend("reference"):
        assert ours()(torch.zeros(0, S, C)).shape == (0, LATENTS, C)
        # The latents read each other.
        assert ours()(torch.zeros(B, 0, C)).isfinite().all()


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: PerceiverResampler(0), "embed_dim"),
        (lambda: PerceiverResampler(C, 0), "num_heads"),
        (lambda: PerceiverResampler(C, H, 0), "head_dim"),
        (lambda: PerceiverResampler(C, H, D, 0), "intermediate_dim"),
        (lambda: PerceiverResampler(C, H, D, num_latents=0), "num_latents"),
        (lambda: PerceiverResampler(C, H, D, depth=0), "depth"),
        (lambda: ours(layout="clip"), "layout"),
        (lambda: ours(qk_norm="rms"), "qk_norm"),
        (lambda: ours(layout="flamingo", qk_norm="layer"), "qk_norm"),
        (lambda: ours()(torch.zeros(1, S, C + 1)), "context"),
        (lambda: ours()(torch.zeros(S, C)), "context"),
    ],
)
def test_refusals(build: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*, wanted "):
        build()

# SPDX-License-Identifier: Apache-2.0
"""AttentionPool against the pooling heads of SigLIP and SigLIP2 in transformers, and that of timm."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from nn_parity import check_module, check_parity, quick_backend, randn, randomize, share_weights
from torch import Tensor, nn
from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead
from transformers.models.siglip2.modeling_siglip2 import Siglip2MultiheadAttentionPoolingHead

from vlmkernels import KeyRanges
from vlmkernels.nn import AttentionPool
from vlmkernels.ops._op import use_backend
from vlmkernels.testing.compare import compare

__all__ = ["quick_backend"]
B, S, C, H, INNER = 3, 13, 54, 3, 70
ZERO = ("attention.in_proj_bias", "kv.bias")
GELU = {"gelu_pytorch_tanh": "tanh", "gelu": "none"}


def config(kind: str, implementation: str = "sdpa", **more: Any) -> Any:
    made = getattr(transformers, kind)(hidden_size=C, num_attention_heads=H, intermediate_size=INNER, **more)
    made._attn_implementation = implementation
    return made


@pytest.mark.parametrize("act", GELU)
def test_siglip(act: str) -> None:
    theirs = SiglipMultiheadAttentionPoolingHead(config("SiglipVisionConfig", hidden_act=act, layer_norm_eps=1e-3))
    ours = AttentionPool(C, H, INNER, approximate=GELU[act], norm_eps=1e-3)
    check_parity(ours, theirs, lambda m, x: m(x), lambda m, x: m(x), randn(B, S, C), zero_gradients=ZERO)


def test_one_token() -> None:
    """Its weight is 1 whatever the probe is, so only the output is compared: these gradients of the original are rounding."""
    theirs = randomize(SiglipMultiheadAttentionPoolingHead(config("SiglipVisionConfig")))
    ours, x = AttentionPool(C, H, INNER), randn(2, 1, C)
    share_weights(ours, theirs)
    assert compare(ours(x), theirs.double()(x.double()), "module")


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_siglip2_padding(implementation: str, device: torch.device) -> None:
    lengths = torch.tensor([S, 1, 8], device=device)
    mask = torch.arange(S, device=device) < lengths[:, None]
    theirs = Siglip2MultiheadAttentionPoolingHead(config("Siglip2VisionConfig", implementation))
    x = randn(B, S, C)
    for ranges in (KeyRanges.key_padding(1, lengths=lengths), KeyRanges.key_padding(1, mask=mask)):
        check_parity(
            AttentionPool(C, H, INNER),
            theirs,
            lambda m, x, ranges=ranges: m(x, ranges),
            lambda m, x: m(x, mask.int()),
            x,
            zero_gradients=ZERO,
        )


class LatentPool(nn.Module):
    """The parameters of timm's AttentionPoolLatent, and what it computes, around torch's attention."""

    def __init__(self, latent_len: int, pool_type: str, act: nn.Module) -> None:
        super().__init__()
        self.latent = nn.Parameter(torch.zeros(1, latent_len, C))
        self.q, self.kv, self.proj = nn.Linear(C, C), nn.Linear(C, 2 * C), nn.Linear(C, C)
        self.norm, self.mlp = nn.LayerNorm(C, eps=1e-6), nn.Module()
        self.mlp.fc1, self.mlp.act, self.mlp.fc2 = nn.Linear(C, INNER), act, nn.Linear(INNER, C)
        self.pool_type = pool_type

    def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
        q, k, v = self.q(self.latent.expand(len(x), -1, -1)), *self.kv(x).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (H, C // H)).transpose(1, 2) for t in (q, k, v))
        y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask)
        y = self.proj(y.transpose(1, 2).flatten(2))
        y = y + self.mlp.fc2(self.mlp.act(self.mlp.fc1(self.norm(y))))
        return {"token": y[:, 0], "avg": y.mean(1), "": y}[self.pool_type]


POOLS = {"token": "first", "avg": "mean", "": "none"}


@pytest.mark.parametrize("pool_type", POOLS)
@pytest.mark.parametrize("latent_len", [1, 4])
def test_timm_names(latent_len: int, pool_type: str, device: torch.device) -> None:
    ranges = KeyRanges.key_padding(latent_len, lengths=torch.tensor([S, 4, 9], device=device))
    mask = ranges.dense(S)[:, None]
    check_parity(
        AttentionPool(C, H, INNER, latent_len, layout="timm", pool=POOLS[pool_type], approximate="none"),
        LatentPool(latent_len, pool_type, nn.GELU()),
        lambda m, x: m(x, ranges),
        lambda m, x: m(x, mask),
        randn(B, S, C),
        zero_gradients=ZERO,
    )


@pytest.mark.parametrize("pool_type", POOLS)
@pytest.mark.parametrize("latent_len", [1, 4])
def test_timm(latent_len: int, pool_type: str) -> None:
    timm_layers = pytest.importorskip("timm.layers", reason="timm imports only beside a torchvision for this torch")
    theirs = timm_layers.AttentionPoolLatent(
        C,
        num_heads=H,
        mlp_ratio=2.0,
        latent_len=latent_len,
        pool_type=pool_type,
        norm_layer=timm_layers.LayerNorm,
        act_layer=timm_layers.GELUTanh,
    )
    ours = AttentionPool(C, H, 2 * C, latent_len, layout="timm", pool=POOLS[pool_type])
    check_parity(ours, theirs, lambda m, x: m(x), lambda m, x: m(x), randn(B, S, C), zero_gradients=ZERO)


def test_a_probe_reads_its_own_range(device: torch.device) -> None:
    """Probes may read different parts: each result is that of a pool with this probe alone, over these tokens alone."""
    ours = randomize(AttentionPool(C, H, INNER, 2, pool="none"))
    x, bounds = randn(B, S, C), ((0, 5), (3, S))
    start, stop = (torch.tensor([side], dtype=torch.int32, device=device) for side in zip(*bounds, strict=True))
    out = ours(x, KeyRanges(start, stop))
    assert out.shape == (B, 2, C)
    for i, (first, last) in enumerate(bounds):
        alone = AttentionPool(C, H, INNER).to(device)
        state = ours.state_dict()
        alone.load_state_dict({**state, "probe": state["probe"][:, i : i + 1]})
        assert compare(out[:, i], alone.double()(x[:, first:last].double()), "module")


def test_an_image_without_tokens(device: torch.device) -> None:
    """Its attention is 0, and nothing of its padding is in the result, not even a NaN."""
    ours = randomize(AttentionPool(C, H, INNER))
    x = randn(2, S, C)
    x[1] = torch.nan
    out = ours(x, KeyRanges.key_padding(1, lengths=torch.tensor([S, 0], device=device)))
    exact = copy.deepcopy(ours).double()
    y = exact.attention.out_proj.bias
    y = y + exact.mlp.fc2(nn.functional.gelu(exact.mlp.fc1(exact.layernorm(y)), approximate="tanh"))
    assert compare(out[1], y, "module")
    assert compare(out[0], exact(x[:1].double())[0], "module")


@pytest.mark.parametrize("layout", ["siglip", "timm"])
def test_the_probe_is_projected_once(layout: str, monkeypatch: pytest.MonkeyPatch) -> None:
    batches = []
    linear = nn.functional.linear

    def watched(x: Tensor, *arguments: Any) -> Tensor:
        batches.append(x.shape[0])
        return linear(x, *arguments)

    ours = randomize(AttentionPool(C, H, INNER, layout=layout))
    monkeypatch.setattr(nn.functional, "linear", watched)
    ours(randn(B, S, C))
    assert batches == [1, B, B, B, B]


@pytest.mark.parametrize("layout", ["siglip", "timm"])
def test_module_behaviour(layout: str, device: torch.device) -> None:
    ranges = KeyRanges.key_padding(2, lengths=torch.tensor([S, 4, 9], device=device))
    ours = AttentionPool(C, H, INNER, 2, layout=layout, pool="mean")
    check_module(ours, lambda m, x: m(x, ranges), randn(B, S, C), zero_gradients=ZERO)


def test_nothing_to_pool() -> None:
    with use_backend("reference"):
        assert AttentionPool(C, H)(torch.zeros(0, S, C)).shape == (0, C)
        assert AttentionPool(C, H, num_probes=2, pool="none")(torch.zeros(0, S, C)).shape == (0, 2, C)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: AttentionPool(C, 0), "num_heads"),
        (lambda: AttentionPool(C, 5), "embed_dim"),
        (lambda: AttentionPool(C, H, 0), "intermediate_dim"),
        (lambda: AttentionPool(C, H, num_probes=0), "num_probes"),
        (lambda: AttentionPool(C, H, layout="clip"), "layout"),
        (lambda: AttentionPool(C, H, pool="avg"), "pool"),
        (lambda: AttentionPool(C, H, approximate="erf"), "approximate"),
        (lambda: AttentionPool(C, H)(torch.zeros(S, C)), "x"),
        (lambda: AttentionPool(C, H)(torch.zeros(1, S, C + 1)), "x"),
        (lambda: AttentionPool(C, H)(torch.zeros(B, S, C), KeyRanges.full(S, S)), "ranges"),
        (lambda: AttentionPool(C, H)(torch.zeros(B, S, C), KeyRanges.full(1, S).expand(2)), "ranges"),
    ],
)
def test_refusals(build: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*, wanted "):
        build()


def test_it_shows_what_it_is() -> None:
    pool = AttentionPool(16, 2, layout="timm", num_probes=3, pool="mean")
    assert pool.extra_repr() == "16, num_heads=2, num_probes=3, layout=timm, pool=mean, approximate=tanh"

# SPDX-License-Identifier: Apache-2.0
"""SelfAttention and CrossAttention against the layers of transformers and timm that they replace."""

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from conftest import DEVICE
from nn_parity import check_module, check_parity, quick_backend, randn, randomize
from torch import Tensor, nn
from transformers.models.bert.modeling_bert import BertSelfAttention
from transformers.models.blip.modeling_blip import BlipAttention
from transformers.models.blip_2.modeling_blip_2 import Blip2Attention, Blip2QFormerMultiHeadAttention
from transformers.models.clip.modeling_clip import CLIPAttention
from transformers.models.gemma2.modeling_gemma2 import Gemma2Attention
from transformers.models.gemma3.modeling_gemma3 import Gemma3Attention
from transformers.models.idefics.modeling_idefics import IdeficsAttention
from transformers.models.kosmos2.modeling_kosmos2 import KosmosTextAttention
from transformers.models.llama.modeling_llama import LlamaAttention, apply_rotary_pos_emb
from transformers.models.mllama.configuration_mllama import MllamaTextConfig, MllamaVisionConfig
from transformers.models.mllama.modeling_mllama import MllamaTextCrossAttention, MllamaVisionAttention
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLVisionAttention
from transformers.models.qwen2_vl.configuration_qwen2_vl import Qwen2VLVisionConfig
from transformers.models.qwen2_vl.modeling_qwen2_vl import VisionAttention
from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLTextConfig, Qwen3VLVisionConfig
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLTextAttention, Qwen3VLVisionAttention
from transformers.models.siglip.modeling_siglip import SiglipAttention
from transformers.models.vit.modeling_vit import ViTAttention

from vlmkernels import KeyRanges
from vlmkernels.nn import AttentionLayout, CrossAttention, SelfAttention
from vlmkernels.nn.cross_attention import _ValueBias
from vlmkernels.ops._op import use_backend
from vlmkernels.testing.compare import compare

__all__ = ["quick_backend"]
B, S, C, H, D = 2, 13, 48, 3, 16


def configured(config: Any, implementation: str = "sdpa") -> Any:
    config._attn_implementation = implementation
    return config


def vision(kind: str, **more: Any) -> Any:
    return configured(getattr(transformers, kind)(hidden_size=C, num_attention_heads=H, **more))


VISION = {
    "clip": (lambda: CLIPAttention(vision("CLIPVisionConfig")), {"layout": "clip"}),
    "siglip": (lambda: SiglipAttention(vision("SiglipVisionConfig")), {"layout": "clip"}),
    "vit": (lambda: ViTAttention(vision("ViTConfig")), {"layout": "llama"}),
    "vit without bias": (
        lambda: ViTAttention(vision("ViTConfig", qkv_bias=False)),
        {"layout": "llama", "bias": False, "out_bias": True},
    ),
    "blip": (lambda: BlipAttention(vision("BlipVisionConfig")), {"layout": "blip"}),
    "blip-2": (lambda: Blip2Attention(vision("Blip2VisionConfig")), {"layout": "blip"}),
    "bert": (lambda: BertSelfAttention(vision("BertConfig")), {"layout": "bert"}),
}


@pytest.mark.parametrize("case", VISION)
def test_vision_tower_layers(case: str) -> None:
    build, arguments = VISION[case]
    ours = SelfAttention(C, H, **arguments)
    zero = ("k_proj.bias", "key.bias")
    check_parity(ours, build(), lambda m, x: m(x), lambda m, x: m(x)[0], randn(B, S, C), zero_gradients=zero)


@pytest.mark.parametrize("qk_norm", [None, "rms"])
def test_timm_layer(qk_norm: str | None) -> None:
    timm_layers = pytest.importorskip("timm.layers", reason="timm imports only beside a torchvision for this torch")
    theirs = timm_layers.Attention(
        C, H, attn_head_dim=24, qkv_bias=True, qk_norm=qk_norm == "rms", norm_layer=timm_layers.RmsNorm
    )
    ours = SelfAttention(C, H, head_dim=24, layout="timm", qk_norm=qk_norm)
    check_parity(ours, theirs, lambda m, x: m(x), lambda m, x: m(x), randn(B, S, C))


def test_key_padding(device: torch.device) -> None:
    ranges = KeyRanges.key_padding(S, lengths=torch.tensor([S, 5], device=device))
    mask = ranges.dense(S)[:, None]
    check_parity(
        SelfAttention(C, H, layout="clip"),
        SiglipAttention(vision("SiglipVisionConfig")),
        lambda m, x: m(x, ranges),
        lambda m, x: m(x, mask)[0],
        randn(B, S, C),
        zero_gradients=("k_proj.bias",),
    )


def test_mllama_vision_layer(device: torch.device) -> None:
    theirs = MllamaVisionAttention(configured(MllamaVisionConfig(hidden_size=C, attention_heads=H)))
    mask = torch.ones(B, 1, S, S, dtype=torch.bool, device=device)
    ours = SelfAttention(C, H, layout="llama", bias=False)
    check_parity(ours, theirs, lambda m, x: m(x), lambda m, x: m(x, attention_mask=mask)[0], randn(B, S, C))


def rope_tables(length: int, device: torch.device, batch: int = 1) -> tuple[Tensor, Tensor]:
    """What Hugging Face passes: cos and sin of every angle twice, ``[batch, length, D]``."""
    angles = torch.rand(batch, length, D // 2, device=device) * 6
    return torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()


def half(tables: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return tables[0][..., : D // 2], tables[1][..., : D // 2]


def text(kind: Any, implementation: str = "sdpa", **more: Any) -> Any:
    sizes = {"hidden_size": C, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": D, "num_hidden_layers": 2}
    return configured(kind(**sizes, **more), implementation)


GEMMA3 = {"query_pre_attn_scalar": 20, "layer_types": ["full_attention"] * 2}
DECODERS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any]]] = {
    "llama": (lambda: LlamaAttention(text(transformers.LlamaConfig), 0), {}),
    "gemma 3": (
        lambda: Gemma3Attention(text(transformers.Gemma3TextConfig, **GEMMA3), 0),
        {"qk_norm": "gemma", "scale": 20**-0.5},
    ),
    "qwen3-vl": (lambda: Qwen3VLTextAttention(text(Qwen3VLTextConfig), 0), {"qk_norm": "rms"}),
    # A cap of 1 bends these small logits; sdpa has none in transformers.
    "gemma 2": (
        lambda: Gemma2Attention(
            text(transformers.Gemma2Config, "eager", attn_logit_softcapping=1.0, query_pre_attn_scalar=20), 0
        ),
        {"softcap": 1.0, "scale": 20**-0.5},
    ),
}


@pytest.mark.parametrize("case", DECODERS)
def test_decoder_layers(case: str, device: torch.device) -> None:
    build, arguments = DECODERS[case]
    tables = rope_tables(S, device, batch=B)
    ranges = KeyRanges.prefix_lm(S, torch.tensor([4, 7], device=device))
    allowed = ranges.dense(S)[:, None]

    def call_theirs(module: nn.Module, x: Tensor) -> Tensor:
        mask = allowed if case != "gemma 2" else torch.where(allowed, 0.0, -torch.inf).to(x.dtype)
        cos, sin = (table.to(x.dtype) for table in tables)
        return module(x, position_embeddings=(cos, sin), attention_mask=mask)[0]

    ours = SelfAttention(C, 4, 2, D, layout="llama", bias=False, **arguments)
    # Stock torch has no softcap; what follows is checked on every backend by the operator's own tests.
    with use_backend("reference") if ours.softcap else contextlib.nullcontext():
        check_parity(ours, build(), lambda m, x: m(x, ranges, half(tables)), call_theirs, randn(B, S, C))


def test_causal(device: torch.device) -> None:
    tables = rope_tables(S, device)
    check_parity(
        SelfAttention(C, 4, 2, D, layout="llama", bias=False, causal=True),
        LlamaAttention(text(transformers.LlamaConfig), 0),
        lambda m, x: m(x, rope=half(tables)),
        lambda m, x: m(x, position_embeddings=tuple(t.to(x.dtype) for t in tables), attention_mask=None)[0],
        randn(B, S, C),
    )


QWEN: dict[str, Callable[[], nn.Module]] = {
    "qwen2-vl": lambda: VisionAttention(configured(Qwen2VLVisionConfig(embed_dim=C, num_heads=H))),
    "qwen2.5-vl": lambda: Qwen2_5_VLVisionAttention(configured(Qwen2_5_VLVisionConfig(hidden_size=C, num_heads=H))),
    "qwen3-vl": lambda: Qwen3VLVisionAttention(configured(Qwen3VLVisionConfig(hidden_size=C, num_heads=H))),
}


@pytest.mark.parametrize("case", QWEN)
def test_packed_images(case: str, device: torch.device) -> None:
    tokens, cu_seqlens = 20, torch.tensor([0, 4, 16, 20], dtype=torch.int32, device=device)
    cos, sin = rope_tables(tokens, device)
    ranges = KeyRanges.packed(cu_seqlens, tokens)
    check_parity(
        SelfAttention(C, H, layout="timm"),
        QWEN[case](),
        lambda m, x: m(x, ranges, half((cos, sin))),
        lambda m, x: m(x, cu_seqlens, position_embeddings=(cos[0], sin[0])),
        randn(tokens, C),
    )


@pytest.mark.parametrize("batches", [(2, 2), (1, 2)], ids=["same batch", "learned queries"])
def test_qformer_cross_attention(batches: tuple[int, int]) -> None:
    config = configured(transformers.Blip2QFormerConfig(hidden_size=C, num_attention_heads=H, encoder_hidden_size=40))
    check_parity(
        CrossAttention(C, H, context_dim=40, layout="bert"),
        Blip2QFormerMultiHeadAttention(config, is_cross_attention=True),
        lambda m, x, context: m(x, context),
        lambda m, x, context: m(x, encoder_hidden_states=context)[0],
        randn(batches[0], 5, C),
        randn(batches[1], S, 40),
        zero_gradients=("key.bias",),
    )


def test_mllama_cross_attention(device: torch.device) -> None:
    config = MllamaTextConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=1)
    ranges = KeyRanges(torch.tensor([[0, 3, 5]], dtype=torch.int32), torch.tensor([[3, 13, 6]], dtype=torch.int32)).to(device)
    mask = ranges.dense(S)[:, None].expand(B, 1, 3, S)
    check_parity(
        CrossAttention(64, 4, 2, layout="llama", bias=False, qk_norm="rms", norm_eps=config.rms_norm_eps),
        MllamaTextCrossAttention(configured(config), 0),
        lambda m, x, context: m(x, context, ranges),
        lambda m, x, context: m(x, context, attention_mask=mask)[0],
        randn(B, 3, 64),
        randn(B, S, 64),
    )


def test_kosmos_resampler_attention() -> None:
    config = configured(transformers.Kosmos2Config().text_config, "eager")
    check_parity(
        CrossAttention(C, H, layout="clip"),
        KosmosTextAttention(config, C, H),
        lambda m, x, context: m(x, context),
        lambda m, x, context: m(x, encoder_hidden_states=context)[0],
        randn(B, 4, C),
        randn(B, S, C),
        zero_gradients=("k_proj.bias",),
    )


def test_kosmos_text_attention(device: torch.device) -> None:
    """With the norm before its last layer."""
    config = configured(transformers.Kosmos2Config().text_config, "eager")
    mask = KeyRanges.causal(S, S, device=device).dense(S)[:, None]
    added = torch.zeros(mask.shape, device=device).masked_fill_(~mask, torch.finfo(torch.float32).min)
    check_parity(
        SelfAttention(C, H, layout="kosmos", norm_eps=config.layer_norm_eps, causal=True),
        KosmosTextAttention(config, C, H, add_inner_attn_layernorm=True),
        lambda m, x: m(x),
        lambda m, x: m(x, attention_mask=added)[0],
        randn(B, S, C),
        zero_gradients=("k_proj.bias",),
    )


def test_idefics_cross_attention() -> None:
    config = configured(transformers.IdeficsConfig(vision_config={"embed_dim": 40}), "eager")
    check_parity(
        CrossAttention(C, H, context_dim=40, layout="idefics", bias=False, qk_norm="rms", norm_eps=config.rms_norm_eps),
        IdeficsAttention(C, H, is_cross_attention=True, config=config, qk_layer_norms=True, layer_idx=0),
        lambda m, x, context: m(x, context),
        lambda m, x, context: m(x, context)[0],
        randn(B, 4, C),
        randn(B, S, 40),
    )


def test_a_cache_of_cross_attention(device: torch.device) -> None:
    """What it returns is attended to; it gets keys behind their norm."""
    module = randomize(CrossAttention(C, H, layout="llama", qk_norm="rms")).to(device)
    x, first, second = (randn(B, n, C).to(device) for n in (3, 5, 4))
    kept: list[Tensor] = []

    def cached(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        parts = [kept[:2], [k, v]] if kept else [[k, v]]
        kept[:] = [torch.cat(both, 1) for both in zip(*parts, strict=True)]
        return kept[0], kept[1]

    module(x, first, cached=cached)
    exact = copy.deepcopy(module).double()(x.double(), torch.cat((first, second), 1).double())
    assert compare(module(x, second, cached=cached), exact, "module")


def test_timm_pool_attention() -> None:
    timm_layers = pytest.importorskip("timm.layers", reason="timm imports only beside a torchvision for this torch")
    theirs = timm_layers.AttentionPoolLatent(C, num_heads=H, latent_len=4, pool_type="")
    # What is left without the latent and the feed-forward is the attention.
    del theirs.latent
    theirs.mlp = None

    def call_theirs(module: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        module.latent = x
        return module(context)

    ours = CrossAttention(C, H, layout="timm_pool")
    check_parity(ours, theirs, lambda m, x, context: m(x, context), call_theirs, randn(1, 4, C), randn(B, S, C))


class FlamingoAttention(nn.Module):
    """The projections of Flamingo's cross-attention as open_flamingo stores them, around torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.to_q = nn.Linear(C, 4 * D, bias=False)
        self.to_kv = nn.Linear(40, 2 * 4 * D, bias=False)
        self.to_out = nn.Linear(4 * D, C, bias=False)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        q, k, v = self.to_q(x), *self.to_kv(context).chunk(2, dim=-1)
        q, k, v = (t.unflatten(-1, (4, D)).transpose(1, 2) for t in (q, k, v))
        return self.to_out(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_flamingo_layout() -> None:
    ours = CrossAttention(C, 4, head_dim=D, context_dim=40, layout="flamingo", bias=False)
    check_parity(ours, FlamingoAttention(), lambda m, x, c: m(x, c), lambda m, x, c: m(x, c), randn(B, 5, C), randn(B, S, 40))


@pytest.mark.parametrize("case", ["heads", "grouped", "packed", "itself", "hooked key"])
def test_gradient_of_the_values_bias(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It comes from the result where every query sees a key; with ranges, of all keys, from the projection."""
    calls, apply = [], _ValueBias.apply
    monkeypatch.setattr(_ValueBias, "apply", lambda *arguments: calls.append(1) or apply(*arguments))
    module = randomize(CrossAttention(32, 4, 2 if case == "grouped" else 4, context_dim=32, layout="llama", device=DEVICE))
    x, context = randn(2, 5, 32).to(DEVICE), randn(2, 9, 32).to(DEVICE)
    if case == "packed":
        x, context = x[0], context[0]
    elif case == "itself":
        context = x
    elif case == "hooked key":
        module.k_proj.register_forward_hook(lambda *_: None)
    cotangent = torch.randn_like(x)
    names = [name for name, _ in module.named_parameters() if name != "k_proj.bias"]  # which a softmax does not see
    got = torch.autograd.grad(module(x, context), [module.get_parameter(name) for name in names], cotangent)
    assert len(calls) == 1
    wide, queries = copy.deepcopy(module).double(), x.shape[-2]
    everything = KeyRanges.key_padding(queries, lengths=torch.full((1,), context.shape[-2], device=DEVICE))
    y = wide(x.double(), context.double(), everything)
    exact = torch.autograd.grad(y, [wide.get_parameter(name) for name in names], cotangent.double())
    assert len(calls) == 1
    for name, value, right in zip(names, got, exact, strict=True):
        assert compare(value, right, "module"), name


def test_a_hook_on_the_values_is_called() -> None:
    module, seen = randomize(CrossAttention(C, H)), []
    module.value.register_forward_hook(lambda *_: seen.append(1))
    module(randn(B, 5, C), randn(B, S, C))
    assert seen == [1]


def test_the_values_bias_of_no_keys_has_no_gradient() -> None:
    module = randomize(CrossAttention(C, H))
    with use_backend("reference"):
        (gradient,) = torch.autograd.grad(module(randn(B, 5, C), randn(B, 0, C)).sum(), module.value.bias)
    assert not gradient.any()


def test_one_context_for_a_batch_of_queries() -> None:
    module = randomize(CrossAttention(C, H, layout="clip"))
    x, context = randn(3, 5, C), randn(1, S, C)
    exact = copy.deepcopy(module).double()(x.double(), context.double().expand(3, -1, -1))
    assert compare(module(x, context), exact, "module")
    assert compare(module(x, context.expand(3, -1, -1)), exact, "module")


def test_packed_cross_attention_reads_its_own_image(device: torch.device) -> None:
    module = randomize(CrossAttention(C, H, layout="clip"))
    x, context = randn(6, C), randn(10, C)
    start, stop = torch.tensor([0, 0, 0, 4, 4, 4]), torch.tensor([4, 4, 4, 10, 10, 10])
    ranges = KeyRanges(start[None].int(), stop[None].int()).to(device)
    out = module(x, context, ranges)
    changed = context.clone()
    changed[4:] += 1
    again = module(x, changed, ranges)
    assert torch.equal(out[:3], again[:3])
    assert not torch.equal(out[3:], again[3:])


@pytest.mark.parametrize("module", ["separate", "fused", "cross"])
def test_module_behaviour(module: str, device: torch.device) -> None:
    if module == "cross":
        check_module(
            CrossAttention(C, H, context_dim=40),
            lambda m, x, c: m(x, c),
            randn(1, 5, C),
            randn(B, S, 40),
            zero_gradients=("key.bias",),
        )
    elif module == "fused":
        ranges = KeyRanges.packed(torch.tensor([0, 5, S], dtype=torch.int32, device=device), S)
        tables = half(rope_tables(S, device))
        ours = SelfAttention(C, H, layout="timm", qk_norm="gemma")
        check_module(ours, lambda m, x: m(x, ranges, tables), randn(S, C))
    else:
        check_module(SelfAttention(C, 4, 2, D, causal=True), lambda m, x: m(x), randn(B, S, C), zero_gradients=("k_proj.bias",))


class NormedRotaryAttention(nn.Module):
    """LayerNorm on q and k, then the rotary embedding of transformers, around torch's attention."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(C, C) for _ in range(4))
        self.q_norm, self.k_norm = nn.LayerNorm(D, eps=1e-6), nn.LayerNorm(D, eps=1e-6)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        q, k, v = (y(x).unflatten(-1, (H, D)).transpose(1, 2) for y in (self.q_proj, self.k_proj, self.v_proj))
        q, k = apply_rotary_pos_emb(self.q_norm(q), self.k_norm(k), *(t.to(x.dtype) for t in tables))
        return self.out_proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_layer_norm_comes_before_the_rotation(device: torch.device) -> None:
    tables = rope_tables(S, device)
    check_parity(
        SelfAttention(C, H, qk_norm="layer"),
        NormedRotaryAttention(),
        lambda m, x: m(x, rope=half(tables)),
        lambda m, x: m(x, tables),
        randn(B, S, C),
    )


@pytest.mark.parametrize("qk_norm", ["rms", "gemma", "layer"])
def test_norm_alone_is_norm_with_a_rotation_by_nothing(qk_norm: str, device: torch.device) -> None:
    module = randomize(SelfAttention(C, H, qk_norm=qk_norm))
    x, zeros = randn(B, S, C), torch.zeros(1, S, D // 2, device=device)
    exact = copy.deepcopy(module).double()(x.double(), rope=(zeros.double() + 1, zeros.double()))
    assert compare(module(x), exact, "module")


def test_nothing_to_attend() -> None:
    with use_backend("reference"):
        assert SelfAttention(C, H)(torch.zeros(0, S, C)).shape == (0, S, C)
        assert SelfAttention(C, H, layout="timm", qk_norm="rms")(torch.zeros(0, C)).shape == (0, C)
        assert CrossAttention(C, H)(torch.zeros(1, 4, C), torch.zeros(0, S, C)).shape == (0, 4, C)


def test_attention_dropout_cannot_train() -> None:
    module = randomize(SelfAttention(C, H, attention_dropout=0.1))
    assert module(randn(B, S, C)).shape == (B, S, C)
    module.train()
    with pytest.raises(ValueError, match=r"attention_dropout: got 0\.1"):
        module(randn(B, S, C))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: SelfAttention(C, 5), "embed_dim"),
        (lambda: SelfAttention(C, 4, 3), "num_kv_heads"),
        (lambda: SelfAttention(16, 0), "num_kv_heads"),
        (lambda: SelfAttention(C, H, layout="no such"), "layout"),
        (lambda: SelfAttention(C, H, qk_norm="batch"), "qk_norm"),
        (lambda: CrossAttention(C, H, layout="timm"), "layout"),
        (lambda: CrossAttention(C, H, context_dim=C + 1, layout="timm"), "layout"),
        (lambda: AttentionLayout((), "out"), "projections"),
        (lambda: SelfAttention(C, H)(torch.zeros(1, 2, C + 1)), "x"),
        (lambda: SelfAttention(C, H)(torch.zeros(1, 1, 2, C)), "x"),
        (lambda: CrossAttention(C, H)(torch.zeros(1, 2, C), torch.zeros(2, C)), "context"),
        (lambda: CrossAttention(C, H)(torch.zeros(2, 2, C), torch.zeros(3, 2, C)), "context"),
    ],
)
def test_refusals(build: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*, wanted "):
        build()


def test_with_a_cache() -> None:
    """Tokens in two calls, the second with the keys and values of the first, are those of one causal call."""
    layer = randomize(SelfAttention(64, 4, 2, layout="llama", causal=True)).to(DEVICE)
    x = torch.randn(2, 9, 64, device=DEVICE)
    kept: list[Tensor] = []

    def cached(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        kept[:] = [torch.cat([old, new], dim=1) for old, new in zip(kept, (k, v), strict=True)] if kept else [k, v]
        return kept[0], kept[1]

    with torch.no_grad():
        parts = [layer(x[:, begin:end], cached=cached) for begin, end in ((0, 6), (6, 9))]
        assert kept[0].shape == (2, 9, 2, 16)
        assert compare(torch.cat(parts, dim=1), layer(x).double(), "module")

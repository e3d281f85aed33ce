# SPDX-License-Identifier: Apache-2.0
"""accelerate on open_clip: its towers, which are built of ``nn.MultiheadAttention``, and its losses."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate_parity import Results, check, count_calls
from conftest import DEVICE
from nn_parity import quick_backend, randomize
from torch import Tensor, nn

from vlmkernels import accelerate, restore
from vlmkernels.bench.towers import _hide_broken_torchvision
from vlmkernels.testing import compare

__all__ = ["quick_backend"]


def features(count: int = 5) -> tuple[Tensor, Tensor]:
    image, text = (nn.functional.normalize(torch.randn(count, 16, device=DEVICE), dim=-1) for _ in range(2))
    return image, text


@pytest.fixture
def open_clip() -> Any:
    _hide_broken_torchvision()
    try:
        import open_clip as found
    except (ImportError, RuntimeError) as error:  # not installed, or without torchvision
        pytest.skip(f"open_clip does not import: {error}")
    return found


def results(model: Any, dtype: torch.dtype, pixels: Tensor, ids: Tensor) -> Results:
    model.zero_grad()
    image, text, scale = model(pixels.to(dtype), ids)[:3]
    (image @ text.t() * scale).square().sum().backward()
    return {"image": image.detach(), "text": text.detach(), **{name: p.grad.clone() for name, p in model.named_parameters()}}


@pytest.mark.parametrize("norm", [True, False])
def test_both_towers(open_clip: Any, norm: bool) -> None:
    vision = open_clip.CLIPVisionCfg(layers=2, width=64, head_width=16, patch_size=8, image_size=32, no_ln_pre=not norm)
    text = open_clip.CLIPTextCfg(context_length=9, vocab_size=60, width=64, heads=4, layers=2)
    model = randomize(open_clip.model.CLIP(32, vision, text)).to(DEVICE).eval()
    given = torch.randn(3, 3, 32, 32, device=DEVICE), torch.randint(5, 50, (3, 9), device=DEVICE)
    wanted = results(copy.deepcopy(model).double(), torch.float64, *given), results(model, torch.float32, *given)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    report = accelerate(model, verify={"image": given[0], "text": given[1]})
    layers = {"MultiheadAttention": 4, "ResidualAttentionBlock": 4}
    assert Counter(row.layer for row in report.replaced) == {"VisionTransformer": 1, **layers}
    assert all(row.errors and row.errors.ours < 1e-5 for row in report.replaced if row.layer in layers)
    calls = count_calls(model)
    check(results(model, torch.float32, *given), wanted)
    assert all(calls[row.name] == 1 for row in report.replaced), "the causal mask of the text is ranges"
    assert model.state_dict().keys() == state.keys() and all(torch.equal(x, state[k]) for k, x in model.state_dict().items())
    assert restore(model) == len(report.replaced)
    check(results(model, torch.float32, *given), wanted)


def test_what_is_left(open_clip: Any) -> None:
    block = open_clip.transformer.ResidualAttentionBlock
    for made, reason in (
        (block(64, 4, ls_init_value=0.1), "it scales what its halves add, or reads other tokens"),
        (block(64, 4, is_cross_attention=True), "it scales what its halves add, or reads other tokens"),
        (block(64, 4, act_layer=nn.Tanh), "its activation is Tanh"),
        (block(64, 4, norm_layer=open_clip.transformer.LayerNormFp32), "its norms are LayerNormFp32 and LayerNormFp32"),
    ):
        assert [row.reason for row in accelerate(made).left if row.layer == "ResidualAttentionBlock"] == [reason]


def block_of(open_clip: Any) -> tuple[Any, Tensor]:
    layer = randomize(open_clip.transformer.ResidualAttentionBlock(64, 4)).to(DEVICE).eval()
    return layer, torch.randn(2, 6, 64, device=DEVICE)


@pytest.mark.parametrize("where", ["ln_1", "attn", "ls_1", "mlp", "mlp.c_fc", "mlp.gelu", "mlp.c_proj", "ls_2"])
def test_hooks_inside_a_block(open_clip: Any, where: str) -> None:
    """Whoever waits for a call of a layer gets it, and may change what it returns."""
    block, x = block_of(open_clip)
    accelerate(block)
    calls = count_calls(block)

    def thrice(module: Any, args: Any, output: Any) -> Any:
        return (3 * output[0], None) if isinstance(output, tuple) else 3 * output

    with torch.no_grad():
        plain = block(x)
        block.get_submodule(where).register_forward_hook(thrice)
        got = block(x)
        assert calls[""] == 1 + (where == "mlp.c_fc"), "the first layer of the feed-forward is called by ours"
        assert not compare(got, plain.double(), "module")
        restore(block)
        assert compare(got, block(x).double(), "module")


def test_calls_of_a_block(open_clip: Any) -> None:
    """Other keys, another feed-forward in its place, and a mask."""
    block, x = block_of(open_clip)
    mask, other = torch.full((6, 6), -torch.inf, device=DEVICE).triu(1), torch.randn(2, 6, 64, device=DEVICE)
    with torch.no_grad():
        wanted = block(x, attn_mask=mask), block(x, other, other), block(x)
        accelerate(block)
        calls = count_calls(block)
        got = block(x, attn_mask=mask), block(x, other, other), block(x)
        assert calls[""] == 2 and all(compare(a, b.double(), "module") for a, b in zip(got, wanted, strict=True))
        block.mlp = nn.Identity()
        assert not compare(block(x), wanted[2].double(), "module") and calls[""] == 2


def test_losses(open_clip: Any) -> None:
    for made, bias in ((open_clip.loss.ClipLoss(), None), (open_clip.loss.SigLipLoss(), torch.tensor(-3.0, device=DEVICE))):
        image, text = (x.requires_grad_() for x in features())
        scale = torch.tensor(9.0, device=DEVICE, requires_grad=True)
        wanted = made(image.double(), text.double(), scale.double(), bias)
        exact = torch.autograd.grad(wanted, (image, text, scale))
        report = accelerate(made)
        assert [row.layer for row in report.replaced] == [type(made).__name__]
        calls = count_calls(made)
        loss = made(image, text, scale, bias, output_dict=True)["contrastive_loss"]
        assert compare(loss, wanted.detach(), "model")
        for got, gradient in zip(torch.autograd.grad(loss, (image, text, scale)), exact, strict=True):
            assert compare(got, gradient.double(), "model")
        assert calls[""] == 1 and restore(made) == 1
    clip = open_clip.loss.ClipLoss()
    accelerate(clip)
    calls = count_calls(clip)
    assert torch.isfinite(clip(*features(), 9.0, torch.tensor(1.0, device=DEVICE))) and not calls, "a bias is the original's"
    left = accelerate(open_clip.loss.SigLipLoss(rank=0, world_size=2)).left
    assert [row.reason.partition(";")[0] for row in left] == ["a rank returns its share of the loss there"]


def test_attention_of_torch() -> None:
    """The calls that stay: other keys, weights, padding, masks of each head or with holes, dropout, a batch that comes second."""
    layer = randomize(nn.MultiheadAttention(64, 4, batch_first=True, dropout=0.5)).to(DEVICE).eval()
    x, other = torch.randn(2, 6, 64, device=DEVICE), torch.randn(2, 6, 64, device=DEVICE)
    tril = torch.ones(6, 6, device=DEVICE).tril().bool()
    hole = ~torch.eye(6, device=DEVICE).roll(2, 1).bool()
    padding = torch.zeros(2, 6, device=DEVICE).bool()
    served: list[dict[str, Any]] = [
        {},
        {"attn_mask": ~tril},
        {"attn_mask": torch.zeros(6, 6, device=DEVICE).masked_fill(~tril, -torch.inf)},
    ]
    stay: list[dict[str, Any]] = [{"attn_mask": ~hole}, {"attn_mask": torch.randn(6, 6, device=DEVICE)}, {"need_weights": True}]
    stay += [{"key_padding_mask": padding}, {"attn_mask": (~tril).expand(8, -1, -1)}]

    def outputs() -> list[Tensor]:
        found = [layer(x, x, x, **{"need_weights": False, **given})[0] for given in (*served, *stay)]
        return [*found, layer(x, other, other, need_weights=False)[0]]

    with torch.no_grad():
        wanted = outputs()
        (row,) = accelerate(layer).replaced
        assert row.module == "InProjectedAttention"
        calls = count_calls(layer)
        got = outputs()
    assert calls[""] == len(served)
    assert all(compare(a, b.double(), "module") for a, b in zip(got, wanted, strict=True))
    layer.train()(x, x, x, need_weights=False)
    assert calls[""] == len(served), "dropout of attention weights is the original's"
    other_keys = nn.MultiheadAttention(64, 4, kdim=32, batch_first=True)
    for kept in (nn.MultiheadAttention(64, 4), other_keys):
        (reason,) = [row.reason for row in accelerate(kept).left if row.layer == "MultiheadAttention"]
        assert reason == "its keys have other sizes or additions, or its batch comes second"

# SPDX-License-Identifier: Apache-2.0
"""MllamaCrossAttention against the cross-attention of Llama-3.2-Vision in transformers, with the masks that it makes itself."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from nn_parity import check_module, check_parity, quick_backend, randn, randomize
from torch import Tensor, nn
from transformers.models.mllama import processing_mllama as processing
from transformers.models.mllama.configuration_mllama import MllamaTextConfig
from transformers.models.mllama.modeling_mllama import (
    MllamaCrossAttentionDecoderLayer,
    MllamaTextCrossAttention,
    _prepare_cross_attention_mask,
)

from vlmkernels.masks import KeyRanges, compact_keys
from vlmkernels.nn import MllamaCrossAttention
from vlmkernels.ops._op import use_backend
from vlmkernels.testing.compare import compare

__all__ = ["quick_backend"]
B, S, C, H, TILES, TILE = 2, 11, 52, 4, 4, 5
IMAGE = 63


def config(implementation: str = "sdpa", num_kv_heads: int = 2) -> MllamaTextConfig:
    made = MllamaTextConfig(
        hidden_size=C,
        num_attention_heads=H,
        num_key_value_heads=num_kv_heads,
        num_hidden_layers=1,
        intermediate_size=40,
        rms_norm_eps=1e-3,
    )
    made._attn_implementation = implementation
    return made


def theirs(*arguments: Any) -> MllamaTextCrossAttention:
    return MllamaTextCrossAttention(config(*arguments), 0)


def ours(num_kv_heads: int = 2, **arguments: Any) -> MllamaCrossAttention:
    return MllamaCrossAttention(C, H, num_kv_heads, norm_eps=1e-3, **arguments)


class Case(NamedTuple):
    """The masks of transformers, ``[B, 1, S, Sk]`` and ``[B, 1, S, 1]``; the order of keys and the ranges in their place."""

    mask: Tensor
    row_mask: Tensor
    order: Tensor
    ranges: KeyRanges

    def compact(self, context: Tensor) -> Tensor:
        return context.gather(1, self.order[..., None].expand_as(context))


#: The places of the image tokens of each sample, and the tiles of each of these images.
CASES = {
    "all tiles": ([[0, 4, 5], [2, 3, 9]], [[4, 4, 4], [4, 4, 4]]),
    "padded tiles": ([[0, 4, 5], [2, 3, 9]], [[1, 4, 2], [3, 2, 1]]),
    "fewer images": ([[6], [3, 4]], [[3], [4, 1]]),
    "a sample without images": ([[1, 2], []], [[2, 3], []]),
}


def case(name: str, device: torch.device) -> Case:
    places, tiles = CASES[name]
    ids = torch.zeros(B, S, dtype=torch.int64)
    for row, at in enumerate(places):
        ids[row, at] = IMAGE
    spans = [processing.get_cross_attention_token_mask(row, IMAGE) for row in ids.tolist()]
    sees = torch.from_numpy(processing.convert_sparse_cross_attention_mask_to_dense(spans, tiles, TILES, S))
    mask, row_mask = _prepare_cross_attention_mask(sees, TILE, torch.float32)
    valid = torch.zeros(B, sees.shape[2], TILES, TILE, dtype=torch.bool)
    for row, counts in enumerate(tiles):
        for image, count in enumerate(counts):
            valid[row, image, :count] = True
    order, key_start, key_stop = compact_keys(valid.flatten(2))
    ranges = KeyRanges.mllama(ids == IMAGE, key_start, key_stop)
    return Case(mask.to(device), row_mask.to(device), order.to(device), ranges.to(device))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("name", CASES)
def test_images(name: str, implementation: str, device: torch.device) -> None:
    made = case(name, device)
    assert (made.row_mask == 0).any()
    check_parity(
        ours(),
        theirs(implementation),
        lambda m, x, context: m(x, made.compact(context), made.ranges),
        lambda m, x, context: m(x, context, attention_mask=made.mask.to(x.dtype))[0],
        randn(B, S, C),
        randn(B, made.order.shape[1], C),
    )


@pytest.mark.parametrize("num_kv_heads", [1, 4])
def test_heads(num_kv_heads: int, device: torch.device) -> None:
    made = case("padded tiles", device)
    check_parity(
        ours(num_kv_heads),
        theirs("sdpa", num_kv_heads),
        lambda m, x, context: m(x, made.compact(context), made.ranges),
        lambda m, x, context: m(x, context, attention_mask=made.mask.to(x.dtype))[0],
        randn(B, S, C),
        randn(B, made.order.shape[1], C),
    )


@pytest.mark.parametrize("name", ["padded tiles", "a sample without images"])
def test_nothing_for_text_without_an_image(name: str, device: torch.device) -> None:
    """Meta multiplies the heads with the row mask; without a bias behind it that is the output multiplied."""
    made = case(name, device)
    module, x, context = ours(no_image="nothing"), randn(B, S, C), randn(B, made.order.shape[1], C)
    check_parity(
        module,
        theirs(),
        lambda m, x, context: m(x, made.compact(context), made.ranges),
        lambda m, x, context: m(x, context, attention_mask=made.mask.to(x.dtype))[0] * made.row_mask[:, 0].to(x.dtype),
        x,
        context,
    )
    blind = made.row_mask[:, 0, :, 0] == 0
    assert blind.any() and not module(x, made.compact(context), made.ranges)[blind].any()


class InTheirLayer(MllamaCrossAttention):
    """The arguments and results that the layer of transformers expects, with ranges where it passes its mask on."""

    def forward(self, hidden_states: Tensor, cross_attention_states: Tensor, attention_mask: KeyRanges, **_: Any) -> Any:
        return super().forward(hidden_states, cross_attention_states, attention_mask), None


@pytest.mark.parametrize("name", CASES)
def test_in_the_layer_around_it(name: str, device: torch.device) -> None:
    """With the row mask from the ranges, as the docstring gives it, for the feed-forward."""
    made = case(name, device)
    row_mask = (made.ranges.stop > made.ranges.start)[:, None, :, None]
    assert torch.equal(row_mask, made.row_mask != 0)
    layer = MllamaCrossAttentionDecoderLayer(config(), 0)
    layer.cross_attn = InTheirLayer(C, H, 2, norm_eps=1e-3)
    check_parity(
        layer,
        MllamaCrossAttentionDecoderLayer(config(), 0),
        lambda m, x, context: m(x, made.compact(context), made.ranges, None, row_mask),
        lambda m, x, context: m(x, context, made.mask.to(x.dtype), None, made.row_mask.to(x.dtype)),
        randn(B, S, C),
        randn(B, made.order.shape[1], C),
    )


@pytest.mark.parametrize("batch", [1, B])
def test_without_ranges(batch: int) -> None:
    check_parity(
        ours(),
        theirs("eager"),
        lambda m, x, context: m(x, context),
        lambda m, x, context: m(x, context.expand(B, -1, -1))[0],
        randn(B, 3, C),
        randn(batch, 17, C),
    )


def test_ranges_beside_the_keys_are_empty(device: torch.device) -> None:
    module, x, context = randomize(ours()), randn(1, 4, C), randn(1, 9, C)
    start, stop = torch.tensor([[9, -5, 4, 0]]), torch.tensor([[12, 0, 2, 9]])
    beside = KeyRanges(start.int(), stop.int()).to(device)
    out = module(x, context, beside)
    assert compare(out, module.double()(x.double(), context.double()), "module")


def test_packed_text(device: torch.device) -> None:
    """Two samples in a row, of which the second has no image."""
    module, x, context = randomize(ours(no_image="nothing")), randn(7, C), randn(9, C)
    start, stop = torch.zeros(1, 7, dtype=torch.int32), torch.tensor([[0, 9, 9, 9, 0, 0, 0]], dtype=torch.int32)
    out = module(x, context, KeyRanges(start, stop).to(device))
    assert out.shape == (7, C) and not out[0].any() and not out[4:].any()
    assert compare(out[1:4], module.double()(x[None, 1:4].double(), context[None].double())[0], "module")


@pytest.mark.parametrize("no_image", ["everything", "nothing"])
def test_module_behaviour(no_image: str, device: torch.device) -> None:
    made = case("padded tiles", device)

    def call(module: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        return module(x, context, made.ranges)

    check_module(ours(no_image=no_image), call, randn(B, S, C), randn(B, made.order.shape[1], C))


def test_no_keys_at_all(device: torch.device) -> None:
    ranges = KeyRanges.full(S, 0, device=device)
    with use_backend("reference"):
        assert not randomize(ours())(randn(B, S, C), randn(B, 0, C), ranges).any()


def test_attention_dropout_cannot_train() -> None:
    module = randomize(ours(attention_dropout=0.1))
    assert module(randn(B, S, C), randn(B, 9, C)).shape == (B, S, C)
    module.train()
    with pytest.raises(ValueError, match=r"attention_dropout: got 0\.1"):
        module(randn(B, S, C), randn(B, 9, C))


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: MllamaCrossAttention(C, H, 3), "num_kv_heads"),
        (lambda: MllamaCrossAttention(C, 5, 1), "embed_dim"),
        (lambda: ours(no_image="zeros"), "no_image"),
        (lambda: ours()(torch.zeros(S, C), torch.zeros(9, C), KeyRanges.full(S, 9)), "x"),
        (lambda: ours()(torch.zeros(B, S, C + 1), torch.zeros(B, 9, C)), "x"),
        (lambda: ours()(torch.zeros(B, S, C), torch.zeros(9)), "context"),
        (lambda: ours()(torch.zeros(B, S, C), torch.zeros(B, 9, C + 1)), "context"),
        (lambda: ours()(torch.zeros(B, S, C), torch.zeros(3, 9, C)), "context"),
        (lambda: ours()(torch.zeros(B, S, C), torch.zeros(B, 9, C), KeyRanges.full(S - 1, 9)), "ranges"),
    ],
)
def test_refusals(build: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*, wanted "):
        build()

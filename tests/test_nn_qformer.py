# SPDX-License-Identifier: Apache-2.0
"""QFormerLayer against the Q-Former layers of BLIP-2 and InstructBLIP in transformers, in every mode they run in."""

from typing import Any

import pytest
import torch
import transformers
from nn_parity import check_module, check_parity, quick_backend, randn, randomize, share_weights
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerLayer
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerLayer

from vlmkernels import KeyRanges
from vlmkernels.nn import QFormerLayer, _feed_forward, qformer
from vlmkernels.testing import compare

__all__ = ["quick_backend"]
B, Q, T, C, H, INNER, KEYS, WIDTH = 2, 6, 5, 48, 3, 80, 17, 40
ZERO = ("attention.attention.key.bias", "crossattention.attention.key.bias")


def theirs(kind: str = "Blip2", layer_idx: int = 0, implementation: str = "sdpa", **more: Any) -> nn.Module:
    config = getattr(transformers, f"{kind}QFormerConfig")(
        hidden_size=C,
        num_attention_heads=H,
        intermediate_size=INNER,
        encoder_hidden_size=WIDTH,
        **({"use_qformer_text_input": True} if kind == "Blip2" else {}) | more,
    )
    config._attn_implementation = implementation
    return {"Blip2": Blip2QFormerLayer, "InstructBlip": InstructBlipQFormerLayer}[kind](config, layer_idx)


def ours(**arguments: Any) -> QFormerLayer:
    return QFormerLayer(C, H, INNER, context_dim=WIDTH, **arguments)


@pytest.mark.parametrize(
    ("task", "layer_idx", "kind"),
    [("itc", 0, "Blip2"), ("itm", 0, "Blip2"), ("itg", 0, "Blip2"), ("itm", 1, "Blip2"), ("itm", 0, "InstructBlip")],
)
def test_queries_and_text(task: str, layer_idx: int, kind: str, device: torch.device) -> None:
    lengths = torch.tensor([T, 3], device=device)
    ranges = KeyRanges.qformer(task, Q, T, text_lengths=lengths)
    mask = ranges.dense(Q + T)[:, None]
    check_parity(
        ours(cross_attention=layer_idx == 0),
        theirs(kind, layer_idx),
        lambda m, x, context: m(x, ranges, context, None, Q),
        lambda m, x, context: m(x, mask, context, None, Q),
        randn(B, Q + T, C),
        randn(B, KEYS, WIDTH),
        zero_gradients=ZERO,
    )


def test_queries_alone() -> None:
    check_parity(
        ours(text=False),
        theirs(use_qformer_text_input=False),
        lambda m, x, context: m(x, context=context, query_length=Q),
        lambda m, x, context: m(x, encoder_hidden_states=context, query_length=Q),
        randn(B, Q, C),
        randn(B, KEYS, WIDTH),
        zero_gradients=ZERO,
    )


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_learned_queries_serve_a_batch_of_images(implementation: str) -> None:
    check_parity(
        ours(text=False),
        theirs(implementation=implementation, use_qformer_text_input=False),
        lambda m, x, context: m(x, context=context, query_length=Q),
        lambda m, x, context: m(x, encoder_hidden_states=context, query_length=Q),
        randn(1, Q, C),
        randn(3, KEYS, WIDTH),
        zero_gradients=ZERO,
    )


def test_text_alone(device: torch.device) -> None:
    ranges = KeyRanges.key_padding(T, lengths=torch.tensor([T, 2], device=device))
    mask = ranges.dense(T)[:, None]
    check_parity(
        ours(),
        theirs(),
        lambda m, x: m(x, ranges),
        lambda m, x: m(x, mask),
        randn(B, T, C),
        zero_gradients=ZERO,
    )


def test_padded_image_tokens(device: torch.device) -> None:
    ranges = KeyRanges.key_padding(Q, lengths=torch.tensor([KEYS, 9], device=device))
    mask = ranges.dense(KEYS)[:, None]
    check_parity(
        ours(text=False),
        theirs(use_qformer_text_input=False),
        lambda m, x, context: m(x, None, context, ranges, Q),
        lambda m, x, context: m(x, None, context, mask, Q),
        randn(B, Q, C),
        randn(B, KEYS, WIDTH),
        zero_gradients=ZERO,
    )


def test_dropout_falls_where_theirs_does() -> None:
    """Dropping everything is the one dropout without chance: each block then passes its residual to its norm."""
    mine, reference = ours(dropout=1.0), theirs(hidden_dropout_prob=1.0, attention_probs_dropout_prob=0.0)
    randomize(reference)
    share_weights(mine, reference)
    x, context = randn(B, Q + T, C), randn(B, KEYS, WIDTH)
    training = mine.train()(x, None, context, None, Q)
    assert torch.equal(training, reference.train()(x, None, context, None, Q))
    assert not torch.equal(training, mine.eval()(x, None, context, None, Q))


def test_attention_dropout_cannot_train() -> None:
    layer = randomize(ours(attention_dropout=0.1))
    x, context = randn(B, Q, C), randn(B, KEYS, WIDTH)
    assert layer(x, context=context, query_length=Q).shape == (B, Q, C)
    layer.train()
    with pytest.raises(ValueError, match=r"attention_dropout: got 0\.1"):
        layer(x, context=context, query_length=Q)


def test_module_behaviour(device: torch.device) -> None:
    ranges = KeyRanges.qformer("itg", Q, T, device=device)

    def call(layer: nn.Module, x: Tensor, context: Tensor) -> Tensor:
        return layer(x, ranges, context, None, Q)

    check_module(ours(), call, randn(B, Q + T, C), randn(B, KEYS, WIDTH), zero_gradients=ZERO)


FUSED = ("activated_linear", "linear_add_norm")


@pytest.mark.parametrize(("few", "nodes"), [(64, [1, 1, 0, 1]), (0, [0])])
def test_compiled_graphs_have_them(few: int, nodes: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a break, as if the tensors were on a GPU."""
    found: list[int] = []

    def compiler(graph: torch.fx.GraphModule, inputs: object) -> Any:
        found.extend(i for node in graph.graph.nodes for i in (0, 1) if f"{FUSED[i]}_fwd" in str(node.target))
        return graph.forward

    monkeypatch.setattr(qformer, "inference", lambda x, *layers: True)
    monkeypatch.setattr(qformer, "_FEW", few)
    layer = randomize(ours(text=False)).eval().requires_grad_(False)
    x, context = randn(B, Q, C), randn(B, KEYS, WIDTH)
    got = torch.compile(layer, backend=compiler, fullgraph=True, dynamic=False)(x, None, context, None, Q)
    assert found == nodes
    assert compare(got, layer.double()(x.double(), None, context.double(), None, Q), "model")


@pytest.mark.gpu
@pytest.mark.parametrize(("batch", "calls"), [(1, 4), (B, 4), (40, 1), (200, 1)])
@pytest.mark.parametrize("compiled", [False, True])
def test_products_with_what_follows_them(batch: int, calls: int, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """One operator where nothing learns: for few rows sum and norm too, else GELU alone. Hooked layers run by themselves."""
    made: list[str] = []

    def noted(module: Any, name: str) -> None:
        call = getattr(module, name)

        def run(*arguments: Any, **more: Any) -> Tensor:
            made.append(name)
            return call(*arguments, **more)  # type: ignore[no-any-return]

        monkeypatch.setattr(module, name, run)

    layer = randomize(ours(text=False)).eval().to("cuda", torch.bfloat16)
    x, context = randn(batch, Q, C).to("cuda", torch.bfloat16), randn(batch, KEYS, WIDTH).to("cuda", torch.bfloat16)
    call = torch.compile(layer, fullgraph=True, dynamic=False) if compiled else layer
    if not compiled:
        noted(_feed_forward, "activated_linear")
        noted(qformer, "linear_add_norm")
    with torch.no_grad():
        got = call(x, None, context, None, Q)
    assert compiled or len(made) == calls
    wide = ours(text=False).eval().to("cuda", torch.float64)
    wide.load_state_dict(layer.state_dict())
    assert compare(got, wide(x.double(), None, context.double(), None, Q), "model")
    made.clear()
    layer.intermediate_query.dense.register_forward_hook(lambda *_: None)
    with torch.no_grad():
        layer(x, None, context, None, Q)
    assert "activated_linear" not in made
    made.clear()
    layer(x, None, context, None, Q).sum().backward()
    assert compiled or made == ["linear_add_norm"] * 3  # which has gradients


def test_refusals() -> None:
    x, context = torch.zeros(1, Q, C), torch.zeros(1, KEYS, WIDTH)
    with pytest.raises(ValueError, match="^context: got None"):
        ours()(x, query_length=Q)
    with pytest.raises(ValueError, match="^query_length: got 7"):
        ours()(x, context=context, query_length=Q + 1)
    with pytest.raises(ValueError, match="^query_length: got 4"):
        ours(text=False)(x, context=context, query_length=4)
    with pytest.raises(ValueError, match="^x: got"):
        ours()(torch.zeros(1, Q, C + 1))

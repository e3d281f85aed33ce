# SPDX-License-Identifier: Apache-2.0
"""QFormer against the Q-Formers of BLIP-2 and InstructBLIP in transformers, several layers deep."""

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import transformers
from conftest import DEVICE
from nn_parity import check, check_module, check_parity, quick_backend, randn, randomize, run, share_weights
from torch import Tensor, nn
from transformers.models.blip_2.modeling_blip_2 import Blip2QFormerModel
from transformers.models.instructblip.modeling_instructblip import InstructBlipQFormerModel

from vlmkernels import KeyRanges
from vlmkernels.nn import QFormer
from vlmkernels.testing.compare import compare

__all__ = ["quick_backend"]
B, Q, T, C, H, INNER, DEPTH, KEYS, WIDTH, WORDS, POSITIONS, PAD = 2, 6, 5, 48, 3, 80, 3, 17, 40, 11, 9, 4
ZERO = tuple(f"encoder.layer.{i}.{name}.attention.key.bias" for i in range(DEPTH) for name in ("attention", "crossattention"))
SIZES = {"hidden_size": C, "num_attention_heads": H, "intermediate_size": INNER, "num_hidden_layers": DEPTH}
MODELS = {"Blip2": Blip2QFormerModel, "InstructBlip": InstructBlipQFormerModel}


def separated(module: nn.Module) -> nn.Module:
    """Random weights under which the tokens stay apart, as those of a trained model do.

    Norms far from 1 and large biases leave a token little of its own. After a few post-norm layers all are alike, and gradients
    of q and k, which need their differences, are lost in the rounding of anybody's fp32: that of transformers too.
    """
    randomize(module)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if "norm" in name.lower() and name.endswith("weight"):
                parameter.mul_(0.4).add_(1)
            elif name.endswith("bias"):
                parameter.mul_(0.2)
            elif "dense" in name:
                parameter.mul_(0.25)
    return module


parity = partial(check_parity, zero_gradients=ZERO, prepare=separated)
behaviour = partial(check_module, zero_gradients=ZERO, prepare=separated)


def theirs(kind: str = "Blip2", **more: Any) -> nn.Module:
    words = {"vocab_size": WORDS, "max_position_embeddings": POSITIONS, "pad_token_id": PAD}
    text = {"use_qformer_text_input": True} if kind == "Blip2" else {}
    config = getattr(transformers, f"{kind}QFormerConfig")(encoder_hidden_size=WIDTH, **SIZES, **words, **text | more)
    config._attn_implementation = "sdpa"
    return MODELS[kind](config)


def ours(kind: str = "Blip2", depth: int = DEPTH, **arguments: Any) -> QFormer:
    words = {"vocab_size": WORDS, "num_positions": POSITIONS, "padding_idx": PAD} if kind == "InstructBlip" else {}
    return QFormer(C, H, INNER, depth, context_dim=WIDTH, **words, **arguments)


def of_blip2(ranges: KeyRanges | None = None, context_ranges: KeyRanges | None = None, repeat: int = 1) -> Callable[..., Tensor]:
    """A call of theirs: queries, embedded text and image tokens, the batch of 1 of learned queries repeated by the caller."""
    mask = None if ranges is None else ranges.dense(Q + T)[:, None]
    context_mask = None if context_ranges is None else context_ranges.dense(KEYS)[:, None]

    def call(model: nn.Module, queries: Tensor, context: Tensor, *text: Tensor) -> Tensor:
        x = torch.cat((queries.expand(repeat * queries.shape[0], -1, -1), *text), dim=1)
        return model(x, Q, mask, context, context_mask).last_hidden_state

    return call


@pytest.mark.parametrize("task", ["itc", "itm", "itg"])
def test_blip2_queries_and_text(task: str, device: torch.device) -> None:
    ranges = KeyRanges.qformer(task, Q, T, text_lengths=torch.tensor([T, 3], device=device))
    parity(
        ours(),
        theirs(),
        lambda m, queries, context, text: m(queries, context, text, ranges),
        of_blip2(ranges),
        randn(B, Q, C),
        randn(B, KEYS, WIDTH),
        randn(B, T, C),
    )


@pytest.mark.parametrize("frequency", [1, 2, 3])
def test_learned_queries_serve_a_batch_of_images(frequency: int) -> None:
    parity(
        ours(text=False, cross_attention_frequency=frequency),
        theirs(use_qformer_text_input=False, cross_attention_frequency=frequency),
        lambda m, queries, context: m(queries, context),
        of_blip2(repeat=3),
        randn(1, Q, C),
        randn(3, KEYS, WIDTH),
    )


def test_learned_queries_under_ranges_of_each_image(device: torch.device) -> None:
    ranges = KeyRanges.key_padding(Q, lengths=torch.tensor([Q, 3], device=device))
    mask = ranges.dense(Q)[:, None]
    parity(
        ours(text=False),
        theirs(use_qformer_text_input=False),
        lambda m, queries, context: m(queries, context, ranges=ranges),
        lambda m, queries, context: m(queries.expand(B, -1, -1), Q, mask, context).last_hidden_state,
        randn(1, Q, C),
        randn(B, KEYS, WIDTH),
    )


def test_first_self_attention_runs_once_for_learned_queries() -> None:
    module, seen = randomize(ours(text=False)), []
    for layer in module.encoder.layer:
        layer.attention.register_forward_hook(lambda _, arguments, __: seen.append(arguments[0].shape[0]))
    assert module(randn(1, Q, C), randn(3, KEYS, WIDTH)).shape == (3, Q, C)
    assert seen == [1, 3, 3]


@pytest.mark.parametrize("batches", [(1, 3, 3), (1, 3, 1), (3, 1, 1), (1, 1, 3)], ids=str)
def test_a_batch_of_one_serves_the_others(batches: tuple[int, int, int]) -> None:
    def repeated(m: nn.Module, *inputs: Tensor) -> Tensor:
        queries, context, text = (x.expand(3, -1, -1) for x in inputs)
        return of_blip2()(m, queries, context, text)

    inputs = (randn(batches[0], Q, C), randn(batches[1], KEYS, WIDTH), randn(batches[2], T, C))
    parity(ours(), theirs(), lambda m, *x: m(*x), repeated, *inputs)


def test_padded_image_tokens(device: torch.device) -> None:
    ranges = KeyRanges.key_padding(Q, lengths=torch.tensor([KEYS, 9], device=device))
    parity(
        ours(text=False),
        theirs(use_qformer_text_input=False),
        lambda m, queries, context: m(queries, context, context_ranges=ranges),
        of_blip2(context_ranges=ranges, repeat=B),
        randn(1, Q, C),
        randn(B, KEYS, WIDTH),
    )


def test_blip2_text_alone(device: torch.device) -> None:
    ranges = KeyRanges.key_padding(T, lengths=torch.tensor([T, 2], device=device))
    mask = ranges.dense(T)[:, None]
    parity(
        ours(),
        theirs(),
        lambda m, text: m(None, text=text, ranges=ranges),
        lambda m, text: m(text, 0, mask).last_hidden_state,
        randn(B, T, C),
    )


@pytest.mark.parametrize("padded", [False, True])
def test_instructblip(padded: bool, device: torch.device) -> None:
    """Its mask is one of padding, over queries and text; the word of the padding gets no gradient in either."""
    ids = torch.tensor([[1, 7, 3, 10, 7], [5, 2, PAD, PAD, PAD]], device=device)
    ranges = KeyRanges.qformer("itm", Q, T, text_mask=ids != PAD)
    context_ranges = KeyRanges.key_padding(Q, lengths=torch.tensor([9, KEYS], device=device)) if padded else None
    context_mask = context_ranges.dense(KEYS)[:, 0].long() if context_ranges else None
    mask = torch.cat((torch.ones(B, Q, device=device), ids != PAD), dim=1).long()

    def reference(m: nn.Module, queries: Tensor, context: Tensor) -> Tensor:
        return m(ids, mask, None, queries.expand(B, -1, -1), context, context_mask).last_hidden_state

    parity(
        ours("InstructBlip"),
        theirs("InstructBlip"),
        lambda m, queries, context: m(queries, context, ids, ranges, context_ranges),
        reference,
        randn(1, Q, C),
        randn(B, KEYS, WIDTH),
    )


def test_instructblip_without_text() -> None:
    parity(
        ours("InstructBlip"),
        theirs("InstructBlip"),
        lambda m, queries, context: m(queries, context),
        lambda m, x, context: m(None, query_embeds=x, encoder_hidden_states=context).last_hidden_state,
        randn(B, Q, C),
        randn(B, KEYS, WIDTH),
    )


@pytest.mark.parametrize(
    ("kind", "theirs_only", "ours_only"),
    [
        ("Blip2", {"use_qformer_text_input": False}, {"text": False}),
        ("Blip2", {"use_qformer_text_input": True}, {}),
        ("InstructBlip", {}, {"vocab_size": 30522}),
    ],
)
def test_defaults_are_those_of_the_configuration(kind: str, theirs_only: dict[str, Any], ours_only: dict[str, Any]) -> None:
    with torch.device("meta"):
        reference = MODELS[kind](getattr(transformers, f"{kind}QFormerConfig")(**theirs_only))
        found = QFormer(**ours_only)
    wanted = {name: value.shape for name, value in reference.state_dict().items()}
    assert {name: value.shape for name, value in found.state_dict().items()} == wanted


def test_dropout_draws_as_theirs_does() -> None:
    """One seed drops the same channels: as many dropouts of the same shapes, in the same order, other ones for each image."""
    rate = 0.4
    mine = ours(text=False, dropout=rate)
    reference = theirs(use_qformer_text_input=False, hidden_dropout_prob=rate, attention_probs_dropout_prob=0.0)
    separated(reference)
    share_weights(mine, reference)
    queries, context = randn(1, Q, C), randn(B, KEYS, WIDTH)
    torch.manual_seed(1)
    got = mine.train()(queries, context)
    torch.manual_seed(1)
    result = compare(got, of_blip2(repeat=B)(reference.train(), queries, context).double(), "module")
    assert result, result
    assert not compare(mine.eval()(queries, context), got.double(), "module")


def test_attention_dropout_cannot_train() -> None:
    module = randomize(ours(text=False, attention_dropout=0.1))
    assert module(randn(1, Q, C), randn(B, KEYS, WIDTH)).shape == (B, Q, C)
    with pytest.raises(ValueError, match=r"attention_dropout: got 0\.1"):
        module.train()(randn(1, Q, C), randn(B, KEYS, WIDTH))


@pytest.mark.parametrize("kind", MODELS)
def test_module_behaviour(kind: str, device: torch.device) -> None:
    ranges = KeyRanges.qformer("itg", Q, T, device=device)
    ids = torch.randint(WORDS, (B, T), device=device)

    def call(module: nn.Module, queries: Tensor, context: Tensor, *text: Tensor) -> Tensor:
        return module(queries, context, *(text or (ids,)), ranges)

    text = (randn(B, T, C),) if kind == "Blip2" else ()
    # One layer: its results are rounded six times, one after the other, and bf16 has a bound of three.
    behaviour(ours(kind, depth=1), call, randn(1, Q, C), randn(B, KEYS, WIDTH), *text)


def test_layers_compile_into_one_graph(device: torch.device) -> None:
    module, ids = separated(ours("InstructBlip")), torch.randint(WORDS, (B, T), device=device)
    inputs = (randn(1, Q, C), randn(B, KEYS, WIDTH))
    torch._dynamo.reset()
    compiled = torch.compile(lambda *x: module(*x, ids), fullgraph=True, backend="aot_eager")
    exact = run(copy.deepcopy(module).double(), lambda m, *x: m(*x, ids), tuple(x.double() for x in inputs), seed=1)
    check(run(module, lambda _, *x: compiled(*x), inputs, seed=1), exact, ZERO)


def test_refused_calls() -> None:
    queries, context, text = (torch.zeros(shape, device=DEVICE) for shape in ((2, Q, C), (2, KEYS, WIDTH), (2, T, C)))
    module, bare, instruct = (m.to(DEVICE) for m in (ours(), ours(text=False), ours("InstructBlip")))
    cases: list[tuple[str, nn.Module, tuple[Tensor | None, ...]]] = [
        ("queries, text: got None", module, (None,)),
        ("context: got None", module, (queries,)),
        (r"queries: got shape \(2, 6, 47\), wanted \[B, Q, 48\]", module, (queries[..., 1:], context)),
        (r"context: got shape \(2, 17, 39\), wanted \[B, S, 40\]", module, (queries, context[..., 1:])),
        (r"context: got shape \(17, 40\)", module, (queries, context[0])),
        (r"text: got shape \(2, 5, 47\), wanted \[B, T, 48\]", module, (queries, context, text[..., 1:])),
        ("context: got a batch of 3, wanted 2", module, (queries, context.repeat(2, 1, 1)[:3])),
        ("text: got a batch of 3, wanted 2", module, (queries, context, text.repeat(2, 1, 1)[:3])),
        (r"text: got shape \(2, 5, 48\), wanted None: with text=False", bare, (queries, context, text)),
        (r"text: got shape \(2, 5, 48\) of torch.float32, wanted token ids", instruct, (queries, context, text)),
        (
            "text: got 10 tokens, wanted at most 9",
            instruct,
            (queries, context, torch.zeros(2, 10, dtype=torch.int64, device=DEVICE)),
        ),
    ]
    for message, refusing, arguments in cases:
        with pytest.raises(ValueError, match=f"^{message}"):
            refusing(*arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"depth": 0}, "depth: got 0"),
        ({"cross_attention_frequency": 0}, "cross_attention_frequency: got 0"),
        ({"vocab_size": 9, "text": False}, "vocab_size: got 9, wanted None with text=False"),
    ],
)
def test_refused_modules(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}"):
        QFormer(C, H, **arguments)

# SPDX-License-Identifier: Apache-2.0
"""accelerate gives the models inside a model our attention: what eager computes, who keeps his own, and the way back."""

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate_parity import count_calls, scattered
from conftest import DEVICE, ON_GPU
from hf_models import TEXT, TOWER, ids
from hf_vlms import GQA, REAL, S, llava
from torch import nn

from vlmkernels import accelerate, restore, use_backend
from vlmkernels.integrations import transformers_attention as ours
from vlmkernels.integrations._join import FAMILIES
from vlmkernels.testing import compare


def decoder(name: str, **settings: Any) -> nn.Module:
    return getattr(hf, f"{name}ForCausalLM")(getattr(hf, f"{name}Config")(**{**GQA, **settings}))  # type: ignore[no-any-return]


def prompts() -> dict[str, torch.Tensor]:
    return {"input_ids": ids(2, S), "attention_mask": REAL}


@pytest.fixture(autouse=True)
def quick_backend() -> Iterator[None]:
    """On a CPU: not Triton's interpreter, and a backend that has a softcap."""
    with use_backend("" if ON_GPU else "reference"):
        yield


def mllama() -> nn.Module:
    text = {**TEXT, "num_key_value_heads": 2, "pad_token_id": 0, "cross_attention_layers": []}
    return hf.MllamaForCausalLM(hf.MllamaTextConfig(**text))


#: Whose attention is swapped.
SWAPPED = ("LlamaA", "Mistral", "Qwen2A", "Qwen3A", "Bert", "Gemma", "MllamaText", "OPT")
Builder = tuple[Callable[[], nn.Module], Callable[[], dict[str, torch.Tensor]]]
CASES: dict[str, Builder] = {
    "llama": (lambda: decoder("Llama"), prompts),
    "mistral": (lambda: decoder("Mistral", sliding_window=4), prompts),
    "qwen2": (lambda: decoder("Qwen2"), prompts),
    "qwen3": (lambda: decoder("Qwen3"), prompts),
    "gemma": (lambda: decoder("Gemma"), prompts),
    "gemma2": (lambda: decoder("Gemma2", sliding_window=4), prompts),
    "opt": (lambda: hf.OPTForCausalLM(hf.OPTConfig(**TEXT, ffn_dim=96, word_embed_proj_dim=64)), prompts),
    "bert": (lambda: hf.BertForMaskedLM(hf.BertConfig(**TEXT)), prompts),
    "mllama": (mllama, prompts),
}


def implementations(model: nn.Module) -> list[str]:
    return [part.config._attn_implementation for part in model.modules() if isinstance(part, hf.PreTrainedModel)]


@pytest.mark.parametrize("name", CASES)
def test_what_eager_computes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    build, make = CASES[name]
    model = scattered(build())
    inputs = {key: value.to(DEVICE) for key, value in make().items()}
    before = implementations(model)
    exact: Any = copy.deepcopy(model)
    exact.set_attn_implementation("eager")
    run, sizes = ours.attention, []

    def noted(q: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        sizes.append(q.shape[1])
        return run(q, *args, **kwargs)

    monkeypatch.setattr(ours, "attention", noted)
    report = accelerate(model)
    calls = count_calls(model)
    with torch.no_grad():
        got, wanted = (one(**inputs).logits for one in (model, exact))
    rows = inputs["attention_mask"].bool()
    assert compare(got[rows], wanted[rows].double(), "model")
    length = rows.shape[1]
    swapped = [row for row in report.replaced if row.layer.endswith("Attention") and row.layer.startswith(SWAPPED)]
    assert sizes.count(length) + len(swapped) == TOWER["num_hidden_layers"], "every layer of the text called our attention"
    assert swapped and all(calls[row.name] == 1 for row in swapped)
    assert ("RMSNorm" in {row.module for row in report.replaced}) is (not name.startswith(("gemma", "opt", "bert")))
    assert report.attention and not [row for row in report.attention if row.reason]
    assert f"attention of {type(model).__name__}" in str(report)
    assert accelerate(model).attention == report.attention
    restore(model)
    assert implementations(model) == before and set(before) == {"eager" if name == "gemma2" and "eager" in before else "sdpa"}


@pytest.mark.parametrize("name", ["bert", "llama", "qwen3", "gemma2", "mllama"])
def test_one_graph(name: str) -> None:
    """torch.compile finds nothing in the layers or in the masks that would break its graph."""
    build, make = CASES[name]
    model = scattered(build())
    inputs = {key: value.to(DEVICE) for key, value in make().items()}
    more = {} if name == "bert" else {"use_cache": False}
    rows = inputs["attention_mask"].bool()
    accelerate(model)
    with torch.no_grad():
        wanted = model(**inputs, **more).logits
        torch._dynamo.reset()
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs, **more).logits
    assert compare(got[rows], wanted[rows].double(), "model")


@pytest.mark.parametrize("name", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma", "Gemma2"])
@pytest.mark.parametrize("cache", [None, "static"])
def test_decoding_is_that_of_before(name: str, cache: str | None) -> None:
    """Padded on the left, token by token, in windows shorter than what came; and in training."""
    model: Any = scattered(decoder(name, **({"sliding_window": 6} if name in ("Mistral", "Gemma2") else {})))
    inputs = {key: value.to(DEVICE) for key, value in prompts().items()}
    settings: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    wanted = model.generate(**inputs, **settings, cache_implementation=cache)
    report = accelerate(model)
    calls = count_calls(model)
    assert torch.equal(model.generate(**inputs, **settings, cache_implementation=cache), wanted)
    swapped = [row.name for row in report.replaced if row.layer == f"{name}Attention"]
    assert len(swapped) == 2 and all(calls[layer] == 6 for layer in swapped)


def test_who_keeps_his_own() -> None:
    reasons: dict[str, str]
    model = hf.LlamaForCausalLM._from_config(hf.LlamaConfig(**GQA), attn_implementation="eager")
    reasons = {row.model: row.reason for row in accelerate(model).attention}
    assert reasons == {"LlamaForCausalLM": "its attention is eager", "LlamaModel": "its attention is eager"}
    other = hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=60))
    report = accelerate(other)
    assert {row.model: row.reason for row in report.attention}["GPT2LMHeadModel"] == "its family is not tested with ours"
    assert "attention of GPT2LMHeadModel, GPT2Model: its family is not tested with ours" in str(report)
    assert set(implementations(model)) == {"eager"} and set(implementations(other)) == {"sdpa"}

    class Subclass(hf.LlamaForCausalLM):
        """May make its masks in another way."""

    own = Subclass(hf.LlamaConfig(**GQA))
    assert [row.reason != "" for row in accelerate(own).attention] == [True, True]


def test_masks_that_are_handed_on_are_one_kind() -> None:
    """A text model that is left leaves those that hand it masks, but not the tower."""
    model: Any = llava()[0]
    model.model.language_model.config._attn_implementation_internal = "eager"
    reasons = {row.model: row.reason for row in accelerate(model).attention}
    assert reasons["LlamaModel"] == "its attention is eager" and reasons["CLIPVisionModel"] == ""
    handed = "a model that gets its masks, or gives it them, keeps its own"
    assert reasons["LlavaForConditionalGeneration"] == reasons["LlavaModel"] == handed
    restore(model)
    assert sorted(set(implementations(model))) == ["eager", "sdpa"]


def test_an_older_transformers_keeps_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)
    report = accelerate(decoder("Llama"))
    assert "5.17 or newer" in report.attention[0].reason


def test_part_by_part_and_in_turn() -> None:
    model = decoder("Llama")
    inner: Any = model.model
    accelerate(inner)
    accelerate(model)
    assert set(implementations(model)) == {"vlmkernels"}
    assert {row.reason for row in accelerate(model).attention} == {""}
    restore(model)
    assert set(implementations(model)) == {"sdpa"}
    assert not [part for part in model.modules() if [key for key in vars(part) if key.startswith("_vlmkernels")]]


def test_the_configuration_is_saved_as_it_was() -> None:
    model: Any = decoder("Llama")
    before = model.config.to_dict()
    report = accelerate(model)
    assert model.config.to_dict() == before
    other = copy.deepcopy(model)
    assert other.config._attn_implementation == "vlmkernels" and restore(other) == len(report.replaced)
    assert set(implementations(other)) == {"sdpa"} and set(implementations(model)) == {"vlmkernels"}


def test_the_page_names_every_family() -> None:
    page = (Path(__file__).parents[1] / "docs" / "accelerate.md").read_text()
    assert not [name for name in FAMILIES if f"`{name}`" not in page]

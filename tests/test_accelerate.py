# SPDX-License-Identifier: Apache-2.0
"""accelerate and restore on small random models: outputs, gradients, state_dicts and reports."""

import copy
import pickle
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate_parity import check, count_calls, make, originals, run, tower
from conftest import DEVICE
from hf_models import CASES, IMAGE, NO_DROPOUT, TOWER
from nn_parity import quick_backend
from torch import Tensor, nn
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLMLP

from vlmkernels import accelerate, restore
from vlmkernels.integrations._layers import REPLACEMENTS
from vlmkernels.integrations._swap import Swapped
from vlmkernels.integrations._verify import Errors
from vlmkernels.integrations.accelerate import _worst
from vlmkernels.ops._packed_linear import adjacent
from vlmkernels.testing import compare

__all__ = ["quick_backend"]
every_model = pytest.mark.parametrize("name", CASES)


@every_model
def test_outputs_and_gradients(name: str) -> None:
    case = make(name)
    wanted = originals(case)
    report = accelerate(case.model)
    assert Counter(row.layer for row in report.replaced) == case.replaced
    calls = count_calls(case.model)
    check(run(case.model.train(), case), wanted)
    asked = {row.name for row in report.replaced if not row.module.endswith("Loss")}  # the loss of the whole nobody asked for
    assert set(calls) == asked
    calls.clear()
    with torch.no_grad():
        case.model.eval()(**case.inputs)
    assert set(calls) == asked


@every_model
def test_outputs_without_gradients(name: str) -> None:
    case = make(name)
    exact, own = originals(case)
    accelerate(case.model)
    with torch.no_grad():
        outputs = case.model(**case.inputs)
    for key in case.outputs:
        result = compare(outputs[key], exact[key], "model")
        assert result or result.error <= 2 * compare(own[key], exact[key], "model").error, f"{key}: {result}"


@every_model
def test_nothing_else_changes(name: str) -> None:
    case = make(name)
    model = case.model
    names, parameters = list(model.state_dict()), dict(model.named_parameters(remove_duplicate=False))
    values = {key: value.clone() for key, value in model.state_dict().items()}
    types = {key: type(module) for key, module in model.named_modules()}
    modules = dict(model.named_modules())
    attributes = {key: set(vars(module)) for key, module in model.named_modules()}
    with torch.no_grad():
        before = model(**case.inputs)

    first = accelerate(model)
    assert accelerate(model) == first
    assert list(model.state_dict()) == names
    assert all(torch.equal(value, values[key]) for key, value in model.state_dict().items())
    assert {key: id(p) for key, p in model.named_parameters(remove_duplicate=False)} == {k: id(p) for k, p in parameters.items()}
    assert all(module is modules[key] and isinstance(module, types[key]) for key, module in model.named_modules())

    assert restore(model) == len(first.replaced) > 0
    assert {key: type(module) for key, module in model.named_modules()} == types
    assert {key: set(vars(module)) for key, module in model.named_modules()} == attributes
    with torch.no_grad():
        after = model(**case.inputs)
    assert all(torch.equal(before[key], after[key]) for key in case.outputs)
    assert restore(model) == 0


@every_model
def test_saves_and_loads(name: str, tmp_path: Path) -> None:
    case, other = make(name), make(name)
    state = case.model.state_dict()

    def saved_and_loaded(folder: Path) -> dict[str, Tensor]:
        case.model.save_pretrained(folder)  # type: ignore[operator]
        loaded: dict[str, Tensor] = type(case.model).from_pretrained(folder).to(DEVICE).state_dict()  # type: ignore[attr-defined]
        return loaded

    # Not all of a state comes back by itself: transformers 5.17.0 zeroes the padding row of Kosmos-2's embedding.
    plain = saved_and_loaded(tmp_path / "plain")
    accelerate(case.model)
    loaded = saved_and_loaded(tmp_path / "accelerated")
    assert list(loaded) == list(plain) == list(state)
    assert all(torch.equal(value, plain[key]) for key, value in loaded.items())
    assert sum(torch.equal(value, state[key]) for key, value in loaded.items()) >= len(state) - 1
    accelerate(other.model)
    with torch.no_grad():
        wanted = case.model(**case.inputs)
        for assign in (False, True):
            other.model.load_state_dict(state, assign=assign)
            got = other.model(**case.inputs)
            assert all(compare(got[key], wanted[key].double(), "model") for key in case.outputs)


@every_model
def test_a_step_of_training_reaches_the_module(name: str) -> None:
    case = make(name)
    accelerate(case.model)
    optimizer = torch.optim.AdamW(case.model.parameters(), lr=0.01)
    old = run(case.model, case)
    optimizer.step()
    new = run(case.model, case)
    restore(case.model)
    wanted = originals(case)
    check(new, wanted)
    assert not any(compare(old[key], wanted[0][key], "model") for key in case.outputs)


def test_copies_and_moves_keep_the_module() -> None:
    model, x = tower()
    accelerate(model)
    with torch.no_grad():
        wanted = model(x).last_hidden_state
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), copy.deepcopy(model).double().float()):
        attention, mine = other.encoder.layers[0].self_attn, model.encoder.layers[0].self_attn
        assert type(attention) is type(mine) and attention.fast is not mine.fast
        assert attention.fast.q_proj is attention.q_proj is not mine.q_proj
        assert adjacent([getattr(attention, name).weight for name in ("q_proj", "k_proj", "v_proj")])
        with torch.no_grad():
            assert torch.equal(other(x).last_hidden_state, wanted)
        restore(other)
        assert type(other.encoder.layers[0].self_attn) is mine.original


@pytest.mark.parametrize("name", ["vit", "siglip", "blip2", "idefics", "qwen3_vl"])
def test_torch_compile(name: str) -> None:
    case = make(name)
    layers = {"vit": ".", "siglip": "vision_model", "blip2": "qformer.encoder", "idefics": "perceiver_resampler"}
    part = case.model.get_submodule(layers[name]) if layers.get(name, ".") != "." else case.model
    if name == "qwen3_vl":
        part = part.patch_embed
    tokens = torch.randn(2, 6, 64, device=DEVICE)
    arguments: dict[str, Any] = {
        "blip2": {"hidden_states": tokens, "encoder_hidden_states": torch.randn(2, 17, 64, device=DEVICE), "query_length": 6},
        "idefics": {"context": tokens},
        "qwen3_vl": {"hidden_states": case.inputs.get("hidden_states")},
    }.get(name, {"pixel_values": case.inputs.get("pixel_values")})

    def call(module: Any) -> Tensor:
        output = module(**arguments)
        return output if isinstance(output, Tensor) else output.last_hidden_state  # type: ignore[no-any-return]

    with torch.no_grad():
        wanted = call(part)
        assert accelerate(part).replaced
        torch._dynamo.reset()
        got = call(torch.compile(part, fullgraph=True, backend="aot_eager"))
    assert compare(got, wanted.double(), "model")


def test_the_class_of_a_layer_makes_originals() -> None:
    """As ``type(model).from_pretrained`` and code that builds another of the same do."""
    case = make("clip")
    accelerate(case.model)
    for layer in (case.model, case.model.vision_model.encoder.layers[0].self_attn):
        other = type(layer)(layer.config)
        assert not isinstance(other, Swapped) and type(other) is layer.original


def test_the_worst_errors_are_shown() -> None:
    """Beside those of the original, whatever their order."""
    errors = [Errors(1e-3, 1e-3), Errors(9e-3, 1e-3), Errors(2e-2, 1e-2)]
    for some in (errors, errors[::-1]):
        assert _worst(some) == ", error 9.0e-03, the original's 1.0e-03"
    assert _worst([]) == ""


def test_report_with_errors() -> None:
    model, x = tower()
    report = accelerate(model, verify={"pixel_values": x})
    inner = [f"encoder.layers.{i}{part}" for i in range(2) for part in ("", ".self_attn", ".mlp")]
    assert [row.name for row in report.replaced] == ["embeddings", *inner]
    for row in report.replaced:
        assert row.errors and 0 < row.errors.ours < 1e-5 and 0 < row.errors.original < 1e-5
    assert {row.layer: row.count for row in report.left} == {"CLIPVisionModel": 1}
    inside = {p: p.numel() for layer in model.modules() if isinstance(layer, Swapped) for p in layer.parameters()}
    assert report.parameters == sum(inside.values()) + sum(row.parameters for row in report.left)
    text = str(report)
    assert re.search(r"2 x CLIPAttention -> SelfAttention, error \d\.\de-\d\d, the original's \d\.\de-\d\d", text)
    assert re.search(r"1 x CLIPVisionModel \(\d+\.\d% of the parameters\): no module", text)

    broken = model.encoder.layers[1].self_attn.fast
    broken.register_forward_hook(lambda module, args, output: 2 * output)
    errors = {row.name: row.errors.ours for row in accelerate(model, verify={"pixel_values": x}).replaced if row.errors}
    assert errors.pop("encoder.layers.1.self_attn") == pytest.approx(1.0, abs=0.01)
    assert errors.pop("encoder.layers.1") > 0.01, "the layer around it"
    assert len(errors) == 5 and all(error < 1e-5 for error in errors.values())


@every_model
def test_every_layer_is_as_exact_as_the_original(name: str) -> None:
    case = make(name)
    case.model.train()
    report = accelerate(case.model, verify=case.inputs)
    assert case.model.training
    for row in report.replaced:
        assert row.name == "" or (row.errors and row.errors.ours < 1e-5), row


def test_what_is_not_known_is_left() -> None:
    model = hf.ResNetModel(hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic"))
    types = [type(module) for module in model.modules()]
    report = accelerate(model)
    assert report.replaced == () and [type(module) for module in model.modules()] == types
    assert any(row.layer == "ResNetConvLayer" and "no module" in row.reason for row in report.left)
    assert sum(row.parameters for row in report.left) == report.parameters


def test_what_does_not_fit_is_left_with_the_reason() -> None:
    former = hf.Blip2QFormerModel(hf.Blip2QFormerConfig(**TOWER, **NO_DROPOUT, encoder_hidden_size=64, hidden_act="relu"))
    report = accelerate(former)
    assert not report.replaced
    assert [row.reason for row in report.left if row.layer == "Blip2QFormerEncoder"] == ["its activation is relu"]
    siglip = hf.SiglipVisionModel(hf.SiglipVisionConfig(**TOWER, **IMAGE, hidden_act="relu"))
    reasons = {row.layer: row.reason for row in accelerate(siglip).left}
    assert reasons["SiglipMultiheadAttentionPoolingHead"] == "its activation is relu"
    assert reasons["SiglipMLP"] == "its activation is ReLU"
    gated = Qwen2_5_VLMLP(SimpleNamespace(hidden_size=64, intermediate_size=90, hidden_act="relu"))
    assert [row.reason for row in accelerate(gated).left if row.layer == "Qwen2_5_VLMLP"] == ["its activation is ReLU"]
    model, _ = tower()
    model.embeddings.forward = model.embeddings.forward
    model.encoder.layers[0].self_attn.q_proj = nn.Linear(64, 32)
    reasons = {row.layer: row.reason for row in accelerate(model).left}
    assert reasons["CLIPVisionEmbeddings"] == "its forward was exchanged"
    assert reasons["CLIPAttention"].startswith("its q_proj.bias is (32,)")


def test_refusals() -> None:
    for function in (accelerate, restore):
        with pytest.raises(ValueError, match=r"model: got a str, wanted a torch\.nn\.Module"):
            function("clip")  # type: ignore[operator]
    model, _ = tower()
    accelerate(model)
    attention = model.encoder.layers[1].self_attn
    attention.__class__ = type("Wrapped", (type(attention),), {})
    with pytest.raises(ValueError, match="Wrapped whose class was changed since"):
        restore(model)
    assert isinstance(model.embeddings, Swapped)


def test_the_page_lists_every_class() -> None:
    page = (Path(__file__).parents[1] / "docs" / "accelerate.md").read_text()
    assert not [name for name in REPLACEMENTS if f"`{name.rpartition('.')[2]}`" not in page]

# SPDX-License-Identifier: Apache-2.0
"""accelerate and restore on small random models: outputs, gradients, state_dicts, and the calls that stay with the original."""

import copy
import pickle
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from conftest import DEVICE
from hf_models import CASES, IMAGE, NO_DROPOUT, TOWER, Case, pixels
from nn_parity import quick_backend, without_rounding
from torch import Tensor, nn

from vlmkernels import accelerate, restore
from vlmkernels.integrations._layers import REPLACEMENTS
from vlmkernels.integrations._swap import Swapped
from vlmkernels.ops._packed_linear import adjacent
from vlmkernels.testing import compare

__all__ = ["quick_backend"]
every_model = pytest.mark.parametrize("name", CASES)


def randomize(model: nn.Module) -> nn.Module:
    """Weights at which every part of the model matters: biases and gates that are not 0, norms that are not 1."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.copy_(torch.randn_like(parameter) * parameter[0].numel() ** -0.5)
            else:
                parameter.copy_(0.1 * torch.randn_like(parameter) + ("norm" in name.lower() and name.endswith("weight")))
    return model.to(DEVICE).eval()


def make(name: str) -> Case:
    case = CASES[name]()
    randomize(case.model)
    case.inputs = {key: value.to(DEVICE) for key, value in case.inputs.items()}
    return case


def tower(**settings: Any) -> tuple[nn.Module, Tensor]:
    """CLIP's, with its pixels."""
    model = hf.CLIPVisionModel(hf.CLIPVisionConfig(**TOWER, **IMAGE, **settings))
    return randomize(model), pixels().to(DEVICE)


def run(model: nn.Module, case: Case) -> "Results":
    """The outputs, and the gradients of all parameters for random cotangents."""
    model.zero_grad()
    dtype = next(model.parameters()).dtype
    outputs = model(**{key: value.to(dtype) if value.is_floating_point() else value for key, value in case.inputs.items()})
    generator = torch.Generator(DEVICE).manual_seed(1)
    total = torch.zeros((), dtype=dtype, device=DEVICE)
    for name in case.outputs:
        cotangent = torch.randn(outputs[name].shape, generator=generator, device=DEVICE).to(torch.bfloat16).to(dtype)
        total = total + (outputs[name] * cotangent).sum()
    total.backward()
    found = {name: outputs[name].detach() for name in case.outputs}
    return found | {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


#: What a call of a model gives: outputs and gradients by name.
Results = dict[str, Tensor]


def check(got: Results, wanted: tuple[Results, Results]) -> None:
    """Within the bounds of ``compare``, or where fp32 itself is further from the truth, within twice the original's error."""
    exact, own = wanted
    assert set(got) == set(exact)
    for name, value in got.items():
        # The exact gradient of a bias of the keys is 0: a softmax does not see a shift of all logits of a row.
        no_gradient = re.search(r"(k_proj|key|k_layer_norm)\.bias$", name)
        terms = exact[name.replace("bias", "weight")].abs().max().item() if no_gradient else 0.0
        result = compare(value, exact[name], "model", terms=terms)
        assert result or result.error <= 2 * compare(own[name], exact[name], "model").error, f"{name}: {result}"


def originals(case: Case) -> tuple[Results, Results]:
    """What the original computes in fp64 with eager attention, and in fp32."""
    wide = copy.deepcopy(case.model).double()
    wide.set_attn_implementation("eager")  # type: ignore[operator]
    with without_rounding(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "float", Tensor.double)
        torch.set_default_dtype(torch.float64)
        try:
            exact = run(wide, case)
        finally:
            torch.set_default_dtype(torch.float32)
    return exact, run(case.model, case)


def count_calls(model: nn.Module) -> Counter[str]:
    """Counts the calls of the modules of ours inside of ``model``, by the names of the layers that they serve."""
    calls: Counter[str] = Counter()
    for name, layer in model.named_modules():
        if isinstance(layer, Swapped):
            layer.fast.register_forward_hook(lambda *_, name=name: calls.update([name]))
    return calls


@every_model
def test_outputs_and_gradients(name: str) -> None:
    case = make(name)
    wanted = originals(case)
    report = accelerate(case.model)
    assert Counter(row.layer for row in report.replaced) == case.replaced
    calls = count_calls(case.model)
    check(run(case.model.train(), case), wanted)
    assert set(calls) == {row.name for row in report.replaced}


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


def test_attention_weights_and_hidden_states_that_are_asked_for() -> None:
    model, x = tower(attn_implementation="eager")
    with torch.no_grad():
        wanted = model(x, output_attentions=True, output_hidden_states=True)
        accelerate(model)
        got = model(x, output_attentions=True, output_hidden_states=True)
        model.config.output_attentions = True
        also = model(x)
    assert len(got.attentions) == len(wanted.attentions) == 2 and len(got.hidden_states) == 3
    for other in (got, also):
        for value, exact in zip(other.attentions, wanted.attentions, strict=True):
            assert compare(value, exact.double(), "model")


def test_qformer_returns_what_it_is_asked_for() -> None:
    case = make("blip2")
    former = case.model.qformer
    former.set_attn_implementation("eager")
    queries, image = torch.randn(2, 6, 64, device=DEVICE), torch.randn(2, 17, 64, device=DEVICE)
    with torch.no_grad():
        wanted = former(queries, encoder_hidden_states=image, output_attentions=True, output_hidden_states=True)
        accelerate(former)
        got = former(queries, encoder_hidden_states=image, output_attentions=True, output_hidden_states=True)
        calls = count_calls(former)
        former(queries, encoder_hidden_states=image)
    for key in ("attentions", "cross_attentions", "hidden_states"):
        assert len(got[key]) > 0 and len(got[key]) == len(wanted[key])
        assert all(torch.equal(a, b) for a, b in zip(got[key], wanted[key], strict=True)), key
    assert calls["encoder"] == 1, "the hooks that transformers left behind keep no later call from the module"


def test_padded_images_and_prompts() -> None:
    """Their masks are the original's: attention and Q-Former stay there, the pooling head takes the padding as ranges."""
    case = make("siglip2")
    case.inputs["pixel_attention_mask"][1, 8:] = 0
    case.inputs["spatial_shapes"][1] = torch.tensor([2, 4])
    wanted = originals(case)
    accelerate(case.model)
    calls = count_calls(case.model)
    check(run(case.model, case), wanted)
    assert set(calls) == {"embeddings", "head"}

    case = make("instructblip")
    case.inputs["qformer_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=DEVICE)
    wanted = originals(case)
    accelerate(case.model)
    calls = count_calls(case.model)
    check(run(case.model, case), wanted)
    assert calls and not [name for name in calls if "qformer" in name]


def test_other_image_sizes() -> None:
    model, _ = tower()
    x = torch.randn(1, 3, 40, 48, device=DEVICE)
    with torch.no_grad():
        wanted = model(x, interpolate_pos_encoding=True).last_hidden_state
        accelerate(model)
        calls = count_calls(model)
        got = model(x, interpolate_pos_encoding=True).last_hidden_state
    assert compare(got, wanted.double(), "model") and "embeddings" not in calls
    with pytest.raises(ValueError, match="doesn't match model"):
        model(x)


def test_masked_patches() -> None:
    case = make("vit")
    case.model = randomize(hf.ViTModel(hf.ViTConfig(**TOWER, **IMAGE), use_mask_token=True))
    case.inputs["bool_masked_pos"] = torch.rand(2, 16, device=DEVICE) < 0.5
    wanted = originals(case)
    accelerate(case.model)
    calls = count_calls(case.model)
    check(run(case.model, case), wanted)
    assert "embeddings" not in calls and len(calls) == 2


def test_dropout_of_attention_weights_is_the_original() -> None:
    model, x = tower(attention_dropout=0.5)
    accelerate(model)
    calls = count_calls(model)
    model.train()(x)
    assert set(calls) == {"embeddings"}
    torch.manual_seed(3)
    got = model.encoder.layers[0].self_attn(model.embeddings(x))[0]
    embedded = model.embeddings(x)
    restore(model)
    torch.manual_seed(3)
    assert torch.equal(got, model.encoder.layers[0].self_attn(embedded)[0])
    accelerate(model)
    calls = count_calls(model)
    model.eval()(x)
    assert len(calls) == 3


def test_dropout_of_hidden_states_stays() -> None:
    case = make("vit")
    case.model.embeddings.dropout.p = 1.0
    accelerate(case.model)
    x = case.inputs["pixel_values"]
    assert case.model.train().embeddings(x).abs().max() == 0 < case.model.eval().embeddings(x).abs().max()


def test_under_autocast() -> None:
    model, x = tower()
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        wanted = model(x).last_hidden_state
        accelerate(model)
        got = model(x).last_hidden_state
    assert got.dtype == wanted.dtype
    assert compare(got.to(torch.bfloat16), wanted.double(), "model")


class Adapted(nn.Module):
    """A layer with something beside it, as an adapter puts it there."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer
        self.weight = layer.weight
        self.bias = layer.bias

    def forward(self, x: Tensor) -> Tensor:
        return 3 * self.layer(x)  # type: ignore[no-any-return]


@pytest.mark.parametrize("path", ["embeddings.patch_embedding", "encoder.layers.0.self_attn.q_proj"])
@pytest.mark.parametrize("hook", [False, True])
def test_adapters_and_hooks_inside(path: str, hook: bool) -> None:
    model, x = tower()
    accelerate(model)
    owner, _, name = path.rpartition(".")
    with torch.no_grad():
        plain = model(x).last_hidden_state
        if hook:
            model.get_submodule(path).register_forward_hook(lambda module, args, output: 3 * output)
        else:
            setattr(model.get_submodule(owner), name, Adapted(model.get_submodule(path)))
        got = model(x).last_hidden_state
        restore(model)
        wanted = model(x).last_hidden_state
    assert compare(got, wanted.double(), "model")
    assert not compare(got, plain.double(), "model")


def test_backward_hooks_of_projections() -> None:
    model, x = tower()
    accelerate(model)
    seen: list[nn.Module] = []
    projection = model.encoder.layers[0].self_attn.k_proj
    projection.register_full_backward_hook(lambda module, *gradients: seen.append(module))
    model(x).last_hidden_state.sum().backward()
    assert seen == [projection]


def test_masks_by_other_names() -> None:
    """Of a version of transformers that hands the causal mask over in an argument of its own."""
    model, _ = tower()
    accelerate(model)
    attention = model.encoder.layers[0].self_attn
    calls = count_calls(attention)
    tokens = torch.randn(2, 5, 64, device=DEVICE)
    mask = torch.ones(5, 5, dtype=torch.bool, device=DEVICE).tril()[None, None]
    attention(tokens, causal_attention_mask=mask)
    wanted = attention.original.forward(attention, tokens, mask)[0]
    for got in (attention(tokens, mask)[0], attention(tokens, attention_mask=mask)[0]):
        assert torch.equal(got, wanted)
    assert not calls
    attention(tokens, causal_attention_mask=None)
    assert sum(calls.values()) == 1


def test_hooks_inside_a_qformer() -> None:
    case = make("blip2")
    accelerate(case.model)
    seen: list[nn.Module] = []
    layer = case.model.qformer.encoder.layer[1]
    handle = layer.register_forward_hook(lambda module, args, output: seen.append(module))
    case.model(**case.inputs)
    assert seen == [layer]
    handle.remove()
    calls = count_calls(case.model)
    case.model(**case.inputs)
    assert seen == [layer] and calls["qformer.encoder"] == 1


def test_gradient_checkpointing() -> None:
    case = make("instructblip")
    wanted = originals(case)
    accelerate(case.model)
    case.model.gradient_checkpointing_enable()
    check(run(case.model.train(), case), wanted)


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


def test_report_with_errors() -> None:
    model, x = tower()
    report = accelerate(model, verify={"pixel_values": x})
    assert [row.name for row in report.replaced] == ["embeddings", *(f"encoder.layers.{i}.self_attn" for i in range(2))]
    for row in report.replaced:
        assert row.errors and 0 < row.errors.ours < 1e-5 and 0 < row.errors.original < 1e-5
    assert {row.layer: row.count for row in report.left} == {"CLIPMLP": 2, "CLIPEncoderLayer": 2, "CLIPVisionModel": 1}
    inside = sum(p.numel() for layer in model.modules() if isinstance(layer, Swapped) for p in layer.parameters())
    assert report.parameters == inside + sum(row.parameters for row in report.left)
    text = str(report)
    assert re.search(r"2 x CLIPAttention -> SelfAttention, error \d\.\de-\d\d, the original's \d\.\de-\d\d", text)
    assert re.search(r"2 x CLIPMLP \(\d+\.\d% of the parameters\): no module", text)

    broken = model.encoder.layers[1].self_attn.fast
    broken.register_forward_hook(lambda module, args, output: 2 * output)
    errors = [row.errors.ours for row in accelerate(model, verify={"pixel_values": x}).replaced if row.errors]
    assert errors[0] < 1e-5 and errors[1] < 1e-5 and errors[2] == pytest.approx(1.0, abs=0.01)


@every_model
def test_every_layer_is_as_exact_as_the_original(name: str) -> None:
    case = make(name)
    case.model.train()
    report = accelerate(case.model, verify=case.inputs)
    assert case.model.training
    for row in report.replaced:
        assert row.errors and row.errors.ours < 1e-5, row


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

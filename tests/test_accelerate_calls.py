# SPDX-License-Identifier: Apache-2.0
"""The calls of an accelerated layer that stay with the original, and those that don't."""

import copy

import pytest
import torch
import transformers as hf
from accelerate_parity import check, count_calls, make, originals, randomize, run, tower
from conftest import DEVICE
from hf_models import IMAGE, TOWER
from nn_parity import quick_backend
from torch import Tensor, nn

from vlmkernels import accelerate, restore
from vlmkernels.nn._patch_positions import PatchPositions
from vlmkernels.testing import compare

__all__ = ["quick_backend"]


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
        results = former.encoder(queries, encoder_hidden_states=image, query_length=6, return_dict=False)
    assert isinstance(results, tuple) and len(results) == 1
    for key in ("attentions", "cross_attentions", "hidden_states"):
        assert len(got[key]) > 0 and len(got[key]) == len(wanted[key])
        assert all(torch.equal(a, b) for a, b in zip(got[key], wanted[key], strict=True)), key
    assert calls["encoder"] == 1, "the hooks that transformers left behind keep no later call from the module"


def test_padded_images_and_prompts() -> None:
    """Their masks reach our modules as ranges, of the original's own padding."""
    case = make("siglip2")
    case.inputs["pixel_attention_mask"][1, 8:] = 0
    case.inputs["spatial_shapes"][1] = torch.tensor([2, 4])
    wanted = originals(case)
    accelerate(case.model)
    calls = count_calls(case.model)
    check(run(case.model, case), wanted)
    layers = {f"encoder.layers.{i}{part}" for i in range(2) for part in ("", ".self_attn", ".mlp")}
    assert set(calls) == {"embeddings", "head", *layers}

    case = make("instructblip")
    case.inputs["qformer_attention_mask"] = torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0]], device=DEVICE)
    wanted = originals(case)
    accelerate(case.model)
    calls = count_calls(case.model)
    check(run(case.model, case), wanted)
    assert calls["qformer.encoder"] == 1


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
    assert set(calls) == {f"layers.{i}{part}" for i in range(2) for part in ("", ".attention", ".mlp")}, "but not the embeddings"


def test_dropout_of_attention_weights_is_the_original() -> None:
    model, x = tower(attention_dropout=0.5)
    accelerate(model)
    calls = count_calls(model)
    model.train()(x)
    assert set(calls) == {"embeddings", *(f"encoder.layers.{i}.mlp" for i in range(2))}
    torch.manual_seed(3)
    got = model.encoder.layers[0].self_attn(model.embeddings(x))[0]
    embedded = model.embeddings(x)
    restore(model)
    torch.manual_seed(3)
    assert torch.equal(got, model.encoder.layers[0].self_attn(embedded)[0])
    accelerate(model)
    calls = count_calls(model)
    model.eval()(x)
    assert len(calls) == 7


def test_dropout_of_hidden_states_stays() -> None:
    case = make("vit")
    case.model.embeddings.dropout.p = case.model.layers[0].dropout.p = 1.0
    accelerate(case.model)
    x = case.inputs["pixel_values"]
    assert case.model.train().embeddings(x).abs().max() == 0 < case.model.eval().embeddings(x).abs().max()
    tokens = torch.randn(2, 17, 64, device=DEVICE)
    assert torch.equal(case.model.train().layers[0](tokens), tokens)
    assert not torch.equal(case.model.eval().layers[0](tokens), tokens)


def test_under_autocast() -> None:
    model, x = tower()
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        wanted = model(x).last_hidden_state
        accelerate(model)
        got = model(x).last_hidden_state
    assert got.dtype == wanted.dtype
    assert compare(got.to(torch.bfloat16), wanted.double(), "model")


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_packed_images_under_autocast(name: str) -> None:
    """Their attention stays ours: the originals' would take a call for each image."""
    case = make(name)
    exact = originals(case)[0]["last_hidden_state"]

    def output() -> Tensor:
        with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
            return case.model(**case.inputs).last_hidden_state  # type: ignore[no-any-return]

    before = output()
    accelerate(case.model)
    assert case.model.config._attn_implementation == "vlmkernels", "it does not read the longest length back"
    calls = count_calls(case.model)
    got = output()
    assert got.dtype == before.dtype
    assert sum(count for layer, count in calls.items() if layer.endswith("attn")) == 2
    errors = [(x.double() - exact).square().mean().sqrt().item() for x in (got, before)]
    assert errors[0] <= 1.1 * errors[1]
    restore(case.model)
    case.model.blocks[1].attn.forward = case.model.blocks[1].attn.forward
    accelerate(case.model)
    assert case.model.config._attn_implementation == "vlmkernels_flash", "a layer that is left gets all images in one call"


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


@pytest.mark.parametrize("kind", ["forward_hook", "forward_pre_hook", "full_backward_hook", "full_backward_pre_hook"])
@pytest.mark.parametrize(("layer", "path"), [("embeddings", "embeddings.patch_embedding"), ("head", "head.mlp")])
def test_embeddings_and_heads_that_are_watched(layer: str, path: str, kind: str) -> None:
    case, seen = make("siglip2"), []
    accelerate(case.model)
    calls = count_calls(case.model)
    getattr(case.model.get_submodule(path), f"register_{kind}")(lambda *_: seen.append(kind))
    case.inputs["pixel_values"].requires_grad_()  # else torch warns of a hook without gradients of inputs
    case.model(**case.inputs).pooler_output.sum().backward()
    assert seen == [kind] and {"embeddings", "head"} - set(calls) == {layer}


def test_embeddings_and_heads_under_autocast() -> None:
    case = make("siglip2")
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        wanted = case.model(**case.inputs).pooler_output
        accelerate(case.model)
        calls = count_calls(case.model)
        got = case.model(**case.inputs).pooler_output
    assert got.dtype == wanted.dtype and "embeddings" not in calls
    assert compare(got.to(torch.bfloat16), wanted.double(), "model")


def test_backward_hooks_of_projections() -> None:
    model, x = tower()
    accelerate(model)
    seen: list[nn.Module] = []
    first, second = model.encoder.layers
    watched = [
        second,
        second.mlp.fc2,
        second.layer_norm2,
        first,
        first.self_attn.out_proj,
        first.self_attn.k_proj,
        first.layer_norm1,
    ]
    for layer in watched:
        layer.register_full_backward_hook(lambda module, *gradients: seen.append(module))
    model(x).last_hidden_state.sum().backward()
    assert len(seen) == len(watched) and set(seen) == set(watched)


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


def test_bert_as_a_decoder_and_its_weights() -> None:
    """A cache and attention weights are the original's; a causal mask is ranges."""
    settings = {**TOWER, "vocab_size": 60, "is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    model = randomize(hf.BertLMHeadModel(hf.BertConfig(**settings)))
    ids = torch.randint(3, 60, (2, 7), device=DEVICE)
    exact = copy.deepcopy(model)
    exact.set_attn_implementation("eager")  # type: ignore[operator]
    accelerate(model)
    calls = count_calls(model)

    def attentions() -> int:
        return sum(count for name, count in calls.items() if name.endswith("attention.self"))

    with torch.no_grad():
        assert compare(model(ids, use_cache=False).logits, exact(ids, use_cache=False).logits.double(), "model")
        assert attentions() == 2
        first = model(ids[:, :5], use_cache=True)
        second = model(ids[:, 5:], past_key_values=first.past_key_values)
        assert attentions() == 2
        assert compare(second.logits, exact(ids).logits[:, 5:].double(), "model")
        accelerate(exact)
        calls = count_calls(exact)
        assert exact(ids, output_attentions=True).attentions[0] is not None
        assert attentions() == 0 and len(calls) == 2


@pytest.mark.parametrize("name", ["qwen2_5_vl", "siglip"])
def test_feed_forwards_that_are_watched(name: str) -> None:
    """A hook inside, an activation that somebody listens to, autocast: the results are the original's."""
    case = make(name)
    wanted = originals(case)
    accelerate(case.model)
    kind = "Qwen2_5_VLMLP" if name == "qwen2_5_vl" else "SiglipMLP"
    layer = next(module for module in case.model.modules() if type(module).__name__ == kind)
    activation, last = (layer.act_fn, layer.down_proj) if name == "qwen2_5_vl" else (layer.activation_fn, layer.fc2)
    heard: list[str] = []
    last.register_forward_hook(lambda *_: heard.append("last"))
    check(run(case.model, case), wanted)
    assert heard == ["last"]
    activation.register_forward_hook(lambda *_: heard.append("activation"))
    check(run(case.model, case), wanted)
    assert heard == ["last", "activation", "last"] or heard == ["last", "last", "activation"]
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        outputs = case.model(**case.inputs)
    restore(case.model)
    with torch.no_grad(), torch.autocast(DEVICE.type, torch.bfloat16):
        again = case.model(**case.inputs)
    assert all(compare(outputs[key].to(torch.bfloat16), again[key].double(), "model") for key in case.outputs)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl", "qwen3_vl"])
def test_positions_of_packed_images(name: str) -> None:
    """Made for all images at once, and not where the call has them."""
    case = make(name)
    wanted: list[Tensor] = []
    rotate = case.model.rotary_pos_emb.register_forward_pre_hook(lambda module, args: wanted.append(args[1]))
    with torch.no_grad():
        exact = case.model(**case.inputs).last_hidden_state
        accelerate(case.model)
        calls = count_calls(case.model)
        case.model(**case.inputs)
        assert calls[""] == 1 and torch.equal(wanted[0], wanted[1])
        got = case.model(**case.inputs, position_ids=wanted[0]).last_hidden_state
    rotate.remove()
    assert calls[""] == 1 and wanted[2] is wanted[0]
    assert compare(got, exact.double(), "model")


def test_a_grid_of_other_patches_is_refused() -> None:
    with pytest.raises(ValueError, match="total: got 12, wanted 16, the patches of grid_thw"):
        PatchPositions(2)(torch.tensor([[1, 4, 4]]), 12)

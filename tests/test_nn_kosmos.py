# SPDX-License-Identifier: Apache-2.0
"""KosmosResampler against the projection of image features of Kosmos-2 in transformers, with its eager attention."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from nn_parity import check_module, check_parity, quick_backend, randn, randomize, share_weights
from torch import Tensor
from transformers.models.kosmos2.modeling_kosmos2 import Kosmos2ImageToTextProjection

from vlmkernels.nn import KosmosResampler
from vlmkernels.ops._op import use_backend
from vlmkernels.testing.compare import compare

__all__ = ["quick_backend"]
B, S, C, H, CONTEXT, LATENTS = 3, 13, 57, 3, 35, 5
#: Nothing but a softmax follows the keys.
ZERO = ("x_attn.k_proj.bias",)


def theirs() -> Kosmos2ImageToTextProjection:
    config = transformers.Kosmos2Config(
        text_config={"embed_dim": C, "attention_heads": H}, vision_config={"hidden_size": CONTEXT}, latent_query_num=LATENTS
    )
    # Not "sdpa": in some versions, 5.17.0 among them, that takes the missing mask for a causal one.
    config.text_config._attn_implementation = "eager"
    return Kosmos2ImageToTextProjection(config)


def ours(**arguments: Any) -> KosmosResampler:
    return KosmosResampler(C, H, context_dim=CONTEXT, num_latents=LATENTS, **arguments)


@pytest.mark.parametrize("shape", [(B, S), (1, S), (1, 1), (B, LATENTS)], ids=str)
def test_transformers(shape: tuple[int, int]) -> None:
    check_parity(ours(), theirs(), lambda m, x: m(x), lambda m, x: m(x)[0], randn(*shape, CONTEXT), zero_gradients=ZERO)


def test_defaults_are_those_of_the_configuration() -> None:
    with torch.device("meta"):
        reference, found = Kosmos2ImageToTextProjection(transformers.Kosmos2Config()), KosmosResampler()
    wanted = {name: value.shape for name, value in reference.state_dict().items()}
    assert {name: value.shape for name, value in found.state_dict().items()} == wanted
    assert found.x_attn.num_heads == reference.x_attn.num_heads


def test_module_behaviour() -> None:
    check_module(ours(), lambda m, x: m(x), randn(B, S, CONTEXT), zero_gradients=ZERO)


@pytest.mark.parametrize("batch", [1, B])
def test_latents_are_projected_once(batch: int) -> None:
    module, rows = randomize(ours()), dict.fromkeys(("q_proj", "k_proj", "v_proj"), 0)

    def count(name: str) -> Callable[..., None]:
        def hook(_: Any, inputs: tuple[Tensor], __: Any) -> None:
            rows[name] += inputs[0][..., 0].numel()

        return hook

    for name in rows:
        getattr(module.x_attn, name).register_forward_hook(count(name))
    module(randn(batch, S, CONTEXT))
    assert rows == {"q_proj": LATENTS, "k_proj": LATENTS + batch * S, "v_proj": LATENTS + batch * S}


def test_every_parameter_has_the_dtype() -> None:
    module = ours(dtype=torch.float64)
    assert all(parameter.dtype == torch.float64 for parameter in module.parameters())
    assert module(torch.zeros(B, S, CONTEXT, dtype=torch.float64)).dtype == torch.float64


def test_no_images() -> None:
    with use_backend("reference"):
        assert ours()(torch.zeros(0, S, CONTEXT)).shape == (0, LATENTS, C)


def test_images_without_tokens() -> None:
    """The latents read each other. Forward only: they differ little, so the gradient of q is rounding in anybody's fp32."""
    module, reference, context = ours(), randomize(theirs()), randn(B, 0, CONTEXT)
    share_weights(module, reference)
    assert compare(module(context), reference.double()(context.double())[0], "module")


def test_attention_dropout_cannot_train() -> None:
    module, context = randomize(ours(attention_dropout=0.1)), randn(B, S, CONTEXT)
    assert module(context).shape == (B, LATENTS, C)
    with pytest.raises(ValueError, match=r"^attention_dropout: got 0\.1, wanted "):
        module.train()(context)


@pytest.mark.parametrize(
    ("build", "name"),
    [
        (lambda: KosmosResampler(0), "embed_dim"),
        (lambda: KosmosResampler(C, 4), "embed_dim"),
        (lambda: KosmosResampler(C, 0), "num_heads"),
        (lambda: KosmosResampler(C, H, context_dim=0), "context_dim"),
        (lambda: KosmosResampler(C, H, num_latents=0), "num_latents"),
        (lambda: ours()(torch.zeros(1, S, CONTEXT + 1)), "context"),
        (lambda: ours()(torch.zeros(S, CONTEXT)), "context"),
    ],
)
def test_refusals(build: Callable[[], object], name: str) -> None:
    with pytest.raises(ValueError, match=f"^{name}: got .*, wanted "):
        build()

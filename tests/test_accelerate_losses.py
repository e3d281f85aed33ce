# SPDX-License-Identifier: Apache-2.0
"""accelerate on models and modules with a contrastive loss: values, gradients, and what a step keeps in memory."""

import copy
from typing import Any

import pytest
import torch
import transformers as hf
from accelerate_parity import check, count_calls, randomize
from conftest import DEVICE
from hf_models import IMAGE, TEXT, TOWER, ids, pixels
from nn_parity import quick_backend
from torch import Tensor

from vlmkernels import accelerate, restore
from vlmkernels.testing import compare

__all__ = ["quick_backend"]


def model(name: str) -> Any:
    vision = {**TOWER, "num_patches": 16, "patch_size": 4} if name == "Siglip2" else {**TOWER, **IMAGE}
    made = getattr(hf, f"{name}Model")(getattr(hf, f"{name}Config")(text_config=TEXT, vision_config=vision))
    return randomize(made)


def inputs(name: str) -> dict[str, Tensor]:
    if name != "Siglip2":
        return {"input_ids": ids(3, 7).to(DEVICE), "pixel_values": pixels(3).to(DEVICE)}
    shapes = torch.tensor([[3, 4], [2, 6], [4, 3]])
    found = {"input_ids": ids(3, 7), "pixel_values": torch.randn(3, 12, 48), "spatial_shapes": shapes}
    found["pixel_attention_mask"] = torch.ones(3, 12, dtype=torch.int32)
    return {key: value.to(DEVICE) for key, value in found.items()}


def step(made: Any, given: dict[str, Tensor]) -> dict[str, Tensor]:
    made.zero_grad()
    dtype = made.logit_scale.dtype
    output = made(**{key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()}, return_loss=True)
    output.loss.backward()
    gradients = {name: p.grad.clone() for name, p in made.named_parameters() if p.grad is not None}
    return {"loss": output.loss.detach(), "logits": output.logits_per_text.detach(), **gradients}


@pytest.mark.parametrize("name", ["CLIP", "Siglip", "Siglip2"])
def test_the_loss_of_a_model(name: str) -> None:
    made, given = model(name), inputs(name)
    wide = copy.deepcopy(made).double()
    wide.set_attn_implementation("eager")
    exact, own = step(wide, given), step(made, given)
    report = accelerate(made)
    calls = count_calls(made)
    got = step(made, given)
    # The gradient of the scale is a sum of logits, each times how far its probability is off, which nearly cancel.
    scales = got.pop("logit_scale"), exact.pop("logit_scale")
    assert compare(*scales, "model", terms=exact["logits"].abs().max().item())
    check(got, (exact, own))
    assert calls[""] == 1
    assert [row.module for row in report.replaced if not row.name] == ["ClipLoss" if name == "CLIP" else "SigLipLoss"]
    with torch.no_grad():
        first = made(**given, return_loss=True).to_tuple()[0]
        assert first.dim() == 0 and compare(first, exact["loss"], "model"), "the loss comes first"
        assert made(**given).loss is None
        as_tuple = made(**given, return_loss=True, return_dict=False)
        assert isinstance(as_tuple, tuple) and compare(as_tuple[0], exact["loss"], "model")
    assert calls[""] == 2
    assert restore(made) == len(report.replaced)
    assert torch.equal(step(made, given)["loss"], own["loss"])

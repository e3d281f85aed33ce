# SPDX-License-Identifier: Apache-2.0
"""accelerate on whole vision-language models: what eager computes of images and text, and the tokens that are generated."""

import copy
from collections import Counter
from typing import Any

import pytest
import torch
from accelerate_parity import count_calls, scattered
from conftest import DEVICE
from hf_vlms import WHOLE
from nn_parity import quick_backend

from vlmkernels import accelerate, restore
from vlmkernels.testing import compare

__all__ = ["quick_backend"]


def of_dtype(inputs: dict[str, torch.Tensor], model: torch.nn.Module) -> dict[str, torch.Tensor]:
    dtype = next(model.parameters()).dtype
    return {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}


@pytest.mark.parametrize("name", WHOLE)
def test_logits_and_tokens(name: str) -> None:
    build, replaced = WHOLE[name]
    built, inputs = build()
    model: Any = scattered(built)
    inputs = {key: value.to(DEVICE) for key, value in inputs.items()}
    oracle = copy.deepcopy(model)
    if name == "idefics":  # in fp32 eager is as far from the truth as ours, 26 floors; its masks overflow in fp64
        oracle.double()
    else:
        oracle.set_attn_implementation("eager")
    settings: dict[str, Any] = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
    tokens = model.generate(**inputs, **settings)

    report = accelerate(model)
    classes = Counter(row.layer for row in report.replaced)
    assert {layer: classes[layer] for layer in replaced} == replaced
    assert not [row for row in report.attention if row.reason and "Vision" not in row.model]
    calls = count_calls(model)
    with torch.no_grad():
        got, wanted = (one(**of_dtype(inputs, one)).logits for one in (model, oracle))
    real = inputs.get("attention_mask")
    rows = torch.ones(got.shape[:2], dtype=torch.bool, device=DEVICE) if real is None or name == "git" else real.bool()
    assert compare(got[rows], wanted[rows].double(), "model")
    assert set(calls) == {row.name for row in report.replaced}, "each runs its module"
    assert torch.equal(model.generate(**inputs, **settings), tokens)
    assert restore(model) == len(report.replaced)

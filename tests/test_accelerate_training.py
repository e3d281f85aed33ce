# SPDX-License-Identifier: Apache-2.0
"""Training an accelerated model: on several ranks, with adapters, gradient checkpointing and autocast."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_parity import check, count_calls, scattered
from conftest import DEVICE, needs_gloo, run_two_ranks
from hf_vlms import llava
from nn_parity import quick_backend
from torch import Tensor, nn

from vlmkernels import accelerate, restore
from vlmkernels.testing import compare

__all__ = ["quick_backend"]


@needs_gloo
def test_two_ranks_give_the_gradients_of_the_whole_batch(tmp_path: Path) -> None:
    """Under DistributedDataParallel, and with fully_shard before accelerate and after."""
    run_two_ranks("accelerate_ranks.py", tmp_path)


def gradients(model: Any, inputs: dict[str, Tensor], dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    model.zero_grad()
    model(**{key: x.to(dtype) if x.is_floating_point() else x for key, x in inputs.items()}).logits.square().mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("first", [False, True], ids=["adapters, accelerate", "accelerate, adapters"])
def test_adapters(first: bool) -> None:
    """LoRA around projections: their products are those of the adapters, the rest of the layer is ours."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    plain, inputs = llava()
    plain = scattered(plain)
    inputs = {key: value.to(DEVICE) for key, value in inputs.items()}
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)

    def adapted(model: Any, seed: int = 0) -> Any:
        torch.manual_seed(seed)
        return peft.get_peft_model(model, config)

    before = adapted(copy.deepcopy(plain))
    wanted = gradients(copy.deepcopy(before).double(), inputs, torch.float64), gradients(before, inputs)
    assert wanted[0] and all("lora" in name for name in wanted[0])
    model = copy.deepcopy(plain)
    if first:
        accelerate(model)
    model = adapted(model)
    report = accelerate(model)
    assert {"LlamaAttention", "CLIPAttention", "LlamaRMSNorm"} <= {row.layer for row in report.replaced}
    calls = count_calls(model)
    got = gradients(model, inputs)
    assert all(calls[row.name] == 1 for row in report.replaced), calls
    check(got, wanted)
    with torch.no_grad():
        logits = model(**inputs).logits
        merged = model.merge_and_unload()
        assert compare(merged(**inputs).logits, logits.double(), "model")
        assert restore(merged) == len(report.replaced)


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(64, 4, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x, x, x, need_weights=False)[0]  # type: ignore[no-any-return]


def test_adapters_of_multihead_attention() -> None:
    """peft exchanges its weights for the time of a call."""
    peft = pytest.importorskip("peft", exc_type=ImportError)
    block = scattered(Block())
    config = peft.LoraConfig(r=4, target_modules=["attn"], init_lora_weights=False)
    model = peft.get_peft_model(copy.deepcopy(block), config)
    x = torch.randn(2, 6, 64, device=DEVICE)
    wanted, plain = model(x), block(x)
    assert len(accelerate(model).replaced) == 1
    assert compare(model(x), wanted.detach().double(), "model") and not compare(wanted.detach(), plain.detach().double(), "model")
    with torch.no_grad():
        merged = model.merge_and_unload()
        calls = count_calls(merged)
        assert compare(merged(x), wanted.double(), "model") and sum(calls.values()) == 1


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant: bool) -> None:
    model, inputs = llava()
    model = scattered(model).double().train()
    inputs = {key: value.to(DEVICE) for key, value in inputs.items()}
    report = accelerate(model)
    wanted = gradients(model, inputs, torch.float64)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    calls = count_calls(model)
    got = gradients(model, inputs, torch.float64)
    attention = [row.name for row in report.replaced if row.layer == "LlamaAttention"]
    assert len(attention) == 2 and all(calls[name] == 2 for name in attention), "once more in the backward pass"
    torch.testing.assert_close(got, wanted)


def test_autocast_and_a_scaler() -> None:
    """The originals answer where the module knows no autocast; gradients are as far from fp32's as before."""
    model, inputs = llava()
    model = scattered(model)
    inputs = {key: value.to(DEVICE) for key, value in inputs.items()}
    exact = gradients(model, inputs)

    def under_autocast() -> dict[str, Tensor]:
        with torch.autocast(DEVICE.type, torch.bfloat16):
            return gradients(model, inputs)

    before = under_autocast()
    accelerate(model)
    got = under_autocast()
    assert got.keys() == exact.keys()
    errors = [sum((x[name] - value).square().sum().item() for name, value in exact.items()) ** 0.5 for x in (got, before)]
    assert 0 < errors[0] <= 1.1 * errors[1]
    assert all(value.dtype == exact[name].dtype for name, value in got.items())

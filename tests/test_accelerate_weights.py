# SPDX-License-Identifier: Apache-2.0
"""accelerate on large models: its time, and that no second copy of a weight stays."""

import time
from typing import Any

import torch
import transformers as hf
from accelerate_parity import randomize
from conftest import DEVICE
from hf_vlms import llava, qwen2_5_vl
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef

from vlmkernels import accelerate, restore


def test_seven_billion_parameters_take_less_than_two_seconds() -> None:
    """LLaVA-1.5 7B without its weights: what moving them takes is the device's (3.2 GB of projections)."""
    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_attention_heads": 16, "num_hidden_layers": 24}
    vision |= {"model_type": "clip_vision_model", "image_size": 336, "patch_size": 14, "projection_dim": 768}
    text = {
        "model_type": "llama",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_attention_heads": 32,
        "vocab_size": 32064,
    }
    with torch.device("meta"):
        model = hf.LlavaForConditionalGeneration(hf.LlavaConfig(vision_config=vision, text_config=text))
    assert sum(p.numel() for p in model.parameters()) > 7e9
    start = time.perf_counter()
    report = accelerate(model)
    assert time.perf_counter() - start < 2
    assert len(report.replaced) == 1 + 3 * 24 + 2 * 32 + 65
    start = time.perf_counter()
    assert restore(model) == len(report.replaced) and time.perf_counter() - start < 2


def bytes_of(model: nn.Module) -> int:
    """Of all storages that its parameters lie in."""
    return sum({p.untyped_storage().data_ptr(): p.untyped_storage().nbytes() for p in model.parameters()}.values())


def test_no_second_copy_of_a_weight_stays() -> None:
    """Projections of one input move next to each other, and their old places are free; nothing else moves."""
    for build in (llava, qwen2_5_vl):
        model: Any = randomize(build()[0]).to(DEVICE)
        places = {name: p.data_ptr() for name, p in model.named_parameters()}
        storages = {name: StorageWeakRef(p.untyped_storage()) for name, p in model.named_parameters()}
        before = bytes_of(model)
        accelerate(model)
        assert bytes_of(model) == before
        moved = {name for name, p in model.named_parameters() if p.data_ptr() != places[name]}
        together = (".q_proj.", ".k_proj.", ".v_proj.", ".gate_proj.", ".up_proj.")
        assert moved and all(any(word in name for word in together) for name in moved), moved
        assert all(storages[name].expired() for name in moved)
        restore(model)
        assert bytes_of(model) == before

# SPDX-License-Identifier: Apache-2.0
"""A prefill of Gemma-3 with several images: each image sees itself both ways, inside causal text and a sliding window.

Two prompts with two images and with three, the shorter one padded, go through a model of Gemma-3's shape with random weights,
before and after ``accelerate``. What the original makes of it in double precision is the truth that both are measured against.
``python examples/gemma3_prefill.py``.
"""

import argparse
import copy
import time
from collections.abc import Sequence

import torch
from transformers import Gemma3Config, Gemma3ForConditionalGeneration

from vlmkernels import accelerate
from vlmkernels.bench.photos import HALF, batch, normalized

IMAGE, TOKENS = 999, 16


def model(width: int, layers: int) -> Gemma3ForConditionalGeneration:
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": 4, "num_hidden_layers": 2}
    text = {**tower, "num_hidden_layers": layers, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000}
    text |= {"sliding_window": 24, "layer_types": ["sliding_attention", "full_attention"] * (layers // 2), "pad_token_id": 0}
    torch.manual_seed(0)
    vision = {**tower, "image_size": 112, "patch_size": 14}
    config = Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=TOKENS, image_token_index=IMAGE)
    return Gemma3ForConditionalGeneration(config).eval()


def prompt(images: int, text: int) -> torch.Tensor:
    """Text, and then each image with more text behind it."""
    generator = torch.Generator().manual_seed(images)
    words = [torch.randint(3, IMAGE, (text,), generator=generator) for _ in range(images + 1)]
    image = torch.full((TOKENS,), IMAGE)
    return torch.cat([words[0], *(part for some in words[1:] for part in (image, some))])


def batch_of(prompts: Sequence[torch.Tensor], images: int) -> dict[str, torch.Tensor]:
    """The prompts padded on the left, and as many photos as they have images."""
    longest = max(map(len, prompts))
    rows = torch.stack([torch.cat([row.new_zeros(longest - len(row)), row]) for row in prompts])
    pixels = normalized(batch(images, 112), HALF, torch.float32)
    types = (rows == IMAGE).long()
    return {"input_ids": rows, "attention_mask": (rows > 0).long(), "token_type_ids": types, "pixel_values": pixels}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Prefill three times, and tell how far before and after are from the truth, as shares of its size."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--text", type=int, default=20, help="tokens of text around each image")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    gemma3 = model(options.width, options.layers).to(options.device)
    inputs = batch_of([prompt(2, options.text), prompt(3, options.text)], 5)
    inputs = {name: value.to(options.device) for name, value in inputs.items()}
    real = inputs["attention_mask"].bool().cpu()

    @torch.no_grad()
    def logits(of: Gemma3ForConditionalGeneration, dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, float]:
        given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        start = time.perf_counter()
        found: torch.Tensor = of(**given).logits.cpu()[real].double()
        return found, time.perf_counter() - start

    truth, _ = logits(copy.deepcopy(gemma3).double(), torch.float64)
    logits(gemma3)
    original, before = logits(gemma3)
    report = accelerate(gemma3)
    print(report)
    logits(gemma3)
    fused, after = logits(gemma3)
    errors = {name: ((x - truth).norm() / truth.norm()).item() for name, x in (("fused", fused), ("original", original))}
    print(f"{int(real.sum())} tokens: original {1e3 * before:.1f} ms, error {errors['original']:.1e};", end=" ")
    print(f"fused {1e3 * after:.1f} ms, error {errors['fused']:.1e}")
    return {**errors, "tokens": int(real.sum()), "replaced": len(report.replaced)}


if __name__ == "__main__":
    main()

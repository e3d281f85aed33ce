# SPDX-License-Identifier: Apache-2.0
"""Captions for a batch of real photos from a model of BLIP-2's shape: the same tokens before and after ``accelerate``.

The weights are random and small, so the captions mean nothing; what is shown is that prompts of several lengths, padded on the
left, the Q-Former and the cache of the decoder give what the original gives. ``python examples/blip2_captions.py``.
"""

import argparse
import time
from collections.abc import Sequence

import torch
from transformers import Blip2Config, Blip2ForConditionalGeneration

from vlmkernels import accelerate
from vlmkernels.bench.photos import CLIP, batch, normalized

IMAGE, PAD, QUERIES = 999, 1, 32


def model(width: int, layers: int) -> Blip2ForConditionalGeneration:
    heads = width // 32
    tower = {"hidden_size": width, "intermediate_size": 2 * width, "num_attention_heads": heads, "num_hidden_layers": layers}
    text = {"model_type": "opt", "hidden_size": width, "ffn_dim": 2 * width, "word_embed_proj_dim": width, "vocab_size": 1000}
    text |= {"num_attention_heads": heads, "num_hidden_layers": layers, "pad_token_id": PAD, "eos_token_id": 2}
    torch.manual_seed(0)
    config = Blip2Config(
        vision_config={**tower, "image_size": 224, "patch_size": 14},
        qformer_config={**tower, "encoder_hidden_size": width, "cross_attention_frequency": 2, "use_qformer_text_input": False},
        text_config=text,
        num_query_tokens=QUERIES,
        image_token_index=IMAGE,
    )
    made = Blip2ForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in made.parameters():  # large enough that a token depends on those before it
            if parameter.dim() > 1:
                parameter.normal_(std=2 * parameter[0].numel() ** -0.5)
        head = made.language_model.lm_head
        head.weight = torch.nn.Parameter(torch.randn_like(head.weight))  # apart from the embedding: else it repeats what it said
    return made


def prompts(count: int, longest: int) -> dict[str, torch.Tensor]:
    """The image's tokens and a question of up to ``longest`` tokens, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    rows, masks = [], []
    for i in range(count):
        question = torch.randint(3, IMAGE, (1 + i % longest,), generator=generator)
        padding = longest - len(question)
        rows.append(torch.cat([torch.full((padding,), PAD), torch.full((QUERIES,), IMAGE), question]))
        masks.append(torch.cat([torch.zeros(padding), torch.ones(QUERIES + len(question))]).long())
    return {"input_ids": torch.stack(rows), "attention_mask": torch.stack(masks)}


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Generate before and after; how many tokens, and the share that is the same."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=8)
    parser.add_argument("--new", type=int, default=12, help="tokens of a caption")
    parser.add_argument("--width", type=int, default=256)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    blip2 = model(options.width, options.layers).to(options.device)
    inputs = {"pixel_values": normalized(batch(options.photos, 224), CLIP, torch.float32), **prompts(options.photos, 5)}
    inputs = {name: value.to(options.device) for name, value in inputs.items()}

    def captions() -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        found: torch.Tensor = blip2.generate(**inputs, max_new_tokens=options.new, min_new_tokens=options.new, do_sample=False)
        return found.cpu(), time.perf_counter() - start

    captions()
    original, before = captions()
    report = accelerate(blip2)
    print(report)
    captions()
    fused, after = captions()
    same = (fused == original).float().mean().item()
    print(f"{fused.numel()} tokens, {same:.0%} the same; original {before:.2f} s, fused {after:.2f} s")
    print("the first caption:", fused[0, -options.new :].tolist())
    return {"tokens": fused.numel(), "same": same, "replaced": len(report.replaced)}


if __name__ == "__main__":
    main()

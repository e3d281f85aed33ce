# SPDX-License-Identifier: Apache-2.0
"""Zero-shot style retrieval over real photos, with a small CLIP that is trained here: fused against the original.

A CLIP of transformers learns, from crops of the left of each photo of scikit-image, which of eight captions belongs to it. Then
crops of the right, which it has never seen, find their caption, through the layers of this package and through the original's.
Nothing is downloaded, and a CPU needs less than a minute: ``python examples/clip_retrieval.py``.
"""

import argparse
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from transformers import CLIPConfig, CLIPModel

from vlmkernels import accelerate, restore
from vlmkernels.bench.photos import CLIP, normalizer, photos
from vlmkernels.nn import ClipLoss

CAPTIONS = (
    "a portrait of an astronaut",
    "the face of a cat",
    "a cup of coffee on a table",
    "a rocket before its start",
    "a motorcycle in a garage",
    "a retina under the microscope",
    "galaxies in the deep field of hubble",
    "a stained slice of tissue",
)
SIZE = 32


def crops(count: int, right: bool, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Random squares of the left 70 % of the photos or of the other 30, and which photo each is of."""
    pixels, labels = [], []
    originals = [torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(*photo.size[::-1], 3) for photo in photos()]
    for i in range(count):
        photo = originals[i % len(originals)].permute(2, 0, 1)
        border = int(0.7 * photo.shape[2])
        photo = photo[:, :, border:] if right else photo[:, :, :border]
        side = min(photo.shape[1:])
        scale, x, y = torch.rand(3, generator=generator).tolist()
        side = int(side * (0.4 + 0.6 * scale))
        left, top = int(x * (photo.shape[2] - side)), int(y * (photo.shape[1] - side))
        crop = photo[None, :, top : top + side, left : left + side].float()
        crop = F.interpolate(crop, (SIZE, SIZE), mode="area")
        pixels.append(crop.flip(3) if i // len(originals) % 2 else crop)
        labels.append(i % len(originals))
    return torch.cat(pixels).to(torch.uint8), torch.tensor(labels)


def tokens(captions: Sequence[str]) -> tuple[torch.Tensor, int]:
    """Each word a number, behind a beginning and before an end, which is the largest; and how many numbers there are."""
    words = sorted({word for caption in captions for word in caption.split()})
    length, end = max(len(caption.split()) for caption in captions) + 2, len(words) + 1
    rows = [[0, *(words.index(word) + 1 for word in caption.split()), end] for caption in captions]
    return torch.tensor([row + [end] * (length - len(row)) for row in rows]), end + 1


def small_clip(words: int, width: int) -> CLIPModel:
    tower = {"hidden_size": width, "num_attention_heads": width // 16, "num_hidden_layers": 2, "intermediate_size": 2 * width}
    text = {**tower, "vocab_size": words, "bos_token_id": 0, "eos_token_id": words - 1, "max_position_embeddings": 16}
    vision = {**tower, "image_size": SIZE, "patch_size": 8}
    torch.manual_seed(0)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=width))


def main(arguments: Sequence[str] | None = None) -> dict[str, float]:
    """Train, retrieve twice, and tell; the share of captions found and how far the two disagree."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=150)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    device = torch.device(options.device)
    generator = torch.Generator().manual_seed(0)
    normalize = normalizer(CLIP, device, torch.float32)
    texts, words = tokens(CAPTIONS[: len(photos())])
    texts = texts.to(device)
    train, labels = (x.to(device) for x in crops(64 * len(texts), False, generator))
    held, truth = (x.to(device) for x in crops(16 * len(texts), True, generator))

    model, loss_of = small_clip(words, options.width).to(device), ClipLoss()
    report = accelerate(model)
    print(report)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    for step in range(options.steps):
        # One crop of each photo: every caption belongs to one image of a batch.
        chosen = torch.stack([torch.randint(64, (1,), generator=generator) * len(texts) + i for i in range(len(texts))])[:, 0]
        out = model(input_ids=texts[labels[chosen]], pixel_values=normalize(train[chosen]))
        loss = loss_of(out.image_embeds, out.text_embeds, model.logit_scale.exp())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 50 == 0:
            print(f"step {step}: loss {loss.item():.3f}")

    @torch.no_grad()
    def logits() -> tuple[torch.Tensor, float]:
        start = time.perf_counter()
        found: torch.Tensor = model.eval()(input_ids=texts, pixel_values=normalize(held)).logits_per_image.cpu()
        return found, time.perf_counter() - start

    logits()
    fused, seconds = logits()
    restore(model)
    logits()
    original, before = logits()
    right = (fused.argmax(1) == truth.cpu()).float().mean().item()
    same = (fused.argmax(1) == original.argmax(1)).float().mean().item()
    error = ((fused - original).abs().max() / original.abs().max()).item()
    print(f"unseen crops that find their caption: {right:.0%} of {len(held)} (chance {1 / len(texts):.0%})")
    print(f"same answer as the original for {same:.0%}, logits within {error:.1e}")
    print(f"one call of so small a model, whose time is that of calls: {1e3 * seconds:.1f} ms, original {1e3 * before:.1f} ms")
    return {"right": right, "same": same, "error": error, "replaced": len(report.replaced)}


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""A small model learns to caption real photos, three times from the same seed: in fp32 through the reference, in bf16 through
these kernels, in bf16 through torch. ``python benchmarks/training_curve.py`` writes the losses and draws them for docs/.

An image is four crops of scikit-image's photos, some upside down; its caption says for each what it shows and which way up.
Photo and caption are one sequence in which the image's tokens see each other both ways and words what lies before them, through
four layers with two query heads for each key head.
"""

import argparse
import contextlib
import json
import statistics
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels import KeyRanges, attention, patch_embed, use_backend
from vlmkernels.bench import need
from vlmkernels.bench.photos import HALF, normalizer, photos

ROOT = Path(__file__).parents[1]
RESULTS, PLOT = ROOT / "benchmarks" / "results" / "training-curve.json", ROOT / "docs" / "training.png"
#: The runs: the backend that is forced, and the dtype of all products.
RUNS = {
    "reference, fp32": ("reference", torch.float32),
    "vlmkernels, bf16": ("", torch.bfloat16),
    "torch, bf16": ("torch", torch.bfloat16),
}
COLORS = ("black", "#1f77b4", "#c7c7c7")
PATCH, HEAD_DIM, CROPS = 14, 64, 64
#: A caption: a beginning, for each crop a photo and a way up, an end.
WORDS, WAYS = 9, 2


def crops(right: bool, resolution: int) -> Tensor:
    """uint8 ``[photos, CROPS, 3, resolution, resolution]`` of the left 70 % of each photo, or of the rest, for tests."""
    generator, found = torch.Generator().manual_seed(int(right)), []
    for photo in photos():
        pixels = torch.frombuffer(bytearray(photo.tobytes()), dtype=torch.uint8).view(*photo.size[::-1], 3).permute(2, 0, 1)
        border = int(0.7 * pixels.shape[2])
        pixels = pixels[:, :, border:] if right else pixels[:, :, :border]
        for scale, x, y in torch.rand(CROPS, 3, generator=generator).tolist():
            side = int(min(pixels.shape[1:]) * (0.4 + 0.6 * scale))
            left, top = int(x * (pixels.shape[2] - side)), int(y * (pixels.shape[1] - side))
            crop = pixels[None, :, top : top + side, left : left + side].float()
            found.append(F.interpolate(crop, (resolution, resolution), mode="area").to(torch.uint8))
    return torch.cat(found).view(-1, CROPS, 3, resolution, resolution)


def batches(pool: Tensor, size: int, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Images, uint8 ``[size, 3, H, W]``, and their captions ``[size, 1 + WORDS]``: the same of every seed."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        which, crop, way = (torch.randint(n, (size, 4), generator=generator) for n in (len(pool), CROPS, WAYS))
        parts = pool[which.to(pool.device), crop.to(pool.device)]
        parts = torch.where(way.to(pool.device).bool()[..., None, None, None], parts.flip(-2), parts)
        image = torch.cat([torch.cat([parts[:, 0], parts[:, 1]], -1), torch.cat([parts[:, 2], parts[:, 3]], -1)], -2)
        words = torch.stack([which, len(pool) + way], -1).flatten(1)
        ends = torch.full((size, 1), len(pool) + WAYS)
        yield image, torch.cat([ends, words, ends], 1).to(pool.device)


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = width // HEAD_DIM
        self.norm_1, self.norm_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 2 * width), nn.Linear(width, width)
        self.feed_forward = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, ranges: KeyRanges) -> Tensor:
        qkv = self.qkv(self.norm_1(x)).unflatten(-1, (2 * self.heads, HEAD_DIM))
        q, k, v = qkv.split([self.heads, self.heads // 2, self.heads // 2], 2)
        x = x + self.out(attention(q, k, v, ranges).flatten(2))
        return x + self.feed_forward(self.norm_2(x))


class Captioner(nn.Module):
    def __init__(self, patches: int, width: int, words: int, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        self.patch = nn.Conv2d(3, width, PATCH, PATCH)
        self.places = nn.Parameter(0.02 * torch.randn(patches, width))
        self.words, self.order = nn.Embedding(words, width), nn.Parameter(0.02 * torch.randn(WORDS, width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(4))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, words)

    def forward(self, pixels: Tensor, words: Tensor) -> Tensor:
        """The logits of the word behind each of ``words``."""
        weight, bias, places = (x.to(self.dtype) for x in (self.patch.weight, self.patch.bias, self.places))
        image = patch_embed(pixels.to(self.dtype), weight, bias, patch_size=PATCH, pos_embed=places).float()
        x = torch.cat([image, self.words(words) + self.order], 1)
        patches = image.shape[1]
        ranges = KeyRanges.prefix_lm(x.shape[1], patches, device=x.device)
        with torch.autocast(x.device.type, torch.bfloat16, enabled=self.dtype == torch.bfloat16):
            for block in self.blocks:
                x = block(x, ranges)
            logits: Tensor = self.head(self.norm(x[:, patches:]))
        return logits.float()


def train(backend: str, dtype: torch.dtype, pools: tuple[Tensor, ...], steps: int, size: int, width: int) -> dict[str, Any]:
    """The loss of each step, and the share of words of unseen crops that are right."""
    device, words, patches = pools[0].device, len(pools[0]) + WAYS + 1, (2 * pools[0].shape[-1] // PATCH) ** 2
    torch.manual_seed(0)
    model = Captioner(patches, width, words, dtype).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, betas=(0.9, 0.95))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) * 12 / steps) * (1 - step / steps) ** 0.5
    )
    normalize, losses = normalizer(HALF, device, torch.float32), []

    def logits(image: Tensor, caption: Tensor) -> Tensor:
        return model(normalize(image), caption[:, :-1]).flatten(0, 1)

    with use_backend(backend) if backend else contextlib.nullcontext():
        for _, (image, caption) in zip(range(steps), batches(pools[0], size, 0), strict=False):
            loss = F.cross_entropy(logits(image, caption), caption[:, 1:].flatten())
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            losses.append(loss.detach())
        with torch.no_grad():
            held = [(logits(*batch).argmax(-1) == batch[1][:, 1:].flatten()).float().mean()
                    for _, batch in zip(range(8), batches(pools[1], size, 1), strict=False)]  # fmt: skip
    return {"losses": [round(x, 5) for x in torch.stack(losses).tolist()], "right": torch.stack(held).mean().item()}


def smooth(losses: Sequence[float], over: int = 10) -> list[float]:
    return [statistics.fmean(losses[max(0, i - over + 1) : i + 1]) for i in range(len(losses))]


def distances(runs: dict[str, Any]) -> dict[str, float]:
    """How far the smoothed loss of each run is from that of the first, on average."""
    first, *others = runs
    base = smooth(runs[first]["losses"])
    return {
        name: statistics.fmean(abs(x - y) for x, y in zip(smooth(runs[name]["losses"]), base, strict=True)) for name in others
    }


def draw(runs: dict[str, Any], path: Path) -> None:
    need("matplotlib").use("Agg")
    pyplot = need("matplotlib.pyplot")
    figure, axis = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    axis.spines[["top", "right"]].set_visible(False)
    for (name, run), color, width in reversed(list(zip(runs.items(), COLORS, (1.0, 2.2, 4.5), strict=True))):
        axis.plot(smooth(run["losses"]), label=f"{name}: {run['right']:.1%} of unseen words", color=color, linewidth=width)
    axis.set(xlabel="step", ylabel="loss, mean of 10 steps", ylim=(0, None))
    axis.legend(frameon=False)
    figure.savefig(path, dpi=110, metadata={"Software": None})
    pyplot.close(figure)


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--width", type=int, default=384, help="a multiple of 128: heads of 64 channels, by twos")
    parser.add_argument("--grid", type=int, default=16, help="patches of a row of an image, an even number")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--draw", action="store_true", help="draw what the results hold, and train nothing")
    options = parser.parse_args(arguments)
    if options.draw:
        found: dict[str, Any] = json.loads(options.results.read_text())
        draw(found["runs"], PLOT)
        return found
    device = torch.device(options.device)
    pools = tuple(crops(right, PATCH * options.grid // 2).to(device) for right in (False, True))
    settings = {"steps": options.steps, "batch": options.batch, "width": options.width, "grid": options.grid}
    runs = {}
    for name, how in RUNS.items():
        start = time.perf_counter()
        run = runs[name] = train(*how, pools, options.steps, options.batch, options.width)
        ends = f"{run['losses'][0]:.3f} to {smooth(run['losses'])[-1]:.3f}"
        print(f"{name}: loss {ends}, {run['right']:.1%} of unseen words, {time.perf_counter() - start:.0f} s", flush=True)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    found = {"device": where, "torch": torch.__version__, **settings, "distance": distances(runs), "runs": runs}
    options.results.write_text(json.dumps(found) + "\n")
    print("mean distance from the first:", {name: round(x, 4) for name, x in found["distance"].items()})
    return found


if __name__ == "__main__":
    main()

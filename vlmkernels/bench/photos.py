# SPDX-License-Identifier: Apache-2.0
"""Batches of real photos: those inside the scikit-image wheel, cropped, flipped and resized to a model's input size."""

import functools
import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from vlmkernels.bench import MissingExtra, need

#: Colour photos in ``skimage/data`` of the wheel. Reading them takes no network; scikit-image itself is not imported.
NAMES = (
    "astronaut.png",
    "chelsea.png",
    "coffee.png",
    "rocket.jpg",
    "motorcycle_left.png",
    "retina.jpg",
    "hubble_deep_field.jpg",
    "ihc.png",
)
#: More crops than this are mirror images of earlier ones: resizing on the CPU would take longer than the benchmark.
DISTINCT = 64

#: Mean and standard deviation of a published preprocessor.
Statistics = tuple[tuple[float, ...], tuple[float, ...]]
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@functools.cache
def photos() -> tuple[Any, ...]:
    """The photos as PIL images.

    Raises:
        MissingExtra: scikit-image or pillow is not installed.
    """
    spec = importlib.util.find_spec("skimage")
    if spec is None or spec.origin is None:
        raise MissingExtra("this needs the photos of scikit-image: pip install 'vlmkernels[bench]'")
    folder = Path(spec.origin).parent / "data"
    image = need("PIL.Image")
    found = tuple(image.open(folder / name).convert("RGB") for name in NAMES if (folder / name).exists())
    if not found:
        raise MissingExtra(f"no photo in {folder}: reinstall scikit-image")
    return found


@functools.cache
def batch(size: int, resolution: int) -> torch.Tensor:
    """``size`` different photos, uint8 ``[size, 3, resolution, resolution]`` on the CPU; the same on every call.

    The first of each photo is its largest centred square, the following ones are random squares of at least half that side;
    past ``DISTINCT`` crops come their mirror images.
    """
    numpy = need("numpy")
    originals = photos()
    generator = torch.Generator().manual_seed(0)
    crops = []
    for i in range(min(size, DISTINCT)):
        photo = originals[i % len(originals)]
        width, height = photo.size
        side = min(width, height)
        x, y = (width - side) // 2, (height - side) // 2
        if i >= len(originals):
            scale, right, down = torch.rand(3, generator=generator).tolist()
            side = int(side * (0.5 + 0.5 * scale))
            x, y = int(right * (width - side)), int(down * (height - side))
        crop = photo.resize((resolution, resolution), need("PIL.Image").Resampling.BICUBIC, box=(x, y, x + side, y + side))
        crops.append(torch.from_numpy(numpy.array(crop)).permute(2, 0, 1))
    pixels = torch.stack(crops)
    mirrored = [pixels, pixels.flip(3), pixels.flip(2), pixels.flip(2, 3)]
    repeats = -(-size // len(crops))
    return torch.cat([mirrored[i % 4] for i in range(repeats)])[:size].contiguous()


def normalizer(statistics: Statistics, device: torch.device, dtype: torch.dtype) -> Callable[[torch.Tensor], torch.Tensor]:
    """A function that turns uint8 pixels ``[B, 3, H, W]`` into ``(pixels / 255 - mean) / std`` in ``dtype``.

    The constants are on the device beforehand, so that a call copies nothing from the host.
    """
    mean, std = (torch.tensor(x, device=device).view(1, 3, 1, 1) for x in statistics)
    return lambda pixels: ((pixels.float() / 255 - mean) / std).to(dtype)


def normalized(pixels: torch.Tensor, statistics: Statistics, dtype: torch.dtype) -> torch.Tensor:
    """uint8 pixels normalised in ``dtype``."""
    return normalizer(statistics, pixels.device, dtype)(pixels)

# SPDX-License-Identifier: Apache-2.0
"""A small image-text model to train: patches of a photo, then its name letter by letter, as PaliGemma sees them."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlmkernels import KeyRanges, attention
from vlmkernels.bench import photos
from vlmkernels.nn import PatchEmbed

LETTERS = 28  # beginning, end, and the alphabet
HALF = (0.5, 0.5, 0.5)


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor, ranges: KeyRanges) -> Tensor:
        q, k, v = self.qkv(self.norms[0](x)).unflatten(-1, (3, self.heads, -1)).unbind(2)
        x = x + self.out(attention(q, k, v, ranges).flatten(2))
        return x + self.mlp(self.norms[1](x))


class Captioner(nn.Module):
    """Image tokens see each other, letters the image and the letters before: a prefix-LM."""

    def __init__(self, width: int, heads: int, layers: int, resolution: int, length: int) -> None:
        super().__init__()
        self.patches = PatchEmbed(width, 16, resolution, layout="siglip", mean=HALF, std=HALF)
        self.letters = nn.Embedding(LETTERS, width)
        self.places = nn.Parameter(0.02 * torch.randn(length, width))
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, LETTERS)

    def forward(self, pixels: Tensor, letters: Tensor, run: Callable[..., Tensor] | None = None) -> Tensor:
        """Logits of the letters that follow. ``run(block, x, ranges)`` calls a block; by default just that."""
        image, text = self.patches(pixels), self.letters(letters) + self.places
        x = torch.cat([image, text.to(image.dtype)], 1)
        ranges = KeyRanges.prefix_lm(x.shape[1], image.shape[1], device=x.device)
        for block in self.blocks:
            x = block(x, ranges) if run is None else run(block, x, ranges)
        return self.head(self.norm(x[:, image.shape[1] :]))

    def loss(self, pixels: Tensor, names: Tensor, run: Callable[..., Tensor] | None = None) -> Tensor:
        logits = self(pixels, names[:, :-1], run)
        return F.cross_entropy(logits.float().flatten(0, 1), names[:, 1:].flatten())


def named_photos(size: int, resolution: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Crops of real photos, and the name of the photo that each is of, ended by ones."""
    pixels = photos.batch(size, resolution)
    words = ["".join(filter(str.isalpha, name.rpartition(".")[0])) for name in photos.NAMES[: len(photos.photos())]]
    longest = max(map(len, words))
    table = torch.tensor([[0, *(ord(letter) - 95 for letter in word), *[1] * (longest + 1 - len(word))] for word in words])
    of_crop = torch.arange(size) % min(size, photos.DISTINCT) % len(words)
    return pixels.to(device), table[of_crop].to(device)

# SPDX-License-Identifier: Apache-2.0
"""The shapes of published models: what attention and patch embedding meet in them. For tests, checks and measurements."""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionShape:
    """``q [B, Sq, H, D]``, ``k`` and ``v [B, Sk, Hk, D]`` of one attention layer, for a batch of one image or text.

    ``mask`` names the kind: ``"full"``, ``"causal"``, ``"prefix"`` (two-way over the first ``image`` tokens), ``"image"``
    (causal, and two-way inside an image of ``image`` tokens).
    """

    name: str
    H: int
    D: int
    Sq: int
    Sk: int = 0  # 0: Sq
    Hk: int = 0  # 0: H
    mask: str = "full"
    image: int = 0
    softcap: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "Sk", self.Sk or self.Sq)
        object.__setattr__(self, "Hk", self.Hk or self.H)


@dataclass(frozen=True)
class PatchEmbedShape:
    """The patch embedding of one vision tower: ``C`` is 3; ``prefix`` counts class and register tokens."""

    name: str
    D: int
    patch: tuple[int, ...]  # (P, P), or (Pt, P, P)
    size: int
    bias: bool
    prefix: int
    norm: bool = False  # CLIP's LayerNorm after the positions
    rows: str = ""  # the order of the columns where the pixels come as rows: "cyx" or "yxc"

    @property
    def patches(self) -> int:
        """Patches of one frame."""
        return (self.size // self.patch[-1]) ** 2


VISION = (
    AttentionShape("ViT-B/16@224", 12, 64, 197),
    AttentionShape("CLIP-L/14@336", 16, 64, 577),
    AttentionShape("SigLIP-So400m/14@384", 16, 72, 729),
    AttentionShape("CLIP-H/14@224", 16, 80, 257),
    AttentionShape("EVA-g/14@224", 16, 88, 257),
    AttentionShape("SigLIP2-giant/16@384", 16, 96, 576),
    AttentionShape("CLIP-bigG/14@224", 16, 104, 257),
    AttentionShape("Gemma-3 tower@896", 16, 72, 4096),
    AttentionShape("Qwen2-VL tower@448", 16, 80, 1024),
    AttentionShape("Qwen2.5-VL window", 16, 80, 64),
)
TEXT = (
    AttentionShape("LLaVA-1.5-7B", 32, 128, 704, mask="causal"),
    AttentionShape("PaliGemma-3B@224", 8, 256, 320, Hk=1, mask="prefix", image=256),
    AttentionShape("PaliGemma2-3B@224", 8, 256, 320, Hk=4, mask="prefix", image=256, softcap=50.0),
    AttentionShape("Gemma-3-4B", 8, 256, 512, Hk=4, mask="image", image=256),
    AttentionShape("Gemma-3-27B", 32, 128, 512, Hk=16, mask="image", image=256),
    AttentionShape("Qwen2-VL-7B", 28, 128, 512, Hk=4, mask="causal"),
    AttentionShape("GIT-base@224", 12, 64, 261, mask="prefix", image=197),
)
CROSS = (
    AttentionShape("BLIP-2 Q-Former", 12, 64, 32, 257),
    AttentionShape("Kosmos-2 resampler", 32, 64, 64, 321),
    AttentionShape("OpenFlamingo perceiver", 8, 64, 64, 320),
    AttentionShape("SigLIP pooling head", 16, 72, 1, 729),
    AttentionShape("Llama-3.2-11B cross@448", 32, 128, 128, 4100, Hk=8),
)
ATTENTION = (*VISION, *TEXT, *CROSS)

PATCH_EMBED = (
    PatchEmbedShape("ViT-B/16@224", 768, (16, 16), 224, bias=True, prefix=1),
    PatchEmbedShape("CLIP-L/14@336", 1024, (14, 14), 336, bias=False, prefix=1, norm=True),
    PatchEmbedShape("SigLIP-So400m/14@384", 1152, (14, 14), 384, bias=True, prefix=0),
    PatchEmbedShape("EVA-g/14@224", 1408, (14, 14), 224, bias=True, prefix=1),
    PatchEmbedShape("DINOv2-L/14 reg4@518", 1024, (14, 14), 518, bias=True, prefix=5),
    PatchEmbedShape("SigLIP2-B/16 NaFlex", 768, (16, 16), 256, bias=True, prefix=0, rows="yxc"),
    PatchEmbedShape("Qwen2-VL@448", 1280, (2, 14, 14), 448, bias=False, prefix=0, rows="cyx"),
    PatchEmbedShape("Qwen3-VL@448", 1152, (2, 16, 16), 448, bias=True, prefix=0, rows="cyx"),
)

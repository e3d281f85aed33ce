# SPDX-License-Identifier: Apache-2.0
"""Which workloads belong to which suite."""

import dataclasses
from collections.abc import Callable, Sequence

import torch

from vlmkernels.bench import cross_attention, models, overhead, published, towers
from vlmkernels.bench.attention import mask_cost, packed_attention, random_attention, tower_attention
from vlmkernels.bench.contrastive import large, loss_case
from vlmkernels.bench.patch_embed import MIXED, mixed_patch_embed, rows_patch_embed, tower_latency, tower_patch_embed
from vlmkernels.bench.workloads import Case, Place, Workload, rope_case

LARGE = "it is sized for a GPU"
HOST = "host time is measured where the work itself runs on a GPU"
GRAPH = "latency is measured in a CUDA graph"


def _main() -> list[Workload]:
    work = []
    for tower in (towers.VIT_B, towers.CLIP_L, towers.SIGLIP):
        work.append(Workload("main", "patch_embed", tower.name, "fwd", tower_patch_embed(tower)))
        work.append(Workload("main", "attention", tower.name, "fwd", tower_attention(tower)))
    work.append(Workload("main", "attention", "BLIP-2 Q-Former 32x257", "fwd", tower_attention(None)))
    return work


FWD, BOTH = ("fwd",), ("fwd", "bwd")
#: name, mask, (B, H, Hk, Sq, Sk, D), directions.
ATTENTION = (
    ("ViT-B B256 S197 D64", "", (256, 12, 12, 197, 197, 64), BOTH),
    ("EVA-g B64 S257 D88", "", (64, 16, 16, 257, 257, 88), BOTH),
    ("CLIP-L B32 S577 D64", "", (32, 16, 16, 577, 577, 64), BOTH),
    ("SigLIP B32 S729 D72", "", (32, 16, 16, 729, 729, 72), BOTH),
    ("text of CLIP-L B1024 S77 D64", "causal", (1024, 12, 12, 77, 77, 64), BOTH),
    ("BERT B256 S128 D64", "", (256, 12, 12, 128, 128, 64), BOTH),
    ("CLIP-L batch 1 S577 D64", "", (1, 16, 16, 577, 577, 64), FWD),
    ("SigLIP batch 1 S729 D72", "", (1, 16, 16, 729, 729, 72), FWD),
    ("EVA-g batch 1 S257 D88", "", (1, 16, 16, 257, 257, 88), FWD),
    ("dense 8192 D64", "", (4, 16, 16, 8192, 8192, 64), BOTH),
    ("SigLIP2 4096 D72", "", (8, 16, 16, 4096, 4096, 72), BOTH),
    ("ViT-H 4096 D80", "", (8, 16, 16, 4096, 4096, 80), BOTH),
    ("dense 4096 D88", "", (8, 16, 16, 4096, 4096, 88), BOTH),
    ("dense 4096 D96", "", (8, 16, 16, 4096, 4096, 96), BOTH),
    ("dense 4096 D104", "", (8, 16, 16, 4096, 4096, 104), BOTH),
    ("InternViT-6B B8 S1025 D128", "", (8, 25, 25, 1025, 1025, 128), BOTH),
    ("dense 8192 D128", "", (2, 16, 16, 8192, 8192, 128), BOTH),
    ("dense 2048 D192", "", (4, 16, 16, 2048, 2048, 192), BOTH),
    ("causal 4096 D128 GQA4", "causal", (4, 32, 8, 4096, 4096, 128), BOTH),
    ("text of Qwen2-VL 1500 D128 GQA7", "causal", (1, 28, 4, 1500, 1500, 128), BOTH),
    ("prefix-LM 1024+3072 D64 GQA4", "prefix", (4, 32, 8, 4096, 4096, 64), BOTH),
    ("prefix-LM 1024+3072 D128 GQA4", "prefix", (4, 32, 8, 4096, 4096, 128), BOTH),
    ("Gemma-3 image blocks 4096 D64 GQA4", "image_blocks", (4, 32, 8, 4096, 4096, 64), BOTH),
    ("Gemma-3 image blocks 4096 D128 GQA4", "image_blocks", (4, 32, 8, 4096, 4096, 128), BOTH),
    ("Gemma-3 image blocks 4096 D256 GQA2", "image_blocks", (4, 8, 4, 4096, 4096, 256), BOTH),
    ("Gemma-3 image blocks 8192 D256 GQA2", "image_blocks", (2, 16, 8, 8192, 8192, 256), BOTH),
    ("mllama cross 2048x6404 D128 GQA4", "", (2, 32, 8, 2048, 6404, 128), FWD),
    ("resampler 64x1024 D128", "", (32, 16, 16, 64, 1024, 128), BOTH),
)
#: Tokens of 16 images in one packed row.
IMAGES = (4096, 1536, 4800, 784, 256, 1024, 2048, 3072, 576, 4096, 900, 1600, 2500, 400, 3600, 1296)
#: name, tokens of each image or window, D; all with 16 heads.
PACKED = (
    ("packed images 256..4800 D72", IMAGES, 72),
    ("packed images 256..4800 D80", IMAGES, 80),
    ("Qwen2.5-VL 512 windows of 64 D80", (64,) * 512, 80),
    ("Qwen2.5-VL 2048 windows of 64 D80", (64,) * 2048, 80),
)


MASKS = (Place("masks"),)


def _speed(shape: tuple[int, int, int, int, int, int], direction: str) -> tuple[Place, ...]:
    """The places of self-attention without a mask in the plots of its speed; that by head dim is of 4096 tokens."""
    _, _, _, queries, keys, dim = shape
    if queries != keys:
        return ()
    way = "forward" if direction == "fwd" else "backward"
    places = [Place("length", f"{way}, head dim {dim}", queries)] if dim in (64, 128) else []
    if queries == 4096:
        places.append(Place("head_dim", way, dim))
    return tuple(places)


def _attention() -> list[Workload]:
    work = [
        Workload(
            "attention",
            "attention",
            name,
            direction,
            random_attention(shape, mask, direction == "bwd"),
            LARGE,
            MASKS if mask else _speed(shape, direction),
        )  # fmt: skip
        for name, mask, shape, directions in ATTENTION
        for direction in directions
    ]
    work += [
        Workload("attention", "attention", name, direction, packed_attention(lengths, 16, dim, direction == "bwd"), LARGE, MASKS)
        for name, lengths, dim in PACKED
        for direction in BOTH
    ]
    for name, mask in (("prefix-LM 8192", "prefix"), ("Gemma-3 image blocks 8192", "image_blocks")):
        work.append(Workload("attention", "tile_bounds", name, "fwd", mask_cost(mask, 8192), LARGE))
    return work


def _patch_embed() -> list[Workload]:
    work = []

    def add(name: str, direction: str, build: Callable[[torch.device], Case], gpu_only: str = "") -> None:
        work.append(Workload("patch_embed", "patch_embed", name, direction, build, gpu_only))

    measured = (towers.VIT_B, towers.CLIP_L, towers.SIGLIP, towers.EVA_G)
    for tower in measured:
        add(tower.name, "fwd", tower_patch_embed(tower))
        add(f"{tower.name} uint8", "fwd", tower_patch_embed(tower, uint8=True))
    for tower in (towers.CLIP_B, towers.CLIP_B_32):
        add(tower.name, "fwd", tower_patch_embed(tower))
    add("Qwen2-VL rows", "fwd", rows_patch_embed(towers.QWEN2))
    add("Qwen2-VL still frames", "fwd", rows_patch_embed(towers.QWEN2, still=True))
    add("Qwen3-VL rows with positions", "fwd", rows_patch_embed(towers.QWEN3, positions=True))
    for tower in measured:
        for batch in (1, 8):
            add(f"{tower.name} batch {batch}", "fwd", tower_latency(tower, batch), GRAPH)
            add(f"{tower.name} uint8 batch {batch}", "fwd", tower_latency(tower, batch, uint8=True), GRAPH)
    for tower in (towers.CLIP_L, towers.SIGLIP):
        add(tower.name, "bwd", tower_patch_embed(tower, direction="bwd"))
    for tower in measured:
        add(tower.name, "fwd+bwd", tower_patch_embed(tower, direction="fwd+bwd", clock="replay"))
    for name in MIXED:
        for direction in ("fwd", "fwd+bwd"):
            add(f"{name} mixed sizes", direction, mixed_patch_embed(name, direction))
    return work


#: name, (B, H, Hk, Sq, Sk, D), directions.
FEW_QUERIES = (
    ("Q-Former 32x577 B256 D64", (256, 12, 12, 32, 577, 64), BOTH),
    ("Q-Former 32x257 B64 D64", (64, 12, 12, 32, 257, 64), BOTH),
    ("Perceiver 64x321 B64 D96", (64, 16, 16, 64, 321, 96), BOTH),
    ("resampler 64x1024 B32 D128", (32, 16, 16, 64, 1024, 128), BOTH),
    ("batch 1 64x4096 D128", (1, 16, 16, 64, 4096, 128), FWD),
    ("batch 1 32x16384 D64", (1, 12, 12, 32, 16384, 64), FWD),
    ("mllama 2048x6404 B2 D128 GQA4", (2, 32, 8, 2048, 6404, 128), FWD),
)


def _cross_attention() -> list[Workload]:
    work = []

    def add(op: str, name: str, direction: str, build: Callable[[torch.device], Case], gpu_only: str = "") -> None:
        work.append(Workload("cross_attention", op, name, direction, build, gpu_only))

    for name, shape, directions in FEW_QUERIES:
        for direction in directions:
            # The few launches of one image end before the host has queued the next: they are replayed. A backward pass alone
            # can't be: autograd runs it on the stream of its forward pass, which is not the one that captures.
            clock = "replay" if direction == "fwd" else "device"
            add("attention", name, direction, _clocked(random_attention(shape, "", direction == "bwd"), clock), LARGE)
    for keys in (257, 577, 677):
        for direction in ("fwd", "fwd+bwd"):
            add("cross_attention", f"layer 32x{keys} B64", direction, cross_attention.layer(keys, direction))
    add("cross_attention", "Q-Former 32x257 B64", "fwd", cross_attention.former(257))
    add("cross_attention", "Q-Former 32x257 B64 in a CUDA graph", "fwd", cross_attention.former(257, clock="replay"), GRAPH)
    add("cross_attention", "Q-Former 32x257 batch 1", "fwd", cross_attention.former(257, 1, "graph"), GRAPH)
    return work


#: pairs, channels.
BATCHES = (
    (512, 512),
    (1024, 768),
    (2048, 768),
    (10000, 512),
    *((pairs, dim) for pairs in (32768, 65536) for dim in (512, 768, 1152)),
)


LOSSES = (("clip", "CLIP"), ("siglip", "SigLIP"))


def _memory(title: str, pairs: int, dim: int) -> tuple[Place, ...]:
    shown = dim == 768 and pairs >= 4096  # with fewer, memory is that of fixed sizes
    return (Place("memory", f"{title}, {dim} channels", pairs),) if shown else ()


def _contrastive() -> list[Workload]:
    work = []
    for kind, title in LOSSES:
        for pairs, dim in (*BATCHES, (262144, 768)):
            build = loss_case(kind, pairs, dim)
            build, gpu_only = (large(build), LARGE) if pairs == 262144 else (build, "")
            places = _memory(title, pairs, dim)
            name = f"{title} {pairs} D{dim}"
            work.append(Workload("contrastive", "contrastive", name, "fwd+bwd", build, gpu_only, places))
    return work


def _sweep() -> list[Workload]:
    """The points of plots that no other suite has: lengths, 32768 tokens in all, a head dim, and losses of smaller batches."""
    work = []
    for length, dim in (*((2**power, dim) for dim in (64, 128) for power in (8, 9, 10, 11, 12, 14)), (4096, 256)):
        shape = (32768 // length, 16, 16, length, length, dim)
        for way in BOTH:
            build = random_attention(shape, "", way == "bwd")
            work.append(Workload("sweep", "attention", f"S{length} D{dim}", way, build, LARGE, _speed(shape, way)))
    for kind, title in LOSSES:
        for pairs in (4096, 8192, 16384):
            name, places = f"{title} {pairs} D768", _memory(title, pairs, 768)
            work.append(Workload("sweep", "contrastive", name, "fwd+bwd", loss_case(kind, pairs, 768), LARGE, places))
    return work


def _models() -> list[Workload]:
    work = [Workload("models", "accelerate", model.name, "fwd", models.build(model), LARGE) for model in published.MODELS]
    for model in published.TOWERS:
        name = f"{model.name.rpartition(' ')[0]} batch 1"
        work.append(Workload("models", "accelerate", name, "fwd", models.build(model, 1, "graph"), GRAPH))
    # Not in a graph it waits for the host, as do its peers.
    name = f"{published.QFORMER.name} in a CUDA graph"
    work.append(Workload("models", "accelerate", name, "fwd", models.build(published.QFORMER, clock="replay"), GRAPH))
    for model in published.TRAINED:
        work.append(Workload("models", "accelerate", model.name, "fwd+bwd", models.build(model, training=True), LARGE))
    return work


def _rope() -> list[Workload]:
    shapes = {
        "Qwen2-VL vision 16384 D80": ((1, 16384, 16, 16, 80), False),
        "Qwen2-VL-7B text 4x4096 D128": ((4, 4096, 28, 4, 128), False),
        "Qwen3-VL-8B text 4x4096 D128 with q/k norm": ((4, 4096, 32, 8, 128), True),
    }
    return [Workload("rope", "rope", name, "fwd", rope_case(shape, norm), LARGE) for name, (shape, norm) in shapes.items()]


def _clocked(build: Callable[[torch.device], Case], clock: str) -> Callable[[torch.device], Case]:
    return lambda device: dataclasses.replace(build(device), clock=clock)


def _tiny(tower: towers.Tower, patch: int, side: int = 8) -> towers.Tower:
    """A tower of the same kind whose work takes no time: ``side`` x ``side`` patches."""
    config = towers.vit_config(128, 2, 64, side * patch, patch)
    return dataclasses.replace(tower, config=(tower.config[0], config), batch=(1, 1))


def _overhead() -> list[Workload]:
    tiny, blocks = (1, 4, 4, 64, 64, 64), (1, 4, 4, 512, 512, 64)
    builds = {
        "attention": ("attention", random_attention(tiny)),
        "attention, image blocks": ("attention", random_attention(blocks, "image_blocks")),
        "attention, softcap": ("attention", random_attention(tiny, "causal", softcap=50.0)),
        "patch_embed": ("patch_embed", tower_patch_embed(_tiny(towers.VIT_B, 16))),
        "patch_embed, uint8, norm": ("patch_embed", tower_patch_embed(_tiny(towers.CLIP_L, 14), uint8=True)),
        # Rows of 28 bytes, which only the portable backends take: four launches in Triton.
        "patch_embed, uint8, norm, 28 px": ("patch_embed", tower_patch_embed(_tiny(towers.CLIP_L, 14, 2), uint8=True)),
        "rope": ("rope", rope_case((1, 64, 4, 4, 64))),
        "rope_qkv_": ("rope", rope_case((1, 64, 4, 4, 64), in_place=True)),
    }
    work = [Workload("overhead", op, name, "fwd", _clocked(build, "host"), HOST) for name, (op, build) in builds.items()]
    # So little work that a CPU spends its time on the way to it.
    work.append(Workload("overhead", "rope", "rope of one token", "fwd", _clocked(rope_case((1, 1, 1, 1, 16)), "host")))
    work.append(Workload("overhead", "import", "import vlmkernels after torch", "once", overhead.import_case))
    return work


def _smoke() -> list[Workload]:
    shape = (2, 4, 2, 24, 24, 16)
    return [
        Workload("smoke", "attention", "dense", "fwd", random_attention(shape)),
        Workload("smoke", "attention", "causal", "bwd", random_attention(shape, "causal", backward=True)),
        Workload("smoke", "attention", "prefix", "fwd", random_attention(shape, "prefix")),
        Workload("smoke", "attention", "packed", "fwd", packed_attention((5, 24, 9), 2, 16)),
        Workload("smoke", "rope", "norm", "fwd", rope_case((2, 24, 4, 2, 16), norm=True)),
    ]


#: main: published towers on real photos. sweep: the points of plots. smoke: seconds, to see whether everything runs.
SUITES = {
    "main": _main,
    "attention": _attention,
    "cross_attention": _cross_attention,
    "patch_embed": _patch_embed,
    "contrastive": _contrastive,
    "models": _models,
    "rope": _rope,
    "overhead": _overhead,
    "sweep": _sweep,
    "smoke": _smoke,
}


def workloads(*suites: str, words: Sequence[str] = ()) -> list[Workload]:
    """The workloads of the named suites; with ``words`` those that have one of them in their id.

    Raises:
        ValueError: there is no such suite.
    """
    for name in suites:
        if name not in SUITES:
            raise ValueError(f"suite: got {name!r}, wanted one of {', '.join(SUITES)}")
    found = [work for name in suites for work in SUITES[name]()]
    return [work for work in found if not words or any(word in work.id for word in words)]

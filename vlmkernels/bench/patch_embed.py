# SPDX-License-Identifier: Apache-2.0
"""The workloads of patch embedding: towers on photos, packed rows of Qwen-VL, images of mixed sizes; forward and whole steps."""

import copy
import functools
import importlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F

from vlmkernels import use_backend
from vlmkernels.bench import photos, towers
from vlmkernels.bench.embeddings import Embedding, Form, Peer, embedding, fused_model, patch_embed_peers, providers
from vlmkernels.bench.peers import Provider, backward_alone
from vlmkernels.bench.workloads import OURS, Case, num_bytes, work_dtype
from vlmkernels.nn import NaFlexPatchEmbed, PackedPatchEmbed3d
from vlmkernels.ops.patch_embed import patch_embed

Leaves = Sequence[torch.Tensor]


def timed(function: Callable[[], torch.Tensor], direction: str, leaves: Leaves, dout: torch.Tensor | None) -> Callable[[], Any]:
    """The call that is timed: the forward pass (``"fwd"``), its backward pass alone (``"bwd"``), or one step of both."""
    if dout is None:
        return function
    for leaf in leaves:
        leaf.requires_grad_(True)
    if direction == "bwd":
        return backward_alone(function, leaves, dout)

    def step() -> tuple[torch.Tensor, ...]:
        with torch.enable_grad():
            out = function()
        return (out.detach(), *torch.autograd.grad(out, leaves, dout))

    return step


def tower_patch_embed(
    tower: towers.Tower, uint8: bool = False, direction: str = "fwd", clock: str = "device"
) -> Callable[[torch.device], Case]:
    """A builder for the patch embedding of a tower on photos, as normalised pixels or as the uint8 of the decoder."""

    def build(device: torch.device) -> Case:
        dtype = work_dtype(device)
        e = embedding(tower, device, dtype)
        pixels = tower.images(device)
        if not uint8:
            pixels = photos.normalized(pixels, tower.statistics, dtype)
        return replace(patch_embed_case(e, pixels, tower.statistics, direction), clock=clock)

    return build


def tower_latency(tower: towers.Tower, batch: int, uint8: bool = False) -> Callable[[torch.device], Case]:
    """A builder for a small batch in a CUDA graph."""
    return tower_patch_embed(replace(tower, batch=(batch, batch)), uint8, clock="graph")


def _ours(
    e: Embedding, x: torch.Tensor, p: dict[str, torch.Tensor], mean_std: dict[str, Any], backend: str | None = None
) -> torch.Tensor:
    """The tower's patch embedding by ours, with these parameters."""
    width = p["weight"].shape[0]
    prefix = p["class_token"].reshape(1, width) if "class_token" in p else None
    norm = (p["norm_weight"], p["norm_bias"], e.eps) if "norm_weight" in p else None
    return patch_embed(
        x, p["weight"], p.get("bias"), patch_size=e.patch, prefix_tokens=prefix, pos_embed=p["positions"].reshape(-1, width),
        norm=norm, backend=backend, **mean_std,
    )  # fmt: skip


def patch_embed_case(e: Embedding, pixels: torch.Tensor, statistics: photos.Statistics, direction: str = "fwd") -> Case:
    """Patch embedding, the gradients of its weight and bias, or a step with the gradients of all its parameters.

    Of a forward pass the first and the last image are checked, gradients as they are.
    """
    p, batch = e.parameters, pixels.shape[0]
    dtype, width = p["weight"].dtype, p["weight"].shape[0]
    mean_std: dict[str, Any] = dict(zip(("mean", "std"), statistics, strict=True)) if pixels.dtype == torch.uint8 else {}
    names = [name for name in p if direction == "fwd+bwd" or name in ("weight", "bias")] if direction != "fwd" else []
    tokens = (pixels.shape[2] // e.patch) * (pixels.shape[3] // e.patch)
    shape = (batch, tokens + ("class_token" in p), width)
    dout = torch.randn(shape, device=pixels.device, dtype=dtype) if names else None
    entries = slice(0, batch, max(1, batch - 1)) if direction == "fwd" else slice(None)

    def call(form: Form) -> Callable[[], Any]:
        return timed(lambda: form(pixels), direction, [p[name] for name in names], dout)

    def exact() -> tuple[torch.Tensor, ...]:
        x = pixels[entries] if pixels.dtype == torch.uint8 else pixels[entries].double()
        wide = {name: value.detach().double() for name, value in p.items()}
        function = functools.partial(_ours, e, x, wide, mean_std, "reference")
        result = timed(function, direction, [wide[name] for name in names], None if dout is None else dout.double())()
        return (result,) if direction == "fwd" else tuple(result)

    outputs = [f"d{name}" for name in names]
    passes = 2.0 if direction == "fwd+bwd" else 1.0
    moved = num_bytes(pixels) + math.prod(shape) * dtype.itemsize
    return Case(
        ours=Provider(OURS, lambda: call(lambda x: _ours(e, x, p, mean_std))),
        peers=providers(patch_embed_peers(e, pixels, statistics), call, pixels.is_cuda),
        outputs=tuple(outputs if direction == "bwd" else ["out", *outputs]),
        exact=exact,
        part=lambda i, x: x[entries] if direction == "fwd" else x,
        rule="grad" if direction == "fwd+bwd" and "norm_weight" in p else "gemm",
        flops=passes * 2.0 * batch * tokens * p["weight"].numel(),
        bytes=passes * moved + num_bytes(*p.values()) * {"fwd": 1, "bwd": 2, "fwd+bwd": 3}[direction],
        dtype=dtype,
    )


def rows_patch_embed(tower: towers.Tower, still: bool = False, positions: bool = False) -> Callable[[torch.device], Case]:
    """A builder for the packed rows of Qwen-VL, normal deviates. The first and the last 256 rows are checked.

    ``still``: ours gets the one frame of still images, the peers the rows in which their processors repeat it.
    """

    def build(device: torch.device) -> Case:
        dtype, count = work_dtype(device), tower.count(device)
        model: Any = tower.build(device, dtype).requires_grad_(False)
        weight, bias = model.patch_embed.proj.weight, model.patch_embed.proj.bias
        width, channels, frames, *_ = weight.shape
        torch.manual_seed(0)
        given = torch.randn(count, channels, 1 if still else frames, weight[0, 0, 0].numel(), device=device, dtype=dtype)
        rows = given.expand(-1, -1, frames, -1).flatten(1)
        given = given.flatten(1)
        pos = torch.randn(count, width, device=device, dtype=dtype) if positions else None

        def ends(x: torch.Tensor) -> torch.Tensor:
            return torch.cat([x[:256], x[-256:]])

        ours: Callable[..., torch.Tensor] = functools.partial(patch_embed, patch_size=tuple(weight.shape[2:]), layout="rows")

        def exact() -> tuple[torch.Tensor, ...]:
            added = None if pos is None else ends(pos).double()
            wide = weight.double(), None if bias is None else bias.double()
            return (ours(ends(given).double(), *wide, pos_embed=added, backend="reference"),)

        def with_positions(form: Form) -> Form:
            return form if pos is None else lambda x: form(x) + pos

        peers: list[Peer] = [
            ("hf conv", lambda: with_positions(model.patch_embed), True),
            ("hf fused", lambda: with_positions(fused_model(model).patch_embed), True),
            ("linear", lambda: with_positions(lambda x: F.linear(x, weight.flatten(1), bias)), True),
        ]
        return Case(
            ours=Provider(OURS, lambda: lambda: ours(given, weight, bias, pos_embed=pos)),
            peers=providers(peers, lambda form: lambda: form(rows), rows.is_cuda),
            outputs=("out",),
            exact=exact,
            part=lambda i, x: ends(x),
            rule="gemm",
            flops=2.0 * given.numel() * width,
            bytes=float(num_bytes(given, weight, bias, pos) + count * width * dtype.itemsize),
            dtype=dtype,
        )

    return build


def mixed_grids(images: int, limit: int, multiple: int) -> list[tuple[int, int]]:
    """Rows and columns of ``images`` patch grids of up to ``limit`` patches: 16 shapes from 1 : 4 to 4 : 1, in turn."""
    grids = []
    for i in range(16):
        height = round(math.sqrt(limit * 4 ** (i / 7.5 - 1)) / multiple) * multiple
        grids.append((height, limit // height // multiple * multiple))
    return [grids[i % 16] for i in range(images)]


#: A function of the inputs and its parameters in our order.
Trained = tuple[Callable[..., torch.Tensor], Leaves]
#: What the mixed sizes are: our module, its inputs, and what sets each peer up.
Mixed = tuple[torch.nn.Module, tuple[torch.Tensor, ...], list[tuple[str, Callable[[], Trained]]]]


def _naflex(device: torch.device, dtype: torch.dtype) -> Mixed:
    theirs = towers.NAFLEX.build(device, dtype)
    width, patch = towers.NAFLEX.settings("hidden_size"), towers.NAFLEX.settings("patch_size")
    ours = NaFlexPatchEmbed(width, patch, math.isqrt(towers.NAFLEX.settings("num_patches")), device=device, dtype=dtype)
    ours.load_state_dict(theirs.state_dict())
    limit = 512 if device.type == "cuda" else 64
    shapes = torch.tensor(mixed_grids(towers.NAFLEX.count(device), limit, 1), device=device)
    pixels = torch.randn(len(shapes), limit, 3 * patch**2, device=device, dtype=dtype)
    named = dict(theirs.named_parameters())
    return ours, (pixels, shapes), [("hf", lambda: (theirs, [named[name] for name, _ in ours.named_parameters()]))]


def _qwen3(device: torch.device, dtype: torch.dtype) -> Mixed:
    tower: Any = towers.QWEN3.build(device, dtype)
    weight, table = tower.patch_embed.proj.weight, tower.pos_embed.weight
    width, _, frames, patch, _ = weight.shape
    ours = PackedPatchEmbed3d(width, patch, frames, math.isqrt(len(table)), device=device, dtype=dtype)
    ours.load_state_dict({name: tower.state_dict()[name] for name in ours.state_dict()})
    images, limit = (64, 1024) if device.type == "cuda" else (4, 128)
    grids = torch.tensor([(1, *grid) for grid in mixed_grids(images, limit, 2)])
    rows = torch.randn(int(grids.prod(1).sum()), weight[0].numel(), device=device, dtype=dtype)

    def with_positions(embed: Form) -> Callable[..., torch.Tensor]:
        def forward(rows: torch.Tensor, grids: torch.Tensor) -> torch.Tensor:
            hidden = embed(rows)
            return hidden + qwen3_positions(tower, grids).to(hidden.dtype)

        return forward

    def conv() -> Trained:
        return with_positions(tower.patch_embed), [weight, tower.patch_embed.proj.bias, table]

    def fused() -> Trained:
        embed = fused_model(tower).patch_embed
        return with_positions(embed), [embed.linear_proj.weight, embed.linear_proj.bias, table]

    return ours, (rows, grids.to(device)), [("hf conv", conv), ("hf fused", fused)]


def qwen3_positions(tower: Any, grid_thw: torch.Tensor) -> torch.Tensor:
    """The positions as transformers' Qwen3-VL tower makes them: a method of it, or later four lines of its forward pass."""
    if hasattr(tower, "fast_pos_embed_interpolate"):
        positions: torch.Tensor = tower.fast_pos_embed_interpolate(grid_thw)
        return positions
    taps = importlib.import_module("transformers.vision_utils").get_vision_interpolation_indices_and_weights
    indices, weights = taps(
        grid_thw, tower.num_grid_per_side, tower.interpolation_mode, tower.interpolation_align_corners,
        tower.config.spatial_merge_size,
    )  # fmt: skip
    return (tower.pos_embed(indices) * weights[:, :, None]).sum(1)  # type: ignore[no-any-return]


MIXED = {"SigLIP2-NaFlex": _naflex, "Qwen3-VL": _qwen3}


def mixed_patch_embed(name: str, direction: str = "fwd") -> Callable[[torch.device], Case]:
    """A builder for 64 images of 16 sizes in one call, positions resampled to each: a forward pass, or a step. All is checked."""

    def build(device: torch.device) -> Case:
        dtype = work_dtype(device)
        torch.manual_seed(0)
        ours, inputs, peers = MIXED[name](device, dtype)
        leaves, pixels = list(ours.parameters()), inputs[0]
        weight = next(leaf for leaf in leaves if leaf.dim() > 1 and leaf[0].numel() == pixels.shape[-1])
        shape = (*pixels.shape[:-1], len(weight))
        dout = torch.randn(shape, device=device, dtype=dtype) if direction == "fwd+bwd" else None

        def call(forward: Callable[..., torch.Tensor], their_leaves: Leaves) -> Callable[[], Any]:
            step = timed(lambda: forward(*inputs), direction, their_leaves, dout)
            if dout is None:
                return step

            def viewed() -> tuple[torch.Tensor, ...]:
                out, *grads = step()
                return (out, *(g.view(leaf.shape) for g, leaf in zip(grads, leaves, strict=True)))  # a fused weight is [D, K]

            return viewed

        def exact() -> tuple[torch.Tensor, ...]:
            wide = copy.deepcopy(ours).double()
            arguments = (pixels.double(), *inputs[1:])
            with use_backend("reference"):
                step = timed(
                    lambda: wide(*arguments), direction, list(wide.parameters()), None if dout is None else dout.double()
                )
                result = step()
            return (result,) if dout is None else tuple(result)

        def peer(make: Callable[[], Trained], compiled: bool) -> Callable[[], Any]:
            forward, their_leaves = make()
            return call(torch.compile(forward, dynamic=False) if compiled else forward, their_leaves)

        passes = 1.0 if dout is None else 2.0
        return Case(
            ours=Provider(OURS, lambda: call(ours, leaves)),
            peers=tuple(
                Provider(f"{who} compiled" if compiled else who, functools.partial(peer, make, compiled), compiled)
                for compiled in ((False, True) if pixels.is_cuda else (False,))
                for who, make in peers
            ),
            outputs=("out", *(f"d{n}" for n, _ in ours.named_parameters())) if dout is not None else ("out",),
            exact=exact,
            part=lambda i, x: x,
            rule="module",
            flops=passes * 2.0 * pixels.numel() * len(weight),
            bytes=passes * (num_bytes(pixels) + math.prod(shape) * dtype.itemsize) + (2 * passes - 1) * num_bytes(*leaves),
            dtype=dtype,
            clock="device" if dout is None else "replay",
        )

    return build

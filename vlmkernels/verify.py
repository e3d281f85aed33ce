# SPDX-License-Identifier: Apache-2.0
"""Every operator on every backend that runs here, against the fp64 reference on the same rounded inputs."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch

from vlmkernels import BackendError, KeyRanges
from vlmkernels.ops._op import BACKENDS
from vlmkernels.ops.activated_linear import ACTIVATIONS, activated_linear
from vlmkernels.ops.attention import attention, attention_qkvpacked
from vlmkernels.ops.contrastive import clip_loss, siglip_loss
from vlmkernels.ops.feed_forward import ACTIVATIONS as LEARNING
from vlmkernels.ops.feed_forward import feed_forward
from vlmkernels.ops.layer_norm import layer_norm
from vlmkernels.ops.linear_add_norm import linear_add_norm
from vlmkernels.ops.patch_embed import patch_embed
from vlmkernels.ops.pos_embed import resample_pos_embed
from vlmkernels.ops.rope import rope, rope_qkv_
from vlmkernels.ops.tile_bounds import tile_bounds
from vlmkernels.testing import compare

Inputs = dict[str, torch.Tensor]
HEAD_DIMS = (64, 72, 80, 88, 96, 104, 128, 256)
QUICK_HEAD_DIMS = (64, 80)
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class Case:
    """One configuration of an operator.

    Args:
        rule: which bound of ``vlmkernels.testing.compare`` holds.
        inputs: makes the tensors on the CPU; floating ones in fp32, which are then rounded to the dtype under test.
        run: calls the operator on the tensors with a backend.
        gradients: the inputs whose gradients are compared too.
        dtypes: the dtypes that it is run in.
    """

    op: str
    name: str
    rule: str
    inputs: Callable[[], Inputs]
    run: Callable[[Inputs, str], Sequence[torch.Tensor]]
    gradients: tuple[str, ...] = ()
    dtypes: tuple[torch.dtype, ...] = DTYPES


@dataclass(frozen=True)
class Check:
    """A case on a backend. ``status`` is ok, wrong, failed (it raised) or unavailable (it said why not, which is no failure)."""

    op: str
    case: str
    dtype: str
    backend: str
    status: str
    reason: str = ""
    output: str = ""  # the output or gradient that is furthest off
    error_over_floor: float | None = None
    bound: float | None = None

    @property
    def bad(self) -> bool:
        return self.status in ("wrong", "failed")

    def record(self) -> dict[str, Any]:
        """The check as one JSON object."""
        return {"record": "check", **asdict(self)}


def cases(device: torch.device, quick: bool = False) -> list[Case]:
    """All cases; smaller on a CPU. ``quick`` leaves most head dims out.

    Attention runs every combination in bf16. In fp16 and fp32 it runs every head dim once and every kind of mask once: a GPU
    compiles each for seconds.
    """
    small = device.type != "cuda"
    dims = QUICK_HEAD_DIMS if quick else HEAD_DIMS
    patches = (*_patch_embed_cases(small), *_pos_embed_cases(small))
    others = (*_rope_cases(), *_contrastive_cases(small), *_linear_add_norm_cases(small), *_tile_bounds_cases())
    towers = (*_activated_linear_cases(small), *_feed_forward_cases(small), _layer_norm_case("SigLIP", 77, 1152))
    return [*_attention_cases(dims, small), *patches, *others, *towers]


def _activated_linear_cases(small: bool) -> Iterator[Case]:
    """The first half of a feed-forward, of CLIP-L's width; large enough for the kernel on a GPU."""
    for activation in ACTIVATIONS:
        for gated in (False, True):
            name = f"{activation}{' times a product' if gated else ''}"
            yield _activated_linear_case(name, activation, *((33, 96, 136) if small else (9000, 1024, 4096)), gated)


def _activated_linear_case(name: str, activation: str, rows: int, depth: int, dim: int, gated: bool = False) -> Case:
    def inputs() -> Inputs:
        weights = {name: torch.randn(dim, depth) * depth**-0.5 for name in ("weight", "up")[: 1 + gated]}
        return {"x": torch.randn(rows, depth), **weights, **({} if gated else {"bias": torch.randn(dim)})}

    def run(t: Inputs, backend: str) -> Sequence[torch.Tensor]:
        return (activated_linear(t["x"], t["weight"], t.get("bias"), activation, up=t.get("up"), backend=backend),)

    return Case("activated_linear", name, "module", inputs, run)


def _feed_forward_cases(small: bool) -> Iterator[Case]:
    for activation in LEARNING:
        yield _feed_forward_case(activation, activation, *((33, 96, 136) if small else (9000, 1024, 4096)))


def _feed_forward_case(name: str, activation: str, rows: int, depth: int, dim: int) -> Case:
    def inputs() -> Inputs:
        first = {"weight1": torch.randn(dim, depth) * depth**-0.5, "bias1": torch.randn(dim)}
        second = {"weight2": torch.randn(depth, dim) * dim**-0.5, "bias2": torch.randn(depth)}
        return {"x": torch.randn(rows, depth), **first, **second}

    def run(t: Inputs, backend: str) -> Sequence[torch.Tensor]:
        return (feed_forward(t["x"], t["weight1"], t["bias1"], t["weight2"], t["bias2"], activation, backend=backend),)

    return Case("feed_forward", name, "module", inputs, run, ("x", "weight1", "bias1", "weight2", "bias2"))


def _layer_norm_case(name: str, rows: int, dim: int) -> Case:
    def inputs() -> Inputs:
        return {"x": 3 * torch.randn(rows, dim) + 1, **{name: torch.randn(dim) for name in ("weight", "bias", "shift")}}

    def run(t: Inputs, backend: str) -> Sequence[torch.Tensor]:
        return layer_norm(t["x"], t["weight"], t["bias"], t["shift"], 1e-6, backend=backend)

    return Case("layer_norm", name, "norm", inputs, run, ("x", "weight", "bias", "shift"))


def _attention_cases(dims: Sequence[int], small: bool) -> Iterator[Case]:
    queries, keys = (37, 50) if small else (197, 333)
    for dim in dims:
        for case in (
            _attention_case(f"D{dim} dense", dim, (2, 4, 4, queries, queries)),
            _attention_case(f"D{dim} causal GQA2", dim, (2, 4, 2, queries, keys), causal=True),
            _attention_case(f"D{dim} ranges MQA", dim, (2, 4, 1, queries, keys), ranged=True),
            _attention_case(f"D{dim} ranges softcap", dim, (2, 2, 2, queries, keys), ranged=True, softcap=5.0),
        ):
            every = dim == 64 or case.name.endswith("MQA")
            yield case if every else replace(case, dtypes=(torch.bfloat16,))
    yield _attention_case("D64 causal GQA2, q, k and v in one row", 64, (2, 4, 2, keys, keys), causal=True, packed=True)
    yield _attention_case("D64 few queries GQA2", 64, (3, 4, 2, 32, keys))
    yield _attention_case("D64 value 96 short queries", 64, (3, 4, 4, 8, keys), value_dim=96)


def _attention_case(
    name: str,
    dim: int,
    shape: tuple[int, int, int, int, int],
    causal: bool = False,
    ranged: bool = False,
    softcap: float = 0.0,
    value_dim: int = 0,
    packed: bool = False,
) -> Case:
    """``packed``: q, k and v of a token are one row, as one product gives them."""
    batch, heads, kv_heads, queries, keys = shape

    def inputs() -> Inputs:
        sizes = {"q": (queries, heads, dim), "k": (keys, kv_heads, dim), "v": (keys, kv_heads, value_dim or dim)}
        tensors = {name: torch.randn(batch, *size) for name, size in sizes.items()}
        if ranged:
            # Any two positions in order, every seventh row empty: nothing about the ranges is monotone.
            ends = torch.randint(0, keys + 1, (2, batch, queries), dtype=torch.int32)
            tensors["start"], tensors["stop"] = ends.amin(0), ends.amax(0)
            tensors["stop"][:, ::7] = tensors["start"][:, ::7]
        return tensors

    def run(t: Inputs, backend: str) -> Sequence[torch.Tensor]:
        ranges = KeyRanges(t["start"], t["stop"]) if ranged else None
        q, k, v = t["q"], t["k"], t["v"]
        options: dict[str, Any] = {"causal": causal, "softcap": softcap, "backend": backend}
        if packed:
            return (attention_qkvpacked(torch.cat((q, k, v), 2).flatten(2), heads, kv_heads, ranges, **options),)
        return (attention(q, k, v, ranges, **options),)  # type: ignore[return-value]

    return Case("attention", name, "gemm", inputs, run, ("q", "k", "v"))


def _patch_embed_cases(small: bool) -> Iterator[Case]:
    size, dim = (30, 48) if small else (100, 768)
    whole = 28 if small else 112  # pixels of whole patches of 14; rows of 112 are what the CUDA kernel takes, as 224 and 336 are
    every: dict[str, Any] = {"bias": True, "prefix": 1, "positions": True}
    yield _patch_embed_case("conv + bias (SigLIP, size 14 does not divide)", 14, size, dim, bias=True, positions=True)
    yield _patch_embed_case("class token (ViT)", 16, size + 2, dim, **every)
    yield _patch_embed_case("class token, norm (CLIP)", 14, whole, dim, prefix=1, positions=True, norm=True)
    yield _patch_embed_case("registers, patch positions (DINOv2)", 14, whole, dim, bias=True, prefix=5, positions="patches")
    yield _patch_embed_case("uint8 NCHW", 14, whole, dim, uint8=True, **every)
    yield _patch_embed_case("uint8 NHWC", 14, whole, dim, uint8=True, layout="channels_last", **every)
    yield _patch_embed_case("3-D patches (Qwen2-VL)", (2, 14, 14), 28, dim)
    yield _patch_embed_case("rows cyx (Qwen2-VL)", (2, 14, 14), 0, dim, layout="rows")
    yield _patch_embed_case("rows of one frame (Qwen2-VL, still)", (2, 14, 14), 0, dim, layout="rows", still=True)
    yield _patch_embed_case("rows yxc (NaFlex)", 16, 0, dim, layout="rows", columns="yxc", bias=True)


def _patch_embed_case(
    name: str,
    patch: int | tuple[int, int, int],
    size: int,
    dim: int,
    *,
    bias: bool = False,
    prefix: int = 0,
    positions: bool | str = False,
    norm: bool = False,
    uint8: bool = False,
    layout: str = "channels_first",
    columns: str = "cyx",
    still: bool = False,
) -> Case:
    temporal = not isinstance(patch, int)
    sizes = patch if isinstance(patch, tuple) else (patch, patch)
    columns_count = 3 * math.prod(sizes)
    grid = (size // sizes[-2]) * (size // sizes[-1])

    def inputs() -> Inputs:
        if layout == "rows":
            shape: tuple[int, ...] = (2, 5, columns_count // sizes[0] if still else columns_count)
        else:
            shape = (2, 3, *((sizes[0],) if temporal else ()), size, size)
        pixels = torch.randint(0, 256, shape, dtype=torch.uint8) if uint8 else torch.randn(shape)
        if layout == "channels_last":
            pixels = pixels.movedim(1, -1).contiguous()
        flat = layout == "rows"
        tensors = {"pixels": pixels, "weight": torch.randn(dim, columns_count) / columns_count**0.5}
        tensors["weight"] = tensors["weight"] if flat else tensors["weight"].view(dim, 3, *sizes)
        if bias:
            tensors["bias"] = torch.randn(dim)
        if prefix:
            tensors["prefix_tokens"] = torch.randn(prefix, dim)
        if positions:
            tensors["pos_embed"] = torch.randn(grid + (0 if positions == "patches" else prefix), dim)
        if norm:
            tensors["norm_weight"], tensors["norm_bias"] = 1 + 0.1 * torch.randn(dim), 0.1 * torch.randn(dim)
        return tensors

    def run(t: Inputs, backend: str) -> Sequence[torch.Tensor]:
        optional: dict[str, Any] = {key: t[key] for key in ("prefix_tokens", "pos_embed") if key in t}
        if norm:
            optional["norm"] = (t["norm_weight"], t["norm_bias"], 1e-5)
        if uint8:
            optional |= {"mean": (0.481, 0.458, 0.408), "std": (0.269, 0.261, 0.276)}
        out = patch_embed(
            t["pixels"], t["weight"], t.get("bias"), patch_size=patch, layout=layout, columns=columns, backend=backend, **optional
        )
        return (out,)

    wanted = ("weight", "bias", "prefix_tokens", "pos_embed", "norm_weight", "norm_bias")
    present = {
        "weight": True,
        "bias": bias,
        "prefix_tokens": prefix,
        "pos_embed": positions,
        "norm_weight": norm,
        "norm_bias": norm,
    }
    gradients = tuple(key for key in wanted if present[key])
    return Case("patch_embed", name, "gemm", inputs, run, gradients if uint8 else ("pixels", *gradients))


def _pos_embed_cases(small: bool) -> Iterator[Case]:
    side, dim = (4, 24) if small else (24, 768)
    naflex = {"layout": "padded", "antialias": True}
    for name, grids, rows, options in (
        ("Qwen3-VL", [(2, 4, 2), (0, 2, 2), (1, 2, 6)], 30, {"merge_size": 2, "align_corners": True}),
        ("SigLIP2 NaFlex", [(2, 7), (1, 1), (4, 4)], 18, {**naflex, "padding": "first"}),
        ("NaFlexVit", [(2, 7), (1, 1), (4, 4)], 18, naflex),
        ("packed, half-pixel", [(5, 3), (2, 2)], 19, {}),
    ):
        yield _pos_embed_case(name, (side, side + 1, dim), grids, rows, options)


def _pos_embed_case(
    name: str, table: tuple[int, ...], grids: Sequence[Sequence[int]], rows: int, options: dict[str, Any]
) -> Case:
    def inputs() -> Inputs:
        return {"weight": torch.randn(table), "grids": torch.tensor(grids)}

    def run(t: Inputs, backend: str) -> Sequence[torch.Tensor]:
        return (resample_pos_embed(t["weight"], t["grids"], rows, **options, backend=backend),)

    return Case("pos_embed", name, "norm", inputs, run, ("weight",))


def _rope_cases() -> Iterator[Case]:
    for interleaved in (False, True):
        for norm in (False, True):
            name = ("interleaved pairs" if interleaved else "half-split pairs") + (", q/k norm" if norm else "")
            yield _rope_case(name, 80, 80, interleaved, norm)
    yield _rope_case("partial rotation", 128, 64, False, False)

    def run(t: Inputs, backend: str) -> Sequence[torch.Tensor]:
        return (rope_qkv_(t["qkv"].clone(), t["cos"], t["sin"], num_heads=4, num_kv_heads=2, backend=backend),)

    def inputs() -> Inputs:
        return {"qkv": torch.randn(2, 19, 8 * 64), **_tables(19, 64)}

    yield Case("rope", "in place on packed QKV", "norm", inputs, run)


def _tables(length: int, rotated: int) -> Inputs:
    angle = torch.rand(1, length, rotated // 2) * 2 * math.pi
    return {"cos": angle.cos(), "sin": angle.sin()}


def _rope_case(name: str, dim: int, rotated: int, interleaved: bool, norm: bool) -> Case:
    def inputs() -> Inputs:
        tensors = {"q": torch.randn(2, 19, 4, dim), "k": torch.randn(2, 19, 2, dim), **_tables(19, rotated)}
        if norm:
            tensors |= {"q_weight": 1 + 0.1 * torch.randn(dim), "k_weight": 1 + 0.1 * torch.randn(dim)}
        return tensors

    def run(t: Inputs, backend: str) -> Sequence[torch.Tensor]:
        weights: dict[str, Any] = {key: t[key] for key in ("q_weight", "k_weight") if key in t}
        return rope(t["q"], t["k"], t["cos"], t["sin"], interleaved=interleaved, backend=backend, **weights)

    return Case("rope", name, "norm", inputs, run, ("q", "k", *(("q_weight", "k_weight") if norm else ())))


def _linear_add_norm_cases(small: bool) -> Iterator[Case]:
    for rows in (3, 32) if small else (1, 32, 64, 2048):
        yield _linear_add_norm_case(rows, *((72, 40) if small else (3072, 768)))


def _linear_add_norm_case(rows: int, width: int, columns: int, bias: bool = True) -> Case:

    def inputs() -> Inputs:
        tensors = {
            "x": torch.randn(rows, width),
            "weight": torch.randn(columns, width) / width**0.5,
            "residual": torch.randn(rows, columns),
            "norm_weight": torch.randn(columns),
            "norm_bias": torch.randn(columns),
        }
        return tensors | ({"bias": torch.randn(columns)} if bias else {})

    def run(t: Inputs, backend: str) -> Sequence[torch.Tensor]:
        norm: dict[str, Any] = {"norm_weight": t["norm_weight"], "norm_bias": t["norm_bias"], "eps": 1e-5}
        return (linear_add_norm(t["x"], t["weight"], t.get("bias"), t["residual"], **norm, backend=backend),)

    return Case("linear_add_norm", f"{rows} rows{'' if bias else ', no bias'}", "module", inputs, run)


def _contrastive_cases(small: bool) -> Iterator[Case]:
    dim, images, whole = (32, 40, 48) if small else (768, 1000, 1024)
    yield _contrastive_case("CLIP, label smoothing", clip_loss, images, images, dim, label_smoothing=0.1)
    for name, loss in (("CLIP", clip_loss), ("SigLIP", siglip_loss)):
        yield _contrastive_case(f"{name}, whole tiles", loss, whole, whole, dim)
        yield _contrastive_case(f"{name}, unit vectors, several captions", loss, images // 2, images, dim, normalize=True)


def _contrastive_case(name: str, loss: Callable[..., torch.Tensor], images: int, texts: int, dim: int, **options: Any) -> Case:
    """The loss, rounded to the dtype of the features, and their gradients."""

    def inputs() -> Inputs:
        tensors = {"image": torch.randn(images, dim) / dim**0.5, "text": torch.randn(texts, dim) / dim**0.5}
        return tensors if images == texts else tensors | {"targets": torch.arange(texts) % images}

    def run(t: Inputs, backend: str) -> Sequence[torch.Tensor]:
        numbers = (10.0,) if loss is clip_loss else (10.0, -5.0)
        value = loss(t["image"], t["text"], *numbers, targets=t.get("targets"), backend=backend, **options)
        return (value.to(t["image"].dtype),)

    return Case("contrastive", name, "gemm", inputs, run, ("image", "text"))


def _tile_bounds_cases() -> Iterator[Case]:
    def run(t: Inputs, backend: str) -> Sequence[torch.Tensor]:
        return [x.float() for x in tile_bounds(KeyRanges(t["start"], t["stop"]), 300, backend=backend)]

    def random() -> Inputs:
        ends = torch.randint(-10, 320, (2, 2, 200), dtype=torch.int32)
        return {"start": ends.amin(0), "stop": ends.amax(0)}

    def image_text() -> Inputs:
        ids = torch.full((1, 300), -1)
        ids[:, 20:180] = 0
        ranges = KeyRanges.image_text(image_ids=ids)
        return {"start": ranges.start, "stop": ranges.stop}

    for name, inputs in (("random ranges", random), ("image blocks", image_text)):
        yield Case("tile_bounds", name, "exact", inputs, run, dtypes=(torch.float32,))


def check(case: Case, dtype: torch.dtype, backends: Sequence[str], device: torch.device) -> Iterator[Check]:
    """Run a case on each backend and compare outputs and gradients with the fp64 reference."""
    torch.manual_seed(0)
    rounded = {name: _to(x, device, dtype) for name, x in case.inputs().items()}
    exact = evaluate(case, {name: _to(x, device, torch.float64) for name, x in rounded.items()}, "reference")
    outputs = {name: x for name, x in exact.items() if name.startswith("out")}
    for backend in backends:
        found = _check_backend(case, dtype, backend, rounded, exact)
        if found.status == "unavailable" and case.gradients:
            # It may leave only these gradients to another backend.
            forward = _check_backend(replace(case, gradients=()), dtype, backend, rounded, outputs)
            found = found if forward.status == "unavailable" else forward
        yield found


def _check_backend(case: Case, dtype: torch.dtype, backend: str, rounded: Inputs, exact: Inputs) -> Check:
    def result(status: str, reason: str = "", **more: Any) -> Check:
        return Check(case.op, case.name, str(dtype).removeprefix("torch."), backend, status, reason, **more)

    try:
        got = evaluate(case, {name: x.clone() for name, x in rounded.items()}, backend)
    except BackendError as error:
        return result("unavailable", str(error).rpartition(f"{backend}: ")[2])
    except Exception as error:  # a backend may fail in any way: it is a finding, and the other cases go on
        return result("failed", f"{type(error).__name__}: {error}".splitlines()[0][:200])
    comparisons = {name: compare(got[name], exact[name], _rule(case, name)) for name in exact}
    worst = max(comparisons, key=lambda name: (not comparisons[name], comparisons[name].ratio))
    c = comparisons[worst]
    return result("ok" if c else "wrong", c.note, output=worst, error_over_floor=c.ratio, bound=c.bound)


def _rule(case: Case, output: str) -> str:
    """The gradient of a parameter is a sum over all tokens, whatever the operator."""
    return "gemm" if output.startswith("d") and output.endswith("weight") else case.rule


def _to(x: torch.Tensor, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    return x.to(device, dtype if x.is_floating_point() else x.dtype)


def evaluate(case: Case, tensors: Inputs, backend: str) -> Inputs:
    """Outputs by number, gradients by the input's name, for output gradients that are the same in every dtype."""
    tensors = {name: x.detach().requires_grad_(name in case.gradients) for name, x in tensors.items()}
    with torch.set_grad_enabled(bool(case.gradients)):
        outputs = case.run(tensors, backend)
    results = {f"out{i}" if len(outputs) > 1 else "out": x for i, x in enumerate(outputs)}
    if case.gradients:
        generator = torch.Generator().manual_seed(1)
        # In bf16's precision, so that every dtype gets the same values (fp16 holds them too).
        grads = [torch.randn(x.shape, generator=generator).bfloat16().to(x.device, x.dtype) for x in outputs]
        inputs = [tensors[name] for name in case.gradients]
        results |= {f"d{name}": x for name, x in zip(case.gradients, torch.autograd.grad(outputs, inputs, grads), strict=True)}
    return results


def verify(
    device: torch.device,
    ops: Sequence[str] = (),
    backends: Sequence[str] = (),
    quick: bool = False,
    words: Sequence[str] = (),
    progress: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Check the named operators and backends, all by default.

    Args:
        ops: stems such as ``attention``.
        backends: names from ``vlmkernels.ops._op.BACKENDS``.
        quick: fewer head dims.
        words: only cases with one of these in ``op / case / dtype``.
        progress: called after each check.
    """
    checks = []
    for case in cases(device, quick):
        if ops and case.op not in ops:
            continue
        for dtype in case.dtypes:
            name = f"{case.op} / {case.name} / {str(dtype).removeprefix('torch.')}"
            if words and not any(word in name for word in words):
                continue
            for one in check(case, dtype, backends or BACKENDS, device):
                checks.append(one)
                progress(one)
    return checks

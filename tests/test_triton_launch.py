# SPDX-License-Identifier: Apache-2.0
"""A launch that is remembered is the launch that Triton would make: the same compiled kernel, grid and arguments.

Without a GPU the launches go to a driver that only records them, in a process of its own without Triton's interpreter.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vlmkernels.masks import KeyRanges
from vlmkernels.ops.attention import attention
from vlmkernels.ops.patch_embed import patch_embed
from vlmkernels.ops.rope import rope
from vlmkernels.testing import compare

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]

RECORDER = """
import itertools, types
from unittest import mock
import torch, triton, triton.language as tl
from triton import knobs
from triton.backends.nvidia.driver import CudaLauncher, wrap_handle_tensordesc
from triton.runtime import JITFunction, driver
from vlmkernels.backends.triton import _launch
from vlmkernels.backends.triton._aot import _Driver
from vlmkernels.backends.triton._launch import LAUNCHES, Launch

records, by_triton, handles = [], [], itertools.count(1)

def plain(x):
    return x.data_ptr() if isinstance(x, torch.Tensor) else x

class Recorder(CudaLauncher):
    # Triton's launcher, of whatever version it is, around a function that records instead of one in C.

    def __init__(self, src, metadata):
        self.types = list(src.signature.values())
        names = "global_scratch_size", "global_scratch_align", "profile_scratch_size", "profile_scratch_align"
        for name in (*names, "launch_cooperative_grid", "launch_pdl"):
            setattr(self, name, getattr(metadata, name))
        self.num_ctas, self.gsan_enabled, self.arg_annotations, self.kernel_signature = 1, False, (), b""
        self.launch = wrap_handle_tensordesc(self.record, dict(enumerate(self.types)), metadata.tensordesc_meta)

    def record(self, x, y, z, stream, function, cooperative, pdl, *rest):
        if isinstance(rest[0], tuple):  # Triton 3.9
            packed, metadata, enter, leave, *scratch, annotations, signature, args = rest
        else:
            *scratch, packed, metadata, enter, leave = rest[:6]
            args = rest[6:]
        assert not cooperative and not pdl and scratch == [None, None], rest
        args, values = list(args), []
        for kind in self.types:
            count = 1 + 2 * (kind.count(",") + 1) if kind.startswith("tensordesc") else 1
            value, *sizes = args[:count]
            if kind != "constexpr":
                values.append((kind, (*value, *sizes) if sizes else plain(value)))
            del args[:count]
        assert not args
        records.append((function, packed, (x, y, z), values))
        enter and enter(metadata)

def tma_descriptor(address, *rest):
    return address, repr(rest)

class Gpu(_Driver):
    launcher_cls = Recorder
    utils = types.SimpleNamespace(
        get_device_properties=lambda device: {"max_shared_mem": 232448}, unload_module=lambda module: None,
        load_binary=lambda *binary: (object(), next(handles), 64, 0, 1024),
        fill_tma_descriptor=tma_descriptor, fill_tma_descriptor_tiled=tma_descriptor,
    )

run = JITFunction.run

def watched(self, *args, **kwargs):
    by_triton.append(self.__name__)
    return run(self, *args, **kwargs)

def launched(call):
    first, seen = len(records), len(by_triton)
    call()
    return records[first:], by_triton[seen:]

def remembering(yes):
    return mock.patch.object(_launch, "_KNOWN", yes)

mock.patch.object(driver, "_active", Gpu(90)).start()
mock.patch.object(JITFunction, "run", watched).start()
"""

TOY = """
@triton.jit
def _toy_kernel(x_ptr, w_ptr, out_ptr, n, stride, scale, BLOCK: tl.constexpr, FLAG: tl.constexpr):
    offs = tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offs * stride, mask=offs < n)
    if w_ptr is not None:
        x += tl.load(w_ptr + offs)
    tl.store(out_ptr + offs, x * scale, mask=offs < n)
"""

ONE_LAUNCH = (
    RECORDER
    + TOY
    + """
kernels = set()
memory = torch.zeros(4096)
x, out = memory[:64], memory[64:128]
cases = {
    "plain": ((x, None, out), (17, 3, 2.0), {}), "another 17": ((x, None, out), (19, 3, 2.0), {}),
    "a one": ((x, None, out), (1, 3, 2.0), {}), "a multiple of 16": ((x, None, out), (32, 3, 2.0), {}),
    "64 bits": ((x, None, out), (17, 2**33 + 1, 2.0), {}), "a weight": ((x, x, out), (17, 3, 2.0), {}),
    "another dtype": ((x.half(), None, out), (17, 3, 2.0), {}), "a constant": ((x, None, out), (17, 3, 2.0), {"FLAG": True}),
    "warps": ((x, None, out), (17, 3, 2.0), {"num_warps": 2}), "stages": ((x, None, out), (17, 3, 2.0), {"num_stages": 1}),
    "a pointer that is not aligned": ((memory[1:65], None, out), (17, 3, 2.0), {}),
}
launches = []
for name, (tensors, scalars, options) in cases.items():
    options = {"BLOCK": 64, "FLAG": False, **options}
    wanted, _ = launched(lambda: _toy_kernel[(5, 2)](*tensors, *scalars, **options))
    launch = Launch(_toy_kernel, (5, 2), scalars, **options)
    launches.append((launch, tensors, wanted))
    for attempt in range(3):
        got, slow = launched(lambda: launch(*tensors))
        assert got == wanted, (name, got, wanted)
        assert bool(slow) == (attempt == 0 or "aligned" in name), (name, attempt)
    kernels.add(wanted[0][0])
assert len(kernels) == len(cases) - 1, kernels  # only another 17 shares the first one's

# One launch with pointers of another alignment, and back.
launch, tensors, wanted = launches[0]
misaligned = memory[1:65], None, out
assert launched(lambda: launch(*misaligned)) == (launches[-1][2], ["_toy_kernel"])
other = memory[128:192], None, out
got, slow = launched(lambda: launch(*other))
assert got[0][0] == wanted[0][0] and got[0][3][0] == ("*fp32", memory[128:].data_ptr()) and not slow

# A hook sees every launch.
seen = []
hook = lambda metadata: seen.append(metadata.get()["name"])
knobs.runtime.launch_enter_hook.add(hook)
got, slow = launched(lambda: launch(*tensors))
assert slow == ["_toy_kernel"] == seen and got == wanted
knobs.runtime.launch_enter_hook.remove(hook)
assert launched(lambda: launch(*tensors)) == (wanted, []) and len(seen) == 1

# Memory that is allocated for every launch is Triton's business.
launch = Launch(_toy_kernel, (5, 2), (17, 3, 2.0), BLOCK=64, FLAG=False)
compiled = launch._launch_by_triton(tensors)
for name in "global_scratch_size", "profile_scratch_size":
    with mock.patch.object(compiled, "metadata", compiled.metadata._replace(**{name: 64})):
        for _ in range(2):
            assert launched(lambda: launch(*tensors)) == (wanted, ["_toy_kernel"]), name
for slow in ["_toy_kernel"], []:
    assert launched(lambda: launch(*tensors)) == (wanted, slow)

# A version of Triton that isn't known, and a launch that only compiles.
with remembering(False):
    launch = Launch(_toy_kernel, (5, 2), (17, 3, 2.0), BLOCK=64, FLAG=False)
    assert [bool(launched(lambda: launch(*tensors))[1]) for _ in range(2)] == [True, True]
launch = Launch(_toy_kernel, (5, 2), (17, 3, 2.0), BLOCK=128, FLAG=False)
with mock.patch.object(JITFunction, "run", lambda self, *args, warmup, **kwargs: run(self, *args, warmup=True, **kwargs)):
    launch(*tensors), launch(*tensors)
assert len(launched(lambda: launch(*tensors))[0]) == 1
"""
)

OPERATORS = (
    RECORDER
    + """
from vlmkernels.backends.triton import _patch_embed_bwd, _patch_embed_cut, attention, patch_embed, rope, tile_bounds
mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: (9, 0)).start()
for module in patch_embed, _patch_embed_cut:
    mock.patch.object(module, "multiprocessors", lambda device: 132).start()
bf16 = torch.bfloat16

def attend(tokens=64, dim=64, heads=2, batch=2, ranges=0, causal=False, scale=0.1, lse=False, dtype=bf16, packed=False):
    qkv = torch.zeros(batch, tokens, 3, heads, dim, dtype=dtype)
    q, k, v = qkv.unbind(2) if packed else (qkv[:, :, 0].contiguous() for _ in range(3))
    start = torch.zeros(ranges, tokens, dtype=torch.int32) if ranges else None
    return lambda: attention.attention_fwd(q, k, v, start, start, causal, scale, 0.0, lse)

def turn(tokens=64, heads=2, kv_heads=2, half=32, norm="", dtype=bf16, table=torch.float32, eps=1e-6, packed=False, place=False):
    qkv = torch.zeros(2, tokens, (heads + 2 * kv_heads) * 64, dtype=dtype)
    cos, weight = torch.zeros(1, tokens, half, dtype=table), torch.zeros(64, dtype=dtype)
    weights = weight if "q" in norm else None, weight if "k" in norm else None
    if place:
        return lambda: rope.rope_qkv_(qkv, cos, cos, *weights, heads, kv_heads, eps, False)
    q, k, _ = rope._heads(qkv, heads, kv_heads)
    q, k = (q, k) if packed else (q.contiguous(), k.contiguous())
    return lambda: rope.rope_fwd(q, k, cos, cos, *weights, eps, False)

def embed(images=1, side=64, patch=16, dim=64, pixels=torch.uint8, prefix=0, pos="patches", norm=False, mean=0.5, bias=True,
          dtype=bf16):
    n = (side // patch) ** 2
    image = torch.zeros(images, 3, side // patch, patch, side // patch, patch, dtype=pixels)
    patches = image.permute(0, 2, 4, 1, 3, 5)[:, None, :, :, :, None]
    vector = torch.zeros(dim, dtype=dtype)
    table = {"": None, "patches": torch.zeros(n, dim, dtype=dtype), "all": torch.zeros(n + prefix, dim, dtype=dtype),
             "own": torch.zeros(images, n, dim, dtype=dtype)}[pos]
    args = torch.zeros(dim, 3, 1, patch, patch, dtype=dtype), vector if bias else None
    args += torch.zeros(prefix, dim, dtype=dtype) if prefix else None, table, *([vector, vector] if norm else [None, None])
    affine = ([mean] * 3, [1.0] * 3) if pixels == torch.uint8 else (None, None)
    return lambda: patch_embed.patch_embed_fwd(patches, *args, 1e-5, *affine, False)

def bound(tokens=64, keys=64, batch=1):
    start = torch.zeros(batch, tokens, dtype=torch.int32)
    return lambda: tile_bounds.tile_bounds(start, start, keys)

def back(images=2, patch=16, dim=64, pixels=torch.uint8, prefix=1, norm=False, own=False, needs="wbtpnm", eps=1e-5, dtype=bf16):
    n = 4
    patches = torch.zeros(images, 3, 2, patch, 2, patch, dtype=pixels).permute(0, 2, 4, 1, 3, 5)[:, None, :, :, :, None]
    weight, grad = torch.zeros(dim, 3, 1, patch, patch, dtype=dtype), torch.zeros(images, n + prefix, dim, dtype=dtype)
    scale = torch.zeros(dim, dtype=dtype) if norm else None
    affine = ([0.5] * 3, [1.0] * 3) if pixels == torch.uint8 else (None, None)
    wanted = [letter in needs[: None if norm else -2] for letter in "xwbtpnm"]
    shape = [*([images] if own else []), n + prefix, dim]
    return lambda: patch_embed.patch_embed_bwd(grad, patches, weight, scale, grad, eps, *affine, shape, wanted)

cases = {
    bound: [{}, dict(tokens=300), dict(keys=300), dict(batch=2)],
    attend: [{}, dict(tokens=65), dict(scale=0.2), dict(ranges=1), dict(ranges=2), dict(causal=True), dict(lse=True),
             dict(packed=True), dict(heads=1), dict(batch=1), dict(dtype=torch.float16)],
    turn: [{}, dict(tokens=1), dict(kv_heads=1), dict(half=16), dict(norm="q"), dict(norm="k"), dict(norm="qk"),
           dict(norm="qk", eps=1e-5), dict(table=bf16), dict(dtype=torch.float32), dict(packed=True), dict(place=True),
           dict(place=True, half=16)],
    embed: [{}, dict(images=2), dict(pixels=bf16), dict(prefix=1), dict(prefix=2), dict(prefix=2, pos="all"),
            dict(pos="own", images=2), dict(norm=True), dict(mean=0.25), dict(bias=False), dict(dim=72), dict(patch=8),
            dict(dtype=torch.float32)],
    back: [{}, dict(images=3), dict(images=1), dict(prefix=0), dict(prefix=2), dict(norm=True), dict(norm=True, eps=1e-6),
           dict(norm=True, own=True), dict(norm=True, needs="w"), dict(needs="wnm"), dict(needs="bnm"), dict(needs="tnm"),
           dict(dim=72), dict(dtype=torch.float32), dict(pixels=bf16, needs="xnm", patch=14)],
}

def shape_of(records):
    # Outputs lie somewhere else in every call: of pointers the kind, of descriptors all but the base.
    return [(function, packed, grid, [(kind, value[1:] if "desc" in kind else "*" in kind or value) for kind, value in values])
            for function, packed, grid, values in records]

for make, settings in cases.items():
    calls = [make(**options) for options in settings]
    with remembering(False):
        wanted = [shape_of(launched(call)[0]) for call in calls]
    assert len({repr(launches) for launches in wanted}) == len(calls), "two cases are the same"
    for module in attention, rope, patch_embed, _patch_embed_bwd, _patch_embed_cut, tile_bounds:
        for function in vars(module).values():
            if hasattr(function, "cache_clear") and "launch" in function.__name__ + "_cut_launch":
                function.cache_clear()
    for attempt in range(2):
        for options, call, launches in zip(settings, calls, wanted):
            got, slow = launched(call)
            assert shape_of(got) == launches, (make.__name__, options)
            assert bool(slow) == (attempt == 0), (make.__name__, options, slow)
# A descriptor that is remembered belongs to one address.
image = torch.zeros(1, 3, 4, 16, 4, 16, dtype=bf16).permute(0, 2, 4, 1, 3, 5)[:, None, :, :, :, None]
weights = [torch.zeros(64, 3, 1, 16, 16, dtype=bf16) for _ in range(2 * _launch._DESCRIPTORS)]
for weight in weights * 2:
    args = image, weight, None, None, torch.zeros(16, 64, dtype=bf16), None, None
    got, slow = launched(lambda: patch_embed.patch_embed_fwd(*args, 0.0, None, None, False))
    assert [value[0] for kind, value in got[-1][3] if "desc" in kind][1] == weight.data_ptr()
assert not slow
for function in (attention._fwd_launch, rope._fwd_launch, tile_bounds._launches, patch_embed._gemm_launch,
                 patch_embed._norm_launch, _patch_embed_cut._cut, _patch_embed_bwd._rows_launch, _patch_embed_bwd.sums_launch,
                 _patch_embed_bwd._weight_launch):
    assert function.cache_info().maxsize == LAUNCHES
"""
)


@pytest.mark.parametrize("script", [ONE_LAUNCH, OPERATORS], ids=["one launch", "operators"])
def test_remembered_launches_are_tritons(script: str, tmp_path: Path) -> None:
    file = tmp_path / "script.py"  # Triton reads the source of a kernel from its file
    file.write_text(script)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    done = subprocess.run([sys.executable, str(file)], capture_output=True, text=True, env=environment, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.mark.gpu
@torch.no_grad()
def test_second_call_is_right(device: torch.device) -> None:
    """The second call of one signature is the first that Triton has no part in."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.float16)

    pixels = torch.randint(0, 256, (2, 3, 48, 48), dtype=torch.uint8, device=device)
    start = torch.zeros(1, 70, dtype=torch.int32, device=device)
    for _ in range(3):
        tensors = random(2, 70, 4, 64), random(2, 70, 2, 64), random(2, 70, 2, 64), random(1, 70, 32), random(64)
        tensors += random(96, 3, 12, 12), random(16, 96)
        ranges = KeyRanges(start, start + torch.randint(1, 70, start.shape, dtype=torch.int32, device=device))
        got = _every_operator(*tensors, pixels, ranges, "triton")
        exact = _every_operator(*(x.double() for x in tensors), pixels, ranges, "reference")
        for name in exact:
            assert compare(got[name], exact[name], "gemm"), name


def _every_operator(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cos: torch.Tensor, weight: torch.Tensor, kernel: torch.Tensor,
    pos: torch.Tensor, pixels: torch.Tensor, ranges: KeyRanges, backend: str,
) -> dict[str, torch.Tensor]:  # fmt: skip
    new_q, new_k = rope(q, k, cos, cos, q_weight=weight, backend=backend)
    half = (0.5, 0.5, 0.5)
    return {
        "attention": attention(q, k, v, backend=backend),
        "ranges": attention(q, k, v, ranges, backend=backend),
        "rope q": new_q,
        "rope k": new_k,
        "patch_embed": patch_embed(pixels, kernel, patch_size=12, mean=half, std=half, pos_embed=pos, backend=backend),
    }

# SPDX-License-Identifier: Apache-2.0
"""Generated cases of every operator, forward and backward: shapes, strides, magnitudes, dtypes, against the fp64 reference.

Every input lies in a larger buffer of NaN, whose bits must be the same after the call, and every tensor that a backend allocates
lies between bands of bytes that must still be there. With ``--hypothesis-profile=thorough`` there are thousands of cases of each
operator, for a machine with a GPU, where the sizes are larger too.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from conftest import DEVICE, EMPTY, ON_GPU, THOROUGH, examples, is_thorough, runnable
from hypothesis import assume, given
from hypothesis import strategies as st

from vlmkernels import BackendError, KeyRanges, clip_loss, siglip_loss, verify
from vlmkernels.backends.cuda.activated_linear import MIN_TILES
from vlmkernels.ops.activated_linear import ACTIVATIONS
from vlmkernels.ops.cross_attention import cross_attention
from vlmkernels.testing import compare
from vlmkernels.verify import Case, Inputs

Draw = Callable[[Any], Any]
#: Bytes before and behind what a backend allocates, and what they hold.
BAND, BAND_BYTE = 512, 0xA5
LAYOUTS = ("contiguous", "sliced", "odd", "heads first")


class Placed:
    """A tensor inside a larger buffer of NaN (integers: the largest), whose bits are remembered."""

    def __init__(self, x: torch.Tensor, layout: str) -> None:
        around = math.nan if x.is_floating_point() else torch.iinfo(x.dtype).max
        step = 16 // x.element_size()  # what Hopper's copy engine asks of an address and of strides
        if layout == "sliced" and x.dim() and x.numel():
            sizes = [size + 2 for size in x.shape[:-1]] + [(x.shape[-1] // step + 3) * step]
            self.buffer = x.new_full(sizes, around)
            view = self.buffer[tuple(slice(1, 1 + size) for size in x.shape[:-1]) + (slice(step, step + x.shape[-1]),)]
        else:
            first = 64 + (layout == "odd")
            self.buffer = x.new_full((x.numel() + 2 * 64 + 1,), around)
            view = self.buffer[first : first + x.numel()]
            swapped = layout == "heads first" and x.dim() == 4
            view = view.view(x.transpose(1, 2).shape).transpose(1, 2) if swapped else view.view(x.shape)
        self.tensor = view.copy_(x)
        self._before = self._bits().clone()

    def _bits(self) -> torch.Tensor:
        return self.buffer.view(torch.uint8)

    @property
    def untouched(self) -> torch.Tensor:
        return (self._bits() == self._before).all()


class Bands:
    """Inside, what Python allocates without filling it comes with a band of bytes before and behind it."""

    def __init__(self) -> None:
        self._found: list[tuple[torch.Tensor, int]] = []
        self._patch = pytest.MonkeyPatch()

    def __enter__(self) -> "Bands":
        empty = torch.empty
        for owner, name in EMPTY:
            self._patch.setattr(owner, name, self._banded(getattr(owner, name), empty))
        return self

    def __exit__(self, *_: Any) -> None:
        self._patch.undo()

    def _banded(self, original: Callable[..., torch.Tensor], empty: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = original(*args, **kwargs)
            size = out.untyped_storage().nbytes()
            if not size or out.device.type == "meta":
                return out
            room = -(-size // BAND) * BAND
            buffer = empty(2 * BAND + room, dtype=torch.uint8, device=out.device)
            for band in (buffer[:BAND], buffer[BAND + size :]):  # between them, initcheck sees what no kernel writes
                band.fill_(BAND_BYTE)
            self._found.append((buffer, size))
            return buffer[BAND : BAND + room].view(out.dtype).as_strided(out.shape, out.stride())

        return call

    @property
    def intact(self) -> torch.Tensor:
        bands = [band for x, size in self._found for band in (x[:BAND], x[BAND + size :])]
        return (torch.cat(bands) == BAND_BYTE).all() if bands else torch.tensor(True)

    def __len__(self) -> int:
        return len(self._found)


def rule_of(case: Case, output: str) -> str:
    """As the tests of each operator: gradients of attention, or of a norm behind a product, round more than results do."""
    if output.startswith("d") and (case.op == "attention" or "norm_weight" in case.gradients):
        return "grad"
    return "gemm" if case.rule == "norm" and output.startswith("d") and output.endswith("weight") else case.rule


def holds(case: Case, dtype: torch.dtype, backend: str, seed: int, layouts: list[str]) -> None:
    """The case is right on this backend, and writes nothing that is not its own. Rejected where the backend does not take it."""
    torch.manual_seed(seed)
    with torch.device(DEVICE):  # on a CPU the numbers of a large case take longer than all else
        drawn = case.inputs()
    rounded = {name: verify._to(x, DEVICE, dtype) for name, x in drawn.items()}
    exact = verify.evaluate(case, {name: verify._to(x, DEVICE, torch.float64) for name, x in rounded.items()}, "reference")
    placed = {name: Placed(x, layout) for (name, x), layout in zip(rounded.items(), itertools.cycle(layouts), strict=False)}
    inputs = {name: place.tensor for name, place in placed.items()}
    with Bands() as bands:
        try:
            got = verify.evaluate(case, inputs, backend)
        except BackendError:
            try:  # it may leave the gradients of such a case to others
                got = verify.evaluate(dataclasses.replace(case, gradients=()), inputs, backend)
            except BackendError:
                assume(False)
    for name, x in got.items():
        result = compare(x, exact[name], rule_of(case, name))
        assert result, f"{name}: {result}"
    untouched = torch.stack([place.untouched for place in placed.values()]).tolist()  # a GPU is waited for once
    touched = [name for name, same in zip(placed, untouched, strict=True) if not same]
    assert not touched, f"what lies around {touched}, or they themselves, changed"
    assert bands.intact, "something was written beside a tensor that was allocated"


HALVES = (torch.bfloat16, torch.float16)
#: A property is tested in so many parts, so that several processes share its cases.
PARTS = 8 if is_thorough() else 1


def property_of(
    *ops: str,
    few: int,
    dtypes: tuple[torch.dtype, ...] = verify.DTYPES,
    cuda: tuple[torch.dtype, ...] = HALVES,
    triton: tuple[torch.dtype, ...] = verify.DTYPES,
) -> Callable[..., Any]:
    """Test a function that draws a case, for a backend and a dtype by ``draw``, on each of both that run ``ops`` here.

    CUDA takes fewer dtypes, as do some of Triton's kernels. Triton's interpreter is given one: it takes a second for most cases,
    and 9 for one of positions.

    A thorough test draws ``THOROUGH`` cases for a backend. Triton compiles for most of its cases: where another backend comes
    first, a tenth.
    """
    fewer = {"cuda": cuda, "triton": triton if ON_GPU else (torch.bfloat16,)}

    def decorate(draw_case: Callable[[str, torch.dtype, Draw], Case]) -> Callable[..., None]:
        pairs = [
            (backend, dtype)
            for backend in runnable(*ops)
            for dtype in dtypes
            if backend != "reference" and dtype in fewer.get(backend, dtypes)
        ]
        backends = [backend for backend, _ in pairs]
        name = draw_case.__name__.removeprefix("test_")

        @pytest.mark.parametrize("part", range(PARTS))
        @pytest.mark.parametrize("backend, dtype", pairs, ids=lambda x: str(x).removeprefix("torch."))
        def test(backend: str, dtype: torch.dtype, part: int, record_property: Callable[[str, object], None]) -> None:
            compared, part_of = 0, PARTS * backends.count(backend) * (10 if backend == "triton" != backends[0] else 1)

            @examples(few, -(-THOROUGH // part_of))
            @given(st.data(), st.integers(0, 2**31), st.lists(st.sampled_from(LAYOUTS), min_size=9, max_size=9))
            def run(data: Any, seed: int, layouts: list[str]) -> None:
                nonlocal compared
                holds(draw_case(backend, dtype, data.draw), dtype, backend, seed, layouts)
                compared += 1

            run()
            record_property(f"cases of {name}, {backend}", compared)

        test.__doc__ = draw_case.__doc__
        return test

    return decorate


def of(*values: Any) -> Any:
    return st.sampled_from(values)


def scaled(case: Case, name: str, factor: float) -> Case:
    """The case with one input larger or smaller."""

    def inputs() -> Inputs:
        tensors = case.inputs()
        return tensors | {name: tensors[name] * factor}

    return dataclasses.replace(case, inputs=inputs)


HEAD_DIMS = {"cuda": verify.HEAD_DIMS, "": (16, 24, 64, 72, 80, 128, 256) if ON_GPU else (16, 24, 40)}
#: Tokens: a tile of 64 and its neighbours, or a few.
TOKENS = st.integers(1, 700) if ON_GPU else st.integers(1, 70)


@property_of("attention_fwd", "attention_bwd", few=3)
def test_attention(backend: str, dtype: torch.dtype, draw: Draw) -> Case:
    """Every mask is ranges in no order, some of them empty, or causal; heads are grouped; queries and keys of any number."""
    kv_heads, group = draw(of(1, 2)), draw(of(1, 2, 3))
    tokens, packed = (draw(TOKENS), draw(TOKENS)), draw(of(False, False, True))
    tokens = (tokens[0], tokens[0]) if packed else tokens
    # Statistics of a few elements say nothing: at least 32 rows of queries, of which some may see a key or two.
    batch = max(draw(of(1, 2)), -(-32 // (tokens[0] * kv_heads * group)))
    dim = draw(of(*HEAD_DIMS.get(backend, HEAD_DIMS[""])))
    options = {
        "causal": draw(st.booleans()),
        "ranged": draw(st.booleans()),
        "softcap": draw(of(0.0, 0.0, 0.0, 20.0)),
        "value_dim": 0 if packed else draw(of(0, 0, 0, 64 if ON_GPU else 24)),
        "packed": packed,
    }
    case = verify._attention_case("generated", dim, (batch, kv_heads * group, kv_heads, *tokens), **options)
    larger = draw(of(1.0, 0.1, 4.0))
    case = scaled(case, "q", larger)
    if tokens[1] < 16 or larger > 1:
        # The gradients of a softmax of few keys, or of one that has made its choice, are differences of almost equal numbers.
        case = dataclasses.replace(case, gradients=())
    if not options["ranged"]:
        return case

    def inputs() -> Inputs:
        """Bounds outside the keys are cut to them."""
        tensors = case.inputs()
        outside = 9 * (torch.arange(tensors["start"].shape[1]) % 5 == 0).int()
        return tensors | {"start": tensors["start"] - outside, "stop": tensors["stop"] + outside}

    return dataclasses.replace(case, inputs=inputs)


@property_of("tile_bounds", few=5, dtypes=(torch.bfloat16,))
def test_tile_bounds(backend: str, dtype: torch.dtype, draw: Draw) -> Case:
    """Bounds of any ranges over any number of keys."""
    batch, queries, keys = draw(of(1, 2, 3)), draw(st.integers(1, 400)), draw(st.integers(1, 400))

    def inputs() -> Inputs:
        ends = torch.randint(-10, keys + 10, (2, batch, queries), dtype=torch.int32)
        return {"start": ends[0], "stop": ends[1]}

    def run(t: Inputs, backend: str) -> list[torch.Tensor]:
        return [x.float() for x in verify.tile_bounds(KeyRanges(t["start"], t["stop"]), keys, backend=backend)]

    return Case("tile_bounds", "generated", "exact", inputs, run)


@property_of("patch_embed_fwd", "patch_embed_bwd", few=3)
def test_patch_embed(backend: str, dtype: torch.dtype, draw: Draw) -> Case:
    """Images of uint8 or floats, frames, rows; with or without bias, prefix tokens, positions and norm."""
    if backend == "cuda":  # patches of 14 and 16 in rows of whole 16 bytes, and no gradient of the pixels
        case = _patch_embed(draw, (14, 16), (768, 1024, 1152), ("channels_first",), of(112, 224, 336))
        return dataclasses.replace(case, gradients=tuple(name for name in case.gradients if name != "pixels"))
    every = ("channels_first", "channels_last", "rows")
    return _patch_embed(draw, (14, 16, (2, 14, 14)) if ON_GPU else (4, 5, (2, 3, 3)), (768, 200) if ON_GPU else (192, 136), every)


def _patch_embed(
    draw: Draw, patches: tuple[Any, ...], dims: tuple[int, ...], layouts: tuple[str, ...], sides: Any = None
) -> Case:
    patch = draw(of(*patches))
    side = patch[-1] if isinstance(patch, tuple) else patch
    layout = draw(of(*layouts))
    rows = layout == "rows"
    size = 0 if rows else draw(st.integers(3 * side, 6 * side) if sides is None else sides)
    return verify._patch_embed_case(
        "generated",
        patch,
        size,
        draw(of(*dims)),
        bias=draw(st.booleans()),
        prefix=0 if rows else draw(of(0, 1, 5)),
        positions=False if rows else draw(of(False, True, "patches")),
        norm=draw(st.booleans()),
        uint8=not rows and draw(st.booleans()),
        layout=layout,
        columns=draw(of("cyx", "yxc")) if rows and not isinstance(patch, tuple) else "cyx",
        still=rows and isinstance(patch, tuple) and draw(st.booleans()),
    )


@property_of("rope_fwd", "rope_bwd", few=3)
def test_rope(backend: str, dtype: torch.dtype, draw: Draw) -> Case:
    """Pairs of halves or of neighbours, part of a head or all of it, with and without the norm."""
    dim = draw(of(64, 72, 80, 128)) if ON_GPU else draw(of(16, 24, 40))
    rotated = draw(of(dim, dim // 2 // 4 * 4))
    kv_heads, group, batch, tokens = draw(of(1, 2)), draw(of(1, 3)), draw(of(1, 2)), draw(st.integers(4, 40))
    case = verify._rope_case("generated", dim, rotated, draw(st.booleans()), draw(st.booleans()))
    tables = draw(of(1, batch))

    def inputs() -> Inputs:
        angle = torch.rand(tables, tokens, rotated // 2) * 2 * math.pi
        own = {"cos": angle.cos(), "sin": angle.sin()}
        own |= {"q": torch.randn(batch, tokens, kv_heads * group, dim), "k": torch.randn(batch, tokens, kv_heads, dim)}
        return case.inputs() | own

    return scaled(dataclasses.replace(case, inputs=inputs), "q", draw(of(1.0, 0.01, 100.0)))


@property_of("linear_add_norm_fwd", few=3, triton=HALVES)
def test_linear_add_norm(backend: str, dtype: torch.dtype, draw: Draw) -> Case:
    rows = draw(st.one_of(st.integers(0, 70), st.integers(1000, 2100) if ON_GPU else st.nothing()))
    # The norm of a number or two divides by almost nothing, and statistics of a few results say nothing.
    width, columns = (draw(st.integers(least, 800 if ON_GPU else 100)) for least in (1, max(8, 64 // max(rows, 1))))
    return verify._linear_add_norm_case(rows, width, columns, draw(st.booleans()))


@property_of("pos_embed_fwd", "pos_embed_bwd", few=3, dtypes=verify.DTYPES if ON_GPU else (torch.float32,))
def test_pos_embed(backend: str, dtype: torch.dtype, draw: Draw) -> Case:
    """Grids of any size, that of a model or another, in each layout."""
    merge, frames, side = draw(of(1, 2)), *((2, 12) if ON_GPU else (1, 4))
    sides = st.integers(1, side // merge).map(lambda x: x * merge)
    grids = [(draw(st.integers(0, frames)), draw(sides), draw(sides)) for _ in range(3)]
    padded, rows = draw(st.booleans()), frames * side**2
    options: dict[str, Any] = {"merge_size": merge}
    options |= draw(of({}, {"antialias": True}, {"align_corners": True}))
    options |= {"layout": "padded", "padding": draw(of("zeros", "first"))} if padded else {}
    table = draw(of(4, 7, 16)), draw(of(4, 9)), draw(of(24, 40))
    # Triton compiles for the number of rows.
    case = verify._pos_embed_case("generated", table, grids, rows if padded else 3 * rows, options)
    # Of few different results the floor is left to luck: 10 in fp32, where a wrong formula is 1e4 (CPU, torch).
    return dataclasses.replace(case, rule="gemm") if dtype == torch.float32 else case


@property_of("activated_linear_fwd", few=3)
def test_activated_linear(backend: str, dtype: torch.dtype, draw: Draw) -> Case:
    """Each activation; in CUDA enough tiles, with rests of rows, depth and columns."""
    gated = draw(st.booleans())
    if backend == "cuda":
        activation = draw(of(*(("silu", "gelu_tanh") if gated else ACTIVATIONS[:3])))
        depth, dim = 512 + 8 * draw(st.integers(0, 80)), 8 * draw(st.integers(64, 300))
        rows = 256 * -(-MIN_TILES // -(-dim // (128 if gated else 256))) + draw(st.integers(-255, 300))
    else:
        activation = draw(of(*ACTIVATIONS))
        # Of few results, a few of which are most of errors and floor, luck may have 3 floors.
        rows, depth, dim = draw(st.integers(32, 90)), draw(st.integers(8, 70)), draw(st.integers(32, 90))
    return verify._activated_linear_case("generated", activation, rows, depth, dim, gated)


@property_of("feed_forward_fwd", "feed_forward_bwd", few=3)
def test_feed_forward(backend: str, dtype: torch.dtype, draw: Draw) -> Case:
    """As above, with all gradients."""
    activation = draw(of(*ACTIVATIONS[:3]))
    if backend == "cuda":
        depth, dim = 512 + 8 * draw(st.integers(0, 80)), 8 * draw(st.integers(64, 300))
        rows = 256 * -(-MIN_TILES // -(-dim // 256)) + draw(st.integers(-255, 300))
        rows += -rows % 8 if draw(st.booleans()) else 0
    else:
        # Of 36 columns the gradient of the first bias is up to 4 floors off, as torch sums rounded numbers; of 200 up to 2.3.
        rows, depth, dim = draw(st.integers(32, 70)), draw(st.integers(64, 160)), draw(st.integers(200, 300))
    case = verify._feed_forward_case("generated", activation, rows, depth, dim)
    # cuBLAS, whose products the gradients of the weights are, may lose the last of so many rows: of x^T y with 16,897 or 16,898
    # of 512 columns the last one or two (CUDA 13.0, H200; 16,900 are right).
    lost = backend == "cuda" and rows % 8 != 0
    return dataclasses.replace(case, gradients=("x", "bias1", "bias2")) if lost else case


@property_of("layer_norm_fwd", "layer_norm_bwd", few=3)
def test_layer_norm(backend: str, dtype: torch.dtype, draw: Draw) -> Case:
    """Rows of any width."""
    rows = draw(st.integers(1, 40))
    few = 8 if rows > 7 else 64  # of 8 numbers luck may have 8 floors in fp32
    return verify._layer_norm_case("generated", rows, draw(st.integers(few, 3000 if ON_GPU else 300)))


@property_of("clip_loss_fwd", "clip_loss_bwd", "siglip_loss_fwd", few=3, cuda=(torch.bfloat16,))
def test_contrastive(backend: str, dtype: torch.dtype, draw: Draw) -> Case:
    """Both losses, with as many texts as images or more, normalised here or before."""
    loss = draw(of(clip_loss, siglip_loss))
    in_cuda = backend == "cuda"
    images = draw(st.integers(32, 800 if in_cuda else 300 if ON_GPU else 70))
    texts = images * draw(of(1, 1, 2))
    options: dict[str, Any] = {"normalize": draw(st.booleans())}
    if loss is clip_loss and not in_cuda:
        options["label_smoothing"] = draw(of(0.0, 0.1))
    dim = draw(of(192, 256, 384, 512, 768)) if in_cuda else draw(of(16, 24, 64) if not ON_GPU else of(64, 200, 512))
    return verify._contrastive_case("generated", loss, images, texts, dim, **options)


@property_of("attention_fwd", "attention_bwd", few=3)
def test_cross_attention(backend: str, dtype: torch.dtype, draw: Draw) -> Case:
    """The projections around attention: both ways, either batch 1, some without biases. In 16 bits without gradients, to which
    each of the parts adds its rounding."""
    heads, dim, width = draw(of(2, 4)), draw(of(64, 80)) if ON_GPU else draw(of(16, 24)), draw(of(64, 96))
    batch, queries, keys = draw(of(1, 2)), draw(st.integers(16, 40)), draw(st.integers(16, 70))
    inner = heads * dim
    biased, way = draw(st.booleans()), draw(of("project", "absorb"))
    shapes = {"x": (draw(of(1, batch)), queries, width), "context": (draw(of(1, batch)), keys, width)}
    shapes |= {"w_q": (inner, width), "w_k": (inner, width), "w_v": (inner, width), "w_o": (width, inner)}
    biases = {"b_q": (inner,), "b_v": (inner,), "b_o": (width,)} if biased else {}

    def inputs() -> Inputs:
        tensors = {name: torch.randn(shape) / shape[-1] ** 0.5 for name, shape in (shapes | biases).items()}
        return tensors | {"x": torch.randn(shapes["x"]) / 2, "context": torch.randn(shapes["context"])}

    def run(t: Inputs, backend: str) -> list[torch.Tensor]:
        return [cross_attention(**t, num_heads=heads, way=way, backend=backend)]

    return Case("cross_attention", "generated", "module", inputs, run, tuple(shapes) if dtype == torch.float32 else ())


def seen(length: int, sees: Callable[[int, int], bool]) -> torch.Tensor:
    return torch.tensor([[sees(i, j) for j in range(length)] for i in range(length)])


@examples(20)
@given(st.data(), st.lists(st.integers(1, 5), min_size=1, max_size=6), st.integers(0, 6), of(None, 1, 3))
def test_masks(data: Any, lengths: list[int], prefix: int, window: int | None) -> None:
    """Each constructor shows what the definition of its mask says, pair by pair."""
    total = sum(lengths)
    ids = [number for number, length in enumerate(lengths) for _ in range(length)]
    image = [data.draw(st.booleans()) for _ in lengths]
    of_image = torch.tensor([[number if image[number] else -1 for number in ids]])

    def near(i: int, j: int) -> bool:
        return window is None or j > i - window

    def same_image(i: int, j: int) -> bool:
        return ids[i] == ids[j] and image[ids[i]]

    both_ways = {"window_outside": lambda i, j: near(i, j) and (j <= i or same_image(i, j)),
                 "image_outside": lambda i, j: (near(i, j) and j <= i) or same_image(i, j)}  # fmt: skip
    for rule, sees in both_ways.items():
        ranges = KeyRanges.image_text(image_ids=of_image, window=window, window_rule=rule)
        assert torch.equal(ranges.dense(total)[0], seen(total, sees)), rule
    cases = {
        "causal": (KeyRanges.causal(total, total, window=window), lambda i, j: j <= i and near(i, j)),
        "prefix": (KeyRanges.prefix_lm(total, prefix), lambda i, j: j <= i or j < prefix),
        "packed": (KeyRanges.packed(torch.tensor([0, *lengths]).cumsum(0), total), lambda i, j: ids[i] == ids[j]),
        "windows": (KeyRanges.windows(lengths[0], total), lambda i, j: i // lengths[0] == j // lengths[0]),
        "padding": (KeyRanges.key_padding(total, lengths=torch.tensor([prefix])), lambda i, j: j < prefix),
    }
    for name, (ranges, sees) in cases.items():
        assert torch.equal(ranges.dense(total)[0], seen(total, sees)), name


def test_bands_and_rooms_show_what_is_written_outside(device: torch.device) -> None:
    """The two tools themselves."""
    x = torch.arange(12.0, device=device).view(3, 4)
    for layout in LAYOUTS:
        place = Placed(x, layout)
        assert torch.equal(place.tensor, x) and place.untouched
        place.buffer.view(-1)[0] = 0.0
        assert not place.untouched
    for offset in (-1, 12):
        with Bands() as bands:
            out = torch.empty(3, 4, device=device)
        assert len(bands) == 1 and out.shape == (3, 4)
        out.fill_(1.0)
        assert bands.intact
        out.as_strided((1,), (1,), out.storage_offset() + offset).fill_(0.0)
        assert not bands.intact

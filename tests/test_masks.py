# SPDX-License-Identifier: Apache-2.0
"""KeyRanges by themselves: what each mask shows on small drawings, the laws of composition, refusals, and that no constructor
reads a value back. What the models really build is in test_masks_transformers.py."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import examples
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils import _pytree

from vlmkernels.masks import KeyRanges, compact_keys, even_spans

property_test = examples(40)


def ints(*values: Any, device: Any = None) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.int64, device=device)


def drawn(ranges: KeyRanges, num_keys: int) -> list[str]:
    """One string per batch element: rows of keys, # seen and . hidden, with a space between the queries."""
    return [" ".join("".join(".#"[seen] for seen in row) for row in rows) for rows in ranges.dense(num_keys).tolist()]


TOKENS = ints([0, 1, 0, 1, 1, 0])
# Name: a constructor of one or more index tensors, its inputs, the drawing, and other inputs of the same shapes.
CASES: dict[str, tuple[Callable[..., KeyRanges], tuple[torch.Tensor, ...], list[str], tuple[torch.Tensor, ...]]] = {
    "full": (lambda x: KeyRanges.full(2, 3, device=x.device), (TOKENS,), ["### ###"], (TOKENS,)),
    "causal": (lambda x: KeyRanges.causal(2, 4, device=x.device), (TOKENS,), ["###. ####"], (TOKENS,)),
    "causal, more queries than keys": (lambda x: KeyRanges.causal(3, 2, device=x.device), (TOKENS,), [".. #. ##"], (TOKENS,)),
    "causal, KV caches": (
        lambda n: KeyRanges.causal(2, 4, offset=n, window=2),
        (ints(0, 2),),
        ["#... ##..", ".##. ..##"],
        (ints(1, 3),),
    ),
    "prefix_lm, int": (lambda x: KeyRanges.prefix_lm(3, 2, device=x.device), (TOKENS,), ["##. ##. ###"], (TOKENS,)),
    "prefix_lm": (
        lambda n: KeyRanges.prefix_lm(4, n),
        (ints(0, 3),),
        ["#... ##.. ###. ####", "###. ###. ###. ####"],
        (ints(2, 9),),
    ),
    "prefix_lm, window, image outside": (
        lambda n: KeyRanges.prefix_lm(5, n, window=2),
        (ints(3),),
        ["###.. ###.. ###.. ..##. ...##"],
        (ints(1),),
    ),
    "image_text, types": (
        lambda t: KeyRanges.image_text(t),
        (ints([0, 1, 1, 0, 1]),),
        ["#.... ###.. ###.. ####. #####"],
        (ints([1, 1, 0, 1, 1]),),
    ),
    "image_text, ids": (
        lambda t: KeyRanges.image_text(image_ids=t),
        (ints([-1, 0, 0, 7, 7]),),
        ["#.... ###.. ###.. ##### #####"],
        (ints([3, 3, 3, 3, -2]),),
    ),
    "image_text, window outside": (
        lambda t: KeyRanges.image_text(t, window=2, window_rule="window_outside"),
        (ints([0, 1, 1, 1, 0]),),
        ["#.... ####. .###. ..##. ...##"],
        (ints([1, 1, 0, 1, 1]),),
    ),
    "image_text, image outside": (
        lambda t: KeyRanges.image_text(t, window=2, window_rule="image_outside"),
        (ints([0, 1, 1, 1, 0]),),
        ["#.... ####. .###. .###. ...##"],
        (ints([1, 1, 0, 1, 1]),),
    ),
    "packed": (
        lambda c: KeyRanges.packed(c, 5),
        (ints(0, 2, 2, 4),),
        ["##... ##... ..##. ..##. ....."],
        (ints(0, 1, 4, 5),),
    ),
    "packed, causal": (
        lambda c: KeyRanges.packed(c, 5, causal=True),
        (ints(0, 2, 2, 4),),
        ["#.... ##... ..#.. ..##. ....."],
        (ints(0, 1, 4, 5),),
    ),
    "packed, other keys": (
        lambda c, k: KeyRanges.packed(c, 4, cu_seqlens_k=k, causal=True),
        (ints(0, 2, 4), ints(0, 1, 4)),
        [".... #... .##. .###"],
        (ints(0, 1, 4), ints(0, 2, 4)),
    ),
    "windows, fixed": (lambda x: KeyRanges.windows(2, 3, device=x.device), (TOKENS,), ["##. ##. ..#"], (TOKENS,)),
    "windows": (lambda c: KeyRanges.windows(c, 3), (ints(0, 1, 3),), ["#.. .## .##"], (ints(0, 2, 3),)),
    "key_padding, lengths": (lambda n: KeyRanges.key_padding(1, lengths=n), (ints(0, 2),), ["...", "##."], (ints(3, 1),)),
    "key_padding, mask": (
        lambda m: KeyRanges.key_padding(1, mask=m),
        (ints([0, 1, 1], [1, 1, 0], [0, 0, 0]),),
        [".##", "##.", "..."],
        (ints([0, 1, 0], [1, 1, 1], [0, 0, 1]),),
    ),
    "cross": (
        lambda i, a, b: KeyRanges.cross(i, a, b),
        (ints([-1, 0, 1, 2, 1]), ints([0, 3]), ints([2, 4])),
        [".... ##.. ...# .... ...#"],
        (ints([1, 1, 0, -7, 9]), ints([0, 1]), ints([1, 4])),
    ),
    "cross, runs of images": (
        lambda i, j: KeyRanges.cross(i, *even_spans(3, 1, device=i.device), stop_image=j),
        (ints([0, 1, 1, 2]), ints([2, 3, 1, 9])),
        ["##. .## ... ..#"],
        (ints([2, 0, 0, 1]), ints([3, 3, 0, 2])),
    ),
    "flamingo": (
        lambda t: KeyRanges.flamingo(t, *even_spans(3, 1, device=t.device)),
        (TOKENS,),
        ["... #.. #.. .#. ..# ..#"],
        (1 - TOKENS,),
    ),
    "mllama": (
        lambda t: KeyRanges.mllama(t, *even_spans(3, 1, device=t.device)),
        (TOKENS,),
        ["... #.. #.. .#. .## .##"],
        (1 - TOKENS,),
    ),
    "mllama, everything": (
        lambda t: KeyRanges.mllama(t, *even_spans(3, 1, device=t.device), before_image="everything"),
        (TOKENS,),
        ["### #.. #.. .#. .## .##"],
        (1 - TOKENS,),
    ),
    "mllama_vision": (lambda n: KeyRanges.mllama_vision(n, 3), (ints(1, 3),), ["### #.. #..", "### ### ###"], (ints(2, 0),)),
    "qformer itc": (
        lambda n: KeyRanges.qformer("itc", 2, 2, text_lengths=n),
        (ints(2, 1),),
        ["##.. ##.. ..## ..##", "##.. ##.. ..#. ..#."],
        (ints(0, 1),),
    ),
    "qformer itm": (
        lambda m: KeyRanges.qformer("itm", 1, 2, text_mask=m),
        (ints([1, 1], [1, 0]),),
        ["### ### ###", "##. ##. ##."],
        (ints([0, 0], [1, 0]),),
    ),
    "qformer itg": (
        lambda n: KeyRanges.qformer("itg", 2, 2, text_lengths=n),
        (ints(2, 1),),
        ["##.. ##.. ###. ####", "##.. ##.. ###. ###."],
        (ints(0, 1),),
    ),
    "qformer, queries only": (lambda x: KeyRanges.qformer("itg", 2, device=x.device), (TOKENS,), ["## ##"], (TOKENS,)),
    "composed": (
        lambda m, n: (KeyRanges.prefix_lm(3, n) & KeyRanges.key_padding(3, mask=m)).repeat(2)[1:].key_chunk(1, 3),
        (ints([0, 1, 1]), ints(2)),
        ["#. ##"] * 2,
        (ints([1, 1, 0]), ints(3)),
    ),
    "union": (
        lambda n: KeyRanges.causal(3, offset=n).union(KeyRanges.windows(2, 3, device=n.device), validate=False),
        (ints(0),),
        ["##. ##. ###"],
        (ints(1),),
    ),
}


def test_drawings_of_the_documentation() -> None:
    page = (Path(__file__).parents[1] / "docs" / "masks.md").read_text()
    examples = re.findall(r"```python\n(.*?)\n```\n```text\n(.*?)\n```", page, re.DOTALL)
    assert len(examples) == page.count("```python") >= 13
    names = {"torch": torch, "KeyRanges": KeyRanges, "even_spans": even_spans}
    for code, drawing in examples:
        assert drawn(eval(code, names), len(drawing.split()[0])) == [" ".join(drawing.split())], code


def on(device: torch.device, tensors: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(t.to(device) for t in tensors)


def assert_same(got: KeyRanges, wanted: KeyRanges) -> None:
    assert torch.equal(got.start, wanted.start) and torch.equal(got.stop, wanted.stop)


@pytest.mark.parametrize("name", CASES)
def test_drawing(name: str, device: torch.device) -> None:
    build, inputs, drawing, _ = CASES[name]
    ranges = build(*on(device, inputs))
    assert drawn(ranges, len(drawing[0].split()[0])) == drawing
    assert ranges.device.type == device.type and ranges.batch == len(drawing) and ranges.num_queries == len(drawing[0].split())


@pytest.mark.parametrize("name", CASES)
def test_reads_no_value_back(name: str) -> None:
    """A FakeTensor has no values: .item(), bool() and data-dependent shapes raise."""
    build, inputs, _, _ = CASES[name]
    with FakeTensorMode() as mode:
        ranges = build(*(mode.from_tensor(t) for t in inputs))
    assert ranges.start.shape == build(*inputs).start.shape


@pytest.mark.parametrize("name", CASES)
def test_compiles_to_one_graph(name: str, device: torch.device) -> None:
    build, inputs, _, others = CASES[name]
    torch._dynamo.reset()
    compiled = torch.compile(build, fullgraph=True, backend="aot_eager")
    for tensors in (on(device, inputs), on(device, others)):
        assert_same(compiled(*tensors), build(*tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_compiled_for_the_gpu(name: str, device: torch.device) -> None:
    build, inputs, _, _ = CASES[name]
    torch._dynamo.reset()
    tensors = on(device, inputs)
    assert_same(torch.compile(build, fullgraph=True)(*tensors), build(*tensors))


@pytest.mark.gpu
@pytest.mark.parametrize("name", CASES)
def test_cuda_graph(name: str, device: torch.device) -> None:
    build, inputs, _, others = CASES[name]
    static = on(device, inputs)
    build(*static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        ranges = build(*static)
    for tensors in (inputs, others):
        for buffer, new in zip(static, tensors, strict=True):
            buffer.copy_(new)
        graph.replay()
        assert_same(ranges, build(*on(device, tensors)))


@pytest.mark.gpu
def test_compact_keys_in_a_cuda_graph(device: torch.device) -> None:
    static = torch.rand(2, 3, 5, device=device) < 0.5
    compact_keys(static)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = compact_keys(static)
    static.copy_(torch.rand(2, 3, 5, device=device) < 0.5)
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(got, compact_keys(static), strict=True))


@st.composite
def ranges_of(draw: Any, batch: int | None = None, queries: int | None = None) -> tuple[KeyRanges, int]:
    """Ranges with empty, reversed and non-monotone rows, and the number of keys."""
    batch = draw(st.integers(0, 3)) if batch is None else batch
    queries = draw(st.integers(0, 5)) if queries is None else queries
    keys = draw(st.integers(0, 6))
    values = draw(st.lists(st.integers(0, keys), min_size=2 * batch * queries, max_size=2 * batch * queries))
    return KeyRanges(*torch.tensor(values, dtype=torch.int32).reshape(2, batch, queries).unbind()), keys


@property_test
@given(ranges_of())
def test_from_dense_inverts_dense(case: tuple[KeyRanges, int]) -> None:
    ranges, keys = case
    back = KeyRanges.from_dense(ranges.dense(keys))
    empty = ranges.stop <= ranges.start
    assert_same(back, KeyRanges(ranges.start.masked_fill(empty, 0), ranges.stop.masked_fill(empty, 0)))
    assert torch.equal(back.dense(keys), ranges.dense(keys))


@property_test
@given(ranges_of(), st.integers(-6, 6), st.integers(-6, 6), st.integers(0, 6), st.integers(0, 6))
def test_slices(case: tuple[KeyRanges, int], first: int, last: int, begin: int, end: int) -> None:
    ranges, keys = case
    dense = ranges.dense(keys)
    assert torch.equal(ranges[first:last].dense(keys), dense[:, first:last])
    begin, end = sorted((min(begin, keys), min(end, keys)))
    chunk = ranges.key_chunk(begin, end)
    assert torch.equal(chunk.dense(end - begin), dense[:, :, begin:end])
    assert chunk.start.numel() == 0 or (chunk.start.min() >= 0 and chunk.stop.max() <= end - begin)


@property_test
@given(st.data(), st.integers(1, 3), st.integers(0, 4), st.booleans())
def test_and_or(data: Any, batch: int, queries: int, shared: bool) -> None:
    left, keys = data.draw(ranges_of(batch, queries))
    right, more = data.draw(ranges_of(1 if shared else batch, queries))
    keys = max(keys, more)
    a, b = left.dense(keys), right.dense(keys)
    assert torch.equal((left & right).dense(keys), a & b)
    # Where each row of the union changes at most twice along the keys (padded with hidden ones), it is one range.
    edges = torch.nn.functional.pad((a | b).int(), (1, 1)).diff(dim=-1).abs().sum(-1)
    if (edges <= 2).all():
        assert torch.equal((left | right).dense(keys), a | b)
    else:
        b_, i = (edges > 2).nonzero()[0].tolist()
        with pytest.raises(ValueError, match=f"batch {b_}, query {i}, wanted ranges that overlap or touch"):
            left | right


@property_test
@given(ranges_of(batch=1), st.integers(0, 3))
def test_batches(case: tuple[KeyRanges, int], times: int) -> None:
    ranges, keys = case
    assert torch.equal(ranges.expand(times).dense(keys), ranges.dense(keys).expand(times, -1, -1))
    both = ranges.expand(2) & KeyRanges.key_padding(ranges.num_queries, lengths=ints(1, 2))
    assert torch.equal(both.repeat(times).dense(keys), both.dense(keys).repeat_interleave(times, dim=0))


@property_test
@given(st.lists(st.lists(st.booleans(), min_size=6, max_size=6), min_size=1, max_size=6))
def test_compact_keys_puts_padding_last(rows: list[list[bool]]) -> None:
    valid = torch.tensor(rows)[None]
    order, start, stop = compact_keys(valid)
    flat = valid.flatten(1)
    assert order[0].sort().values.tolist() == list(range(flat.shape[1]))
    count = int(flat.sum())
    assert order[0, :count].tolist() == flat[0].nonzero()[:, 0].tolist()
    for image, (a, b) in enumerate(zip(start[0].tolist(), stop[0].tolist(), strict=True)):
        assert (order[0, a:b] // 6 == image).all() and b - a == sum(rows[image])


@pytest.mark.parametrize("batch, size", [(0, 3), (2, 0), (0, 0)])
def test_nothing_to_do(batch: int, size: int, device: torch.device) -> None:
    tokens = torch.zeros(batch, size, dtype=torch.int64, device=device)
    lengths = torch.zeros(batch, dtype=torch.int64, device=device)
    spans = even_spans(0, 4, device=device)
    for ranges in (
        KeyRanges.causal(size, offset=lengths),
        KeyRanges.prefix_lm(size, lengths),
        KeyRanges.image_text(tokens, window=2),
        KeyRanges.key_padding(size, lengths=lengths),
        KeyRanges.key_padding(size, mask=tokens, validate=True),
        KeyRanges.flamingo(tokens, *spans),
        KeyRanges.mllama(tokens, *spans, before_image="everything"),
        KeyRanges.mllama_vision(lengths, size),
        KeyRanges.qformer("itg", 0, size, text_lengths=lengths),
        KeyRanges.from_dense(torch.zeros(batch, size, 0, dtype=torch.bool, device=device)),
    ):
        assert ranges.start.shape == ranges.stop.shape == (batch, size)
    packed = KeyRanges.packed(torch.zeros(1, dtype=torch.int32, device=device), size, causal=True)
    assert packed.start.shape == (1, size) and not packed.dense(size).any()
    assert compact_keys(torch.zeros(batch, 0, size, dtype=torch.bool, device=device))[0].shape == (batch, 0)


def test_text_without_its_image_sees_nothing(device: torch.device) -> None:
    assert (
        not KeyRanges.flamingo(torch.ones(1, 3, dtype=torch.bool, device=device), *even_spans(0, 4, device=device)).dense(4).any()
    )


def test_sliced_inputs_and_any_integers(device: torch.device) -> None:
    types = ints([0, 9, 1, 9, 1, 9, 0], device=device)[:, ::2]
    lengths = ints(0, 9, 2, 9, 4, device=device)[::2]
    for dtype in (torch.int64, torch.int32, torch.uint8):
        assert drawn(KeyRanges.image_text(types.to(dtype)), 4) == ["#... ###. ###. ####"]
        assert drawn(KeyRanges.packed(lengths.to(dtype), 4), 4) == ["##.. ##.. ..## ..##"]
    assert drawn(KeyRanges.image_text(types.bool()), 4) == ["#... ###. ###. ####"]


def test_packed_queries_before_their_keys_see_a_range_of_nothing(device: torch.device) -> None:
    ranges = KeyRanges.packed(ints(0, 4, 6, device=device), 6, cu_seqlens_k=ints(0, 2, 6, device=device), causal=True)
    assert drawn(ranges, 6) == ["...... ...... #..... ##.... ..###. ..####"]
    assert (ranges.stop >= ranges.start).all()


def test_an_offset_without_dimensions(device: torch.device) -> None:
    assert_same(KeyRanges.causal(3, 5, offset=torch.tensor(1, device=device)), KeyRanges.causal(3, 5, offset=1, device=device))


def test_a_text_without_tokens_is_padded_on_the_right() -> None:
    mask = ints([1, 0], [0, 0])
    assert_same(
        KeyRanges.qformer("itm", 2, 2, text_mask=mask, validate=True), KeyRanges.qformer("itm", 2, 2, text_lengths=ints(1, 0))
    )


def test_is_a_pytree() -> None:
    ranges = KeyRanges.causal(3)
    leaves, spec = _pytree.tree_flatten({"mask": ranges})
    assert [leaf is part for leaf, part in zip(leaves, (ranges.start, ranges.stop), strict=True)] == [True, True]
    assert_same(_pytree.tree_unflatten(leaves, spec)["mask"], ranges)
    assert _pytree.tree_map(lambda t: tuple(t.shape), ranges).stop == (1, 3)
    compiled = torch.compile(lambda r, x: (x + (r & KeyRanges.full(3)).stop, r[1:]), fullgraph=True, backend="aot_eager")
    total, rest = compiled(ranges, torch.ones(1, 3))
    assert total.tolist() == [[2.0, 3.0, 4.0]]
    assert_same(rest, ranges[1:])


INT32 = torch.zeros(1, 2, dtype=torch.int32)


def int32(*rows: list[int]) -> list[torch.Tensor]:
    return [torch.tensor([row], dtype=torch.int32) for row in rows]


REFUSED: dict[str, tuple[Callable[[], Any], str]] = {
    "dtype": (lambda: KeyRanges(INT32.long(), INT32), r"start: got torch.int64 of shape \(1, 2\), wanted torch.int32 of shape"),
    "rank": (lambda: KeyRanges(INT32, INT32[0]), r"stop: got torch.int32 of shape \(2,\)"),
    "not a tensor": (lambda: KeyRanges([[0]], INT32), "start: got a list, wanted a 2-D int32 tensor"),
    "shapes": (lambda: KeyRanges(INT32, INT32[:, :1]), r"stop: got shape \(1, 1\), wanted that of start, \(1, 2\)"),
    "devices": (lambda: KeyRanges(INT32, INT32.to("meta")), "stop: got a tensor on meta"),
    "and, queries": (lambda: KeyRanges.full(2) & KeyRanges.full(3), r"other: got ranges of shape \(1, 3\)"),
    "and, batch": (lambda: KeyRanges.full(2).expand(2) & KeyRanges.full(2).expand(3), r"other: .* wanted a match for \(2, 2\)"),
    "and, device": (lambda: KeyRanges.full(2) & KeyRanges.full(2, device="meta"), "other: got ranges on meta"),
    "or, apart": (
        lambda: KeyRanges(*int32([0, 0], [2, 1])) | KeyRanges(*int32([2, 3], [4, 4])),
        r"other: got keys \(3, 4\) for keys \(0, 1\) of batch 0, query 1, wanted ranges that overlap or touch",
    ),
    "expand": (lambda: KeyRanges.full(2).expand(2).expand(3), "batch: got 3, wanted 2"),
    "index": (lambda: KeyRanges.full(2)[0], "queries: got 0, wanted a slice"),
    "window": (lambda: KeyRanges.causal(2, window=0), "window: got 0, wanted at least 1"),
    "windows": (lambda: KeyRanges.windows(0, 4), "window: got 0, wanted at least 1"),
    "rule": (lambda: KeyRanges.image_text(INT32, window_rule="x"), "window_rule: got 'x', wanted one of window_outside"),
    "types and ids": (lambda: KeyRanges.image_text(INT32, image_ids=INT32), "token_types, image_ids: got both or none"),
    "no tensor of types": (lambda: KeyRanges.image_text([[0]]), "token_types: got a list, wanted a 2-D integer tensor"),
    "complex types": (lambda: KeyRanges.image_text(INT32 + 0j), "token_types: got torch.complex64"),
    "float types": (lambda: KeyRanges.image_text(INT32.float()), "token_types: got torch.float32"),
    "prefix": (lambda: KeyRanges.prefix_lm(2, INT32), r"prefix: got torch.int32 of shape \(1, 2\)"),
    "offset": (lambda: KeyRanges.causal(2, offset=INT32[0].float()), "offset: got torch.float32"),
    "offset of a float": (lambda: KeyRanges.causal(2, offset=1.5), "offset: got 1.5, wanted an int"),
    "cu_seqlens": (lambda: KeyRanges.packed(INT32, 2), r"cu_seqlens: got torch.int32 of shape \(1, 2\)"),
    "no cu_seqlens": (lambda: KeyRanges.packed(INT32[0, :0], 2), r"cu_seqlens: got shape \(0,\)"),
    "cu_seqlens_k": (lambda: KeyRanges.packed(INT32[0], 2, cu_seqlens_k=INT32[0, :1]), r"cu_seqlens_k: got shape \(1,\)"),
    "lengths and mask": (lambda: KeyRanges.key_padding(2), "lengths, mask: got both or none"),
    "padding hole": (
        lambda: KeyRanges.key_padding(2, mask=ints([1, 1, 1], [1, 0, 1]), validate=True),
        "mask: got a hole at key 1 of batch 1, whose keys run from 0 to 2",
    ),
    "task": (lambda: KeyRanges.qformer("x", 2), "task: got 'x', wanted one of itc, itm, itg"),
    "text": (lambda: KeyRanges.qformer("itm", 2, 3, text_mask=INT32), r"text_mask: got shape \(1, 2\), wanted \[B, 3\]"),
    "text twice": (lambda: KeyRanges.qformer("itm", 2, 2, text_mask=INT32, text_lengths=INT32[0]), "text_lengths, text_mask"),
    "text on the right": (
        lambda: KeyRanges.qformer("itm", 2, 2, text_mask=ints([1, 0], [0, 1]), validate=True),
        "text_mask: got padding on the left of batch 1",
    ),
    "cross spans": (lambda: KeyRanges.cross(INT32, INT32, INT32[:, :1]), "key_stop: got shape"),
    "cross batch": (lambda: KeyRanges.cross(INT32, *(INT32.expand(3, 2),) * 2), "key_start: got shape"),
    "cross images": (lambda: KeyRanges.cross(INT32, INT32, INT32, stop_image=INT32[:, :1]), "stop_image: got shape"),
    "before": (lambda: KeyRanges.mllama(INT32, INT32, INT32, before_image="x"), "before_image: got 'x'"),
    "compact": (lambda: compact_keys(INT32), "valid: got torch.int32"),
    "dense dtype": (lambda: KeyRanges.from_dense(INT32), "mask: got torch.int32"),
    "dense heads": (lambda: KeyRanges.from_dense(torch.ones(1, 2, 3, 3, dtype=torch.bool)), r"mask: .* \(1, 2, 3, 3\)"),
    "dense hole": (
        lambda: KeyRanges.from_dense(torch.tensor([[[1, 1, 0], [0, 0, 0]], [[0, 1, 1], [1, 0, 1]]]).bool()),
        "mask: got a hole at key 1 of batch 1, query 1, whose keys run from 0 to 2, wanted no holes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refuses(name: str) -> None:
    build, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        build()

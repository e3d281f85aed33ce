# SPDX-License-Identifier: Apache-2.0
"""The masks behind attn_implementation="vlmkernels": which ranges, and what is refused, dense, read and allocated."""

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from conftest import ON_GPU
from torch.utils._python_dispatch import TorchDispatchMode

from vlmkernels import KeyRanges, use_backend
from vlmkernels.integrations.ranges_mask import RangesMask
from vlmkernels.testing.compare import compare

transformers = pytest.importorskip("transformers", "5.17", reason="register_attention needs transformers 5.17")
import hf_masks  # noqa: E402
from test_integrations_attention import IDS, LEFT, NONE, RIGHT, S, llama  # noqa: E402
from transformers.masking_utils import (  # noqa: E402
    and_masks,
    bidirectional_mask_function,
    blockwise_overlay,
    causal_mask_function,
    chunked_causal_mask_function,
    or_masks,
    packed_sequence_mask_function,
    padding_mask_function,
    sdpa_mask,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from vlmkernels.integrations import _read_masks, register_attention  # noqa: E402
from vlmkernels.integrations import transformers_attention as ours  # noqa: E402

register_attention()


@pytest.fixture(autouse=True)
def quick_backend() -> Iterator[None]:
    with use_backend("" if ON_GPU else "torch"):
        yield


# The mask function

RUNS = torch.tensor([[0, 0, 0, 0, 1, 1, 1, 2, 2, 2, 2, 2], [0] * 12])
GROUPS = torch.tensor([[-1, 0, 0, 0, 0, -1, 1, 1, 1, 1, -1, -1], [0, 0, 0, 0, 0, 0, -1, -1, -1, 1, 1, 1]])


#: Images whose ids don't increase, which is not enough to know that each is in one place.
BACKWARDS = torch.tensor([[-1, 1, 1, 1, -1, 0, 0, -1, -1, -1, -1, -1], [-1] * 12])


def same_group(batch: Any, head: Any, q: Any, k: Any) -> Any:
    return (GROUPS[batch, q] == GROUPS[batch, k]) & (GROUPS[batch, q] >= 0)


FUNCTIONS = {
    "causal": causal_mask_function,
    "bidirectional": bidirectional_mask_function,
    "sliding": sliding_window_causal_mask_function(4),
    "sliding both ways": sliding_window_bidirectional_mask_function(2),
    "chunked": chunked_causal_mask_function(5, torch.zeros(2, dtype=torch.int64)),
    "packed": and_masks(packed_sequence_mask_function(RUNS), causal_mask_function),
    "groups": or_masks(causal_mask_function, same_group),
    "images": or_masks(causal_mask_function, blockwise_overlay(GROUPS)),
    "images in windows": or_masks(sliding_window_causal_mask_function(3), blockwise_overlay(GROUPS)),
    "images backwards": or_masks(causal_mask_function, blockwise_overlay(BACKWARDS)),
    "blocks alone": blockwise_overlay(GROUPS),
    "padding": and_masks(causal_mask_function, padding_mask_function(LEFT.bool())),
    "window of groups": and_masks(sliding_window_causal_mask_function(20), or_masks(causal_mask_function, same_group)),
}


@pytest.mark.parametrize("vmap, block", [(False, 1 << 22), (True, 50)], ids=["broadcast, one block", "vmap, two rows"])
@pytest.mark.parametrize("real", [None, NONE.bool(), LEFT.bool(), RIGHT.bool()], ids=["none", "full", "left", "right"])
@pytest.mark.parametrize("function", FUNCTIONS.values(), ids=list(FUNCTIONS))
def test_masks_are_those_of_sdpa(function: Any, real: Any, vmap: bool, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole, the last chunk of a cache, one query, and keys that begin later (a sliding cache)."""
    monkeypatch.setattr(ours, "BLOCK", block)
    for queries, q_offset, keys, kv_offset in ((S, 0, S, 0), (4, 8, S, 0), (1, 11, S, 0), (4, 8, 9, 3), (2, 10, 7, 5)):
        sizes = {"batch_size": 2, "q_length": queries, "kv_length": keys, "q_offset": q_offset, "kv_offset": kv_offset}
        for offset in (q_offset, torch.tensor(q_offset)):  # static caches give a tensor
            arguments = {**sizes, "q_offset": offset, "mask_function": function, "attention_mask": real, "use_vmap": vmap}
            mask = ours.ranges_mask(**arguments)
            wanted = sdpa_mask(**arguments, allow_is_causal_skip=False)
            assert isinstance(mask, RangesMask) and mask.shape == wanted.shape
            assert torch.equal(mask.dense(), wanted)


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_is_known_is_not_evaluated(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And a mask with a hole is found without being evaluated for that."""
    calls = []
    monkeypatch.setattr(ours, "_evaluated", lambda dense: calls.append(dense))
    ours.ranges_mask(2, S, S, mask_function=FUNCTIONS[name])
    assert bool(calls) is (name in ("chunked", "groups", "window of groups", "images backwards"))


def test_keys_past_the_padding_mask_are_not_seen() -> None:
    """A static cache is longer than what came so far."""
    arguments = {"batch_size": 2, "q_length": S, "kv_length": 20, "attention_mask": LEFT.bool()}
    for function in (causal_mask_function, bidirectional_mask_function, sliding_window_causal_mask_function(4)):
        mask = ours.ranges_mask(**arguments, mask_function=function)
        assert torch.equal(mask.dense(), sdpa_mask(**arguments, mask_function=function, allow_is_causal_skip=False))


def test_none_only_where_nothing_is_masked() -> None:
    sizes = {"batch_size": 2, "q_length": S, "kv_length": S}
    both = {**sizes, "mask_function": bidirectional_mask_function}
    assert ours.ranges_mask(**both, allow_is_bidirectional_skip=True) is None
    assert ours.ranges_mask(**both).dense().all()
    assert ours.ranges_mask(**both, attention_mask=LEFT.bool(), allow_is_bidirectional_skip=True) is not None
    assert ours.ranges_mask(**sizes, allow_is_causal_skip=True) is not None


GAP = torch.tensor([[1] * S, [1] * 4 + [0] * 3 + [1] * (S - 7)])


def dense_mask(*args: Any, **kwargs: Any) -> torch.Tensor | None:
    """A mask that did not become ranges, or None."""
    mask = ours.ranges_mask(*args, **kwargs)
    if isinstance(mask, RangesMask):
        return None
    assert torch.equal(mask, sdpa_mask(*args, **kwargs, allow_is_causal_skip=False))
    return mask


def test_padding_with_a_gap_goes_to_sdpa() -> None:
    model = llama()
    got = run(model, input_ids=IDS, attention_mask=GAP)[0]
    model.set_attn_implementation("eager")
    with torch.no_grad():
        wanted = model(input_ids=IDS, attention_mask=GAP)[0]
    assert compare(got[GAP.bool()], wanted[GAP.bool()], "model")
    sizes = {"batch_size": 2, "q_length": S, "kv_length": S, "attention_mask": GAP.bool()}
    assert dense_mask(**sizes) is not None
    assert dense_mask(**sizes, mask_function=sliding_window_causal_mask_function(5)) is not None
    # Real queries no window of which spans the gap.
    mask = ours.ranges_mask(**sizes, mask_function=sliding_window_causal_mask_function(3))
    assert torch.equal(mask.dense(), sdpa_mask(**sizes, mask_function=sliding_window_causal_mask_function(3)))


@pytest.mark.parametrize("block", [1 << 22, 50], ids=["one block", "two rows"])
def test_a_mask_with_a_hole_is_dense(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "BLOCK", block)

    def function(batch: Any, head: Any, q: Any, k: Any) -> Any:
        return (k <= q) & ~((batch == 1) & (q >= 6) & (k == 3))

    assert dense_mask(2, S, S, mask_function=function) is not None
    again = blockwise_overlay(torch.tensor([[-1, 0, 0, -1, 1, 1, -1, 0, 0, -1, -1, -1]] * 2))
    assert dense_mask(2, S, S, mask_function=or_masks(causal_mask_function, again)) is not None
    # A query that is padding itself may have one, as nobody reads it.
    seen = torch.tensor([[True] * S, [True] * 6 + [False] * 6])
    assert dense_mask(2, S, S, mask_function=function, attention_mask=seen) is None
    assert dense_mask(2, S, S, mask_function=function, attention_mask=NONE.bool()) is not None


def run(model: Any, **inputs: Any) -> Any:
    model.eval().set_attn_implementation("vlmkernels")
    return model(**inputs)


# What is allocated


class Largest(TorchDispatchMode):
    """The largest result of any operation."""

    def __init__(self) -> None:
        super().__init__()
        self.numel, self.name = 0, ""

    def __torch_dispatch__(self, op: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = op(*args, **(kwargs or {}))
        for x in torch.utils._pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and not isinstance(x, RangesMask) and x.numel() > self.numel:
                self.numel, self.name = x.numel(), str(op)
        return out


@pytest.mark.parametrize("sliding", [False, True], ids=["causal", "sliding"])
def test_no_dense_mask(sliding: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    size = 4096 + 2048  # of which BLOCK holds one ninth
    real = torch.ones(1, size, dtype=torch.int64)
    real[:, :100] = 0
    model = hf_masks.gemma3().model.language_model if sliding else llama()
    got = []
    monkeypatch.setattr(ours, "attention", lambda q, k, v, ranges, **_: got.append(ranges) or q)
    with torch.no_grad(), Largest() as largest:
        run(model, input_ids=torch.ones_like(real), attention_mask=real, use_cache=False)
    assert largest.numel <= ours.BLOCK < size * size / 8, largest.name
    assert len(got) == 2
    causal = KeyRanges.causal(size) & KeyRanges.key_padding(size, mask=real)
    window = causal & KeyRanges.causal(size, window=3)
    for ranges, wanted in zip(got, (window if sliding else causal, causal), strict=True):
        read = wanted.start < wanted.stop
        assert torch.equal(ranges.start.expand_as(read)[read], wanted.start[read])
        assert torch.equal(ranges.stop.expand_as(read)[read], wanted.stop[read])
        assert not (ranges.start < ranges.stop).expand_as(read)[~read].any()


# The attention function


def qkv(queries: int = S, keys: int = S, heads: int = 2) -> tuple[torch.Tensor, ...]:
    q, k, v = torch.randn(2, queries, 2, 8), torch.randn(2, keys, heads, 8), torch.randn(2, keys, heads, 8)
    return tuple(x.transpose(1, 2) for x in (q, k, v))


def attend(*args: Any, **kwargs: Any) -> torch.Tensor:
    out, weights = ours.attention_forward(torch.nn.Module(), *args, **kwargs)
    assert weights is None
    return out


def exact(q: Any, k: Any, v: Any, mask: Any = None, **kwargs: Any) -> torch.Tensor:
    q, k, v = (x.double() for x in (q, k, v))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True, **kwargs)
    return out.transpose(1, 2)


def test_without_a_mask_everything_is_seen_whatever_the_module_says() -> None:
    q, k, v = qkv(S, 20)
    module = torch.nn.Module()
    module.is_causal = True
    out, _ = ours.attention_forward(module, q, k, v, None)
    assert compare(out, exact(q, k, v), "gemm")
    # In the call itself is_causal counts, from the first key on: an empty static cache is longer than the queries.
    assert compare(attend(q, k, v, None, is_causal=True), exact(q, k, v, torch.ones(S, 20).tril().bool()), "gemm")
    q, k, v = qkv(1, 20)
    assert compare(attend(q, k, v, None, is_causal=True), exact(q, k, v), "gemm")


def additive(mask: torch.Tensor) -> torch.Tensor:
    return torch.zeros(mask.shape).masked_fill(~mask, torch.finfo(torch.float32).min)


@pytest.mark.parametrize("form", [lambda m: m, additive, lambda m: additive(m) * 2], ids=["bool", "additive", "-inf"])
@pytest.mark.parametrize("one_row", [False, True], ids=["rows", "one row"])
def test_a_models_own_mask(form: Any, one_row: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Read once for all layers, and again where it has changed."""
    mask = LEFT.bool()[:, None, None] & torch.ones(1 if one_row else S, S).tril(S if one_row else 4).bool()
    q, k, v = qkv(heads=1)
    read, count = _read_masks._read, []
    monkeypatch.setattr(_read_masks, "_read", lambda *args: count.append(1) or read(*args))
    monkeypatch.setattr(ours, "sdpa_attention_forward", None)
    given = form(mask)
    for _ in range(3):
        assert compare(attend(q, k, v, given, scaling=0.3), exact(q, k, v, mask, scale=0.3), "gemm")
    assert len(count) == 1
    mask = RIGHT.bool()[:, None, None] & mask
    given.copy_(form(mask))
    assert compare(attend(q, k, v, given), exact(q, k, v, mask), "gemm")
    assert len(count) == 2
    with torch.inference_mode():
        given = given.clone()
        assert compare(attend(q, k, v, given), exact(q, k, v, mask), "gemm")


def test_masks_without_ranges_go_to_sdpa() -> None:
    q, k, v = qkv()
    hole = torch.ones(2, 1, S, S).bool()
    hole[1, 0, 5, 3] = False
    for mask in (hole, additive(hole), torch.randn(2, 1, S, S), hole.expand(-1, 2, -1, -1)):
        wanted = exact(q, k, v, mask if mask.dtype == torch.bool else mask.double())
        assert compare(attend(q, k, v, mask), wanted, "gemm")
    reason = _read_masks.ranges_of(hole, q.shape[2], k.shape[2])
    assert reason == "its mask has a hole for batch 1, query 5"
    with pytest.raises(ValueError, match="a hole for batch 1, query 5, wanted none of them with cu_seq_lens or softcap"):
        attend(q, k, v, hole, softcap=2.0)
    with pytest.raises(ValueError, match="a hole for batch 0, query 5, wanted none of them with cu_seq_lens or softcap"):
        attend(q[1:], k[1:], v[1:], hole[1:], cu_seq_lens_q=torch.tensor([0, S]))


def test_position_bias_goes_to_sdpa() -> None:
    q, k, v = qkv()
    bias = torch.randn(2, 2, S, S)
    assert compare(attend(q, k, v, None, position_bias=bias), exact(q, k, v, bias.double()), "gemm")
    mask = ours.ranges_mask(2, S, S, attention_mask=LEFT.bool())
    rows = mask.dense().any(-1)[:, 0]
    wanted = exact(q, k, v, bias.double().masked_fill(~mask.dense(), float("-inf")))
    assert compare(attend(q, k, v, mask, position_bias=bias)[rows], wanted[rows], "gemm")


def test_packed_sequences() -> None:
    cu = torch.tensor([0, 3, 4, S], dtype=torch.int32)
    q, k, v = (x[:1] for x in qkv())
    blocks = torch.block_diag(*(torch.ones(n, n) for n in cu.diff().tolist())).bool()
    for causal, mask in ((False, blocks), (True, blocks.tril())):
        for cu_k in (cu, cu.clone()):
            out = attend(q, k, v, None, is_causal=causal, cu_seq_lens_q=cu, cu_seq_lens_k=cu_k, max_length_q=8)
            assert compare(out, exact(q, k, v, mask), "gemm")
    causal = ours.ranges_mask(1, S, S)
    assert compare(attend(q, k, v, causal, cu_seq_lens_q=cu, cu_seq_lens_k=cu), exact(q, k, v, blocks.tril()), "gemm")


def test_a_mask_for_other_sizes_is_refused() -> None:
    q, k, v = qkv()
    for sizes in ((S - 1, S), (S, S + 1)):
        with pytest.raises(
            ValueError, match=f"attention_mask: got for {sizes[0]} queries, {sizes[1]} keys, wanted for 12 and 12"
        ):
            attend(q, k, v, ours.ranges_mask(2, *sizes))
    # Padding alone is the same for any number of queries.
    mask = ours.ranges_mask(2, S + 5, S, mask_function=bidirectional_mask_function, attention_mask=RIGHT.bool())
    assert compare(attend(q, k, v, mask), exact(q, k, v, RIGHT.bool()[:, None, None]), "gemm")


class PagedAttentionCache:
    pass


@pytest.mark.parametrize(
    "name, value",
    [("s_aux", torch.zeros(2)), ("cache", PagedAttentionCache()), ("cu_seq_lens_q", torch.tensor([0, 2 * S]))],
)
def test_refused(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"{'query' if name == 'cu_seq_lens_q' else name}: got .*, wanted"):
        attend(*qkv(), None, **{name: value})


def test_autocast_takes_its_own_dtype() -> None:
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = attend(q, k, v.bfloat16(), None)
    assert out.dtype == torch.bfloat16
    assert compare(out, exact(*(x.bfloat16() for x in (q, k, v))), "gemm")


def test_a_batch_of_one_serves_all() -> None:
    q, k, v = qkv()
    assert compare(attend(q[:1], k, v, None), exact(q[:1].expand(2, -1, -1, -1), k, v), "gemm")


# Models


def test_gradients_are_those_of_eager() -> None:
    model, found = llama(), []
    for name in ("vlmkernels", "eager"):
        model.set_attn_implementation(name)
        model.zero_grad()
        model.train()(input_ids=IDS, attention_mask=RIGHT, labels=IDS.where(RIGHT == 1, -100)).loss.backward()
        found.append([p.grad for p in model.parameters()])
    for got, wanted in zip(*found, strict=True):
        assert compare(got, wanted, "module")


def test_dropout_of_attention_weights_goes_to_sdpa() -> None:
    """In training; the same weights are dropped with the same seed."""
    found, model = [], llama()
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    for implementation in ("sdpa", "vlmkernels"):
        model.train().set_attn_implementation(implementation)
        torch.manual_seed(4)
        found.append(model(input_ids=IDS, attention_mask=RIGHT).logits[RIGHT.bool()])
    assert compare(found[1], found[0].double(), "model")
    model.eval().set_attn_implementation("sdpa")
    assert not compare(model(input_ids=IDS, attention_mask=RIGHT).logits[RIGHT.bool()], found[0].double(), "model")
    q, k, v = qkv()
    with pytest.raises(
        ValueError, match="dropout: got it drops attention weights, wanted none of them with cu_seq_lens or softcap"
    ):
        attend(q, k, v, None, dropout=0.1, softcap=2.0)


def test_an_older_transformers_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ours, "sdpa_mask", lambda batch_size, cache_position, kv_length: None)
    with pytest.raises(ImportError, match="5.17 or newer"):
        register_attention()


def test_registering_again_and_copies_of_the_config() -> None:
    register_attention()
    model = transformers.LlamaForCausalLM._from_config(llama().config, attn_implementation="vlmkernels")
    assert model.config._attn_implementation == "vlmkernels"
    for config in (copy.deepcopy(model.config), pickle.loads(pickle.dumps(model.config))):
        assert config.to_dict() == model.config.to_dict()
    other = copy.deepcopy(model).eval()
    with torch.no_grad():
        assert torch.equal(other(input_ids=IDS).logits, model.eval()(input_ids=IDS).logits)


def test_layers_that_know_only_eager_do_not_run_silently_wrong() -> None:
    """GIT's decoder adds its mask, whichever it asked for, and transformers lets it ask for ours."""
    model = hf_masks.git().eval()
    inputs = {"input_ids": IDS, "attention_mask": RIGHT, "pixel_values": torch.randn(2, 3, 28, 28)}
    with torch.no_grad():
        wanted = model(**inputs).last_hidden_state
        model.set_attn_implementation("vlmkernels")
        try:
            got = model(**inputs).last_hidden_state
        except RuntimeError as error:
            assert "would add a bool mask" in str(error)
        else:
            assert compare(got[:1], wanted[:1], "model")  # this version's decoder has learnt to ask
        model.set_attn_implementation({"": "eager", "vision_config": "vlmkernels"})
        assert compare(model(**inputs).last_hidden_state, wanted, "model")


@pytest.mark.parametrize("real", [None, LEFT], ids=["full", "left"])
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_compiled_in_one_graph(family: str, real: Any) -> None:
    model = llama() if family == "llama" else hf_masks.gemma3().model.language_model
    inputs = {"input_ids": IDS, "attention_mask": real, "use_cache": False}
    rows = torch.ones_like(IDS).bool() if real is None else real.bool()
    torch._dynamo.reset()
    with torch.no_grad():
        wanted = run(model, **inputs)[0]
        got = torch.compile(model, fullgraph=True, backend="aot_eager")(**inputs)[0]
    assert compare(got[rows], wanted[rows], "model")


def test_a_hole_is_found_in_a_compiled_graph_too() -> None:
    torch._dynamo.reset()
    model = llama().eval()
    model.set_attn_implementation("vlmkernels")
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        compiled(input_ids=IDS, attention_mask=LEFT, use_cache=False)
        with pytest.raises(RuntimeError, match="a mask has a hole"):
            compiled(input_ids=IDS, attention_mask=GAP, use_cache=False)

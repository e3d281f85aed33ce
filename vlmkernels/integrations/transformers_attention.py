# SPDX-License-Identifier: Apache-2.0
"""``attn_implementation="vlmkernels"`` of transformers: an attention function, and the function that makes its masks.

transformers describes a mask as a function of a query's and a key's index, beside a 2-D mask of the padding. Here it becomes a
range of keys for each query, and a dense mask of a few queries at a time is all that there ever is of another form.
"""

import inspect
import logging
from collections.abc import Callable
from typing import Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    bidirectional_mask_function,
    causal_mask_function,
    prepare_padding_mask,
    sdpa_mask,
)

from vlmkernels.integrations._mask_functions import runs_of
from vlmkernels.integrations._once import in_a_graph, once
from vlmkernels.integrations._read_masks import one_run, ranges_of
from vlmkernels.integrations.ranges_mask import RangesMask, fitting
from vlmkernels.masks import KeyRanges
from vlmkernels.ops._op import bad_argument
from vlmkernels.ops.attention import attention

NAMES = ("vlmkernels", "vlmkernels_flash")
#: The elements of a mask that are evaluated at once: some 20 bytes each with the int32 tensors that reduce them. On a GPU blocks
#: as small as on a CPU keep the host busy: with them six layers of Gemma-3 took 52 ms instead of sdpa's 26 (4,096 tokens, H200).
BLOCK, GPU_BLOCK = 1 << 22, 1 << 26
ONE_RUN = "one run of keys for each query (attn_implementation='sdpa' takes masks with holes)"

_log = logging.getLogger(__name__)
_logged: set[str] = set()


def register() -> None:
    """Register both functions under each of ``NAMES``."""
    if "q_length" not in inspect.signature(sdpa_mask).parameters:
        raise ImportError("register_attention needs transformers 5.17 or newer, whose masks are made from q_length and q_offset")
    for name in NAMES:
        AttentionInterface.register(name, attention_forward)
        AttentionMaskInterface.register(name, ranges_mask)


# The mask function


def ranges_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable[..., Any] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    allow_is_bidirectional_skip: bool = False,
    use_vmap: bool = False,
    device: Any = "cpu",
    **_: Any,
) -> torch.Tensor | None:
    """The mask of transformers' ``create_*_mask`` as ranges of keys, or None where every query sees every key.

    A causal mask is never None: what None then means depends on the layer (``is_causal``), whose implementations differ.

    Where a query sees keys with a gap between, the mask is transformers' dense one, with which attention goes to sdpa. To see
    that, and whether padding masks anything, the host waits for the device. While a graph is traced or captured it can't: padding
    is a mask then, and the device asserts that there is no gap.
    """
    both_ways = mask_function is bidirectional_mask_function
    padding = prepare_padding_mask(attention_mask, kv_length, kv_offset)
    if padding is not None:
        padding = padding[:, kv_offset : kv_offset + kv_length]
        if not in_a_graph(padding) and bool(padding.all()):
            padding = None
    if both_ways and padding is None and allow_is_bidirectional_skip:
        return None
    dense: dict[str, Any] = {
        "batch_size": batch_size,
        "q_length": q_length,
        "kv_length": kv_length,
        "q_offset": q_offset,
        "kv_offset": kv_offset,
        "mask_function": mask_function,
        "attention_mask": attention_mask,
        "allow_is_causal_skip": False,
        "allow_is_bidirectional_skip": False,
        "use_vmap": use_vmap,
        "device": device,
    }
    if both_ways or mask_function is causal_mask_function:
        offset = None if both_ways else q_offset - kv_offset
        ranges = _closed_form(padding, dense, offset)
    else:
        ranges = _known(dense, padding) or _evaluated(dense)
    if ranges is None:
        _log_once(f"a mask has a hole, and its attention goes to transformers' sdpa; wanted {ONE_RUN}")
        mask: torch.Tensor = sdpa_mask(**dense)
        return mask
    return RangesMask(ranges.start, ranges.stop, batch_size, kv_length)


def _closed_form(padding: torch.Tensor | None, dense: dict[str, Any], offset: Any) -> KeyRanges | None:
    """A causal mask whose queries begin at key ``offset`` (None: one both ways), with its padding; None if that has a gap."""
    queries, keys, device = dense["q_length"], dense["kv_length"], dense["device"]
    ranges = KeyRanges.full(1, keys, device=device)
    if padding is not None:
        start, stop, hole = one_run(padding[:, None])
        if _any(hole):
            return None
        ranges = KeyRanges(start, stop)
    ranges = KeyRanges(ranges.start.expand(-1, queries), ranges.stop.expand(-1, queries))  # a stride of 0, see RangesMask
    return ranges if offset is None else ranges & KeyRanges.causal(queries, keys, offset=offset, device=device)


def _known(dense: dict[str, Any], padding: torch.Tensor | None) -> KeyRanges | None:
    """The ranges of a mask function that transformers made, from what it is made of; None of others, and in a graph, which can't
    look whether they are exact."""
    first, keys, queries = dense["kv_offset"], dense["kv_length"], dense["q_length"]
    positions = torch.arange(queries, device=dense["device"])[None] + dense["q_offset"]
    if in_a_graph(positions):
        return None
    found = runs_of(dense["mask_function"], positions)
    if found is None:
        return None
    start, stop, exact = found.start - first, found.stop - first, found.exact
    if padding is not None:
        real_start, real_stop, hole = one_run(padding[:, None])
        start, stop, exact = torch.maximum(start, real_start), torch.minimum(stop, real_stop), exact & ~hole.any()
    if not bool(exact):
        return None
    start, stop = (x.clamp(0, keys).to(torch.int32) for x in (start, stop))
    return KeyRanges(start, torch.maximum(start, stop))


def _evaluated(dense: dict[str, Any]) -> KeyRanges | None:
    """The bounds of any mask function: transformers' own dense mask of a block of queries at a time, reduced to its bounds."""
    queries, padding = dense["q_length"], dense["attention_mask"]
    block = BLOCK if torch.device(dense["device"]).type == "cpu" else GPU_BLOCK
    rows, found = max(1, block // max(1, dense["batch_size"] * dense["kv_length"])), []
    for begin in range(0, queries, rows):
        count = min(rows, queries - begin)
        seen = sdpa_mask(**{**dense, "q_length": count, "q_offset": dense["q_offset"] + begin})
        start, stop, hole = one_run(seen[:, 0])
        if padding is not None:
            position = torch.arange(begin, begin + count, device=dense["device"]) + dense["q_offset"]
            hole = hole & ~_unread(padding, position)
        if _any(hole):
            return None
        found.append((start, stop))
    return KeyRanges(torch.cat([start for start, _ in found], dim=1), torch.cat([stop for _, stop in found], dim=1))


def _unread(padding: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """Which of the queries at ``position [Sq]`` are padding themselves, ``[B, Sq]``: nobody reads what they get.

    PaliGemma 2 gives padding on the right the type of the prefix, which it then sees beyond a gap. Where the padding has gaps of
    its own, no query is excused.
    """
    gaps = one_run(padding[:, None])[2]
    known = (position >= 0) & (position < padding.shape[1])
    return known & ~padding[:, position.clamp(0, padding.shape[1] - 1)] & ~gaps


def _any(hole: torch.Tensor) -> bool:
    """Whether there is one; False, and an assertion on the device, where nobody may wait for it."""
    if in_a_graph(hole):
        torch._assert_async(~hole.any(), "vlmkernels: a mask has a hole, wanted one run of keys for each query")
        return False
    return bool(hole.any())


# The attention function


def attention_forward(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    softcap: float | None = None,
    position_bias: torch.Tensor | None = None,
    s_aux: torch.Tensor | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    cu_seq_lens_k: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Attention as the layers of transformers call it.

    As in eager, without a mask every query sees every key, whatever ``module.is_causal`` says; only ``is_causal=True`` in the
    call itself makes it causal, query ``i`` seeing keys up to ``i``.

    Args:
        query: ``[B, H, Sq, D]``, like ``key`` and ``value`` ``[B, Hk, Sk, D]`` a transposed view of ``[B, S, H, D]``.
        attention_mask: a ``RangesMask``; or bool or additive ``[B, 1, Sq, Sk]``, which becomes one where its rows are ranges, and
            else goes to transformers' sdpa, which is logged once.
        scaling: the factor on the logits, ``1 / sqrt(D)`` by default.
        softcap: as in ``vlmkernels.attention``.
        dropout, position_bias: go to sdpa.
        cu_seq_lens_q, cu_seq_lens_k: int ``[N + 1]``, sequences packed in a batch of 1.

    Returns:
        ``[B, Sq, H, Dv]``, and None for the weights, which are never formed.

    Raises:
        ValueError: attention sinks (``s_aux``), a paged cache, a mask of another shape, packed sequences in a batch of several;
            what goes to sdpa with a softcap or packed sequences, which sdpa has not.
    """
    if s_aux is not None:
        raise bad_argument("s_aux", "attention sinks", "None; attn_implementation='eager' has them")
    if cu_seq_lens_q is not None and query.shape[0] != 1:
        raise bad_argument("query", f"a batch of {query.shape[0]} with cu_seq_lens_q", "the sequences packed in a batch of 1")
    if type(kwargs.get("cache")).__name__ == "PagedAttentionCache":
        raise bad_argument("cache", "a paged cache", "none: continuous batching needs attn_implementation='paged|eager'")
    if kwargs.get("output_attentions"):
        _log_once("output_attentions gives None: attention weights are never formed (attn_implementation='eager' has them)")

    def sdpa(mask: torch.Tensor | None, reason: str, **more: Any) -> tuple[torch.Tensor, None]:
        if cu_seq_lens_q is not None or softcap:
            wanted = f"none of them with cu_seq_lens or softcap; {ONE_RUN}"
            raise bad_argument("attention_mask, position_bias, dropout", reason, wanted)
        _log_once(f"{type(module).__name__} goes to transformers' sdpa: {reason}")
        mask = mask.dense() if isinstance(mask, RangesMask) else mask
        settings = {"scaling": scaling, "is_causal": bool(is_causal), **more}
        out, _ = sdpa_attention_forward(module, query, key, value, mask, **settings)
        return out, None

    if dropout:
        bias = {} if position_bias is None else {"position_bias": position_bias}
        return sdpa(attention_mask, "it drops attention weights", dropout=dropout, **bias)
    if position_bias is not None:
        return sdpa(attention_mask, "it adds a position_bias", position_bias=position_bias)
    if attention_mask is None or isinstance(attention_mask, RangesMask):
        ranges = fitting(attention_mask, query.shape[2], key.shape[2])
    else:
        found = ranges_of(attention_mask, query.shape[2], key.shape[2])
        if isinstance(found, str):
            return sdpa(attention_mask, found)
        ranges = found
    if ranges is None and is_causal and query.shape[2] > 1 and cu_seq_lens_q is None:
        ranges = KeyRanges.causal(query.shape[2], key.shape[2], offset=0, device=query.device)
    if cu_seq_lens_q is not None:
        packed = _packed(cu_seq_lens_q, cu_seq_lens_k, query.shape[2], bool(is_causal) and attention_mask is None)
        ranges = packed if ranges is None else ranges & packed
    q, k, v = (x.transpose(1, 2) for x in _one_dtype(query, key, value))
    batch = max(q.shape[0], k.shape[0])  # learned queries may come with a batch of 1
    q, k, v = (x if x.shape[0] == batch else x.expand(batch, -1, -1, -1) for x in (q, k, v))
    return attention(q, k, v, ranges, scale=scaling, softcap=softcap or 0.0), None  # type: ignore[return-value]  # no lse


def _packed(cu_q: torch.Tensor, cu_k: torch.Tensor | None, total: int, causal: bool) -> KeyRanges:
    if cu_k is None or cu_k is cu_q:
        whole: KeyRanges = once(cu_q, (total, causal), lambda: KeyRanges.packed(cu_q, total, causal=causal))
        return whole
    return KeyRanges.packed(cu_q, total, cu_seqlens_k=cu_k, causal=causal)


def _one_dtype(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Under autocast rope leaves queries and keys in fp32; the products of attention take autocast's dtype there."""
    if not torch.is_autocast_enabled(query.device.type):
        return query, key, value
    dtype = torch.get_autocast_dtype(query.device.type)
    return query.to(dtype), key.to(dtype), value.to(dtype)


def _log_once(message: str) -> None:
    if not torch.compiler.is_compiling() and message not in _logged:  # a logger breaks a graph
        _logged.add(message)
        _log.warning(message)

# SPDX-License-Identifier: Apache-2.0
"""Cross-attention with its projections: a few learned queries, or text, that read the tokens of images."""

import torch
import torch.nn.functional as F

from vlmkernels.masks import KeyRanges
from vlmkernels.ops._op import bad_argument, forced_backend
from vlmkernels.ops._packed_linear import packed_linear
from vlmkernels.ops.attention import attention

WAYS = ("project", "absorb")


def cross_attention(
    x: torch.Tensor,
    context: torch.Tensor,
    w_q: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    w_o: torch.Tensor | None = None,
    ranges: KeyRanges | None = None,
    *,
    num_heads: int,
    num_kv_heads: int | None = None,
    b_q: torch.Tensor | None = None,
    b_k: torch.Tensor | None = None,
    b_v: torch.Tensor | None = None,
    b_o: torch.Tensor | None = None,
    scale: float | None = None,
    softcap: float = 0.0,
    way: str = "project",
    backend: str | None = None,
) -> torch.Tensor:
    """``attention(x w_q.T + b_q, context w_k.T + b_k, context w_v.T + b_v, ranges) w_o.T + b_o``.

    It is differentiable as the products and the attention in it are. A query that sees no key gives ``b_o``.

    Args:
        x: ``[B, Sq, C]``. A batch of 1 serves the whole batch of ``context``: learned queries are projected once.
        context: ``[B, Sk, E]``. A batch of 1 serves the whole batch of ``x``.
        w_q: ``[H * D, C]``, as all weights in the layout of ``torch.nn.Linear``.
        w_k: ``[Hk * D, E]``.
        w_v: ``[Hk * Dv, E]``.
        w_o: ``[N, H * Dv]``; None returns the heads side by side.
        ranges: the keys that each query sees, ``[B|1, Sq]``; all of them by default.
        num_heads: ``H``.
        num_kv_heads: ``Hk``, a divisor of ``H``; ``H`` by default.
        b_q: ``[H * D]``; the others are ``[Hk * D]``, ``[Hk * Dv]``, ``[N]``.
        scale: the factor on the logits, ``1 / sqrt(D)`` by default.
        softcap: see ``vlmkernels.attention``.
        way: ``"project"``: keys and values are computed; one product where ``w_k`` and ``w_v`` are neighbours in memory, as the
            halves of a matrix are. ``"absorb"``: the queries go through ``w_k`` instead, and the weighted sum of the context
            through ``w_v``, so that keys and values are never there. It is for few queries and thousands of keys, a multiple of
            8, and rounds the logits to the dtype (docs/cross_attention.md); not with ranges, a softcap or grouped heads.
        backend: the backend of the attention; the absorbed form has none.

    Returns:
        ``[B, Sq, N]``, without ``w_o`` ``[B, Sq, H * Dv]``.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit; a ``way`` that can't take the arguments.
        BackendError: the forced backend can't run the attention.
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    _check(x, context, (w_q, w_k, w_v, w_o), (b_q, b_k, b_v, b_o), num_heads, num_kv_heads)
    if way not in WAYS:
        raise bad_argument("way", repr(way), f"one of {', '.join(WAYS)}")
    if way == "absorb" and (ranges is not None or softcap or num_heads != num_kv_heads or not context.shape[1]):
        raise bad_argument("way", "'absorb' with ranges, a softcap, grouped heads or no keys", "'project'")
    name = forced_backend(backend)
    q = F.linear(x, w_q, b_q).unflatten(-1, (num_heads, -1))
    if way == "absorb":
        y = absorbed_attention(q, context, w_k, w_v, b_v, scale=scale)
    else:
        if (b_k is None) == (b_v is None):
            k, v = packed_linear(context, (w_k, w_v), () if b_k is None or b_v is None else (b_k, b_v))
        else:
            k, v = F.linear(context, w_k, b_k), F.linear(context, w_v, b_v)
        k, v = (part.unflatten(-1, (num_kv_heads, -1)) for part in (k, v))
        heads = attention(*one_batch(q, k, v, ranges), scale=scale, softcap=softcap, backend=name)
        assert isinstance(heads, torch.Tensor)
        y = heads.view(context.shape[0] if x.shape[0] == 1 else x.shape[0], x.shape[1], *heads.shape[2:])
    y = y.flatten(-2)
    return y if w_o is None else F.linear(y, w_o, b_o)


def one_batch(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: KeyRanges | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, KeyRanges | None]:
    """Arguments of ``attention`` of one batch, where q, or k and v, may have a batch of 1 that serves the whole other side.

    Queries of a batch that read the same keys become those of one sequence, ``[1, B * Sq, H, D]``.
    """
    batch = q.shape[0]
    if batch == 1 != k.shape[0]:
        # A copy, 4.6 us for 64 x 32 queries of 768 channels (H200): the CUDA kernel takes no batch with a stride of 0.
        q = q.expand(k.shape[0], -1, -1, -1).contiguous()
    elif k.shape[0] == 1 != batch:
        if ranges is not None:
            shape = tuple(ranges.start.shape)
            if shape not in ((batch, q.shape[1]), (1, q.shape[1])):
                wanted = f"({batch}, {q.shape[1]}) or (1, {q.shape[1]}), one range per query"
                raise bad_argument("ranges", f"shape {shape}", wanted)
            ranges = KeyRanges(*(bound.expand(batch, -1).reshape(1, -1) for bound in (ranges.start, ranges.stop)))
        q = q.reshape(1, -1, *q.shape[2:])
    return q, k, v, ranges


def absorbed_attention(
    q: torch.Tensor,
    context: torch.Tensor,
    w_k: torch.Tensor,
    w_v: torch.Tensor,
    b_v: torch.Tensor | None = None,
    *,
    scale: float | None = None,
) -> torch.Tensor:
    """Attention whose keys and values are products with ``context``, without computing either: ``[B, Sq, H, Dv]``.

    ``q . (W_k c) = (W_k.T q) . c`` and ``sum_j p_j W_v c_j = W_v sum_j p_j c_j``. A bias of the keys adds the same number to all
    logits of a query, which a softmax does not see; that of the values adds itself, as the weights sum to 1.

    Args:
        q: ``[B, Sq, H, D]``, or with a batch of 1.
        context: ``[B, Sk, E]``, or with a batch of 1.
        w_k: ``[H * D, E]``.
        w_v: ``[H * Dv, E]``.
        b_v: ``[H * Dv]``.
        scale: the factor on the logits, ``1 / sqrt(D)`` by default.
    """
    batch, rows, heads, dim = q.shape
    scale = dim**-0.5 if scale is None else scale
    key_heads, value_heads = (w.unflatten(0, (heads, -1)) for w in (w_k, w_v))
    # [H, B * Sq, D] @ [H, D, E], then the heads of an image in one product with its tokens.
    wide = torch.bmm(q.reshape(batch * rows, heads, dim).transpose(0, 1), key_heads)
    columns = context.shape[2]
    wide = wide.view(heads, batch, rows, columns).transpose(0, 1).reshape(batch, heads * rows, columns)
    if batch == 1:
        batch = context.shape[0]
        wide = wide.expand(batch, -1, -1)
    elif context.shape[0] == 1:
        wide = wide.reshape(1, batch * heads * rows, columns)
    logits = torch.baddbmm(wide.new_empty(()), wide, context.transpose(1, 2), beta=0, alpha=scale)
    read = torch.bmm(logits.softmax(-1), context)
    read = read.view(batch, heads, rows, columns).transpose(0, 1).reshape(heads, batch * rows, columns)
    y = torch.bmm(read, value_heads.transpose(1, 2)).view(heads, batch, rows, value_heads.shape[1]).permute(1, 2, 0, 3)
    return y.contiguous() if b_v is None else y + b_v.unflatten(0, (heads, -1))


def _check(
    x: torch.Tensor,
    context: torch.Tensor,
    weights: tuple[torch.Tensor | None, ...],
    biases: tuple[torch.Tensor | None, ...],
    heads: int,
    kv_heads: int,
) -> None:
    if x.dim() != 3:
        raise bad_argument("x", f"shape {tuple(x.shape)}", "[B, Sq, C]")
    if context.dim() != 3 or (context.shape[0] != x.shape[0] and 1 not in (context.shape[0], x.shape[0])):
        wanted_batch = f"[B, Sk, E] with x's batch of {x.shape[0]}, or 1 in either"
        raise bad_argument("context", f"shape {tuple(context.shape)}", wanted_batch)
    if heads < 1 or kv_heads < 1 or heads % kv_heads:
        raise bad_argument("num_kv_heads", kv_heads, f"a divisor of num_heads = {heads}")
    w_q, w_k, w_v, w_o = weights
    assert w_q is not None and w_k is not None and w_v is not None
    width = w_v.shape[0] // kv_heads * heads
    wanted = (
        ("w_q", w_q, heads, x.shape[-1], None),
        ("w_k", w_k, kv_heads, context.shape[-1], w_q.shape[0] // heads * kv_heads),
        ("w_v", w_v, kv_heads, context.shape[-1], None),
        ("w_o", w_o, 1, width, None),
    )
    for (name, weight, parts, columns, rows), bias in zip(wanted, biases, strict=True):
        if weight is not None:
            right = weight.dim() == 2 and weight.shape[1] == columns and weight.shape[0] > 0 and weight.shape[0] % parts == 0
            if not right or rows not in (None, weight.shape[0]):
                count = rows if rows is not None else f"a multiple of {parts}"
                raise bad_argument(name, f"shape {tuple(weight.shape)}", f"[{count}, {columns}]")
        if bias is not None and (weight is None or bias.shape != weight.shape[:1]):
            raise bad_argument(f"b{name[1:]}", f"shape {tuple(bias.shape)}", f"[{len(weight)}]" if weight is not None else "None")
    names = ("context", "w_q", "w_k", "w_v", "w_o", "b_q", "b_k", "b_v", "b_o")
    for name, tensor in zip(names, (context, *weights, *biases), strict=True):
        if tensor is not None and (tensor.dtype != x.dtype or tensor.device != x.device):
            raise bad_argument(name, f"{tensor.dtype} on {tensor.device}", f"x's {x.dtype} on {x.device}")

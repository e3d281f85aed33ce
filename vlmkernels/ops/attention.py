# SPDX-License-Identifier: Apache-2.0
"""Softmax attention in which every query sees one range of keys: the mask of every vision-language model."""

import math
from typing import Any

import torch
from torch.autograd.function import once_differentiable

import vlmkernels.ops.tile_bounds  # noqa: F401  registers the op that the kernels call
from vlmkernels.masks import KeyRanges
from vlmkernels.ops._op import Op, bad_argument, forced_backend, unwatched

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: KeyRanges | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Attention, ``out[i] = sum_j softmax_j(s[i, j]) v[j]`` with ``s[i, j] = scale * q[i] . k[j]`` over the keys that ``i`` sees.

    Query ``i`` sees the keys ``ranges.start[i] <= j < ranges.stop[i]``, all of them without ``ranges``. A query that sees no
    key gives a row of zeros, a log-sum-exp of -inf and no gradient. The softmax is computed in fp32 with a running maximum
    (Milakov and Gimelshein 2018; Dao et al. 2022) and never stored.

    Args:
        q: ``[B, Sq, H, D]``, or packed ``[Tq, H, D]``; any strides with a contiguous last dimension.
        k: ``[B, Sk, Hk, D]`` or ``[Tk, Hk, D]``; ``H`` a multiple of ``Hk``; query head ``h`` reads key head ``h // (H // Hk)``.
        v: ``[B, Sk, Hk, Dv]`` or ``[Tk, Hk, Dv]``.
        ranges: int32 ``[B, Sq]`` or ``[1, Sq]`` (packed: ``[1, Tq]``). Bounds outside ``[0, Sk]`` are cut to it.
        causal: query ``i`` also sees no key after ``i + Sk - Sq`` (the last query sees the last key, as in FlashAttention).
        scale: the factor on the logits, ``1 / sqrt(D)`` by default.
        softcap: if positive, the scaled logits become ``softcap * tanh(s / softcap)`` (Gemma 2).
        return_lse: also return the log-sum-exp of each row's logits.
        backend: the backend that must run; by default the first that can.

    Returns:
        ``out``, contiguous ``[B, Sq, H, Dv]`` (packed ``[Tq, H, Dv]``) in the dtype of ``q``; with ``return_lse`` also ``lse``,
        fp32 (fp64 for fp64 inputs) ``[B, H, Sq]`` (packed ``[H, Tq]``). Both are differentiable once.

    Raises:
        ValueError: shapes, dtypes (bf16, fp16, fp32, fp64; one for all three), devices or strides that don't fit.
        BackendError: the forced backend can't run these inputs.
    """
    start, stop = (None, None) if ranges is None else (ranges.start, ranges.stop)
    scale = scale if scale is None else float(scale)
    settings, tensors = (causal, scale, float(softcap), return_lse, forced_backend(backend)), (q, k, v, start, stop)
    plan = _fwd.planned(settings, tensors)
    out, lse = _unplanned(settings, tensors, ranges) if plan is None else plan(*tensors)
    if q.dim() == 3:
        out = out.squeeze(0)
        lse = lse.squeeze(0) if return_lse else lse
    return (out, lse) if return_lse else out


def _unplanned(settings: tuple[Any, ...], tensors: tuple[Any, ...], ranges: KeyRanges | None) -> Any:
    """Check everything, run, and leave a plan for the next such call."""
    causal, scale, softcap, return_lse, name = settings
    q, k, v, *_ = tensors
    _check(q, k, v, ranges, softcap)
    arguments = *_arguments(q, k, v, ranges, causal, scale, softcap), return_lse, name
    if torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad):
        result = _Attention.apply(*arguments)
        return result if return_lse else (result, None)
    result = _fwd(*arguments)
    if not (causal and ranges is not None):  # a plan would have to combine them anew
        _fwd.plan(settings, tensors, arguments)
    return result


def _arguments(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    ranges: KeyRanges | None,
    causal: bool,
    scale: float | None,
    softcap: float,
) -> tuple[Any, ...]:
    """Those of the op, from ``q`` up to ``softcap``: four dimensions, one kind of mask, a scale."""
    if q.dim() == 3:
        q, k, v = q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0)
    if causal and ranges is not None:
        ranges, causal = ranges & KeyRanges.causal(q.shape[1], k.shape[1], device=q.device), False
    start, stop = (None, None) if ranges is None else (ranges.start, ranges.stop)
    return q, k, v, start, stop, causal, 1.0 / math.sqrt(q.shape[-1]) if scale is None else scale, softcap


def attention_qkvpacked(
    qkv: torch.Tensor,
    num_heads: int,
    num_kv_heads: int,
    ranges: KeyRanges | None = None,
    *,
    causal: bool = False,
    scale: float | None = None,
    softcap: float = 0.0,
    backend: str | None = None,
) -> torch.Tensor:
    """``attention`` of what one product gives: q, k and v of a token are one row, and so are their gradients.

    Args:
        qkv: ``[B, S, (H + 2 Hk) D]``, or packed ``[T, (H + 2 Hk) D]``: the heads of q, those of k, those of v; any strides with
            a contiguous last dimension.
        num_heads: ``H``.
        num_kv_heads: ``Hk``, a divisor of ``H``.
        ranges, causal, scale, softcap, backend: as for ``attention``.

    Returns:
        ``[B, S, H D]`` (packed ``[T, H D]``), contiguous, differentiable once.

    Raises:
        ValueError: as of ``attention``, or rows that are not of so many heads.
        BackendError: the forced backend can't run these inputs.
    """
    rows = num_heads + 2 * num_kv_heads
    if qkv.dim() not in (2, 3) or min(num_heads, num_kv_heads) < 1 or qkv.shape[-1] % rows:
        raise bad_argument(
            "qkv", f"shape {tuple(qkv.shape)}", f"[B, S, {rows} D] or [T, {rows} D], of {num_heads} and {num_kv_heads} heads"
        )
    settings = causal, scale if scale is None else float(scale), float(softcap)
    heads = num_heads, num_kv_heads, num_kv_heads
    if torch.is_grad_enabled() and qkv.requires_grad:
        out: torch.Tensor = _PackedAttention.apply(qkv, heads, ranges, *settings, forced_backend(backend))
        return out
    q, k, v = _heads(qkv, heads)
    y = attention(q, k, v, ranges, causal=causal, scale=scale, softcap=softcap, backend=backend)
    assert isinstance(y, torch.Tensor)
    return y.flatten(-2)


def _heads(qkv: torch.Tensor, heads: tuple[int, int, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v, views."""
    rows = sum(heads)
    q, k, v = qkv.unflatten(-1, (rows, qkv.shape[-1] // rows)).split_with_sizes(heads, -2)
    return q, k, v


def _check(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, ranges: KeyRanges | None, softcap: float) -> None:
    q_shape, k_shape, v_shape, dtype, device = q.shape, k.shape, v.shape, q.dtype, q.device
    dims = len(q_shape)
    if dims != 4 and dims != 3:
        raise bad_argument("q", f"shape {tuple(q_shape)}", "[B, Sq, H, D] or [Tq, H, D]")
    if len(k_shape) != dims or k_shape[-1] != q_shape[-1] or (dims == 4 and k_shape[0] != q_shape[0]):
        wanted = "[B, Sk, Hk, D]" if dims == 4 else "[Tk, Hk, D]"
        raise bad_argument("k", f"shape {tuple(k_shape)}", f"{wanted} with the B and D of q's {tuple(q_shape)}")
    if v_shape != k_shape and v_shape[:-1] != k_shape[:-1]:
        raise bad_argument("v", f"shape {tuple(v_shape)}", f"k's {tuple(k_shape)} up to the last dimension")
    if k_shape[-2] == 0 or q_shape[-2] % k_shape[-2]:
        raise bad_argument("k", f"{k_shape[-2]} heads", f"a divisor of q's {q_shape[-2]} heads")
    if q_shape[-1] == 0 or v_shape[-1] == 0:
        raise bad_argument("q" if q_shape[-1] == 0 else "v", "a head dimension of 0", "at least 1")
    if dtype not in DTYPES:
        raise bad_argument("q", dtype, "bfloat16, float16, float32 or float64")
    for name, x in (("q", q), ("k", k), ("v", v)):
        if x is not q and (x.dtype != dtype or x.device != device):
            raise bad_argument(name, f"{x.dtype} on {x.device}", f"q's {dtype} on {device}")
        if x.stride(-1) != 1 and x.shape[-1] > 1:
            raise bad_argument(name, f"strides {x.stride()}", "a contiguous last dimension")
    if softcap != 0 and (softcap < 0 or not math.isfinite(softcap)):
        raise bad_argument("softcap", softcap, "a finite number, 0 (off) or more")
    if ranges is not None:
        batch, queries = (1, q_shape[0]) if dims == 3 else (q_shape[0], q_shape[1])
        shape = ranges.start.shape
        if shape[1] != queries or (shape[0] != 1 and shape[0] != batch):
            raise bad_argument("ranges", f"shape {tuple(shape)}", f"({batch}, {queries}) or (1, {queries}), one range per query")
        if ranges.start.device != device:
            raise bad_argument("ranges", f"on {ranges.start.device}", f"on q's {device}")


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *arguments: Any) -> Any:
        q, k, v, start, stop, *settings, return_lse, backend = arguments
        out, lse = _fwd.call((*settings, True, backend), (q, k, v, start, stop), _fwd)
        ctx.save_for_backward(q, k, v, out, lse, start, stop)
        ctx.settings, ctx.backend = settings, backend
        return (out, lse) if return_lse else out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor, dlse: torch.Tensor | None = None) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, lse, start, stop = ctx.saved_tensors
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        return *_gradients(dout, dlse, q, k, v, out, lse, start, stop, *ctx.settings, ctx.backend), *([None] * 7)


def _gradients(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *arguments: Any
) -> tuple[torch.Tensor, ...]:
    """dQ, dK and dV; the last two lie one behind the other."""
    dq, dkv = _bwd(dout, dlse, q, k, v, *arguments)
    dk, dv = dkv.split((k.numel(), v.numel()))
    return dq, dk.view(k.shape), dv.view(v.shape)


class _PackedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        heads: tuple[int, int, int],
        ranges: KeyRanges | None,
        causal: bool,
        scale: float | None,
        softcap: float,
        backend: str,
    ) -> torch.Tensor:
        q, k, v = _heads(qkv, heads)
        _check(q, k, v, ranges, softcap)
        q, k, v, start, stop, *settings = _arguments(q, k, v, ranges, causal, scale, softcap)
        out, lse = _fwd.call((*settings, True, backend), (q, k, v, start, stop), _fwd)
        ctx.save_for_backward(q, k, v, out, lse, start, stop)
        ctx.settings, ctx.backend, ctx.shape = settings, backend, qkv.shape
        y: torch.Tensor = out.view(*qkv.shape[:-1], out.shape[2] * out.shape[3])
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, v, out, *tensors = ctx.saved_tensors
        dout = dout.reshape(out.shape)
        dout = dout if dout.stride(-1) == 1 else dout.contiguous()
        arguments = (dout, None, q, k, v, out, *tensors, *ctx.settings)
        together = None
        if ctx.backend in ("", "cuda") and unwatched((dout, q)):
            together = _bwd_together.function("cuda", q.device, *arguments)
        if together is None:
            rows = torch.cat([x.flatten(2) for x in _gradients(*arguments, ctx.backend)], 2)
        else:
            rows = together(*arguments)
        return rows.view(ctx.shape), *([None] * 6)


def _fwd_fake(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    save_lse: bool,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    batch, queries, heads, _ = q.shape
    lse_dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty((batch, heads, queries) if save_lse else (0,), dtype=lse_dtype)
    return q.new_empty(batch, queries, heads, v.shape[-1]), lse


def _bwd_fake(
    dout: torch.Tensor, dlse: torch.Tensor, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.numel() + v.numel())


_MASK_SCHEMA = "Tensor? start, Tensor? stop, bool causal, float scale, float softcap"
# lse is empty unless save_lse is set: without it a forward pass needs no log-sum-exp.
_fwd = Op(
    "attention",
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_MASK_SCHEMA}, bool save_lse, str backend) -> (Tensor, Tensor)",
    _fwd_fake,
    complete=True,
)
# Results of an op may not share memory, and those of k and v are to be neighbours: they come as one, behind each other.
_bwd = Op(
    "attention",
    "attention_bwd(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_MASK_SCHEMA}, str backend) -> (Tensor, Tensor)",
    _bwd_fake,
)


def _together_fake(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> torch.Tensor:
    return q.new_empty(*q.shape[:2], sum(x.shape[2] * x.shape[3] for x in (q, k, v)))


#: The same where there are as many queries as keys, with all three gradients of a token in one row: the projections behind read
#: them as one matrix.
_bwd_together = Op(
    "attention",
    "attention_bwd_together(Tensor dout, Tensor? dlse, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, "
    f"{_MASK_SCHEMA}, str backend) -> Tensor",
    _together_fake,
)

# SPDX-License-Identifier: Apache-2.0
"""Attention in 16-bit floats, under every mask that is a range of keys per query: forward on ``csrc/attention``, backward on
``csrc/attention_bwd``."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmkernels.backends.cuda._library import TYPES, AttentionBwdParams, AttentionParams, EntryPoint

_attention = EntryPoint("vlmk_attention")
_check = EntryPoint("vlmk_attention_check")
_attention_bwd = EntryPoint("vlmk_attention_bwd")
_check_bwd = EntryPoint("vlmk_attention_bwd_check")


@functools.lru_cache(maxsize=1024)
def _prepared(
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    value_dim: int,
    q_strides: tuple[int, ...],
    k_strides: tuple[int, ...],
    v_strides: tuple[int, ...],
    dtype: torch.dtype,
    ranges: int | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> AttentionParams | str:
    """All but the pointers, or why the kernel doesn't take them. ``ranges``: the stride of the ranges over the batch."""
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes bfloat16 and float16, these are {dtype}"
    params = AttentionParams()
    strides = {"q": q_strides, "k": k_strides, "v": v_strides}
    _fill(params, q_shape, k_shape, value_dim, strides, dtype, ranges, causal, scale, softcap)
    return _check.why_not(params) or params


def _fill(
    params: AttentionParams | AttentionBwdParams,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    value_dim: int,
    strides: dict[str, tuple[int, ...]],
    dtype: torch.dtype,
    ranges: int | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> None:
    """What forward and backward have in common."""
    params.start = params.stop = None if ranges is None else 1  # for the check: whether there are any
    params.range_stride_b = ranges or 0
    params.batch, params.num_queries, params.num_heads, params.dim = q_shape
    params.num_keys, params.num_kv_heads = k_shape[1:3]
    params.value_dim = value_dim
    params.type, params.causal, params.scale, params.softcap = TYPES[dtype], causal, scale, softcap
    for name, of_tensor in strides.items():
        for axis, stride in zip("bsh", of_tensor, strict=False):
            setattr(params, f"{name}_stride_{axis}", stride)


def _range_stride(start: Tensor | None) -> int | None:
    """Of contiguous ranges over the batch, 0 where one row serves it; None where there are none."""
    return None if start is None else start.shape[1] if start.shape[0] > 1 else 0


def _prepare(
    q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, causal: bool, scale: float, softcap: float
) -> AttentionParams | str:
    shapes = q.shape, k.shape, v.shape[3], q.stride(), k.stride(), v.stride()
    return _prepared(*shapes, q.dtype, _range_stride(start), causal, scale, softcap)


def why_not_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    save_lse: bool,
) -> str | None:
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return "q, k and v must begin at multiples of 16 bytes"
    prepared = _prepare(q, k, v, start, causal, scale, softcap)
    return prepared if isinstance(prepared, str) else None


def attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    save_lse: bool,
) -> tuple[Tensor, Tensor]:
    if start is not None and stop is not None:
        start, stop = start.contiguous(), stop.contiguous()
    plan = plan_attention_fwd(q, k, v, start, stop, causal, scale, softcap, save_lse)
    assert plan is not None  # why_not_attention_fwd was asked, and all that a plan would copy is copied
    return plan(q, k, v, start, stop)


def plan_attention_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    save_lse: bool,
) -> Callable[..., tuple[Tensor, Tensor]] | None:
    """The plan, or None where the ranges must be copied first."""
    if start is not None and stop is not None and not (start.is_contiguous() and stop.is_contiguous()):
        return None
    params = _prepare(q, k, v, start, causal, scale, softcap)
    if isinstance(params, str):
        return None
    batch, queries, heads, _ = q.shape
    shape, lse_shape = (batch, queries, heads, v.shape[3]), (batch, heads, queries)
    fp32 = q.new_empty(0, dtype=torch.float32)  # naming a dtype costs a microsecond
    # Blocks that are done take the next tile by counting.
    int32 = q.new_empty(0, dtype=torch.int32) if causal or start is not None or softcap > 0 else None
    empty, no_keys = 0 in shape, k.shape[1] == 0
    launch = _attention.launcher(params, q.device)

    def plan(q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, stop: Tensor | None) -> tuple[Tensor, Tensor]:
        out = q.new_empty(*shape)
        lse = fp32.new_empty(*lse_shape) if save_lse else fp32
        if no_keys:
            return out.zero_(), lse.fill_(-torch.inf)
        if not empty:
            counter = None if int32 is None else int32.new_empty(1)
            launch(q, k, v, start, stop, out, lse if save_lse else None, counter)
        return out, lse

    return plan


@functools.lru_cache(maxsize=1024)
def _prepared_bwd(
    device: torch.device,
    q_shape: tuple[int, ...],
    k_shape: tuple[int, ...],
    value_dim: int,
    strides: tuple[tuple[int, ...], ...],
    dtype: torch.dtype,
    ranges: int | None,
    causal: bool,
    scale: float,
    softcap: float,
    together: bool,
    deterministic: bool,
) -> AttentionBwdParams | str:
    """All but the pointers, or why the kernel doesn't take them.

    ``device``: the current one, whose multiprocessors the workspace is for; ``strides``: of dout, q, k and v; ``ranges``: over
    the batch; ``together``: whether the gradients of a token are one row.
    """
    if dtype not in (torch.float16, torch.bfloat16):
        return f"it takes bfloat16 and float16, these are {dtype}"
    params = AttentionBwdParams(deterministic=deterministic)
    widths = q_shape[2] * q_shape[3], k_shape[2] * k_shape[3], k_shape[2] * value_dim
    params.dq_stride_s, params.dk_stride_s, params.dv_stride_s = (sum(widths),) * 3 if together else widths
    named = dict(zip(("dout", "q", "k", "v"), strides, strict=True))
    _fill(params, q_shape, k_shape, value_dim, named, dtype, ranges, causal, scale, softcap)
    return _check_bwd.why_not(params) or params


def _addressable(x: Tensor) -> Tensor:
    """As the copy engine can read it: what was expanded, or begins or has rows at odd places, is copied."""
    strides = [stride for stride, size in zip(x.stride()[:3], x.shape, strict=False) if size > 1]
    if x.data_ptr() % 16 == 0 and all(stride > 0 and stride % 8 == 0 for stride in strides):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def _prepare_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, start: Tensor | None, *settings: float, together: bool
) -> AttentionBwdParams | str:
    layout = q.shape, k.shape, v.shape[3], (dout.stride(), q.stride(), k.stride(), v.stride())
    deterministic = torch.are_deterministic_algorithms_enabled()
    return _prepared_bwd(q.device, *layout, q.dtype, _range_stride(start), *settings, together, deterministic)


def why_not_attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> str | None:
    if (q.data_ptr() | k.data_ptr() | v.data_ptr()) % 16:
        return "q, k and v must begin at multiples of 16 bytes"
    prepared = _prepare_bwd(out, q, k, v, start, causal, scale, softcap, together=False)
    return prepared if isinstance(prepared, str) else None


def attention_bwd(
    dout: Tensor,
    dlse: Tensor | None,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    start: Tensor | None,
    stop: Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor]:
    dq, dkv = q.new_empty(q.shape), k.new_empty(k.numel() + v.numel())
    dk, dv = dkv[: k.numel()], dkv[k.numel() :]
    _backward((dq, dk, dv), dout, dlse, q, k, v, out, lse, start, stop, causal, scale, softcap, together=False)
    return dq, dkv


def why_not_attention_bwd_together(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, *rest: Any) -> str | None:
    if q.shape[:2] != k.shape[:2]:
        return "there must be as many queries as keys"
    return why_not_attention_bwd(dout, dlse, q, k, *rest)


def attention_bwd_together(dout: Tensor, dlse: Tensor | None, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> Tensor:
    widths = [x.shape[2] * x.shape[3] for x in (q, k, v)]
    rows = q.new_empty(*q.shape[:2], sum(widths))
    _backward(rows.split(widths, 2), dout, dlse, q, k, v, *rest, together=True)
    return rows


def _backward(gradients: Sequence[Tensor], *arguments: Any, together: bool) -> None:
    """Fill the gradients, each by itself or all three of a token in one row; the arguments are those of ``attention_bwd``."""
    dout, dlse, q, k, v, out, lse, start, stop, *settings = arguments
    if 0 in q.shape or 0 in k.shape:
        for gradient in gradients:
            gradient.zero_()
        return
    # Kept in names until the launch: a copy's memory must not be given away before.
    dout, out, lse = _addressable(dout), _addressable(out.contiguous()), lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    if start is not None and stop is not None:
        start, stop = start.contiguous(), stop.contiguous()
    params = _prepare_bwd(dout, q, k, v, start, *settings, together=together)
    assert not isinstance(params, str)  # why_not_attention_bwd was asked
    size = params.workspace_bytes  # none for few queries
    workspace = q.new_empty(size, dtype=torch.uint8) if size else None
    _attention_bwd.launcher(params, q.device)(dout, q, k, v, out, lse, dlse, start, stop, *gradients, workspace)

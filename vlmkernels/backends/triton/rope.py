# SPDX-License-Identifier: Apache-2.0
"""``rope`` in Triton. The work is bound by memory, so every element of q and k is read once and written once.

Without a norm a program takes a run of ``BLOCK`` channel pairs as they lie in memory, whatever the head dimension: no lane
idles at 72 or 80 channels. With a norm it takes whole heads, one row each, padded to a power of two. The tables are read once
from DRAM and then, for the other heads of the token, from the caches.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import triton
import triton.language as tl

from vlmkernels.backends.triton import cdiv, contiguous
from vlmkernels.backends.triton._aot import AotCase
from vlmkernels.backends.triton._launch import LAUNCHES, Launch
from vlmkernels.backends.triton._rope_norm_bwd import norm_bwd
from vlmkernels.backends.triton._rope_pairs import (
    BLOCK,
    WARPS,
    load_pairs,
    load_weight,
    locate,
    row_width,
    rows,
    same_layout,
    store_pairs,
    table_strides,
    turn,
    units,
    vector,
)

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@triton.jit
def _rope_fwd_part(
    x_ptr, out_ptr, w_ptr, cos_ptr, sin_ptr, batch, block, S, eps,
    stride_xb, stride_xs, stride_xh, stride_xd, stride_ob, stride_os, stride_tb, stride_ts, stride_td,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, PAIRS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    NORM: tl.constexpr, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
    VECTOR_X: tl.constexpr, VECTOR_O: tl.constexpr, VECTOR_T: tl.constexpr,
):  # fmt: skip
    token, head, offs_p = locate(block, H, PAIRS, WIDTH, BLOCK, NORM)
    mask = (token < S) & (offs_p < PAIRS)
    offs_x = (batch * stride_xb + token * stride_xs + head.to(tl.int64) * stride_xh) * VECTOR_X
    offs_o = (batch * stride_ob + token * stride_os) * VECTOR_O + head * D
    offs_t = (batch * stride_tb + token * stride_ts) * VECTOR_T
    first, second = load_pairs(x_ptr + offs_x, offs_p, stride_xd, mask, D, HALF, INTERLEAVED)
    if NORM:
        scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / D + eps)[:, None]
        w_first, w_second = load_weight(w_ptr, offs_p, D, HALF, INTERLEAVED)
        first = first * scale * w_first
        second = second * scale * w_second
    first, second = turn(first, second, cos_ptr, sin_ptr, offs_t, offs_p, stride_td, mask, PAIRS, HALF, INVERSE)
    store_pairs(out_ptr + offs_o, first, second, offs_p, mask, D, HALF, INTERLEAVED)


@triton.jit
def _rope_fwd_kernel(
    q_ptr, k_ptr, out_q_ptr, out_k_ptr, qw_ptr, kw_ptr, cos_ptr, sin_ptr,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_oqb, stride_oqs, stride_okb, stride_oks, stride_tb, stride_ts, stride_td,
    S, blocks_q, blocks_k, eps,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    PAIRS_Q: tl.constexpr, PAIRS_K: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    NORM_Q: tl.constexpr, NORM_K: tl.constexpr, INVERSE: tl.constexpr, INTERLEAVED: tl.constexpr,
    VECTOR_X: tl.constexpr, VECTOR_O: tl.constexpr, VECTOR_T: tl.constexpr,
):  # fmt: skip
    """Blocks of q, then blocks of k, for each batch."""
    pid = tl.program_id(0)
    batch = (pid // (blocks_q + blocks_k)).to(tl.int64)
    block = pid % (blocks_q + blocks_k)
    if block < blocks_q:
        _rope_fwd_part(
            q_ptr, out_q_ptr, qw_ptr, cos_ptr, sin_ptr, batch, block, S, eps,
            stride_qb, stride_qs, stride_qh, stride_qd, stride_oqb, stride_oqs, stride_tb, stride_ts, stride_td,
            H, D, HALF, PAIRS_Q, WIDTH, BLOCK, NORM_Q, INVERSE, INTERLEAVED, VECTOR_X, VECTOR_O, VECTOR_T,
        )  # fmt: skip
    else:
        _rope_fwd_part(
            k_ptr, out_k_ptr, kw_ptr, cos_ptr, sin_ptr, batch, block - blocks_q, S, eps,
            stride_kb, stride_ks, stride_kh, stride_kd, stride_okb, stride_oks, stride_tb, stride_ts, stride_td,
            HK, D, HALF, PAIRS_K, WIDTH, BLOCK, NORM_K, INVERSE, INTERLEAVED, VECTOR_X, VECTOR_O, VECTOR_T,
        )  # fmt: skip


def _dense(shape: torch.Size) -> tuple[int, ...]:
    """The strides of a contiguous tensor."""
    strides = [1]
    for size in reversed(shape[1:]):
        strides.append(strides[-1] * max(size, 1))
    return tuple(reversed(strides))


def _plannable(cos: torch.Tensor, sin: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None) -> bool:
    """Whether tables and weights can be taken as they are: ``sin`` lies as ``cos`` does, and weights are contiguous."""
    alike = cos.stride() == sin.stride() or (cos.is_contiguous() and sin.is_contiguous())
    return alike and all(w is None or w.is_contiguous() for w in (q_weight, k_weight))


@functools.lru_cache(maxsize=LAUNCHES)
def _fwd_launch(
    device: torch.device, dtype: torch.dtype, table_dtype: torch.dtype, q_weight: torch.dtype | None,
    k_weight: torch.dtype | None, q_shape: torch.Size, kv_heads: int, table_shape: torch.Size, strides_q: tuple[int, ...],
    strides_k: tuple[int, ...], strides_oq: tuple[int, ...], strides_ok: tuple[int, ...], strides_t: tuple[int, ...],
    eps: float, interleaved: bool, inverse: bool, in_place: bool,
) -> Launch | None:  # fmt: skip
    """The launch for q and k, or None where there is nothing to rotate. The weights are given by their dtypes."""
    batches, tokens, heads, head_dim = q_shape if len(q_shape) == 4 else (1, *q_shape)
    strides_q, strides_k = rows(strides_q), rows(strides_k)
    strides_o = (*rows(strides_oq)[:2], *rows(strides_ok)[:2])
    strides_t, half = table_strides(table_shape, strides_t), table_shape[-1]
    width = row_width(head_dim)
    block = max(BLOCK, width)
    pairs, blocks = [], []
    for count, weight in ((heads, q_weight), (kv_heads, k_weight)):
        # In place the channels past the rotated ones are already there.
        pairs.append(half if in_place and weight is None else head_dim // 2)
        per_row = pairs[-1] if weight is None else width
        blocks.append(cdiv(tokens * count * per_row, block))
    if batches * sum(blocks) == 0:
        return None
    vector_x, vector_o = vector(dtype, *strides_q[:3], *strides_k[:3]), vector(dtype, head_dim, *strides_o)
    vector_t = vector(table_dtype, *strides_t[:2])
    scalars = (
        *units(vector_x, strides_q), *units(vector_x, strides_k), *(stride // vector_o for stride in strides_o),
        strides_t[0] // vector_t, strides_t[1] // vector_t, strides_t[2], tokens, *blocks, eps,
    )  # fmt: skip
    return Launch(
        _rope_fwd_kernel, (batches * sum(blocks),), scalars,
        H=max(heads, 1), HK=max(kv_heads, 1), D=head_dim, HALF=half,
        PAIRS_Q=max(pairs[0], 1), PAIRS_K=max(pairs[1], 1), WIDTH=width, BLOCK=block,
        NORM_Q=q_weight is not None, NORM_K=k_weight is not None, INVERSE=inverse, INTERLEAVED=interleaved,
        VECTOR_X=vector_x, VECTOR_O=vector_o, VECTOR_T=vector_t, num_warps=WARPS,
    )  # fmt: skip


def _launch_for(
    q: torch.Tensor, k: torch.Tensor, strides_oq: tuple[int, ...], strides_ok: tuple[int, ...], cos: torch.Tensor,
    q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, eps: float, interleaved: bool, inverse: bool, in_place: bool,
) -> Launch | None:  # fmt: skip
    """The launch for outputs of these strides, whose heads are dense rows, and ``_plannable`` tables and weights."""
    q_dtype = None if q_weight is None else q_weight.dtype
    k_dtype = None if k_weight is None else k_weight.dtype
    return _fwd_launch(
        q.device, q.dtype, cos.dtype, q_dtype, k_dtype, q.shape, k.size(-2), cos.shape,
        q.stride(), k.stride(), strides_oq, strides_ok, cos.stride(), eps, interleaved, inverse, in_place,
    )  # fmt: skip


def _turn_back(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    out_q: torch.Tensor,
    out_k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    interleaved: bool,
) -> None:
    """Gradients through the rotation alone, into outputs whose heads are dense rows."""
    cos, sin = same_layout(cos, sin)
    launch = _launch_for(grad_q, grad_k, out_q.stride(), out_k.stride(), cos, None, None, 0.0, interleaved, True, False)
    if launch is not None:
        launch(grad_q, grad_k, out_q, out_k, None, None, cos, sin)


def _why_not(*tensors: torch.Tensor | None) -> str | None:
    for x in tensors:
        if x is not None and x.dtype not in _DTYPES:
            return f"it takes fp32, bf16 and fp16, not {x.dtype}"
    return None


def why_not_rope_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> str | None:
    return _why_not(q, cos, q_weight, k_weight)


def rope_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    (cos, sin), q_weight, k_weight = same_layout(cos, sin), contiguous(q_weight), contiguous(k_weight)
    plan = plan_rope_fwd(q, k, cos, sin, q_weight, k_weight, eps, interleaved)
    assert plan is not None  # all that a plan would copy is copied
    return plan(q, k, cos, sin, q_weight, k_weight)


def plan_rope_fwd(
    q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None, eps: float, interleaved: bool,
) -> Callable[..., tuple[torch.Tensor, torch.Tensor]] | None:  # fmt: skip
    """The plan, or None where something must be copied first."""
    if not _plannable(cos, sin, q_weight, k_weight):
        return None
    q_shape, k_shape = q.shape, k.shape
    dense = _dense(q_shape), _dense(k_shape)
    launch = _launch_for(q, k, *dense, cos, q_weight, k_weight, eps, interleaved, False, False)

    def plan(
        q: torch.Tensor, k: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_weight: Any, k_weight: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        out_q, out_k = q.new_empty(*q_shape), k.new_empty(*k_shape)
        if launch is not None:
            launch(q, k, out_q, out_k, q_weight, k_weight, cos, sin)
        return out_q, out_k

    return plan


def why_not_rope_bwd(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> str | None:
    return _why_not(grad_q, cos, q_weight, k_weight)


def rope_bwd(
    grad_q: torch.Tensor,
    grad_k: torch.Tensor,
    q: torch.Tensor | None,
    k: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    eps: float,
    interleaved: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    grads = [grad_q, grad_k]
    outs = [torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in grads]
    grad_weights = [grad_q.new_empty(0), grad_k.new_empty(0)]
    normed = [x is not None and weight is not None for x, weight in ((q, q_weight), (k, k_weight))]

    def only(pair: list[torch.Tensor], wanted: bool) -> list[torch.Tensor]:
        """Of q's and k's those that are wanted, normed or not; the others without heads."""
        return [x if has == wanted else x[..., :0, :] for x, has in zip(pair, normed, strict=True)]

    if any(normed):
        inputs = [grad if x is None else x for grad, x in zip(grads, (q, k), strict=True)]
        given = [weight for weight in (q_weight, k_weight) if weight is not None]
        weights = [given[0], given[-1]]
        results = norm_bwd(only(grads, True), only(inputs, True), weights, only(outs, True), cos, sin, eps, interleaved)
        grad_weights = [result if has else none for result, has, none in zip(results, normed, grad_weights, strict=True)]
    if not all(normed):
        _turn_back(*only(grads, False), *only(outs, False), cos, sin, interleaved)
    return outs[0], outs[1], grad_weights[0], grad_weights[1]


def _heads(qkv: torch.Tensor, num_heads: int, num_kv_heads: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Views of q and k, ``[..., heads, D]``, and of v, ``[..., Hk D]``."""
    head_dim = qkv.shape[-1] // (num_heads + 2 * num_kv_heads)
    q, k, v = qkv.split([num_heads * head_dim, num_kv_heads * head_dim, num_kv_heads * head_dim], -1)
    return q.unflatten(-1, (num_heads, head_dim)), k.unflatten(-1, (num_kv_heads, head_dim)), v


def why_not_rope_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    interleaved: bool,
) -> str | None:
    if qkv.stride(-1) != 1:
        return "it writes rows whose last dimension is contiguous"
    return _why_not(qkv, cos, q_weight, k_weight)


def rope_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q_weight: torch.Tensor | None,
    k_weight: torch.Tensor | None,
    num_heads: int,
    num_kv_heads: int,
    eps: float,
    interleaved: bool,
) -> None:
    (cos, sin), q_weight, k_weight = same_layout(cos, sin), contiguous(q_weight), contiguous(k_weight)
    plan = plan_rope_qkv_(qkv, cos, sin, q_weight, k_weight, num_heads, num_kv_heads, eps, interleaved)
    assert plan is not None  # all that a plan would copy is copied
    plan(qkv, cos, sin, q_weight, k_weight)


def plan_rope_qkv_(
    qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_weight: torch.Tensor | None, k_weight: torch.Tensor | None,
    num_heads: int, num_kv_heads: int, eps: float, interleaved: bool,
) -> Callable[..., None] | None:  # fmt: skip
    """The plan, or None where something must be copied first."""
    if not _plannable(cos, sin, q_weight, k_weight):
        return None
    q, k, _ = _heads(qkv, num_heads, num_kv_heads)
    launch = _launch_for(q, k, q.stride(), k.stride(), cos, q_weight, k_weight, eps, interleaved, False, True)
    k_size, k_strides, offset = k.shape, k.stride(), k.storage_offset() - qkv.storage_offset()

    def plan(qkv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, q_weight: Any, k_weight: Any) -> None:
        k = qkv.as_strided(k_size, k_strides, qkv.storage_offset() + offset)
        if launch is not None:
            launch(qkv, k, qkv, k, q_weight, k_weight, cos, sin)

    return plan


def why_not_rope_qkv_bwd(
    grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_kv_heads: int, interleaved: bool
) -> str | None:
    return _why_not(grad, cos)


def rope_qkv_bwd(
    grad: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor, num_heads: int, num_kv_heads: int, interleaved: bool
) -> torch.Tensor:
    out = torch.empty(grad.shape, dtype=grad.dtype, device=grad.device)
    q, k, v = _heads(grad, num_heads, num_kv_heads)
    out_q, out_k, out_v = _heads(out, num_heads, num_kv_heads)
    _turn_back(q, k, out_q, out_k, cos, sin, interleaved)
    out_v.copy_(v)
    return out


def aot_cases() -> list[AotCase]:
    """Vision towers, M-RoPE text, norm, partial and interleaved pairs, in place and not."""

    def call(heads: int, kv_heads: int, dim: int, half: int, dtype: torch.dtype, norm: bool, interleaved: bool) -> None:
        qkv = torch.empty(2, 4096, (heads + 2 * kv_heads) * dim, dtype=dtype)
        cos = torch.empty(1, 4096, half)
        weight = torch.empty(dim, dtype=dtype) if norm else None
        q, k, _ = _heads(qkv, heads, kv_heads)
        rope_fwd(q, k, cos, cos, weight, weight, 1e-6, interleaved)
        rope_bwd(
            torch.empty(q.shape, dtype=dtype),
            torch.empty(k.shape, dtype=dtype),
            q,
            k,
            cos,
            cos,
            weight,
            weight,
            1e-6,
            interleaved,
        )
        rope_qkv_(qkv, cos, cos, weight, weight, heads, kv_heads, 1e-6, interleaved)

    cases = []
    for heads, kv_heads, dim, half, dtype, norm, interleaved in (
        (16, 16, 72, 36, torch.bfloat16, False, False),
        (16, 16, 80, 40, torch.bfloat16, False, False),
        (28, 4, 128, 64, torch.bfloat16, False, False),
        (32, 8, 128, 64, torch.bfloat16, True, False),
        (32, 8, 128, 64, torch.float16, True, True),
        (8, 4, 256, 128, torch.float32, True, False),
        (16, 2, 96, 24, torch.bfloat16, True, False),
        (16, 16, 64, 16, torch.bfloat16, False, True),
    ):
        name = f"{str(dtype)[6:]} D{dim} R{2 * half} norm={norm} interleaved={interleaved}"
        arguments = heads, kv_heads, dim, half, dtype, norm, interleaved
        cases.append(AotCase(name, functools.partial(call, *arguments)))
    return cases

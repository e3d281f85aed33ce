# SPDX-License-Identifier: Apache-2.0
"""The gradients of ``rope`` with a norm: one launch for q and k, and one that adds up those of the weights."""

import torch
import triton
import triton.language as tl

from vlmkernels.backends.triton import INTERPRETED, cdiv, multiprocessors
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

#: Of a multiprocessor, where there are few blocks and where there are many: with 8 for 3,072 blocks the rows of the weights'
#: gradients take 21 us instead of 16, with 4 for 40,960 blocks all takes 178 us instead of 164 (H200).
PROGRAMS, PROGRAMS_OF_MANY, MANY = 4, 8, 16384


@triton.jit
def _rope_norm_bwd_part(
    g_ptr, x_ptr, w_ptr, out_ptr, row_ptr, cos_ptr, sin_ptr, first_block, step, blocks, blocks_all,
    stride_gb, stride_gs, stride_gh, stride_gd, stride_xb, stride_xs, stride_xh, stride_xd,
    stride_ob, stride_os, stride_tb, stride_ts, stride_td, S, eps,
    H: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr, VECTOR_X: tl.constexpr, VECTOR_O: tl.constexpr, VECTOR_T: tl.constexpr,
):  # fmt: skip
    """Blocks of q or of k through rotation and norm, and into ``row_ptr`` what they add to the gradient of the weight."""
    PAIRS: tl.constexpr = D // 2
    offs_w = tl.arange(0, WIDTH)[None, :]
    w_first, w_second = load_weight(w_ptr, offs_w, D, HALF, INTERLEAVED)
    sum_first = tl.zeros([BLOCK // WIDTH, WIDTH], tl.float32)
    sum_second = tl.zeros([BLOCK // WIDTH, WIDTH], tl.float32)
    for index in range(first_block, blocks_all, step):
        batch = (index // blocks).to(tl.int64)
        token, head, offs_p = locate(index % blocks, H, PAIRS, WIDTH, BLOCK, True)
        mask = (token < S) & (offs_p < PAIRS)
        offs_h = head.to(tl.int64)
        offs_g = (batch * stride_gb + token * stride_gs + offs_h * stride_gh) * VECTOR_X
        offs_x = (batch * stride_xb + token * stride_xs + offs_h * stride_xh) * VECTOR_X
        offs_o = (batch * stride_ob + token * stride_os) * VECTOR_O + head * D
        offs_t = (batch * stride_tb + token * stride_ts) * VECTOR_T
        g_first, g_second = load_pairs(g_ptr + offs_g, offs_p, stride_gd, mask, D, HALF, INTERLEAVED)
        first, second = load_pairs(x_ptr + offs_x, offs_p, stride_xd, mask, D, HALF, INTERLEAVED)
        g_first, g_second = turn(g_first, g_second, cos_ptr, sin_ptr, offs_t, offs_p, stride_td, mask, PAIRS, HALF, True)
        scale = tl.rsqrt(tl.sum(first * first + second * second, 1) / D + eps)[:, None]
        first = first * scale
        second = second * scale
        # A row that is not there has scale = rsqrt(eps), which may be infinite.
        sum_first += tl.where(mask, g_first * first, 0.0)
        sum_second += tl.where(mask, g_second * second, 0.0)
        g_first = g_first * w_first
        g_second = g_second * w_second
        along = (tl.sum(g_first * first + g_second * second, 1) / D)[:, None]
        g_first = scale * (g_first - first * along)
        g_second = scale * (g_second - second * along)
        store_pairs(out_ptr + offs_o, g_first, g_second, offs_p, mask, D, HALF, INTERLEAVED)
    total_first = tl.sum(sum_first, 0)[None, :]
    total_second = tl.sum(sum_second, 0)[None, :]
    store_pairs(row_ptr + tl.zeros_like(offs_w), total_first, total_second, offs_w, offs_w < PAIRS, D, HALF, INTERLEAVED)


@triton.jit
def _rope_norm_bwd_kernel(
    gq_ptr, gk_ptr, q_ptr, k_ptr, qw_ptr, kw_ptr, out_q_ptr, out_k_ptr, partial_ptr, cos_ptr, sin_ptr,
    stride_gqb, stride_gqs, stride_gqh, stride_gqd, stride_gkb, stride_gks, stride_gkh, stride_gkd,
    stride_qb, stride_qs, stride_qh, stride_qd, stride_kb, stride_ks, stride_kh, stride_kd,
    stride_oqb, stride_oqs, stride_okb, stride_oks, stride_tb, stride_ts, stride_td,
    S, programs_q, blocks_q, blocks_k, batches, eps,
    H: tl.constexpr, HK: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr,
    INTERLEAVED: tl.constexpr, VECTOR_X: tl.constexpr, VECTOR_O: tl.constexpr, VECTOR_T: tl.constexpr,
):  # fmt: skip
    """Some programs are q's, the others k's. Each writes one row of its weight's gradient: no atomics."""
    pid = tl.program_id(0)
    row_ptr = partial_ptr + pid.to(tl.int64) * D
    if pid < programs_q:
        _rope_norm_bwd_part(
            gq_ptr, q_ptr, qw_ptr, out_q_ptr, row_ptr, cos_ptr, sin_ptr, pid, programs_q, blocks_q, batches * blocks_q,
            stride_gqb, stride_gqs, stride_gqh, stride_gqd, stride_qb, stride_qs, stride_qh, stride_qd,
            stride_oqb, stride_oqs, stride_tb, stride_ts, stride_td, S, eps,
            H, D, HALF, WIDTH, BLOCK, INTERLEAVED, VECTOR_X, VECTOR_O, VECTOR_T,
        )  # fmt: skip
    else:
        _rope_norm_bwd_part(
            gk_ptr, k_ptr, kw_ptr, out_k_ptr, row_ptr, cos_ptr, sin_ptr, pid - programs_q,
            tl.num_programs(0) - programs_q, blocks_k, batches * blocks_k,
            stride_gkb, stride_gks, stride_gkh, stride_gkd, stride_kb, stride_ks, stride_kh, stride_kd,
            stride_okb, stride_oks, stride_tb, stride_ts, stride_td, S, eps,
            HK, D, HALF, WIDTH, BLOCK, INTERLEAVED, VECTOR_X, VECTOR_O, VECTOR_T,
        )  # fmt: skip


@triton.jit
def _sum_rows_kernel(partial_ptr, q_ptr, k_ptr, rows_q, rows, D: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """The first ``rows_q`` rows are added up to the gradient of q's weight, the others to that of k's, in a fixed order."""
    of_k = tl.program_id(1)
    columns = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    first = tl.where(of_k == 0, 0, rows_q)
    stop = tl.where(of_k == 0, rows_q, rows)
    total = tl.zeros([ROWS, COLUMNS], tl.float32)
    for start in range(first, stop, ROWS):
        row = start + tl.arange(0, ROWS)
        mask = (row < stop)[:, None] & (columns < D)[None, :]
        total += tl.load(partial_ptr + row[:, None] * D + columns[None, :], mask=mask, other=0.0)
    total = tl.sum(total, 0)
    if of_k == 0:
        tl.store(q_ptr + columns, total.to(q_ptr.dtype.element_ty), mask=columns < D)
    else:
        tl.store(k_ptr + columns, total.to(k_ptr.dtype.element_ty), mask=columns < D)


def norm_bwd(
    grads: list[torch.Tensor],
    inputs: list[torch.Tensor],
    weights: list[torch.Tensor],
    outs: list[torch.Tensor],
    cos: torch.Tensor,
    sin: torch.Tensor,
    eps: float,
    interleaved: bool,
) -> list[torch.Tensor]:
    """Gradients of q and k, into ``outs``, and of the weights of their norms, in two launches.

    A side without a norm comes without heads, and with any weight.
    """
    head_dim = grads[0].shape[-1]
    batches, tokens = grads[0].shape[:2] if grads[0].dim() == 4 else (1, grads[0].shape[0])
    cos, sin = same_layout(cos, sin)
    width = row_width(head_dim)
    # A whole block of fp32 and head dim 256 would spill.
    block = max(BLOCK // (2 if grads[0].dtype == torch.float32 else 1), width)
    blocks = [cdiv(tokens * grad.shape[-2], block // width) for grad in grads]
    work = batches * sum(blocks)
    if work == 0:
        return [weight.new_zeros(weight.shape) for weight in weights]
    each = PROGRAMS_OF_MANY if work >= MANY else PROGRAMS
    most = 2 if INTERPRETED else each * multiprocessors(cos.device)
    # As much work for each program of either side.
    programs = [min(batches * count, max(1, most * count // sum(blocks))) if count else 0 for count in blocks]
    partial = torch.empty(sum(programs), head_dim, dtype=torch.float32, device=cos.device)
    strides = [rows(x.stride()) for x in (*grads, *inputs)]
    strides_o = [stride for out in outs for stride in rows(out.stride())[:2]]
    strides_t = table_strides(cos.shape, cos.stride())
    vector_x = vector(grads[0].dtype, *(n for x in strides for n in x[:3]))
    vector_o = vector(grads[0].dtype, head_dim, *strides_o)
    vector_t = vector(cos.dtype, *strides_t[:2])
    _rope_norm_bwd_kernel[(sum(programs),)](
        *grads, *inputs, *(weight.contiguous() for weight in weights), *outs, partial, cos, sin,
        *(n for x in strides for n in units(vector_x, x)), *(stride // vector_o for stride in strides_o),
        strides_t[0] // vector_t, strides_t[1] // vector_t, strides_t[2], tokens, programs[0], *blocks, batches, eps,
        H=max(grads[0].shape[-2], 1), HK=max(grads[1].shape[-2], 1), D=head_dim, HALF=cos.shape[-1], WIDTH=width, BLOCK=block,
        INTERLEAVED=interleaved, VECTOR_X=vector_x, VECTOR_O=vector_o, VECTOR_T=vector_t, num_warps=WARPS,
    )  # fmt: skip
    grad_weights = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
    _sum_rows_kernel[(cdiv(head_dim, 16), 2)](
        partial, *grad_weights, programs[0], sum(programs), D=head_dim, ROWS=256, COLUMNS=16, num_warps=8
    )
    return grad_weights

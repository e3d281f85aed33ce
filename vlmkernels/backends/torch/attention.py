# SPDX-License-Identifier: Apache-2.0
"""Attention through torch's scaled_dot_product_attention, with the ranges as a dense boolean mask."""

import torch
import torch.nn.functional as F

# Rows of the score matrix at a time where the log-sum-exp is asked for, which SDPA does not return.
LSE_ROWS = 1024


def why_not_attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    save_lse: bool,
) -> str | None:
    if softcap:
        return "scaled_dot_product_attention has no softcap"
    return "scaled_dot_product_attention takes no empty tensors" if 0 in (q.numel(), k.numel()) else None


def why_not_attention_bwd(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest
) -> str | None:
    _, _, start, stop, causal, scale, softcap = rest
    return why_not_attention_fwd(q, k, v, start, stop, causal, scale, softcap, True)


def _mask(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, stop: torch.Tensor | None, causal: bool
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """The dense mask ``[B|1, 1, Sq, Sk]`` and the rows ``[B|1, Sq, 1, 1]`` that see no key; None where there are none.

    A row that sees no key looks at all of them in the mask, since its softmax would be 0/0.
    """
    queries, keys = q.shape[1], k.shape[1]
    j = torch.arange(keys, device=q.device)
    mask = None
    if start is not None and stop is not None:
        mask = (j >= start[..., None]) & (j < stop[..., None])
    elif causal and queries != keys:
        mask = (j <= torch.arange(queries, device=q.device)[:, None] + keys - queries)[None]
    if mask is None:
        return None, None
    blind = ~mask.any(-1, keepdim=True)
    return (mask | blind)[:, None], blind[..., None]


def _sdpa(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor | None,
    blind: torch.Tensor | None,
    causal: bool,
    scale: float,
) -> torch.Tensor:
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    gqa = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(q, k, v, mask, is_causal=causal and mask is None, scale=scale, enable_gqa=gqa)
    out = out.transpose(1, 2)
    return out if blind is None else out.masked_fill(blind, 0.0)


def _log_sum_exp(
    q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor | None, blind: torch.Tensor | None, causal: bool, scale: float
) -> torch.Tensor:
    batch, queries, heads, _ = q.shape
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    lse = q.new_empty(batch, heads, queries, dtype=dtype)
    keys = k.to(dtype).permute(0, 2, 3, 1).repeat_interleave(heads // k.shape[2], dim=1)
    j = torch.arange(k.shape[1], device=q.device)
    for begin in range(0, queries, LSE_ROWS):
        end = min(begin + LSE_ROWS, queries)
        logits = scale * (q[:, begin:end].to(dtype).transpose(1, 2) @ keys)
        if mask is not None:
            logits = logits.masked_fill(~mask[:, :, begin:end], float("-inf"))
        elif causal:
            logits = logits.masked_fill(j > torch.arange(begin, end, device=q.device)[:, None], float("-inf"))
        lse[:, :, begin:end] = torch.logsumexp(logits, dim=-1)
    return lse if blind is None else lse.masked_fill(blind[:, None, :, 0, 0], float("-inf"))


def attention_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
    save_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor]:
    mask, blind = _mask(q, k, start, stop, causal)
    out = _sdpa(q, k, v, mask, blind, causal, scale).contiguous()
    return out, _log_sum_exp(q, k, mask, blind, causal, scale) if save_lse else q.new_empty(0, dtype=torch.float32)


def attention_bwd(
    dout: torch.Tensor,
    dlse: torch.Tensor | None,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    start: torch.Tensor | None,
    stop: torch.Tensor | None,
    causal: bool,
    scale: float,
    softcap: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    mask, blind = _mask(q, k, start, stop, causal)
    with torch.enable_grad():
        inputs = tuple(x.detach().requires_grad_() for x in (q, k, v))
        outputs, gradients = [_sdpa(*inputs, mask, blind, causal, scale)], [dout]
        if dlse is not None:
            outputs.append(_log_sum_exp(*inputs[:2], mask, blind, causal, scale))
            gradients.append(dlse)
        dq, dk, dv = torch.autograd.grad(outputs, inputs, gradients)
    return dq.contiguous(), dk.contiguous(), dv.contiguous()

# SPDX-License-Identifier: Apache-2.0
"""Attention through torch's scaled_dot_product_attention, with the ranges as a dense boolean mask.

The backward forms the probabilities in blocks of rows: autograd is switched off inside a registered op, so that SDPA's own
backward is out of reach there.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F

# Rows of the score matrix at a time where it is formed: for the log-sum-exp, which SDPA does not return, and in the backward.
ROWS = 1024


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
) -> torch.Tensor | None:
    """The dense mask ``[B|1, 1, Sq, Sk]``, or None where every query sees every key."""
    j = torch.arange(k.shape[1], device=q.device)
    if start is not None and stop is not None:
        return ((j >= start[..., None]) & (j < stop[..., None]))[:, None]
    if causal:
        return (j <= torch.arange(q.shape[1], device=q.device)[:, None] + k.shape[1] - q.shape[1])[None, None]
    return None


def _seen(x: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    """Keys or values with zeros where no query looks: what unused memory holds must not reach a sum as 0 * NaN."""
    return x if mask is None else x.masked_fill(~mask.any(-2).movedim(1, 2)[..., None], 0.0)


def _aligned(x: torch.Tensor) -> torch.Tensor:
    """``x``, or a copy on a GPU where rows do not begin at 16 bytes: there SDPA gave wrong rows (fp16, torch 2.11, H200)."""
    step = 16 // x.element_size()
    odd = x.is_cuda and (x.data_ptr() % 16 or any(stride % step for stride in x.stride()[:3]))
    return x.clone(memory_format=torch.contiguous_format) if odd else x


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
    # SDPA knows a square causal mask itself; only the log-sum-exp needs it as a tensor.
    square = causal and q.shape[1] == k.shape[1]
    mask = None if square and not save_lse else _mask(q, k, start, stop, causal)
    k = _seen(k, mask)
    blind = None if square or mask is None else ~mask.any(-1, keepdim=True)
    heads_first = (_aligned(x).transpose(1, 2) for x in (q, k, _seen(v, mask)))
    # A row that sees no key looks at all of them here, since its softmax would be 0/0, and is cleared after.
    allowed = None if mask is None or blind is None else mask | blind
    gqa = q.shape[2] != k.shape[2]
    out = F.scaled_dot_product_attention(*heads_first, allowed, is_causal=square, scale=scale, enable_gqa=gqa)
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    out = out.transpose(1, 2).contiguous()
    if not save_lse:
        return out, q.new_empty(0, dtype=_compute_dtype(q))
    keys = _heads_first(k, q.shape[2] // k.shape[2])
    lse = [torch.logsumexp(logits, dim=-1) for _, logits in _logits(q, keys, mask, scale)]
    return out, torch.cat(lse, dim=-1)


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _heads_first(x: torch.Tensor, groups: int = 1) -> torch.Tensor:
    return x.transpose(1, 2).to(_compute_dtype(x)).repeat_interleave(groups, dim=1)


def _logits(q: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None, scale: float) -> Iterator[tuple[slice, torch.Tensor]]:
    """The masked logits ``[B, H, rows, Sk]``, a block of rows at a time, from ``keys [B, H, Sk, D]``."""
    for begin in range(0, q.shape[1], ROWS):
        rows = slice(begin, begin + ROWS)
        logits = scale * (_heads_first(q[:, rows]) @ keys.transpose(-1, -2))
        yield rows, logits if mask is None else logits.masked_fill(~mask[:, :, rows], float("-inf"))


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
) -> tuple[torch.Tensor, torch.Tensor]:
    groups = q.shape[2] // k.shape[2]
    mask = _mask(q, k, start, stop, causal)
    keys, values = (_heads_first(_seen(x, mask), groups) for x in (k, v))
    dq, dk, dv = torch.empty_like(q, memory_format=torch.contiguous_format), torch.zeros_like(keys), torch.zeros_like(values)
    for rows, logits in _logits(q, keys, mask, scale):
        normaliser = lse[:, :, rows, None]
        p = torch.exp(logits - normaliser.masked_fill(normaliser == float("-inf"), float("inf")))
        do = _heads_first(dout[:, rows])
        delta = (do * _heads_first(out[:, rows])).sum(-1, keepdim=True)
        if dlse is not None:
            delta = delta - dlse[:, :, rows, None]
        dv += p.transpose(-1, -2) @ do
        ds = scale * p * (do @ values.transpose(-1, -2) - delta)
        dk += ds.transpose(-1, -2) @ _heads_first(q[:, rows])
        dq[:, rows] = (ds @ keys).transpose(1, 2).to(q.dtype)
    dk, dv = (x.unflatten(1, (-1, groups)).sum(2).transpose(1, 2).to(q.dtype) for x in (dk, dv))
    return dq, torch.cat([dk.flatten(), dv.flatten()])

# SPDX-License-Identifier: Apache-2.0
"""What attention means: the whole score matrix, in fp32 or fp64, with the backward pass written out."""

from typing import Any

import torch


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _visible(
    q: torch.Tensor, k: torch.Tensor, start: torch.Tensor | None, stop: torch.Tensor | None, causal: bool
) -> torch.Tensor:
    """Which keys each query sees, bool ``[B|1, 1, Sq, Sk]``."""
    queries, keys = q.shape[1], k.shape[1]
    j = torch.arange(keys, device=q.device)
    seen = torch.ones(1, queries, keys, dtype=torch.bool, device=q.device)
    if start is not None and stop is not None:
        seen = seen & (j >= start[..., None]) & (j < stop[..., None])
    if causal:
        i = torch.arange(queries, device=q.device)
        seen = seen & (j <= i[:, None] + keys - queries)
    return seen[:, None]


def _heads_first(x: torch.Tensor, heads: int) -> torch.Tensor:
    """``[B, S, Hk, D]`` as ``[B, H, S, D]`` in the dtype of computation, each key head repeated for its query heads."""
    return x.to(_compute_dtype(x)).transpose(1, 2).repeat_interleave(heads // x.shape[2], dim=1)


def _logits(q: torch.Tensor, k: torch.Tensor, scale: float, softcap: float) -> torch.Tensor:
    logits = scale * (_heads_first(q, q.shape[2]) @ _heads_first(k, q.shape[2]).transpose(-1, -2))
    return softcap * torch.tanh(logits / softcap) if softcap else logits


def _where_seen(x: torch.Tensor, heads: int, seen: torch.Tensor) -> torch.Tensor:
    """Keys or values, with zeros where no query looks: 0 * NaN would carry what unused memory holds into a sum."""
    return _heads_first(x, heads).masked_fill(~seen.any(-2)[..., None], 0.0)


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
    heads = q.shape[2]
    seen = _visible(q, k, start, stop, causal)
    logits = _logits(q, k, scale, softcap).masked_fill(~seen, float("-inf"))
    lse = torch.logsumexp(logits, dim=-1)
    p = torch.exp(logits - lse[..., None]).masked_fill(~seen, 0.0)
    out = (p @ _where_seen(v, heads, seen)).transpose(1, 2).to(q.dtype).contiguous()
    return out, lse if save_lse else lse.new_empty(0)


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
    heads, groups = q.shape[2], q.shape[2] // k.shape[2]
    seen = _visible(q, k, start, stop, causal)
    logits = _logits(q, k, scale, softcap)
    p = torch.exp(logits - lse[..., None]).masked_fill(~seen, 0.0)
    do, o = _heads_first(dout, heads), _heads_first(out, heads)

    dv = p.transpose(-1, -2) @ do
    dp = do @ _where_seen(v, heads, seen).transpose(-1, -2)
    delta = (do * o).sum(-1)
    if dlse is not None:
        delta = delta - dlse  # each logit's share of the log-sum-exp is its probability
    ds = p * (dp - delta[..., None])
    if softcap:
        ds = ds * (1.0 - (logits / softcap).square())
    ds = ds.masked_fill(~seen, 0.0)
    dq = scale * (ds @ _where_seen(k, heads, seen))
    dk = scale * (ds.transpose(-1, -2) @ _heads_first(q, heads))

    def sum_group(x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(1, (-1, groups)).sum(2)

    dq, dk, dv = (x.transpose(1, 2).to(q.dtype) for x in (dq, sum_group(dk), sum_group(dv)))
    return dq.contiguous(), torch.cat([dk.flatten(), dv.flatten()])


def attention_bwd_together(
    dout: torch.Tensor, dlse: torch.Tensor | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *rest: Any
) -> torch.Tensor:
    dq, dkv = attention_bwd(dout, dlse, q, k, v, *rest)
    return torch.cat([dq.flatten(2), *(x.view(*q.shape[:2], -1) for x in dkv.split((k.numel(), v.numel())))], -1)

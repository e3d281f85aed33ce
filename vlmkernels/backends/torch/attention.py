# SPDX-License-Identifier: Apache-2.0
"""Attention through torch's scaled_dot_product_attention, with the ranges as a dense boolean mask.

Autograd is switched off inside a registered op, so that SDPA's own backward is out of reach there. In fp32 on a CPU the two
operators that SDPA consists of are called, of which the first returns the log-sum-exp. Elsewhere, and where that has a gradient
of its own, the backward forms the probabilities in blocks of rows.
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


def _allowed(mask: torch.Tensor | None) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """What rows look at, and which of them see no key: these look at all, as a softmax of none is 0/0, and are cleared."""
    blind = None if mask is None else ~mask.any(-1, keepdim=True)
    return (None if mask is None or blind is None else mask | blind), blind


def _on_cpu(q: torch.Tensor, v: torch.Tensor) -> bool:
    """Whether SDPA's operators for a CPU take the call. In 16 bits their log-sum-exp is 1e-5 off, the gradients 2.7 floors."""
    return q.device.type == "cpu" and q.dtype in (torch.float32, torch.float64) and q.shape[3] == v.shape[3]


def _repeated(x: torch.Tensor, groups: int) -> torch.Tensor:
    """``[B, Hk, Sk, D]`` for each of the query heads that read it."""
    return x.repeat_interleave(groups, dim=1) if groups > 1 else x


def _bias(allowed: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor | None:
    """A mask as what is added to the logits."""
    return None if allowed is None else torch.zeros(allowed.shape, dtype=dtype).masked_fill_(~allowed, float("-inf"))


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
    # SDPA knows a square causal mask itself; only the log-sum-exp may need it as a tensor.
    square, on_cpu = causal and q.shape[1] == k.shape[1], save_lse and _on_cpu(q, v)
    mask = None if square and (on_cpu or not save_lse) else _mask(q, k, start, stop, causal)
    k, groups = _seen(k, mask), q.shape[2] // k.shape[2]
    allowed, blind = _allowed(None if square else mask)
    queries, keys, values = (_aligned(x).transpose(1, 2) for x in (q, k, _seen(v, mask)))
    if on_cpu:
        keys, values = _repeated(keys, groups), _repeated(values, groups)
        options = {"attn_mask": _bias(allowed, q.dtype), "scale": scale}
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(queries, keys, values, 0.0, square, **options)
        if blind is not None:
            lse = lse.masked_fill(blind[..., 0], float("-inf"))
    else:
        out = F.scaled_dot_product_attention(queries, keys, values, allowed, is_causal=square, scale=scale, enable_gqa=groups > 1)
        lse = q.new_empty(0, dtype=_compute_dtype(q))
        if save_lse:
            logits = _logits(q, _heads_first(k, groups), mask, scale)
            lse = torch.cat([torch.logsumexp(rows, dim=-1) for _, rows in logits], dim=-1)
    if blind is not None:
        out = out.masked_fill(blind, 0.0)
    return out.transpose(1, 2).contiguous(), lse.contiguous()


def _compute_dtype(x: torch.Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _heads_first(x: torch.Tensor, groups: int = 1) -> torch.Tensor:
    return _repeated(x.transpose(1, 2).to(_compute_dtype(x)), groups)


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
    on_cpu = dlse is None and _on_cpu(q, v)
    square = on_cpu and causal and q.shape[1] == k.shape[1]
    mask = None if square else _mask(q, k, start, stop, causal)
    keys, values = (_heads_first(_seen(x, mask), groups) for x in (k, v))
    if on_cpu:
        allowed, blind = _allowed(mask)
        if blind is not None:
            lse = lse.masked_fill(blind[..., 0], float("inf"))  # with which its weights are zero
        do, queries, results = (x.transpose(1, 2) for x in (dout, q, out))
        dq, dk, dv = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            do, queries, keys, values, results, lse, 0.0, square, attn_mask=_bias(allowed, q.dtype), scale=scale
        )
        return dq.transpose(1, 2).contiguous(), _of_groups(dk, dv, groups, q.dtype)
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
    return dq, _of_groups(dk, dv, groups, q.dtype)


def _of_groups(dk: torch.Tensor, dv: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """The gradients of keys and values, one behind the other, summed over the query heads that read the same."""
    sums = (x.unflatten(1, (-1, groups)).sum(2, dtype=_compute_dtype(x)).transpose(1, 2).to(dtype) for x in (dk, dv))
    return torch.cat([x.flatten() for x in sums])

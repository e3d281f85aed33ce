# SPDX-License-Identifier: Apache-2.0
"""Rotary position embedding of queries and keys, with an optional RMSNorm of each head in the same pass.

The tables decide which rope it is: ``vlmkernels.rope_tables`` builds them for text, two-dimensional vision and both kinds of
M-RoPE. Method: Su et al., "RoFormer: Enhanced Transformer with Rotary Position Embedding" (2021).
"""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlmkernels.ops._op import LIBRARY, Op, bad_argument, forced_backend, refuse_leaf

_TENSORS = "Tensor cos, Tensor sin, Tensor? q_weight, Tensor? k_weight"


def _fake_fwd(q: torch.Tensor, k: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape)


def _fake_bwd(
    grad_q: torch.Tensor, grad_k: torch.Tensor, q: Any, k: Any, cos: Any, sin: Any, q_weight: Any, k_weight: Any, *_: Any
) -> tuple[torch.Tensor, ...]:
    weights = (grad_q.new_empty(0) if w is None else w.new_empty(w.shape) for w in (q_weight, k_weight))
    return (grad_q.new_empty(grad_q.shape), grad_k.new_empty(grad_k.shape), *weights)


_fwd = Op(
    "rope",
    f"rope_fwd(Tensor q, Tensor k, {_TENSORS}, float eps, bool interleaved, str backend) -> (Tensor, Tensor)",
    _fake_fwd,
    complete=True,
)
# q and k are the inputs of the forward pass, wanted only where there is a weight. A missing weight's gradient has no elements.
Op(
    "rope",
    f"rope_bwd(Tensor grad_q, Tensor grad_k, Tensor? q, Tensor? k, {_TENSORS}, float eps, bool interleaved, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bwd,
)
_in_place = Op(
    "rope",
    f"rope_qkv_(Tensor(a!) qkv, {_TENSORS}, int num_heads, int num_kv_heads, float eps, bool interleaved, str backend) -> ()",
    lambda *_: None,
)
Op(
    "rope",
    "rope_qkv_bwd(Tensor grad, Tensor cos, Tensor sin, int num_heads, int num_kv_heads, bool interleaved, str backend) -> Tensor",
    lambda grad, *_: grad.new_empty(grad.shape),
)


def _count_write(keyset: Any, qkv: torch.Tensor, *args: Any) -> None:
    """Tell autograd that ``qkv`` changed: an op that is defined from Python has nobody else who does."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        torch.ops.vlmkernels.rope_qkv_.default.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, qkv, *args)
    torch.autograd.graph.increment_version(qkv)


LIBRARY.impl("rope_qkv_", _count_write, "ADInplaceOrView", with_keyset=True)


class _Rope(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        q: torch.Tensor,
        k: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        q_weight: torch.Tensor | None,
        k_weight: torch.Tensor | None,
        eps: float,
        interleaved: bool,
        backend: str,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        ctx.options = eps, interleaved, backend
        # The rotation is undone from the tables alone. Only the norm needs its input.
        saved_q, saved_k = (q if q_weight is not None else None), (k if k_weight is not None else None)
        ctx.save_for_backward(saved_q, saved_k, cos, sin, q_weight, k_weight)
        out: tuple[torch.Tensor, torch.Tensor] = _fwd(q, k, cos, sin, q_weight, k_weight, eps, interleaved, backend)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_q: torch.Tensor, grad_k: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        q, k, cos, sin, q_weight, k_weight = ctx.saved_tensors
        grad_q, grad_k, grad_q_weight, grad_k_weight = torch.ops.vlmkernels.rope_bwd(
            grad_q, grad_k, q, k, cos, sin, q_weight, k_weight, *ctx.options
        )
        return (
            grad_q,
            grad_k,
            None,
            None,
            None if q_weight is None else grad_q_weight,
            None if k_weight is None else grad_k_weight,
            None,
            None,
            None,
        )


class _RopeQkv(torch.autograd.Function):
    """In place with ``in_place``; otherwise the result is new, and the caller copies it back."""

    @staticmethod
    def forward(
        ctx: Any,
        qkv: torch.Tensor,
        cos: torch.Tensor,
        sin: torch.Tensor,
        heads: int,
        kv_heads: int,
        interleaved: bool,
        backend: str,
        in_place: bool,
    ) -> torch.Tensor:
        ctx.options = heads, kv_heads, interleaved, backend
        ctx.save_for_backward(cos, sin)
        if in_place:
            ctx.mark_dirty(qkv)
        else:
            qkv = qkv.clone()
        torch.ops.vlmkernels.rope_qkv_(qkv, cos, sin, None, None, heads, kv_heads, 0.0, interleaved, backend)
        return qkv

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return torch.ops.vlmkernels.rope_qkv_bwd(grad, cos, sin, *ctx.options), None, None, None, None, None, None, None


def _tables(
    cos: torch.Tensor, sin: torch.Tensor, lead: torch.Size, head_dim: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tables with one dimension less than q has, as the ops take them: ``[B|1, S, R/2]``, or ``[T, R/2]`` when packed."""
    shape, dtype, batched = cos.shape, cos.dtype, len(lead) == 2
    if not dtype.is_floating_point or cos.device != device:
        raise bad_argument("cos", f"{dtype} on {cos.device}", f"a floating dtype on {device}")
    if shape != sin.shape or dtype != sin.dtype or sin.device != device:
        wanted = f"the shape, dtype and device of cos, {tuple(shape)} {dtype} on {device}"
        raise bad_argument("sin", f"{tuple(sin.shape)} {sin.dtype} on {sin.device}", wanted)
    if cos.requires_grad or sin.requires_grad:
        name = "cos" if cos.requires_grad else "sin"
        raise bad_argument(name, "a tensor that requires grad", "a table without gradient (rope computes none for it)")
    dims = len(shape)
    fits = dims == 2 or (dims == 3 and (shape[0] == 1 or (batched and shape[0] == lead[0])))
    if not fits or 2 * shape[-1] > head_dim or shape[-2] != lead[-1]:
        wanted = f"[{lead[0]} or 1, {lead[1]}, R/2]" if batched else f"[{lead[0]}, R/2] or [1, {lead[0]}, R/2]"
        raise bad_argument("cos", tuple(shape), f"{wanted} with R <= {head_dim}")
    if batched and dims == 2:
        return cos.unsqueeze(0), sin.unsqueeze(0)
    if not batched and dims == 3:
        return cos.squeeze(0), sin.squeeze(0)
    return cos, sin


def _shares_memory(x: torch.Tensor) -> bool:
    """Whether elements of ``x`` may lie at one place, as those of an expanded tensor do."""
    dims = [(stride, size - 1) for stride, size in zip(x.stride(), x.shape, strict=True) if size > 1]
    for i, (stride, _) in enumerate(dims):  # torch.compile does not sort sizes that it does not know
        if stride <= sum([other * steps for j, (other, steps) in enumerate(dims) if j != i and other <= stride]):
            return True
    return False


def _check_weights(q_weight: torch.Tensor | None, k_weight: torch.Tensor | None, like: torch.Tensor, head_dim: int) -> None:
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is None:
            continue
        if weight.shape != (head_dim,):
            raise bad_argument(name, tuple(weight.shape), f"[{head_dim}], the head dimension")
        if not weight.is_floating_point() or weight.device != like.device:
            raise bad_argument(name, f"{weight.dtype} on {weight.device}", f"a floating dtype on {like.device}")


def _needs_grad(*tensors: torch.Tensor | None) -> bool:
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def rope(
    q: torch.Tensor,
    k: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rotate the first ``R`` channels of each head of ``q`` and ``k``; the other ``D - R`` channels pass through.

    Pair ``p`` of a head at token ``s`` becomes ``(a cos - b sin, a sin + b cos)`` with ``cos[s, p]`` and ``sin[s, p]``, where
    ``(a, b)`` are the channels ``(p, p + R/2)``, or ``(2p, 2p + 1)`` with ``interleaved``. M-RoPE "interleaved" (Qwen3-VL) is
    about which position axis a pair follows, so it is in the tables; its pairs are those of ``interleaved=False``.

    With a weight, the head first becomes ``x / sqrt(mean(x^2) + eps) * weight``, the mean over all ``D`` channels. Gemma's
    norm multiplies with ``1 + w``: pass ``1 + w``. ``q_weight`` and ``k_weight`` are independent of each other.

    The mathematics is in fp32 (fp64 for fp64 inputs), and the result is rounded once to the dtype of the input.

    Args:
        q: ``[B, S, H, D]``, or packed ``[T, H, D]``; fp32, bf16, fp16 (fp64 on the reference and torch backends); any strides.
        k: ``[B, S, Hk, D]``, or packed ``[T, Hk, D]``, of the dtype of ``q``. ``Hk`` may be 0 where only q is to be rotated.
        cos: ``[B|1, S, R/2]`` or ``[S, R/2]`` (packed: ``[T, R/2]`` or ``[1, T, R/2]``), fp32 or any floating dtype.
        sin: like ``cos``.
        q_weight: ``[D]``, the weight of the norm of q, or None for no norm.
        k_weight: ``[D]``, the weight of the norm of k, or None for no norm.
        eps: added to the mean square.
        interleaved: neighbouring channels are a pair.
        backend: the backend that must run, or None for the first that can.

    Returns:
        The new ``q`` and ``k``, contiguous. Gradients flow to ``q``, ``k`` and the weights.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together, ``D`` is odd, or a table requires grad.
        BackendError: the forced backend can't run these inputs.
    """
    settings, tensors = (float(eps), interleaved, forced_backend(backend)), (q, k, cos, sin, q_weight, k_weight)
    plan = _fwd.planned(settings, tensors)
    out: tuple[torch.Tensor, torch.Tensor] = _unplanned(settings, tensors) if plan is None else plan(*tensors)
    return out


def _unplanned(settings: tuple[Any, ...], tensors: tuple[Any, ...]) -> Any:
    """Check everything, run, and leave a plan for the next such call."""
    q, k, cos, sin, q_weight, k_weight = tensors
    q_shape, k_shape, dtype, device = q.shape, k.shape, q.dtype, q.device
    dims = len(q_shape)
    if (dims != 4 and dims != 3) or not dtype.is_floating_point:
        raise bad_argument("q", f"{tuple(q_shape)} {dtype}", "[B, S, H, D] or [T, H, D] of a floating dtype")
    lead, head_dim = q_shape[:-2], q_shape[-1]
    if head_dim % 2:
        raise bad_argument("q", f"a head dimension of {head_dim}", "an even one")
    if k_shape != q_shape and (len(k_shape) != dims or k_shape[:-2] != lead or k_shape[-1] != head_dim):
        raise bad_argument("k", tuple(k_shape), f"the shape of q, {tuple(q_shape)}, except for the number of heads")
    if k.dtype != dtype or k.device != device:
        raise bad_argument("k", f"{k.dtype} on {k.device}", f"{dtype} on {device}, as q has")
    cos, sin = _tables(cos, sin, lead, head_dim, device)
    _check_weights(q_weight, k_weight, q, head_dim)
    if _needs_grad(q, k, q_weight, k_weight):
        # torch.compile takes no tensor twice as an input of an autograd.Function.
        k = k.view_as(k) if k is q else k
        k_weight = k_weight.view_as(k_weight) if k_weight is not None and k_weight is q_weight else k_weight
        return _Rope.apply(q, k, cos, sin, q_weight, k_weight, *settings)
    arguments = (q, k, cos, sin, q_weight, k_weight, *settings)
    out = _fwd(*arguments)
    _fwd.plan(settings, tensors, arguments)
    return out


def rope_qkv_(
    qkv: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    *,
    num_heads: int,
    num_kv_heads: int,
    q_weight: torch.Tensor | None = None,
    k_weight: torch.Tensor | None = None,
    eps: float = 1e-6,
    interleaved: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """``rope`` in place on the q and k of a packed projection; v is not touched. Returns ``qkv``.

    Args:
        qkv: ``[B, S, (H + 2 Hk) D]``, or packed ``[T, (H + 2 Hk) D]``: all heads of q, then of k, then of v. Any strides whose
            elements do not overlap.
        cos: as for ``rope``.
        sin: as for ``rope``.
        num_heads: ``H``, heads of q.
        num_kv_heads: ``Hk``, heads of k and of v.
        q_weight: as for ``rope``.
        k_weight: as for ``rope``.
        eps: as for ``rope``.
        interleaved: as for ``rope``.
        backend: as for ``rope``.

    Raises:
        ValueError: as for ``rope``; the width of ``qkv`` is not ``(H + 2 Hk) D``; elements of ``qkv`` share memory; or there is
            a weight while a gradient is needed, because the norm's gradient needs the input that this call overwrites (use
            ``rope`` on the slices).
        RuntimeError: ``qkv`` is a leaf that requires grad, or a view of one, as for every in-place operation of torch.
        BackendError: the forced backend can't run these inputs.
    """
    settings = num_heads, num_kv_heads, float(eps), interleaved, forced_backend(backend)
    tensors = qkv, cos, sin, q_weight, k_weight
    plan = _in_place.planned(settings, tensors)
    if plan is None:
        return _unplanned_qkv(settings, tensors)
    plan(*tensors)
    if not qkv.is_inference():  # which has no version
        torch.autograd.graph.increment_version(qkv)
    return qkv


def _unplanned_qkv(settings: tuple[Any, ...], tensors: tuple[Any, ...]) -> torch.Tensor:
    """Check everything, run, and leave a plan for the next such call."""
    num_heads, num_kv_heads, eps, interleaved, name = settings
    qkv: torch.Tensor
    qkv, cos, sin, q_weight, k_weight = tensors
    heads = num_heads + 2 * num_kv_heads
    if min(num_heads, num_kv_heads) < 0 or heads == 0:
        raise bad_argument("num_heads, num_kv_heads", (num_heads, num_kv_heads), "at least one head and no negative number")
    if qkv.dim() not in (2, 3) or not qkv.is_floating_point() or qkv.shape[-1] % (2 * heads):
        wanted = f"[B, S, {heads} D] or [T, {heads} D] of a floating dtype, D even"
        raise bad_argument("qkv", f"{tuple(qkv.shape)} {qkv.dtype}", wanted)
    if _shares_memory(qkv):
        raise bad_argument("qkv", f"strides {qkv.stride()}: its elements share memory", "a tensor that can be written in place")
    head_dim = qkv.shape[-1] // heads
    cos, sin = _tables(cos, sin, qkv.shape[:-1], head_dim, qkv.device)
    _check_weights(q_weight, k_weight, qkv, head_dim)
    if not _needs_grad(qkv, q_weight, k_weight):
        arguments = (qkv, cos, sin, q_weight, k_weight, *settings)
        torch.ops.vlmkernels.rope_qkv_(*arguments)
        _in_place.plan(settings, tensors, arguments)
        return qkv
    if q_weight is not None or k_weight is not None:
        what = "q_weight" if q_weight is not None else "k_weight"
        raise bad_argument(what, "a norm in place while a gradient is needed", "None, or rope() on the slices of qkv")
    refuse_leaf(qkv)
    compiling = torch.compiler.is_compiling()
    # Before torch 2.13 torch.compile loses mark_dirty, and with it the gradient. In a graph, where nothing is in place until the
    # end, the copy says the same.
    out: torch.Tensor = _RopeQkv.apply(qkv, cos, sin, num_heads, num_kv_heads, interleaved, name, not compiling)
    return qkv.copy_(out) if compiling else out

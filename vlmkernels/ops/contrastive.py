# SPDX-License-Identifier: Apache-2.0
"""The losses that align images and texts, CLIP's and SigLIP's, without the matrix of their logits."""

from typing import Any

import torch
from torch.autograd.function import once_differentiable

from vlmkernels.masks import KeyRanges
from vlmkernels.ops._op import Op, bad_argument, forced_backend
from vlmkernels.ops._pairs import Group, Pairs, compute_dtype, group_of, inverse_norms, pairs, positives, scalar, weights


def clip_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor | float,
    *,
    targets: torch.Tensor | KeyRanges | None = None,
    group: Any = None,
    gather_with_grad: bool = True,
    label_smoothing: float = 0.0,
    normalize: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """CLIP's loss (Radford et al. 2021): the mean of the cross-entropies of the rows and of the columns of the logits.

    ``s[i, j] = logit_scale * image[i] . text[j]``, and with ``P(i)`` the texts of image ``i``, its cross-entropy is
    ``logsumexp_j s[i, j] - mean of s[i, j] over P(i)``; that of a text likewise over the images, and the loss is the mean over
    the images plus the mean over the texts, halved. An image without a text, or a text without an image, has none and is not
    counted in the mean, but is among the others' wrong answers. With ``label_smoothing`` a target is the mean over ``P(i)``
    times ``1 - label_smoothing`` and the mean over all texts times ``label_smoothing``.

    Args:
        image: ``[M, D]``, bf16, fp16, fp32 or fp64, any strides.
        text: ``[N, D]``, of the dtype of ``image``.
        logit_scale: the factor itself (open_clip's ``logit_scale.exp()``): one floating number, tensor or not.
        targets: None where text ``i`` belongs to image ``i``; integers ``[N]``, the image of each text, of which one outside
            ``[0, M)`` is none; or ``KeyRanges`` of shape ``(1, M)``, the run of texts of each image. Several texts may belong to
            an image, and with ranges several images to a text.
        group: ranks that share the batch (``torch.distributed``). Each passes its own features, as many as any other, and
            targets that count these. The result is the loss of the whole batch, on every rank.
        gather_with_grad: with a group, the gradients of a rank's features are ``W`` times those of the whole batch's loss, for
            ``W`` ranks: what DistributedDataParallel, which takes the mean, needs to give the gradients of one process. False:
            as they are, which in open_clip is what ``gather_with_grad=False`` with ``local_loss=False`` gives.
        label_smoothing: from 0 to 1.
        normalize: divide each row of both by its length first, in the precision of the mathematics.
        backend: the backend that must run; by default the first that can.

    Returns:
        The loss, without dimensions, fp32 (fp64 for fp64). Gradients flow to both features and the scale, once. The mathematics
        is in fp32, and takes memory in proportion to ``M + N``, never to ``M * N``.

    Raises:
        ValueError: shapes, dtypes or devices that don't fit together, no rows, or ``targets`` missing where ``M != N``.
        BackendError: the forced backend can't run these inputs.
    """
    if not 0.0 <= label_smoothing <= 1.0:
        raise bad_argument("label_smoothing", label_smoothing, "a number from 0 to 1")
    p, shared, scale = pairs(image, text, targets), group_of(group), scalar("logit_scale", logit_scale, image)
    name, smoothing = forced_backend(backend), float(label_smoothing)
    if _needs_grad(p.a, p.b, scale):
        options = (p.start, p.stop, p.images, smoothing, normalize, shared, gather_with_grad, name)
        loss: torch.Tensor = _ClipLoss.apply(p.a, _another(p.b, p.a), scale, *options)
        return loss
    return _clip_forward(p, scale, smoothing, normalize, shared, name)[0]


def siglip_loss(
    image: torch.Tensor,
    text: torch.Tensor,
    logit_scale: torch.Tensor | float,
    logit_bias: torch.Tensor | float | None = None,
    *,
    targets: torch.Tensor | KeyRanges | None = None,
    group: Any = None,
    gather_with_grad: bool = True,
    normalize: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """SigLIP's loss (Zhai et al. 2023): every pair by itself, ``sum_ij softplus(-z[i, j] l[i, j]) / M``.

    ``l[i, j] = logit_scale * image[i] . text[j] + logit_bias``, and ``z[i, j]`` is 1 where text ``j`` belongs to image ``i``,
    else -1. Where a gradient is needed, the forward pass computes all of them beside the loss: they need no sum over a row
    first, and the backward pass multiplies them.

    Args:
        image: as for ``clip_loss``.
        text: as for ``clip_loss``.
        logit_scale: as for ``clip_loss``.
        logit_bias: what is added to every logit: one floating number, tensor or not; None for 0.
        targets: as for ``clip_loss``.
        group: as for ``clip_loss``.
        gather_with_grad: as for ``clip_loss``.
        normalize: as for ``clip_loss``.
        backend: as for ``clip_loss``.

    Returns:
        The loss, without dimensions, fp32 (fp64 for fp64). Gradients flow to both features, the scale and the bias, once.

    Raises:
        ValueError: as for ``clip_loss``.
        BackendError: the forced backend can't run these inputs.
    """
    p, shared, scale = pairs(image, text, targets), group_of(group), scalar("logit_scale", logit_scale, image)
    bias = scalar("logit_bias", 0.0 if logit_bias is None else logit_bias, image)
    name = forced_backend(backend)
    if _needs_grad(p.a, p.b, scale, bias):
        options = (p.start, p.stop, p.images, normalize, shared, gather_with_grad, name)
        loss: torch.Tensor = _SigLipLoss.apply(p.a, _another(p.b, p.a), scale, bias, *options)
        return loss
    return _siglip_forward(p, scale, bias, normalize, shared, name, grads=False)[0]


def _needs_grad(*tensors: torch.Tensor) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def _another(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """torch.compile takes no tensor twice as an input of an autograd.Function."""
    return x.view_as(x) if x is y else x


def _norms(a: torch.Tensor, b: torch.Tensor, normalize: bool) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    return (inverse_norms(a), inverse_norms(b)) if normalize else (None, None)


def _clip_forward(
    p: Pairs, scale: torch.Tensor, smoothing: float, normalize: bool, shared: Group | None, backend: str
) -> tuple[torch.Tensor, tuple[Any, ...], tuple[float, float]]:
    """The loss, the tensors that its backward pass needs, and the two factors of label smoothing."""
    b, arrival = (p.b, None) if shared is None else shared.start_gather(p.b)
    w = weights(p, smoothing, shared)
    if arrival is not None:
        arrival.wait()
    vectors = (w.start, w.stop, w.row, w.row_positive, w.column, w.column_positive, *_norms(p.a, b, normalize))
    smooth = (w.smooth_row, w.smooth_column)
    lse_a, lse_b, rows, loss = _clip_fwd(p.a, b, scale, *vectors, *smooth, backend)
    if shared is not None:
        lse_b, rows = shared.logsumexp(lse_b, rows)
        loss = rows + (w.column * lse_b).sum()
    return loss, (p.a, b, scale, *vectors, lse_a, lse_b), smooth


class _ClipLoss(torch.autograd.Function):
    """Computes the logits of this rank's ``a`` and everybody's ``b`` once for both directions, and again for the gradients.

    Only ``b`` and the log-sum-exps of its columns travel before the loss, and only the gradient of ``b`` after it.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: torch.Tensor,
        start: torch.Tensor | None,
        stop: torch.Tensor | None,
        images: int,
        smoothing: float,
        normalize: bool,
        shared: Group | None,
        gather_with_grad: bool,
        backend: str,
    ) -> torch.Tensor:
        p = Pairs(a, b, start, stop, images)
        loss, saved, smooth = _clip_forward(p, scale, smoothing, normalize, shared, backend)
        ctx.save_for_backward(*saved)
        ctx.smooth, ctx.shared, ctx.gather_with_grad, ctx.backend = smooth, shared, gather_with_grad, backend
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        shared: Group | None = ctx.shared
        a = ctx.saved_tensors[0]
        dtype = a.dtype if shared is None else compute_dtype(a)
        times = _times(shared, ctx.gather_with_grad)
        if times > 1:
            dloss = dloss * times
        da, db, dscale = _clip_bwd(dloss, *ctx.saved_tensors, *ctx.smooth, dtype, ctx.backend)
        if shared is not None:
            db, dscale = shared.scatter_sum(db), shared.sum(dscale / times)
        return da, db.to(a.dtype), dscale.to(ctx.saved_tensors[2].dtype), *[None] * 8


def _times(shared: Group | None, gather_with_grad: bool) -> int:
    """What the gradients of a rank's features are multiplied by."""
    return shared.size if shared is not None and gather_with_grad else 1


def _siglip_forward(
    p: Pairs,
    scale: torch.Tensor,
    bias: torch.Tensor,
    normalize: bool,
    shared: Group | None,
    backend: str,
    grads: bool = True,
) -> tuple[torch.Tensor, ...]:
    """The loss, and with ``grads`` this rank's gradients of ``a`` and ``b`` and those of scale and bias, one behind the other."""
    start, stop = positives(p, shared)
    b = p.b if shared is None else shared.gather(p.b)
    images = p.images if shared is None else p.images * shared.size
    norms = _norms(p.a, b, normalize)
    dtypes = _unscaled_dtype(p.a), _unscaled_dtype(b) if shared is None else compute_dtype(b)
    loss, da, db, dnumbers = _siglip_fwd(p.a, b, scale, bias, start, stop, *norms, 1.0 / images, grads, *dtypes, backend)
    if shared is not None:
        numbers = shared.sum(torch.cat((loss.reshape(1), dnumbers)))
        loss, dnumbers = numbers[0].clone(), numbers[1:]
        if grads:
            db = shared.scatter_sum(db)
    return loss, da, db, dnumbers


class _SigLipLoss(torch.autograd.Function):
    """The forward pass leaves the gradients for a loss whose own gradient is 1.

    The first backward pass multiplies them where they are and gives them away, so that they are never there twice. Another one
    over the same graph has them computed again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: torch.Tensor,
        bias: torch.Tensor,
        start: torch.Tensor | None,
        stop: torch.Tensor | None,
        images: int,
        normalize: bool,
        shared: Group | None,
        gather_with_grad: bool,
        backend: str,
    ) -> torch.Tensor:
        ctx.images, ctx.options, ctx.times = images, (normalize, shared, backend), _times(shared, gather_with_grad)
        ctx.dtypes = a.dtype, scale.dtype, bias.dtype
        loss, *gradients = _siglip_forward(Pairs(a, b, start, stop, images), scale, bias, *ctx.options)
        if torch.compiler.is_compiling():  # which plans the memory itself
            ctx.save_for_backward(*gradients)
        else:
            ctx.save_for_backward(a, b, scale, bias, start, stop)
            ctx.gradients = gradients
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dloss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        gradients = ctx.saved_tensors
        if not torch.compiler.is_compiling():
            gradients, ctx.gradients = ctx.gradients, None
            if gradients is None:
                a, b, scale, bias, start, stop = ctx.saved_tensors
                _, *gradients = _siglip_forward(Pairs(a, b, start, stop, ctx.images), scale, bias, *ctx.options)
        da, db, dnumbers = gradients
        if torch.compiler.is_compiling():
            # A tensor without dimensions would be rounded to the dtype of the other before the product.
            factor = dloss.reshape(1, 1) * ctx.times
            da, db, dnumbers = da * factor, db * factor, dnumbers * dloss
        else:
            _siglip_bwd(da, db, dnumbers, dloss, float(ctx.times), ctx.options[-1])
        dtype, *number_dtypes = ctx.dtypes
        dscale, dbias = (x.to(dtype) for x, dtype in zip(dnumbers.unbind(), number_dtypes, strict=True))
        return da.to(dtype), db.to(dtype), dscale, dbias, *[None] * 7


def _clip_fwd_fake(a: torch.Tensor, b: torch.Tensor, *_: Any) -> tuple[torch.Tensor, ...]:
    dtype = compute_dtype(a)
    return tuple(a.new_empty(shape, dtype=dtype) for shape in ((a.shape[0],), (b.shape[0],), (), ()))


def _clip_bwd_fake(dloss: torch.Tensor, a: torch.Tensor, b: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    return a.new_empty(a.shape), b.new_empty(b.shape, dtype=rest[-2]), a.new_empty((), dtype=compute_dtype(a))


def _unscaled_dtype(x: torch.Tensor) -> torch.dtype:
    """The dtype of a gradient that is yet to be multiplied: fp16 doesn't hold what a loss scaler has not multiplied."""
    return torch.float32 if x.dtype == torch.float16 else x.dtype


def _siglip_fwd_fake(a: torch.Tensor, b: torch.Tensor, *rest: Any) -> tuple[torch.Tensor, ...]:
    grads, *dtypes = rest[-4:-1]
    wide = compute_dtype(a)
    da, db = (x.new_empty(x.shape if grads else (0,), dtype=dtype) for x, dtype in zip((a, b), dtypes, strict=True))
    return a.new_empty((), dtype=wide), da, db, a.new_empty(2 if grads else 0, dtype=wide)


_VECTORS = (
    "Tensor start, Tensor stop, Tensor row, Tensor row_positive, Tensor column, Tensor column_positive, "
    "Tensor? inverse_a, Tensor? inverse_b"
)
# The log-sum-exps of the rows and of the columns; the weighted sum of the rows' less that of the logits of what belongs together;
# and the loss, that and the weighted sum of the columns'.
_clip_fwd = Op(
    "contrastive",
    f"clip_loss_fwd(Tensor a, Tensor b, Tensor scale, {_VECTORS}, float smooth_row, float smooth_column, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _clip_fwd_fake,
)
# The gradients of a, b and scale; that of b in fp32 where it is yet to be added up over ranks.
_clip_bwd = Op(
    "contrastive",
    f"clip_loss_bwd(Tensor dloss, Tensor a, Tensor b, Tensor scale, {_VECTORS}, Tensor lse_a, Tensor lse_b, float smooth_row, "
    "float smooth_column, ScalarType dtype_b, str backend) -> (Tensor, Tensor, Tensor)",
    _clip_bwd_fake,
)
# The loss, which is weight times the sum over all pairs, and with grads the gradients of a, of b, and of scale and bias.
_siglip_fwd = Op(
    "contrastive",
    "siglip_loss_fwd(Tensor a, Tensor b, Tensor scale, Tensor bias, Tensor start, Tensor stop, Tensor? inverse_a, "
    "Tensor? inverse_b, float weight, bool grads, ScalarType dtype_a, ScalarType dtype_b, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor)",
    _siglip_fwd_fake,
)
# What that left, times the gradient of the loss, that of the features so many times.
_siglip_bwd = Op(
    "contrastive",
    "siglip_loss_bwd_(Tensor(a!) da, Tensor(b!) db, Tensor(c!) dnumbers, Tensor dloss, float times, str backend) -> ()",
    lambda *_: None,
)

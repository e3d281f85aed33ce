# SPDX-License-Identifier: Apache-2.0
"""Several linear layers of one input as one matrix product, over weights that lie side by side in memory.

Keys and values, or queries too, of an attention read the same tokens, and so do the keys and values of every layer of a Q-Former.
A copy of their weights in one matrix would have to follow each step of an optimiser. Here the parameters themselves are
neighbours in one storage: the matrix is a view of them, which is never out of date.
"""

import weakref
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from vlmkernels.ops._op import LIBRARY, unwatched

Tensors = Sequence[torch.Tensor]
#: By the id of the first of several neighbours, as long as it lives: itself, where all of them lie, and the matrix of their rows.
#: The matrix holds their storage, so that nothing else can come to lie there.
_blocks: dict[int, tuple[weakref.ref[torch.Tensor], list[Any], torch.Tensor]] = {}


def adjacent(parts: Tensors) -> bool:
    """Whether each of these contiguous tensors begins in one storage where the one before it ends, with rows of one length."""
    first = parts[0]
    storage, address, columns, dtype = first.untyped_storage(), first.data_ptr(), first.shape[1:], first.dtype
    for part in parts:
        if part.data_ptr() != address or part.shape[1:] != columns or part.dtype != dtype or not part.is_contiguous():
            return False
        address += part.nbytes
    return address <= storage.data_ptr() + storage.nbytes()


def lay_side_by_side(parts: Sequence[torch.nn.Parameter]) -> None:
    """Move the values of these parameters into one storage, one behind the other; the parameters stay the same objects.

    Nothing happens where they lie so already, or can't: differing types, devices or lengths of rows, or tensors of a subclass.
    """
    first = parts[0]
    forget(parts)
    alike = all(
        type(part.data) is torch.Tensor
        and (part.dtype, part.device, part.shape[1:]) == (first.dtype, first.device, first.shape[1:])
        for part in parts
    )
    if not alike or len({id(part) for part in parts}) < len(parts) or adjacent(parts):
        return
    block = torch.cat([part.detach() for part in parts])
    for part, piece in zip(parts, block.split([len(part) for part in parts]), strict=True):
        part.data = piece


def packed_linear(x: torch.Tensor, weights: Tensors, biases: Tensors = ()) -> tuple[torch.Tensor, ...]:
    """``F.linear(x, weight, bias)`` for each weight: one product where ``lay_side_by_side`` has put them, else one for each.

    Args:
        x: ``[..., K]``.
        weights: ``[N_i, K]``.
        biases: ``[N_i]``, or none at all.

    Returns:
        ``[..., N_i]`` for each weight; of one product these are views, side by side in ``[..., N_1 + N_2 + ...]``.
    """
    # What is traced has no addresses to look at: there the op does when it runs. Autocast has no rule for the op.
    traced = _traced(x, weights)
    blocks = None if traced else _blocks_of(weights, biases)
    outputs: Any
    if torch.is_autocast_enabled(x.device.type) or (blocks is None and not traced):
        outputs = [F.linear(x, weight, bias) for weight, bias in zip_longest(weights, biases)]
    elif torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *weights, *biases)):
        outputs = _PackedLinear.apply(x, len(weights), *weights, *biases)
    else:
        y = torch.ops.vlmkernels.packed_linear_fwd(x, weights, biases) if blocks is None else F.linear(x, *blocks)
        outputs = y.split_with_sizes([weight.shape[0] for weight in weights], -1)
    return tuple(outputs)


def joined_linear(x: torch.Tensor, weights: Tensors, biases: Tensors = ()) -> torch.Tensor | None:
    """What ``packed_linear`` gives as one tensor ``[..., N_1 + N_2 + ...]``, whose gradient is wanted whole too.

    None where the weights are no neighbours, or where somebody watches.
    """
    watched = torch.is_autocast_enabled(x.device.type) or _traced(x, weights)
    blocks = None if watched else _blocks_of(weights, biases)
    return None if blocks is None else _JoinedLinear.apply(x, *blocks, len(weights), *weights, *biases)


def _blocks_of(weights: Tensors, biases: Tensors) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """The matrix of weights that are neighbours and the vector of biases, None without any; None where either are not."""
    weight, bias = _block(weights), _block(biases) if biases else None
    return None if weight is None or (len(biases) > 0 and bias is None) else (weight, bias)


def _joined(parts: Tensors) -> torch.Tensor:
    """The matrix that these are the rows of, without a copy where they are neighbours."""
    block = _block(parts)
    return torch.cat([part.detach() for part in parts]) if block is None else block


def _block(parts: Tensors) -> torch.Tensor | None:
    """The matrix of neighbours, a view. Found anew in each call it took the host six times as long as the product itself."""
    first, places = parts[0], [(part.data_ptr(), part.shape) for part in parts]
    key = id(first)
    known = _blocks.get(key)
    if known is not None and known[0]() is first and known[1] == places:
        return known[2]
    forget(parts)
    if not adjacent(parts):
        return None
    block = first.detach().as_strided((sum(part.shape[0] for part in parts), *first.shape[1:]), first.stride())
    _blocks[key] = weakref.ref(first, lambda _: _blocks.pop(key, None)), places, block
    return block


def forget(parts: Tensors) -> None:
    """Let go of the storage in which these were neighbours."""
    _blocks.pop(id(parts[0]), None)


def _run_fwd(x: torch.Tensor, weights: Tensors, biases: Tensors) -> torch.Tensor:
    return F.linear(x, _joined(weights), _joined(biases) if biases else None)


def _run_bwd(dy: torch.Tensor, weights: Tensors) -> torch.Tensor:
    return dy @ _joined(weights)


def _run_dweights(parts: Tensors, rows: torch.Tensor) -> torch.Tensor:
    dweights = rows.new_empty(sum(part.shape[1] for part in parts), rows.shape[1])
    pieces = dweights.split([part.shape[1] for part in parts])
    begin = 0
    while begin < len(parts):
        end = begin + 1
        while end < len(parts) and adjacent(parts[end - 1 : end + 1]):
            end += 1
        if end == begin + 1:
            torch.mm(parts[begin].t(), rows, out=pieces[begin])
        else:
            # As those of keys and values: one of the two alone has too few tiles for all multiprocessors.
            part, piece = (_stacked(x[begin], end - begin) for x in (parts, pieces))
            torch.bmm(part.mT, rows.expand(end - begin, -1, -1), out=piece)
        begin = end
    return dweights


def _stacked(first: torch.Tensor, count: int) -> torch.Tensor:
    """The first of so many neighbours of one shape, and those behind it."""
    return first.as_strided((count, *first.shape), (first.numel(), *first.stride()))


LIBRARY.define("packed_linear_fwd(Tensor x, Tensor[] weights, Tensor[] biases) -> Tensor")
LIBRARY.define("packed_linear_bwd(Tensor dy, Tensor[] weights) -> Tensor")
LIBRARY.define("packed_linear_dweights(Tensor[] parts, Tensor rows) -> Tensor")
LIBRARY.impl("packed_linear_fwd", _run_fwd, "CompositeExplicitAutograd")
LIBRARY.impl("packed_linear_bwd", _run_bwd, "CompositeExplicitAutograd")
LIBRARY.impl("packed_linear_dweights", _run_dweights, "CompositeExplicitAutograd")


def _fwd_fake(x: torch.Tensor, weights: Tensors, biases: Tensors) -> torch.Tensor:
    return x.new_empty(*x.shape[:-1], sum(weight.shape[0] for weight in weights))


def _bwd_fake(dy: torch.Tensor, weights: Tensors) -> torch.Tensor:
    return dy.new_empty(*dy.shape[:-1], weights[0].shape[1])


def _dweights_fake(parts: Tensors, rows: torch.Tensor) -> torch.Tensor:
    return rows.new_empty(sum(part.shape[1] for part in parts), rows.shape[1])


torch.library.register_fake("vlmkernels::packed_linear_fwd", _fwd_fake, lib=LIBRARY)
torch.library.register_fake("vlmkernels::packed_linear_bwd", _bwd_fake, lib=LIBRARY)
torch.library.register_fake("vlmkernels::packed_linear_dweights", _dweights_fake, lib=LIBRARY)


def _traced(x: torch.Tensor, weights: Tensors) -> bool:
    """Whether anybody watches, as torch.compile, a mode, fake tensors: then the op is called, which they know."""
    return not unwatched((x, weights[0]))


def _fwd(x: torch.Tensor, weights: Tensors, biases: Tensors) -> torch.Tensor:
    if not _traced(x, weights):
        return _run_fwd(x, weights, biases)
    y: torch.Tensor = torch.ops.vlmkernels.packed_linear_fwd(x, weights, biases)
    return y


def _bwd(dy: torch.Tensor, weights: Tensors) -> torch.Tensor:
    if not _traced(dy, weights):
        return _run_bwd(dy, weights)
    dx: torch.Tensor = torch.ops.vlmkernels.packed_linear_bwd(dy, weights)
    return dx


def _dweights(parts: Tensors, rows: torch.Tensor) -> torch.Tensor:
    """``part.T @ rows`` of each part, one behind the other; parts that are neighbours in memory in one batched product."""
    if not _traced(rows, parts):
        return _run_dweights(parts, rows)
    dweights: torch.Tensor = torch.ops.vlmkernels.packed_linear_dweights(parts, rows)
    return dweights


class _PackedLinear(torch.autograd.Function):
    """Gradients come back part by part: they are put together where that saves products, and not for the weights alone."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, count: int, *parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        weights, biases = parameters[:count], parameters[count:]
        ctx.save_for_backward(x, *weights)
        ctx.biased = len(biases) > 0  # not bool(): torch 2.11 cannot trace it
        return tuple(_fwd(x, weights, biases).split([weight.shape[0] for weight in weights], -1))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, _, *needs = ctx.needs_input_grad
        if needs_x:  # the sum over the parts then happens inside the product, in fp32
            dx, *of_parameters = _gradients(torch.cat(grads, -1), x, weights, ctx.biased, True, needs)
            return dx, None, *of_parameters
        parts = [grad.flatten(0, -2) for grad in grads]
        wanted = [part for part, need in zip(parts, needs, strict=False) if need]
        found = iter(_dweights(wanted, x.flatten(0, -2)).split([part.shape[1] for part in wanted]) if wanted else ())
        dweights = [next(found) if need else None for need in needs[: len(weights)]]
        dbiases = [part.sum(0) if need else None for part, need in zip(parts, needs[len(weights) :], strict=False)]
        return None, None, *dweights, *dbiases


class _JoinedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, count: int, *parameters: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(x, *parameters[:count])
        ctx.biased = bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, *weights = ctx.saved_tensors
        needs_x, _, _, _, *needs = ctx.needs_input_grad
        dx, *of_parameters = _gradients(dy, x, weights, ctx.biased, needs_x, needs)
        return dx, None, None, None, *of_parameters


def _gradients(
    dy: torch.Tensor, x: torch.Tensor, weights: Tensors, biased: bool, needs_x: bool, needs: Sequence[bool]
) -> tuple[torch.Tensor | None, ...]:
    """Those of x, the weights and the biases, from the gradient of all parts as one matrix."""
    count, sizes, rows = len(weights), [weight.shape[0] for weight in weights], dy.flatten(0, -2)
    dx = _bwd(dy, weights) if needs_x else None
    dweights = (rows.t() @ x.flatten(0, -2)).split_with_sizes(sizes) if any(needs[:count]) else ()
    dbiases = rows.sum(0).split_with_sizes(sizes) if biased and any(needs[count:]) else ()
    found = *(dweights or [None] * count), *(dbiases or [None] * (len(needs) - count))
    return dx, *[gradient if need else None for gradient, need in zip(found, needs, strict=True)]

# SPDX-License-Identifier: Apache-2.0
"""The losses of open_clip as modules: its constructor arguments and its call, without the matrix of logits."""

from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from vlmkernels.ops._op import bad_argument
from vlmkernels.ops.contrastive import clip_loss, siglip_loss

_DIST_IMPLS = (None, "bidir", "shift", "reduce", "gather")


class _Loss(nn.Module):
    """The ranks that share a batch, as open_clip is told of them."""

    def __init__(self, cache_labels: bool, rank: int, world_size: int, group: Any) -> None:
        super().__init__()
        if world_size < 1 or not 0 <= rank < world_size:
            raise bad_argument("rank, world_size", (rank, world_size), "a rank from 0 to world_size - 1")
        if group is not None and world_size == 1:
            raise bad_argument("group", group, "None where world_size is 1")
        self.cache_labels, self.rank, self.world_size, self.group = cache_labels, rank, world_size, group

    def _group(self) -> Any:
        """The process group of a call, None for one rank. It need not exist yet when the module is made."""
        if self.world_size == 1:
            return None
        group = dist.group.WORLD if self.group is None and dist.is_available() and dist.is_initialized() else self.group
        if group is None or (dist.get_world_size(group), dist.get_rank(group)) != (self.world_size, self.rank):
            got = "no process group" if group is None else f"rank {dist.get_rank(group)} of {dist.get_world_size(group)}"
            raise bad_argument("world_size", got, f"rank {self.rank} of {self.world_size}, as the module was told")
        return group

    def extra_repr(self) -> str:
        return f"rank={self.rank}, world_size={self.world_size}"


class ClipLoss(_Loss):
    """``clip_loss`` in the place of open_clip's ``ClipLoss``.

    With several ranks it returns the loss of the whole batch, on every rank. open_clip's ``local_loss=True`` returns each rank's
    share, whose mean over the ranks is that; the gradients are the same. They are those of ``gather_with_grad`` (see
    ``clip_loss``), where True is what training wants.

    Args:
        local_loss: whether open_clip would compute a rank's own rows of the logits only. Here every rank always does.
        gather_with_grad: whether the features of other ranks have gradients. False divides those of all features by the number
            of ranks, as in open_clip, and together with ``local_loss`` is refused: it leaves out part of the gradient.
        cache_labels: taken and not needed, as there are no labels.
        rank: this process among ``world_size``.
        world_size: how many processes share the batch.
        use_horovod: refused if True.
        group: the process group of ``torch.distributed``, by default the one of all processes.
        label_smoothing: as for ``clip_loss``.
    """

    def __init__(
        self,
        local_loss: bool = False,
        gather_with_grad: bool = False,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        use_horovod: bool = False,
        *,
        group: Any = None,
        label_smoothing: float = 0.0,
    ) -> None:
        super().__init__(cache_labels, rank, world_size, group)
        if use_horovod:
            raise bad_argument("use_horovod", use_horovod, "False: the ranks share through torch.distributed")
        if local_loss and not gather_with_grad and world_size > 1:
            wanted = "True with local_loss: without it the gradients miss what other ranks' rows give this rank's features"
            raise bad_argument("gather_with_grad", gather_with_grad, wanted)
        self.local_loss, self.gather_with_grad, self.label_smoothing = local_loss, gather_with_grad, label_smoothing

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | None = None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The loss of ``[N, D]`` features, or ``{"contrastive_loss": loss}`` with ``output_dict``.

        ``logit_bias`` must be None: it would be added to every logit, which a softmax doesn't see.
        """
        if logit_bias is not None:
            raise bad_argument("logit_bias", "a bias", "None: a softmax doesn't see what is added to every logit")
        loss = clip_loss(
            image_features, text_features, logit_scale, group=self._group(), gather_with_grad=self.gather_with_grad,
            label_smoothing=self.label_smoothing,
        )  # fmt: skip
        return {"contrastive_loss": loss} if output_dict else loss


class SigLipLoss(_Loss):
    """``siglip_loss`` in the place of open_clip's ``SigLipLoss``.

    With several ranks it returns the loss of the whole batch, on every rank: the mean of what open_clip returns on each. The
    gradients are open_clip's.

    Args:
        cache_labels: taken and not needed, as there are no labels.
        rank: this process among ``world_size``.
        world_size: how many processes share the batch.
        dist_impl: ``"bidir"``, ``"shift"``, ``"reduce"`` or ``"gather"``, by which open_clip passes the texts round. Here they
            are gathered, whichever is named; the result is the same.
        group: the process group of ``torch.distributed``, by default the one of all processes.
    """

    def __init__(
        self,
        cache_labels: bool = False,
        rank: int = 0,
        world_size: int = 1,
        dist_impl: str | None = None,
        *,
        group: Any = None,
    ) -> None:
        super().__init__(cache_labels, rank, world_size, group)
        if dist_impl not in _DIST_IMPLS:
            raise bad_argument("dist_impl", repr(dist_impl), "bidir, shift, reduce, gather or None")
        self.dist_impl = dist_impl

    def forward(
        self,
        image_features: torch.Tensor,
        text_features: torch.Tensor,
        logit_scale: torch.Tensor | float,
        logit_bias: torch.Tensor | float | None = None,
        output_dict: bool = False,
    ) -> torch.Tensor | dict[str, torch.Tensor]:
        """The loss of ``[N, D]`` features, or ``{"contrastive_loss": loss}`` with ``output_dict``."""
        loss = siglip_loss(image_features, text_features, logit_scale, logit_bias, group=self._group())
        return {"contrastive_loss": loss} if output_dict else loss

# SPDX-License-Identifier: Apache-2.0
"""The drop-ins for open_clip's losses in one process; tests/test_contrastive_group.py has them among ranks."""

import inspect

import pytest
import torch
import torch.nn.functional as F

from vlmkernels import nn, use_backend
from vlmkernels.testing import compare

#: The arguments of open_clip's constructors with their defaults, in order.
ARGUMENTS = {
    "ClipLoss": {
        "local_loss": False,
        "gather_with_grad": False,
        "cache_labels": False,
        "rank": 0,
        "world_size": 1,
        "use_horovod": False,
    },
    "SigLipLoss": {"cache_labels": False, "rank": 0, "world_size": 1, "dist_impl": None},
}


@pytest.fixture
def features(device: torch.device) -> list[torch.Tensor]:
    return [F.normalize(torch.randn(12, 8, device=device)).requires_grad_() for _ in range(2)]


@pytest.mark.parametrize("name", ARGUMENTS)
def test_arguments_are_those_of_open_clip(name: str) -> None:
    parameters = inspect.signature(getattr(nn, name)).parameters.values()
    positional = {p.name: p.default for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}
    assert positional == ARGUMENTS[name] and list(positional) == list(ARGUMENTS[name])


def test_clip_loss(features: list[torch.Tensor], device: torch.device) -> None:
    image, text = features
    scale = torch.tensor(20.0, device=device, requires_grad=True)
    loss = nn.ClipLoss(local_loss=True, cache_labels=True)
    logits, labels = scale.double() * image.double() @ text.double().T, torch.arange(12, device=device)
    wanted = (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2
    with use_backend("torch"):
        value = loss(image, text, scale)
        assert compare(value, wanted, "gemm")
        for x, y in zip(*(torch.autograd.grad(v, [*features, scale]) for v in (value, wanted)), strict=True):
            assert compare(x, y, "gemm", terms=0.0 if x.dim() else 1.0)
        assert list(loss(image, text, scale, output_dict=True)) == ["contrastive_loss"]
        assert torch.equal(
            loss(image_features=image, text_features=text, logit_scale=scale, output_dict=True)["contrastive_loss"], value
        )
        smooth = nn.ClipLoss(label_smoothing=0.1)(image, text, scale)
    both = [F.cross_entropy(x, labels, label_smoothing=0.1) for x in (logits, logits.T)]
    assert compare(smooth, sum(both) / 2, "gemm")
    assert not loss.state_dict() and "world_size=1" in repr(loss)


def test_siglip_loss(features: list[torch.Tensor], device: torch.device) -> None:
    image, text = features
    scale, bias = (torch.tensor(x, device=device, requires_grad=True) for x in (10.0, -10.0))
    loss = nn.SigLipLoss(dist_impl="gather")
    logits = scale.double() * image.double() @ text.double().T + bias.double()
    wanted = -F.logsigmoid((2 * torch.eye(12, device=device) - 1) * logits).sum() / 12
    with use_backend("torch"):
        value = loss(image, text, scale, bias)
        assert compare(value, wanted, "gemm")
        for x, y in zip(*(torch.autograd.grad(v, [*features, scale, bias]) for v in (value, wanted)), strict=True):
            assert compare(x, y, "gemm", terms=0.0 if x.dim() else 1.0)
        assert list(loss(image, text, scale, bias, output_dict=True)) == ["contrastive_loss"]


def test_refusals(features: list[torch.Tensor]) -> None:
    with pytest.raises(ValueError, match="use_horovod: got True, wanted False"):
        nn.ClipLoss(use_horovod=True)
    with pytest.raises(ValueError, match="gather_with_grad: got False, wanted True with local_loss"):
        nn.ClipLoss(local_loss=True, rank=1, world_size=2)
    with pytest.raises(ValueError, match="rank, world_size: got"):
        nn.SigLipLoss(rank=2, world_size=2)
    with pytest.raises(ValueError, match="dist_impl: got 'ring'"):
        nn.SigLipLoss(dist_impl="ring")
    with pytest.raises(ValueError, match="group: got"):
        nn.SigLipLoss(group="all")
    with pytest.raises(ValueError, match="logit_bias: got a bias, wanted None"):
        nn.ClipLoss()(*features, 1.0, torch.zeros(()))
    with pytest.raises(ValueError, match="world_size: got no process group, wanted rank 1 of 2"):
        nn.SigLipLoss(rank=1, world_size=2)(*features, 1.0, 0.0)

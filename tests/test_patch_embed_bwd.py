# SPDX-License-Identifier: Apache-2.0
"""Gradients of patch embedding where rows of prefix tokens, shares of the images, huge values or many pixels make them hard."""

from dataclasses import replace

import pytest
import torch
from test_patch_embed import BWD, FLAVOURS, FWD, SMALL, Flavour, double, embed, every_backend, gradients, stock

from vlmkernels.testing.compare import compare


@every_backend
@pytest.mark.parametrize("name", ["small", "five prefix tokens", "norm", "own positions and norm"])
def test_infinities_of_prefix_tokens_stay_out_of_the_weight(name: str, backend: str, device: torch.device) -> None:
    """The rows of prefix tokens lie between those of the patches: nothing of them may reach the weight, not even 0 * inf."""
    flavour = {
        "small": replace(SMALL, norm=False),
        "five prefix tokens": FLAVOURS["dinov2-reg"],
        "norm": SMALL,
        "own positions and norm": replace(SMALL, pos="batch"),
    }[name]
    tensors = flavour.inputs(torch.float16, device)
    grad = torch.randn(2, flavour.prefix + flavour.grid, flavour.dim).to(device, torch.float16)
    grad[0, 0, 3], grad[1, flavour.prefix - 1, 17] = float("inf"), float("nan")
    exact = gradients(lambda t: stock(flavour, t), double(tensors), grad.double())
    got = gradients(lambda t: embed(flavour, t, backend=backend), tensors, grad)
    assert not any(exact[what].isnan().any() for what in ("pixels", "weight", "bias"))
    for what in ("pixels", "weight", "bias"):
        assert compare(got[what], exact[what], "grad" if flavour.norm else "gemm"), what
    assert torch.equal(got["prefix_tokens"].isfinite(), exact["prefix_tokens"].isfinite())


@every_backend
@pytest.mark.parametrize("pos", ["all", "patches", "batch", "none"])
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
def test_each_gradient_alone_and_each_left_out(norm: bool, pos: str, backend: str, device: torch.device) -> None:
    """What is not asked for is not computed, and what is doesn't depend on the rest."""
    flavour = replace(SMALL, pos=pos, norm=norm)
    tensors = flavour.inputs(torch.float32, device)
    grad = torch.randn(2, 1 + flavour.grid, flavour.dim).to(device)
    exact = gradients(lambda t: stock(flavour, t), double(tensors), grad.double())
    for asked in ([name] for name in tensors), ([n for n in tensors if n != name] for name in tensors):
        for names in asked:
            leaves = {name: t.detach().requires_grad_(name in names) for name, t in tensors.items()}
            grads = torch.autograd.grad(embed(flavour, leaves, backend=backend), [leaves[n] for n in names], grad)
            for name, got in zip(names, grads, strict=True):
                assert compare(got, exact[name], "gemm"), (name, names)


@pytest.mark.backends(FWD, BWD, exclude=("reference", "torch", "cuda"))
@pytest.mark.parametrize("norm", [False, True], ids=["plain", "norm"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_triton_sums_in_shares(
    prefix: int, norm: bool, backend: str, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More images, positions and columns than one program takes: it cuts several strips, and sums over rows come in shares."""
    from vlmkernels.backends.triton import _patch_embed_cut as cut
    from vlmkernels.backends.triton import patch_embed as triton

    for module in triton, cut:
        monkeypatch.setattr(module, "multiprocessors", lambda device: 1)
    monkeypatch.setattr(cut, "_cut", cut._cut.__wrapped__)
    flavour = Flavour((37, 3, 8, 12), (4, 4), 6, dim=264, prefix=prefix, norm=norm)
    tensors = flavour.inputs(torch.float32, device)
    grad = torch.randn(37, prefix + flavour.grid, flavour.dim).to(device)
    exact = gradients(lambda t: stock(flavour, t), double(tensors), grad.double())
    for name, got in gradients(lambda t: embed(flavour, t, backend=backend), tensors, grad).items():
        assert compare(got, exact[name], "gemm"), name


@every_backend
def test_same_bits_every_time(backend: str, device: torch.device) -> None:
    tensors = SMALL.inputs(torch.float16, device)
    grad = torch.randn(2, 1 + SMALL.grid, SMALL.dim).to(device, torch.float16)
    first, second = (gradients(lambda t: embed(SMALL, t, backend=backend), tensors, grad) for _ in range(2))
    for name in ("bias", "prefix_tokens", "pos_embed", "norm_weight", "norm_bias"):
        assert torch.equal(first[name], second[name]), name


@pytest.mark.gpu
@pytest.mark.backends(BWD, exclude=("reference", "cuda"))
def test_pixel_gradients_beyond_31_bits(backend: str, device: torch.device) -> None:
    """More than 2^31 pixels with a gradient, those of one image given many times."""
    flavour, batch = Flavour((1, 3, 360, 720), (8, 8), 4050, dim=16, bias=False, pos="none"), 2800
    tensors = flavour.inputs(torch.bfloat16, device)
    grad = torch.randn(1, 4050, 16, device="cpu").to(device, torch.bfloat16)
    exact = gradients(lambda t: stock(flavour, t), double(tensors), grad.double())["pixels"]
    pixels = tensors["pixels"].expand(batch, -1, -1, -1).detach().requires_grad_()
    times = 2.0 ** (torch.arange(batch, device=device) % 7)
    out = embed(flavour, tensors | {"pixels": pixels}, backend=backend)
    (got,) = torch.autograd.grad(out, pixels, (grad * times[:, None, None]).bfloat16())
    assert got.numel() > 2**31
    for image in (0, 1381, 2762, batch - 1):
        assert compare(got[image : image + 1], exact * times[image].double(), "gemm"), image

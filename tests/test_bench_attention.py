# SPDX-License-Identifier: Apache-2.0
"""The benchmark of attention: every builder at a small size, its peers, those of a GPU through stand-ins, its counts."""

import dataclasses
import importlib
import inspect
import sys
import types
from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from test_bench import CPU, agree, one

from vlmkernels import use_backend
from vlmkernels.bench import Unavailable, attention, peers
from vlmkernels.bench.attention import mask_cost, packed_attention, packed_case, random_attention
from vlmkernels.bench.peers import PackedInputs
from vlmkernels.bench.workloads import OURS


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "bwd"])
@pytest.mark.parametrize("mask", ["", "causal", "prefix", "image_blocks"])
def test_masks_agree_with_ours(mask: str, backward: bool) -> None:
    rows = agree(random_attention((2, 4, 2, 320, 320, 16), mask, backward))
    assert [row.provider for row in rows] == [OURS, "sdpa dense mask" if mask in ("prefix", "image_blocks") else "sdpa"]


@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "bwd"])
def test_packed_images_agree_with_ours(backward: bool) -> None:
    assert [row.provider for row in agree(packed_attention((5, 24, 9), 2, 16, backward))] == [OURS, "sdpa split"]
    assert [row.provider for row in agree(packed_attention((8,) * 5, 2, 16, backward))] == [OURS, "sdpa batched"]


def test_work_of_packed_images() -> None:
    """2 * 2 + 3 * 3 pairs in each of 2 heads, and 5 tokens of 2 * 4 values in fp32, four times."""
    forward, backward = (packed_attention((2, 3), 2, 4, backward)(CPU) for backward in (False, True))
    assert forward.flops == 2 * 13 * (2 * 4) * 2 and backward.flops == 2.5 * forward.flops
    assert forward.bytes == 4 * 5 * 2 * 4 * 4 and backward.bytes == 2 * forward.bytes


def test_a_packed_image_that_sees_its_neighbour_is_wrong() -> None:
    """The exact result knows no mask: a wrong one shows."""
    case = packed_attention((5, 24, 9), 2, 16)(CPU)
    q, k, v = (torch.randn(1, 2, 38, 16, generator=torch.Generator().manual_seed(0)) for _ in range(3))
    assert not all(case.check(F.scaled_dot_product_attention(q, k, v)[0].transpose(0, 1)))


def _sequences(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, cu_q: torch.Tensor, cu_k: torch.Tensor) -> torch.Tensor:
    """What a varlen function computes: attention from one of the cumulative lengths to the next."""
    assert cu_q.dtype == cu_k.dtype == torch.int32
    pieces = [
        F.scaled_dot_product_attention(
            *(x[None, first:last].transpose(1, 2) for x, first, last in ((q, *of_q), (k, *of_k), (v, *of_k)))
        )
        for of_q, of_k in zip(_pairs(cu_q), _pairs(cu_k), strict=True)
    ]
    return torch.cat(pieces, 2)[0].transpose(0, 1)


def _pairs(cu: torch.Tensor) -> list[tuple[int, int]]:
    ends = cu.tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))


@pytest.fixture
def gpu_peers(monkeypatch: pytest.MonkeyPatch) -> None:
    """The peers of a GPU on a CPU: torch.compile without kernels, and stand-ins for what is a package or a GPU's alone."""

    def torch_varlen(*args: Any) -> torch.Tensor:
        if real is not None:
            inspect.signature(real).bind(*args)
        q, k, v, cu_q, cu_k, max_q, max_k = args
        assert max_q == max_k == max(last - first for first, last in _pairs(cu_q))
        return _sequences(q, k, v, cu_q, cu_k)

    def flash_varlen(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *,
        cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, max_seqlen_q: int, max_seqlen_k: int,
    ) -> torch.Tensor:  # fmt: skip
        assert max_seqlen_q == max_seqlen_k == max(last - first for first, last in _pairs(cu_seqlens_q))
        return _sequences(q, k, v, cu_seqlens_q, cu_seqlens_k)

    def flash_varlen_with_lse(*args: Any, **kwargs: Any) -> tuple[torch.Tensor, None]:
        return flash_varlen(*args, **kwargs), None

    try:
        real = importlib.import_module("torch.nn.attention.varlen").varlen_attn
    except ImportError:
        real = None
    for module, function in {
        "torch.nn.attention.varlen": {"varlen_attn": torch_varlen},
        "flash_attn": {"flash_attn_varlen_func": flash_varlen},
        "flash_attn.cute": {"flash_attn_varlen_func": flash_varlen_with_lse},
    }.items():
        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**function))
    compile_ = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, **{"backend": "eager", **options}))
    for inputs in (peers.AttentionInputs, PackedInputs):
        monkeypatch.setattr(inputs, "on_gpu", True)


def _packed_bf16(lengths: tuple[int, ...]) -> PackedInputs:
    torch.manual_seed(0)
    q, k, v = (torch.randn(sum(lengths), 2, 16, dtype=torch.bfloat16) for _ in range(3))
    return PackedInputs(q, k, v, lengths)


@pytest.mark.usefixtures("gpu_peers")
@pytest.mark.parametrize("backward", [False, True], ids=["fwd", "bwd"])
def test_packed_peers_of_a_gpu_compute_the_same(backward: bool) -> None:
    """What a CPU does not have says so: FlexAttention's backward pass and its FlashAttention 4, two of SDPA's kernels."""
    flex = {"flex fa4 compiled", *(["flex compiled"] if backward else [])}
    for lengths, sdpa, gpu_only in (
        ((40, 96, 9, 33), {"sdpa split"}, set()),
        ((48,) * 4, {"sdpa flash batched"}, {"sdpa cudnn batched", "sdpa efficient batched"}),
    ):
        inputs = _packed_bf16(lengths)
        rows = {row.provider: row for row in one(lambda device, x=inputs: packed_case(x, backward))}
        missing = {name for name, row in rows.items() if row.status == "unavailable" and row.reason}
        assert missing == {*flex, *gpu_only}, [row for row in rows.values() if row.provider in missing]
        right = {"flex compiled", "torch varlen", "fa4 varlen", "fa2 varlen", OURS, *sdpa} - missing
        assert {name for name, row in rows.items() if row.status == "ok"} == right == set(rows) - missing
        assert rows["flex fa4 compiled"].reason == "flash_attn.cute is not installed"
        assert all(rows[name].error_over_floor <= 3 for name in right)


@pytest.mark.usefixtures("gpu_peers")
def test_a_varlen_peer_with_other_lengths_is_wrong() -> None:
    inputs = _packed_bf16((40, 96, 9, 33))
    case = packed_case(inputs)
    other = dataclasses.replace(inputs, lengths=(41, 95, 8, 34))
    for provider in peers.varlen_peers(other):
        assert not all(case.check(provider.prepare()())), provider.name


def test_varlen_peers_that_are_not_there_say_so(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in ("torch.nn.attention.varlen", "flash_attn", "flash_attn.cute"):
        monkeypatch.setitem(sys.modules, module, None)
    reasons = ["this torch has no torch.nn.attention.varlen", "flash_attn.cute is not installed", "flash_attn is not installed"]
    for provider, reason in zip(peers.varlen_peers(_packed_bf16((3, 4))), reasons, strict=True):
        with pytest.raises(Unavailable, match=f"^{reason}$"):
            provider.prepare()


@pytest.mark.usefixtures("gpu_peers")
@pytest.mark.parametrize("mask", ["causal", "prefix", "image_blocks"])
def test_flex_computes_the_same(mask: str) -> None:
    rows = {row.provider: row for row in one(random_attention((2, 4, 2, 320, 320, 16), mask))}
    assert rows["flex compiled"].status == "ok", rows["flex compiled"]
    assert ("flex fa4 compiled" in rows) == (mask != "causal")


@pytest.mark.parametrize("mask", attention.MASKS)
def test_mask_cost_compares_blocks(mask: str) -> None:
    """All three kinds of blocks are there, and one that is off shows."""
    with use_backend("reference"):
        rows = agree(mask_cost(mask, 1024))
        case = mask_cost(mask, 1024)(CPU)
        (bounds,) = case.ours.prepare()()
    assert [row.provider for row in rows] == [OURS, "flex create_block_mask"]
    (blocks,) = case.exact()
    assert blocks.shape == (8, 8) and set(blocks.flatten().tolist()) == {0, 1, 2}
    bounds.q_bounds[0, 4, 1] += 128
    assert not all(case.check((bounds,)))

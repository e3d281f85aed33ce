# SPDX-License-Identifier: Apache-2.0
"""The benchmark of the contrastive losses: ours against the dense form and the chunked loop at a small size, and its memory."""

import dataclasses
from collections.abc import Iterator

import pytest
import torch
from test_bench import CEILINGS, CPU, plant

from vlmkernels import use_backend
from vlmkernels.bench import contrastive, runner, suites
from vlmkernels.bench.runner import Options
from vlmkernels.bench.workloads import OURS, Case, Workload
from vlmkernels.ops.tile_bounds import TileBounds


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(contrastive, "CPU_PAIRS", 40)
    monkeypatch.setattr(contrastive, "CHUNK", 16)
    with use_backend("torch"):
        yield


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_peers_agree_with_ours(kind: str) -> None:
    work = Workload("s", "o", "w", "fwd+bwd", contrastive.loss_case(kind, 40, 24))
    rows = runner.run_workload(work, CPU, CEILINGS, Options(budget_ms=0.0))
    assert [row.provider for row in rows] == [OURS, "eager", "open_clip", "chunked loop"]
    for row in rows:
        if row.provider == "open_clip" and row.status == "unavailable":
            assert row.reason == "open_clip is not installed"
        else:
            assert row.status == "ok" and row.ms and row.error_over_floor <= row.bound, row


def test_a_wrong_gradient_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "clip_loss_bwd")
    build = contrastive.loss_case("clip", 40, 24)

    def judged(device: torch.device) -> Case:
        case = build(device)
        exact = case.exact()  # on the backend whose result is made wrong afterwards
        return dataclasses.replace(case, exact=lambda: tuple(x / 1.01 for x in exact))

    work = Workload("s", "o", "w", "fwd+bwd", judged)
    row = runner.run_workload(work, CPU, CEILINGS, Options(budget_ms=0.0, peers=("nobody",)))[0]
    assert (row.provider, row.status, row.ms) == (OURS, "wrong", None)


def test_the_suite() -> None:
    work = suites.workloads("contrastive")
    assert {w.direction for w in work} == {"fwd+bwd"} and len(work) == 22
    case = next(w for w in work if w.name == "SigLIP 32768 D768").build(CPU)
    assert case.flops == 8 * 40 * 40 * 768 and case.bytes == 2 * 2 * 40 * 768 * 4
    (one,) = [w for w in work if w.name == "CLIP 262144 D768"]
    assert one.gpu_only and [peer.name for peer in one.build(CPU).peers] == ["chunked loop"]


def test_bytes_of_results() -> None:
    """Of a tensor, of several, of those inside of others; what is no tensor counts as nothing."""
    x = torch.zeros(3, 4)
    assert runner.bytes_of(x) == 48 and runner.bytes_of((x, x.half())) == 72
    assert runner.bytes_of((TileBounds(x.int(), x.int()),)) == 96 and runner.bytes_of((object(), None)) == 0


@pytest.mark.gpu
def test_extra_memory(device: torch.device) -> None:
    """What a call holds for a while counts, its results don't."""
    x = torch.zeros(1 << 20, device=device)
    assert runner.extra_bytes(lambda: x + 1, device) == 0
    assert runner.extra_bytes(lambda: (x + 1).sum() + (x * 2).sum(), device) >= 4 << 20

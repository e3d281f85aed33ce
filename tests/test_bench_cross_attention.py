# SPDX-License-Identifier: Apache-2.0
"""The benchmark of cross-attention: every builder at a small size, ours against transformers, and its counts."""

from collections.abc import Iterator

import pytest
import torch
from test_bench import CEILINGS, CPU, agree, plant

from vlmkernels import use_backend
from vlmkernels.bench import cross_attention, runner, suites, towers
from vlmkernels.bench.runner import Options
from vlmkernels.bench.workloads import OURS, Workload

KEYS, C, E, INNER, Q = 9, 48, 40, 64, 6


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"hidden_size": C, "num_attention_heads": 3, "intermediate_size": INNER, "encoder_hidden_size": E}
    monkeypatch.setattr(towers, "QFORMER_CONFIG", {**towers.QFORMER_CONFIG, **sizes})
    monkeypatch.setattr(towers, "QFORMER_LAYERS", 3)
    monkeypatch.setattr(towers, "QUERIES", Q)
    monkeypatch.setattr(cross_attention, "BATCH", 3)


@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
def test_a_layer_agrees_with_ours(direction: str) -> None:
    assert [row.provider for row in agree(cross_attention.layer(KEYS, direction))] == [OURS, "hf"]


def test_the_whole_agrees_with_ours() -> None:
    for batch in (3, 1):
        assert [row.provider for row in agree(cross_attention.former(KEYS, batch))] == [OURS, "hf"]


def test_a_step_has_the_gradient_of_every_parameter() -> None:
    """But that of the bias of the keys, which is zero in exact arithmetic."""
    (mine,) = (cross_attention._models(CPU, torch.float32, 1)[1].encoder.layer[0].crossattention,)
    names = [f"d{name}" for name, _ in mine.named_parameters() if name != "attention.key.bias"]
    assert cross_attention.layer(KEYS, "fwd+bwd")(CPU).outputs == ("out", "dqueries", *names) and len(names) == 9


def test_counts() -> None:
    """The products of a layer, of 2 images and of the one query of a batch of 1, by hand."""
    layer, step = (cross_attention.layer(KEYS, direction)(CPU) for direction in ("fwd", "fwd+bwd"))
    rows, tokens = 2 * Q, 2 * KEYS
    cross = 2 * (rows * C * C + tokens * E * C * 2 + rows * C * C) + 4 * 2 * Q * KEYS * C
    assert layer.flops == cross and step.flops == 2 * cross
    rest = 2 * rows * C * (4 * C + 2 * INNER) + 4 * 2 * Q * Q * C
    assert cross_attention.former(KEYS, 2)(CPU).flops == 3 * rest + 2 * cross
    weights = 4 * (C * C + 2 * C * E + C * C + 6 * C)
    assert layer.bytes == 4 * (2 * rows * C + tokens * E) + weights


@pytest.mark.parametrize(
    "build", [cross_attention.layer(KEYS), cross_attention.layer(KEYS, "fwd+bwd"), cross_attention.former(KEYS)]
)
def test_a_wrong_attention_is_not_timed(build: object, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, "attention_fwd")
    row, _ = runner.run_workload(Workload("s", "o", "w", "fwd", build), CPU, CEILINGS, Options(budget_ms=0.0))  # type: ignore[arg-type]
    assert (row.provider, row.status, row.ms) == (OURS, "wrong", None)


def test_the_suite() -> None:
    work = suites.workloads("cross_attention")
    assert {w.op for w in work} == {"attention", "cross_attention"}
    assert {w.direction for w in work} == {"fwd", "bwd", "fwd+bwd"}
    on_a_cpu = [w for w in work if not w.gpu_only]
    assert len(on_a_cpu) == 7 and all(w.op == "cross_attention" for w in on_a_cpu)


@pytest.mark.gpu
def test_on_the_gpu(device: torch.device) -> None:
    """Compiled, in steps and in graphs."""
    builds = {
        "layer": cross_attention.layer(KEYS),
        "step": cross_attention.layer(KEYS, "fwd+bwd"),
        "graph": cross_attention.former(KEYS, 1, "graph"),
    }
    work = [Workload("s", "o", name, "fwd", build) for name, build in builds.items()]
    with use_backend(""):
        rows, _ = runner.run(work, device, CEILINGS, Options(compile=False, budget_ms=1.0))
    ours = {row.workload: row for row in rows if row.provider == OURS}
    assert [(row.status, row.clock, row.reason) for row in ours.values()] == [
        ("ok", clock, "") for clock in ("device", "replay", "graph")
    ]

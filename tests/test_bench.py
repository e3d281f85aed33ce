# SPDX-License-Identifier: Apache-2.0
"""The benchmark: photos, towers, timing, what counts as wrong, and what a run writes."""

import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from vlmkernels import use_backend
from vlmkernels.bench import (
    MissingExtra,
    Unavailable,
    embeddings,
    environment,
    need,
    photos,
    runner,
    suites,
    timing,
    towers,
)
from vlmkernels.bench.attention import tower_attention
from vlmkernels.bench.ceilings import Ceilings
from vlmkernels.bench.patch_embed import MIXED, mixed_grids, mixed_patch_embed, rows_patch_embed, tower_patch_embed
from vlmkernels.bench.peers import Provider
from vlmkernels.bench.results import Report, Run
from vlmkernels.bench.runner import Options, Row
from vlmkernels.bench.workloads import OURS, Case, Workload
from vlmkernels.ops._op import Op
from vlmkernels.testing import compare

CPU = torch.device("cpu")
CEILINGS = Ceilings(copy_gbs=10.0, gemm_tflops=0.1, copy_bytes=1, gemm_size=1, dtype="float32", under_load={})
FAST = Options(budget_ms=1.0)


@pytest.fixture(autouse=True)
def unwritten_outputs_show() -> None:
    """Off: its wrapper would hide which backend ran, which a run reports."""


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


def plant(monkeypatch: pytest.MonkeyPatch, op: str) -> None:
    """Make an op's first result a little too large: by 1 %, or 1e6 roundings of fp32, on every backend but the reference."""
    select = Op.select

    def wrong(self: Op, backend: str, *args: Any) -> Callable[..., Any]:
        function = select(self, backend, *args)
        if self.name != op or backend == "reference":
            return function

        def run(*args: Any) -> Any:
            first, *rest = function(*args)
            return first * 1.01, *rest

        run.__module__ = function.__module__
        return run

    monkeypatch.setattr(Op, "select", wrong)


@pytest.fixture(scope="module")
def smoke() -> Report:
    with use_backend("torch"):
        rows, left_out = runner.run(suites.workloads("smoke"), CPU, CEILINGS, FAST)
    run = Run("2026-01-01T00:00:00+00:00", 1.0, environment.describe(CPU), CEILINGS, left_out)
    return Report([run], rows)


def test_photos_differ_and_repeat() -> None:
    batch = photos.batch(70, 32)
    assert batch.shape == (70, 3, 32, 32) and batch.dtype == torch.uint8
    assert len({bytes(image.numpy().tobytes()) for image in batch}) == 70
    photos.batch.cache_clear()
    assert torch.equal(photos.batch(70, 32), batch)
    assert batch.float().std() > 40


def test_normalized_pixels() -> None:
    pixels = photos.batch(2, 32)
    exact = torch.stack([(pixels[:, c].double() / 255 - photos.CLIP[0][c]) / photos.CLIP[1][c] for c in range(3)], 1)
    assert compare(photos.normalized(pixels, photos.CLIP, torch.float32), exact, "norm")


def test_missing_package_says_how_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MissingExtra, match=r"needs no_such_package: pip install 'vlmkernels\[bench\]'"):
        need("no_such_package.part")


def test_timing_takes_turns() -> None:
    order: list[str] = []
    functions = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = timing.device_times(functions, CPU, budget_ms=0.0)
    assert {order.count(name) for name in "abc"} == {len(order) // 3}
    assert {"".join(order[i : i + 3]) for i in range(0, len(order), 3)} == {"abc", "bca", "cab"}
    assert times["a"].samples == 5 and times["a"].low <= times["a"].ms <= times["a"].high


def test_a_gpu_rests(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three times as long as it was busy, and not for every little while."""
    now, tick = [0.0], 1e-5

    def clock() -> float:
        now[0] += tick
        return now[0]

    monkeypatch.setattr(timing.time, "perf_counter", clock)
    rest, rested = timing._Rest(), []
    for milliseconds in (0.5, 0.5, 1.5, 0.1, 5.0):
        with rest:
            now[0] += milliseconds / 1e3
            begin = now[0]
        rested.append(now[0] - begin)
    assert rested == pytest.approx([0, 0, 0.0075, 0, 0.0153], abs=20 * tick)


def test_times_are_per_call() -> None:
    """A function that makes several calls, as the replay of a CUDA graph does."""
    (one,) = timing.device_times({"a": lambda: time.sleep(0.002)}, CPU, 0.0).values()
    (several,) = timing.device_times({"a": lambda: time.sleep(0.002)}, CPU, 0.0, cold=False, calls=20).values()
    assert one.ms >= 2 and 0.1 <= several.ms < one.ms / 4


def _captured(function: Callable[[], Any], device: torch.device, calls: int = 1) -> Callable[[], Any]:
    if function() is None:
        raise RuntimeError("it waits")
    return lambda: [function() for _ in range(calls)]


@pytest.mark.parametrize("clock", ["replay", "graph"])
def test_what_cannot_be_captured_says_so(clock: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A step is then timed as it is, which shows; latency in a graph has no stand-in."""
    monkeypatch.setattr(runner, "captured", _captured)
    rows = [Row("s", "o", "w", "fwd", name, "ok", clock=clock) for name in (OURS, "peer", "waits", "wrong")]
    rows[3].status = "wrong"
    times = runner._times(rows, {OURS: lambda: 1, "peer": lambda: 1, "waits": lambda: None}, CPU, FAST)
    ours, peer, waits, _ = rows
    assert {(row.clock, row.status, row.reason) for row in (ours, peer)} == {(clock, "ok", "")}
    assert waits.reason == "not captured in a CUDA graph: RuntimeError: it waits"
    assert (waits.clock, waits.status) == (("device", "ok") if clock == "replay" else ("graph", "unavailable"))
    assert set(times) == ({OURS, "peer", "waits"} if clock == "replay" else {OURS, "peer"})
    waits.ms = 0.5
    assert waits.result == "500.0 µs (not captured)"


def test_host_times_are_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(timing.time, "perf_counter", lambda: now[0])
    times = timing.host_times({"a": lambda: now.__setitem__(0, now[0] + 0.002)}, CPU, calls=5, rounds=3)
    assert times["a"].ms == pytest.approx(2.0) and times["a"].samples == 3


def test_rates_of_a_row() -> None:
    row = Row("s", "o", "w", "fwd", OURS, "ok", flops=6e8, bytes=4e8)
    runner._fill(row, timing.Timing(20.0, 15.0, 25.0, 7), CEILINGS)
    assert (row.ms, row.ms_low, row.ms_high, row.samples) == (20.0, 15.0, 25.0, 7)
    assert (row.tflops, row.gbs, row.ceiling) == (pytest.approx(0.03), pytest.approx(20.0), "copy")
    assert row.ceiling_share == pytest.approx(2.0)


def test_median_and_quartiles() -> None:
    assert timing.summary([5.0, 1.0, 100.0, 2.0, 3.0]) == timing.Timing(3.0, 2.0, 5.0, 5)


def test_ceiling_of_a_workload() -> None:
    assert CEILINGS.best_ms(flops=1e8, bytes_=1e6) == pytest.approx(1.0) and CEILINGS.bound_by(1e8, 1e6) == "gemm"
    assert CEILINGS.best_ms(flops=1e7, bytes_=1e7) == pytest.approx(1.0) and CEILINGS.bound_by(1e7, 1e7) == "copy"


def test_smoke_suite_compares_and_times(smoke: Report) -> None:
    assert smoke.failed == [] and {row.status for row in smoke.rows} == {"ok"}
    for group in smoke.groups():
        ours, *others = group
        assert ours.provider == OURS and ours.backends == ["torch"] and others
        assert ours.best_peer in {row.provider for row in others}
        assert all(row.ms is not None and row.ms > 0 and row.error_over_floor is not None for row in group)
        assert ours.ceiling_share == pytest.approx(CEILINGS.best_ms(ours.flops, ours.bytes) / ours.ms)
    assert any("FlexAttention" in line for line in smoke.runs[0].left_out)


@pytest.mark.parametrize("op", ["attention_fwd", "attention_bwd", "rope_fwd"])
def test_wrong_result_is_not_timed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch, op)
    rows, _ = runner.run(suites.workloads("smoke"), CPU, CEILINGS, FAST)
    stem, _, direction = op.rpartition("_")
    touched = [row for row in rows if row.provider == OURS and row.op == stem and row.direction == direction]
    assert touched and {(row.status, row.ms, row.speedup) for row in touched} == {("wrong", None, None)}
    assert all("floors off" in row.reason for row in touched)
    assert {row.status for row in rows if row.provider != OURS} == {"ok"}


def _case(peers: tuple[Provider, ...]) -> Case:
    x = torch.ones(3)
    return Case(
        Provider(OURS, lambda: lambda: x), peers, ("out",), lambda: (x.double(),), lambda i, y: y, "norm", 1.0, 1.0, torch.float32
    )


def one(build: Callable[[torch.device], Case], options: Options = FAST) -> list[Row]:
    return runner.run_workload(Workload("s", "o", "w", "fwd", build), CPU, CEILINGS, options)


def test_peer_that_cannot_run_says_why() -> None:
    def raises(error: Exception) -> Callable[[], Callable[[], Any]]:
        def prepare() -> Callable[[], Any]:
            raise error

        return prepare

    def warns() -> Callable[[], Any]:
        warnings.warn("This kernel not used because:", stacklevel=1)
        warnings.warn("head dim 7 is odd (Triggered internally at x.cpp:1.)", stacklevel=1)
        raise RuntimeError("none fits")

    peers = (
        Provider("warns", warns),
        Provider("absent", raises(Unavailable("not installed"))),
        Provider("broken", raises(RuntimeError("no kernel\nmore"))),
        Provider("other", lambda: lambda: torch.full((3,), 2.0)),
        Provider("compiled", lambda: lambda: torch.ones(3), compiled=True),
    )
    rows = {row.provider: row for row in one(lambda device: _case(peers))}
    assert (rows["absent"].status, rows["absent"].reason) == ("unavailable", "not installed")
    assert (rows["broken"].status, rows["broken"].reason) == ("unavailable", "RuntimeError: no kernel")
    assert rows["warns"].reason == "RuntimeError: none fits (head dim 7 is odd)"
    assert rows["other"].status == "wrong" and rows["other"].ms is None
    assert rows[OURS].best_peer == "compiled"
    assert set(row.provider for row in one(lambda device: _case(peers), Options(compile=False, peers=("abs", "comp")))) == {
        OURS,
        "absent",
    }


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 64), (torch.float16, 64), (torch.float32, 1024)], ids=str)
def test_peers_may_round_as_they_like(dtype: torch.dtype, bound: int) -> None:
    """Up to a bound in floors, an eighth of eps for numbers that the dtype holds."""
    eps = torch.finfo(dtype).eps
    at, over = (torch.full((3,), 1 + off * eps, dtype=dtype) for off in (bound // 8, bound // 8 + 1))
    peers = (Provider("at", lambda: lambda: at), Provider("over", lambda: lambda: over))
    case = _case(peers)
    rows = one(lambda device: dataclasses.replace(case, dtype=dtype))
    assert [(row.provider, row.status) for row in rows] == [(OURS, "ok"), ("at", "ok"), ("over", "wrong")]


def test_the_fastest_of_our_forms_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    """A form that is wrong is as bad as ours being wrong, and is not timed."""
    right, wrong = lambda: lambda: torch.ones(3), lambda: lambda: torch.full((3,), 2.0)
    forms = {OURS: 4.0, f"{OURS} compiled": 2.0, "peer": 6.0}
    monkeypatch.setattr(runner, "_times", lambda rows, calls, *_: {name: timing.Timing(forms[name], 0, 0, 5) for name in calls})
    peers = (Provider("peer", right),)
    for form, speedup, failed in ((right, 3.0, []), (wrong, 1.5, [f"{OURS} compiled"])):
        case = dataclasses.replace(_case(peers), also=(Provider(f"{OURS} compiled", form, compiled=True),))
        rows = one(lambda device, case=case: case)  # type: ignore[misc]
        assert [row.provider for row in rows] == [OURS, f"{OURS} compiled", "peer"]
        assert (rows[0].speedup, rows[0].best_peer) == (speedup, "peer")
        run = Run("now", 0.0, {"device": "d"}, CEILINGS, [])
        assert [row.provider for row in Report([run], rows).failed] == failed


def test_workload_that_cannot_be_built_fails_the_run() -> None:
    def build(device: torch.device) -> Case:
        raise RuntimeError("no memory")

    (row,) = one(build)
    assert (row.provider, row.status, row.reason) == (OURS, "failed", "inputs: RuntimeError: no memory")


def test_time_limit_and_gpu_only_are_left_out() -> None:
    work = [
        Workload("s", "o", "w", "fwd", lambda device: _case(())),
        Workload("s", "o", "big", "fwd", lambda d: _case(()), "too big"),
    ]
    rows, left_out = runner.run(work, CPU, CEILINGS, Options(time_limit=-1.0))
    assert rows == [] and any("time limit" in line for line in left_out) and any("too big" in line for line in left_out)


def test_what_was_measured_before_an_interrupt_is_kept() -> None:
    def interrupted(device: torch.device) -> Case:
        raise KeyboardInterrupt

    builds = {"first": lambda device: _case(()), "second": interrupted, "third": lambda device: _case(())}
    work = [Workload("s", "o", name, "fwd", build) for name, build in builds.items()]
    rows, left_out = runner.run(work, CPU, CEILINGS, Options(budget_ms=0.0))
    assert [row.workload for row in rows] == ["first"]
    assert [line for line in left_out if "interrupted" in line] == [f"{w.id}: interrupted" for w in work[1:]]


SMALL = {"hidden_size": 64, "num_attention_heads": 2, "intermediate_size": 64, "num_hidden_layers": 1}
TOWERS = [
    towers.Tower(
        "vit", t.model, (t.config[0], {**t.config[1], **SMALL, "image_size": 40, "patch_size": 14}), (2, 2), t.statistics
    )
    for t in (towers.VIT_B, towers.CLIP_L, towers.SIGLIP, towers.EVA_G)
]


#: What is not there on every machine, or not for every tower; the reason is in the row.
MAY_BE_MISSING = ("hf fused", "timm conv")


def agree(build: Callable[[torch.device], Case]) -> list[Row]:
    """All providers compute the same: transformers' modules and functions lie within the bound that ours has."""
    rows = one(build, Options(budget_ms=0.0))
    for row in rows:
        if row.provider in MAY_BE_MISSING and row.status == "unavailable":
            assert "does not import" in row.reason or "fusion_config" in row.reason, row
            continue
        assert row.status == "ok" and row.ms, row
        assert row.error_over_floor is not None and row.bound is not None and row.error_over_floor <= row.bound, row
    return rows


@pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.model[1])
def test_transformers_towers_agree_with_ours(tower: towers.Tower) -> None:
    steps = [tower_patch_embed(tower, direction=direction) for direction in ("fwd", "bwd", "fwd+bwd")]
    for build in (*steps, tower_patch_embed(tower, uint8=True), tower_attention(tower)):
        assert len([row for row in agree(build) if row.status == "ok"]) >= 3


def test_a_step_has_the_gradient_of_every_parameter() -> None:
    outputs = [tower_patch_embed(tower, direction="fwd+bwd")(CPU).outputs for tower in TOWERS]
    vit, clip, siglip, eva = outputs
    assert vit == eva == ("out", "dweight", "dbias", "dclass_token", "dpositions")
    assert clip == ("out", "dweight", "dclass_token", "dpositions", "dnorm_weight", "dnorm_bias")
    assert siglip == ("out", "dweight", "dbias", "dpositions")


@pytest.fixture
def small_rows(monkeypatch: pytest.MonkeyPatch) -> None:
    """The towers that take rows, at small widths."""
    for name, sizes in {
        "QWEN2": {"embed_dim": 32, "num_heads": 2, "hidden_size": 32},
        "QWEN3": {"hidden_size": 32, "num_heads": 2, "out_hidden_size": 32, "num_position_embeddings": 36},
        "NAFLEX": {"hidden_size": 32, "num_attention_heads": 2, "patch_size": 4, "num_patches": 36},
    }.items():
        tower = getattr(towers, name)
        monkeypatch.setattr(towers, name, dataclasses.replace(tower, config=(tower.config[0], {**tower.config[1], **sizes})))


@pytest.mark.usefixtures("small_rows")
def test_qwen_rows_agree_with_ours() -> None:
    for build in (
        rows_patch_embed(towers.QWEN2),
        rows_patch_embed(towers.QWEN2, still=True),
        rows_patch_embed(towers.QWEN3, positions=True),
    ):
        rows = agree(build)
        assert [row.provider for row in rows] == [OURS, "hf conv", "hf fused", "linear"]
        assert [row.status for row in rows if row.provider != "hf fused"] == ["ok"] * 3


@pytest.mark.usefixtures("small_rows")
@pytest.mark.parametrize("direction", ["fwd", "fwd+bwd"])
@pytest.mark.parametrize("name", MIXED)
def test_mixed_sizes_agree_with_ours(name: str, direction: str) -> None:
    rows = agree(mixed_patch_embed(name, direction))
    assert [row.provider for row in rows] == [OURS, *(["hf"] if name == "SigLIP2-NaFlex" else ["hf conv", "hf fused"])]


def test_mixed_grids_are_of_16_sizes() -> None:
    for limit, multiple in ((512, 1), (1024, 2)):
        grids = mixed_grids(64, limit, multiple)
        assert len(grids) == 64 and len(set(grids)) == 16
        assert all(0.8 * limit <= h * w <= limit and h % multiple == w % multiple == 0 for h, w in grids)


def test_fusion_leaves_nothing_behind() -> None:
    """transformers replaces classes by a part of their name in whatever is loaded next: a tower without a Conv3d would break."""
    patching = pytest.importorskip("transformers.monkey_patching", reason="this version of transformers has no fusion_config")
    tower = towers.Tower(
        "", towers.QWEN2.model, ("Qwen2VLVisionConfig", {"depth": 0, "embed_dim": 32, "num_heads": 2}), (1, 1), photos.HALF
    )
    model = tower.build(CPU, torch.float32)
    try:
        fused = embeddings.fused_model(model)
    except Unavailable as error:  # transformers 5.17
        assert "fusion_config is refused" in str(error)
    else:
        assert torch.equal(fused.patch_embed.linear_proj.weight, model.patch_embed.proj.weight.flatten(1))
    assert not patching.get_patch_mapping()
    with pytest.raises(Unavailable, match="fusion_config changes nothing"):
        embeddings.fused_model(TOWERS[0].build(CPU, torch.float32))
    assert not patching.get_patch_mapping()


def test_qformer_queries_and_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(towers, "EVA_G", TOWERS[3])
    monkeypatch.setattr(towers, "QFORMER_CONFIG", {**towers.QFORMER_CONFIG, "encoder_hidden_size": 64})
    call = towers.qformer_cross_attention(CPU, torch.float32)
    assert call.q.shape == (2, 12, towers.QUERIES, 64) and call.k.shape == (2, 12, 1 + 2 * 2, 64)
    assert not torch.equal(call.k[0], call.k[1]), "two photos give the same keys"


def test_commit_of_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy without .git takes the commit that it is told; a checkout knows its own."""
    monkeypatch.setattr(environment, "commit", lambda: None)
    assert environment.describe(torch.device("cpu"), "abc")["commit"] == "abc"
    monkeypatch.setattr(environment, "commit", lambda: "def+changes")
    assert environment.describe(torch.device("cpu"), "abc")["commit"] == "def+changes"


def test_unknown_suite() -> None:
    with pytest.raises(ValueError, match="suite: got 'nonsense', wanted one of main"):
        suites.workloads("nonsense")


def test_overhead_workloads_are_right() -> None:
    """They are timed on a GPU only, but compute the same anywhere, the peers too."""
    for work in suites.workloads("overhead"):
        case = work.build(CPU)
        assert case.clock == ("import" if work.op == "import" else "host"), work.name
        with torch.no_grad(), use_backend("reference"):  # torch has no softcap
            for provider in (case.ours, *case.peers):
                try:
                    call = provider.prepare()
                except Unavailable:
                    assert provider is not case.ours
                else:
                    assert all(case.check(call())), (work.name, provider.name)


def test_overhead_that_a_cpu_measures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "IMPORTS", 1)
    work = [work for work in suites.workloads("overhead") if not work.gpu_only]
    rows = {row.clock: row for row in runner.run(work, CPU, CEILINGS, FAST)[0] if row.provider == OURS}
    assert set(rows) == {"host", "import"} and all(row.status == "ok" for row in rows.values()), rows
    # A call takes microseconds, an import a part of a second; a busy machine makes either longer.
    assert rows["host"].ms is not None and 0.001 < rows["host"].ms < 10
    assert rows["import"].ms is not None and 5 < rows["import"].ms < 10000 and rows["import"].samples == 1


@pytest.mark.parametrize("suite", suites.SUITES)
def test_workloads_have_distinct_names(suite: str) -> None:
    names = [work.id for work in suites.workloads(suite)]
    assert names and len(set(names)) == len(names)


@pytest.mark.gpu
def test_smoke_and_overhead_on_the_gpu(device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runner, "IMPORTS", 1)
    with use_backend(""):
        rows, _ = runner.run(suites.workloads("smoke", "overhead"), device, CEILINGS, Options(compile=False, budget_ms=1.0))
    ours = [row for row in rows if row.provider == OURS]
    assert ours and {row.status for row in ours} == {"ok"}, [row for row in ours if row.status != "ok"]
    assert all(row.ms for row in ours)


@pytest.mark.gpu
def test_captured_calls(device: torch.device) -> None:
    """A graph holds as many calls as it says; what waits for the GPU is refused and leaves nothing behind."""
    x = torch.zeros(4, device=device)
    replay = timing.captured(lambda: x.add_(1), device, calls=20)
    before = x[0].item()
    replay()
    assert x[0].item() == before + 20
    with pytest.raises(RuntimeError):
        timing.captured(lambda: x.sum().item(), device)
    assert torch.cuda.get_sync_debug_mode() == 0 and x.sum().item() == 4 * (before + 20)


@pytest.mark.gpu
@pytest.mark.usefixtures("small_rows")
def test_steps_and_latency_on_the_gpu(device: torch.device) -> None:
    step = tower_patch_embed(TOWERS[1], direction="fwd+bwd", clock="replay")
    latency = tower_patch_embed(TOWERS[1], uint8=True, clock="graph")
    builds = {"step": step, "latency": latency, **{name: mixed_patch_embed(name, "fwd+bwd") for name in MIXED}}
    work = [Workload("s", "patch_embed", name, "fwd", build) for name, build in builds.items()]
    with use_backend(""):
        rows, _ = runner.run(work, device, CEILINGS, Options(compile=False, budget_ms=1.0))
    ours = {row.workload: row for row in rows if row.provider == OURS}
    assert [(row.status, row.clock, row.reason) for row in ours.values()] == [
        ("ok", clock, "") for clock in ("replay", "graph", "replay", "replay")
    ]
    assert all(row.ms for row in rows if row.status == "ok")

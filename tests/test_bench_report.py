# SPDX-License-Identifier: Apache-2.0
"""What a run writes and what is made of it: JSON lines, the HTML report, the plots, and two results side by side."""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch

from vlmkernels.bench import environment, plots, regressions, report, results, suites
from vlmkernels.bench.ceilings import Ceilings
from vlmkernels.bench.results import Report, Run
from vlmkernels.bench.runner import Row
from vlmkernels.bench.workloads import OURS
from vlmkernels.cli import main

CEILINGS = Ceilings(copy_gbs=10.0, gemm_tflops=0.1, copy_bytes=1, gemm_size=1, dtype="float32", under_load={})


def _report(*rows: Row, device: str = "<b>GPU & co</b>") -> Report:
    versions = {"torch": "2", "flash-attn-4": None, "timm": "1"}
    run = Run("now", 1.0, {"device": device, "device_type": "cpu", "versions": versions}, CEILINGS, ["<i>left</i>"])
    return Report([run], list(rows))


def _group(name: str, speedup: float | None, status: str = "ok") -> list[Row]:
    ours = Row(
        "s",
        "o",
        name,
        "fwd",
        OURS,
        status,
        "" if status == "ok" else "why",
        ms=1.0 if status == "ok" else None,
        speedup=speedup,
        best_peer="peer",
    )
    return [ours, Row("s", "o", name, "fwd", "peer", "ok", ms=speedup, ceiling_share=0.5, ceiling="copy")]


@pytest.fixture
def measured() -> Report:
    """A run of two operators on this machine."""
    rows = [*_group("a", 2.0), *(dataclasses.replace(row, op="rope") for row in _group("b", None, "failed"))]
    return Report([Run("2026-01-01T00:00:00+00:00", 1.0, environment.describe(torch.device("cpu")), CEILINGS, [])], rows)


def test_json_lines(measured: Report, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    measured.rows[0].error_over_floor = float("inf")
    results.write(measured, path)

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    run, *rows = [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]
    assert run["record"] == "run" and run["schema"] == results.SCHEMA and run["ceilings"]["copy_gbs"] == 10.0
    assert {"device", "commit", "versions", "nvidia_smi", "cuda", "python", "left_out"} <= set(run)
    assert set(run["versions"]) >= {"vlmkernels", "torch", "triton", "transformers"}
    assert len(rows) == len(measured.rows)
    for row in rows:
        assert row["record"] == "row" and row["run"] == run["started"]
        assert set(row) == {"record", *Row.__dataclass_fields__}


def test_stored_results_replace_what_was_measured_again(measured: Report, tmp_path: Path) -> None:
    path = results.store(measured, tmp_path)
    assert path.parent == tmp_path and path.suffix == ".jsonl"
    later = _again(measured, "2026-02-02T00:00:00+00:00", "rope")
    assert results.store(later, tmp_path) == path
    records = [json.loads(line) for line in path.read_text().splitlines()]
    assert [r["started"] for r in records if r["record"] == "run"] == [run.started for run in (*measured.runs, *later.runs)]
    rows = [r for r in records if r["record"] == "row"]
    assert len(rows) == len(measured.rows)
    assert {(r["op"] == "rope", r["run"]) for r in rows} == {(False, measured.runs[0].started), (True, later.runs[0].started)}
    results.store(_again(measured, "2026-03-03T00:00:00+00:00"), tmp_path)
    assert [run.started for run in results.read(path).runs] == ["2026-03-03T00:00:00+00:00"]


def _again(before: Report, started: str, op: str = "") -> Report:
    """The same rows, or those of one operator, of another run."""
    rows = [dataclasses.replace(row, run="") for row in before.rows if row.op == op or not op]
    return Report([dataclasses.replace(before.runs[0], started=started)], rows)


def test_results_read_are_those_written(measured: Report, tmp_path: Path) -> None:
    results.write(measured, tmp_path / "x.jsonl")
    read = results.read(tmp_path / "x.jsonl")
    assert read.records() == [json.loads(json.dumps(record)) for record in measured.records()]
    assert read.runs[0].ceilings == CEILINGS and read.rows == measured.rows
    measured.rows[0].error_over_floor = float("inf")
    results.write(measured, tmp_path / "x.jsonl")
    assert results.read(tmp_path / "x.jsonl").rows[0].error_over_floor == float("inf")
    (tmp_path / "empty.jsonl").write_text("")
    for name, wanted in (("none", "wanted a results file that exists"), ("empty", "without a run")):
        with pytest.raises(ValueError, match=f"results: got .*{wanted}"):
            results.read(tmp_path / f"{name}.jsonl")


def test_html_is_one_file_and_shows_losses_first() -> None:
    rows = [*_group("wins", 2.0), *_group("loses", 0.5), *_group("is wrong", None, "wrong"), *_group("draws", 1.0)]
    charts = plots.draw(_report(*rows))
    page = report.to_html(_report(*rows), charts)
    assert charts["standings"].startswith(b"\x89PNG")
    text = re.sub(r"base64,[A-Za-z0-9+/=]+", "", page)
    assert not re.search(r"https?:|//[a-z]|<script|<link|@import|url\(|srcset|href", text, re.IGNORECASE)
    assert re.findall(r'src="([^"]{22})', page) == ["data:image/png;base64,"] * len(charts)
    assert "<b>GPU" not in page and "&lt;b&gt;GPU &amp; co" in page and "&lt;i&gt;left" in page
    places = [page.index(f"o · {name} · fwd") for name in ("is wrong", "loses", "draws", "wins")]
    assert places == sorted(places)
    verdict = "4 workloads, 1 where a peer is faster, 1 wrong or failed. On the geometric mean the best peer takes 1.00 times"
    assert "WRONG: why" in page and verdict in page
    assert "flash-attn-4 was not installed: pip install flash-attn-4" in page and "timm was not" not in page


def test_what_failed_is_ours() -> None:
    rows = [row for status in ("wrong", "failed", "unavailable", "ok") for row in _group(status, None, status)]
    rows[1].status = rows[3].status = "failed"
    assert _report(*rows).failed == [rows[0], rows[2]]


def test_cells_of_a_row() -> None:
    ours, peer = _group("w", 3.0)
    ours.ms, ours.extra_bytes, peer.extra_bytes = 2.0, 0, 100 << 20
    column = dict(zip(report.COLUMNS, zip(report.cells(ours, ours), report.cells(peer, ours), strict=True), strict=True))
    assert column["peer time / ours"] == ("3.00x (peer)", "1.50x") and column["extra MiB"] == ("0", "100")


def test_standings_by_kind() -> None:
    rows = [*_group("wins", 2.0), *_group("loses", 0.5), *_group("is wrong", None, "wrong"), *_group("leads", 8.0)]
    other = [dataclasses.replace(row, suite="t", direction="bwd") for row in _group("x", 0.25)]
    loses, wins = results.standings(_report(*rows, *other))
    assert (loses.name, loses.ratios, loses.behind) == ("t, o, bwd", [0.25], 1)
    assert (wins.name, wins.ratios, wins.behind, wins.mean) == ("s, o, fwd", [0.5, 2.0, 8.0], 1, pytest.approx(2.0))
    assert json.loads(plots.standings_data(_report(*rows))) == [["s, o, fwd", [0.5, 2.0, 8.0]]]


def _as_measured(suite: str, *names: str) -> list[Row]:
    """Rows of ours and a peer for these workloads of a suite, as if they had run."""
    rows = []
    for work in suites.workloads(suite):
        for row in _group(work.name, 2.0) if work.name in names else ():
            own = {"suite": suite, "op": work.op, "direction": work.direction, "tflops": 3.0, "extra_bytes": 2**20}
            rows.append(dataclasses.replace(row, flops=100.0, bytes=1.0, **own))
    assert len({row.workload for row in rows}) == len(names)
    return rows


def test_plots_of_each_suite() -> None:
    """The curves come of the sweep's points, the masks of attention's, the bars in microseconds of what no rate bounds."""
    sweep = _as_measured("sweep", "S256 D64", "S4096 D64", "S4096 D128", "CLIP 4096 D768", "CLIP 8192 D768")
    attention = _as_measured("attention", "ViT-B B256 S197 D64", "dense 8192 D64", "causal 4096 D128 GQA4")
    assert set(plots.draw(_report(*sweep))) == {"standings", "length", "head_dim", "memory", "roofline"}
    assert set(plots.draw(_report(*attention))) == {"standings", "length", "masks", "roofline"}
    heights = []
    for clocks in (("host",), ("host", "graph"), ("host", "graph", "import")):
        rows = [row for clock in clocks for row in _group(clock, 2.0)]
        for row in rows:
            row.clock, row.ceiling_share = row.workload, None
        png = plots.draw(_report(*rows))["overhead"]
        heights.append(int.from_bytes(png[20:24], "big"))
    assert heights == sorted(set(heights)), "a missing panel would leave the picture lower"


def test_each_curve_has_its_points() -> None:
    curves: dict[tuple[str, str], set[float]] = {}
    for work in suites.workloads(*suites.SUITES):
        for place in work.places:
            curves.setdefault((place.chart, place.panel), set()).add(place.x)
    for way in ("forward", "backward"):
        assert curves["length", f"{way}, head dim 128"] >= {2.0**power for power in range(8, 15)}
        assert curves["head_dim", way] >= {64, 72, 80, 128, 256}
    assert curves["memory", "CLIP, 768 channels"] == {2.0**power for power in (12, 13, 14, 15, 16, 18)}
    assert {chart for chart, _ in curves} == {"length", "head_dim", "memory", "masks"}


def test_regressions() -> None:
    """Our fastest form counts; what is wrong now, or slower than the bound, is worse, and stands first."""
    names = ("same", "slower", "wrong", "gone", "other clock")
    before = _report(*[row for name in names for row in _group(name, 2.0)])
    now = {name: _group(name, 2.0) for name in names}
    now["slower"][0].ms, now["same"][0].ms = 1.2, 1.04
    form = dataclasses.replace(now["same"][0], provider=f"{OURS} compiled", ms=0.9)
    now["wrong"], now["other clock"][0].clock = _group("wrong", None, "wrong"), "host"
    del now["gone"]
    found = regressions.changes(_report(*[row for rows in now.values() for row in rows], form), before)
    assert [change.id.split("/")[2] for change in found[:3]] == ["wrong", "slower", "same"]
    by_name = {change.id.split("/")[2]: change for change in found}
    assert {name for name, change in by_name.items() if change.worse(0.05)} == {"wrong", "slower"}
    assert {name for name, change in by_name.items() if change.worse(0.25)} == {"wrong"}
    assert by_name["same"].ratio == pytest.approx(0.9) and by_name["gone"].ratio is None
    notes = {name: regressions.cells(change, 0.05)[-1] for name, change in by_name.items()}
    assert notes == {"same": "", "slower": "slower", "wrong": "wrong: why", "gone": "not measured now",
                     "other clock": "timed by host, before by device"}  # fmt: skip
    with pytest.raises(ValueError, match="--compare: got results of other, wanted those of <b>GPU"):
        regressions.changes(before, _report(*_group("same", 2.0), device="other"))


def test_bench_shows_and_compares_files(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    """Nothing is measured; the exit status says whether something became slower."""
    for name, ms in (("before", 1.0), ("now", 1.2)):
        rows = _group("a", 2.0)
        rows[0].ms = ms
        results.write(_report(*rows), tmp_path / f"{name}.jsonl")
    command = ["bench", "--from", str(tmp_path / "now.jsonl"), "--out", str(tmp_path / "out")]
    assert main(command) == 0 and (tmp_path / "out" / "standings.png").exists()
    assert main([*command, "--compare", str(tmp_path / "before.jsonl")]) == 1
    printed = capsys.readouterr().out
    assert re.search(r"s/o/a/fwd +1.000 ms +1.200 ms +1.200 .*slower", printed) and "1 slower by more than 5%" in printed
    assert main([*command, "--compare", str(tmp_path / "before.jsonl"), "--bound", "0.25"]) == 0
    assert main([*command, "--compare", str(tmp_path / "nothing.jsonl")]) == 2

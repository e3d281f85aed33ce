# SPDX-License-Identifier: Apache-2.0
"""What a run leaves behind: a table on the terminal, JSON lines, a plot with the ceilings, and one HTML file with all of it."""

import base64
import html
import io
import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from vlmkernels.bench import need
from vlmkernels.bench.ceilings import Ceilings
from vlmkernels.bench.runner import Row
from vlmkernels.bench.workloads import OURS

SCHEMA = 1

#: What the plot shows in microseconds, by clock; the rest is a share of the ceiling.
MICROSECONDS = {
    "host": "host time per call, µs (less is better)",
    "graph": "time per call, back to back in a CUDA graph with warm caches, µs (less is better)",
}


@dataclass
class Report:
    """Everything about one run: when, where (``environment.describe``), the ceilings, the rows, what was left out."""

    started: str
    seconds: float
    environment: dict[str, Any]
    ceilings: Ceilings
    rows: list[Row]
    left_out: list[str]

    def run_record(self) -> dict[str, Any]:
        """The run as one JSON object; its ``started`` names it in every row."""
        return {
            "record": "run",
            "schema": SCHEMA,
            "started": self.started,
            "seconds": round(self.seconds, 1),
            **self.environment,
            "ceilings": asdict(self.ceilings),
            "left_out": self.left_out,
        }

    def records(self) -> list[dict[str, Any]]:
        """The run, then its rows."""
        return [self.run_record(), *({**row.record(), "run": self.started} for row in self.rows)]

    def groups(self) -> list[list[Row]]:
        """The rows of each workload, ours first; the workload where we lose most comes first."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.id, []).append(row)
        return sorted(groups.values(), key=_standing)

    @property
    def failed(self) -> list[Row]:
        """Our rows that are wrong or did not run."""
        return [row for row in self.rows if row.provider.startswith(OURS) and row.status in ("wrong", "failed")]


def _standing(group: Sequence[Row]) -> float:
    ours = group[0]
    if ours.status != "ok":
        return -1.0
    return ours.speedup if ours.speedup is not None else float("inf")


def result(row: Row) -> str:
    """The time of a row, or why there is none."""
    if row.ms is None:
        return f"{row.status.upper() if row.status in ('wrong', 'failed') else 'not run'}: {row.reason}"
    time = f"{row.ms * 1e3:.1f} µs" if row.clock in MICROSECONDS or row.ms < 1 else f"{row.ms:.3f} ms"
    return f"{time} (not captured)" if row.reason else time


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _title(row: Row) -> str:
    return f"{row.op} · {row.workload} · {row.direction}"


COLUMNS = ("workload", "provider", "time", "peer time / ours", "TFLOP/s", "GB/s", "of ceiling", "error / floor", "extra MiB")


def cells(row: Row, ours: Row) -> tuple[str, ...]:
    """A row of the tables, in the order of ``COLUMNS``. The ratio is this peer's time over ours; for ours, the best peer's."""
    if row is ours:
        ratio = f"{row.speedup:.2f}x ({row.best_peer})" if row.speedup is not None else ""
        name = f"{OURS} ({', '.join(row.backends)})" if row.backends else OURS
    else:
        ratio = f"{row.ms / ours.ms:.2f}x" if row.ms is not None and ours.ms is not None else ""
        name = row.provider
    share = "" if row.ceiling_share is None else f"{row.ceiling_share:.0%} {row.ceiling}"
    error = _number(row.error_over_floor, ".2f")
    title = _title(row) if row is ours else ""
    extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.0f}"
    return title, name, result(row), ratio, _number(row.tflops, ".3g"), _number(row.gbs, ".0f"), share, error, extra


def print_table(report: Report, console: Any) -> None:
    """The table on a rich console."""
    table = need("rich.table").Table(title=report.environment["device"])
    # The last column is of GPUs alone, and the others need the width.
    columns = COLUMNS[1:] if any(row.extra_bytes is not None for row in report.rows) else COLUMNS[1:-1]
    for name in columns:
        table.add_column(name, justify="left" if name == "provider" else "right", overflow="fold")
    markup = need("rich.markup").escape
    for group in report.groups():
        lost = group[0].status != "ok" or _standing(group) < 1
        table.add_row(markup(_title(group[0])), style="bold red" if lost else "bold green")
        for row in group:
            line = [markup(cell) for cell in cells(row, group[0])[1 : 1 + len(columns)]]
            table.add_row(*line, style="bold" if row is group[0] else None, end_section=row is group[-1])
    console.print(table)
    c = report.ceilings
    console.print(f"ceilings of this run: copy {c.copy_gbs:.0f} GB/s, {c.dtype} product {c.gemm_tflops:.3g} TFLOP/s")
    for omission in report.left_out:
        console.print(markup(f"left out: {omission}"))


def write_jsonl(report: Report, path: Path) -> None:
    """One JSON object a line: the run, then its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines(report.records()))


def _lines(records: Iterable[dict[str, Any]]) -> str:
    # No infinity or NaN: other readers of JSON refuse them.
    return "".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def store(report: Report, folder: Path) -> Path:
    """Put the run into ``folder/<device>.jsonl``, in the place of the workloads that it measured again."""
    slug = re.sub(r"[^a-z0-9]+", "-", report.environment["device"].lower()).strip("-")
    path = folder / f"{slug}.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    measured = {row.id for row in report.rows}
    rows = [r for r in before if r["record"] == "row"]
    kept = [r for r in rows if "/".join(r[x] for x in ("suite", "op", "workload", "direction")) not in measured]
    runs = {r["run"] for r in kept}
    old = [r for r in before if r["record"] == "run" and r["started"] in runs]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(_lines([*old, *kept, *report.records()]))
    return path


def plot(report: Report) -> bytes:
    """A PNG: for each workload the share of the ceiling that each provider reaches; the ceiling is the line at 100 %."""
    matplotlib = need("matplotlib")
    matplotlib.use("Agg")
    pyplot = need("matplotlib.pyplot")
    groups: dict[str, list[list[Row]]] = {}
    for group in report.groups():
        if _timed(group):
            groups.setdefault(group[0].clock if group[0].clock in MICROSECONDS else "", []).append(group)
    panels = [(groups[clock], clock) for clock in ("", *MICROSECONDS) if clock in groups] or [([], "")]
    bars = [max(1, sum(len(_timed(g)) for g in p[0]) + len(p[0])) for p in panels]
    figure, axes = pyplot.subplots(
        len(panels), 1, figsize=(11, 1.6 + 0.24 * sum(bars)), height_ratios=bars, squeeze=False, layout="constrained"
    )
    for axis, (shown, clock) in zip(axes[:, 0], panels, strict=True):
        _bars(axis, shown, bool(clock))
        if not clock:
            c = report.ceilings
            axis.axvline(100, color="black", linewidth=1.2)
            axis.set_xlabel(f"% of this run's ceiling: {c.dtype} product {c.gemm_tflops:.3g} TFLOP/s, copy {c.copy_gbs:.0f} GB/s")
            axis.set_xlim(0, max(105, axis.get_xlim()[1]))
        else:
            axis.set_xlabel(MICROSECONDS[clock])
    figure.suptitle(report.environment["device"])
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    pyplot.close(figure)
    return buffer.getvalue()


def _timed(group: Sequence[Row]) -> list[Row]:
    return [row for row in group if row.ms is not None]


def _bars(axis: Any, groups: Sequence[Sequence[Row]], microseconds: bool) -> None:
    position, ticks, labels = 0.0, [], []
    for group in groups:
        axis.text(0, position, f" {_title(group[0])}", va="center", fontsize=8, fontweight="bold")
        position += 1
        for row in sorted(_timed(group), key=lambda r: r.ms or 0.0):
            value = (row.ms or 0.0) * 1e3 if microseconds else 100 * (row.ceiling_share or 0.0)
            axis.barh(position, value, height=0.8, color="#1f77b4" if row.provider.startswith(OURS) else "#c7c7c7")
            axis.text(value, position, f" {result(row)}", va="center", fontsize=7)
            ticks.append(position)
            labels.append(row.provider)
            position += 1
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_ylim(max(position, 1) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)


STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222}
table{border-collapse:collapse;width:100%}td,th{padding:.25em .6em;text-align:right;border-bottom:1px solid #eee}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}tr.ours{font-weight:600;border-top:2px solid #999}
tr.win{background:#eaf6ea}tr.lose{background:#fdecea}tr.none td{color:#777}img{max-width:100%}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1em 1em}dt{color:#666}dd{margin:0}"""


def to_html(report: Report, png: bytes) -> str:
    """One file without external references: environment, table (losing workloads first) and plot."""
    escape = html.escape
    body = []
    for group in report.groups():
        for row in group:
            kind = "none" if row.ms is None else ""
            if row is group[0]:
                kind = "ours " + ("lose" if _standing(group) < 1 else "win")
            body.append(f'<tr class="{kind}">' + "".join(f"<td>{escape(cell)}</td>" for cell in cells(row, group[0])) + "</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in COLUMNS)
    facts = "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in _facts(report))
    left_out = "".join(f"<li>{escape(line)}</li>" for line in report.left_out)
    lost = sum(0 <= _standing(group) < 1 for group in report.groups())
    summary = f"{len(report.groups())} workloads, {lost} where a peer is faster, {len(report.failed)} wrong or failed."
    image = base64.b64encode(png).decode()
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>vlmkernels benchmark</title><style>{STYLE}</style></head><body>
<h1>vlmkernels benchmark</h1>
<p>{escape(summary)} Workloads where a peer is faster come first. Times are medians of interleaved calls with a cold L2 cache;
steps of forward and backward are replayed from a CUDA graph, or else marked; times without a share of the ceiling are those of
calls back to back, of the host or in a CUDA graph with warm caches; "of ceiling" is the time at the copy and product rates of
this run over the time taken; "error / floor" is the RMS error in units of the error of rounding the exact result; "extra
MiB" is what a call holds beside its inputs and results, at its peak.
A result that is wrong is not timed.</p>
<table><thead><tr>{head}</tr></thead><tbody>
{chr(10).join(body)}
</tbody></table>
<h2>Share of the ceiling</h2><img alt="Share of the ceiling by workload and provider" src="data:image/png;base64,{image}">
<h2>Left out</h2><ul>{left_out or "<li>nothing</li>"}</ul>
<h2>Where and with what</h2><dl>{facts}</dl>
</body></html>
"""


def _facts(report: Report) -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = []
    for key, value in report.run_record().items():
        if key in ("record", "schema", "left_out"):
            continue
        if isinstance(value, dict):
            facts.append((key, ", ".join(f"{name} {x}" for name, x in value.items() if x) or "-"))
        else:
            facts.append((key, value))
    return facts


def write(report: Report, folder: Path) -> dict[str, Path]:
    """Write ``results.jsonl``, ``plot.png`` and ``report.html`` into a folder; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in ("results.jsonl", "plot.png", "report.html")}
    png = plot(report)
    write_jsonl(report, paths["results.jsonl"])
    paths["plot.png"].write_bytes(png)
    paths["report.html"].write_text(to_html(report, png), encoding="utf-8")
    return paths

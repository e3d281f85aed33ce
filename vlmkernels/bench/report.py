# SPDX-License-Identifier: Apache-2.0
"""How results are shown: a table on the terminal, and one HTML file with the tables and the plots."""

import base64
import html
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from vlmkernels.bench import environment, need, plots, results
from vlmkernels.bench.results import Report, Run, geometric_mean, standing, standings
from vlmkernels.bench.runner import Row
from vlmkernels.bench.workloads import OURS

COLUMNS = ("workload", "provider", "time", "peer time / ours", "TFLOP/s", "GB/s", "of ceiling", "error / floor", "extra MiB")


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


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
    title = row.title if row is ours else ""
    extra = "" if row.extra_bytes is None else f"{row.extra_bytes / 2**20:.0f}"
    return title, name, row.result, ratio, _number(row.tflops, ".3g"), _number(row.gbs, ".0f"), share, error, extra


def print_table(report: Report, console: Any) -> None:
    """The tables on a rich console."""
    table = need("rich.table").Table(title=report.device)
    # The last column is of GPUs alone, and the others need the width.
    columns = COLUMNS[1:] if any(row.extra_bytes is not None for row in report.rows) else COLUMNS[1:-1]
    for name in columns:
        table.add_column(name, justify="left" if name == "provider" else "right", overflow="fold")
    markup = need("rich.markup").escape
    for group in report.groups():
        table.add_row(markup(group[0].title), style="bold red" if standing(group) < 1 else "bold green")
        for row in group:
            line = [markup(cell) for cell in cells(row, group[0])[1 : 1 + len(columns)]]
            table.add_row(*line, style="bold" if row is group[0] else None, end_section=row is group[-1])
    console.print(table)
    said = [verdict(report), *map(_mean, standings(report)), *map(_ceilings, report.runs)]
    said += [*(f"left out: {line}" for line in _left_out(report)), *_missing(report)]
    for text in said:
        console.print(markup(text), soft_wrap=True)


def verdict(report: Report) -> str:
    """One sentence: where we stand."""
    groups = report.groups()
    compared = [standing(group) for group in groups if group[0].speedup is not None]
    behind = sum(ratio < 1 for ratio in compared)
    mean = f" On the geometric mean the best peer takes {geometric_mean(compared):.2f} times our time." if compared else ""
    return f"{len(groups)} workloads, {behind} where a peer is faster, {len(report.failed)} wrong or failed.{mean}"


def _mean(one: results.Standing) -> str:
    return f"{one.name}: geometric mean {one.mean:.2f}x of {len(one.ratios)} workloads, a peer faster on {one.behind}"


def _ceilings(run: Run) -> str:
    c = run.ceilings
    return f"ceilings of the run of {run.started}: copy {c.copy_gbs:.0f} GB/s, {c.dtype} product {c.gemm_tflops:.3g} TFLOP/s"


def _left_out(report: Report) -> list[str]:
    """What the runs left out, less the workloads that another of them has."""
    measured = {row.id for row in report.rows}
    found = (line for run in report.runs for line in run.left_out if line.partition(": ")[0] not in measured)
    return list(dict.fromkeys(found))


def _missing(report: Report) -> list[str]:
    return environment.missing([run.environment.get("versions", {}) for run in report.runs])


STYLE = """body{font:15px/1.5 system-ui,sans-serif;margin:2em auto;max-width:1200px;padding:0 1em;color:#222}
table{border-collapse:collapse;width:100%}td,th{padding:.25em .6em;text-align:right;border-bottom:1px solid #eee}
td:nth-child(-n+2),th:nth-child(-n+2){text-align:left}table.few{width:auto}table.few td:nth-child(2){text-align:right}
tr.ours{font-weight:600;border-top:2px solid #999}tr.win{background:#eaf6ea}tr.lose{background:#fdecea}tr.none td{color:#777}
img{max-width:100%}p.verdict{font-size:1.25em;font-weight:600}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.1em 1em}dt{color:#666}dd{margin:0}"""

NOTE = """Workloads where a peer is faster come first. Times are medians of interleaved calls with a cold L2 cache;
steps of forward and backward are replayed from a CUDA graph, or else marked; times without a share of the ceiling are those of
calls back to back, of the host or in a CUDA graph with warm caches; "of ceiling" is the time at the copy and product rates of
the run over the time taken; "error / floor" is the RMS error in units of the error of rounding the exact result; "extra
MiB" is what a call holds beside its inputs and results, at its peak.
A result that is wrong is not timed."""


def _table(head: Sequence[str], lines: Iterable[tuple[str, Sequence[str]]], kind: str = "") -> str:
    """An HTML table of lines, each with its class."""
    first = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    body = "\n".join(
        f'<tr class="{line_kind}">' + "".join(f"<td>{html.escape(cell)}</td>" for cell in line) + "</tr>"
        for line_kind, line in lines
    )
    return f'<table class="{kind}"><thead><tr>{first}</tr></thead><tbody>\n{body}\n</tbody></table>'


def _rows_table(report: Report) -> str:
    lines = []
    for group in report.groups():
        for row in group:
            kind = "none" if row.ms is None else ""
            if row is group[0]:
                kind = "ours " + ("lose" if standing(group) < 1 else "win")
            lines.append((kind, cells(row, group[0])))
    return _table(COLUMNS, lines)


def _standings_table(report: Report) -> str:
    head = ("suite, operator, direction", "workloads", "a peer is faster", "least", "geometric mean", "most", "of ceiling, mean")
    lines = []
    for one in standings(report):
        share = f"{geometric_mean(one.shares):.0%}" if one.shares else ""
        ratios = (f"{ratio:.2f}x" for ratio in (one.ratios[0], one.mean, one.ratios[-1]))
        lines.append(("lose" if one.mean < 1 else "win", (one.name, str(len(one.ratios)), str(one.behind), *ratios, share)))
    return _table(head, lines, "few")


def to_html(report: Report, charts: dict[str, bytes]) -> str:
    """One file without external references: where we stand, the table (losing workloads first), the plots, what is missing."""
    escape = html.escape
    images = {
        name: f'<h2>{escape(plots.CHARTS[name])}</h2><img alt="{escape(plots.CHARTS[name])}" '
        f'src="data:image/png;base64,{base64.b64encode(png).decode()}">'
        for name, png in charts.items()
    }
    first = images.pop("standings", "")

    def listed(lines: Iterable[str]) -> str:
        return "<ul>" + ("".join(f"<li>{escape(line)}</li>" for line in lines) or "<li>nothing</li>") + "</ul>"

    facts = "".join(
        "<dl>" + "".join(f"<dt>{escape(str(key))}</dt><dd>{escape(str(value))}</dd>" for key, value in _facts(run)) + "</dl>"
        for run in report.runs
    )
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>vlmkernels benchmark</title><style>{STYLE}</style></head><body>
<h1>vlmkernels benchmark: {escape(report.device)}</h1>
<p class="verdict">{escape(verdict(report))}</p>
{_standings_table(report)}
{first}
<h2>Every workload</h2><p>{NOTE}</p>
{_rows_table(report)}
{"".join(images.values())}
<h2>Peers that are not installed</h2>{listed(_missing(report))}
<h2>Left out</h2>{listed(_left_out(report))}
<h2>Where and with what</h2>{facts}
</body></html>
"""


def _facts(run: Run) -> list[tuple[str, Any]]:
    facts: list[tuple[str, Any]] = []
    for key, value in run.record().items():
        if key in ("record", "schema", "left_out"):
            continue
        if isinstance(value, dict):
            facts.append((key, ", ".join(f"{name} {x}" for name, x in value.items() if x) or "-"))
        else:
            facts.append((key, value))
    return facts


def write(report: Report, folder: Path) -> list[Path]:
    """Write ``results.jsonl``, the plots and ``report.html`` into a folder; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    charts = plots.draw(report)
    results.write(report, folder / "results.jsonl")
    (folder / "report.html").write_text(to_html(report, charts), encoding="utf-8")
    for name, png in charts.items():
        (folder / f"{name}.png").write_bytes(png)
    return [folder / "results.jsonl", *(folder / f"{name}.png" for name in charts), folder / "report.html"]

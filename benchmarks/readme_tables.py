# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and the plot of the README from a results file: ``python benchmarks/readme_tables.py``.

A table stands between ``<!-- results: SUITE ... -->`` and ``<!-- end -->``; the words behind the suite choose directions and
operators (``bwd``, ``attention``). It has our row of every workload, those that lose first, and the runs they are of.
"""

import re
from pathlib import Path

from vlmkernels.bench import need, plots, results
from vlmkernels.bench.results import Report

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h200.jsonl"
PLOT = ROOT / "docs" / "standings.png"
HEADER = ("workload (bf16)", "vlmkernels", "best peer", "peer / ours", "of ceiling")


def time(ms: float) -> str:
    return f"{ms * 1e3:.3g} µs" if ms < 1 else f"{ms:.3g} ms" if ms < 100 else f"{ms:.0f} ms"


def table(report: Report, suite: str, *words: str) -> str:
    """A markdown table, and a line with the commits and ceilings of its runs."""
    lines, used = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"], set()
    for ours, *others in report.groups():
        if ours.ms is None or ours.suite != suite or not set(words) <= {ours.op, ours.direction}:
            continue
        used.add(ours.run)
        peer = next((row for row in others if row.provider == ours.best_peer), None)
        direction = "" if ours.direction == "fwd" else f", {ours.direction}"
        ceiling = {"gemm": "matrix rate", "copy": "copy"}.get(ours.ceiling, "")
        share = f"{100 * ours.ceiling_share:.0f} % of {ceiling}" if ours.ceiling_share and ceiling else ""
        rival = f"{peer.provider}, {time(peer.ms)}" if peer and peer.ms else ""
        ratio = f"{ours.speedup:.2f}" if ours.speedup else ""
        lines.append(f"| {ours.workload}{direction} | {time(ours.ms)} | {rival} | {ratio} | {share} |")
    runs = sorted((run for run in report.runs if run.started in used), key=lambda run: run.started)
    names = [run.environment["commit"] for run in runs]
    commits = sorted({f"`{name}`" if name else "not recorded" for name in names})
    ceilings = [[run.ceilings.gemm_tflops for run in runs], [run.ceilings.copy_gbs for run in runs]]
    tflops, gbs = (f"{min(x):.0f}" if min(x) == max(x) else f"{min(x):.0f} to {max(x):.0f}" for x in ceilings)
    return "\n".join([*lines, "", f"Commits: {', '.join(commits)}; ceilings: {tflops} TFLOP/s, {gbs} GB/s."])


def written(text: str, report: Report) -> str:
    """The text with its tables as the results have them."""

    def fill(found: re.Match[str]) -> str:
        return f"<!-- results: {found[1]} -->\n{table(report, *found[1].split())}\n<!-- end -->"

    return re.sub(r"<!-- results: (.*?) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    report = results.read(RESULTS)
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text(), report))
    need("matplotlib").use("Agg")
    PLOT.write_bytes(plots.standings_plot(report))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""Writes the tables and the plot of the README from a results file: ``python benchmarks/readme_tables.py``.

A table stands between ``<!-- results: SUITE ... -->`` and ``<!-- end -->``; the words behind the suite choose directions and
operators (``bwd``, ``attention``). It has our fastest form of every workload, those that lose first, and the runs they are of.
"""

import re
from pathlib import Path

from vlmkernels.bench import models, need, plots, results
from vlmkernels.bench.results import Report
from vlmkernels.bench.runner import OURS, Row

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h200.jsonl"
PLOT = ROOT / "docs" / "standings.png"
HEADER = ("workload (bf16)", "vlmkernels", "best peer", "peer / ours", "of ceiling")
#: The error of a model is that of the same model before, not compiled, in the same type.
MODELS = ("model (bf16)", "vlmkernels", "best of before", "before / after", "of the matrix rate", "error / before's")


def time(ms: float) -> str:
    return f"{ms * 1e3:.3g} µs" if ms < 1 else f"{ms:.3g} ms" if ms < 100 else f"{ms:.0f} ms"


def shares(row: Row) -> list[str]:
    """The share of a ceiling; of a model that of the matrix rate, and its error over the error before (``bench.models``)."""
    share = f"{100 * row.ceiling_share:.0f} %" if row.ceiling_share else ""
    if row.suite == "models":
        return [share, f"{models.MOST * row.error_over_floor / row.bound:.2f}" if row.error_over_floor and row.bound else ""]
    ceiling = {"gemm": "matrix rate", "copy": "copy"}.get(row.ceiling, "")
    return [f"{share} of {ceiling}" if share and ceiling else ""]


def table(report: Report, suite: str, *words: str) -> str:
    """A markdown table, and a line with the commits and ceilings of its runs."""
    header = MODELS if suite == "models" else HEADER
    lines, used = ["| " + " | ".join(header) + " |", "|---" * len(header) + "|"], set()
    for group in report.groups():
        first = group[0]
        if first.ms is None or first.suite != suite or not set(words) <= {first.op, first.direction}:
            continue
        used.add(first.run)
        ours = min((row for row in group if row.provider.startswith(OURS) and row.ms), key=lambda row: row.ms)
        peer = next((row for row in group if row.provider == first.best_peer), None)
        direction = "" if first.direction == "fwd" else f", {first.direction}"
        form = ours.provider.removeprefix(OURS)  # " compiled"
        rival = f"{peer.provider}, {time(peer.ms)}" if peer and peer.ms else ""
        ratio = f"{first.speedup:.2f}" if first.speedup else ""
        cells = [f"{first.workload}{direction}", f"{time(ours.ms)}{form}", rival, ratio, *shares(ours)]
        lines.append("| " + " | ".join(cells) + " |")
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

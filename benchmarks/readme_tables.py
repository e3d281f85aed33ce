# SPDX-License-Identifier: Apache-2.0
"""Writes the tables of the README from a results file: ``python benchmarks/readme_tables.py``.

A table stands between ``<!-- results: SUITE ... -->`` and ``<!-- end -->``; the words behind the suite choose directions and
operators (``bwd``, ``attention``). It has our row of every workload, those that lose first, and the runs they are of.
"""

import json
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "nvidia-h200.jsonl"
HEADER = ("workload (bf16)", "vlmkernels", "best peer", "peer / ours", "of ceiling")


def time(ms: float) -> str:
    return f"{ms * 1e3:.3g} µs" if ms < 1 else f"{ms:.3g} ms" if ms < 100 else f"{ms:.0f} ms"


def standings(records: list[dict[str, Any]]) -> list[tuple[dict[str, Any], dict[str, Any] | None]]:
    """Our row of every workload, with its best peer's, by how far ahead we are. A results file has one run of each."""
    workloads: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for row in records:
        if row["record"] == "row" and row["status"] == "ok":
            workloads.setdefault(tuple(row[key] for key in ("suite", "op", "workload", "direction")), []).append(row)
    found = []
    for rows in workloads.values():
        ours = next((row for row in rows if row["provider"].startswith("vlmkernels")), None)
        if ours is not None:
            found.append((ours, next((row for row in rows if row["provider"] == ours["best_peer"]), None)))
    return sorted(found, key=lambda pair: pair[0]["speedup"] or float("inf"))


def table(records: list[dict[str, Any]], suite: str, *words: str) -> str:
    """A markdown table, and a line with the commits and ceilings of its runs."""
    runs = {record["started"]: record for record in records if record["record"] == "run"}
    lines, used = ["| " + " | ".join(HEADER) + " |", "|---" * len(HEADER) + "|"], set()
    for ours, peer in standings(records):
        if ours["suite"] != suite or not set(words) <= {ours["op"], ours["direction"]}:
            continue
        used.add(ours["run"])
        direction = "" if ours["direction"] == "fwd" else f", {ours['direction']}"
        ceiling = {"gemm": "matrix rate", "copy": "copy"}.get(ours["ceiling"], "")
        share = f"{100 * ours['ceiling_share']:.0f} % of {ceiling}" if ours.get("ceiling_share") and ceiling else ""
        rival = f"{peer['provider']}, {time(peer['ms'])}" if peer else ""
        ratio = f"{ours['speedup']:.2f}" if ours["speedup"] else ""
        lines.append(f"| {ours['workload']}{direction} | {time(ours['ms'])} | {rival} | {ratio} | {share} |")
    facts = [runs[run] for run in sorted(used)]
    commits = sorted({f"`{run['commit']}`" if run["commit"] else "not recorded" for run in facts})
    ceilings = [[run["ceilings"][name] for run in facts] for name in ("gemm_tflops", "copy_gbs")]
    tflops, gbs = (f"{min(x):.0f}" if min(x) == max(x) else f"{min(x):.0f} to {max(x):.0f}" for x in ceilings)
    return "\n".join([*lines, "", f"Commits: {', '.join(commits)}; ceilings: {tflops} TFLOP/s, {gbs} GB/s."])


def written(text: str, records: list[dict[str, Any]]) -> str:
    """The text with its tables as the records have them."""

    def fill(found: re.Match[str]) -> str:
        return f"<!-- results: {found[1]} -->\n{table(records, *found[1].split())}\n<!-- end -->"

    return re.sub(r"<!-- results: (.*?) -->\n.*?<!-- end -->", fill, text, flags=re.DOTALL)


def main() -> None:
    records = [json.loads(line) for line in RESULTS.read_text().splitlines()]
    readme = ROOT / "README.md"
    readme.write_text(written(readme.read_text(), records))


if __name__ == "__main__":
    main()

# SPDX-License-Identifier: Apache-2.0
"""``vlmkernels bench``: run suites, print the table, write the report."""

import argparse
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from vlmkernels.cli import print_table

if TYPE_CHECKING:
    from vlmkernels.bench.results import Report
    from vlmkernels.bench.workloads import Workload

SUITES = ("main", "attention", "cross_attention", "patch_embed", "contrastive", "models", "rope", "overhead", "sweep", "smoke")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--suite", action="append", choices=SUITES, help="main (published towers on photos) by default; repeatable"
    )
    parser.add_argument(
        "--workload", action="append", default=[], metavar="WORD", help="only workloads with this in their id (repeatable)"
    )
    parser.add_argument(
        "--peers", action="append", default=[], metavar="WORD", help="only peers with this in their name (repeatable)"
    )
    parser.add_argument("--no-compile", action="store_true", help="leave out the peers that go through torch.compile")
    parser.add_argument("--quick", action="store_true", help="a quarter of the timing rounds")
    parser.add_argument(
        "--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="start no workload after this long"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument(
        "--out", type=Path, default=Path("vlmkernels-bench"), help="where results.jsonl, the plots and report.html go"
    )
    parser.add_argument("--results-dir", type=Path, help="also update <device>.jsonl in this folder (benchmarks/results)")
    parser.add_argument("--from", dest="results", type=Path, metavar="FILE", help="measure nothing: show this results file")
    parser.add_argument("--compare", type=Path, metavar="FILE", help="set our times beside those of an earlier results file")
    parser.add_argument(
        "--bound", type=float, default=0.05, help="with --compare: exit status 1 where we take more than this part longer (0.05)"
    )
    parser.add_argument("--commit", help="what is measured, where the package runs from a copy without .git")
    parser.add_argument("--list", action="store_true", help="print the workloads and stop")


def run(arguments: argparse.Namespace) -> int:
    from vlmkernels.bench import need, results, suites
    from vlmkernels.bench import report as reports

    work = suites.workloads(*(arguments.suite or ("main",)), words=arguments.workload)
    if arguments.list:
        print("\n".join(w.id for w in work))
        return 0
    if not work:
        raise ValueError(f"no workload has {' or '.join(arguments.workload)} in its id; --list prints them")
    for module in ("rich", "matplotlib"):
        need(module)
    console = need("rich.console").Console()
    if not console.is_terminal:
        console = need("rich.console").Console(width=120)
    before = results.read(arguments.compare) if arguments.compare else None
    report = results.read(arguments.results) if arguments.results else _measured(arguments, work, console)
    reports.print_table(report, console)
    paths = reports.write(report, arguments.out)
    if arguments.results_dir:
        paths.append(results.store(report, arguments.results_dir))
    for path in paths:
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    slower = _compared(report, before, arguments.bound) if before else False
    return 1 if report.failed or slower else 0


def _measured(arguments: argparse.Namespace, work: "Sequence[Workload]", console: Any) -> "Report":
    """Run the workloads, with their names on the console."""
    from vlmkernels.bench import ceilings, environment, need, results, runner
    from vlmkernels.bench.workloads import work_dtype

    device = torch.device(arguments.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # events are recorded on the current device's stream
    started, clock = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
    budget = (60.0 if device.type == "cuda" else 400.0) / (4 if arguments.quick else 1)
    options = runner.Options(not arguments.no_compile, tuple(arguments.peers), budget, arguments.time_limit)
    progress = need("rich.progress")
    with progress.Progress(
        progress.TextColumn("{task.description}"),
        progress.BarColumn(),
        progress.TimeElapsedColumn(),
        console=console,
        transient=True,
    ) as bar:
        task = bar.add_task("ceilings", total=len(work) + 1)
        ceiling = ceilings.measure(device, work_dtype(device))
        done = {"": 0}

        def show(message: str) -> None:
            done.setdefault(message.partition(": ")[0], len(done))
            bar.update(task, description=message, completed=len(done) - 1)

        rows, left_out = runner.run(work, device, ceiling, options, show)
    machine = environment.describe(device, arguments.commit)
    return results.Report([results.Run(started, time.perf_counter() - clock, machine, ceiling, left_out)], rows)


def _compared(report: "Report", before: "Report", bound: float) -> bool:
    """Print our times beside the earlier ones, the slowest first; whether one is past the bound."""
    from vlmkernels.bench import regressions

    found = regressions.changes(report, before)
    print_table(regressions.HEAD, [regressions.cells(change, bound) for change in found])
    slower = sum(change.worse(bound) for change in found)
    print(f"{len(found)} workloads, {slower} slower by more than {bound:.0%}, wrong or failed")
    return slower > 0

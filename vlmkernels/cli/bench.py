# SPDX-License-Identifier: Apache-2.0
"""``vlmkernels bench``: run suites, print the table, write the report."""

import argparse
import time
from datetime import datetime, timezone
from pathlib import Path

import torch

SUITES = ("main", "attention", "cross_attention", "patch_embed", "contrastive", "models", "rope", "overhead", "smoke")


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
        "--out", type=Path, default=Path("vlmkernels-bench"), help="where results.jsonl, plot.png and report.html go"
    )
    parser.add_argument("--results-dir", type=Path, help="also update <device>.jsonl in this folder (benchmarks/results)")
    parser.add_argument("--commit", help="what is measured, where the package runs from a copy without .git")
    parser.add_argument("--list", action="store_true", help="print the workloads and stop")


def run(arguments: argparse.Namespace) -> int:
    from vlmkernels.bench import ceilings, environment, need, suites
    from vlmkernels.bench import report as reports
    from vlmkernels.bench.runner import Options
    from vlmkernels.bench.runner import run as run_workloads
    from vlmkernels.bench.workloads import work_dtype

    work = suites.workloads(*(arguments.suite or ("main",)))
    work = [w for w in work if not arguments.workload or any(word in w.id for word in arguments.workload)]
    if arguments.list:
        print("\n".join(w.id for w in work))
        return 0
    if not work:
        raise ValueError(f"no workload has {' or '.join(arguments.workload)} in its id; --list prints them")
    for module in ("rich", "matplotlib"):
        need(module)
    device = torch.device(arguments.device)
    if device.index is not None:
        torch.cuda.set_device(device)  # events are recorded on the current device's stream
    console = need("rich.console").Console()
    if not console.is_terminal:
        console = need("rich.console").Console(width=120)
    started, clock = datetime.now(timezone.utc).isoformat(timespec="seconds"), time.perf_counter()
    budget = (60.0 if device.type == "cuda" else 400.0) / (4 if arguments.quick else 1)
    options = Options(not arguments.no_compile, tuple(arguments.peers), budget, arguments.time_limit)
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

        rows, left_out = run_workloads(work, device, ceiling, options, show)
    machine = environment.describe(device, arguments.commit)
    report = reports.Report(started, time.perf_counter() - clock, machine, ceiling, rows, left_out)
    reports.print_table(report, console)
    for path in reports.write(report, arguments.out).values():
        console.print(f"wrote {path}", markup=False, highlight=False, soft_wrap=True)
    if arguments.results_dir:
        console.print(f"wrote {reports.store(report, arguments.results_dir)}", markup=False, highlight=False, soft_wrap=True)
    return 1 if report.failed else 0

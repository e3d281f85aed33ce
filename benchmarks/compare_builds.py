# SPDX-License-Identifier: Apache-2.0
"""Builds of the CUDA library side by side, in turns on one GPU, for whoever changes a kernel:

    python benchmarks/compare_builds.py before=old.so after=new.so --suite attention --workload "D128/bwd"

Each build has a process of its own, which makes a workload's inputs, checks the result against fp64, and times it with a cold
cache whenever its turn comes. A GPU at its power limit may be slower for whoever comes first: that is another one every round.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
from statistics import median
from typing import Any

#: Milliseconds, about, for which a build is timed in its turn.
TURN_MS = 10.0


class Build:
    """A build's process, which answers each line of JSON with one."""

    def __init__(self, name: str, library: str, device: str) -> None:
        self.name = name
        command = [sys.executable, "-W", "ignore", os.path.abspath(__file__), "--answer", "--device", device]
        environment = {**os.environ, "VLMKERNELS_LIBRARY": os.path.abspath(library)}
        self.process = subprocess.Popen(command, env=environment, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE)

    def is_right(self, workload: str) -> bool:
        """Set up a workload, and compare its result."""
        return bool(self._ask(workload))

    def time(self) -> float:
        """Milliseconds of the workload that was set up last."""
        return float(self._ask(None))

    def _ask(self, workload: str | None) -> Any:
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write(json.dumps(workload) + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name}: its process ended with status {self.process.wait()}")
        return json.loads(answer)


def answer(device_name: str) -> None:
    """What a build's process does with what it is asked."""
    import torch

    from vlmkernels.bench import suites
    from vlmkernels.bench.timing import device_times

    device, answers = torch.device(device_name), sys.stdout
    known = {workload.id: workload for workload in suites.workloads(*suites.SUITES)}
    calls: dict[str, Any] = {}
    # What anything else prints is no answer.
    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        for line in sys.stdin:
            asked = json.loads(line)
            if asked is None:
                found: float = device_times(calls, device, TURN_MS)["ours"].ms
            else:
                calls.clear()
                case = known[asked].build(device)
                calls["ours"] = case.ours.prepare()
                found = all(case.check(calls["ours"]()))
            print(json.dumps(found), file=answers, flush=True)


def times(builds: list[Build], rounds: int) -> dict[str, float]:
    """The median of each build's turns."""
    samples: dict[str, list[float]] = {build.name: [] for build in builds}
    for i in range(rounds if builds else 0):
        first = i % len(builds)
        for build in builds[first:] + builds[:first]:
            samples[build.name].append(build.time())
    return {name: median(taken) for name, taken in samples.items()}


def main() -> int:
    from vlmkernels.bench import suites

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("builds", nargs="*", metavar="NAME=FILE", help="the first is what the others are set beside")
    parser.add_argument("--suite", action="append", choices=sorted(suites.SUITES), help="attention by default; repeatable")
    parser.add_argument("--workload", action="append", default=[], metavar="WORD", help="only those with this in their id")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--answer", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.answer:
        answer(arguments.device)
        return 0
    if not arguments.builds or any("=" not in build for build in arguments.builds):
        parser.error(f"builds: got {arguments.builds}, wanted NAME=FILE for each")
    work = suites.workloads(*(arguments.suite or ("attention",)), words=arguments.workload)
    if not work:
        parser.error(f"--workload: got {' and '.join(arguments.workload)}, which no workload has in its id")
    builds = [Build(*build.split("=", 1), arguments.device) for build in arguments.builds]
    wrong = False
    for workload in work:
        right = [build for build in builds if build.is_right(workload.id)]
        taken = times(right, arguments.rounds)
        base = taken.get(builds[0].name)
        cells = []
        for build in builds:
            ms = taken.get(build.name)
            beside = f" ({base / ms:.3f}x)" if base and ms and build is not builds[0] else ""
            cells.append(f"{build.name} {ms:.4f} ms{beside}" if ms else f"{build.name} wrong")
        print(f"{workload.id}: {', '.join(cells)}", flush=True)
        wrong |= len(right) < len(builds)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())

# SPDX-License-Identifier: Apache-2.0
"""What was measured: runs and their rows, in memory and as JSON lines, and where they stand beside the peers."""

import json
import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from vlmkernels.bench.ceilings import Ceilings
from vlmkernels.bench.runner import Row
from vlmkernels.bench.workloads import OURS

SCHEMA = 1


@dataclass
class Run:
    """When, where (``environment.describe``), the ceilings, what was left out; its ``started`` names it in every row."""

    started: str
    seconds: float
    environment: dict[str, Any]
    ceilings: Ceilings
    left_out: list[str]

    def record(self) -> dict[str, Any]:
        """The run as one JSON object."""
        return {
            "record": "run",
            "schema": SCHEMA,
            "started": self.started,
            "seconds": round(self.seconds, 1),
            **self.environment,
            "ceilings": asdict(self.ceilings),
            "left_out": self.left_out,
        }

    @classmethod
    def of(cls, record: dict[str, Any]) -> "Run":
        """The run of such an object."""
        own = {"record", "schema", *(field.name for field in fields(cls))}
        environment = {key: value for key, value in record.items() if key not in own}
        return cls(record["started"], record["seconds"], environment, Ceilings(**record["ceilings"]), record["left_out"])


class Report:
    """Rows and the runs that they are of: those of one run, or those that a results file keeps."""

    def __init__(self, runs: Sequence[Run], rows: Sequence[Row]) -> None:
        self.runs, self.rows = list(runs), list(rows)
        for row in self.rows:
            row.run = row.run or self.runs[-1].started

    @property
    def device(self) -> str:
        return " and ".join(dict.fromkeys(run.environment["device"] for run in self.runs))

    def records(self) -> list[dict[str, Any]]:
        """The runs, then the rows."""
        return [*(run.record() for run in self.runs), *(row.record() for row in self.rows)]

    def groups(self) -> list[list[Row]]:
        """The rows of each workload, ours first; the workload where we lose most comes first."""
        groups: dict[str, list[Row]] = {}
        for row in self.rows:
            groups.setdefault(row.id, []).append(row)
        return sorted(groups.values(), key=standing)

    @property
    def failed(self) -> list[Row]:
        """Our rows that are wrong or did not run."""
        return [row for row in self.rows if row.provider.startswith(OURS) and row.status in ("wrong", "failed")]


def standing(group: Sequence[Row]) -> float:
    """The best peer's time over ours; -1 where ours is wrong or did not run, infinity where there is no peer."""
    ours = group[0]
    if ours.status != "ok":
        return -1.0
    return ours.speedup if ours.speedup is not None else math.inf


@dataclass(frozen=True)
class Standing:
    """How the workloads of one kind stand: the best peer's time over ours of each, from the lowest, and shares of the ceiling."""

    name: str
    ratios: list[float]
    shares: list[float]

    @property
    def behind(self) -> int:
        return sum(ratio < 1 for ratio in self.ratios)

    @property
    def mean(self) -> float:
        """The geometric mean of the ratios."""
        return geometric_mean(self.ratios)


def geometric_mean(numbers: Sequence[float]) -> float:
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def standings(report: Report) -> list[Standing]:
    """One for each suite, operator and direction with a peer, that with the lowest mean first."""
    kinds: dict[str, list[Row]] = {}
    for row in report.rows:
        if row.provider == OURS and row.speedup is not None:
            what = row.suite if row.op == row.suite else f"{row.suite}, {row.op}"
            kinds.setdefault(f"{what}, {row.direction}", []).append(row)
    found = []
    for name, rows in kinds.items():
        ratios = sorted(row.speedup for row in rows if row.speedup is not None)
        found.append(Standing(name, ratios, [row.ceiling_share for row in rows if row.ceiling_share]))
    return sorted(found, key=lambda one: one.mean)


def lines(records: Iterable[dict[str, Any]]) -> str:
    """One JSON object a line."""
    # No infinity or NaN: other readers of JSON refuse them.
    return "".join(json.dumps(_finite(record), allow_nan=False) + "\n" for record in records)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(x) for key, x in value.items()}
    if isinstance(value, list):
        return [_finite(x) for x in value]
    return str(value) if isinstance(value, float) and value - value != 0 else value


def write(report: Report, path: Path) -> None:
    """The runs and rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(lines(report.records()))


def read(path: Path) -> Report:
    """What ``write`` wrote.

    Raises:
        ValueError: there is no such file, or no results in it.
    """
    if not path.is_file():
        raise ValueError(f"results: got {path}, wanted a results file that exists")
    records = [json.loads(line) for line in path.read_text().splitlines()]
    runs = [Run.of(record) for record in records if record["record"] == "run"]
    if not runs:
        raise ValueError(f"results: got {path} without a run, wanted what vlmkernels bench wrote")
    return Report(runs, [_row(record) for record in records if record["record"] == "row"])


def _row(record: dict[str, Any]) -> Row:
    numbers = {name: float(value) for name in ("error_over_floor", "bound") if isinstance(value := record[name], str)}
    return Row(**{key: value for key, value in (record | numbers).items() if key != "record"})


def store(report: Report, folder: Path) -> Path:
    """Put a report into ``folder/<device>.jsonl``, in the place of the workloads that it measured again."""
    slug = re.sub(r"[^a-z0-9]+", "-", report.device.lower()).strip("-")
    path = folder / f"{slug}.jsonl"
    before = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    measured = {row.id for row in report.rows}
    rows = [r for r in before if r["record"] == "row"]
    kept = [r for r in rows if "/".join(r[x] for x in ("suite", "op", "workload", "direction")) not in measured]
    runs = {r["run"] for r in kept}
    old = [r for r in before if r["record"] == "run" and r["started"] in runs]
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(lines([*old, *kept, *report.records()]))
    return path

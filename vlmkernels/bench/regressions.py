# SPDX-License-Identifier: Apache-2.0
"""Two results side by side: how our own times changed from one to the other."""

from dataclasses import dataclass

from vlmkernels.bench.results import Report
from vlmkernels.bench.runner import Row
from vlmkernels.bench.workloads import OURS


@dataclass(frozen=True)
class Change:
    """Our fastest form on one workload, before and now; ``note`` says why there are not two times to compare."""

    id: str
    before: Row
    now: Row | None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """The time now over the time before."""
        if self.note or self.now is None or self.now.ms is None or self.before.ms is None:
            return None
        return self.now.ms / self.before.ms

    def worse(self, bound: float) -> bool:
        """Whether it takes more than ``bound`` (0.05: 5 %) longer, or is wrong or does not run any more."""
        if self.now is not None and self.now.status in ("wrong", "failed"):
            return True
        return self.ratio is not None and self.ratio > 1 + bound


def changes(now: Report, before: Report) -> list[Change]:
    """One for each workload that had a time of ours before, the slowest first.

    Raises:
        ValueError: the two are of different devices.
    """
    if now.device != before.device:
        raise ValueError(f"--compare: got results of {before.device}, wanted those of {now.device}: machines are not compared")
    ours = _ours(now)
    found = [_change(row, ours.get(id_)) for id_, row in _ours(before).items() if row.ms is not None]
    return sorted(found, key=lambda change: -(change.ratio or 0.0) if not change.worse(float("inf")) else float("-inf"))


def _ours(report: Report) -> dict[str, Row]:
    """Our fastest row of each workload; one that is wrong or failed where there is no other."""
    best: dict[str, Row] = {}
    for row in report.rows:
        if row.provider.startswith(OURS):
            known = best.get(row.id)
            if known is None or known.ms is None or (row.ms is not None and row.ms < known.ms):
                best[row.id] = row
    return best


def _change(before: Row, now: Row | None) -> Change:
    note = ""
    if now is None:
        note = "not measured now"
    elif now.ms is None:
        note = f"{now.status}: {now.reason}"
    elif now.clock != before.clock:
        note = f"timed by {now.clock}, before by {before.clock}"
    return Change(before.id, before, now, note)


HEAD = ("workload", "before", "now", "now / before", "best peer / ours, before", "now", "note")


def cells(change: Change, bound: float) -> tuple[str, ...]:
    """A line of the table, in the order of ``HEAD``."""
    before, now = change.before, change.now
    ratio = "" if change.ratio is None else f"{change.ratio:.3f}"
    standing = ["" if row is None or row.speedup is None else f"{row.speedup:.2f}" for row in (before, now)]
    note = change.note or ("slower" if change.worse(bound) else "")
    return change.id, before.result, now.result if now is not None and now.ms is not None else "", ratio, *standing, note

# SPDX-License-Identifier: Apache-2.0
"""The plots of a report, each a PNG. Ours is blue, or red where a peer is faster; peers are grey, or have the other colours."""

import io
import json
import statistics
from collections.abc import Callable, Sequence
from typing import Any

from vlmkernels.bench import need, suites
from vlmkernels.bench.results import Report, standings
from vlmkernels.bench.runner import MICROSECONDS, Row
from vlmkernels.bench.workloads import OURS, Place

#: The plots in the order of the report, with what they show. One without anything to show is left out.
CHARTS = {
    "standings": "Time of the best peer over ours",
    "length": "Attention: speed against the length of the sequence",
    "head_dim": "Attention: speed against the head dim, at 4096 tokens",
    "masks": "Attention with a mask: share of the ceiling",
    "memory": "Contrastive losses: memory beside inputs and results",
    "roofline": "Roofline",
    "overhead": "Time of the host, and latency in a CUDA graph",
}
BLUE, RED, GREY = "#1f77b4", "#d62728", "#c7c7c7"


def draw(report: Report) -> dict[str, bytes]:
    """A PNG for each of ``CHARTS`` that these rows give something for."""
    need("matplotlib").use("Agg")
    groups = report.groups()
    places = {work.id: work.places for work in suites.workloads(*suites.SUITES)}
    placed = [(place, group) for group in groups for place in places.get(group[0].id, ())]
    found = {"standings": standings_plot(report)}
    for chart, axes in _CURVES.items():
        found[chart] = _curves(report, [(place, group) for place, group in placed if place.chart == chart], *axes)
    found["masks"] = _bars(report, [group for place, group in placed if place.chart == "masks" and _timed(group)])
    found["roofline"] = _roofline(report)
    found["overhead"] = _bars(report, [group for group in groups if group[0].clock in MICROSECONDS and _timed(group)])
    return {chart: found[chart] for chart in CHARTS if found[chart]}


def _figure(width: float, height: float, columns: int = 1) -> tuple[Any, Any]:
    figure, axes = need("matplotlib.pyplot").subplots(1, columns, figsize=(width, height), squeeze=False, layout="constrained")
    for axis in axes[0]:
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def _png(figure: Any, dpi: int = 110, **metadata: str) -> bytes:
    buffer = io.BytesIO()
    # Without its version of matplotlib, so that the same results give the same file.
    figure.savefig(buffer, format="png", dpi=dpi, metadata={"Software": None, **metadata})
    need("matplotlib.pyplot").close(figure)
    return buffer.getvalue()


def standings_data(report: Report) -> str:
    """What ``standings_plot`` shows, as JSON."""
    return json.dumps([[one.name, [round(ratio, 3) for ratio in one.ratios]] for one in standings(report)])


def standings_plot(report: Report) -> bytes:
    """Each workload a dot at the best peer's time over ours, in a line for its kind. The file holds its data as a comment."""
    found = standings(report)
    if not found:
        return b""
    figure, (axis,) = _figure(9, 0.9 + 0.32 * len(found))
    for place, one in enumerate(found):
        colors = [RED if ratio < 1 else BLUE for ratio in one.ratios]
        axis.scatter(one.ratios, [place] * len(one.ratios), c=colors, s=26, alpha=0.65, linewidths=0)
        axis.plot([one.mean] * 2, [place - 0.36, place + 0.36], color="black", linewidth=2)
        behind = f", {one.behind} behind" if one.behind else ""
        axis.text(1.01, place, f"{one.mean:.2f}x of {len(one.ratios)}{behind}", va="center", fontsize=8,
                  transform=axis.get_yaxis_transform(), color=RED if one.behind else "black")  # fmt: skip
    axis.axvline(1, color=RED, linewidth=1)
    axis.set_xscale("log")
    ends = min(0.6, *(one.ratios[0] for one in found)), max(2, *(one.ratios[-1] for one in found))
    marks = [x for x in (0.25, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50) if ends[0] / 1.1 <= x <= ends[1] * 1.1]
    axis.set_xlim(ends[0] / 1.1, ends[1] * 1.1)
    axis.set_xticks(marks, [f"{x:g}x" for x in marks])
    axis.set_xticks([], minor=True)
    axis.set_yticks(range(len(found)), [one.name for one in found], fontsize=8)
    axis.set_ylim(len(found) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)
    axis.set_xlabel("time of the best peer / ours; left of 1 the peer is faster; bar: geometric mean", fontsize=8)
    axis.set_title(report.device, fontsize=9)
    return _png(figure, 90, Comment=standings_data(report))


#: Of the plots with lines: the label of the x axis and that of the y axis, and y of a row.
_CURVES: dict[str, tuple[str, str, Callable[[Row], float | None]]] = {
    "length": ("tokens", "TFLOP/s", lambda row: row.tflops),
    "head_dim": ("head dim", "TFLOP/s", lambda row: row.tflops),
    "memory": ("pairs", "MiB", lambda row: row.extra_bytes and row.extra_bytes / 2**20),
}


def _curves(
    report: Report, placed: Sequence[tuple[Place, list[Row]]], x_label: str, y_label: str, y: Callable[[Row], float | None]
) -> bytes:
    """A panel for each of a chart's panels, with a line for each provider and, for speeds, that of the ceiling."""
    panels: dict[str, dict[str, list[tuple[float, float]]]] = {}
    for place, group in placed:
        for row in group:
            if value := y(row):
                panels.setdefault(place.panel, {}).setdefault(row.provider, []).append((place.x, value))
    panels = {name: lines for name, lines in panels.items() if len({x for line in lines.values() for x, _ in line}) > 1}
    if not panels:
        return b""
    figure, axes = _figure(1 + 4.5 * len(panels), 4, len(panels))
    names = sorted({name for lines in panels.values() for name in lines}, key=lambda name: (not name.startswith(OURS), name))
    colors = {name: BLUE if name == OURS else f"C{i % 9 + 1}" for i, name in enumerate(names)}
    for axis, (panel, lines) in zip(axes, sorted(panels.items()), strict=True):
        for name in sorted(lines, key=names.index):
            points = sorted(lines[name])
            wide = 2.5 if name == OURS else 1.2
            axis.plot(*zip(*points, strict=True), marker="o", markersize=4, linewidth=wide, color=colors[name], label=name)
        ticks = sorted({x for points in lines.values() for x, _ in points})
        if y_label == "TFLOP/s":
            ceiling = statistics.median(run.ceilings.gemm_tflops for run in report.runs)
            axis.axhline(ceiling, color="black", linewidth=1, linestyle="--", label=f"ceiling: product, {ceiling:.0f}")
            axis.set_ylim(0, 1.05 * ceiling)
        else:
            axis.set_yscale("log")
        axis.set_xscale("log", base=2)
        axis.set_xticks(ticks, [f"{x:g}" for x in ticks], fontsize=7, rotation=60)
        axis.set_title(panel, fontsize=9)
        axis.set_xlabel(x_label)
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    axes[0].set_ylabel(y_label)
    return _png(figure)


def _timed(group: Sequence[Row]) -> list[Row]:
    return [row for row in group if row.ms is not None]


def _bars(report: Report, groups: Sequence[Sequence[Row]]) -> bytes:
    """A bar for each provider of each workload: its share of the ceiling, or microseconds where no rate bounds it."""
    by_clock: dict[str, list[Sequence[Row]]] = {}
    for group in groups:
        by_clock.setdefault(group[0].clock if group[0].clock in MICROSECONDS else "", []).append(group)
    if not by_clock:
        return b""
    bars = [sum(len(_timed(group)) + 1 for group in shown) for shown in by_clock.values()]
    figure, axes = need("matplotlib.pyplot").subplots(
        len(bars), 1, figsize=(11, 1.6 + 0.24 * sum(bars)), height_ratios=bars, squeeze=False, layout="constrained"
    )
    for axis, (clock, shown) in zip(axes[:, 0], by_clock.items(), strict=True):
        _panel_of_bars(axis, shown, bool(clock))
        axis.set_xlabel(MICROSECONDS.get(clock, "% of the ceiling: the larger of its time at the copy and at the product rate"))
        if not clock:
            axis.axvline(100, color="black", linewidth=1.2)
            axis.set_xlim(0, max(105, axis.get_xlim()[1]))
    figure.suptitle(report.device)
    return _png(figure)


def _panel_of_bars(axis: Any, groups: Sequence[Sequence[Row]], microseconds: bool) -> None:
    position, ticks, labels = 0.0, [], []
    for group in groups:
        axis.text(0, position, f" {group[0].title}", va="center", fontsize=8, fontweight="bold")
        position += 1
        for row in sorted(_timed(group), key=lambda r: r.ms or 0.0):
            value = (row.ms or 0.0) * 1e3 if microseconds else 100 * (row.ceiling_share or 0.0)
            axis.barh(position, value, height=0.8, color=BLUE if row.provider.startswith(OURS) else GREY)
            axis.text(value, position, f" {row.result}", va="center", fontsize=7)
            ticks.append(position)
            labels.append(row.provider)
            position += 1
    axis.set_yticks(ticks, labels, fontsize=8)
    axis.set_ylim(max(position, 1) - 0.4, -0.6)
    axis.grid(axis="x", alpha=0.3)


def _roofline(report: Report) -> bytes:
    """Speed over operations per byte: ours, the best peer on the same vertical, and the two ceilings."""
    pairs = []
    for group in report.groups():
        ours = group[0]
        own = max((row.tflops or 0.0 for row in group if row.provider.startswith(OURS)), default=0.0)
        if own and ours.bytes:
            peer = next((row.tflops for row in group if row.provider == ours.best_peer), None)
            pairs.append((ours.flops / ours.bytes, own, peer))
    if not pairs:
        return b""
    figure, (axis,) = _figure(9, 5.5)
    copy = statistics.median(run.ceilings.copy_gbs for run in report.runs)
    product = statistics.median(run.ceilings.gemm_tflops for run in report.runs)
    for x, own, peer in pairs:
        if peer:
            axis.plot([x, x], [own, peer], color=GREY, linewidth=1, zorder=1)
            axis.scatter(x, peer, color="#7f7f7f", marker="_", s=40, zorder=2)
        axis.scatter(x, own, color=RED if peer and peer > own else BLUE, s=22, zorder=3)
    ends = min(x for x, _, _ in pairs) / 1.5, max(*(x for x, _, _ in pairs), 1e3 * product / copy) * 1.5
    knee = 1e3 * product / copy
    roof = [x for x in (ends[0], knee, ends[1]) if x >= ends[0]]
    axis.plot(roof, [min(x * copy / 1e3, product) for x in roof], color="black", linewidth=1.2)
    axis.set_xscale("log")
    axis.set_yscale("log")
    axis.set_xlabel("operations per byte")
    axis.set_ylabel("TFLOP/s")
    axis.set_title(f"ours (red: the best peer, the dash, is faster) under copy {copy:.0f} GB/s and product {product:.0f} TFLOP/s",
                   fontsize=9)  # fmt: skip
    axis.grid(alpha=0.3)
    return _png(figure)

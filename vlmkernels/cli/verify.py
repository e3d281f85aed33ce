# SPDX-License-Identifier: Apache-2.0
"""``vlmkernels verify``: the table of errors, and a non-zero exit status where one is over its bound.

With ``--model`` it is a model's layers, before and after ``accelerate``, that are compared.
"""

import argparse
import importlib.util
import json
import os
import time
from pathlib import Path

import torch

from vlmkernels.bench import environment
from vlmkernels.cli import print_table
from vlmkernels.ops._op import BACKENDS
from vlmkernels.testing import interpreter
from vlmkernels.verify import Check, verify

OPERATORS = (
    *("activated_linear", "attention", "contrastive", "feed_forward", "layer_norm", "linear_add_norm"),
    *("patch_embed", "pos_embed", "rope", "tile_bounds"),
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--op", action="append", default=[], choices=OPERATORS, help="only this operator (repeatable)")
    parser.add_argument("--backend", action="append", default=[], choices=BACKENDS, help="only this backend (repeatable)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cuda, cuda:1, cpu")
    parser.add_argument("--quick", action="store_true", help="two head dims instead of eight")
    parser.add_argument(
        "--case", action="append", default=[], metavar="WORD", help="only with this in 'op / case / dtype'; repeatable"
    )
    parser.add_argument(
        "--model", action="append", default=[], metavar="NAME", help="no operators but this model, accelerated: clip, blip2 ..."
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write every check as one JSON object a line")
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="a line for every check, not only the worst and the bad ones"
    )


def run(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device)
    if os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton"):
        interpreter.install()  # Triton's interpreter alone computes bf16 wrong
    if arguments.model:
        return _models(arguments.model, device)
    started = time.perf_counter()
    print(f"on {environment.device_name(device)}, torch {torch.__version__}; error over floor against the fp64 reference\n")
    show = _print_line if arguments.verbose else _print_bad
    checks = verify(device, arguments.op, arguments.backend, arguments.quick, arguments.case, show)
    print_table(*summary(checks))
    if arguments.json:
        lines = [json.dumps({"record": "run", **environment.describe(device)})]
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text("\n".join([*lines, *(json.dumps(_plain(check)) for check in checks)]) + "\n")
    bad = sum(check.bad for check in checks)
    compared = sum(check.error_over_floor is not None for check in checks)
    print(f"\n{compared} comparisons in {time.perf_counter() - started:.0f} s, {bad} bad")
    if compared == 0:
        print("nothing could be compared")
    return 1 if bad or compared == 0 else 0


def _models(names: list[str], device: torch.device) -> int:
    """Each layer's error beside the original's own; 1 where one is over its bound, or none was called."""
    from vlmkernels.bench import models

    bad = 0
    for name in names:
        for title, report in models.verified(name, device):
            over = models.over_bound(report, device)
            print(f"{title} on {environment.device_name(device)}, random weights\n{report}")
            for row in over:
                print(f"OVER THE BOUND: {row.name}, {row.layer}")
            bad += len(over) or not any(row.errors for row in report.replaced)
    print(f"{bad} bad")
    return 1 if bad else 0


def _plain(check: Check) -> dict[str, object]:
    """The check with no infinity in it: other readers of JSON refuse one."""
    return {key: str(x) if isinstance(x, float) and x - x != 0 else x for key, x in check.record().items()}


def _print_bad(check: Check) -> None:
    if check.bad:
        _print_line(check)


def _print_line(check: Check) -> None:
    error = (
        "" if check.error_over_floor is None else f" {check.output} {check.error_over_floor:.2f} floors, bound {check.bound:g}"
    )
    what = f"{check.op} / {check.case} / {check.dtype} / {check.backend}"
    print(f"{check.status:11s} {what}:{error} {check.reason}".rstrip(), flush=True)


def summary(checks: list[Check]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    """One line for each operator, backend and dtype: how many cases ran, and the one nearest to its bound."""
    groups: dict[tuple[str, str, str], list[Check]] = {}
    for check in checks:
        groups.setdefault((check.op, check.backend, check.dtype), []).append(check)
    rows: list[tuple[str, ...]] = []
    for (op, backend, dtype), group in groups.items():
        compared = [c for c in group if c.error_over_floor is not None and c.bound is not None]
        if not compared:
            bad = [c for c in group if c.bad]
            rows.append((op, backend, dtype, "0", "", "", f"{'FAILED: ' if bad else ''}{(bad or group)[0].reason}"))
            continue
        worst = max(compared, key=lambda c: (c.bad, (c.error_over_floor or 0.0) / max(c.bound or 0.0, 1e-9)))
        bad_count = sum(c.bad for c in group)
        verdict = f"{bad_count} BAD" if bad_count else "ok"
        skipped = len(group) - len(compared) - sum(c.status == "failed" for c in group)
        cases = str(len(compared)) + (f" ({skipped} not for it)" if skipped else "")
        rows.append(
            (
                op,
                backend,
                dtype,
                cases,
                f"{worst.error_over_floor:.2f}",
                f"{worst.bound:g}",
                f"{verdict}; {worst.case}, {worst.output}",
            )
        )
    return ("op", "backend", "dtype", "compared", "worst", "bound", "result and worst case"), rows

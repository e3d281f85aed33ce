# SPDX-License-Identifier: Apache-2.0
"""benchmarks/compare_builds.py, and the environment variable by which each build's process takes its own library."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlmkernels.backends.cuda import _library

ROOT = Path(__file__).parents[1]


def compare_builds(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(ROOT / "benchmarks" / "compare_builds.py"), "--device", "cpu", "--suite", "smoke", *arguments]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, env=environment)


def test_builds_take_turns() -> None:
    """On a CPU no build takes part, but both processes check and time the workload, and the second is set beside the first."""
    done = compare_builds("before=a.so", "after=b.so", "--workload", "rope/norm", "--rounds", "3")
    assert done.returncode == 0, done.stderr
    found = re.fullmatch(r"smoke/rope/norm/fwd: before ([\d.]+) ms, after ([\d.]+) ms \(([\d.]+)x\)\n", done.stdout)
    assert found, done.stdout
    before, after, ratio = map(float, found.groups())
    assert ratio == pytest.approx(before / after, rel=0.02)


def test_a_build_needs_a_name() -> None:
    done = compare_builds("old.so")
    assert done.returncode == 2
    assert "builds: got ['old.so'], wanted NAME=FILE for each" in done.stderr


def test_a_word_that_no_workload_has() -> None:
    done = compare_builds("before=a.so", "--workload", "nothing like it")
    assert done.returncode == 2
    assert "--workload: got nothing like it, which no workload has in its id" in done.stderr


def test_library_of_the_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    named = tmp_path / "other.so"
    monkeypatch.setenv("VLMKERNELS_LIBRARY", str(named))
    assert _library.path.__wrapped__() == named
    monkeypatch.setattr(_library, "path", lambda: named)
    reason = _library._load.__wrapped__()
    assert isinstance(reason, str) and "does not load" in reason and str(named) in reason

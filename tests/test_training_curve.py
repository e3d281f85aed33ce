# SPDX-License-Identifier: Apache-2.0
"""benchmarks/training_curve.py at a tiny setting: three runs that begin alike, learn, and stay together."""

import json
import runpy
from pathlib import Path

import pytest
from conftest import DEVICE
from nn_parity import quick_backend

__all__ = ["quick_backend"]
pytest.importorskip("skimage", reason="the photos are scikit-image's")
SCRIPT = Path(__file__).parents[1] / "benchmarks" / "training_curve.py"


def test_three_runs(tmp_path: Path) -> None:
    arguments = ["--steps", "6", "--batch", "4", "--width", "128", "--grid", "4", "--device", DEVICE.type]
    found = runpy.run_path(str(SCRIPT))["main"]([*arguments, "--results", str(tmp_path / "curve.json")])
    assert json.loads((tmp_path / "curve.json").read_text()) == found
    reference, *others = (run["losses"] for run in found["runs"].values())
    assert len(others) == 2 and reference[-1] < reference[0] - 0.1
    for losses in others:
        assert all(abs(x - y) < 0.02 for x, y in zip(losses, reference, strict=True))

# SPDX-License-Identifier: Apache-2.0
"""The examples at a tiny setting: they run, replace layers, and tell what they promise."""

import runpy
from pathlib import Path
from typing import Any

import pytest
from conftest import DEVICE
from nn_parity import quick_backend

__all__ = ["quick_backend"]
pytest.importorskip("transformers", minversion="5.17", reason="accelerate needs its attention interface")
pytest.importorskip("skimage", reason="the photos are scikit-image's")
FOLDER = Path(__file__).parents[1] / "examples"


def run(name: str, *arguments: str) -> dict[str, Any]:
    found: dict[str, Any] = runpy.run_path(str(FOLDER / f"{name}.py"))["main"]([*arguments, "--device", DEVICE.type])
    return found


def test_clip_retrieval() -> None:
    """It has learnt to find a crop's caption more often than by chance, which is one in eight."""
    found = run("clip_retrieval", "--steps", "60", "--width", "32")
    assert found["replaced"] == 14 and found["right"] > 0.25
    assert found["same"] == 1 and 0 < found["error"] < 1e-5


def test_blip2_captions() -> None:
    found = run("blip2_captions", "--photos", "3", "--new", "5", "--width", "64", "--layers", "2")
    assert found["replaced"] == 10 and found["tokens"] >= 15 and found["same"] == 1


def test_gemma3_prefill() -> None:
    found = run("gemma3_prefill", "--width", "64", "--layers", "2", "--text", "9")
    assert found["replaced"] == 12 and found["tokens"] == 5 * 16 + 7 * 9
    assert found["original"] < 1e-5 and found["fused"] <= 2 * found["original"]


def test_every_example_is_run_here() -> None:
    here = Path(__file__).read_text()
    assert all(f'run("{path.stem}"' in here for path in FOLDER.glob("*.py"))

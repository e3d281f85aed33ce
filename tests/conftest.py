# SPDX-License-Identifier: Apache-2.0
"""What every test shares: the device, the backends that run on it, reproducible seeds, and outputs that show what wasn't written.

Without a GPU, or with ``TRITON_INTERPRET=1``, everything runs on the CPU and Triton kernels run in Triton's interpreter, mended
for bfloat16. Triton reads the variable when a kernel is decorated, so this file sets it before anything imports Triton.
"""

import contextlib
import functools
import os
import subprocess
import sys
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, Phase, settings

ROOT = Path(__file__).parents[1]
ON_GPU = torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET", "0") != "1"
DEVICE = torch.device("cuda" if ON_GPU else "cpu")

# Tests are small, and there may be a process for each core: with one thread the losses of three models take 12 s of a CPU instead
# of 28, as two mostly wait for each other (2 cores). Processes that tests start get it from the variable.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

if not ON_GPU:
    if "triton" in sys.modules and os.environ.get("TRITON_INTERPRET", "0") != "1":
        raise RuntimeError("Triton was imported before tests/conftest.py could set TRITON_INTERPRET=1")
    os.environ["TRITON_INTERPRET"] = "1"

from vlmkernels.backends.cuda._library import path  # noqa: E402
from vlmkernels.ops._op import OPS, ORDER, Op  # noqa: E402
from vlmkernels.testing import interpreter  # noqa: E402

if not ON_GPU:
    # Masked lanes compute -inf - -inf, as they do on a GPU.
    numpy.seterr(all="ignore")
    with contextlib.suppress(ImportError):
        interpreter.install()


THOROUGH = 2000
#: A case may compile kernels, so no time is too long, and none is spent on making a case that fails smaller (5 minutes for one of
#: attention in the interpreter). How many cases there are is said by ``examples``; the few are the same in every run.
_ANY: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck), "report_multiple_bugs": False}
_ANY["phases"] = [Phase.explicit, Phase.reuse, Phase.generate]
settings.register_profile("few", derandomize=True, **_ANY)
settings.register_profile("thorough", max_examples=THOROUGH, **_ANY)
settings.load_profile("few")


def is_thorough() -> bool:
    return settings.default.max_examples == THOROUGH


def examples(few: int, thorough: int = THOROUGH) -> settings:
    """A property is tested with ``few`` cases, or with ``thorough`` of them where ``--hypothesis-profile=thorough`` asks."""
    return settings(max_examples=thorough if is_thorough() else few)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--unwritten", action="store_true", help="leave what backends allocate as it is, for initcheck to see")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "gpu: needs a GPU")
    config.addinivalue_line(
        "markers",
        "backends(*ops, exclude=()): run the test once for each backend that runs all these registered ops here, named by the "
        "argument `backend`",
    )


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not ON_GPU:
        reason = "TRITON_INTERPRET=1 keeps the tests on the CPU" if torch.cuda.is_available() else "no GPU"
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason=reason))


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many generated cases were right, by what tests record as the property ``cases of <operator>, <backend>``."""
    cases: Counter[str] = Counter()
    for report in terminalreporter.stats.get("passed", []):
        cases.update({name: value for name, value in report.user_properties if name.startswith("cases of ")})
    if is_thorough():
        for name, value in sorted(cases.items()):
            terminalreporter.write_line(f"{value} generated {name}")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    marker = metafunc.definition.get_closest_marker("backends")
    if marker and "backend" in metafunc.fixturenames:
        exclude = marker.kwargs.get("exclude", ())
        metafunc.parametrize("backend", [name for name in runnable(*marker.args) if name not in exclude])


def runnable(*ops: str) -> list[str]:
    """The backends that run all these registered ops (``"attention_fwd"``) on the test device, whatever the inputs."""
    return [name for name in ORDER if all(OPS[op].why_not(name, DEVICE) is None for op in ops)]


def capture(step: Callable[[], Any]) -> tuple[torch.cuda.CUDAGraph, Any]:
    """``step`` in a CUDA graph, and the tensors that it leaves there; before that it is called once, on another stream."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    return graph, captured


needs_gloo = pytest.mark.skipif(not (dist.is_available() and dist.is_gloo_available()), reason="torch was built without gloo")


def run_two_ranks(script: str, folder: Path, **variables: str) -> None:
    """Two processes run a script of this folder, with their rank, 2 and a file to meet at; both must succeed."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "PYTHONPATH": path, "VLMKERNELS_BACKEND": "torch", **variables}
    command = [sys.executable, str(ROOT / "tests" / script)]
    ranks = [
        subprocess.Popen([*command, str(rank), "2", str(folder / "store")], stderr=subprocess.PIPE, text=True, env=environment)
        for rank in range(2)
    ]
    for rank in ranks:
        _, errors = rank.communicate(timeout=300)
        assert rank.returncode == 0, errors


@pytest.fixture
def device() -> torch.device:
    return DEVICE


@pytest.fixture
def cuda_library(device: torch.device) -> None:
    """Skips where the CUDA kernels have no place to be; a library that is there and does not load fails."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        pytest.skip("the kernels are for compute capability 9.0")
    if path() is None:
        pytest.skip("the CUDA library was not built")
    for name in ("attention_fwd", "patch_embed_fwd"):
        assert OPS[name].why_not("cuda", device) is None


@pytest.fixture(autouse=True)
def seed(request: pytest.FixtureRequest) -> None:
    """The same inputs in every run and in any order of tests, and others in every test."""
    torch.manual_seed(zlib.crc32(request.node.nodeid.encode()))


@pytest.fixture(autouse=True)
def unwritten_outputs_show(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill with NaN (integers: -1) what a backend allocates uninitialised: an element that no kernel writes fails the test."""
    if request.config.getoption("--unwritten"):
        return
    for name in ("select", "planned"):
        choose = getattr(Op, name)

        @functools.wraps(choose)
        def poisoned(self: Op, *args: Any, choose: Callable[..., Any] = choose) -> Callable[..., Any] | None:
            function = choose(self, *args)

            def run(*args: Any) -> Any:
                with poisoned_empty():
                    return function(*args)

            return None if function is None else run

        monkeypatch.setattr(Op, name, poisoned)


EMPTY = ((torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"))
EMPTY += ((torch.Tensor, "new_empty"), (torch.Tensor, "new_empty_strided"))


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """Uninitialised allocations from Python come filled with NaN, or -1, inside."""

    def poison(original: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def call(*args: Any, **kwargs: Any) -> torch.Tensor:
            out = original(*args, **kwargs)
            if out.dtype.is_floating_point:
                return out.fill_(float("nan"))
            return out.fill_(255 if out.dtype == torch.uint8 else True if out.dtype == torch.bool else -1)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in EMPTY:
            patch.setattr(owner, name, poison(getattr(owner, name)))
        yield

# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel compiles for sm_80, sm_90 and sm_100 in the configurations its launcher picks, and spills no registers.

No GPU takes part: one process for each architecture turns launches into compilations (vlmkernels/backends/triton/_aot.py).
"""

import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton", reason="triton is not installed")

ROOT = Path(__file__).parents[1]
KERNELS = ROOT / "vlmkernels" / "backends" / "triton"
MODULES = sorted(path.stem for path in KERNELS.glob("*.py") if not path.stem.startswith("_"))
#: By compute capability, every how manyth case is compiled. Each takes seconds, and most of the configurations are
#: those of sm_90.
ARCHS = {80: 2, 90: 1, 100: 4}


def start(*args: str) -> subprocess.Popen[str]:
    """Python with real Triton, which the interpreter's variable would replace for the whole process."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environment.get("PYTHONPATH", "")]))
    return subprocess.Popen([sys.executable, *args], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)


def lines(process: subprocess.Popen[str], first: str) -> list[Any]:
    """The lines of JSON that it prints; ptxas prints others between them."""
    out, err = process.communicate(timeout=1200)
    assert process.returncode == 0, err
    return [json.loads(line) for line in out.splitlines() if line.startswith(first)]


@functools.cache
def compiled() -> dict[int, list[dict[str, Any]]]:
    """What every kernel of every module uses on each architecture; they compile side by side."""
    aot = "vlmkernels.backends.triton._aot"
    processes = {arch: start("-m", aot, str(arch), str(every), *MODULES) for arch, every in ARCHS.items()}
    return {arch: lines(process, "{") for arch, process in processes.items()}


@pytest.mark.parametrize("module", MODULES)
@pytest.mark.parametrize("arch", ARCHS)
def test_kernels_compile_without_spills(module: str, arch: int) -> None:
    results = [result for result in compiled()[arch] if result["module"] == module]
    assert results, f"{module} declares no aot_cases()"
    problems = [f"{r['case']} {r['kernel']} (warps {r['num_warps']}): {r['problem']}" for r in results if r["problem"]]
    assert not problems, "\n".join(problems)


def test_cases_reach_every_kernel() -> None:
    kernels = set()
    for path in KERNELS.glob("*.py"):
        kernels |= set(re.findall(r"^@triton\.jit\b.*\n(?:@.*\n)*def (_\w+_kernel)\(", path.read_text(), re.MULTILINE))
    assert not kernels - {result["kernel"] for results in compiled().values() for result in results}


TOY = """
import json
import torch, triton, triton.language as tl
from vlmkernels.backends.triton._aot import AotCase, compile_case

@triton.jit
def _square_kernel(a_ptr, out_ptr, stride, N: tl.constexpr):
    offs = tl.arange(0, N)[:, None] * stride + tl.arange(0, N)[None, :]
    a = tl.load(a_ptr + offs)
    tl.store(out_ptr + offs, tl.dot(a, a))

def square(n, num_warps, **options):
    a = torch.empty(n, n, dtype=torch.bfloat16)
    _square_kernel[lambda meta: (1,)](a, torch.empty(n, n), a.stride(0), N=n, num_warps=num_warps, **options)

def spilling():
    square(128, 4, maxnreg=96)

allowed = dict(stack={90: 4096}, reason="a test")
cases = [(90, AotCase("fits", lambda: square(32, 4))), (80, AotCase("spills", spilling)), (90, AotCase("none", lambda: None)),
         (90, AotCase("raises", lambda: square(1, 4))), (90, AotCase("allowed", spilling, **allowed))]
for arch, case in cases:
    for resources in compile_case(case, arch):
        print(json.dumps([case.name, resources.arch, resources.spills, resources.problem()]))
"""


def test_gate_finds_what_it_is_for(tmp_path: Path) -> None:
    script = tmp_path / "toy.py"
    script.write_text(TOY)
    found = {case: values for case, *values in lines(start(str(script)), "[")}
    assert found["fits"] == [90, 0, ""]
    assert found["spills"][1] > 0 and "spill instructions" in found["spills"][2]
    assert found["allowed"][1] > 0 and found["allowed"][2] == ""
    assert "launched no kernel" in found["none"][2]
    assert "Error" in found["raises"][2]


def test_shared_memory_has_a_limit() -> None:
    from vlmkernels.backends.triton._aot import Resources

    def resources(arch: int) -> Resources:
        return Resources("", "", arch, 4, 3, registers=64, stack=0, spills=0, shared=200_000, allowed_stack=0)

    assert "200000 bytes of shared memory" in resources(80).problem()
    assert not resources(90).problem()

# SPDX-License-Identifier: Apache-2.0
"""Compiles what the launchers launch, for any architecture and without a GPU, and reads registers, stack and shared memory.

Each kernel module defines ``aot_cases() -> list[AotCase]``. A case calls the module's own launcher on meta tensors; here every
launch inside it becomes a compilation, so what is checked is what runs: the launcher's choice of configuration for that GPU,
and Triton's specialisation on alignment, on 1 and on None. ``python -m vlmkernels.backends.triton._aot 90 1 attention``
prints one line of JSON for each kernel. The process must not have ``TRITON_INTERPRET`` set.
"""

import contextlib
import dataclasses
import importlib
import json
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any
from unittest import mock

import torch

#: Compute capability (10 major + minor) -> shared memory that one program may use, in bytes, and number of multiprocessors.
ARCHS = {80: (166_912, 108), 90: (232_448, 132), 100: (232_448, 148)}


@dataclasses.dataclass(frozen=True)
class AotCase:
    """A call whose kernels must compile without spilling registers.

    Args:
        name: what is special about it: ``"fwd bf16 D72 causal"``.
        call: calls the launcher. The default device is ``meta`` while cases are made and called.
        stack: bytes of local memory that a kernel of this case may use on an architecture (``{80: 64}``), 0 where not named.
        reason: why ``stack`` is right.
    """

    name: str
    call: Callable[[], object]
    stack: Mapping[int, int] = dataclasses.field(default_factory=dict)
    reason: str = ""

    def __post_init__(self) -> None:
        if self.stack and not self.reason:
            raise ValueError(f"stack: got {dict(self.stack)} for {self.name}, wanted a reason with it")


@dataclasses.dataclass(frozen=True)
class Resources:
    """What one compiled kernel uses, for each thread (registers, stack) and program (shared)."""

    case: str
    kernel: str
    arch: int
    num_warps: int
    num_stages: int
    registers: int
    stack: int  # bytes of local memory
    spills: int  # instructions that load from or store to local memory
    shared: int  # bytes
    allowed_stack: int
    error: str = ""

    def problem(self) -> str:
        """Why this kernel is not fit to run, or ``""``."""
        if self.error:
            return self.error
        if self.stack > self.allowed_stack or (self.spills and not self.allowed_stack):
            return f"{self.stack} bytes of stack and {self.spills} spill instructions, allowed {self.allowed_stack} bytes"
        limit = ARCHS[self.arch][0]
        return f"{self.shared} bytes of shared memory, the GPU has {limit}" if self.shared > limit else ""


class _Driver:
    """Stands in for a GPU of one architecture: enough for Triton to compile a launch."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.arch = arch
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return self.arch  # Triton keeps one target for each device: here a device for each target

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def _launches_compile(arch: int) -> Iterator[list[Any]]:
    """Inside, a kernel launch compiles for ``arch`` and appends the compiled kernel to the list that this yields."""
    from triton.runtime import JITFunction, driver

    compiled: list[Any] = []
    run = JITFunction.run

    def compile_only(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        grid = grid({}) if callable(grid) else grid
        compiled.append((self.__name__, run(self, *args, grid=grid, warmup=True, **kwargs)))
        return compiled[-1][1]

    shared, multiprocessors = ARCHS[arch]
    properties = types.SimpleNamespace(
        major=arch // 10, minor=arch % 10, multi_processor_count=multiprocessors, shared_memory_per_block_optin=shared
    )
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(JITFunction, "run", compile_only))
        stack.enter_context(mock.patch.object(driver, "_active", _Driver(arch)))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_capability", lambda device=None: divmod(arch, 10)))
        stack.enter_context(mock.patch.object(torch.cuda, "get_device_properties", lambda device=None: properties))
        stack.enter_context(mock.patch.object(torch.cuda, "current_device", lambda: 0))
        stack.enter_context(mock.patch.object(torch.cuda, "device", lambda device: contextlib.nullcontext()))
        stack.enter_context(torch.device("meta"))
        yield compiled


def _local_memory(cubin: bytes) -> tuple[int, int, int]:
    """Registers, bytes of stack, and instructions on local memory, as the machine code has them."""
    from triton import knobs

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()

        def read(tool: Any, *options: str) -> str:
            return subprocess.run([tool.path, *options, file.name], check=True, capture_output=True, text=True).stdout

        usage = read(knobs.nvidia.cuobjdump, "--dump-resource-usage")
        found = re.search(r"REG:(\d+) STACK:(\d+)", usage)
        if found is None:
            raise RuntimeError(f"cuobjdump reported no registers: {usage!r}")
        registers, stack = int(found[1]), int(found[2])
        # What spills has a place on the stack. The disassembler takes half a second, as long as most kernels take to compile.
        code = read(knobs.nvidia.nvdisasm, "-c") if stack else ""
    return registers, stack, len(re.findall(r"\b(?:LDL|STL)[. ]", code))


def compile_case(case: AotCase, arch: int) -> list[Resources]:
    """Compile every kernel that ``case`` launches, for ``arch``. A failure is a result with its ``error`` set."""

    def result(kernel: str, **values: Any) -> Resources:
        empty = dict.fromkeys(("num_warps", "num_stages", "registers", "stack", "spills", "shared"), 0)
        return Resources(case.name, kernel, arch, **(empty | {"allowed_stack": case.stack.get(arch, 0)} | values))

    with _launches_compile(arch) as compiled:
        try:
            case.call()
        except Exception as error:  # the test reports it beside the other cases
            return [result("", error=f"{type(error).__name__}: {error}")]
    if not compiled:
        return [result("", error="it launched no kernel")]
    results = []
    for name, kernel in compiled:
        registers, stack, spills = _local_memory(kernel.asm["cubin"])
        meta = kernel.metadata
        numbers = {"registers": registers, "stack": stack, "spills": spills, "shared": meta.shared}
        results.append(result(name, num_warps=meta.num_warps, num_stages=meta.num_stages, **numbers))
    return results


def main(arch: int, every: int, stems: list[str]) -> None:
    """Print the resources of the kernels of these modules, in every so manyth of their cases, as lines of JSON."""
    for stem in stems:
        module = importlib.import_module(f"vlmkernels.backends.triton.{stem}")
        with torch.device("meta"):
            cases = module.aot_cases() if hasattr(module, "aot_cases") else []
        for case in cases[::every]:
            for resources in compile_case(case, arch):
                print(json.dumps({"module": stem, "problem": resources.problem()} | dataclasses.asdict(resources)), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])

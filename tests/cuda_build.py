# SPDX-License-Identifier: Apache-2.0
"""Builds the CUDA library in build/tests, warnings as errors, from where the last build left it.

tests/test_build.py reads what comes out. ``.ci/run`` starts it as a program before that, on the core that pip leaves: all of the
library takes 8 minutes of a CPU.
"""

import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NVCC = next((found for name in ("nvcc", "/usr/local/cuda/bin/nvcc") if (found := shutil.which(name))), None)


def run(*command: str | Path, **kwargs: object) -> str:
    """What it prints; it must succeed."""
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, **kwargs)  # type: ignore[call-overload]
    assert done.returncode == 0, f"{command}:\n{done.stdout}\n{done.stderr}"
    return done.stdout + done.stderr


def build() -> Path:
    """The library."""
    folder = ROOT / "build" / "tests"
    # Given each time: the ninja that an earlier environment had may be gone.
    options = [f"-DCMAKE_CUDA_COMPILER={NVCC}", f"-DCMAKE_MAKE_PROGRAM={shutil.which('ninja')}"]
    run("cmake", "-S", ROOT, "-B", folder, "-G", "Ninja", f"-DVLMKERNELS_LIBRARY_DIR={folder}", *options)
    run("cmake", "--build", folder)
    return folder / "libvlmkernels.so"


if __name__ == "__main__":
    print(build() if NVCC else "no nvcc")

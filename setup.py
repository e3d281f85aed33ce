# SPDX-License-Identifier: Apache-2.0
"""Build the CUDA library with CMake and ninja where there is an nvcc, and install everything else anywhere.

``VLMKERNELS_CUDA=auto`` (the default) builds the library where an nvcc is found, ``0`` leaves it out, ``1`` fails without nvcc.
No torch is needed: the library has a plain C interface, which ``vlmkernels/backends/cuda`` loads with ctypes.
"""

import os
import platform
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
MIN_CUDA = (12, 5)  # cudaGetDriverEntryPointByVersion


def say(text: str) -> None:
    print(f"vlmkernels: {text}", file=sys.stderr, flush=True)


def find_nvcc() -> str | None:
    """The nvcc that CMake would be told to use: the environment's choice, the PATH, then the usual place."""
    homes = [os.environ.get(name, "") for name in ("CUDA_HOME", "CUDA_PATH")]
    candidates = [
        os.environ.get("CUDACXX", ""),
        *(f"{home}/bin/nvcc" for home in homes if home),
        "nvcc",
        "/usr/local/cuda/bin/nvcc",
    ]
    return next((found for c in candidates if c and (found := shutil.which(c))), None)


def why_not(nvcc: str | None) -> str | None:
    """Why the library can't be built here, or None."""
    if platform.system() != "Linux":
        return f"it builds on Linux only, this is {platform.system()}"
    if nvcc is None:
        return "no nvcc in CUDACXX, CUDA_HOME, CUDA_PATH, PATH or /usr/local/cuda"
    try:
        text = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        return f"{nvcc} --version failed: {error}"
    release = re.search(r"release (\d+)\.(\d+)", text)
    version = (int(release[1]), int(release[2])) if release else (0, 0)
    wanted = ".".join(map(str, MIN_CUDA))
    return None if version >= MIN_CUDA else f"{nvcc} is of CUDA {'.'.join(map(str, version))}, wanted {wanted} or newer"


def cuda_wanted(nvcc: str | None) -> bool:
    choice = os.environ.get("VLMKERNELS_CUDA", "auto")
    if choice not in ("auto", "0", "1"):
        raise SystemExit(f"VLMKERNELS_CUDA: got {choice!r}, wanted auto, 0 or 1")
    if choice == "0":
        say("VLMKERNELS_CUDA=0: the CUDA library is left out; the Triton and torch backends are installed")
        return False
    reason = why_not(nvcc)
    if reason is None:
        return True
    if choice == "1":
        raise SystemExit(f"VLMKERNELS_CUDA=1, but the CUDA library can't be built: {reason}")
    say(f"the CUDA library is left out ({reason}); the Triton and torch backends are installed")
    return False


class BuildLibrary(build_ext):
    """Runs CMake for the one "extension", which is a plain shared library and no Python module."""

    def get_ext_filename(self, fullname: str) -> str:
        return os.path.join(*fullname.split(".")) + ".so"

    def get_export_symbols(self, ext: Extension) -> list[str]:
        return []

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        cmake, ninja = shutil.which("cmake"), shutil.which("ninja")
        if cmake is None or ninja is None:
            raise SystemExit("the CUDA library needs cmake and ninja on the PATH (pip install cmake ninja)")
        build.mkdir(parents=True, exist_ok=True)
        configure = [cmake, "-S", str(ROOT), "-B", str(build), "-G", "Ninja", "-DCMAKE_BUILD_TYPE=Release"]
        # Given each time: an isolated build's ninja is gone when the next build finds its path in CMakeCache.txt.
        configure += [f"-DCMAKE_MAKE_PROGRAM={ninja}", f"-DCMAKE_CUDA_COMPILER={find_nvcc()}"]
        # A newer compiler's new warning must not fail an install.
        configure += [f"-DVLMKERNELS_LIBRARY_DIR={target.parent}", "-DVLMKERNELS_WERROR=OFF"]
        subprocess.run(configure, check=True)
        subprocess.run([cmake, "--build", str(build)], check=True)

    def copy_extensions_to_source(self) -> None:
        """An editable install: the library goes where the package lies. (The inherited method wants that folder to exist.)"""
        for ext in self.extensions:
            name = self.get_ext_filename(ext.name)
            target = ROOT / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(Path(self.build_lib) / name, target)


class AnyPythonWheel(bdist_wheel):
    """The library is no Python module: one wheel serves every Python of its platform."""

    def get_tag(self) -> tuple[str, str, str]:
        _, _, plat = super().get_tag()
        return "py3", "none", plat


setup(
    ext_modules=[Extension("vlmkernels.lib.libvlmkernels", sources=[])] if cuda_wanted(find_nvcc()) else [],
    cmdclass={"build_ext": BuildLibrary, "bdist_wheel": AnyPythonWheel},
)

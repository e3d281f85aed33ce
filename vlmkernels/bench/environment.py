# SPDX-License-Identifier: Apache-2.0
"""What a figure depends on: versions, GPU, driver, clocks and commit."""

import os
import platform
import shutil
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

import vlmkernels

#: The packages that peers come from, with how to install one.
PEERS = {
    "transformers": "pip install transformers",
    "timm": "pip install timm",
    "open_clip_torch": "pip install open_clip_torch",
    "flash-attn-4": "pip install flash-attn-4 (fa4: Hopper and Blackwell)",
    "flash-attn": "pip install flash-attn --no-build-isolation (fa2: it compiles)",
}
PACKAGES = ("torch", "triton", "numpy", *PEERS)


def version(package: str) -> str | None:
    """The installed version of a package, None if it is not installed. Nothing is imported."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def command(*words: str, cwd: Path | None = None) -> str | None:
    """What a command prints, or None if it is missing, fails or hangs."""
    if shutil.which(words[0]) is None:
        return None
    try:
        result = subprocess.run(words, cwd=cwd, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def nvidia_smi(device: torch.device | None = None) -> dict[str, str]:
    """Driver, clocks, power and temperature of the GPU at this moment; empty without ``nvidia-smi``."""
    fields = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
    selector = []
    if device is not None and device.type == "cuda":
        # nvidia-smi counts all GPUs of the machine, torch only the visible ones: the UUID names the same one in both.
        uuid = getattr(torch.cuda.get_device_properties(device), "uuid", None)
        selector = [f"--id=GPU-{uuid}"] if uuid else []
    printed = command("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader", *selector)
    if not printed:
        return {}
    return dict(zip(fields.split(","), (x.strip() for x in printed.splitlines()[0].split(",")), strict=False))


def cpu_name() -> str:
    """The processor's model name."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def device_name(device: torch.device) -> str:
    """The name of the GPU, or of the processor with the number of threads torch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} ({torch.get_num_threads()} threads)"


def nvcc_version() -> str | None:
    """The last line that ``nvcc --version`` prints, from the path or from CUDA_HOME."""
    home = os.environ.get("CUDA_HOME")
    printed = command(str(Path(home, "bin", "nvcc")) if home else "nvcc", "--version")
    return printed.splitlines()[-1] if printed else None


def commit() -> str | None:
    """The git commit of the checkout that this package runs from, with ``+changes`` where tracked files differ."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    head = command("git", "rev-parse", "--short=12", "HEAD", cwd=root)
    if head is None:
        return None
    return head + ("+changes" if command("git", "status", "--porcelain", "--untracked-files=no", cwd=root) else "")


def describe(device: torch.device, known_commit: str | None = None) -> dict[str, Any]:
    """Everything above for one device, as it is written beside the figures.

    Args:
        known_commit: the commit, for a copy of the tree that is no git checkout.
    """
    cuda = device.type == "cuda"
    record: dict[str, Any] = {
        "device": device_name(device),
        "device_type": device.type,
        "capability": "{}.{}".format(*torch.cuda.get_device_capability(device)) if cuda else None,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if cuda else None,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()} {' '.join(platform.libc_ver())}".strip(),
        "commit": commit() or known_commit,
    }
    record["versions"] = {"vlmkernels": vlmkernels.__version__} | {name: version(name) for name in PACKAGES}
    record["nvidia_smi"] = nvidia_smi(device) if cuda else {}
    return record


def missing(versions: Sequence[dict[str, str | None]]) -> list[str]:
    """A line for each package of a peer that was not installed in some of the runs that these versions are of."""
    found = []
    for package, install in PEERS.items():
        without = sum(package in run and run[package] is None for run in versions)
        if without:
            where = "" if without == len(versions) else f" in {without} of {len(versions)} runs"
            found.append(f"{package} was not installed{where}: {install}")
    return found

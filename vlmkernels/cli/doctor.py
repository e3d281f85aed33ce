# SPDX-License-Identifier: Apache-2.0
"""``vlmkernels doctor``: versions, GPU, compiler, library, and which backend runs which operator."""

import argparse
import importlib
import pkgutil
import platform
import sys

import torch

import vlmkernels
from vlmkernels import ops
from vlmkernels.bench import environment
from vlmkernels.cli import print_table
from vlmkernels.ops._op import BACKENDS, OPS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", help="the device to ask the backends about"
    )


def run(arguments: argparse.Namespace) -> int:
    device = torch.device(arguments.device)
    for name, value in facts(device):
        print(f"{name:14s} {value}")
    print()
    table, reasons = support(device)
    print_table(("op", *BACKENDS), table)
    print()
    for backend, reason in reasons:
        print(f"{backend}: {reason}")
    return 0


def facts(device: torch.device) -> list[tuple[str, str]]:
    """What is installed and what it runs on."""
    lines = [("vlmkernels", f"{vlmkernels.__version__} ({environment.commit() or 'no git checkout'})")]
    lines.append(("python", f"{platform.python_version()} ({sys.executable})"))
    lines += [(name, environment.version(name) or "not installed") for name in environment.PACKAGES]
    lines.append(("torch's CUDA", torch.version.cuda or "none (a build of torch for CPUs)"))
    lines.append(("nvcc", environment.nvcc_version() or "not found"))
    if torch.cuda.is_available():
        for i in range(torch.cuda.device_count()):
            major, minor = torch.cuda.get_device_capability(i)
            memory = torch.cuda.get_device_properties(i).total_memory / 2**30
            lines.append((f"GPU {i}", f"{torch.cuda.get_device_name(i)}, compute capability {major}.{minor}, {memory:.0f} GiB"))
        smi = environment.nvidia_smi(device)
        lines.append(("driver", smi.get("driver_version", "unknown (nvidia-smi does not answer)")))
    else:
        lines.append(("GPU", f"none that torch can use; processor: {environment.cpu_name()}"))
    reason = importlib.import_module("vlmkernels.backends.cuda").why_not_importable()
    lines.append(("CUDA library", "built, loads" if reason is None else reason))
    return lines


def support(device: torch.device) -> tuple[list[tuple[str, ...]], list[tuple[str, str]]]:
    """For each registered op and backend ``yes`` or ``no``, and the reasons by backend, each once with the ops it holds for."""
    for module in pkgutil.iter_modules(ops.__path__):
        importlib.import_module(f"vlmkernels.ops.{module.name}")
    table = []
    reasons: dict[tuple[str, str], list[str]] = {}
    for name, op in sorted(OPS.items()):
        answers = {backend: op.why_not(backend, device) for backend in BACKENDS}
        table.append((name, *("no" if answers[backend] else "yes" for backend in BACKENDS)))
        for backend, reason in answers.items():
            if reason:
                reasons.setdefault((backend, reason), []).append(name)
    order = {backend: i for i, backend in enumerate(BACKENDS)}
    lines = [(backend, f"{reason} ({', '.join(names)})") for (backend, reason), names in reasons.items()]
    return table, sorted(lines, key=lambda line: order[line[0]])

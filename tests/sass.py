# SPDX-License-Identifier: Apache-2.0
"""Reads disassembled kernels: which instructions touch registers that a matrix product in flight still uses.

wgmma runs beside the instructions after it, until a wait. ptxas keeps its registers from others as long as somebody reads them
later; on a path on which nobody does, it may give them to an address, which the product then overwrites.
"""

import functools
import importlib.util
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

MMA, WAIT, OTHER = "mma", "wait", "other"
LINE, LABEL = re.compile(r"\s*/\*[0-9a-f]+\*/\s+(.*?)\s*;"), re.compile(r"\s*(\.L_x_\d+):")


@dataclass(frozen=True)
class Instruction:
    """``registers``: of a product, its sums and its left operand; else those named. ``target``: where it may jump to."""

    kind: str
    text: str
    registers: frozenset[int] = frozenset()
    commits: bool = False
    keeps: int = 0  # products in flight after a wait
    target: str = ""
    ends: bool = False  # the next instruction is not reached


def tool(name: str) -> str | None:
    """``nvdisasm`` or ``cuobjdump``, of the CUDA toolkit or of Triton."""
    found = shutil.which(name)
    triton = importlib.util.find_spec("triton")
    if found or triton is None or triton.origin is None:
        return found
    bundled = Path(triton.origin).parent / "backends" / "nvidia" / "bin" / name
    return str(bundled) if bundled.exists() else None


@functools.cache  # kernels have most of their lines in common
def parse(text: str) -> Instruction:
    """One line of SASS, without its address."""
    predicate = re.match(r"@!?U?P\w+\s+", text)
    name, _, operands = text[predicate.end() if predicate else 0 :].partition(" ")
    if name.startswith("HGMMA"):
        columns = re.search(r"64x(\d+)x16", name)
        sums = re.match(r"\s*R(\d+)(?:, R(\d+))?", operands)
        assert columns and sums, text
        registers = set(range(int(sums[1]), int(sums[1]) + int(columns[1]) // 2))
        if sums[2]:
            registers |= set(range(int(sums[2]), int(sums[2]) + 4))
        return Instruction(MMA, text, frozenset(registers), commits="gsb0" in operands)
    wait = re.search(r"DEPBAR\.LE gsb0, 0x(\d+)", text)
    if wait:
        return Instruction(WAIT, text, keeps=int(wait[1], 16))
    registers = set()
    several = 4 if ".128" in name or name.startswith(("HMMA", "LDSM", "STSM")) else 2 if ".64" in name or "WIDE" in name else 1
    for i, found in enumerate(re.finditer(r"(\[?)\bR(\d+)(\.64)?", operands)):
        # An address is one register, or says that it is two.
        wide = 2 if found[3] else 1 if found[1] else several if i == 0 or name.startswith(("ST", "HMMA")) else 1
        registers |= set(range(int(found[2]), int(found[2]) + wide))
    jump = re.search(r"\.L_x_\d+", operands) if name.startswith(("BRA", "WARPSYNC.COLL")) else None
    conditional = predicate or re.search(r"U?P\w+,", operands)
    ends = name in ("EXIT", "RET") or name.startswith("BRA")
    return Instruction(OTHER, text, frozenset(registers), target=jump[0] if jump else "", ends=ends and not conditional)


def kernels(sass: str) -> Iterator[tuple[str, list[Instruction], dict[str, int]]]:
    """The name, the instructions and the labels of each kernel in ``nvdisasm -c``."""
    for part in re.split(r"^\s*\.section\s+\.text\.", sass, flags=re.MULTILINE)[1:]:
        instructions: list[Instruction] = []
        labels = {}
        for line in part.splitlines():
            found = LINE.match(line)
            if found:
                instructions.append(parse(found[1]))
            elif label := LABEL.match(line):
                labels[label[1]] = len(instructions)
        yield re.split(r"[,\s]", part, maxsplit=1)[0], instructions, labels


def touched_in_flight(instructions: list[Instruction], labels: dict[str, int]) -> list[str]:
    """The instructions that name a register of a product in flight, on any path through the kernel."""
    touched = set()
    seen = set()
    todo: list[tuple[int, tuple[tuple[frozenset[int], bool], ...]]] = [(0, ())]
    while todo:
        at, flying = todo.pop()  # groups of products, the oldest first, each committed or not yet
        while at < len(instructions) and (at, flying) not in seen:
            seen.add((at, flying))
            one = instructions[at]
            if one.kind == MMA:
                begun = flying[-1][0] if flying and not flying[-1][1] else frozenset()
                older = flying[:-1] if begun else flying
                group = one.registers | begun
                flying = (*(other for other in older if other[0] != group), (group, one.commits))
            elif one.kind == WAIT:
                committed = [group for group in flying if group[1]]
                flying = tuple(committed[len(committed) - one.keeps :]) if one.keeps else ()
            else:
                if any(one.registers & group for group, _ in flying):
                    touched.add(one.text)
                if one.target:
                    todo.append((labels[one.target], flying))
                if one.ends:
                    break
            at += 1
    return sorted(touched)

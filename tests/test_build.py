# SPDX-License-Identifier: Apache-2.0
"""The CUDA library compiles without a GPU, with its registers in order and its interface; the package installs without it."""

import ctypes
import os
import re
import shutil
import subprocess
import sys
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import sass
import torch
from cuda_build import NVCC, ROOT, build, run

from vlmkernels.backends.cuda import _library, activated_linear, contrastive, feed_forward
from vlmkernels.ops.activated_linear import ACTIVATIONS

HEADER = (ROOT / "csrc" / "vlmkernels.h").read_text()
needs_nvcc = pytest.mark.skipif(NVCC is None, reason="no nvcc")
needs_cc = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")


@pytest.fixture(scope="module")
def built() -> Path:
    """The library, built with warnings as errors."""
    return build()


@needs_nvcc
@pytest.mark.skipif(sass.tool("cuobjdump") is None, reason="no cuobjdump")
def test_no_kernel_spills(built: Path) -> None:
    """What spills has a place on the stack."""
    listed = run(str(sass.tool("cuobjdump")), "--dump-resource-usage", built)
    kernels = dict(re.findall(r"Function (\w*_kernel\w*):\s+REG:\d+ (STACK:\d+ \S+ LOCAL:\d+)", listed))
    sources = "".join(path.read_text() for path in (ROOT / "csrc").rglob("*.cu"))
    assert len(kernels) >= len(re.findall(r"\b__global__\b", sources)) > 0
    assert not [f"{name} {used}" for name, used in kernels.items() if not re.fullmatch(r"STACK:0 \S+ LOCAL:0", used)]


@needs_nvcc
@pytest.mark.skipif(sass.tool("nvdisasm") is None or sass.tool("cuobjdump") is None, reason="no disassembler")
def test_products_in_flight_keep_their_registers(built: Path, tmp_path: Path) -> None:
    objects = sorted(built.parent.rglob("*.o"))
    for number, one in enumerate(objects):  # each in a folder: bfloat16.cu, say, there is several times
        (tmp_path / str(number)).mkdir()
        run(str(sass.tool("cuobjdump")), "-xelf", "all", one, cwd=tmp_path / str(number))
    products = 0
    with ThreadPoolExecutor(2) as pool:  # one is disassembled while another is read
        cubins = sorted(tmp_path.rglob("*.cubin"))
        for text in pool.map(lambda cubin: run(str(sass.tool("nvdisasm")), "-c", cubin), cubins):
            for name, instructions, labels in sass.kernels(text):
                products += any(one.kind == sass.MMA for one in instructions)
                assert sass.touched_in_flight(instructions, labels) == [], name
    assert products >= len(objects)


def test_registers_in_flight_are_seen() -> None:
    """Scores begin; where P0 holds they are read after the wait, else an address takes one of their registers."""
    text = """
    .section .text.kernel,"ax"
        /*0000*/    HGMMA.64x8x16.F32.BF16 R24, gdesc[UR8], RZ, !UPT ;
        /*0010*/    HGMMA.64x8x16.F32.BF16 R24, R40, gdesc[UR8], R24, gsb0 ;
        /*0020*/    @P0 BRA `(.L_x_1) ;
        /*0030*/    STG.E.128 desc[UR4][R26.64], RZ ;
        /*0040*/    IADD3 R4, R23, R28, RZ ;
    .L_x_1:
        /*0050*/    WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0060*/    FADD R24, R24, R25 ;
        /*0070*/    EXIT ;
    """
    ((name, instructions, labels),) = sass.kernels(text)
    assert name == "kernel"
    assert instructions[1].registers == {24, 25, 26, 27, 40, 41, 42, 43}
    assert sass.parse("STSM.16.M88.4 [R21], R16").registers == {21, 16, 17, 18, 19}
    assert sass.touched_in_flight(instructions, labels) == ["STG.E.128 desc[UR4][R26.64], RZ"]


@needs_nvcc
def test_library_exports_the_header_and_needs_only_libc(built: Path) -> None:
    declared = set(re.findall(r"^VLMK_API .*?(vlmk_\w+)\(", HEADER, re.MULTILINE))
    exported = {line.split()[-1] for line in run("nm", "-D", "--defined-only", built).splitlines()}
    assert declared and exported == declared
    needed = set(re.findall(r"\(NEEDED\).*\[(.*)\]", run("readelf", "-d", built)))
    assert needed <= {"libc.so.6", "libm.so.6", "libdl.so.2", "librt.so.1", "libpthread.so.0", "ld-linux-x86-64.so.2"}


@needs_nvcc
def test_the_wheel_stays_small(built: Path) -> None:
    """A wheel is a zip file and most of it this library: 11 MB, kernels compressed. 20 MB is what the project allows."""
    packed = len(zlib.compress(built.read_bytes(), level=1))
    assert packed < 20e6, packed


@needs_nvcc
def test_library_reports_errors(built: Path) -> None:
    library = ctypes.CDLL(str(built))
    library.vlmk_last_error.restype = ctypes.c_char_p
    assert library.vlmk_abi_version() == _library.ABI_VERSION
    params = _library.TileBoundsParams(batch=1, num_queries=-5, num_keys=7)
    assert library.vlmk_tile_bounds(ctypes.byref(params), None) != 0
    assert library.vlmk_last_error() == b"batch 1, num_queries -5, num_keys 7: none may be negative"
    if torch.cuda.is_available():
        assert library.vlmk_check_driver() == 0
    else:
        assert library.vlmk_check_driver() != 0
        assert library.vlmk_last_error() == b"there is no GPU driver"
        params = _library.TileBoundsParams(batch=1, num_queries=5, num_keys=7)
        assert library.vlmk_tile_bounds(ctypes.byref(params), None) != 0
        assert b"query_tile_bounds_kernel<<<(1, 1, 1), (128, 1, 1), 0 bytes>>>: " in library.vlmk_last_error()


@needs_cc
def test_python_structures_have_the_layout_of_the_header(tmp_path: Path) -> None:
    """Compiled as plain C, so the header is also seen to be that."""
    structures = {f"Vlmk{name}": value for name, value in vars(_library).items() if name.endswith("Params")}
    assert set(structures) == set(re.findall(r"^} (Vlmk\w+);", HEADER, re.MULTILINE))
    lines = ['printf("%d\\n", VLMK_ABI_VERSION);']
    wanted = [_library.ABI_VERSION]
    for name, structure in structures.items():
        lines.append(f'printf("%zu\\n", sizeof({name}));')
        wanted.append(ctypes.sizeof(structure))
        for field, _ in structure._fields_:
            lines.append(f'printf("%zu\\n%zu\\n", offsetof({name}, {field}), sizeof((({name}*)0)->{field}));')
            wanted += [getattr(structure, field).offset, getattr(structure, field).size]
    source = tmp_path / "layout.c"
    source.write_text(
        "#include <stddef.h>\n#include <stdio.h>\n#include <vlmkernels.h>\nint main(void) {\n"
        + "\n".join(lines)
        + "\nreturn 0;\n}\n"
    )
    run("cc", "-std=c99", "-pedantic", "-Wall", "-Werror", "-I", ROOT / "csrc", source, "-o", tmp_path / "layout")
    assert [int(word) for word in run(tmp_path / "layout").split()] == wanted


def test_python_constants_are_those_of_the_header() -> None:
    defined = dict(re.findall(r"^#define (VLMK_\w+) (\d+)\b", HEADER, re.MULTILINE))
    assert int(defined["VLMK_LOSS_TILE"]) == contrastive.TILE
    assert {name: int(defined[f"VLMK_{name.upper()}"]) for name in activated_linear.ACTIVATIONS} == activated_linear.ACTIVATIONS
    assert tuple(activated_linear.ACTIVATIONS) == ACTIVATIONS
    assert int(defined["VLMK_FEED_FORWARD_SUM_ROWS"]) == feed_forward.SUM_ROWS


def setup_name(choice: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """``setup.py --name`` where the first nvcc found is one of CUDA 11.8."""
    nvcc = tmp_path / "nvcc"
    nvcc.write_text("#!/bin/sh\necho 'Cuda compilation tools, release 11.8, V11.8.89'\n")
    nvcc.chmod(0o755)
    environment = {**os.environ, "VLMKERNELS_CUDA": choice, "CUDACXX": str(nvcc)}
    command = [sys.executable, "setup.py", "--name"]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.skipif(sys.platform != "linux", reason="the CUDA library builds on Linux only")
@pytest.mark.parametrize(
    "choice, code, text",
    [
        ("auto", 0, "the CUDA library is left out ({nvcc} is of CUDA 11.8, wanted 12.5 or newer)"),
        ("0", 0, "VLMKERNELS_CUDA=0: the CUDA library is left out"),
        ("1", 1, "VLMKERNELS_CUDA=1, but the CUDA library can't be built: {nvcc} is of CUDA 11.8"),
        ("yes", 1, "VLMKERNELS_CUDA: got 'yes', wanted auto, 0 or 1"),
    ],
)
def test_setup_says_what_it_does_without_a_usable_nvcc(choice: str, code: int, text: str, tmp_path: Path) -> None:
    done = setup_name(choice, tmp_path)
    assert done.returncode == code
    assert text.format(nvcc=tmp_path / "nvcc") in done.stderr


def test_wheel_without_the_library_serves_any_machine(tmp_path: Path) -> None:
    """And has every module, with no library that another build left in the source tree."""
    pytest.importorskip("setuptools", minversion="77", reason="setuptools before 77 refuses the licence field")
    source = tmp_path / "source"
    shutil.copytree(ROOT / "vlmkernels", source / "vlmkernels", ignore=shutil.ignore_patterns("__pycache__", "lib"))
    for name in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
        shutil.copy(ROOT / name, source)
    (source / "vlmkernels" / "lib").mkdir()
    (source / "vlmkernels" / "lib" / "libvlmkernels.so").touch()
    pip = [sys.executable, "-m", "pip", "wheel", "--no-index", "--no-deps", "--no-build-isolation"]
    run(*pip, "-w", tmp_path, source, env={**os.environ, "VLMKERNELS_CUDA": "0"})
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name.endswith("-py3-none-any.whl")
    names = {name for name in zipfile.ZipFile(wheel).namelist() if name.startswith("vlmkernels/")}
    assert names == {
        str(path.relative_to(source)) for path in (source / "vlmkernels").rglob("*") if path.suffix in (".py", ".typed")
    }

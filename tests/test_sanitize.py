# SPDX-License-Identifier: Apache-2.0
"""The command that runs the tests under compute-sanitizer, with a stand-in for it: what it reads, keeps, and writes."""

import json
from pathlib import Path

import pytest
import sanitize

MEMCHECK = """========= COMPUTE-SANITIZER
========= Invalid __global__ read of size 2 bytes
=========     at void vlmk::mma<(int)64>(float (&)[32])+0x3d0 in wgmma.h:12
=========     by thread (0,0,0) in block (3,0,0)
=========     Access to 0x7f5d00000402 is out of bounds
=========     and is 3 bytes after the nearest allocation at 0x7f5d00000000 of size 1,024 bytes
=========         Device Frame: void vlmk::attention_kernel<(int)64, (bool)1>(vlmk::Params)+0x3d0 in forward.cuh:12
=========     Saved host backtrace up to driver entry point at kernel launch time
=========
========= Invalid __global__ write of size 4 bytes
=========     at void at::native::vectorized_elementwise_kernel<(int)4>(int)+0x10
=========     by thread (1,0,0) in block (0,0,0)
=========
========= Program hit CUDA_ERROR_LAUNCH_FAILED (error 719) due to "unspecified launch failure" on CUDA API call to cuMemFree_v2.
=========     Saved host backtrace up to driver entry point at error
=========         Host Frame: torch::free() [0x10] in libtorch.so
=========
========= ERROR SUMMARY: 3 errors
"""
RACECHECK = """========= COMPUTE-SANITIZER
========= Error: Race reported between Write access at _rope_fwd_kernel+0x850 in rope.py:40
=========     and Read access at _rope_fwd_kernel+0x930 in rope.py:41 [32 hazards]
=========
========= Error: Race reported between Write access at void vlmk::attention::Consumer<float>::store(int)+0x850 in consumer.h:40
=========     and Read access at void vlmk::attention::Consumer<float>::load(int)+0x930 in consumer.h:41 [32 hazards]
=========
========= RACECHECK SUMMARY: 2 hazards displayed (2 errors, 0 warnings)
"""
OWN = {"attention_kernel", "_rope_fwd_kernel"}


def test_findings_by_kernel() -> None:
    """Also where a function of ours stands for its kernel, and a call of the API for none."""
    total, counts, shown = sanitize.read_log(MEMCHECK, OWN)
    call = 'Program hit CUDA_ERROR_LAUNCH_FAILED (error 719) due to "uns'
    assert (total, counts) == (3, [{"attention_kernel": 1}, {"vectorized_elementwise_kernel": 1, call: 1}, {}])
    assert "3 bytes after the nearest allocation" in shown["attention_kernel"]
    assert sanitize.read_log(RACECHECK, OWN)[:2] == (2, [{"_rope_fwd_kernel": 1, "Consumer": 1}, {}, {}])
    assert sanitize.read_log("========= COMPUTE-SANITIZER\n========= ERROR SUMMARY: 0 errors\n", OWN) == (0, [{}, {}, {}], {})


def test_orders_that_racecheck_does_not_follow() -> None:
    """As it names them. The same functions the other way round, another one beside them, or another kernel's are findings."""
    config = "vlmk::attention::Config<__nv_bfloat16, (int)64, (bool)1>"
    read, write = f"vlmk::attention::Consumer<{config}>::take()", f"vlmk::attention::Producer<{config}>::next()"
    found = f"========= Error: Race reported between Read access at {read}+0x4f0 in consumer.h:315\n"
    found += f"=========     and Write access at {write}+0x1628 in producer.h:102 [32 hazards]\n"
    assert not sanitize.follows(found, "tests/test_attention_cuda.py")
    assert sanitize.read_log(found, OWN)[1] == [{}, {}, {"Producer": 1}]
    assert sanitize.follows(found.replace("Read", "x").replace("Write", "Read").replace("x", "Write"), "")
    another = f"=========     and Read access at {read.replace('take', 'work_at')}+0x10 in consumer.h:9\n"
    assert not sanitize.follows(found + another, "")
    assert sanitize.follows(found + another.replace("work_at", "store"), "")
    typed = f"vlmk::attention::Work vlmk::attention::work_of_tile<{config}>(const int &, int)"
    order = found.replace(read, typed).replace("Producer", "Order").replace("next()", "run()")
    assert not sanitize.follows(order, "") and sanitize.follows(order.replace("Order", "Orders"), "")
    wide = "vlmk::attention_bwd::PairGroup<vlmk::attention_bwd::Config<__half, (int)96>>"
    tile = found.replace(read, f"{wide}::add_up<(int)64>(const int &)").replace("attention::Producer", "attention_bwd::Producer")
    assert not sanitize.follows(tile.replace("next()", "copy_queries(int)"), "")
    assert sanitize.follows(tile.replace("next()", "copy_values(int)"), "")
    assert sanitize.follows(tile.replace("next()", "copy_queries(int)").replace("PairGroup", "PairGroups"), "")
    bias = found.replace(read, "vlmk::load_shared(unsigned int, uint4 &)").replace(write, "vlmk::copy_from_global(unsigned int)")
    assert sanitize.follows(bias, "tests/test_attention_cuda.py")
    assert not any(sanitize.follows(bias, f"tests/test_{name}.py") for name in ("activated_linear", "feed_forward"))
    both = tile.replace("next()", "copy_queries(int)")
    both += "=========     and Read access at vlmk::attention_bwd::KeyGroup<int>::attend(int)+0x10 in keys.h:9 [16 hazards]\n"
    assert not sanitize.follows(both, "")
    assert sanitize.follows(both.replace("KeyGroup", "KeyGroups"), "")


def test_own_kernels_are_found() -> None:
    own = sanitize.own_kernels()
    assert {"_rope_fwd_kernel", "attention_kernel", "patch_embed_small_kernel"} <= own, sorted(own)


def test_files_exist() -> None:
    assert all((sanitize.ROOT / name).exists() for name in sanitize.FILES)


def test_a_sample_is_from_all_over_a_file() -> None:
    tests = [f"tests/test_a.py::{i}" for i in range(10)] + ["tests/test_b.py::0"]
    parts = list(sanitize.parts_of("memcheck", tests, size=3, sample=4))
    assert [part.tests for part in parts] == [
        [f"tests/test_a.py::{i}" for i in (0, 2, 5)],
        ["tests/test_a.py::7"],
        ["tests/test_b.py::0"],
    ]


def test_a_run_is_kept_and_goes_on(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Two files in parts of two tests: a finding, a part that hangs, and a second call that runs the rest alone."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text(f"""#!/bin/sh
log=; tests=0
while [ $# -gt 0 ]; do
  case "$1" in --log-file) log="$2";; *hangs*) sleep 30; exit;; *::*) tests=$((tests + 1));; esac
  shift
done
echo "$PYTORCH_NO_CUDA_MEMORY_CACHING" >> {tmp_path}/calls
cat > "$log" <<'EOF'
{MEMCHECK}EOF
echo "$tests passed in 0.10s"
exit 86
""")
    tool.chmod(0o755)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: str(tool))
    names = ["tests/test_a.py::one", "tests/test_a.py::two", "tests/test_a.py::three", "tests/test_b.py::hangs"]
    monkeypatch.setattr(sanitize, "collect", lambda files, expression: names)
    monkeypatch.setattr(sanitize, "own_kernels", lambda: OWN)
    monkeypatch.setattr(sanitize, "machine", lambda sanitizer: "a GPU")
    monkeypatch.setattr(sanitize, "tool_options", lambda sanitizer, own: {})
    monkeypatch.setattr(sanitize, "PAGE", tmp_path / "page.md")
    sanitize.PAGE.write_text("before\n<!-- results -->\n<!-- end -->\nbehind\n")
    results = tmp_path / "build" / "results.jsonl"
    command = ["--tool", "memcheck", "--part", "2", "--part-seconds", "1", "--jobs", "1", "--results", str(results)]
    assert sanitize.main(command) == 1
    found = [json.loads(line) for line in results.read_text().splitlines()]
    assert [(part["status"], part["passed"], part["ours"]) for part in found] == [
        ("ended", 2, {"attention_kernel": 1}),
        ("ended", 1, {"attention_kernel": 1}),
        ("timeout", 0, {}),
    ]
    page = sanitize.PAGE.read_text()
    assert (
        "| memcheck | test_a.py | 3 | 2 | 4 | 0 | 0 | 0 |" in page and "| memcheck | test_b.py | 0 | 0 | 0 | 0 | 0 | 1 |" in page
    )
    assert "memcheck, `attention_kernel`: 2" in page and page.startswith("before") and page.endswith("behind\n")
    assert (tmp_path / "calls").read_text() == "1\n1\n"
    names[3] = "tests/test_b.py::ends"
    assert sanitize.main(command) == 1, "a finding of ours"
    assert (tmp_path / "calls").read_text() == "1\n1\n1\n", "what came to its end was not run again"
    assert "every part came to its end" in capfd.readouterr().out


def test_an_old_tool_is_told_what_it_knows(tmp_path: Path) -> None:
    """The kernels of ours by one name for CUDA and all for Triton; one block, and reads of ours alone, where it can."""
    tool = tmp_path / "compute-sanitizer"
    tool.write_text("#!/bin/sh\necho --tool\n")
    tool.chmod(0o755)
    ours = ["--kernel-name", "regex=4vlmk|_rope_fwd_kernel"]
    assert sanitize.tool_options(str(tool), OWN) == {"racecheck": ours, "initcheck": []}
    tool.write_text("#!/bin/sh\necho --racecheck-filter-cluster-id --initcheck-track-filtered-global-memory\n")
    one = ["--racecheck-filter-cluster-id", "0"]
    assert sanitize.tool_options(str(tool), OWN) == {"racecheck": ours + one, "initcheck": ours}


def test_the_wheel_comes_before_the_path(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "nvidia" / "cu13" / "bin" / "compute-sanitizer"
    tool.parent.mkdir(parents=True)
    tool.touch()
    monkeypatch.setattr(sanitize.shutil, "which", lambda name: f"/somewhere/{name}")
    monkeypatch.setattr(sanitize.importlib.util, "find_spec", lambda name: None)
    assert sanitize.find_sanitizer() == "/somewhere/compute-sanitizer"
    spec = type("Spec", (), {"submodule_search_locations": [str(tmp_path / "nvidia")]})
    monkeypatch.setattr(sanitize.importlib.util, "find_spec", lambda name: spec)
    assert sanitize.find_sanitizer() == str(tool)


def test_without_the_tool(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    assert sanitize.main([]) == 2 and "comes with the CUDA toolkit" in capsys.readouterr().err

# SPDX-License-Identifier: Apache-2.0
"""The command line, in process: what it prints and writes, and its exit status."""

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_bench import plant

from vlmkernels import BackendError, use_backend, verify
from vlmkernels.bench import photos, suites
from vlmkernels.cli import bench as bench_command
from vlmkernels.cli import main
from vlmkernels.cli import verify as verify_command
from vlmkernels.ops._op import BACKENDS, OPS


@pytest.fixture(autouse=True)
def unwritten_outputs_show() -> None:
    """Off: its wrapper would hide which backend ran, which a run reports."""


@pytest.fixture(autouse=True)
def torch_backend() -> Iterator[None]:
    with use_backend("torch"):
        yield


def test_doctor_tells_every_op_and_backend(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    header = next(line.split() for line in out.splitlines() if line.startswith("op "))
    assert header == ["op", *BACKENDS]
    table = {words[0]: words[1:] for words in map(str.split, out.splitlines()) if words and words[0] in OPS}
    assert set(table) == set(OPS)
    assert all(dict(zip(BACKENDS, answers, strict=True))["reference"] == "yes" for answers in table.values())
    for word in ("python", "torch", "triton", "transformers", "nvcc", "CUDA library"):
        assert f"\n{word} " in f"\n{out}", word
    no = {backend for answers in table.values() for backend, answer in zip(BACKENDS, answers, strict=True) if answer == "no"}
    assert no and all(f"\n{backend}: " in out for backend in no), "a backend is missing without a reason"


def test_verify_passes_and_writes_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "deep" / "checks.jsonl"
    code = main(["verify", "--device", "cpu", "--op", "rope", "--backend", "torch", "--backend", "cuda", "--json", str(path)])
    assert code == 0
    out = capsys.readouterr().out
    assert " 0 bad" in out and "bfloat16" in out
    run, *checks = map(json.loads, path.read_text().splitlines())
    assert run["record"] == "run" and run["device_type"] == "cpu"
    assert {c["backend"] for c in checks} == {"torch", "cuda"} and {c["op"] for c in checks} == {"rope"}
    assert all(c["status"] == ("ok" if c["backend"] == "torch" else "unavailable") for c in checks)
    assert all(c["reason"] if c["backend"] == "cuda" else c["error_over_floor"] <= c["bound"] for c in checks)


def test_verify_fails_on_a_wrong_result(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    plant(monkeypatch, "patch_embed_fwd")
    assert (
        main(["verify", "--device", "cpu", "--op", "patch_embed", "--backend", "torch", "--case", "CLIP", "--case", "ViT"]) == 1
    )
    out = capsys.readouterr().out
    assert "wrong " in out and "BAD" in out and " 0 bad" not in out


def test_verify_fails_where_nothing_was_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "--device", "cpu", "--op", "rope", "--backend", "cuda"]) == 1
    assert "nothing could be compared" in capsys.readouterr().out


def test_verify_has_a_case_for_every_operator() -> None:
    stems = {op.stem for op in OPS.values()}
    assert {case.op for case in verify.cases(verify.torch.device("cpu"))} == stems == set(verify_command.OPERATORS)


def test_verify_covers_the_head_dims() -> None:
    names = {case.name for case in verify.cases(verify.torch.device("cpu")) if case.op == "attention"}
    for dim in (64, 72, 80, 88, 96, 104, 128, 256):
        for kind in ("dense", "causal GQA2", "ranges MQA", "ranges softcap"):
            assert f"D{dim} {kind}" in names


def test_bench_writes_the_report(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    arguments = [
        "bench",
        "--device",
        "cpu",
        "--suite",
        "smoke",
        "--quick",
        "--out",
        str(tmp_path),
        "--results-dir",
        str(tmp_path / "r"),
    ]
    assert main(arguments) == 0
    out = capsys.readouterr().out
    assert "attention · dense · fwd" in out and "left out: " in out and "ceilings of the run" in out
    assert {p.name for p in tmp_path.iterdir()} == {"results.jsonl", "standings.png", "roofline.png", "report.html", "r"}
    assert [p.suffix for p in (tmp_path / "r").iterdir()] == [".jsonl"]


def test_bench_fails_on_a_wrong_result(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    plant(monkeypatch, "attention_fwd")
    assert main(["bench", "--device", "cpu", "--suite", "smoke", "--workload", "dense", "--quick", "--out", str(tmp_path)]) == 1
    assert "WRONG" in capsys.readouterr().out


def test_bench_lists_without_running(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "--list", "--suite", "main"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "main/patch_embed/CLIP-L/14@336/fwd" in lines and "main/attention/BLIP-2 Q-Former 32x257/fwd" in lines


def test_bench_says_what_a_cpu_leaves_out(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "--device", "cpu", "--suite", "rope", "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.count("left out: rope/rope/") == len(suites.workloads("rope"))


def test_bad_arguments(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert main(["bench", "--workload", "no such workload", "--out", str(tmp_path)]) == 2
    assert "no workload has no such workload in its id" in capsys.readouterr().err
    with pytest.raises(SystemExit) as error:
        main(["verify", "--backend", "nonsense"])
    assert error.value.code == 2


def test_missing_package_is_named(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *more: None if name == "skimage" else find_spec(name, *more))
    photos.photos.cache_clear()
    photos.batch.cache_clear()
    assert main(["bench", "--device", "cpu", "--workload", "patch_embed/ViT", "--out", str(tmp_path)]) == 2
    assert "pip install 'vlmkernels[bench]'" in capsys.readouterr().err


def test_suites_of_the_command_are_those_that_exist() -> None:
    assert tuple(suites.SUITES) == bench_command.SUITES


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys, vlmkernels.cli as c\n"
        "try: c.main(['--help'])\n"
        "except SystemExit: pass\n"
        "heavy = {'rich', 'matplotlib', 'skimage', 'transformers', 'PIL', 'triton'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_verify_compares_a_forward_without_a_backward(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = verify.torch.device("cpu")
    before = verify.verify(cpu, ["rope"], ["torch"], words=["partial rotation / float32"])
    assert [check.bound for check in before] == [8.0] and before[0].output.startswith("d")
    monkeypatch.setattr(verify, "evaluate", _only_outputs(verify.evaluate))
    (check,) = verify.verify(cpu, ["rope"], ["torch"], words=["partial rotation / float32"])
    assert check.status == "ok" and check.output.startswith("out")


def _only_outputs(evaluate: Callable[..., dict]) -> Callable[..., dict]:
    """``evaluate``, where only the reference has gradients."""

    def run(case: verify.Case, tensors: dict, backend: str) -> dict:
        if backend != "reference" and case.gradients:
            raise BackendError(f"rope_bwd can't run on the forced backend; {backend}: it leaves these to others")
        return evaluate(case, tensors, backend)

    return run


@pytest.mark.gpu
@pytest.mark.usefixtures("cuda_library")
@pytest.mark.parametrize("case", ["attention / D64 dense / bfloat16", "patch_embed / class token, norm (CLIP) / bfloat16"])
def test_verify_covers_kernels_without_a_backward(case: str) -> None:
    (check,) = verify.verify(verify.torch.device("cuda"), backends=["cuda"], words=[case])
    assert check.status == "ok" and check.output == "out"


@pytest.mark.gpu
def test_verify_on_the_gpu() -> None:
    with use_backend(""):
        assert main(["verify", "--quick"]) == 0

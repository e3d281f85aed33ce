# SPDX-License-Identifier: Apache-2.0
"""The tests of the kernels under NVIDIA's compute-sanitizer: ``python tests/sanitize.py``, on a machine with a GPU.

The tests of each file run in parts of a few minutes, each a process under one tool, several at once. What each part found goes to
a file as it ends, and a later call goes on from there, so ``--time-limit`` may cut a run anywhere. At the end the table in
docs/sanitizer.md is written from that file. The exit status is 1 where a kernel of ours has a finding or a part did not end.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "sanitizer.md"
TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
FILES = [
    f"tests/test_{name}.py"
    for name in (
        *("attention_cuda", "attention_few_cuda", "attention_bwd_cuda", "attention_bwd_few_cuda", "contrastive_cuda"),
        *("patch_embed_cuda", "patch_embed_bwd_cuda", "properties", "attention", "tile_bounds", "patch_embed", "patch_embed_bwd"),
        *("patch_embed_still", "pos_embed", "rope", "contrastive", "contrastive_triton"),
        *("linear_add_norm", "activated_linear", "feed_forward", "layer_norm"),
    )
]
#: A CUDA graph needs torch's cache of memory, compilers start processes, tensors past 2 GiB take minutes, what memory
#: is in use says nothing here, and two backends have no kernels of ours.
LEFT_OUT = "not graph and not compile and not opcheck and not memory and not past and not leak and not torch and not reference"
#: So that each tensor is an allocation of its own, whose end the tool knows and whose contents are not an earlier tensor's.
NO_CACHE = {"memcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}, "initcheck": {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}}
#: The tests fill with NaN what a backend allocates, which hides from initcheck what no kernel writes. What the copy engine stores
#: by a tensor's map it does not see (among NVIDIA's known limitations), so where kernels read that, it stays filled.
OPTIONS = {"initcheck": ["--unwritten"]}
FILLED = {f"tests/test_{name}.py" for name in ("attention_bwd_cuda", "attention_bwd_few_cuda", "attention", "properties")}
#: What racecheck takes for a race, by the functions (or classes) that write and read: several threads do so, come together, and
#: one of them arrives for all at a barrier that the other side waits for. It gives that thread's own accesses an order, nobody
#: else's (docs/sanitizer.md). They are the bounds of each warpgroup's queries, of which each lane writes one; the tile of
#: queries, and the item, that a warp has read; the numbers and ranges of queries, and the bias, where no name tells which
#: kernel's they are, so only in their tests; what a block has to know of a tile that it rounds; the tile whose sums an adder has;
#: the order in which tiles are sorted; what a tile of the losses is. And keys that nobody sees, which one warpgroup clears while
#: others may read them for scores that are masked.
UNFOLLOWED = {
    **{("attention::Producer::next", f"attention::Consumer::{read}"): () for read in ("take", "work_at")},
    ("attention::Producer::next", "load_shared"): ("tests/test_attention_cuda.py",),
    ("attention::Order::run", "attention::work_of_tile"): (),
    **{
        (f"attention_bwd::Producer::{write}", f"attention_bwd::{read}"): ()
        for write in ("copy_queries", "copy_keys")
        for read in ("QueryGroup", "KeyGroup", "PairGroup", "HalfGroup", "LastKeys", "clear_unseen", "add_part")
    },
    ("attention_bwd::Rounding::Loader::run", "attention_bwd::Rounding::round_all"): (),
    ("attention_bwd::PairGroup::tell_adder", "attention_bwd::Adder::run"): (),
    ("attention_bwd::clear_unseen", "load_matrices"): (),
    ("copy_from_global", "attention_bwd::LastKeys::weigh"): (),
    ("copy_from_global", "load_matrices"): ("tests/test_attention_bwd_cuda.py",),
    **{
        (f"contrastive::{write}", f"contrastive::{read}"): ()
        for write in ("set_logits", "set_products", "Dealer::end")
        for read in ("publish_all", "is_narrow", "work_on_all")
    },
    ("copy_from_global", "load_shared"): tuple(
        f"tests/test_{name}.py" for name in ("activated_linear", "feed_forward", "attention_bwd_cuda")
    ),
}
FINDINGS_EXIT = 86
#: What every line of the tools begins with.
PREFIX = "========= "
#: Before a function's name in C++, and how much is kept of the first finding of a kernel.
SPACES, SHOWN = r"(?:\w+::|\(anonymous namespace\)::|<unnamed>::)*", 1200


@dataclass
class Part:
    """Some tests of a file under one tool, and what came of them: findings by kernel, of three kinds, and the first of each."""

    tool: str
    file: str
    tests: list[str]
    status: str = ""  # ended, timeout, crashed
    passed: int = 0
    failed: int = 0
    findings: int = 0
    ours: dict[str, int] = field(default_factory=dict)
    others: dict[str, int] = field(default_factory=dict)
    unfollowed: dict[str, int] = field(default_factory=dict)
    shown: dict[str, str] = field(default_factory=dict)
    seconds: float = 0.0

    @property
    def key(self) -> tuple[str, ...]:
        return (self.tool, *self.tests)


def own_kernels() -> set[str]:
    """The names of the kernels of this project, in CUDA and in Triton."""
    cuda = "".join(path.read_text() for path in sorted((ROOT / "csrc").rglob("*.*")))
    triton = "".join(path.read_text() for path in sorted((ROOT / "vlmkernels" / "backends" / "triton").glob("*.py")))
    return set(re.findall(r"\b(\w+_kernel)\b", cuda)) | set(re.findall(r"def (\w+_kernel)\(", triton))


def tool_options(sanitizer: str, own: set[str]) -> dict[str, list[str]]:
    """What each tool is told beside the tests, as far as this version of it can be.

    racecheck looks at the first block, or cluster, of kernels of ours: all do the same, and all blocks take minutes, not seconds.
    initcheck asks of them alone whether what they read was written, by whatever kernel.
    """
    known = subprocess.run([sanitizer, "--help"], capture_output=True, text=True).stdout
    ours = ["--kernel-name", "regex=" + "|".join(["4vlmk", *sorted(name for name in own if name.startswith("_"))])]
    one = ["--racecheck-filter-cluster-id", "0"]
    return {
        "racecheck": ours + one if one[0] in known else ours,
        "initcheck": ours if "--initcheck-track-filtered-global-memory" in known else [],
    }


def find_sanitizer() -> str | None:
    """That of the newest version: of the wheel nvidia-cuda-sanitizer-api, of the PATH, of the toolkit."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations if nvidia else None
    wheel = [str(path) for folder in folders or [] for path in Path(folder).glob("cu*/bin/compute-sanitizer")]
    return wheel[0] if wheel else shutil.which("compute-sanitizer") or shutil.which("/usr/local/cuda/bin/compute-sanitizer")


def follows(block: str, file: str) -> bool:
    """Whether a finding is none of ``UNFOLLOWED``."""
    plain, before = block, ""
    while plain != before:  # without the arguments of templates
        plain, before = re.sub(r"<[^<>]*>", "", plain), plain
    accesses = re.findall(r"(Write|Read) access at (?:[\w:]+ )?vlmk::([\w:]+)\(", plain)
    pairs = [pair for pair, where in UNFOLLOWED.items() if not where or file in where]
    writes, reads = ({f"{at}::" for kind, at in accesses if kind == wanted} for wanted in ("Write", "Read"))

    def known(write: str, read: str) -> bool:
        return any(write.startswith(f"{pair[0]}::") and read.startswith(f"{pair[1]}::") for pair in pairs)

    return not (writes and reads and all(known(write, read) for write in writes for read in reads))


def read_log(log: str, own: set[str], file: str = "") -> tuple[int, list[Counter[str]], dict[str, str]]:
    """How many findings the log of a file's tests counts, those by kernel, of ours, of others and unfollowed, and each first."""
    total = sum(map(int, re.findall(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)", log)))
    ours: Counter[str] = Counter()
    others: Counter[str] = Counter()
    unfollowed: Counter[str] = Counter()
    shown: dict[str, str] = {}
    # A finding begins with one space and goes on with several; racecheck names the kernel in its first line.
    for block in re.split(rf"\n(?={PREFIX}\S)", log):
        first = re.match(rf"{PREFIX}(?!COMPUTE-SANITIZER|\w+ SUMMARY|Target application|Process)(\S.*)", block)
        if first is None:
            continue
        # A function that the compiler put inside the kernel comes first, the kernel last. A call of the API has neither.
        device = block.partition("Saved host backtrace")[0]
        frames = re.findall(rf"(?:\bat|Device Frame:) (?:void )?(?!0x)({SPACES})(\w+)", device)
        space, name = frames[-1] if frames else ("", first[1][:60])
        if not follows(block, file):
            unfollowed[name] += 1
        else:
            (ours if name in own or space.startswith("vlmk::") else others)[name] += 1
        shown.setdefault(name, block[:SHOWN])
    return total, [ours, others, unfollowed], shown


def parts_of(tool: str, tests: Iterable[str], size: int, sample: int | None = None) -> Iterator[Part]:
    """The tests of each file in parts of ``size``; at most ``sample`` of a file, from all over it."""
    by_file: dict[str, list[str]] = {}
    for test in tests:
        by_file.setdefault(test.partition("::")[0], []).append(test)
    for file, names in by_file.items():
        if sample is not None and sample < len(names):
            names = [names[i * len(names) // sample] for i in range(sample)]
        for first in range(0, len(names), size):
            yield Part(tool, file, names[first : first + size])


def collect(files: list[str], expression: str) -> list[str]:
    """The ids of the tests, without those that this machine skips as they are collected."""
    command = [sys.executable, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider", "-k", expression, *files]
    printed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    found = [line for line in printed.stdout.splitlines() if "::" in line]
    if not found:
        raise SystemExit(f"no test was collected:\n{printed.stdout}{printed.stderr}")
    return found


def run_part(part: Part, sanitizer: str, options: list[str], limit: float, own: set[str]) -> Part:
    """Run the part's tests under its tool with these options, and fill in what came of them."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder, "log")
        command = [
            sanitizer,
            "--tool",
            part.tool,
            f"--error-exitcode={FINDINGS_EXIT}",
            "--print-limit=100",
            "--log-file",
            str(log),
            *options,
        ]
        told = [] if part.file in FILLED else OPTIONS.get(part.tool, [])
        command += [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *told, *part.tests]
        environment = {**os.environ, **NO_CACHE.get(part.tool, {})}
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True
        )
        try:
            out, errors = process.communicate(timeout=max(1.0, limit))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and pytest, which the tool started
            process.communicate()
            part.status = "timeout"
        else:
            # pytest's last line tells whether it came to its end, whatever the tool made of the exit status.
            counts = {word: int(number) for number, word in re.findall(r"(\d+) (passed|failed|error)", out[-400:])}
            part.passed, part.failed = counts.get("passed", 0), counts.get("failed", 0) + counts.get("error", 0)
            part.status = "ended" if re.search(r"\b(passed|failed|skipped)\b.* in [\d.]+s", out[-400:]) else "crashed"
            if part.status == "crashed" or part.failed:
                print(f"{part.tool} {part.file}: {out[-1500:]}{errors[-500:]}", file=sys.stderr)
        text = log.read_text(errors="replace") if log.exists() else ""
        part.findings, counted, part.shown = read_log(text, own, part.file)
        part.ours, part.others, part.unfollowed = (dict(counts) for counts in counted)
        for kernel in part.ours:
            print(part.shown[kernel], file=sys.stderr)
    part.seconds = round(time.monotonic() - started, 1)
    return part


def table(parts: list[Part]) -> str:
    """A markdown table of one row for each tool and file, then what kernels the findings are in."""
    head = ("tool", "tests", "run", "findings in ours", "in other kernels", "unfollowed", "failed", "not to the end", "seconds")
    lines = ["| " + " | ".join(head) + " |", "|---" * len(head) + "|"]
    groups: dict[tuple[str, str], list[Part]] = {}
    for part in parts:
        groups.setdefault((part.tool, part.file), []).append(part)
    kernels: Counter[str] = Counter()
    for (tool, file), found in sorted(groups.items(), key=lambda group: (TOOLS.index(group[0][0]), group[0][1])):
        counts = [sum(sum(getattr(part, name).values()) for part in found) for name in ("ours", "others", "unfollowed")]
        unfinished = sum(len(part.tests) for part in found if part.status != "ended")
        run = sum(part.passed + part.failed for part in found)
        row = (tool, file.removeprefix("tests/"), run, *counts, sum(part.failed for part in found), unfinished)
        lines.append("| " + " | ".join(map(str, (*row, f"{sum(part.seconds for part in found):.0f}"))) + " |")
        for part in found:
            kernels.update({f"{tool}, `{kernel}`": count for kernel, count in (part.ours | part.others).items()})
    named = [f"- {kernel}: {count}" for kernel, count in sorted(kernels.items())]
    return "\n".join([*lines, "", *(named or ["No finding."])])


def write_page(parts: list[Part], machine: str) -> None:
    """Put the table into docs/sanitizer.md."""
    filled = f"<!-- results -->\n{machine}\n\n{table(parts)}\n<!-- end -->"
    PAGE.write_text(re.sub(r"<!-- results -->.*?<!-- end -->", lambda _: filled, PAGE.read_text(), flags=re.DOTALL))


def machine(sanitizer: str) -> str:
    """The GPU and the versions, in a line."""
    version = subprocess.run([sanitizer, "--version"], capture_output=True, text=True).stdout
    program = "import torch; print(torch.cuda.get_device_name(), 'CUDA', torch.version.cuda, 'torch', torch.__version__)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    number = re.search(r"Version (\S+)", version)
    return f"{done.stdout.strip() or 'no GPU'} compute-sanitizer {number[1] if number else 'of no version'}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tool", action="append", choices=TOOLS, help="all four by default; repeatable")
    parser.add_argument("--file", action="append", help="a test file (repeatable); those of the kernels by default")
    parser.add_argument("-k", default=LEFT_OUT, help=f"as pytest's, {LEFT_OUT!r} by default")
    parser.add_argument("--part", type=int, default=40, metavar="TESTS", help="tests of a part (40)")
    parser.add_argument("--sample", type=int, metavar="TESTS", help="so many tests from all over each file; all by default")
    parser.add_argument("--part-seconds", type=float, default=240, help="end a part after this long (240)")
    parser.add_argument("--time-limit", type=float, default=float("inf"), metavar="SECONDS", help="start no part after this long")
    parser.add_argument("--jobs", type=int, default=4, help="parts at once (4)")
    parser.add_argument("--results", type=Path, default=ROOT / "build" / "sanitizer.jsonl", help="what the parts found so far")
    arguments = parser.parse_args(argv)
    sanitizer = find_sanitizer()
    if sanitizer is None:
        print("compute-sanitizer: not on the PATH nor in /usr/local/cuda/bin; it comes with the CUDA toolkit, and its newest "
              "version with the wheel nvidia-cuda-sanitizer-api", file=sys.stderr)  # fmt: skip
        return 2
    started, own, results = time.monotonic(), own_kernels(), arguments.results
    options = tool_options(sanitizer, own)
    results.parent.mkdir(parents=True, exist_ok=True)
    before = [Part(**json.loads(line)) for line in results.read_text().splitlines()] if results.exists() else []
    ended = {part.key for part in before if part.status == "ended"}
    tests = collect(arguments.file or FILES, arguments.k)
    by_tool = [parts_of(tool, tests, arguments.part, arguments.sample) for tool in arguments.tool or TOOLS]
    wanted = [part for same in zip(*by_tool, strict=True) for part in same]  # a time limit cuts off files, and no tool

    def one(part: Part) -> Part | None:
        left = arguments.time_limit - (time.monotonic() - started)
        if left <= 0:
            return None
        done = run_part(part, sanitizer, options.get(part.tool, []), min(arguments.part_seconds, left), own)
        with results.open("a") as file:
            file.write(json.dumps(asdict(done)) + "\n")
        print(f"{done.tool:10} {done.file} {done.status}, {done.passed} passed, {done.failed} failed, "
              f"{done.findings} findings, {sum(done.ours.values())} in ours, {done.seconds:.0f} s", flush=True)  # fmt: skip
        return done

    with ThreadPoolExecutor(arguments.jobs) as pool:
        new = [part for part in pool.map(one, [part for part in wanted if part.key not in ended]) if part]
    all_parts = list({part.key: part for part in (*before, *new)}.values())
    write_page(all_parts, machine(sanitizer))
    print(table(all_parts))
    ended = {part.key for part in all_parts if part.status == "ended"}
    left = sum(part.key not in ended for part in wanted)
    print(f"{left} of {len(wanted)} parts are left" if left else "every part came to its end")
    return 1 if left or any(part.ours for part in all_parts) else 0


if __name__ == "__main__":
    sys.exit(main())

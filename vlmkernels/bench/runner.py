# SPDX-License-Identifier: Apache-2.0
"""Runs workloads: sets up every provider, compares its result, and only then times it."""

import contextlib
import gc
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
import torch._functorch.config as functorch_config
from torch.utils._pytree import tree_leaves

from vlmkernels.bench import MissingExtra, Unavailable
from vlmkernels.bench.ceilings import Ceilings
from vlmkernels.bench.peers import Provider
from vlmkernels.bench.timing import Timing, captured, device_times, host_times, summary
from vlmkernels.bench.workloads import OURS, Case, Workload
from vlmkernels.ops._op import Op

#: A peer's own rounding is not ours to judge, so it is timed up to this many floors. Beyond, it computes something else. In fp32
#: a wrong formula is 1e4 floors away and transformers' fp32 coordinates of Qwen3-VL's positions are 73.
PEER_BOUND, FP32_PEER_BOUND = 64.0, 1024.0
#: How many calls of a provider go into one CUDA graph where latency is measured.
GRAPH_CALLS = 20
#: How many processes an import is timed in.
IMPORTS = 7

#: What is shown in microseconds, by clock; the rest is a share of the ceiling.
MICROSECONDS = {
    "host": "host time per call, µs (less is better)",
    "graph": "time per call, back to back in a CUDA graph with warm caches, µs (less is better)",
    "import": "time of an import in a process of its own, µs (less is better)",
}


@dataclass
class Row:
    """One provider on one workload. ``status`` is ok, wrong, unavailable (it can't run, see ``reason``) or failed.

    ``clock`` is that of its workload, or ``"device"`` where a step could not be captured; ``reason`` then says why.
    """

    suite: str
    op: str
    workload: str
    direction: str
    provider: str
    status: str
    reason: str = ""
    dtype: str = ""
    clock: str = "device"
    backends: list[str] = field(default_factory=list)
    error_over_floor: float | None = None
    bound: float | None = None
    ms: float | None = None
    ms_low: float | None = None
    ms_high: float | None = None
    samples: int = 0
    flops: float = 0.0
    bytes: float = 0.0
    extra_bytes: int | None = None  # on a GPU: the peak of what a call holds beside its inputs and its results
    tflops: float | None = None
    gbs: float | None = None
    ceiling: str = ""
    ceiling_share: float | None = None
    best_peer: str = ""
    speedup: float | None = None  # time of the best peer over ours, in its fastest form
    run: str = ""  # when its run started

    @property
    def id(self) -> str:
        return f"{self.suite}/{self.op}/{self.workload}/{self.direction}"

    @property
    def title(self) -> str:
        return f"{self.op} · {self.workload} · {self.direction}"

    @property
    def result(self) -> str:
        """The time, or why there is none."""
        if self.ms is None:
            return f"{self.status.upper() if self.status in ('wrong', 'failed') else 'not run'}: {self.reason}"
        time = f"{self.ms * 1e3:.1f} µs" if self.clock in MICROSECONDS or self.ms < 1 else f"{self.ms:.3f} ms"
        return f"{time} (not captured)" if self.reason else time

    def record(self) -> dict[str, Any]:
        """The row as one JSON object."""
        return {"record": "row", **asdict(self)}


@dataclass(frozen=True)
class Options:
    """What to run. Times are milliseconds per provider; ``peers`` keeps those whose name has one of the words."""

    compile: bool = True
    peers: tuple[str, ...] = ()
    budget_ms: float = 60.0
    time_limit: float = float("inf")


@contextlib.contextmanager
def backends_used() -> Iterator[list[str]]:
    """The names of the backends that ops choose inside, in order of first use."""
    used: list[str] = []

    def recording(choose: Callable[..., Any]) -> Callable[..., Any]:
        def call(self: Op, *args: Any) -> Any:
            function = choose(self, *args)
            if function is not None:
                name = function.__module__.split(".")[2] if function.__module__.startswith("vlmkernels.backends.") else "?"
                if name not in used:
                    used.append(name)
            return function

        return call

    chosen_by = {name: getattr(Op, name) for name in ("select", "planned")}
    for name, choose in chosen_by.items():
        setattr(Op, name, recording(choose))
    try:
        yield used
    finally:
        for name, choose in chosen_by.items():
            setattr(Op, name, choose)


def run(
    work: Sequence[Workload],
    device: torch.device,
    ceilings: Ceilings,
    options: Options,
    progress: Callable[[str], None] = lambda message: None,
) -> tuple[list[Row], list[str]]:
    """Run workloads one after the other. Ctrl-C leaves out the one that runs and those behind it: the rows before it are kept.

    Args:
        progress: called with the name of what starts.

    Returns:
        the rows, ours first in each workload, and a line for everything that was left out.
    """
    rows, left_out = [], []
    started, interrupted = time.perf_counter(), False
    for workload in work:
        if workload.gpu_only and device.type != "cuda":
            left_out.append(f"{workload.id}: {workload.gpu_only}")
        elif interrupted:
            left_out.append(f"{workload.id}: interrupted")
        elif time.perf_counter() - started > options.time_limit:
            left_out.append(f"{workload.id}: the time limit of {options.time_limit:g} s was reached")
        else:
            progress(workload.id)
            try:
                rows += run_workload(workload, device, ceilings, options, progress)
            except KeyboardInterrupt:
                interrupted = True
                left_out.append(f"{workload.id}: interrupted")
            _free(device)
    if device.type != "cuda" and any(not workload.gpu_only for workload in work):
        left_out.append("on a CPU: torch.compile, FlexAttention, FlashAttention and cuDNN peers; large batches; bf16")
    if not options.compile:
        left_out.append("peers that go through torch.compile, as asked")
    if options.peers:
        left_out.append(f"peers without {' or '.join(options.peers)} in their name, as asked")
    return rows, left_out


def run_workload(
    workload: Workload,
    device: torch.device,
    ceilings: Ceilings,
    options: Options,
    progress: Callable[[str], None] = lambda m: None,
) -> list[Row]:
    """All rows of one workload.

    Raises:
        MissingExtra: the inputs need a package that is not installed.
    """

    def row(provider: str, status: str, reason: str = "") -> Row:
        return Row(workload.suite, workload.op, workload.name, workload.direction, provider, status, reason)

    try:
        case = workload.build(device)
    except MissingExtra:
        raise
    except Unavailable as error:
        return [row(OURS, "unavailable", str(error))]
    except Exception as error:  # whatever goes wrong in setting up a workload belongs in the report, beside the others
        return [row(OURS, "failed", f"inputs: {_message(error)}")]
    rows, calls = [], {}
    # The backward passes of peers are called many times: compiled ones must keep what they saved. Convolutions are tuned.
    keep = functorch_config.patch(donated_buffer=False)
    with torch.no_grad(), keep, torch.backends.cudnn.flags(enabled=True, benchmark=True):
        for provider in _selected(case, options):
            progress(f"{workload.id}: {provider.name}")
            new = row(provider.name, "ok")
            new.dtype, new.clock, new.flops, new.bytes = (
                str(case.dtype).removeprefix("torch."),
                case.clock if device.type == "cuda" or case.clock in ("host", "import") else "device",
                case.flops,
                case.bytes,
            )
            call = _checked(provider, case, new)
            rows.append(new)
            if call is not None:
                calls[provider.name] = call
                new.extra_bytes = extra_bytes(call, device)
        timings = _times(rows, calls, device, options)
    for new in rows:
        if new.provider in timings:
            _fill(new, timings[new.provider], ceilings)
    _rank(rows)
    return rows


def _selected(case: Case, options: Options) -> list[Provider]:
    chosen = [p for p in case.peers if options.compile or not p.compiled]
    if options.peers:
        chosen = [p for p in chosen if any(word in p.name for word in options.peers)]
    also = [p for p in case.also if options.compile or not p.compiled]
    return [case.ours, *also, *chosen]


def _checked(provider: Provider, case: Case, row: Row) -> Callable[[], Any] | None:
    """Set a provider up, call it, compare. Its call if the result is right; fills in the row's error and status."""
    ours = provider.name.startswith(OURS)
    warned: list[warnings.WarningMessage] = []
    try:
        with backends_used() as used, warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            call = provider.prepare()
            result = call()
        row.backends = list(used)
        comparisons = case.check(result)
    except Unavailable as error:
        row.status, row.reason = "unavailable", str(error)
        return None
    except Exception as error:  # a peer may fail in any way; ours fails the run
        row.status, row.reason = "failed" if ours else "unavailable", _message(error) + _explanation(warned)
        return None
    worst = max(range(len(comparisons)), key=lambda i: comparisons[i].ratio)
    row.error_over_floor, row.bound = comparisons[worst].ratio, comparisons[worst].bound
    peer_bound = FP32_PEER_BOUND if case.dtype == torch.float32 else PEER_BOUND
    wrong = not all(comparisons) if ours else not row.error_over_floor <= peer_bound
    if wrong:
        row.status = "wrong"
        row.reason = f"{case.outputs[worst]} is {row.error_over_floor:.3g} floors off {comparisons[worst].note}".strip()
        return None
    return call


def extra_bytes(call: Callable[[], Any], device: torch.device) -> int | None:
    """The peak of what torch allocates in a call that was made before, beside its results; None on a CPU."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    result = call()
    torch.cuda.synchronize(device)
    extra: int = torch.cuda.max_memory_allocated(device) - before - bytes_of(result)
    return max(0, extra)


def bytes_of(result: Any) -> int:
    """Of the tensors in what a call returns, which may be nested; a block mask of FlexAttention counts as nothing."""
    return sum(x.numel() * x.element_size() for x in tree_leaves(result) if isinstance(x, torch.Tensor))


def _times(rows: list[Row], calls: dict[str, Callable[[], Any]], device: torch.device, options: Options) -> dict[str, Timing]:
    """Time the calls by the clock of their rows. Where one can't be captured in a CUDA graph, its row says so."""
    clock = rows[0].clock
    if clock == "host":
        return host_times(calls, device)
    if clock == "import":
        return {name: summary([float(call()[-1]) for _ in range(IMPORTS)]) for name, call in calls.items()}
    if clock not in ("graph", "replay"):
        return device_times(calls, device, options.budget_ms, cold=clock != "queue")
    for row in rows:
        if row.provider in calls:
            try:
                calls[row.provider] = captured(calls[row.provider], device, GRAPH_CALLS if clock == "graph" else 1)
            except Exception as error:  # a call that waits for the GPU, or whatever else a peer does
                row.reason = f"not captured in a CUDA graph: {_message(error)}"
                row.clock = "device" if clock == "replay" else row.clock
    if clock == "replay":
        return device_times(calls, device, options.budget_ms)
    for row in rows:
        if row.status == "ok" and row.reason:
            row.status = "failed" if row.provider == OURS else "unavailable"
            del calls[row.provider]
    return device_times(calls, device, options.budget_ms, cold=False, calls=GRAPH_CALLS)


def _fill(row: Row, timing: Timing, ceilings: Ceilings) -> None:
    row.ms, row.ms_low, row.ms_high, row.samples = timing.ms, timing.low, timing.high, timing.samples
    if row.clock in MICROSECONDS:  # no rate says how fast a launch or a warm cache could be
        return
    row.tflops, row.gbs = row.flops / timing.ms / 1e9, row.bytes / timing.ms / 1e6
    row.ceiling = ceilings.bound_by(row.flops, row.bytes)
    row.ceiling_share = ceilings.best_ms(row.flops, row.bytes) / timing.ms


def _rank(rows: list[Row]) -> None:
    timed = [(row.ms, row.provider) for row in rows if not row.provider.startswith(OURS) and row.ms is not None]
    ours = next(row for row in rows if row.provider == OURS)
    own = [row.ms for row in rows if row.provider.startswith(OURS) and row.ms is not None]
    if timed and own:
        best_ms, ours.best_peer = min(timed)
        ours.speedup = best_ms / min(own)


def _message(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _explanation(warned: list[warnings.WarningMessage]) -> str:
    """SDPA says in warnings why a kernel does not take its inputs; the error only says that none does."""
    texts = [str(w.message).partition(" (Triggered internally")[0].strip() for w in warned]
    causes = [text for text in texts if not text.endswith("because:") and "runtime disabled" not in text]
    return f" ({causes[0][:200]})" if causes else ""


def _free(device: torch.device) -> None:
    if "torch._dynamo" in sys.modules:  # only where a peer was compiled: importing it takes seconds
        sys.modules["torch._dynamo"].reset()
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()

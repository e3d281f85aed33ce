# SPDX-License-Identifier: Apache-2.0
"""Timing that compares: all providers of a workload take turns, each call finds a cold cache, the median counts.

On a GPU a call is timed by a pair of events on its stream. Before each call a buffer several times the size of the L2 cache
is read: this evicts what the previous call left (reading leaves no dirty lines to be written back within the timed call) and
keeps the GPU busy while the host queues the call, so that launch overhead is not in the figure. It has a suite of its own,
``overhead``. The buffer is read as often as the host needs for that, a backward pass twice or so. Between calls the GPU rests, so
that its clocks stay where they are. A step of autograd is captured in a CUDA graph and replayed. Latency is that of calls back to
back in one graph, as a model's layers run in it, with warm caches. A whole model, which the host may take as long to queue as the
GPU to run, is queued behind a call of itself, as in a loop over batches: it takes the longer of the two.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

#: A GPU rests after so many milliseconds of work, so many times as long. At its power limit it lowers its clocks, by how much
#: depends on what it did before: without rests medians of eight workloads timed three times lay up to 8.5 % apart (H200, each
#: kept busy until two windows of 60 ms agreed within 0.3 %); with them two runs of 83 workloads had 81 within 1 %. The host spins
#: meanwhile: from a core that has slept a step of CLIP-L takes 22 ms to queue instead of 15.
BURST_MS, RESTS = 2.0, 3


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one provider: the median, the quartiles, and how many calls they come from."""

    ms: float
    low: float
    high: float
    samples: int


def summary(samples: list[float]) -> Timing:
    """The median and the quartiles of some samples in milliseconds."""
    low, median, high = torch.tensor(samples, dtype=torch.float64).quantile(torch.tensor([0.25, 0.5, 0.75]).double()).tolist()
    return Timing(median, low, high, len(samples))


def captured(function: Callable[[], Any], device: torch.device, calls: int = 1) -> Callable[[], None]:
    """A replay of ``calls`` calls of ``function``, captured in one CUDA graph.

    Raises:
        RuntimeError: it can't be captured, since it waits for the GPU or for another reason.
    """
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    mode = torch.cuda.get_sync_debug_mode()
    with torch.cuda.stream(stream):
        function()  # what is allocated or tuned in a first call on a stream must not be captured
        stream.synchronize()
        try:
            # An error here is clean; one that CUDA finds while it captures may leave memory behind.
            torch.cuda.set_sync_debug_mode("error")
            function()
        finally:
            torch.cuda.set_sync_debug_mode(mode)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for _ in range(calls):
            function()
    return graph.replay


class _ColdCache:
    """Evicts a GPU's L2 cache by reading a buffer of many times its size, which leaves the host time to queue a call.

    It is read once, and again for every ``READ_MS`` that the host is known to need.
    """

    #: At 4 TB/s, and the longest that anybody waits for: a call that waits for the GPU is not queued by waiting longer.
    READ_MS, MOST_MS = 0.12, 2.0

    def __init__(self, device: torch.device) -> None:
        size = max(512 << 20, 4 * int(getattr(torch.cuda.get_device_properties(device), "L2_cache_size", 0)))
        self.buffer = torch.zeros(size // 4, device=device)
        self.result = torch.zeros((), device=device)

    def __call__(self, host_ms: float) -> None:
        for _ in range(1 + int(min(host_ms, self.MOST_MS) / self.READ_MS)):
            torch.sum(self.buffer, dim=0, out=self.result)


def device_times(
    functions: dict[str, Callable[[], Any]], device: torch.device, budget_ms: float = 60.0, *, cold: bool = True, calls: int = 1
) -> dict[str, Timing]:
    """Time each function in turn, round after round.

    Args:
        functions: name to call. Each was called before (compiled, autotuned).
        device: where they run. On a CPU the wall clock is used, the cache is left as it is, and a round takes one call each.
        budget_ms: about how long each function is timed for; never under 5 rounds or over 200.
        cold: on a GPU, with a cold L2 cache; else each function runs once more before it is timed.
        calls: how many calls a function makes.

    Returns:
        name to timing, in milliseconds per call.
    """
    if not functions:
        return {}
    once = _wall_time if device.type != "cuda" else _event_timer(device, cold)
    once(functions, list(functions))
    estimates = once(functions, list(functions))
    rounds = max(5, min(200, int(budget_ms * len(functions) / max(sum(estimates.values()), 1e-6))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    names = list(functions)
    for i in range(rounds):
        first = i % len(names)
        for name, ms in once(functions, names[first:] + names[:first]).items():
            samples[name].append(ms / calls)
    return {name: summary(times) for name, times in samples.items()}


def _wall_time(functions: dict[str, Callable[[], Any]], order: list[str]) -> dict[str, float]:
    times = {}
    for name in order:
        start = time.perf_counter()
        functions[name]()
        times[name] = (time.perf_counter() - start) * 1e3
    return times


def _event_timer(device: torch.device, cold: bool) -> Callable[[dict[str, Callable[[], Any]], list[str]], dict[str, float]]:
    empty_cache = _ColdCache(device) if cold else None
    host_ms: dict[str, float] = {}  # of each one's last call
    rest = _Rest()

    def once(functions: dict[str, Callable[[], Any]], order: list[str]) -> dict[str, float]:
        times = {}
        for name in order:
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            with rest:
                # Either keeps the GPU busy until the host has queued the call.
                if empty_cache is None:
                    functions[name]()
                else:
                    empty_cache(host_ms.get(name, 0.0))
                begin = time.perf_counter()
                start.record()
                functions[name]()
                stop.record()
                host_ms[name] = (time.perf_counter() - begin) * 1e3
                stop.synchronize()
            times[name] = start.elapsed_time(stop)
        return times

    return once


class _Rest:
    """Waits behind work in its block, once there was ``BURST_MS`` of it, ``RESTS`` times as long as that took."""

    def __init__(self) -> None:
        self.busy = 0.0

    def __enter__(self) -> None:
        self.began = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.busy += time.perf_counter() - self.began
        if self.busy * 1e3 >= BURST_MS:
            end = time.perf_counter() + RESTS * self.busy
            while time.perf_counter() < end:
                pass
            self.busy = 0.0


def host_times(
    functions: dict[str, Callable[[], Any]], device: torch.device, calls: int = 100, rounds: int = 15
) -> dict[str, Timing]:
    """The time that the host is busy with one call (Python, dispatch, launches), in milliseconds.

    The work of a call must take the GPU less time than the host, else the queue fills and the GPU is timed.
    """
    samples: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            start = time.perf_counter()
            for _ in range(calls):
                function()
            samples[name].append((time.perf_counter() - start) * 1e3 / calls)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return {name: summary(times) for name, times in samples.items()}

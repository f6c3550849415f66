"""Time and memory of calls that stand beside each other.

Contenders are timed in turn, A B C, B A C, …, so that a machine that slows down slows all of them down, and their times
are compared within a round. A sample is one stretch of a monotonic clock on the CPU, a pair of events on a GPU.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Call = Callable[[], object]

#: Read and written before each sample on a CPU, and …
CPU_FLUSH_BYTES = 64 * 2**20
#: … written before each on a GPU, so that no input is found in a cache (of 50 MB on the largest).
GPU_FLUSH_BYTES = 256 * 2**20
#: Calls of each contender whose time is not reported, before the first sample.
WARM_UP = 2


@dataclass(frozen=True)
class Effort:
    """Samples of one cell: as many rounds as fit into `seconds`, within the two bounds."""

    least: int
    most: int
    seconds: float


@dataclass(frozen=True)
class Spread:
    """Median and quartiles of n samples, and the best of them."""

    median: float
    q1: float
    q3: float
    best: float
    n: int

    @classmethod
    def of(cls, samples: list[float], *, largest_is_best: bool = False) -> Spread:
        if len(samples) == 1:
            return cls(samples[0], samples[0], samples[0], samples[0], 1)
        q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, q1, q3, max(samples) if largest_is_best else min(samples), len(samples))

    def as_dict(self) -> dict[str, Any]:
        return {"median": self.median, "q1": self.q1, "q3": self.q3, "best": self.best, "n": self.n}


class CpuClock:
    """Seconds of one call by the monotonic clock, the caches flushed before it."""

    def __init__(self) -> None:
        self.flush = torch.zeros(CPU_FLUSH_BYTES // 4, dtype=torch.int32)

    def round(self, calls: list[Call]) -> list[float]:
        """Seconds of each call, in turn."""
        samples = []
        for call in calls:
            self.flush.add_(1)
            start = time.perf_counter()
            call()
            samples.append(time.perf_counter() - start)
        return samples


class GpuClock:
    """Seconds between two events around one call, the L2 cache flushed before it (as `triton.testing.do_bench`)."""

    def __init__(self, device: torch.device) -> None:
        self.flush = torch.empty(GPU_FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def round(self, calls: list[Call]) -> list[float]:
        """Seconds of each call, in turn."""
        pairs = []
        for call in calls:
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) * 1e-3 for start, end in pairs]


def clock_for(device: torch.device) -> CpuClock | GpuClock:
    return GpuClock(device) if device.type == "cuda" else CpuClock()


def interleave(calls: Mapping[str, Call], clock: CpuClock | GpuClock, effort: Effort) -> dict[str, list[float]]:
    """Samples of each call in seconds, the i-th of each from the same round, the order new in every round."""
    for call in calls.values():
        clock.round([call] * WARM_UP)
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    for done in range(effort.most):
        if done >= effort.least and time.perf_counter() - start > effort.seconds:
            break
        shuffle(order)
        for name, seconds in zip(order, clock.round([calls[name] for name in order]), strict=True):
            samples[name].append(seconds)
    return samples


def peak_bytes(call: Call, device: torch.device) -> int:
    """The most memory `call` held at once beyond what was held before it, its results included.

    On a GPU by the caching allocator's own count. On a CPU by torch's allocator, whose every allocation and release the
    profiler reports; scratch space inside the BLAS library is not torch's and is not seen.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        kept = call()
        torch.cuda.synchronize(device)
        del kept
        return int(torch.cuda.max_memory_allocated(device) - before)
    # The profiler announces its start and stop on stderr, into the progress bar.
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        kept = call()
        del kept
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

"""Time and memory of calls that stand beside each other.

Contenders are timed in turn, A B C, B A C, …, so that a machine that slows down slows all of them down, and their times
are compared within a round. A sample is one stretch of a monotonic clock on the CPU. On a GPU it is the time between
two events on the device, which spins before the first until the host has queued all of the call; what the host took
for that stands apart.
"""

from __future__ import annotations

import os
import random
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from gssf_triton.autotune import measure
from gssf_triton.autotune.measure import Call as Call
from gssf_triton.autotune.measure import Sample as Sample

#: Read and written before each sample on a CPU, and …
CPU_FLUSH_BYTES = 64 * 2**20
#: … written before each on a GPU, so that no input is found in a cache.
GPU_FLUSH_BYTES = measure.FLUSH_BYTES
#: Calls of each contender whose time is not reported, before the first sample.
WARM_UP = 2


@dataclass(frozen=True)
class Effort:
    """Samples of one cell: as many rounds as fit into `seconds`, within the two bounds.

    Before each `flush_bytes` are written, as many as the device's caches may hold where it is None.
    """

    least: int
    most: int
    seconds: float
    flush_bytes: int | None = None


#: What shows that something runs.
BRIEF = Effort(1, 1, 0.0, flush_bytes=2**16)


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

    def __init__(self, flush_bytes: int = CPU_FLUSH_BYTES) -> None:
        self.flush = torch.zeros(flush_bytes // 4, dtype=torch.int32)

    def round(self, calls: list[Call]) -> list[Sample]:
        """A sample of each call, in turn."""
        samples = []
        for call in calls:
            self.flush.add_(1)
            start = time.perf_counter()
            call()
            samples.append(Sample(time.perf_counter() - start))
        return samples


class GpuClock(measure.GpuClock):
    """The tuner's clock, with what the host took beside its samples."""

    def round(self, calls: list[Call]) -> list[Sample]:
        """A sample of each call, in turn."""
        return [self.take(call) for call in calls]


def clock_for(device: torch.device, effort: Effort) -> CpuClock | GpuClock:
    """The clock of a device."""
    if device.type == "cuda":
        return GpuClock(device, effort.flush_bytes or GPU_FLUSH_BYTES)
    return CpuClock(effort.flush_bytes or CPU_FLUSH_BYTES)


def interleave(calls: Mapping[str, Call], clock: CpuClock | GpuClock, effort: Effort) -> dict[str, list[Sample]]:
    """Samples of each call, the i-th of each from the same round, the order new in every round."""
    for call in calls.values():
        clock.round([call] * WARM_UP)
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    for done in range(effort.most):
        if done >= effort.least and time.perf_counter() - start > effort.seconds:
            break
        shuffle(order)
        for name, sample in zip(order, clock.round([calls[name] for name in order]), strict=True):
            samples[name].append(sample)
    return samples


def spreads(samples: list[Sample]) -> dict[str, Any]:
    """What a table of results says of samples: "seconds", and where they come from a GPU the host's beside them."""
    found: dict[str, Any] = {"seconds": Spread.of([sample.seconds for sample in samples]).as_dict()}
    hosts = [sample.host for sample in samples if sample.host is not None]
    if hosts:
        found["host_seconds"] = Spread.of(hosts).as_dict()
        found["host_exposed"] = any(sample.exposed for sample in samples)
    return found


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

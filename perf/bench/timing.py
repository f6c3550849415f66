"""Time and memory of calls that are compared, by the tuner's clocks (`gssf_triton.autotune.measure`).

Contenders are timed in turn, A B C, B A C, …, so that a machine that slows down slows all of them down, and their times
are compared within a round.
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

from gssf_triton.autotune.measure import FLUSH_BYTES, WARM_UP, Call, CpuClock, GpuClock, Sample

#: Read and written before each sample on a CPU.
CPU_FLUSH_BYTES = 64 * 2**20


@dataclass(frozen=True)
class Effort:
    """Samples of one cell: as many rounds as fit into `seconds`, within the two bounds.

    Before each sample `flush_bytes` are written; None: as many as the device's caches may hold.
    """

    least: int
    most: int
    seconds: float
    flush_bytes: int | None = None


#: Shows that something runs.
BRIEF = Effort(1, 1, 0.0, flush_bytes=2**16)


def spread(samples: list[float], *, largest_is_best: bool = False) -> dict[str, Any]:
    """Median and quartiles of samples, the best of them, and how many there are."""
    several = len(samples) > 1
    q1, median, q3 = statistics.quantiles(samples, n=4, method="inclusive") if several else samples * 3
    best = max(samples) if largest_is_best else min(samples)
    return {"median": median, "q1": q1, "q3": q3, "best": best, "n": len(samples)}


def clock_for(device: torch.device, effort: Effort) -> CpuClock:
    """The clock of a device."""
    if device.type == "cuda":
        return GpuClock(device, effort.flush_bytes or FLUSH_BYTES)
    return CpuClock(effort.flush_bytes or CPU_FLUSH_BYTES)


def interleave(calls: Mapping[str, Call], clock: CpuClock, effort: Effort) -> dict[str, list[Sample]]:
    """Samples of each call, the i-th of each from the same round, the order new in every round."""
    for call in calls.values():
        for _ in range(WARM_UP if effort.most > 1 else 0):  # a single sample only shows that it runs
            clock.take(call)
    samples: dict[str, list[Sample]] = {name: [] for name in calls}
    order = list(calls)
    shuffle = random.Random(0).shuffle
    start = time.perf_counter()
    for done in range(effort.most):
        if done >= effort.least and time.perf_counter() - start > effort.seconds:
            break
        shuffle(order)
        for name in order:
            samples[name].append(clock.take(calls[name]))
    return samples


def spreads(samples: list[Sample]) -> dict[str, Any]:
    """A result's entries for samples: "seconds", and for a GPU's the host's time."""
    found: dict[str, Any] = {"seconds": spread([sample.seconds for sample in samples])}
    hosts = [sample.host for sample in samples if sample.host is not None]
    if hosts:
        found["host_seconds"] = spread(hosts)
        found["host_exposed"] = any(sample.exposed for sample in samples)
    return found


def ratios(ours: list[Sample], its: list[Sample]) -> dict[str, Any]:
    """Our time over its time, round by round."""
    return spread([mine.seconds / other.seconds for mine, other in zip(ours, its, strict=True)])


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

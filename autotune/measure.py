"""Seconds of a call: warm-up, then the median of many samples and their spread.

A sample is one stretch of a monotonic clock on a CPU, and on a GPU the time between two events, with the L2 cache
flushed before it, as in `triton.testing.do_bench`. Calls that are to be compared are timed in turn, round after round,
so that a machine that slows down slows all of them down.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]

#: Written before a sample on a GPU: larger than any L2 cache.
FLUSH_BYTES = 256 * 2**20
#: Calls whose time is not looked at: compilation, caches, clocks.
WARM_UP = 2


class Clock(Protocol):
    """What the tuner needs of time; tests bring their own."""

    def now(self) -> float:
        """Seconds, monotonic."""
        ...

    def sample(self, call: Call) -> float:
        """Seconds of one call."""
        ...


class CpuClock:
    """The process's monotonic clock."""

    def now(self) -> float:
        return time.perf_counter()

    def sample(self, call: Call) -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start


class GpuClock(CpuClock):
    """Events on the device's stream around a call, the L2 cache flushed before it."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.flush = torch.empty(FLUSH_BYTES // 4, dtype=torch.int32, device=device)

    def sample(self, call: Call) -> float:
        with torch.cuda.device(self.device):
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            self.flush.zero_()
            start.record()
            call()
            end.record()
            end.synchronize()
        return start.elapsed_time(end) * 1e-3


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return GpuClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Timing:
    """Median of the samples in seconds, and their interquartile range over it."""

    seconds: float
    spread: float

    @classmethod
    def of(cls, samples: Sequence[float]) -> Timing:
        """The timing of samples in seconds.

        Example:
            >>> from gssf_triton.autotune.measure import Timing
            >>> Timing.of([1.0, 2.0, 3.0])
            Timing(seconds=2.0, spread=0.5)
        """
        median = statistics.median(samples)
        if len(samples) < 2 or median <= 0:
            return cls(median, 0.0)
        low, _, high = statistics.quantiles(samples, n=4, method="inclusive")
        return cls(median, (high - low) / median)


def measure(calls: Sequence[Call], clock: Clock, rounds: int, warm_up: int = WARM_UP) -> list[Timing]:
    """The timing of each call, from `rounds` samples taken in turn, every other round backwards."""
    for call in calls:
        for _ in range(warm_up):
            clock.sample(call)
    samples: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        order = range(len(calls)) if number % 2 == 0 else reversed(range(len(calls)))
        for index in order:
            samples[index].append(clock.sample(calls[index]))
    return [Timing.of(one) for one in samples]

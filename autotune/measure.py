"""Seconds of a call: warm-up, then the median of many samples and their spread.

On a CPU a sample is an interval of a monotonic clock. On a GPU it is the time between two events on the device. Before
the first event the device spins until the host has queued the whole call; the host's time for that is kept apart. Calls
to compare are timed in turn, round after round, so that a slowdown of the machine affects all of them.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch

Call = Callable[[], object]

#: Written before a sample on a GPU: larger than any L2 cache.
FLUSH_BYTES = 256 * 2**20
#: Cycles that a GPU spins before a sample, about 1 ms at its fastest clock.
SPIN_CYCLES = 2_000_000
#: If the host takes longer, the next spin lasts its time × the margin: so many raises, up to so many cycles (0.2 s).
SPIN_MARGIN, SPIN_RAISES, MOST_SPIN_CYCLES = 1.5, 4, 400_000_000
#: Untimed first calls, because of compilation, caches and clocks.
WARM_UP = 2


class Sample(NamedTuple):
    """Seconds of one call on its device.

    On a GPU also `host`, the seconds that the host took to queue the call, and `exposed`: whether the device had to
    wait for the host. Then `seconds` includes host time, as in every call that reads a value from the device.
    """

    seconds: float
    host: float | None = None
    exposed: bool = False


class Clock(Protocol):
    """What the tuner needs of a clock; tests have their own."""

    def now(self) -> float:
        """Seconds, monotonic."""
        ...

    def sample(self, call: Call) -> float:
        """Seconds of one call."""
        ...


class CpuClock:
    """The process's monotonic clock. `flush_bytes` are read and written before each sample, to empty the caches."""

    def __init__(self, flush_bytes: int = 0) -> None:
        self.flush = torch.zeros(flush_bytes // 4, dtype=torch.int32)

    def now(self) -> float:
        return time.perf_counter()

    def take(self, call: Call) -> Sample:
        """A sample."""
        self.flush.add_(1)
        start = time.perf_counter()
        call()
        return Sample(time.perf_counter() - start)

    def sample(self, call: Call) -> float:
        return self.take(call).seconds


class GpuClock(CpuClock):
    """Seconds between two events around one call, the L2 cache flushed before it (as `triton.testing.do_bench`).

    Between flush and call the device spins. If the host took longer than the spin, the sample is repeated with a longer
    one. A call that waits for the device outlasts every spin: it is sampled without a spin, as `exposed`.
    """

    def __init__(self, device: torch.device, flush_bytes: int = FLUSH_BYTES) -> None:
        self.device = device
        self.flush = torch.empty(flush_bytes // 4, dtype=torch.int32, device=device)
        self.cycles = SPIN_CYCLES
        self.waiting: set[Call] = set()

    def sample(self, call: Call) -> float:
        with torch.cuda.device(self.device):
            return self.take(call).seconds

    def take(self, call: Call) -> Sample:
        """A sample, on the current device."""
        for _ in range(SPIN_RAISES if call not in self.waiting else 0):
            sample, spun, busy = self._behind_spin(call, self.cycles)
            if busy < spun:
                return sample
            longer = int(self.cycles * SPIN_MARGIN * busy / max(spun, 1e-9))
            if longer > MOST_SPIN_CYCLES:
                break
            self.cycles = longer
        if call not in self.waiting:
            self.waiting.add(call)
            self.cycles = SPIN_CYCLES
        return self._behind_spin(call, 0)[0]._replace(exposed=True)

    def _behind_spin(self, call: Call, cycles: int) -> tuple[Sample, float, float]:
        """(sample, seconds of the spin on the device, the host's seconds from before the spin to the last event)."""
        before, start, end = (torch.cuda.Event(enable_timing=True) for _ in range(3))
        self.flush.zero_()
        queued = time.perf_counter()
        before.record()
        if cycles:
            torch.cuda._sleep(cycles)
        start.record()
        called = time.perf_counter()
        call()
        host = time.perf_counter() - called
        end.record()
        busy = time.perf_counter() - queued
        torch.cuda.synchronize()
        spun = before.elapsed_time(start) * 1e-3
        return Sample(start.elapsed_time(end) * 1e-3, host), spun, busy


def clock_for(device: torch.device) -> Clock:
    """The clock of a device."""
    return GpuClock(device) if device.type == "cuda" else CpuClock()


@dataclass(frozen=True)
class Timing:
    """Median of the samples in seconds, and their interquartile range divided by it."""

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
    """The timing of each call, from `rounds` samples taken in turn, every other round in reverse order."""
    for call in calls:
        for _ in range(warm_up):
            clock.sample(call)
    samples: list[list[float]] = [[] for _ in calls]
    for number in range(rounds):
        order = range(len(calls)) if number % 2 == 0 else reversed(range(len(calls)))
        for index in order:
            samples[index].append(clock.sample(calls[index]))
    return [Timing.of(one) for one in samples]

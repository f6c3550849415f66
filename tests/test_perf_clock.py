"""The GPU's clock tells the GPU's time, not the host's: on a model of a device that works a queue off."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bench import timing
from gssf_triton.autotune import measure

MICRO = 1e-6


class Device:
    """A host and a device with clocks of their own: what the host queues begins when the device has done the rest.

    `slots`: the host waits where as many operations are queued.
    """

    def __init__(self, hertz: float = 2e9, slots: int = 1000) -> None:
        self.now = self.free = 100.0
        self.hertz, self.slots = hertz, slots
        self.ends: list[float] = []

    def launch(self, host: float, gpu: float) -> None:
        """The host takes `host` seconds to queue what takes the device `gpu`."""
        self.now += host
        pending = [end for end in self.ends if end > self.now]
        if len(pending) >= self.slots:
            self.now = sorted(pending)[-self.slots]
        self.free = max(self.free, self.now) + gpu
        self.ends = [*pending, self.free]

    def synchronize(self) -> None:
        self.now = max(self.now, self.free)

    def sleep(self, cycles: int) -> None:
        self.launch(5 * MICRO, cycles / self.hertz)

    def event(self, **_: Any) -> Any:
        made = SimpleNamespace(at=0.0)
        made.record = lambda: setattr(made, "at", max(self.free, self.now))
        made.elapsed_time = lambda end: (end.at - made.at) * 1e3
        return made


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Device:
    device = Device()
    monkeypatch.setattr(torch.cuda, "Event", device.event)
    monkeypatch.setattr(torch.cuda, "_sleep", device.sleep)
    monkeypatch.setattr(torch.cuda, "synchronize", device.synchronize)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: device.now)
    return device


def clock_of(device: Device) -> timing.GpuClock:
    clock = timing.GpuClock(torch.device("cpu"), flush_bytes=4)
    clock.flush = SimpleNamespace(zero_=lambda: device.launch(5 * MICRO, 60 * MICRO))  # type: ignore[assignment]
    return clock


def sample(device: Device, call: Callable[[], object]) -> timing.Sample:
    return clock_of(device).take(call)


@pytest.mark.parametrize("hertz", [2e9, 0.3e9], ids=["fast", "idle"])
@pytest.mark.parametrize(
    ("launches", "host", "gpu_time"),
    [(1, 400, 100), (40, 10, 2.5), (1, 20, 5000), (1, 9000, 100), (200, 30, 1)],
    ids=["host-bound", "many launches", "device-bound", "slow host", "slow host, many launches"],
)
def test_host_time_is_no_gpu_time(gpu: Device, hertz: float, launches: int, host: float, gpu_time: float) -> None:
    gpu.hertz = hertz

    def call() -> None:
        for _ in range(launches):
            gpu.launch(host * MICRO, gpu_time * MICRO)

    found = sample(gpu, call)
    assert found.seconds == pytest.approx(launches * gpu_time * MICRO, rel=1e-6)
    assert found.host == pytest.approx(launches * host * MICRO, rel=1e-6) and not found.exposed


def test_a_longer_spin_is_kept_for_the_calls_to_come(gpu: Device) -> None:
    clock, spins = clock_of(gpu), []
    slept = torch.cuda._sleep
    torch.cuda._sleep = lambda cycles: (spins.append(cycles), slept(cycles))  # undone by the fixture
    call = lambda: gpu.launch(3000 * MICRO, 10 * MICRO)  # noqa: E731
    for _ in range(3):
        clock.take(call)
    assert len(spins) == 4 and spins[0] == measure.SPIN_CYCLES < spins[1] == spins[2] == spins[3]


def test_a_call_that_waits_for_the_device_is_timed_as_it_is(gpu: Device) -> None:
    """What reads a value outlasts every spin: its host time is the user's, and it is marked."""

    def reads_a_value() -> None:
        gpu.launch(10 * MICRO, 100 * MICRO)
        gpu.synchronize()
        gpu.launch(400 * MICRO, 100 * MICRO)

    clock = clock_of(gpu)
    waits, other = clock.take(reads_a_value), clock.take(lambda: gpu.launch(400 * MICRO, 100 * MICRO))
    assert waits.exposed and waits.seconds >= 600 * MICRO
    assert not other.exposed and other.seconds == pytest.approx(100 * MICRO)
    before = gpu.now
    clock.take(reads_a_value)
    assert gpu.now - before < 2000 * MICRO  # tried behind a spin no more


def test_more_launches_than_the_queue_holds_are_exposed(gpu: Device) -> None:
    gpu.slots = 50

    def call() -> None:
        for _ in range(200):
            gpu.launch(10 * MICRO, 1 * MICRO)

    assert sample(gpu, call).exposed


def test_results_have_the_hosts_time_in_a_column_of_its_own(gpu: Device) -> None:
    samples = timing.interleave(
        {"ours": lambda: gpu.launch(400 * MICRO, 100 * MICRO), "its": lambda: gpu.launch(20 * MICRO, 100 * MICRO)},
        clock_of(gpu),
        timing.Effort(3, 3, 0.0),
    )
    ours, its = (timing.spreads(samples[name]) for name in ("ours", "its"))
    assert ours["seconds"]["median"] == pytest.approx(its["seconds"]["median"]) == pytest.approx(100 * MICRO)
    assert (ours["host_seconds"]["median"], its["host_seconds"]["median"]) == pytest.approx((400 * MICRO, 20 * MICRO))
    assert not ours["host_exposed"]
    assert timing.spreads([timing.Sample(1.0)]).keys() == {"seconds"}

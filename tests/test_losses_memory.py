"""What the losses hold at once, by the allocator's own count: it grows with the batch, never with its square."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from losses_problem import LOSSES, problem

MIB = 2**20


def peak_bytes(call: Callable[[], object]) -> int:
    """The most that torch's CPU allocator held at once during `call`, beyond what it held before."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak


def forward_backward(loss: str, N: int, D: int) -> Callable[[], object]:
    p = problem(loss, N, G=D // 32, B=32, normalize=True)
    return lambda: torch.autograd.grad(p.call("torch"), list(p.leaves.values()))


def test_the_count_counts() -> None:
    assert 4 * MIB <= peak_bytes(lambda: torch.ones(2**20)) < 5 * MIB


@pytest.mark.parametrize("loss", LOSSES)
def test_memory_grows_with_the_rows(loss: str) -> None:
    """At most 64 MiB and a constant times (M + N)·D; the matrix alone would be 256 MiB here."""
    N, D = 8192, 32
    peak = peak_bytes(forward_backward(loss, N, D))
    assert peak < 64 * MIB + 16 * 2 * N * D * 4
    assert peak < N * N * 4 / 2


def test_memory_is_linear() -> None:
    """Twice the pairs add no more than the rows they add: no term in N² is hidden below the bound."""
    small, large = (peak_bytes(forward_backward("info_nce", N, 32)) for N in (4096, 8192))
    assert large - small <= 20 * 2 * 4096 * 32 * 4

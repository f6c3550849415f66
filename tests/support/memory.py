"""What a call holds at once, by the allocators' own count, and what the package promises of it."""

from __future__ import annotations

from collections.abc import Callable

import torch

MIB = 2**20
#: Beyond inputs, results, gradients and a constant times (M + N)·D numbers.
ALLOWED = {"cpu": 64 * MIB, "cuda": 256 * MIB}


def peak_bytes(call: Callable[[], object], device: str = "cpu") -> int:
    """The most that torch's allocator held at once during `call`, beyond what it held before."""
    if device == "cuda":
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        call()
    held = peak = 0
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    for event in sorted(events, key=lambda e: e.start_ns()):
        held += event.nbytes()
        peak = max(peak, held)
    return peak

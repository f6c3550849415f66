"""What the benchmark's tests share: measurements that take no time."""

from __future__ import annotations

from pathlib import Path

import pytest

from bench import machine, timing

PERF = Path(__file__).resolve().parents[2] / "perf"
#: Two samples, with hardly a byte of cache emptied before each.
SHORT = timing.Effort(2, 2, 0.0, flush_bytes=2**12)


def quick(patch: pytest.MonkeyPatch) -> None:
    """Small ceilings and caches, and between contenders no collection of all the garbage of a test run."""
    patch.setitem(machine.COPY_BYTES, "cpu", 2**16)
    patch.setitem(machine.MATRIX_SIDE, "cpu", 32)
    patch.setattr(timing, "CPU_FLUSH_BYTES", 2**12)
    patch.setattr(machine, "release", lambda *_: None)
